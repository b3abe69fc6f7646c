"""Labelled images of any size: how they become squares, in training and in testing."""

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.files import open_image, reading
from picnn_fast.data.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ByteImages,
    SeededDataModule,
    colours,
)
from picnn_fast.data.memory import Shelf, bound
from picnn_fast.data.preprocessing import Preprocessing

with extra("train"):
    from PIL import Image
    from torchvision.transforms import v2

_LEAST_AREA = 0.5  # of a random crop that is resized, whose sides are as 3 to 4 at most

_Change = Callable[[Image.Image], Image.Image]


class Pictures(ABC):
    """Where images are read from: labels, and RGB images of any size."""

    labels: Sequence[int]
    in_memory = False

    @abstractmethod
    def open(self, index: int, least: int) -> Image.Image:
        """An image, of which so many pixels of its shorter side are enough.

        Raises:
            DamagedFileError: it cannot be read.
        """

    @abstractmethod
    def chosen(self, indices: Sequence[int]) -> "Pictures":
        """Some of them."""


class PictureFiles(Pictures):
    """Image files, each with its label."""

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = list(files)
        self.labels = [label for _, label in self.files]

    def open(self, index: int, least: int) -> Image.Image:
        path = self.files[index][0]
        with reading(path, "an image"):
            return open_image(path, least)

    def chosen(self, indices: Sequence[int]) -> "PictureFiles":
        return PictureFiles([self.files[index] for index in indices])


class PictureArrays(Pictures):
    """Images in memory, ``[n, H, W, 3]`` uint8, each with its label."""

    in_memory = True

    def __init__(self, arrays: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.arrays, self.labels = arrays, list(labels)

    def open(self, index: int, least: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])

    def chosen(self, indices: Sequence[int]) -> "PictureArrays":
        # An array that all are part of is not copied.
        every = len(indices) == len(self.labels)
        arrays = self.arrays if every else self.arrays[list(indices)]
        return PictureArrays(arrays, [self.labels[index] for index in indices])


class LabelledImages(ByteImages):
    """Pictures as they are shown to a network.

    Args:
        pictures: where they are read from.
        prepare: always does the same to an image.
        change: does something else each time; None: nothing.
        least: pixels of a picture's shorter side that are enough.

    Attributes:
        shelf: where prepared images are kept, or None.
    """

    shelf: Shelf | None = None

    def __init__(
        self, pictures: Pictures, prepare: _Change | None, change: _Change | None, least: int
    ) -> None:
        self.pictures, self.prepare, self.change = pictures, prepare, change
        self.least = least

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def label(self, index: int) -> int:
        return self.pictures.labels[index]

    def pixels(self, index: int) -> Tensor:
        kept = None if self.shelf is None else self.shelf.get(index)
        if kept is not None and self.change is None:
            return torch.from_numpy(kept.copy())
        if kept is not None:
            image = Image.fromarray(kept)
        else:
            image = self.pictures.open(index, self.least)
            image = image if self.prepare is None else self.prepare(image)
            if self.shelf is not None:
                self.shelf.keep(index, np.asarray(image))
        image = image if self.change is None else self.change(image)
        return torch.from_numpy(np.array(image))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How squares are cut out of images; the options of a data set, which see.

    Raises:
        ValueError: an option out of range, or options that do not go together.
        TypeError: a number of pixels is no int, or a switch no bool.
    """

    image_size: int
    resize: int | None = None
    test_crop: Literal["center", "stretch"] = "center"
    augment: bool = True
    crop: Literal["random-resized", "random", "none"] = "random-resized"
    padding: int = 0
    flip: bool = True
    color_jitter: tuple[float, float, float, float] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        checks.integer("image_size", self.image_size, 1)
        checks.one_of("test_crop", self.test_crop, ("center", "stretch"))
        checks.one_of("crop", self.crop, ("random-resized", "random", "none"))
        checks.boolean("augment", self.augment)
        checks.boolean("flip", self.flip)
        resize, crop = self.resize, self.crop
        if resize is None:
            resize = self.image_size
        elif self.test_crop == "stretch" and crop != "random":
            raise ValueError(
                f"resize: got {resize} with crop {crop!r} and test_crop 'stretch', which need none;"
                " want None, or crop 'random'"
            )
        if checks.integer("resize", resize, 1) < self.image_size:
            raise ValueError(
                f"resize: got {resize}, want image_size ({self.image_size}) or more pixels"
            )
        if checks.integer("padding", self.padding, 0) > 0 and crop != "random":
            raise ValueError(
                f"padding: got {self.padding} with crop {crop!r}, want 0, or crop 'random'"
            )
        colours("mean", self.mean)
        if min(colours("std", self.std)) <= 0:
            raise ValueError(f"std: got {tuple(self.std)}, want values > 0")
        if self.color_jitter is not None:
            try:
                v2.ColorJitter(*self.color_jitter)
            except (TypeError, ValueError) as error:
                raise ValueError(f"color_jitter: got {self.color_jitter}: {error}") from error

    @classmethod
    def of_small(
        cls, image_size: int, *, augment: bool, mean: Sequence[float], std: Sequence[float]
    ) -> "Augmentation":
        """Random crops out of a border of zeros, an eighth of the side, as small images have."""
        padding = image_size // 8
        return cls(image_size, augment=augment, crop="random", padding=padding, mean=mean, std=std)

    @property
    def preprocessing(self) -> Preprocessing:
        """Of test images."""
        resize = self.resize or self.image_size
        return Preprocessing(
            self.image_size,
            None if self.test_crop == "stretch" else resize,
            mean=self.mean,
            std=self.std,
        )

    def tested(self, pictures: Pictures) -> LabelledImages:
        """Pictures as a network is tested on them."""
        way = self.preprocessing
        return LabelledImages(pictures, way.prepare, None, way.least)

    def trained(self, pictures: Pictures) -> LabelledImages:
        """Pictures as a network is trained on them."""
        if not self.augment:
            return self.tested(pictures)
        square = (self.image_size, self.image_size)
        prepare: _Change | None = self.preprocessing.prepare
        least = self.preprocessing.least
        changes: list[Any] = []
        if self.crop == "random-resized":
            prepare = None
            least = math.ceil(2 * self.image_size / math.sqrt(_LEAST_AREA * 3 / 4))
            changes = [v2.RandomResizedCrop(square, scale=(_LEAST_AREA, 1.0), antialias=True)]
        elif self.crop == "random":
            prepare = v2.Resize(self.resize or self.image_size, antialias=True)
            least = 2 * (self.resize or self.image_size)
            changes = [v2.RandomCrop(square, padding=self.padding or None)]
        if self.flip:
            changes.append(v2.RandomHorizontalFlip())
        if self.color_jitter is not None:
            changes.append(v2.ColorJitter(*self.color_jitter))
        return LabelledImages(pictures, prepare, v2.Compose(changes) if changes else None, least)


class ImageDataModule(SeededDataModule):
    """Trains and tests on RGB images with labels, of one size and normalised once they are read.

    Loaders yield images ``[B, 3, image_size, image_size]`` of bytes, and labels ``[B]`` int64;
    ``as_taken`` makes of them what a network takes. Images of the sets are float32 in [0, 1].

    Args:
        augmentation: how images become squares.
        batch_size, num_workers, seed, validation, validation_seed: see ``SeededDataModule``.
        cache: gigabytes for images that are read from files, see ``ImageFolderDataModule``.
    """

    in_channels = 3

    def __init__(
        self,
        augmentation: Augmentation,
        batch_size: int,
        num_workers: int,
        seed: int,
        validation: float,
        validation_seed: int,
        cache: float | None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation, validation_seed)
        self.augmentation, self.cache = augmentation, bound(cache)
        self.preprocessing = augmentation.preprocessing
        self.image_size = augmentation.image_size
        self.mean = torch.tensor(augmentation.mean).view(3, 1, 1)
        self.std = torch.tensor(augmentation.std).view(3, 1, 1)

    def use(
        self,
        class_names: Sequence[str],
        train: Pictures,
        test: Pictures,
        validation: Pictures | None = None,
    ) -> None:
        """Make the sets; validation pictures that are not given are held out of ``train``."""
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        if validation is None:
            kept, out = self.hold_out(train.labels)
            train, validation = train.chosen(kept), train.chosen(out)
        self.train_set = self.augmentation.trained(train)
        if self.train_set.change is not None:
            self.plain_train_set = self.augmentation.tested(train)
        self.test_set = self.augmentation.tested(test)
        if len(validation.labels) > 0:
            self.validation_set = self.augmentation.tested(validation)

    @property
    def remark(self) -> str | None:
        """That images are much smaller than what is made of them, by the first one."""
        pictures = self.train_set.pictures  # type: ignore[attr-defined]
        try:
            side = min(pictures.open(0, sys.maxsize).size)
        except OSError:  # which is told when its turn comes
            return None
        if 2 * side > self.image_size:
            return None
        return (
            f"the first image has {side} pixels, which become {self.image_size}, with"
            f" {(self.image_size / side) ** 2:.0f} times the work: --data.image_size {side} leaves"
            " images as they are"
        )

    def read_from_files(self) -> list[LabelledImages]:
        sets = self.train_set, self.plain_train_set, self.validation_set, self.test_set
        images = [one for one in sets if isinstance(one, LabelledImages)]
        return [one for one in images if not one.pictures.in_memory]
