"""What the readers of photographed objects share: crops by bounding box, and splits."""

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.files import need, reading, rgb
from picnn_fast.data.parts import PartDataset

with extra("train"):
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor


class Photograph(NamedTuple):
    """An object in an image file.

    Attributes:
        path: of the file.
        label: class of the object.
        box: x0, y0, x1, y1, edges of pixels of the file.
        size: width and height of the file that its annotations are for, pixels; None: any.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float]
    size: tuple[int, int] | None = None

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


class PhotographedParts(PartDataset):
    """Objects cut out by their bounding boxes, each stretched to a square, or squares themselves.

    Args:
        objects: what to show.
        image_size: side of the square, pixels.
        download: what to get where a file is missing or damaged.
        crop: "box" stretches an object's box, resampled bilinearly; "square" cuts out the smallest
            square about it, black beyond the file, and resamples by Lanczos' kernel.
    """

    from_files = True

    def __init__(
        self,
        objects: Sequence[Photograph],
        image_size: int,
        download: str,
        *,
        crop: Literal["box", "square"] = "box",
    ) -> None:
        self.image_size = image_size
        self._crop = checks.one_of("crop", crop, ("box", "square"))
        self._objects = list(objects)
        self._download = download
        for path in {found.path for found in objects}:
            need(path, download)

    def __len__(self) -> int:
        return len(self._objects)

    def label(self, index: int) -> int:
        return self._objects[index].label

    def source(self, index: int) -> Hashable:
        return self._objects[index].path

    def image(self, index: int) -> Tensor:
        kept = None if self.shelf is None else self.shelf.get(index)
        if kept is not None:
            return torch.from_numpy(kept.copy()).permute(2, 0, 1).float() / 255
        image = self.cut(index)[0]
        if self.shelf is not None:
            pixels = (image * 255).round().byte().permute(1, 2, 0)
            self.shelf.keep(index, pixels.contiguous().numpy())
        return image

    def cut(self, index: int) -> tuple[Tensor, Tensor]:
        """The image, and what was cut out ``[4]``: a box within the file, or a square about it."""
        found = self._objects[index]
        with reading(found.path, "an image", self._download), Image.open(found.path) as file:
            if found.size not in (None, file.size):
                raise ValueError(f"its pixels are {file.size}, its annotations for {found.size}")
            x0, y0, x1, y1 = found.box
            box = (max(x0, 0), max(y0, 0), min(x1, file.width), min(y1, file.height))
            if box[0] >= box[2] or box[1] >= box[3]:
                raise ValueError(f"the box {found.box} lies outside of its {file.size} pixels")
            side = (self.image_size, self.image_size)
            # Not turned as an EXIF tag says: annotations are of the pixels as they are stored.
            if self._crop == "square":
                box = _square_about(box)
                image = rgb(file).crop(box).resize(side, Image.Resampling.LANCZOS)
            else:
                image = rgb(file).resize(side, Image.Resampling.BILINEAR, box)
        return pil_to_tensor(image).float() / 255, torch.tensor(box, dtype=torch.float32)

    def stretched(self, masks: Tensor, box: Tensor) -> Tensor:
        """Masks of a file ``[n, H, W]`` as its crop shows them, ``[n, S, S]``: nearest pixels."""
        steps = (torch.arange(self.image_size) + 0.5) / self.image_size
        columns = (box[0] + steps * (box[2] - box[0])).floor().long()
        rows = (box[1] + steps * (box[3] - box[1])).floor().long()
        if self._crop == "box":
            return masks[:, rows[:, None], columns]
        height, width = masks.shape[1:]
        shown = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
        return masks[:, rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)] & shown

    def within(self, points: Tensor, box: Tensor) -> Tensor:
        """Points of a file ``[n, 2]`` as places of its crop, NaN for those outside of it."""
        inside = ((points >= box[:2]) & (points <= box[2:])).all(1, keepdim=True)
        places = (points - box[:2]) * (self.image_size / (box[2:] - box[:2]))
        return places.where(inside, torch.nan)

    def filled(self) -> Tensor:
        """The mask ``[S, S]`` of an object of which only the box is known."""
        return torch.ones(self.image_size, self.image_size, dtype=torch.bool)

    def whole(self) -> Tensor:
        """The box ``[4]`` of an object that is what was cut out."""
        return torch.tensor([0, 0, self.image_size, self.image_size], dtype=torch.float32)


def _square_about(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """The smallest square of whole pixels that holds a box, with the box in its middle."""
    x0, y0, x1, y1 = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    side = max(x1 - x0, y1 - y0)
    left, top = x0 - (side - (x1 - x0)) // 2, y0 - (side - (y1 - y0)) // 2
    return left, top, left + side, top + side


def checked(split: str, image_size: int) -> None:
    """The options that all readers share."""
    checks.one_of("split", split, ("train", "test"))
    checks.integer("image_size", image_size, 1)


def chosen(name: str, values: Sequence[str], choices: Sequence[str]) -> list[str]:
    """Different names out of those there are, in the order asked for."""
    if isinstance(values, str):
        raise TypeError(f"{name}: got the str {values!r}, want a list of str")
    for value in values:
        checks.one_of(name, value, tuple(choices))
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: got {list(values)}, want one name or more, none twice")
    return list(values)


def some(objects: Sequence[Photograph], split: str, where: Path) -> None:
    """At least one object."""
    if not objects:
        raise ValueError(f"split: got {split!r}, of which {where} holds no object that counts")


def share(count: int, split: str, seed: int, train_share: float = 0.9) -> list[int]:
    """A share of ``count`` drawn by the seed to train on, the others to test on; in order.

    Nine tenths, as in the code of ICNN's authors where a data set has no split of its own.
    """
    order = np.random.default_rng(seed).permutation(count)
    train = round(train_share * count)
    part = order[:train] if split == "train" else order[train:]
    return sorted(part.tolist())
