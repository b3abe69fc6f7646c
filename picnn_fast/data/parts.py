"""Images whose object parts are annotated: what every such data set gives, and its data module."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from picnn_fast import checks
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, SeededDataModule, colours, shift
from picnn_fast.data.memory import Shelf, bound
from picnn_fast.data.preprocessing import Preprocessing


class PartSample(NamedTuple):
    """One image of one object, or a batch of them once collated (every field gains ``[B, ...]``).

    Positions are in pixels of the image, x to the right and y down; the centre of the pixel in
    column c has x = c + 0.5.
    """

    image: Tensor
    """``[3, S, S]`` float32 in [0, 1]."""
    label: int
    """Index into the ``classes`` of the data set; int64 ``[B]`` once collated."""
    landmarks: Tensor
    """``[L, 2]`` float32, (x, y) of each of ``landmark_names``; NaN where it is not shown."""
    part_masks: Tensor
    """``[P, S, S]`` bool, one for each of ``part_names``; empty where the part is not shown."""
    object_mask: Tensor
    """``[S, S]`` bool."""
    box: Tensor
    """``[4]`` float32: x0, y0, x1, y1 of the object, edges of pixels."""


class PartDataset(Dataset[PartSample], ABC):
    """What metrics of part semantics read: samples with names for their classes and parts.

    Attributes:
        shelf: where ``image`` may keep what it decodes, of a set that reads files.
    """

    from_files = False
    shelf: Shelf | None = None

    classes: list[str]
    part_names: list[str]
    landmark_names: list[str]
    image_size: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> PartSample: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """The image of a sample, ``[3, S, S]``, without the work its annotations take."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The label of a sample, without reading its image."""

    def source(self, index: int) -> Hashable:
        """What a sample was cut from: those of one photograph are not split over two sets."""
        return index


class _Chosen(PartDataset):
    """Some samples of a set."""

    def __init__(self, samples: PartDataset, indices: list[int]) -> None:
        self.classes = samples.classes
        self.part_names = samples.part_names
        self.landmark_names = samples.landmark_names
        self.image_size = samples.image_size
        self._samples = samples
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> PartSample:
        return self._samples[self._indices[index]]

    def image(self, index: int) -> Tensor:
        return self._samples.image(self._indices[index])

    def label(self, index: int) -> int:
        return self._samples.label(self._indices[index])

    def source(self, index: int) -> Hashable:
        return self._samples.source(self._indices[index])


class _Labelled(Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: PartDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.image(index), self.samples.label(index)


class PartDataModule(SeededDataModule):
    """Trains and tests on the images and labels of two sets; ``part_loader`` has their parts.

    Training and test batches are pairs: images ``[B, 3, S, S]`` float32, labels ``[B]`` int64. No
    part mask is made for them. Images are normalised colour by colour once they are on the device
    of the network; those of ``part_loader`` by ``normalise``.

    Args:
        train_set, test_set: of the same classes, parts, landmarks and image size.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images, and of the flips.
        num_workers: processes that read images.
        flip: half of the training images, drawn anew every epoch, are flipped left to right.
        max_shift: training images move by up to this many pixels along each axis, filled with 0.
        validation: share of the training images held out to validate on; those of one photograph
            stay together.
        validation_seed: of their choice.
        mean, std: per colour, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for images that are read from files; None: a quarter of what is
            free.

    Raises:
        TypeError: a set is no PartDataset.
        ValueError: a set is empty, the two differ, or an argument is out of range.

    Example:
        >>> from picnn_fast.data import PartAnimals, PartDataModule
        >>> train, test = (PartAnimals(split, 12, image_size=32) for split in ("train", "test"))
        >>> data = PartDataModule(train, test, batch_size=6)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([6, 3, 32, 32]), torch.Size([6]))
        >>> next(iter(data.part_loader("test"))).part_masks.shape
        torch.Size([6, 5, 32, 32])
    """

    in_channels = 3
    preprocessing: Preprocessing

    def __init__(
        self,
        train_set: PartDataset,
        test_set: PartDataset,
        batch_size: int = 64,
        *,
        seed: int = 0,
        num_workers: int = 0,
        flip: bool = True,
        max_shift: int = 0,
        validation: float = 0.0,
        validation_seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        cache: float | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation, validation_seed)
        self.cache = bound(cache)
        checks.boolean("flip", flip)
        colours("mean", mean)
        if min(colours("std", std)) <= 0:
            raise ValueError(f"std: got {tuple(std)}, want values > 0")
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        for name, samples in (("train_set", train_set), ("test_set", test_set)):
            if not isinstance(samples, PartDataset):
                raise TypeError(f"{name}: got {type(samples).__name__}, want a PartDataset")
            if len(samples) == 0:
                raise ValueError(f"{name}: got no sample, want at least one")
        for name in ("classes", "part_names", "landmark_names", "image_size"):
            got, want = getattr(test_set, name), getattr(train_set, name)
            if got != want:
                raise ValueError(f"test_set: got {name} {got}, want {want} like train_set")
        self.flip = flip
        self.max_shift = checks.integer("max_shift", max_shift, 0)
        self.preprocessing = Preprocessing(train_set.image_size, mean=mean, std=std)
        self.class_names = train_set.classes
        self.num_classes = len(self.class_names)
        everything = range(len(train_set))
        labels = [train_set.label(index) for index in everything]
        kept, out = self.hold_out(labels, [train_set.source(index) for index in everything])
        self._read = [samples for samples in (train_set, test_set) if samples.from_files]
        self.part_sets = {"train": train_set, "test": test_set}
        if out:
            self.part_sets["train"] = _Chosen(train_set, kept)
            self.part_sets["validation"] = _Chosen(train_set, out)
            self.validation_set = _Labelled(self.part_sets["validation"])
        self.train_set = _Labelled(self.part_sets["train"])
        self.test_set = _Labelled(test_set)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalisation; random flips and shifts, in training only, from torch's generator."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        if training and self.max_shift > 0:
            images = shift(images, self.max_shift)
        if training and self.flip:
            images = flip_left_right(images)
        return self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` in [0, 1] as the network takes them."""
        return self.preprocessing.normalise(images)

    def read_from_files(self) -> list[PartDataset]:
        return self._read

    def part_loader(self, split: str = "test") -> DataLoader[PartSample]:
        """Collated samples of a split, one of ``part_sets``, in order, none flipped.

        They are ``"train"``, ``"test"`` and, where there are validation images, ``"validation"``.
        """
        checks.one_of("split", split, tuple(self.part_sets))
        return self.in_order(self.part_sets[split])


def flip_left_right(images: Tensor) -> Tensor:
    """Flip each image ``[B, C, H, W]`` left to right, or leave it: even odds, drawn one by one."""
    heads = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(heads, images.flip(-1), images)


def bounding_boxes(masks: Tensor) -> Tensor:
    """Edges x0, y0, x1, y1 of the pixels of each mask ``[n, H, W]``, NaN for an empty one."""
    ends = []
    for shown in (masks.any(1), masks.any(2)):
        places = torch.arange(shown.shape[1], device=masks.device)
        ends.append(torch.where(shown, places, shown.shape[1]).amin(1))
        ends.append(torch.where(shown, places, -1).amax(1) + 1)
    left, right, top, bottom = ends
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes.where((right > 0)[:, None], torch.nan)


def centres(boxes: Tensor) -> Tensor:
    """(x, y) of the middle of each box ``[n, 4]``: ``[n, 2]``."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2
