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


class _Digits(DigitsDataModule):
    """TEMP digits.

    Args:
        augment: shifts.
    """

    validation_source = "x"

    def __init__(
        self, *, batch_size: int, seed: int, augment: bool = True, num_workers: int | None = None
    ):
        super().__init__(batch_size, seed=seed, max_shift=int(augment))


class _Folder(ImageFolderDataModule):
    """TEMP folder.

    Args:
        root: r.
    """

    validation_source = "x"

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        seed: int,
        image_size: int = 224,
        augment: bool = True,
        num_workers: int | None = None,
        validation: float = 0.1,
    ):
        super().__init__(
            root,
            batch_size,
            image_size=image_size,
            seed=seed,
            augment=augment,
            num_workers=num_workers or 0,
        )


class _Animals(PartDataModule):
    """TEMP animals."""

    validation_source = "x"

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        image_size: int = 128,
        train_images: int = 2000,
        test_images: int = 1200,
    ):
        super().__init__(
            PartAnimals("train", train_images, image_size=image_size),
            PartAnimals("test", test_images, image_size=image_size),
            batch_size,
            seed=seed,
        )

    def setup(self, stage=None):
        pass


DATA = {"digits": _Digits, "folder": _Folder, "part-animals": _Animals}
