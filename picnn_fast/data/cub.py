"""CUB-200-2011: birds of 200 species with the places of 15 parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.files import lines, need, reading
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.data.photographs import (
    Photograph,
    PhotographedParts,
    checked,
    chosen,
    some,
)

with extra("train"):
    from PIL import Image

_DOWNLOAD = (
    "the Caltech-UCSD Birds-200-2011 data set (CUB_200_2011.tgz, unpacked: CUB_200_2011/images.txt,"
    " parts/part_locs.txt, images/<species>/<image>.jpg, ...; masks are in its segmentations.tgz)"
)


class CUB200(PhotographedParts):
    """Birds of 200 species, each cut out by its box, with the places of 15 parts.

    The tree is that of the published archive::

        root/images.txt, classes.txt, image_class_labels.txt, train_test_split.txt,
        root/bounding_boxes.txt, parts/parts.txt, parts/part_locs.txt
        root/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
        root/segmentations/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.png

    The box is cut out and stretched to a square. Landmarks are the annotated points, taken as they
    are written, on the scale of the boxes; NaN where a part is not visible or lies outside of the
    box. There are no masks of parts. The mask of the object is where at least half of the
    annotators saw it, when the folder ``segmentations`` is there; else the box is filled in.

    Args:
        root: the folder ``CUB_200_2011``.
        split: ``"train"`` or ``"test"``, that of ``train_test_split.txt``.
        image_size: side of the square, pixels.
        landmark_names: some of ``parts/parts.txt``, in this order; all by default. The head, back
            and tail of the paper are forehead, back and tail in the code of its authors.

    Raises:
        FileNotFoundError: a file is missing; says what to get.
        ValueError: a file is damaged, a landmark unknown, or no image is in the split.
        TypeError: ``landmark_names`` is no list, or a number no int.

    Source:
        Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001.

    Example:
        >>> from picnn_fast.data import CUB200
        >>> test = CUB200(
        ...     "CUB_200_2011", "test", landmark_names=["forehead", "back", "tail"]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        image_size: int = 224,
        landmark_names: Sequence[str] | None = None,
    ) -> None:
        checked(split, image_size)
        folder = Path(root).expanduser()
        species, parts = _names(folder / "classes.txt"), _names(folder / "parts" / "parts.txt")
        every = list(parts.values())
        self.classes = list(species.values())
        self.part_names = []
        self.landmark_names = chosen(
            "landmark_names", every if landmark_names is None else landmark_names, every
        )

        labels = dict(_rows(folder / "image_class_labels.txt", 2).astype(int).tolist())
        training = dict(_rows(folder / "train_test_split.txt", 2).astype(int).tolist())
        boxes = {int(row[0]): row[1:].tolist() for row in _rows(folder / "bounding_boxes.txt", 5)}
        objects, images = [], []
        names = _names(folder / "images.txt")
        with reading(folder / "images.txt", "images that the other tables hold too", _DOWNLOAD):
            for image, name in names.items():
                if training[image] != (split == "train"):
                    continue
                x, y, width, height = boxes[image]
                label = list(species).index(labels[image])
                box = (x, y, x + width, y + height)
                objects.append(Photograph(folder / "images" / name, label, box))
                images.append(image)
        some(objects, split, folder)
        path = folder / "parts" / "part_locs.txt"
        points = _rows(path, 5)
        with reading(path, "places of the parts of every image", _DOWNLOAD):
            self._points = self._landmarks(points, images, parts)
        masks = folder / "segmentations"
        self._masks = [
            (masks / found.path.relative_to(folder / "images")).with_suffix(".png")
            for found in objects
            if masks.is_dir()
        ]
        for path in self._masks:
            need(path, _DOWNLOAD)
        super().__init__(objects, image_size, _DOWNLOAD)

    def _landmarks(
        self, points: NDArray[np.float64], images: list[int], parts: dict[int, str]
    ) -> Tensor:
        """(x, y) in pixels of the file for ``images``, NaN where not visible: ``[n, L, 2]``."""
        sample = {image: place for place, image in enumerate(images)}
        mark = {part: place for place, part in enumerate(parts)}
        places = np.full((len(images), len(parts), 2), np.nan, np.float32)
        for image, part, x, y, visible in points.tolist():
            place = mark[int(part)]
            if visible and int(image) in sample:
                places[sample[int(image)], place] = x, y
        names = list(parts.values())
        order = [names.index(name) for name in self.landmark_names]
        return torch.from_numpy(places[:, order])

    def __getitem__(self, index: int) -> PartSample:
        image, box = self.cut(index)
        size = self.image_size
        return PartSample(
            image=image,
            label=self.label(index),
            landmarks=self.within(self._points[index], box),
            part_masks=torch.zeros(0, size, size, dtype=torch.bool),
            object_mask=self._object_mask(index, box),
            box=self.whole(),
        )

    def _object_mask(self, index: int, box: Tensor) -> Tensor:
        if not self._masks:
            return self.filled()
        path = self._masks[index]
        with reading(path, "a mask of the whole image", _DOWNLOAD), Image.open(path) as file:
            seen = torch.from_numpy(np.array(file.convert("L")))
            return self.stretched(seen[None] >= 128, box)[0]


def _names(path: Path) -> dict[int, str]:
    """Lines of a number and a name."""
    with reading(path, "lines of a number and a name", _DOWNLOAD):
        rows = [line.split(maxsplit=1) for line in lines(path)]
        return {int(number): name.strip() for number, name in rows}


def _rows(path: Path, columns: int) -> NDArray[np.float64]:
    with reading(path, f"lines of {columns} numbers", _DOWNLOAD):
        rows = np.loadtxt(lines(path), ndmin=2)
        if rows.shape[1] != columns:
            raise ValueError(f"they hold {rows.shape[1]}")
        return rows


def cub(
    root: str | Path,
    *,
    image_size: int = 224,
    landmark_names: list[str] | None = None,
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
    """Birds of CUB-200-2011 with their landmarks, see ``CUB200``.

    Args:
        root: the folder ``CUB_200_2011``.
        image_size: side of the square images, pixels.
        landmark_names: some of ``parts/parts.txt``, in this order; None: all.
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
        FileNotFoundError, ValueError: see ``CUB200`` and ``PartDataModule``.
    """
    return PartDataModule(
        CUB200(root, "train", image_size=image_size, landmark_names=landmark_names),
        CUB200(root, "test", image_size=image_size, landmark_names=landmark_names),
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
