"""ImageNet, the 1,000 classes of ILSVRC 2012."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from picnn_fast.data.files import lines, need, reading
from picnn_fast.data.image_folder import class_folders, labelled_files
from picnn_fast.data.images import Augmentation, ImageDataModule, PictureFiles
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers

_DOWNLOAD = (
    "ILSVRC 2012 (https://image-net.org/challenges/LSVRC/2012, with an account) as"
    " train/<wnid>/<image>.JPEG and val/<wnid>/<image>.JPEG; or as Kaggle's"
    " imagenet-object-localization-challenge unpacks: ILSVRC/Data/CLS-LOC/train/<wnid>, its val"
    " with LOC_val_solution.csv, and LOC_synset_mapping.txt"
)


def imagenet(
    root: str | Path,
    *,
    image_size: int = 224,
    resize: int = 256,
    crop: Literal["random-resized", "random", "none"] = "random-resized",
    color_jitter: tuple[float, float, float, float] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    cache: float | None = None,
    num_workers: int | None = None,
) -> ImageDataModule:
    """ImageNet (ILSVRC 2012): 1.28 million photographs of 1,000 classes.

    The test images are the 50,000 of ``val``: the labels of its test are not published. Classes are
    in the order of their WordNet names, as those of torchvision's networks, and named by
    ``LOC_synset_mapping.txt`` where that is beside; else by their WordNet names. A tree with fewer
    classes is read too.

    Args:
        root: folder that holds ``train`` and ``val``, or what Kaggle's archive unpacks to.
        image_size: side of the square images, pixels.
        resize: pixels of an image's shorter side, before a random crop and in testing.
        crop: of training images: "random-resized": 50 to 100 % of the area, resized to the square;
            "random": a square of image_size pixels of the resized image; "none": as in testing.
        color_jitter: of training images: greatest change of brightness, contrast, saturation and
            hue, as torchvision's ``ColorJitter`` takes them; None: no change.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images and of the augmentation.
        augment: False shows training images as in testing.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for decoded images, as of ``ImageFolderDataModule``.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: a file is missing; says what to get.
        ValueError: a file is damaged, or an argument out of range.

    Source:
        Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
    """
    root = Path(root).expanduser()
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    images = images if images.is_dir() else root
    for split in ("train", "val"):
        need(images / split, _DOWNLOAD)
    wnids = class_folders(images / "train")
    train = labelled_files(images / "train", wnids)
    solution = root / "LOC_val_solution.csv"
    if solution.is_file() and not class_folders(images / "val"):
        test = _solved(images / "val", solution, wnids)
    else:
        test = labelled_files(images / "val", wnids)
    augmentation = Augmentation(
        image_size,
        resize,
        augment=augment,
        crop=crop,
        color_jitter=color_jitter,
        mean=mean,
        std=std,
    )
    data = ImageDataModule(
        augmentation, batch_size, readers(num_workers), seed, validation, validation_seed, cache
    )
    data.use(_names(root, wnids), PictureFiles(train), PictureFiles(test))
    return data


def _solved(folder: Path, solution: Path, wnids: Sequence[str]) -> list[tuple[str, int]]:
    """The images of a flat folder with the classes that a table tells."""
    places = {wnid: place for place, wnid in enumerate(wnids)}
    with reading(solution, "a table of ImageId and PredictionString"), solution.open() as file:
        rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    return [
        (str(folder / f"{image}.JPEG"), places[wnid])
        for image, wnid in sorted(rows.items())
        if wnid in places
    ]


def _names(root: Path, wnids: Sequence[str]) -> list[str]:
    path = root / "LOC_synset_mapping.txt"
    if not path.is_file():
        return list(wnids)
    with reading(path, "lines of a WordNet name and words"):
        words = dict(line.split(" ", 1) for line in lines(path))
        return distinct([words[wnid] for wnid in wnids], wnids)


def distinct(words: Sequence[str], wnids: Sequence[str]) -> list[str]:
    """The first of each class's words, with its WordNet name where others have the same."""
    first = [text.split(",")[0].strip() for text in words]
    count = Counter(first)
    return [
        word if count[word] == 1 else f"{word} ({wnid})"
        for word, wnid in zip(first, wnids, strict=True)
    ]
