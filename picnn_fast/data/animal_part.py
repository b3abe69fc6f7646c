"""ILSVRC 2013 DET Animal-Part: animals of 30 categories with their heads and front legs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picnn_fast import checks
from picnn_fast.data.files import reading
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers
from picnn_fast.data.matlab import read_struct
from picnn_fast.data.matlab_reader import is_hdf5
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.data.photographs import (
    Photograph,
    PhotographedParts,
    checked,
    chosen,
    share,
    some,
)

CATEGORIES = {
    "goldfish": "n01443537",
    "bird": "n01503061",
    "frog": "n01639765",
    "turtle": "n01662784",
    "lizard": "n01674464",
    "koala": "n01882714",
    "lobster": "n01982650",
    "dog": "n02084071",
    "fox": "n02118333",
    "cat": "n02121808",
    "lion": "n02129165",
    "tiger": "n02129604",
    "bear": "n02131653",
    "rabbit": "n02324045",
    "hamster": "n02342885",
    "squirrel": "n02355227",
    "horse": "n02374451",
    "zebra": "n02391049",
    "swine": "n02395003",
    "hippopotamus": "n02398521",
    "cattle": "n02402425",
    "sheep": "n02411705",
    "antelope": "n02419796",
    "camel": "n02437136",
    "otter": "n02444819",
    "armadillo": "n02454379",
    "monkey": "n02484322",
    "elephant": "n02503517",
    "red panda": "n02509815",
    "giant panda": "n02510455",
}
_LANDMARKS = ["head", "front legs"]
# Places in the truth files are on crops of this many pixels.
_TRUTH_SIZE = 224
_DOWNLOAD = (
    "the Animal-Part data set of Zhang et al. 2016 (github.com/zqs1022/detanimalpart:"
    " <synset>_obj/img/data.mat and <synset>_obj/img/img/00001.jpg, ...) and the places of its"
    " parts (github.com/zqs1022/interpretableCNN, code/data_input/"
    "data_input_DET-2015-subset-ILSVRC2013train: <synset>/truth_part01.mat and truth_part02.mat)"
)
_NOT_SHOWN = torch.full((2,), torch.nan)
_Box = tuple[float, float, float, float]


class AnimalPart(PhotographedParts):
    """Animals of 30 categories of ILSVRC, each cut out by its box, with head and front legs.

    The tree is that of two repositories of the authors, the second of which may be elsewhere
    (``parts``)::

        root/n02118333_obj/img/data.mat
        root/n02118333_obj/img/img/00001.jpg
        parts/n02118333/truth_part01.mat, truth_part02.mat

    ``data.mat`` holds the boxes: ``samples(i).obj.bndbox`` with ``xmin``, ``ymin``, ``xmax``,
    ``ymax``, pixels of image i counted from 1. ``truth_partNN.mat`` holds the middles of a part's
    boxes: ``truth(i).pHW_center``, row and column on the crop of image i stretched to 224 pixels;
    empty where it is not shown. Part 1 is taken to be the head, part 2 the front legs: these are
    the two parts that the authors' evaluation reads, and of the goldfish it reads part 1 alone.

    This layout was gathered from code that reads these files, the authors' and others'; the files
    themselves could not be opened where this was written. They were saved by MATLAB 7.3, so h5py
    reads them; saved anew with ``save -v7`` they are read without it.

    Boxes are cut out and stretched to a square; those of fewer than ``min_area`` pixels are left
    out. There are no masks of parts; the mask of the object is its box filled in. The data set has
    no split: of each category nine tenths, drawn by ``seed``, are to train on.

    Args:
        root: folder of ``<synset>_obj`` folders.
        split: ``"train"`` or ``"test"``.
        image_size: side of the square, pixels.
        categories: some of ``CATEGORIES``; labels are in this order.
        parts: folder of ``<synset>`` folders; ``root`` by default.
        min_area: of a box in the file, pixels.
        seed: of the split.

    Raises:
        FileNotFoundError: a file is missing; says what to get.
        ImportError: a file is of MATLAB 7.3 and h5py is not installed.
        ValueError: a file is damaged, a category unknown, or no image is in the split.
        TypeError: ``categories`` is no list, or a number no int.

    Source:
        Zhang et al., "Growing Interpretable Part Graphs on ConvNets via Multi-Shot Learning",
        AAAI 2016; layout as read by github.com/zqs1022/interpretableCNN.

    Example:
        >>> from picnn_fast.data import AnimalPart
        >>> foxes = AnimalPart("detanimalpart", categories=["fox"])  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        image_size: int = 224,
        categories: Sequence[str] = tuple(CATEGORIES),
        parts: str | Path | None = None,
        min_area: int = 2500,
        seed: int = 0,
    ) -> None:
        checked(split, image_size)
        checks.integer("min_area", min_area, 0)
        checks.integer("seed", seed, 0)
        self.classes = chosen("categories", categories, tuple(CATEGORIES))
        self.part_names = []
        self.landmark_names = list(_LANDMARKS)
        folder = Path(root).expanduser()
        truths = folder if parts is None else Path(parts).expanduser()
        objects: list[Photograph] = []
        self._points: list[Tensor] = []
        for label, category in enumerate(self.classes):
            synset = CATEGORIES[category]
            images = folder / f"{synset}_obj" / "img"
            count = len(list((images / "img").glob("*.jpg")))
            boxes = _boxes(images / "data.mat", count)
            heads = _places(truths / synset / "truth_part01.mat", boxes)
            if category == "goldfish":
                legs = [_NOT_SHOWN] * count
            else:
                legs = _places(truths / synset / "truth_part02.mat", boxes)
            for index in share(count, split, seed):
                found = Photograph(images / "img" / f"{index + 1:05}.jpg", label, boxes[index])
                if found.area >= min_area:
                    objects.append(found)
                    self._points.append(torch.stack([heads[index], legs[index]]))
        some(objects, split, folder)
        super().__init__(objects, image_size, _DOWNLOAD)

    def __getitem__(self, index: int) -> PartSample:
        image, box = self.cut(index)
        size = self.image_size
        return PartSample(
            image=image,
            label=self.label(index),
            landmarks=self.within(self._points[index], box),
            part_masks=torch.zeros(0, size, size, dtype=torch.bool),
            object_mask=self.filled(),
            box=self.whole(),
        )


def _boxes(path: Path, count: int) -> list[_Box]:
    """Boxes of the ``count`` images of a category, as edges of pixels."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    with reading(path, f"boxes of the {count} images beside it", _DOWNLOAD):
        samples = read_struct(path, "samples")
        if is_hdf5(path):
            objects = samples.obj.ravel()
        else:
            objects = [item.obj for item in np.atleast_1d(samples)]
        boxes = [[getattr(item.bndbox, side).item() for side in sides] for item in objects]
        if len(boxes) < count:
            raise ValueError(f"it holds {len(boxes)}")
        # Pixels are counted from 1, and the last one is part of the box.
        return [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in boxes[:count]]


def _places(path: Path, boxes: list[_Box]) -> list[Tensor]:
    """(x, y) of a part in pixels of each file, NaN where it is not shown."""
    with reading(path, f"places of a part in {len(boxes)} images", _DOWNLOAD):
        truth = read_struct(path, "truth")
        if is_hdf5(path):
            places = list(truth.pHW_center.ravel())
        else:
            places = [item.pHW_center for item in np.atleast_1d(truth)]
        if len(places) < len(boxes):
            raise ValueError(f"it holds {len(places)}")
        return [_in_file(np.ravel(p), box) for p, box in zip(places, boxes, strict=False)]


def _in_file(place: NDArray[np.float64], box: _Box) -> Tensor:
    if place.size != 2:  # several of the same part count as none, as by the authors
        return _NOT_SHOWN
    x0, y0, x1, y1 = box
    row, column = place.tolist()
    # From the middle of the first pixel to that of the last one it is 224.
    x = x0 + 0.5 + column / _TRUTH_SIZE * (x1 - x0 - 1)
    y = y0 + 0.5 + row / _TRUTH_SIZE * (y1 - y0 - 1)
    return torch.tensor([x, y])


def animal_part(
    root: str | Path,
    *,
    image_size: int = 224,
    categories: list[str] | None = None,
    parts: str | Path | None = None,
    min_area: int = 2500,
    split_seed: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    cache: float | None = None,
    num_workers: int | None = None,
) -> PartDataModule:
    """ILSVRC 2013 DET Animal-Part with its landmarks, see ``AnimalPart``.

    Args:
        root: folder of ``<synset>_obj`` folders.
        image_size: side of the square images, pixels.
        categories: some of the 30 animals, as bird or "red panda", in this order; None: all.
        parts: folder of ``<synset>`` folders with the places of parts; None: root.
        min_area: of an object's box, square pixels of the photograph; smaller ones are left out.
        split_seed: of the split into training and test images.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images, and of the flips.
        augment: flip half of the training images left to right.
        validation: share of the training images held out to validate on.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for decoded images, as of ``ImageFolderDataModule``.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError, ValueError: see ``AnimalPart`` and ``PartDataModule``.
    """
    checks.integer("split_seed", split_seed, 0)
    train_set, test_set = (
        AnimalPart(
            root,
            split,
            image_size=image_size,
            categories=tuple(CATEGORIES) if categories is None else categories,
            parts=parts,
            min_area=min_area,
            seed=split_seed,
        )
        for split in ("train", "test")
    )
    return PartDataModule(
        train_set,
        test_set,
        batch_size,
        seed=seed,
        flip=checks.boolean("augment", augment),
        validation=validation,
        validation_seed=validation_seed,
        mean=mean,
        std=std,
        cache=cache,
        num_workers=readers(num_workers),
    )
