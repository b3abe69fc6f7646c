"""Data sets by name, and the Lightning data modules behind them."""

from collections.abc import Callable

from picnn_fast.data.animal_part import AnimalPart, animal_part
from picnn_fast.data.cub import CUB200, cub
from picnn_fast.data.digits import DigitsDataModule
from picnn_fast.data.image_folder import ImageFolderDataModule
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.part_animals import PartAnimals, part_animals
from picnn_fast.data.parts import PartDataModule, PartDataset, PartSample
from picnn_fast.data.preprocessing import Preprocessing
from picnn_fast.data.splits import Batches, read_image, shown_image
from picnn_fast.data.voc_part import VOCPart, voc_part

__all__ = [
    "CUB200",
    "DATA",
    "AnimalPart",
    "Batches",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "PartAnimals",
    "PartDataModule",
    "PartDataset",
    "PartSample",
    "Preprocessing",
    "SeededDataModule",
    "VOCPart",
    "read_image",
    "shown_image",
]

# Called as ``DATA[name](batch_size=…, seed=…, …)``; what else it takes are the data set's options.
DATA: dict[str, Callable[..., SeededDataModule]] = {
    "digits": DigitsDataModule,
    "folder": ImageFolderDataModule,
    "part-animals": part_animals,
    "voc-part": voc_part,
    "cub": cub,
    "animal-part": animal_part,
}
