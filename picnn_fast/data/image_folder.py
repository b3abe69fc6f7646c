"""Images in folders, one folder a class."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from picnn_fast._extras import extra
from picnn_fast.data.loading import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SeededDataModule,
    colours,
    held_out,
    readers,
)
from picnn_fast.data.photographs import reading, rgb
from picnn_fast.ops import checks

with extra("train"):
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms import v2

# Folders that systems and tools put beside a user's own; hidden ones start with a dot.
_FOREIGN = frozenset(
    {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_VALIDATION = 0.1  # share of the training images
# Of each class, where the folder has no split: always the same images, whatever the seeds.
_TEST_SHARE, _TEST_SEED = 0.2, 0

_Labelled = tuple[str, int]  # an image file and its class


class ImageFolderDataModule(SeededDataModule):
    """RGB images from ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Images are ``[3, image_size, image_size]`` float32, normalised channel by channel, labels int64
    in the alphabetical order of the class folders. Grey images of 16 bits are scaled to 8. Hidden
    files and folders, and those of tools such as ``__MACOSX``, are left out. A file that cannot be
    read as an image is an OSError that names it, once its turn comes.

    Validation images come from ``root/validation`` or ``root/val`` where there is one, else they
    are held out of the training images; ``validation=0`` does without either. Where there is no
    ``root/test``, that folder is the test split instead. Where ``root`` has no split but holds the
    class folders itself, a fifth of each class is the test split, always the same.
    ``validation_source`` says which it is.

    Ours is ``crop="random-resized"``; PICNN's published code has ``resize=256, crop="random",
    color_jitter=(0.4, 0.4, 0.4, 0.1)`` at 224 pixels, and the usual training on CIFAR-10
    ``image_size=32, crop="random", padding=4``.

    Args:
        root: folder that holds ``train`` and ``test``, or class folders.
        batch_size: images a step (a process, when there are several).
        image_size: side of the square, pixels.
        seed: of the order of the images and of the augmentation.
        resize: pixels of an image's shorter side, before a random crop in training and the central
            one in testing; None: image_size.
        test_crop: "center": the middle square of the resized image; "stretch": the whole image,
            resized to the square whatever its shape.
        augment: False shows training images as in testing, and leaves crop, padding, flip and
            color_jitter without effect.
        crop: of training images: "random-resized": 50 to 100 % of the area, resized to the square;
            "random": a square of image_size pixels of the resized image; "none": as in testing.
        padding: zero pixels put around the image before a random crop.
        flip: turn half of the training images left to right.
        color_jitter: of training images: greatest change of brightness, contrast, saturation and
            hue, as torchvision's ``ColorJitter`` takes them; None: no change.
        validation: share of the training images held out to validate on; 0: no validation. Images
            in a validation folder are taken in place of the default, and no other goes with one.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: a split is missing, holds no class folder, or one without an image.
        ValueError: splits do not hold the same classes, or an argument is out of range.
        TypeError: a number of pixels is no int.

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
        validation: float = _VALIDATION,
        validation_seed: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size, readers(num_workers), seed, validation, validation_seed)
        checks.integer("image_size", image_size, 1)
        checks.one_of("test_crop", test_crop, ("center", "stretch"))
        checks.one_of("crop", crop, ("random-resized", "random", "none"))
        if resize is None:
            resize = image_size
        elif test_crop == "stretch" and crop != "random":
            raise ValueError(
                f"resize: got {resize} with crop {crop!r} and test_crop 'stretch', which need none;"
                " want None, or crop 'random'"
            )
        if checks.integer("resize", resize, 1) < image_size:
            raise ValueError(f"resize: got {resize}, want image_size ({image_size}) or more pixels")
        if checks.integer("padding", padding, 0) > 0 and crop != "random":
            raise ValueError(f"padding: got {padding} with crop {crop!r}, want 0, or crop 'random'")
        colours("mean", mean)
        if min(colours("std", std)) <= 0:
            raise ValueError(f"std: got {tuple(std)}, want values > 0")
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.root = Path(root).expanduser()
        self.image_size = image_size

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
        self._list_images()

    def _list_images(self) -> None:
        """The sets, their classes, and where the validation images come from."""
        folders = self._split_folders()
        classes = {split: self._class_folders(folder) for split, folder in folders.items()}
        self.class_names = classes["train"]
        self.num_classes = len(self.class_names)
        for split, names in classes.items():
            if names != self.class_names:
                apart = ", ".join(sorted(set(names) ^ set(self.class_names)))
                raise ValueError(
                    f"root: {folders['train']} and {folders[split]} hold different classes;"
                    f" only one of them has {apart}"
                )
        files = {split: _labelled(folder, self.class_names) for split, folder in folders.items()}
        remark = ""
        if "test" not in files:
            images = files["train"]
            kept, out = held_out([label for _, label in images], _TEST_SHARE, _TEST_SEED)
            files |= {"train": [images[i] for i in kept], "test": [images[i] for i in out]}
            remark = f"; the test split is {len(out)} of the {len(images)} images, drawn once"
        elif folders["test"].name != "test":
            remark = f"; the test split is {folders['test']}"
        if "validation" in files and self.validation not in (0, _VALIDATION):
            raise ValueError(
                f"validation: got {self.validation} beside {folders['validation']}, want"
                f" {_VALIDATION}, the default, to validate on the images there, or 0 for none"
            )
        if "validation" in files and self.validation > 0:
            chosen = files["validation"]
            self.validation_source = f"the {len(chosen)} images in {folders['validation']}"
        else:
            images = files["train"]
            kept, out = self.hold_out([label for _, label in images])
            files["train"], chosen = [images[i] for i in kept], [images[i] for i in out]
        self.validation_source += remark
        self.train_set = _Images(files["train"], self.train_transform)
        self.plain_train_set = _Images(files["train"], self.test_transform)
        self.test_set = _Images(files["test"], self.test_transform)
        if chosen:
            self.validation_set = _Images(chosen, self.test_transform)

    def _split_folders(self) -> dict[str, Path]:
        """The folder of each split; of ``train`` alone where ``root`` holds the classes itself."""
        if self.root.is_file():
            raise ValueError(
                f"root: got {self.root}, a file; want a folder (an archive has to be unpacked)"
            )
        found = {"train": self.root / "train", "test": self.root / "test"}
        own = [self.root / name for name in ("validation", "val") if (self.root / name).is_dir()]
        if len(own) == 2:
            raise ValueError(
                f"root: {self.root} holds both validation and val, want one of the two"
            )
        if own:
            found["validation" if found["test"].is_dir() else "test"] = own[0]
        elif not found["train"].is_dir() and not found["test"].is_dir():
            classes = _folders(self.root)
            if len(classes) > 1 and any(_is_image(p) for c in classes for p in c.iterdir()):
                return {"train": self.root}
        return found

    def _class_folders(self, folder: Path) -> list[str]:
        names = [path.name for path in _folders(folder)]
        if not names:
            problem = "holds no class folder" if folder.is_dir() else "is missing"
            raise FileNotFoundError(
                f"root: {folder} {problem}; want {self.root}/train/<class>/<image> and"
                f" {self.root}/test/<class>/<image>, or {self.root}/<class>/<image>"
            )
        return names


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, files: Sequence[_Labelled], transform: Any) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with reading(Path(path), "an image"), Image.open(path) as file:
            image = rgb(file)
        return self.transform(image), label


def _folders(folder: Path) -> list[Path]:
    """Class folders in alphabetical order."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _foreign(p.name))


def _labelled(folder: Path, class_names: Sequence[str]) -> list[_Labelled]:
    """The images of each class.

    Raises:
        FileNotFoundError: a class has none.
    """
    files: list[_Labelled] = []
    for label, name in enumerate(class_names):
        found = _images_below(folder / name)
        if not found:
            raise FileNotFoundError(
                f"root: {folder / name} holds no image; want files that end in one of"
                f" {', '.join(IMG_EXTENSIONS)}"
            )
        files += [(path, label) for path in found]
    return files


def _images_below(folder: Path) -> list[str]:
    """The image files in a class folder and in those below it.

    Linked folders are read too, each once, but not those that hold the class folder: they lead
    round in circles and to the images of other classes.
    """
    found: list[str] = []
    start = Path(os.path.realpath(folder))
    seen = {start}
    for place, folders, names in os.walk(folder, followlinks=True):
        entered = []
        for name in sorted(folders):
            target = Path(os.path.realpath(os.path.join(place, name)))
            if not (_foreign(name) or target in seen or start.is_relative_to(target)):
                seen.add(target)
                entered.append(name)
        folders[:] = entered
        paths = (Path(place, name) for name in names)
        found += [str(path) for path in paths if _is_image(path)]
    return sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not _foreign(path.name)


def _foreign(name: str) -> bool:
    return name.startswith(".") or name in _FOREIGN
