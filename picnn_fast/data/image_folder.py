"""Images in folders, one folder a class."""

import copy
from pathlib import Path
from typing import Any, Literal

import torch

from picnn_fast._extras import extra
from picnn_fast.data.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SeededDataModule,
    colours,
    readers,
)
from picnn_fast.data.photographs import reading
from picnn_fast.ops import checks

with extra("train"):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2


class ImageFolderDataModule(SeededDataModule):
    """RGB images from ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Images are ``[3, image_size, image_size]`` float32, normalised channel by channel, labels int64
    in the alphabetical order of the class folders. Validation images come from
    ``root/validation`` or ``root/val`` where there is one, else they are held out of the training
    images. A file that cannot be read as an image is an OSError that names it, once its turn comes.

    Ours is ``crop="random-resized"``; PICNN's published code has ``resize=256, crop="random",
    color_jitter=(0.4, 0.4, 0.4, 0.1)`` at 224 pixels, and the usual training on CIFAR-10
    ``image_size=32, crop="random", padding=4``.

    Args:
        root: folder that holds ``train`` and ``test``.
        batch_size: images a step (a process, when there are several).
        image_size: side of the square, pixels.
        seed: of the order of the images and of the augmentation.
        resize: pixels of an image's shorter side, before a random crop in training and the crop in
            testing; None: image_size.
        test_crop: "center": the middle square of the resized image; "stretch": the whole image,
            resized to the square whatever its shape.
        augment: False shows training images as in testing, and leaves crop, padding, flip and
            color_jitter without effect.
        crop: of training images: "random-resized": 50 to 100 % of the area, resized to the square;
            "random": a square of image_size pixels of the resized image; "none": as in testing.
        padding: zero pixels put around the image before a random crop.
        flip: left to right, half of the training images.
        color_jitter: of training images: greatest change of brightness, contrast, saturation and
            hue, as torchvision's ``ColorJitter`` takes them; None: no change.
        validation: share of the training images held out to validate on, where there is no folder
            of validation images.
        validation_seed: of their choice.
        mean, std: per colour, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: ``train`` or ``test`` is missing or holds no class folder.
        ValueError: splits do not hold the same classes, or an argument is out of range.

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
        resize: int | None = None,
        test_crop: Literal["center", "stretch"] = "center",
        augment: bool = True,
        crop: Literal["random-resized", "random", "none"] = "random-resized",
        padding: int = 0,
        flip: bool = True,
        color_jitter: tuple[float, float, float, float] | None = None,
        validation: float = 0.1,
        validation_seed: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size, readers(num_workers), seed)
        if image_size < 1:
            raise ValueError(f"image_size: got {image_size}, want pixels >= 1")
        resize = image_size if resize is None else resize
        if resize < image_size:
            raise ValueError(f"resize: got {resize}, want image_size ({image_size}) or more pixels")
        checks.one_of("test_crop", test_crop, ("center", "stretch"))
        checks.one_of("crop", crop, ("random-resized", "random", "none"))
        if padding < 0 or (padding > 0 and crop != "random"):
            raise ValueError(f"padding: got {padding} with crop {crop}, want 0, or crop random")
        colours("mean", mean)
        if min(colours("std", std)) <= 0:
            raise ValueError(f"std: got {tuple(std)}, want values > 0")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        folders = {"train": "train", "test": "test"}
        for name in ("validation", "val"):
            if (self.root / name).is_dir():
                folders.setdefault("validation", name)
        classes = {split: self._class_folders(folder) for split, folder in folders.items()}
        self.class_names = classes["train"]
        for split, names in classes.items():
            if names != self.class_names:
                apart = ", ".join(sorted(set(names) ^ set(self.class_names)))
                raise ValueError(
                    f"root: {self.root}/train and {self.root}/{folders[split]} hold different"
                    f" classes; only one of them has {apart}"
                )
        self.num_classes = len(self.class_names)

        square = (image_size, image_size)
        resized = v2.Resize(resize, antialias=True)
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        shown: list[Any] = [v2.Resize(square, antialias=True)]
        if test_crop == "center":
            shown = [resized, v2.CenterCrop(square)]
        self.test_transform = v2.Compose([*shown, *finish])
        self.train_transform = self.test_transform
        if augment:
            if crop == "random-resized":
                shown = [v2.RandomResizedCrop(square, scale=(0.5, 1.0), antialias=True)]
            elif crop == "random":
                shown = [resized, v2.RandomCrop(square, padding=padding or None)]
            if flip:
                shown.append(v2.RandomHorizontalFlip())
            if color_jitter is not None:
                try:
                    shown.append(v2.ColorJitter(*color_jitter))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"color_jitter: got {color_jitter}: {error}") from error
            self.train_transform = v2.Compose([*shown, *finish])
        self._folders = folders
        self._held_out = (validation, validation_seed)
        if not 0 <= validation < 1:
            raise ValueError(f"validation: got {validation!r}, want a share in [0, 1)")

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
        train = self._images("train", self.train_transform)
        self.train_set = train
        self.test_set = self._images("test", self.test_transform)
        if "validation" in self._folders:
            own = self._images("validation", self.test_transform)
            self.validation_set = own
            self.validation_source = f"the {len(own)} of {own.root}"
        else:
            plain = copy.copy(train)  # the same files
            plain.transform = self.test_transform
            self.hold_out(train.targets, plain, *self._held_out)

    def _images(self, split: str, transform: Any) -> ImageFolder:
        folder = self.root / self._folders[split]
        return ImageFolder(str(folder), transform=transform, loader=_image)


def _image(path: str) -> Image.Image:
    with reading(Path(path), "an image"), Image.open(path) as file:
        return file.convert("RGB")
