"""Loaders whose order and augmentation depend on seed and epoch alone, so that a run can resume."""

import itertools
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.memory import ImageMemory, image_memory
from picnn_fast.data.preprocessing import Preprocessing, as_numbers

with extra("train"):
    import lightning as L
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_PREFETCHED = 4  # batches that each process reads ahead


def colours(name: str, values: Sequence[float]) -> Sequence[float]:
    """Three numbers, one a colour."""
    if len(values) != 3:
        raise ValueError(f"{name}: got {len(values)} values, want 3, one a colour")
    return values


def derive_seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers, such as seed, epoch and rank."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def readers(num_workers: int | None, *, in_memory: bool = False) -> int:
    """How many processes read images: as many as asked for, or as suits the data."""
    if num_workers is not None:
        return num_workers
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return 0 if in_memory else min(8, processors)


def held_out(
    labels: Sequence[int],
    share: float,
    seed: int,
    sources: Sequence[Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """Split images class by class, by a seed of its own.

    Args:
        labels: of each image.
        share: of each class that is held out, rounded, in [0, 1); at least one image of a class
            that has two or more, and never all of them.
        seed: of the choice.
        sources: what each image was cut from. Those of one source stay together and count as one
            image, of the class of the first; by default each image is its own source.

    Returns:
        Indices of the images kept and of those held out, ascending.
    """
    members: dict[Hashable, list[int]] = {}
    for index, source in enumerate(range(len(labels)) if sources is None else sources):
        members.setdefault(source, []).append(index)
    together = list(members.values())
    classes = np.array([labels[indices[0]] for indices in together], dtype=np.int64)
    draw = np.random.default_rng(seed)
    out: list[int] = []
    for label in np.unique(classes) if share > 0 else ():
        order = draw.permutation(np.flatnonzero(classes == label))
        count = min(max(round(share * len(order)), 1), len(order) - 1)
        out += [index for place in order[:count].tolist() for index in together[place]]
    kept = np.setdiff1d(np.arange(len(labels)), out)
    return kept.tolist(), sorted(out)


class ByteImages(Dataset[tuple[Tensor, int]], ABC):
    """Labelled images of bytes, ``[C, H, W]`` float32 in [0, 1] one by one.

    A loader reads the bytes: a quarter of what is sent from process to process and to a device,
    where they become numbers.
    """

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """``[H, W, C]`` uint8; drawn from torch's generator what is random about it."""

    @abstractmethod
    def label(self, index: int) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = self.label(index)
        return as_numbers(self.pixels(index).permute(2, 0, 1)), label


class _Read(Dataset[Any]):
    """What a loader reads of a set."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.images, ByteImages):
            return self.images.pixels(index), self.images.label(index)
        return self.images[index]


class _Drawn(_Read):
    """Random changes of an image follow from seed, epoch and its index alone."""

    def __init__(self, images: Dataset[Any], seed: int) -> None:
        super().__init__(images)
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> Any:  # type: ignore[override]
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(derive_seed(self.seed, *place))
            return super().__getitem__(place[1])
        finally:
            torch.set_rng_state(state)


class EpochOrder(DistributedSampler[Any]):
    """The images of an epoch that a rank reads; a pass may begin further on.

    Attributes:
        skipped: images that a pass begins after.
        drawn: whether to tell the epoch with each index, to processes that live on.
    """

    skipped = 0
    drawn = False

    def indices(self) -> Iterator[int]:
        """All of the rank's, in order."""
        return super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        left = itertools.islice(self.indices(), self.skipped, None)
        return ((self.epoch, index) for index in left) if self.drawn else left


class EpochLoader(DataLoader[Any]):
    """A loader that a run which goes on within an epoch begins in the midst.

    Its state is how many batches all ranks together have taken in this epoch.
    """

    _taken = 0
    _begin = 0

    def __iter__(self) -> Any:
        self._taken, self._begin = self._begin, 0
        order: Any = self.sampler
        order.skipped = self._taken * (self.batch_size or 1)
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._taken * self._ranks()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass goes on from there, with another number of ranks from just before it."""
        self._begin = state["batches"] // self._ranks()

    def _ranks(self) -> int:
        return getattr(self.sampler, "num_replicas", 1)


def _channels_innermost(samples: list[Any]) -> Any:
    """A batch of bytes ``[B, C, H, W]`` as decoders make them and convolutions take them."""
    images, labels = default_collate(samples)
    return [images.permute(0, 3, 1, 2), labels]


class SeededDataModule(L.LightningDataModule):
    """Data module over ``train_set``, ``validation_set`` and ``test_set``.

    What is validated on after every epoch is a share of the training images, or a folder of its
    own, and never the test split.

    Attributes:
        plain_train_set: the training images as the test images are made, where ``train_set``
            changes them at random, by torch's generator; None where it does not.
        validation_set: None where there are no validation images.
        validation_source: which images these are, in a line for the user.
        preprocessing: how files become images of the test set, and these what a network takes;
            None where there is nothing to tell but their size.
        mean, std: images are normalised by, ``[C, 1, 1]`` on a scale of [0, 1]; None: they are not.
        cache: gigabytes of memory for decoded images; None: a quarter of what is free.
    """

    num_classes: int
    in_channels: int
    class_names: list[str]
    train_set: Dataset[Any]
    plain_train_set: Dataset[Any] | None = None
    validation_set: Dataset[Any] | None = None
    test_set: Dataset[Any]
    validation_source = "none"
    preprocessing: Preprocessing | None = None
    mean: Tensor | None = None
    cache: float | None = 0.0
    _memory: ImageMemory | None = None
    std: Tensor | None = None
    # Of the class told from all others, or None: labels are class indices.
    category: int | None = None

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        seed: int,
        validation: float = 0.0,
        validation_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("validation_seed", validation_seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, want an integer >= {least}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        number = isinstance(validation, int | float) and not isinstance(validation, bool)
        if not number or not 0 <= validation < 1:
            raise ValueError(f"validation: got {validation!r}, want a share in [0, 1)")
        self.seed = seed
        self.validation = validation
        self.validation_seed = validation_seed

    def setup(self, stage: str | None = None) -> None:
        """Nothing is left to do: a data module has its sets once it is made."""

    def hold_out(
        self, labels: Sequence[int], sources: Sequence[Hashable] | None = None
    ) -> tuple[list[int], list[int]]:
        """Which training images to train on and which to validate on; tells the user.

        Args:
            labels: of the training images.
            sources: see ``held_out``.

        Returns:
            Indices of the images to train on and to validate on; none of the latter where
            ``validation`` is 0 or no class has two images.
        """
        kept, out = held_out(labels, self.validation, self.validation_seed, sources)
        if out:
            chosen = f"{len(out)} of the {len(labels)} training images"
            self.validation_source = f"{chosen}, seed {self.validation_seed}"
        else:
            why = "validation is 0" if self.validation == 0 else "no class has two training images"
            self.validation_source = f"none: {why}"
        return kept, out

    def single_out(self, name: str) -> None:
        """From now on tell one class, label 1, from all others, label 0 (ICNN's single category).

        Raises:
            ValueError: there is no class of that name, or one is singled out already.
        """
        if self.category is not None or name not in self.class_names:
            raise ValueError(
                f"category: got {name!r},{checks.did_you_mean(name, self.class_names)} want one of"
                f" {', '.join(map(repr, self.class_names))}"
                + ("" if self.category is None else ", once")
            )
        self.category = self.class_names.index(name)
        self.class_names = [f"not {name}", name]
        self.num_classes = 2

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.category is None:
            return batch
        images, labels = batch
        return images, (labels == self.category).to(labels.dtype)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalisation, of bytes or of numbers in [0, 1]."""
        if self.preprocessing is None:
            return batch
        images, labels = batch
        # With double precision Lightning turns numbers to those of the network, but not bytes.
        module = getattr(self.trainer, "lightning_module", None)
        dtypes = [] if module is None else [parameter.dtype for parameter in module.parameters()]
        return self.preprocessing.normalise(images, *dtypes[:1]), labels

    def as_taken(
        self, images: Tensor, labels: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """A batch as a network takes it: what Lightning does around the transfer to its device.

        Args:
            images: ``[B, C, H, W]`` of a loader, or of the sets.
            labels: ``[B]`` of the same.
            device: to take them to.
        """
        pair: Any = self.on_before_batch_transfer([images, labels], 0)
        images, labels = self.on_after_batch_transfer([x.to(device) for x in pair], 0)
        return images, labels

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by (seed, epoch); each rank reads its own share.

        A single image left over for the last batch is left out of the epoch: batch normalisation
        cannot be trained on one value a channel.
        """
        trainer = self.trainer
        # Also right for one process: unlike RandomSampler its order depends on no generator state.
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler = self.order(num_replicas=ranks, rank=rank, seed=self.seed)
        sampler.drawn = self.plain_train_set is not None
        twice = sampler.total_size - len(self.train_set)  # type: ignore[arg-type]
        if twice > 0 and rank == 0:
            warnings.warn(
                f"data: {twice} of the training images, others each epoch, are trained on twice in"
                f" it, for {len(self.train_set)} do not divide by {ranks} processes",  # type: ignore[arg-type]
                stacklevel=2,
            )
        # Lightning tells the sampler of an epoch, but its current_epoch lags when resuming.
        progress: Any = trainer.fit_loop.epoch_progress.current if trainer else None
        sampler.set_epoch(progress.processed if progress else 0)
        return self._loader(
            _Drawn(self.train_set, self.seed) if sampler.drawn else _Read(self.train_set),
            kind=EpochLoader,
            drop_last=len(sampler) > 1 and len(sampler) % self.batch_size == 1,
            sampler=sampler,
            persistent_workers=self.num_workers > 0,
        )

    def order(self, **options: Any) -> EpochOrder:
        """The order of the training images, with the options of ``DistributedSampler``."""
        return EpochOrder(self.train_set, **options)

    @property
    def remark(self) -> str | None:
        """What else the user may want to know at the start of a training; an image is read."""
        return None

    def read_from_files(self) -> Sequence[Any]:
        """The sets whose decoded images are kept in memory, on their ``shelf``."""
        return ()

    def train_images(self) -> DataLoader[Any]:
        """The training images in order and not augmented; of several ranks each reads its share.

        They are those of ``plain_train_set``, or else of ``train_set`` as it is.
        """
        images = self.train_set if self.plain_train_set is None else self.plain_train_set
        if self.trainer is None or self.trainer.world_size == 1:
            return self.in_order(images)
        share = range(self.trainer.global_rank, len(images), self.trainer.world_size)  # type: ignore[arg-type]
        return self.in_order(images, share)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return [] if self.validation_set is None else self.in_order(self.validation_set)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.in_order(self.test_set)

    def in_order(
        self, images: Dataset[Any], places: Sequence[int] | None = None
    ) -> DataLoader[Any]:
        """A set in batches as it stands; torch's generator is left as it was.

        Args:
            images: of the set.
            places: which of them, in this order; None: all.
        """
        read = _Read(images)
        return self._loader(read if places is None else Subset(read, places), of=images)

    def _loader(
        self,
        read: Dataset[Any],
        of: Dataset[Any] | None = None,
        kind: type[DataLoader[Any]] = DataLoader,
        **options: Any,
    ) -> DataLoader[Any]:
        """Batches of what is read ``of`` a set."""
        if self._memory is None:
            # Not before something is read, and before there are processes that do.
            self._memory = image_memory(self.cache, getattr(self.trainer, "num_devices", 1))
            for images in self.read_from_files():
                images.shelf = self._memory.shelf(len(images))
        of = getattr(read, "images", None) if of is None else of
        return kind(
            read,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCHED if self.num_workers > 0 else None,
            collate_fn=_channels_innermost if isinstance(of, ByteImages) else None,
            # Else it draws from torch's generator, and not as often in a run that resumes.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def shift(images: Tensor, max_shift: int) -> Tensor:
    """Move each image by its own random number of pixels in [-max_shift, max_shift], filled with 0.

    Args:
        images: ``[B, C, H, W]``.
        max_shift: pixels.

    Returns:
        ``[B, C, H, W]``, same dtype.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, [max_shift] * 4)
    top, left = torch.randint(0, 2 * max_shift + 1, (2, batch), device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    samples = torch.arange(batch, device=images.device)
    moved = padded.movedim(1, -1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)
