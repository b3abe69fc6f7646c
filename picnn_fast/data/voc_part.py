"""PASCAL VOC Part: animals of PASCAL VOC 2010 with masks of their parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.data.files import lines, reading
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers
from picnn_fast.data.matlab import read_struct
from picnn_fast.data.parts import PartDataModule, PartSample, bounding_boxes, centres
from picnn_fast.data.photographs import (
    Photograph,
    PhotographedParts,
    checked,
    chosen,
    share,
    some,
)

ANIMALS = ("bird", "cat", "cow", "dog", "horse", "sheep")
_LANDMARKS = ["head", "neck", "torso"]
# Names of the annotations under the part they are merged into (icnn.txt 5.2.1).
_MERGED = {
    "head": "head leye reye beak lear rear nose muzzle lhorn rhorn",
    "torso": "torso neck lwing rwing",
    "legs": "lleg lfoot rleg rfoot",
    "front legs": "lfleg lfpa rfleg rfpa lfuleg lflleg rfuleg rflleg lfho rfho",
    "back legs": "lbleg lbpa rbleg rbpa lbuleg lblleg rbuleg rblleg lbho rbho",
    "tail": "tail",
}
_PART_OF = {name: part for part, names in _MERGED.items() for name in names.split()}
_OF_FOUR_LEGS = ("head", "torso", "front legs", "back legs")
_PARTS_OF = {
    "bird": ("head", "torso", "legs", "tail"),
    "cat": (*_OF_FOUR_LEGS, "tail"),
    "cow": _OF_FOUR_LEGS,
    "dog": (*_OF_FOUR_LEGS, "tail"),
    "horse": _OF_FOUR_LEGS,
    "sheep": _OF_FOUR_LEGS,
}
_DOWNLOAD = (
    "PASCAL-Part (trainval.tar.gz of Chen et al. 2014: Annotations_Part/<image>.mat) and the"
    " images of PASCAL VOC 2010 (VOCtrainval_03-May-2010.tar: VOCdevkit/VOC2010/JPEGImages/"
    "<image>.jpg), both unpacked in one folder"
)


class _Object(NamedTuple):
    category: str
    mask: Tensor
    parts: list[tuple[str, Tensor]]


class VOCPart(PhotographedParts):
    """Six animals of PASCAL VOC 2010, each cut out by its box, with masks of their parts.

    The tree is that of the published archives::

        root/Annotations_Part/2008_000002.mat
        root/VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
        root/VOCdevkit/VOC2010/ImageSets/Main/cat_train.txt

    A sample is one animal: the box around its mask is cut out and stretched to a square, as by
    ICNN's authors, or a square about it is cut out, as by CSG's and PICNN's. Boxes of fewer than
    ``min_area`` pixels are left out. Masks are those of this animal alone. Annotated parts are
    merged as in the paper: into head, torso (with neck and wings), legs and tail of a bird; head,
    torso, front legs, back legs of the others, and the tail of a cat or dog. What an animal does
    not have is an empty mask. Landmarks are the middles of the boxes around the annotated head,
    neck and torso, before they are merged.

    Training images are those of VOC's ``train`` lists, test images those of its ``val`` lists: the
    images of its test were never annotated. Without the folder ImageSets, nine tenths of the
    annotated images, drawn by ``seed``, are to train on. In CSG's and PICNN's papers seven tenths
    of the images of both lists are, drawn too: ``partition="70/30"``. All animals of a photograph
    are on one side.

    The annotations of the split are read once when the set is made: some 20 ms an object of 15
    parts. A process of its own reads them, for a damaged file may end the one that reads it.

    Args:
        root: folder that holds ``Annotations_Part`` and ``VOCdevkit``.
        split: ``"train"`` or ``"test"``.
        image_size: side of the square, pixels.
        categories: some of bird, cat, cow, dog, horse, sheep; labels are in this order.
        min_area: of a box in the file, pixels.
        crop: "box" or "square", see ``PhotographedParts``.
        partition: "voc" or "70/30".
        seed: of the split where it is drawn.

    Raises:
        FileNotFoundError: a file is missing; says what to get.
        ValueError: a file is damaged, a category unknown, or no image is in the split.
        TypeError: ``categories`` is no list, or a number no int.

    Source:
        Chen et al., "Detect What You Can", CVPR 2014; parts merged as in Zhang et al.,
        "Interpretable Convolutional Neural Networks", CVPR 2018, section 5.2.

    Example:
        >>> from picnn_fast.data import VOCPart
        >>> train = VOCPart("pascal_part", "train", categories=["cat", "dog"])  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        image_size: int = 224,
        categories: Sequence[str] = ANIMALS,
        min_area: int = 2500,
        crop: Literal["box", "square"] = "box",
        partition: Literal["voc", "70/30"] = "voc",
        seed: int = 0,
    ) -> None:
        checked(split, image_size)
        checks.integer("min_area", min_area, 0)
        checks.one_of("partition", partition, ("voc", "70/30"))
        checks.integer("seed", seed, 0)
        self.classes = chosen("categories", categories, ANIMALS)
        self.part_names = [p for p in _MERGED if any(p in _PARTS_OF[c] for c in self.classes)]
        self.landmark_names = list(_LANDMARKS)
        folder = Path(root).expanduser()
        self._annotations = folder / "Annotations_Part"
        voc = folder / "VOCdevkit" / "VOC2010"
        objects: list[Photograph] = []
        # Which object of the file a sample is.
        self._places: list[int] = []
        for name in _names(self._annotations, voc, split, partition, self.classes, seed):
            for place, found in enumerate(_read(self._annotations / f"{name}.mat")):
                if found.category not in self.classes or not found.mask.any():
                    continue
                x0, y0, x1, y1 = bounding_boxes(found.mask[None])[0].tolist()
                label = self.classes.index(found.category)
                height, width = found.mask.shape
                path = voc / "JPEGImages" / f"{name}.jpg"
                shown = Photograph(path, label, (x0, y0, x1, y1), (width, height))
                if shown.area >= min_area:
                    objects.append(shown)
                    self._places.append(place)
        some(objects, split, folder)
        super().__init__(objects, image_size, _DOWNLOAD, crop=crop)

    def __getitem__(self, index: int) -> PartSample:
        shown = self._objects[index]
        image, box = self.cut(index)
        found = _read(self._annotations / f"{shown.path.stem}.mat")[self._places[index]]
        masks = torch.zeros(len(self.part_names), *found.mask.shape, dtype=torch.bool)
        marks = torch.zeros(len(_LANDMARKS), *found.mask.shape, dtype=torch.bool)
        for name, mask in found.parts:
            part = _PART_OF[name]
            if part in _PARTS_OF[found.category]:
                masks[self.part_names.index(part)] |= mask
            if name in _LANDMARKS:
                marks[_LANDMARKS.index(name)] |= mask
        mask = self.stretched(found.mask[None], box)[0]
        return PartSample(
            image=image,
            label=shown.label,
            landmarks=self.within(centres(bounding_boxes(marks)), box),
            part_masks=self.stretched(masks, box),
            object_mask=mask,
            box=bounding_boxes(mask[None])[0] if self._crop == "square" else self.whole(),
        )


def _names(
    folder: Path, voc: Path, split: str, partition: str, categories: list[str], seed: int
) -> list[str]:
    """Annotated images of a split that may show one of the categories."""
    if not folder.is_dir():
        raise FileNotFoundError(f"root: {folder} is missing; want {_DOWNLOAD}")
    sets = voc / "ImageSets" / "Main"
    if not sets.is_dir():
        every = sorted(path.stem for path in folder.glob("*.mat"))
        train = 0.9 if partition == "voc" else 0.7
        return [every[index] for index in share(len(every), split, seed, train)]
    names = set()
    lists = ["train", "val"] if partition == "70/30" else [{"train": "train", "test": "val"}[split]]
    for path in [sets / f"{category}_{name}.txt" for category in categories for name in lists]:
        with reading(path, "lines of an image and 1, 0 or -1", _DOWNLOAD):
            for line in lines(path):
                name, shown = line.split()
                if int(shown) >= 0:  # 0: it is there, but hard to see
                    names.add(name)
    found = sorted(names)
    if partition == "voc":
        return found
    return [found[index] for index in share(len(found), split, seed, 0.7)]


def _read(path: Path) -> list[_Object]:
    """The annotated objects of an image, with the parts of those that are animals."""
    with reading(path, "an annotation of parts", _DOWNLOAD):
        found = []
        for item in np.atleast_1d(read_struct(path, "anno").objects):
            category, mask = getattr(item, "class"), _mask(item)
            parts: list[tuple[str, Tensor]] = []
            for part in np.atleast_1d(item.parts) if category in ANIMALS else ():
                if part.part_name not in _PART_OF:
                    raise ValueError(f"a {category} has the part {part.part_name!r}")
                parts.append((part.part_name, _mask(part)))
                if parts[-1][1].shape != mask.shape:
                    raise ValueError(f"the masks of a {category} are of different sizes")
            found.append(_Object(category, mask, parts))
        return found


def _mask(item: Any) -> Tensor:
    mask = np.asarray(item.mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask of shape {mask.shape}, want two axes")
    return torch.from_numpy(mask != 0)


def voc_part(
    root: str | Path,
    *,
    image_size: int = 224,
    categories: list[str] | None = None,
    min_area: int = 2500,
    crop: Literal["box", "square"] = "box",
    split: Literal["voc", "70/30"] = "voc",
    split_seed: int = 0,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    max_shift: int = 0,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    cache: float | None = None,
    num_workers: int | None = None,
) -> PartDataModule:
    """Animals of PASCAL VOC Part with their parts, see ``VOCPart``.

    Args:
        root: folder that holds ``Annotations_Part`` and ``VOCdevkit``.
        image_size: side of the square images, pixels.
        categories: some of bird, cat, cow, dog, horse, sheep, in this order; None: all.
        min_area: of an object's box, square pixels of the photograph; smaller ones are left out.
        crop: box stretches an object's box to the square; square cuts out the smallest square
            about it, black beyond the photograph, as by the authors of CSG and PICNN.
        split: voc, its own lists of training and validation images; 70/30, drawn from both.
        split_seed: of the split where it is drawn, or VOC's own lists are not there.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images, and of the flips and shifts.
        augment: flip half of the training images left to right.
        max_shift: training images move by up to this many pixels along each axis, filled with 0.
        validation: share of the training images held out to validate on.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for decoded images, as of ``ImageFolderDataModule``.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError, ValueError: see ``VOCPart`` and ``PartDataModule``.
    """
    checks.integer("split_seed", split_seed, 0)
    train_set, test_set = (
        VOCPart(
            root,
            half,
            image_size=image_size,
            categories=ANIMALS if categories is None else categories,
            min_area=min_area,
            crop=crop,
            partition=split,
            seed=split_seed,
        )
        for half in ("train", "test")
    )
    return PartDataModule(
        train_set,
        test_set,
        batch_size,
        seed=seed,
        flip=checks.boolean("augment", augment),
        max_shift=max_shift,
        validation=validation,
        validation_seed=validation_seed,
        mean=mean,
        std=std,
        cache=cache,
        num_workers=readers(num_workers),
    )
