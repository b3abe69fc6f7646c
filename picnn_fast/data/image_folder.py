"""Images in folders, one folder a class."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from picnn_fast._extras import extra
from picnn_fast.data.images import Augmentation, ImageDataModule, PictureFiles
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, held_out, readers

with extra("train"):
    from torchvision.datasets.folder import IMG_EXTENSIONS

# Folders that systems and tools put beside a user's own; hidden ones start with a dot.
_FOREIGN = frozenset(
    {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
_VALIDATION = 0.1  # share of the training images
# Of each class, where the folder has no split: always the same images, whatever the seeds.
_TEST_SHARE, _TEST_SEED = 0.2, 0

_Labelled = tuple[str, int]  # an image file and its class


class ImageFolderDataModule(ImageDataModule):
    """RGB images from ``root/train/<class>/*`` and ``root/test/<class>/*``.

    Images are ``[3, image_size, image_size]``, normalised channel by channel on their way to the
    network, labels int64 in the alphabetical order of the class folders. Images are turned upright
    as their EXIF tag says; grey ones of 16 bits are scaled to 8; a JPEG with twice the pixels that
    are needed, or more, is decoded at a half of its size, a quarter or an eighth. Hidden files and
    folders, and those of tools such as ``__MACOSX``, are left out. A file that cannot be read as an
    image, or that has more than 179 million pixels, is an OSError that names it, once its turn
    comes.

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
        cache: gigabytes of memory for decoded images, which all processes that read them share, so
            that they are decoded once for all epochs; None: a quarter of what is free; 0: none.
            What does not fit is decoded each time. Where images are resized before they are cropped
            at random, or are not cropped so, it is the resized ones that are kept.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: a split is missing, holds no class folder, or one without an image.
        ValueError: splits do not hold the same classes, or an argument is out of range.
        TypeError: a number of pixels is no int.

    Example:
        >>> from picnn_fast.data import ImageFolderDataModule
        >>> data = ImageFolderDataModule("birds", image_size=128)  # doctest: +SKIP
    """

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
        cache: float | None = None,
        num_workers: int | None = None,
    ) -> None:
        augmentation = Augmentation(
            image_size=image_size,
            resize=resize,
            test_crop=test_crop,
            augment=augment,
            crop=crop,
            padding=padding,
            flip=flip,
            color_jitter=color_jitter,
            mean=mean,
            std=std,
        )
        workers = readers(num_workers)
        super().__init__(
            augmentation, batch_size, workers, seed, validation, validation_seed, cache
        )
        self.root = Path(root).expanduser()
        self._list_images()

    def _list_images(self) -> None:
        """The sets, their classes, and where the validation images come from."""
        folders = self._split_folders()
        classes = {split: self._class_folders(folder) for split, folder in folders.items()}
        class_names = classes["train"]
        for split, names in classes.items():
            if names != class_names:
                apart = ", ".join(sorted(set(names) ^ set(class_names)))
                raise ValueError(
                    f"root: {folders['train']} and {folders[split]} hold different classes;"
                    f" only one of them has {apart}"
                )
        files = {split: labelled_files(folder, class_names) for split, folder in folders.items()}
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
        chosen = None
        if "validation" in files and self.validation > 0:
            chosen = PictureFiles(files["validation"])
            self.validation_source = f"the {len(chosen.files)} images in {folders['validation']}"
        self.use(class_names, PictureFiles(files["train"]), PictureFiles(files["test"]), chosen)
        self.validation_source += remark

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
        names = class_folders(folder)
        if not names:
            problem = "holds no class folder" if folder.is_dir() else "is missing"
            raise FileNotFoundError(
                f"root: {folder} {problem}; want {self.root}/train/<class>/<image> and"
                f" {self.root}/test/<class>/<image>, or {self.root}/<class>/<image>"
            )
        return names


def class_folders(folder: Path) -> list[str]:
    """Their names in alphabetical order; none where there is no such folder."""
    return [path.name for path in _folders(folder)]


def _folders(folder: Path) -> list[Path]:
    """Class folders in alphabetical order."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _foreign(p.name))


def labelled_files(folder: Path, class_names: Sequence[str]) -> list[_Labelled]:
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
