"""Drawn animals with their parts annotated: made in memory from a seed, no download."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picnn_fast import checks
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers
from picnn_fast.data.parts import PartDataModule, PartDataset, PartSample, bounding_boxes, centres

Floats = NDArray[np.float32]
Random = np.random.Generator

CLASSES = ["bird", "cat", "cow", "dog", "horse", "sheep"]
PARTS = ["head", "neck", "torso", "legs", "tail"]
LANDMARKS = ["head", "neck", "torso", "front legs", "hind legs", "tail"]
# What a pixel shows: nothing of the animal, or one of LANDMARKS, in that order.
_HEAD, _NECK, _TORSO, _FRONT, _HIND, _TAIL = range(1, 7)


class _Stroke(NamedTuple):
    """A disc drawn from one point to another while its radius changes. Torso lengths, y down."""

    code: int
    x0: float
    y0: float
    x1: float
    y1: float
    r0: float
    r1: float
    tint: float = 1.0


class _Build(NamedTuple):
    """Proportions of an animal on four legs; lengths in torso lengths, angles in radians."""

    hip: float
    """Radius of the torso at the hind legs; ``shoulder`` is the one at the front legs."""
    shoulder: float
    leg: float
    leg_width: float
    neck: float
    neck_width: float
    """Radius of the neck at the torso; two thirds of it at the head."""
    neck_angle: float
    """Of the neck above the horizon."""
    skull: float
    muzzle: float
    muzzle_width: float
    head_angle: float
    """Of the muzzle above the horizon."""
    ear: float
    ear_width: float
    ear_tip: float
    """Radius at the tip, relative to ``ear_width``: 0 is pointed."""
    ear_angle: float
    """Of the ear above the direction of the muzzle."""
    horn: float
    tail: float
    tail_width: float
    tail_angle: float
    """Of the tail's root above the horizon, backwards."""
    tail_bend: float
    """By how much each of its three pieces turns upwards."""
    tuft: float
    mane: float
    wool: float


_BUILDS = {
    "cat": _Build(
        hip=0.17, shoulder=0.16, leg=0.42, leg_width=0.055,
        neck=0.18, neck_width=0.13, neck_angle=0.7, skull=0.17, muzzle=0.12, muzzle_width=0.08,
        head_angle=-0.1, ear=0.21, ear_width=0.075, ear_tip=0.0, ear_angle=1.6, horn=0.0,
        tail=0.75, tail_width=0.035, tail_angle=0.3, tail_bend=0.5, tuft=0.0, mane=0.0, wool=0.0,
    ),
    "cow": _Build(
        hip=0.26, shoulder=0.27, leg=0.42, leg_width=0.07,
        neck=0.26, neck_width=0.19, neck_angle=0.3, skull=0.14, muzzle=0.24, muzzle_width=0.11,
        head_angle=-0.6, ear=0.14, ear_width=0.045, ear_tip=0.5, ear_angle=2.9, horn=0.26,
        tail=0.55, tail_width=0.025, tail_angle=-1.2, tail_bend=-0.1, tuft=0.06, mane=0.0, wool=0.0,
    ),
    "dog": _Build(
        hip=0.16, shoulder=0.2, leg=0.46, leg_width=0.06,
        neck=0.24, neck_width=0.14, neck_angle=0.85, skull=0.14, muzzle=0.27, muzzle_width=0.075,
        head_angle=-0.15, ear=0.22, ear_width=0.05, ear_tip=1.2, ear_angle=4.2, horn=0.0,
        tail=0.4, tail_width=0.045, tail_angle=0.7, tail_bend=0.2, tuft=0.0, mane=0.0, wool=0.0,
    ),
    "horse": _Build(
        hip=0.19, shoulder=0.2, leg=0.64, leg_width=0.06,
        neck=0.5, neck_width=0.17, neck_angle=0.9, skull=0.11, muzzle=0.3, muzzle_width=0.075,
        head_angle=-0.7, ear=0.12, ear_width=0.04, ear_tip=0.0, ear_angle=2.2, horn=0.0,
        tail=0.5, tail_width=0.075, tail_angle=-0.6, tail_bend=-0.3, tuft=0.0, mane=0.08, wool=0.0,
    ),
    "sheep": _Build(
        hip=0.25, shoulder=0.25, leg=0.3, leg_width=0.05,
        neck=0.22, neck_width=0.18, neck_angle=0.5, skull=0.13, muzzle=0.18, muzzle_width=0.08,
        head_angle=-0.6, ear=0.15, ear_width=0.045, ear_tip=0.6, ear_angle=3.3, horn=0.0,
        tail=0.13, tail_width=0.07, tail_angle=-0.5, tail_bend=-0.2, tuft=0.0, mane=0.0, wool=0.11,
    ),
}  # fmt: skip


class _Coat(NamedTuple):
    """Two colours, and where the second is used: where the pattern is above a level."""

    base: Floats
    accent: Floats
    level: float


class _Pen:
    """Collects strokes, and draws the jitter of proportions and joints."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.strokes: list[_Stroke] = []

    def about(self, value: float, spread: float = 0.12) -> float:
        """``value``, larger or smaller by a factor."""
        return value * math.exp(spread * self.random.standard_normal())

    def turned(self, angle: float, spread: float) -> float:
        return angle + spread * self.random.uniform(-1, 1)

    def disc(self, code: int, x: float, y: float, radius: float, tint: float = 1.0) -> None:
        self.strokes.append(_Stroke(code, x, y, x, y, radius, radius, tint))

    def line(
        self,
        code: int,
        start: tuple[float, float],
        angle: float,
        length: float,
        widths: tuple[float, float],
        tint: float = 1.0,
    ) -> tuple[float, float]:
        """A stroke at ``angle`` above the horizon; gives where it ends."""
        end = (start[0] + length * math.cos(angle), start[1] - length * math.sin(angle))
        self.strokes.append(_Stroke(code, *start, *end, *widths, tint))
        return end

    def leg(self, code: int, x: float, y: float, length: float, width: float, tint: float) -> None:
        upper = self.turned(-math.pi / 2, 0.4)
        knee = self.line(code, (x, y), upper, 0.5 * length, (1.5 * width, width), tint)
        lower = self.turned(-math.pi / 2, 0.25)
        foot = self.line(code, knee, lower, 0.5 * length, (width, 0.85 * width), tint)
        self.line(code, foot, 0.0, 0.8 * width, (width, 0.9 * width), 0.6 * tint)


def _four_legged(random: Random, build: _Build) -> list[_Stroke]:
    pen = _Pen(random)
    hip, shoulder = pen.about(build.hip), pen.about(build.shoulder)
    half = 0.5 - 0.5 * (hip + shoulder) / 2
    leg, width = pen.about(build.leg), pen.about(build.leg_width)

    def pair(tint: float, offset: float) -> None:
        # From inside the torso, so that what is seen of a leg is about ``leg`` long.
        for code, x, radius in ((_HIND, -half, hip), (_FRONT, half, shoulder)):
            pen.leg(code, x + offset, 0.4 * radius, leg + 0.4 * radius, width, tint)

    pair(0.65, pen.turned(0.08, 0.06))
    angle = math.pi - pen.turned(build.tail_angle, 0.4)
    bend, tail = pen.turned(build.tail_bend, 0.25), pen.about(build.tail) / 3
    tail_width = pen.about(build.tail_width)
    end = (-half - 0.7 * hip, -0.5 * hip)
    for _ in range(3):
        end = pen.line(_TAIL, end, angle, tail, (tail_width, tail_width), 0.85)
        angle -= bend
    if build.tuft:
        pen.line(_TAIL, end, angle, build.tuft, (tail_width, build.tuft), 0.5)

    pen.strokes.append(_Stroke(_TORSO, -half, 0.0, half, 0.0, hip, shoulder))
    if build.wool:
        for turn in np.arange(11) * (2 * math.pi / 11) + random.uniform(0, 1):
            x, y = math.cos(turn), math.sin(turn)
            reach = half if x > 0 else -half
            pen.disc(_TORSO, reach * abs(x) + 0.7 * hip * x, 0.85 * hip * y, pen.about(build.wool))
    pair(1.0, pen.turned(-0.05, 0.05))

    # One in five grazes or sniffs.
    grazing = random.random() < 0.2
    rise = pen.turned(-0.5 if grazing else build.neck_angle, 0.3)
    thick = pen.about(build.neck_width)
    root = (half + 0.2 * shoulder, -0.4 * shoulder)
    length = pen.about(build.neck) + 0.5 * shoulder
    nape = pen.line(_NECK, root, rise, length, (thick, 0.66 * thick), 0.9)
    if build.mane:
        back = (root[0] - 0.5 * thick, root[1] - 0.6 * thick)
        pen.line(_NECK, back, rise + 0.05, length, (build.mane, 0.7 * build.mane), 0.4)
    _head(pen, build, nape, pen.turned(build.head_angle, 0.3) - (0.5 if grazing else 0.0))
    return pen.strokes


def _head(pen: _Pen, build: _Build, nape: tuple[float, float], angle: float) -> None:
    size = pen.about(1.0, 0.08)
    skull, ear = size * build.skull, size * pen.about(build.ear)
    ear_width = size * pen.about(build.ear_width)
    forward = (math.cos(angle), -math.sin(angle))
    centre = (nape[0] + 0.5 * skull * forward[0], nape[1] + 0.5 * skull * forward[1])

    def at(along: float, above: float) -> tuple[float, float]:
        """A place of the head, in radii of the skull along the muzzle and above it."""
        x = centre[0] + skull * (along * forward[0] + above * forward[1])
        return x, centre[1] + skull * (along * forward[1] - above * forward[0])

    widths = (ear_width, ear_width * build.ear_tip)
    up = angle + pen.turned(build.ear_angle, 0.2)
    hanging = build.ear_tip > 1
    if not hanging:
        pen.line(_HEAD, at(0.35, 0.5), up - 0.25, ear, widths, 0.7)
    if build.horn:
        for lean, tint in ((0.9, 1.1), (1.3, 1.4)):
            tip = pen.line(_HEAD, at(0.1, 0.8), angle + lean, 0.5 * build.horn, (0.04, 0.03), tint)
            pen.line(_HEAD, tip, angle + lean + 0.7, 0.6 * build.horn, (0.03, 0.0), tint)
    pen.disc(_HEAD, *centre, skull, 1.05)
    muzzle = size * pen.about(build.muzzle)
    root, slim = 0.8 * skull, size * build.muzzle_width
    nose = pen.line(_HEAD, at(0.2, -0.15), angle - 0.1, muzzle, (root, slim), 1.1)
    pen.disc(_HEAD, nose[0] + 0.7 * slim * forward[0], nose[1] + 0.7 * slim * forward[1], 0.03, 0.2)
    pen.line(_HEAD, at(-0.3, 0.6 if not hanging else 0.4), up, ear, widths, 0.75)
    if build.wool:
        pen.disc(_HEAD, *at(-0.2, 0.7), 0.55 * skull, 1.1)
    pen.disc(_HEAD, *at(0.45, 0.3), 0.028, 0.1)


def _bird(random: Random) -> list[_Stroke]:
    pen = _Pen(random)
    tilt = pen.turned(0.45, 0.35)
    breast, rump = pen.about(0.23), pen.about(0.14)
    length = pen.about(0.4)
    back = (-0.5 * length * math.cos(tilt), 0.5 * length * math.sin(tilt))
    front = (-back[0], -back[1])
    leg, width = pen.about(0.38), pen.about(0.028)
    for x, tint in ((0.08, 0.6), (-0.04, 0.8)):
        knee = pen.line(
            _HIND, (x, 0.1), pen.turned(-1.8, 0.3), 0.55 * leg, (2 * width, width), tint
        )
        foot = pen.line(_HIND, knee, pen.turned(-1.4, 0.3), 0.6 * leg, (width, width), tint)
        pen.line(_HIND, foot, 0.0, 0.12, (width, 0.7 * width), tint)
        pen.line(_HIND, foot, math.pi, 0.05, (width, 0.7 * width), tint)
    fan = math.pi + pen.turned(tilt, 0.3)
    pen.line(_TAIL, back, fan, pen.about(0.42), (0.6 * rump, pen.about(0.09)), 0.75)
    pen.strokes.append(_Stroke(_TORSO, *back, *front, rump, breast))
    shoulder = (front[0] - 0.1, front[1] + 0.02)
    pen.line(_TORSO, shoulder, math.pi + pen.turned(tilt, 0.25), pen.about(0.42), (0.12, 0.03), 0.7)
    rise = pen.turned(1.0, 0.4)
    root = (front[0] + 0.3 * breast, front[1] - 0.3 * breast)
    thick = pen.about(0.13)
    nape = pen.line(_NECK, root, rise, pen.about(0.24), (thick, 0.75 * thick), 0.9)
    angle = pen.turned(0.0, 0.4)
    skull, beak = pen.about(0.13), pen.about(0.2)
    x, y = nape[0] + 0.4 * skull * math.cos(angle), nape[1] - 0.4 * skull * math.sin(angle)
    pen.line(_HEAD, (x + 0.5 * skull * math.cos(angle), y), angle - 0.1, beak, (0.06, 0.0), 0.5)
    pen.disc(_HEAD, x, y, skull, 1.05)
    pen.disc(_HEAD, x + 0.4 * skull * math.cos(angle + 0.5), y - 0.045, 0.028, 0.1)
    return pen.strokes


def _figure(random: Random, name: str) -> list[_Stroke]:
    return _bird(random) if name == "bird" else _four_legged(random, _BUILDS[name])


def _placed(strokes: list[_Stroke], turn: float, mirrored: bool) -> Floats:
    """Ends and radii ``[n, 6]``: x0, y0, x1, y1, r0, r1, turned and perhaps facing left."""
    table = np.array([stroke[1:7] for stroke in strokes], np.float32)
    points = table[:, :4].reshape(-1, 2)
    cos, sin = math.cos(turn), math.sin(turn)
    points = points @ np.array([[cos, sin], [-sin, cos]], np.float32)
    if mirrored:
        points[:, 0] *= -1
    table[:, :4] = points.reshape(-1, 4)
    return table


def _bounds(table: Floats) -> tuple[Floats, Floats]:
    """Least and greatest (x, y) that strokes reach."""
    radii = table[:, 4:, None]
    ends = table[:, :4].reshape(-1, 2, 2)
    return (ends - radii).min((0, 1)), (ends + radii).max((0, 1))


class _Canvas:
    """An image ``[3, S, S]`` in [0, 1] and what each of its pixels shows, painted over in turn."""

    def __init__(self, random: Random, size: int) -> None:
        self.size = size
        self.centres = np.arange(size, dtype=np.float32) + 0.5
        self.codes = np.zeros((size, size), np.uint8)
        self.ground = random.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
        near, far = self.ground[:, :, None, None]
        self.image = near + _noise(random, size, 4, 1) * (far - near)
        self.image += 0.3 * _noise(random, size, 12, 3) - 0.15
        self.pattern = _noise(random, size, int(random.integers(8, 20)), 1)[0]

    def coat(self, random: Random) -> _Coat:
        colours = random.uniform(0.15, 0.95, (3, 3)).astype(np.float32)
        apart = np.abs(colours[:2] - self.ground.mean(0)).sum(1)
        level = random.uniform(0.3, 0.7) if random.random() < 0.5 else 1.0
        return _Coat(colours[apart.argmax()], colours[2], level)

    def paint(self, strokes: list[_Stroke], table: Floats, coat: _Coat, show: bool) -> None:
        """Paint strokes at the places of ``table``, pixels; ``show`` says that codes are kept."""
        base = coat.base[:, None, None]
        more = coat.accent[:, None, None] - base
        for stroke, (x0, y0, x1, y1, r0, r1) in zip(strokes, table.tolist(), strict=True):
            left = max(int(min(x0 - r0, x1 - r1) - 0.5), 0)
            top = max(int(min(y0 - r0, y1 - r1) - 0.5), 0)
            right = min(int(max(x0 + r0, x1 + r1) + 1.5), self.size)
            bottom = min(int(max(y0 + r0, y1 + r1) + 1.5), self.size)
            if left >= right or top >= bottom:
                continue
            x = self.centres[left:right] - x0
            y = self.centres[top:bottom, None] - y0
            across, down = x1 - x0, y1 - y0
            square = across * across + down * down + 1e-6
            along = _clipped(x * (across / square) + y * (down / square))
            x, y = x - along * across, y - along * down
            distance = np.sqrt(x * x + y * y)
            radius = r0 + along * (r1 - r0)
            cover = _clipped(radius - distance + 0.5)
            # Darker towards its edge: it looks round, and stands out from what is behind it.
            edge = distance / np.maximum(radius, 0.5)
            light = stroke.tint * (1.1 - 0.45 * edge * edge)
            window = slice(top, bottom), slice(left, right)
            spots = _clipped((self.pattern[window] - coat.level) * 12)
            image = self.image[:, top:bottom, left:right]
            image += cover * ((base + spots * more) * light - image)
            if show:
                self.codes[window][cover >= 0.5] = stroke.code


def _clipped(values: Floats) -> Floats:
    """In [0, 1], in place; half the time of ``numpy.clip`` on so few values."""
    np.maximum(values, 0, out=values)
    return np.minimum(values, 1, out=values)


def _noise(random: Random, size: int, cells: int, channels: int) -> Floats:
    """Smooth noise ``[channels, size, size]`` in [0, 1]: random values, interpolated between."""
    place = np.arange(size, dtype=np.float32)[:, None] * np.float32((cells - 1) / (size - 1))
    weight = np.maximum(1 - np.abs(place - np.arange(cells, dtype=np.float32)), 0)
    noise: Floats = weight @ random.random((channels, cells, cells), np.float32) @ weight.T
    return noise


def _clutter(random: Random, canvas: _Canvas) -> None:
    """Blobs, and loose parts of animals, behind the animal."""
    size = canvas.size
    for _ in range(random.integers(3, 7)):
        x, y = random.uniform(0, size, 2)
        ends = random.normal(0, 0.1 * size, 2)
        radii = random.uniform(0.02, 0.1, 2) * size
        blob = _Stroke(0, x, y, x + ends[0], y + ends[1], *radii)
        canvas.paint([blob], np.array([blob[1:7]], np.float32), canvas.coat(random), False)
    for _ in range(random.integers(2, 5)):
        strokes = _figure(random, CLASSES[random.integers(len(CLASSES))])
        code = random.integers(_HEAD, _TAIL + 1)
        strokes = [stroke for stroke in strokes if stroke.code == code]
        if not strokes:  # a bird has no front leg
            continue
        table = _placed(strokes, random.uniform(-math.pi, math.pi), random.random() < 0.5)
        table *= random.uniform(0.25, 0.5) * size
        low, high = _bounds(table)
        table[:, :4] += np.tile(random.uniform(0, size, 2) - (low + high) / 2, 2)
        canvas.paint(strokes, table, canvas.coat(random), False)


def _draw(random: Random, name: str, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image ``[3, size, size]`` of an animal, and the codes of its pixels."""
    canvas = _Canvas(random, size)
    _clutter(random, canvas)
    strokes = _figure(random, name)
    table = _placed(strokes, random.uniform(-0.35, 0.35), random.random() < 0.5)
    low, high = _bounds(table)
    table *= random.uniform(0.65, 0.98) * size / (high - low).max()
    low, high = _bounds(table)
    table[:, :4] += np.tile(random.uniform(0, 1, 2) * (size - (high - low)) - low, 2)
    canvas.paint(strokes, table, canvas.coat(random), True)
    image = canvas.image * random.uniform(0.75, 1.15)
    image += 0.03 * random.standard_normal((size, size), np.float32)
    return (_clipped(image) * 255 + 0.5).astype(np.uint8), canvas.codes


class PartAnimals(PartDataset):
    """Six kinds of drawn animals with masks and landmarks of their parts.

    A bird, cat, cow, dog, horse or sheep a picture, of the colours, coat, size, place, pose and
    direction that chance gives it: kinds differ in their parts alone, such as the beak, ears,
    horns and muzzle, the length of neck, legs and tail, and the shape of the torso. Behind it are
    blobs and loose parts of animals. Labels take turns, so that kinds are as frequent.

    Sample i depends on (seed, split, image_size, i) alone: a smaller set is the beginning of a
    larger one. All are drawn when the set is made, at about 3 ms an image of 128 pixels, and kept
    as bytes: 4 a pixel.

    Args:
        split: ``"train"`` or ``"test"``.
        size: number of images.
        image_size: side, pixels, >= 16.
        seed: >= 0.

    Attributes:
        part_names: head, neck, torso (with the wing of a bird), legs, tail. Masks do not overlap.
        landmark_names: head, neck, torso, front legs, hind legs, tail: the middle of the
            box around the pixels that show them. A bird has hind legs only.

    Raises:
        TypeError: a number is no int.
        ValueError: an argument is out of range.

    Example:
        >>> from picnn_fast.data import PartAnimals
        >>> animals = PartAnimals("test", size=6, image_size=64)
        >>> sample = animals[4]
        >>> animals.classes[sample.label], sample.image.shape, sample.part_masks.shape
        ('horse', torch.Size([3, 64, 64]), torch.Size([5, 64, 64]))
        >>> animals.landmark_names[0], sample.landmarks.shape
        ('head', torch.Size([6, 2]))
    """

    def __init__(
        self, split: str = "train", size: int = 1000, image_size: int = 128, seed: int = 0
    ) -> None:
        checks.one_of("split", split, ("train", "test"))
        checks.integer("size", size, 1)
        checks.integer("image_size", image_size, 16)
        checks.integer("seed", seed, 0)
        self.classes = list(CLASSES)
        self.part_names = list(PARTS)
        self.landmark_names = list(LANDMARKS)
        self.image_size = image_size
        self._images = torch.empty(size, 3, image_size, image_size, dtype=torch.uint8)
        self._codes = torch.empty(size, image_size, image_size, dtype=torch.uint8)
        for index in range(size):
            random = np.random.default_rng((seed, int(split == "test"), index))
            pixels, codes = _draw(random, CLASSES[self.label(index)], image_size)
            self._images[index] = torch.from_numpy(pixels)
            self._codes[index] = torch.from_numpy(codes)

    def __len__(self) -> int:
        return len(self._images)

    def label(self, index: int) -> int:
        return range(len(self))[index] % len(self.classes)

    def image(self, index: int) -> Tensor:
        return self._images[index].float() / 255

    def __getitem__(self, index: int) -> PartSample:
        codes = self._codes[index]
        shown = codes == torch.arange(1, len(LANDMARKS) + 1, dtype=torch.uint8)[:, None, None]
        head, neck, torso, front, hind, tail = shown
        object_mask = codes > 0
        return PartSample(
            image=self.image(index),
            label=self.label(index),
            landmarks=centres(bounding_boxes(shown)),
            part_masks=torch.stack([head, neck, torso, front | hind, tail]),
            object_mask=object_mask,
            box=bounding_boxes(object_mask[None])[0],
        )


def part_animals(
    *,
    image_size: int = 128,
    train_images: int = 2000,
    test_images: int = 1200,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    num_workers: int | None = None,
) -> PartDataModule:
    """Drawn animals with their parts annotated, see ``PartAnimals``.

    Args:
        image_size: side of the square images, pixels.
        train_images: how many are drawn to train on, those held out included.
        test_images: how many are drawn to test on.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images, and of the flips.
        augment: flip half of the training images left to right.
        validation: share of the training images held out to validate on.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        num_workers: processes that read images; None: 0, they are in memory.

    Raises:
        FileNotFoundError, ValueError: see ``PartAnimals`` and ``PartDataModule``.
    """
    checks.integer("train_images", train_images, 1)
    checks.integer("test_images", test_images, 1)
    return PartDataModule(
        PartAnimals("train", train_images, image_size=image_size),
        PartAnimals("test", test_images, image_size=image_size),
        batch_size,
        seed=seed,
        flip=checks.boolean("augment", augment),
        validation=validation,
        validation_seed=validation_seed,
        mean=mean,
        std=std,
        num_workers=readers(num_workers, in_memory=True),
    )
