"""CIFAR-10 and CIFAR-100, as torchvision reads them."""

from pathlib import Path
from typing import Any

import numpy as np

from picnn_fast._extras import extra
from picnn_fast.data.files import fetching
from picnn_fast.data.images import Augmentation, ImageDataModule, PictureArrays
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers

with extra("train"):
    from torchvision import datasets


def cifar10(
    root: str | Path,
    *,
    download: bool = False,
    image_size: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    num_workers: int | None = None,
) -> ImageDataModule:
    """CIFAR-10: photographs of 32 pixels in 10 classes, 50,000 to train on and 10,000 to test on.

    Training images are cropped at random out of a border of zeros, an eighth of their side, and
    flipped.

    Args:
        root: folder that holds ``cifar-10-batches-py``.
        download: fetch it where it is missing.
        image_size: side of the square images, pixels; those of the set have 32.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images and of the augmentation.
        augment: False shows training images as in testing.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: it is missing or damaged; says where it is to be had.
        ValueError: an argument is out of range.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _cifar(
        datasets.CIFAR10,
        Path(root),
        download,
        Augmentation.of_small(image_size, augment=augment, mean=mean, std=std),
        (batch_size, readers(num_workers), seed, validation, validation_seed, 0.0),
    )


def cifar100(
    root: str | Path,
    *,
    download: bool = False,
    image_size: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    num_workers: int | None = None,
) -> ImageDataModule:
    """CIFAR-100: photographs of 32 pixels in 100 classes, 50,000 to train on and 10,000 to test on.

    Training images are cropped at random out of a border of zeros, an eighth of their side, and
    flipped.

    Args:
        root: folder that holds ``cifar-100-python``.
        download: fetch it where it is missing.
        image_size: side of the square images, pixels; those of the set have 32.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images and of the augmentation.
        augment: False shows training images as in testing.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: it is missing or damaged; says where it is to be had.
        ValueError: an argument is out of range.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return _cifar(
        datasets.CIFAR100,
        Path(root),
        download,
        Augmentation.of_small(image_size, augment=augment, mean=mean, std=std),
        (batch_size, readers(num_workers), seed, validation, validation_seed, 0.0),
    )


def _cifar(
    kind: Any, root: Path, download: bool, augmentation: Augmentation, rest: tuple[Any, ...]
) -> ImageDataModule:
    root = root.expanduser()
    want = f"{kind.base_folder} of {kind.url}, unpacked in {root}"
    with fetching(root, download, want):
        # Their checksums are looked at before they are unpickled.
        train, test = (kind(root, train=train, download=download) for train in (True, False))
    data = ImageDataModule(augmentation, *rest)
    pictures = (
        PictureArrays(np.ascontiguousarray(split.data), split.targets) for split in (train, test)
    )
    data.use(train.classes, *pictures)
    return data
