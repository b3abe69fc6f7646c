"""Backbones: one row each over one splitter, networks of our own, and receptive fields."""

from picnn_fast.backbones.networks import (
    ResidualBlock,
    small_cnn,
    small_resnet,
    small_vgg,
    vgg_m,
    vgg_s,
)
from picnn_fast.backbones.receptive_field import ReceptiveField, receptive_field
from picnn_fast.backbones.registry import BACKBONES, Row, cut
from picnn_fast.backbones.split import Split, split, split_halves

__all__ = [
    "BACKBONES",
    "ReceptiveField",
    "ResidualBlock",
    "Row",
    "Split",
    "cut",
    "receptive_field",
    "small_cnn",
    "small_resnet",
    "small_vgg",
    "split",
    "split_halves",
    "vgg_m",
    "vgg_s",
]
