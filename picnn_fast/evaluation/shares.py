"""Which images of a split a process measures, where several measure it together."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from picnn_fast.metrics.ranks import agreeing, gather_objects, world


class Share(NamedTuple):
    """Whole batches in a row, of those that one process would measure.

    So every image is measured once, in the batch that it would be in, whatever the number of
    processes: what is drawn for a batch, and the order of images rank by rank, are those of one
    process.

    Attributes:
        group: of the processes; None: of one alone.
        rank: this one's among them.
        ranks: how many they are.
        images: of the split.
        batch_size: images of a batch, but for the last.
    """

    group: Any
    rank: int
    ranks: int
    images: int
    batch_size: int

    @property
    def batches(self) -> range:
        """Numbers of the batches that this process measures; the first has one if any has."""
        count = -(-self.images // self.batch_size)
        first, last = (-(-count * rank // self.ranks) for rank in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def places(self) -> range:
        """The images of these batches."""
        first, last = self.batches.start, self.batches.stop
        return range(first * self.batch_size, min(last * self.batch_size, self.images))

    @property
    def whole(self) -> "Share":
        """That of one process alone."""
        return self._replace(group=None, rank=0, ranks=1)

    def earlier(self, chosen: Tensor) -> list[int]:
        """How many images of each batch before these are chosen, ``[images]`` bool; but for 0."""
        before = chosen[: self.places.start].split(self.batch_size)
        return [count for batch in before if (count := int(batch.sum()))]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, on all of them."""
        return [value] if self.ranks == 1 else gather_objects(value, self.group)

    def agreeing(self) -> AbstractContextManager[None]:
        """``metrics.ranks.agreeing`` of the processes."""
        return contextlib.nullcontext() if self.ranks == 1 else agreeing(self.group)


@contextmanager
def processes(over_ranks: bool) -> Iterator[tuple[Any, int, int]]:
    """All processes of ``torch.distributed``, as a group that passes tensors between hosts.

    Args:
        over_ranks: whether they measure together.

    Yields:
        The group, this process's rank and how many there are; None, 0 and 1 of a single one.
    """
    if not over_ranks or world()[1] == 1:
        yield None, 0, 1
        return
    # Not that of training, which may pass on what lies on GPUs alone.
    group = distributed.new_group(backend="gloo")
    try:
        yield group, *world(group)
    finally:
        distributed.destroy_process_group(group)


def spread(images: int, most: int | None) -> Tensor:
    """Which of so many images are looked at, ``[images]`` bool: at most so many, spread evenly."""
    chosen = torch.ones(images, dtype=torch.bool)
    if most is not None and images > most:
        chosen[:] = False
        chosen[torch.arange(most) * images // most] = True
    return chosen
