"""Images in folders, one folder a class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from picnn_fast._extras import extra
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, SeededDataModule, colours
from picnn_fast.data.photographs import reading

with extra("train"):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2


class ImageFolderDataModule(SeededDataModule):
    """RGB images from ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Test images are resized to a square. Training images are a random crop of 50 to 100 % of the
    area, resized to that square, and flipped left to right half of the time. Both are normalised
    channel by channel. Images are ``[3, image_size, image_size]`` float32, labels int64 in the
    alphabetical order of the class folders. A file that cannot be read as an image is an OSError
    that names it, once its turn comes.

    Args:
        root: folder that holds ``train`` and ``test``.
        batch_size: images a step (a process, when there are several).
        image_size: side of the square, pixels.
        seed: of the order of the images and of the augmentation.
        augment: random crop and flip in training; False resizes as in testing.
        mean, std: per colour, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images.

    Raises:
        FileNotFoundError: ``train`` or ``test`` is missing or holds no class folder.
        ValueError: the two do not hold the same classes, or an argument is out of range.

    Example:
        >>> from picnn_fast.data import ImageFolderDataModule
        >>> data = ImageFolderDataModule("birds", image_size=128)  # doctest: +SKIP
    """

    in_channels = 3

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 64,
        *,
        image_size: int = 224,
        seed: int = 0,
        augment: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if image_size < 1:
            raise ValueError(f"image_size: got {image_size}, want pixels >= 1")
        colours("mean", mean)
        if min(colours("std", std)) <= 0:
            raise ValueError(f"std: got {tuple(std)}, want values > 0")
        self.root = Path(root)
        self.image_size = image_size
        classes = {split: self._class_folders(split) for split in ("train", "test")}
        if classes["train"] != classes["test"]:
            apart = sorted(set(classes["train"]) ^ set(classes["test"]))
            raise ValueError(
                f"root: {self.root}/train and {self.root}/test hold different classes;"
                f" only one of them has {', '.join(apart)}"
            )
        self.class_names = classes["train"]
        self.num_classes = len(self.class_names)

        square = (image_size, image_size)
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.test_transform = v2.Compose([v2.Resize(square, antialias=True), *finish])
        self.train_transform = self.test_transform
        if augment:
            crop = v2.RandomResizedCrop(square, scale=(0.5, 1.0), antialias=True)
            self.train_transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *finish])

    def _class_folders(self, split: str) -> list[str]:
        folder = self.root / split
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not names:
            problem = "holds no class folder" if folder.is_dir() else "is missing"
            raise FileNotFoundError(
                f"root: {folder} {problem}; want {self.root}/train/<class>/<image>"
                f" and {self.root}/test/<class>/<image>"
            )
        return names

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):  # large folders take long to list
            return
        self.train_set = self._images("train", self.train_transform)
        self.test_set = self._images("test", self.test_transform)

    def _images(self, split: str, transform: Any) -> ImageFolder:
        return ImageFolder(str(self.root / split), transform=transform, loader=_image)


def _image(path: str) -> Image.Image:
    with reading(Path(path), "an image"), Image.open(path) as file:
        return file.convert("RGB")
