"""Data sets by name, and the Lightning data modules behind them."""

from collections.abc import Callable

from picnn_fast.data.animal_part import AnimalPart, animal_part
from picnn_fast.data.cifar import cifar10, cifar100
from picnn_fast.data.cub import CUB200, cub
from picnn_fast.data.digits import DigitsDataModule
from picnn_fast.data.image_folder import ImageFolderDataModule
from picnn_fast.data.imagenet import imagenet
from picnn_fast.data.images import ImageDataModule
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.part_animals import PartAnimals, part_animals
from picnn_fast.data.parts import PartDataModule, PartDataset, PartSample
from picnn_fast.data.preprocessing import Preprocessing
from picnn_fast.data.shards import ShardsDataModule
from picnn_fast.data.splits import Batches, read_image, shown_image
from picnn_fast.data.stl10 import stl10
from picnn_fast.data.tiny_imagenet import tiny_imagenet
from picnn_fast.data.voc_part import VOCPart, voc_part

__all__ = [
    "CUB200",
    "DATA",
    "AnimalPart",
    "Batches",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "PartAnimals",
    "PartDataModule",
    "PartDataset",
    "PartSample",
    "Preprocessing",
    "SeededDataModule",
    "ShardsDataModule",
    "VOCPart",
    "read_image",
    "shown_image",
]

# Called as ``DATA[name](batch_size=…, seed=…, …)``; what else it takes are the data set's options.
DATA: dict[str, Callable[..., SeededDataModule]] = {
    "digits": DigitsDataModule,
    "folder": ImageFolderDataModule,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "tiny-imagenet": tiny_imagenet,
    "imagenet": imagenet,
    "shards": ShardsDataModule,
    "part-animals": part_animals,
    "voc-part": voc_part,
    "cub": cub,
    "animal-part": animal_part,
}
