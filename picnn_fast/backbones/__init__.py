"""Backbones: one row each over one splitter, networks of our own, and receptive fields."""

from picnn_fast.backbones.classifiers import Preprocessing, classifier, preprocessing
from picnn_fast.backbones.networks import (
    ResidualBlock,
    cifar_resnet,
    small_cnn,
    small_resnet,
    small_vgg,
    vgg_m,
    vgg_s,
)
from picnn_fast.backbones.receptive_field import ReceptiveField, receptive_field
from picnn_fast.backbones.registry import BACKBONES, TIMM, Row, cut, cut_trained
from picnn_fast.backbones.split import Split, last_maps, split, split_halves
from picnn_fast.backbones.weights import is_weights_file

__all__ = [
    "BACKBONES",
    "TIMM",
    "Preprocessing",
    "ReceptiveField",
    "ResidualBlock",
    "Row",
    "Split",
    "cifar_resnet",
    "classifier",
    "cut",
    "cut_trained",
    "is_weights_file",
    "last_maps",
    "preprocessing",
    "receptive_field",
    "small_cnn",
    "small_resnet",
    "small_vgg",
    "split",
    "split_halves",
    "vgg_m",
    "vgg_s",
]
