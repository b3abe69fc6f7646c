"""STL-10."""

from pathlib import Path

import numpy as np

from picnn_fast._extras import extra
from picnn_fast.data.files import fetching, lines, reading
from picnn_fast.data.images import Augmentation, ImageDataModule, PictureArrays
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers

with extra("train"):
    from torchvision import datasets

_SIDE = 96


def stl10(
    root: str | Path,
    *,
    download: bool = False,
    image_size: int = _SIDE,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    num_workers: int | None = None,
) -> ImageDataModule:
    """STL-10: photographs of 96 pixels in 10 classes, 5,000 to train on and 8,000 to test on.

    The 100,000 without labels are not read. Training images are cropped at random out of a border
    of zeros, an eighth of their side, and flipped.

    Args:
        root: folder that holds ``stl10_binary``.
        download: fetch it where it is missing.
        image_size: side of the square images, pixels; those of the set have 96.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images and of the augmentation.
        augment: False shows training images as in testing.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: it is missing; says where it is to be had.
        ValueError: a file is damaged, or an argument out of range.

    Source:
        Coates et al., "An Analysis of Single Layer Networks in Unsupervised Feature Learning",
        AISTATS 2011.
    """
    root = Path(root).expanduser()
    folder = root / "stl10_binary"
    kind = datasets.STL10
    want = f"stl10_binary of {kind.url}, unpacked in {root}"
    needed = [folder / f"{split}_{half}.bin" for split in ("train", "test") for half in "Xy"]
    needed.append(folder / "class_names.txt")
    with fetching(root, download, want, there=all(path.is_file() for path in needed)):
        if download and not all(path.is_file() for path in needed):
            kind(root, download=True)
    augmentation = Augmentation.of_small(image_size, augment=augment, mean=mean, std=std)
    data = ImageDataModule(
        augmentation, batch_size, readers(num_workers), seed, validation, validation_seed, 0.0
    )
    names = lines(folder / "class_names.txt")
    data.use(names, *(_pictures(folder, split, len(names)) for split in ("train", "test")))
    return data


def _pictures(folder: Path, split: str, classes: int) -> PictureArrays:
    with reading(folder / f"{split}_X.bin", f"images of {_SIDE} pixels with {split}_y.bin"):
        # Columns come first.
        images = np.fromfile(folder / f"{split}_X.bin", np.uint8).reshape(-1, 3, _SIDE, _SIDE)
        labels = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(int) - 1
        if len(labels) != len(images) or not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"{len(images)} images and {len(labels)} labels, want 1 to {classes}")
    return PictureArrays(np.ascontiguousarray(images.transpose(0, 3, 2, 1)), labels.tolist())
