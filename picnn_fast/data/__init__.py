"""Lightning data modules: digits, folders of images, and images whose parts are annotated."""

from picnn_fast.data.animal_part import AnimalPart
from picnn_fast.data.cub import CUB200
from picnn_fast.data.digits import DigitsDataModule
from picnn_fast.data.image_folder import ImageFolderDataModule
from picnn_fast.data.part_animals import PartAnimals
from picnn_fast.data.parts import PartDataModule, PartDataset, PartSample
from picnn_fast.data.voc_part import VOCPart

__all__ = [
    "CUB200",
    "AnimalPart",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "PartAnimals",
    "PartDataModule",
    "PartDataset",
    "PartSample",
    "VOCPart",
]
