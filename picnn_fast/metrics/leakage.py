"""Mask leakage: what the pattern of a mask alone tells of the class."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means
from picnn_fast.metrics.pathway import MeanOverDraws
from picnn_fast.reference.masking import add_by_label

# A pair's images are of two classes, or of one; an image is alone in the first batch.
_APART, _TOGETHER, _ALONE = range(3)


class MaskLeakage(PerImageMetric):
    """Accuracy when the maps of another image carry the mask drawn for this image's label.

    A mask that tells nothing by itself gives chance: the share of pairs of images that are of one
    class, whose maps name the class themselves. 1 says that the pattern of the mask names the
    class, whatever the maps hold; ACC2 is then no accuracy of the maps.

    The other image is drawn from as many as the first batch held, each image seen so far as likely
    as any other, so that images sorted by class are paired across classes too. Pairs of one class
    and pairs of two are counted apart and weighed by how many of each the whole set holds. Which
    images are paired hangs on the sizes of the batches and the seed alone. A rank pairs images that
    it has seen, those that ``skip`` and ``keep`` give it among them.

    Args:
        num_classes: K.
        draws: S, masks drawn for each image.
        seed: of the pairs.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import MaskLeakage
        >>> metric = MaskLeakage(num_classes=2)
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> masks = torch.eye(2)[labels][None]  # one filter a class
        >>> metric.update(torch.ones(4, 2), labels, masks, lambda maps, mask: maps * mask)
        >>> metric.compute().mean.item()
        1.0
    """

    higher_is_better = False

    labels: list[Tensor]
    kinds: list[Tensor]
    right: list[Tensor]

    def __init__(self, num_classes: int, draws: int = 1, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.draws = checks.integer("draws", draws, 1)
        self.seed = checks.integer("seed", seed, 0)
        self.add_rows("labels", dtype=torch.int64)
        self.add_rows("kinds", dtype=torch.int8)
        self.add_rows("right", draws, dtype=torch.uint8)
        self._forget()

    def _forget(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._places: list[int] = []  # of the images that are kept, among all seen
        self._seen = 0
        self._generator = torch.Generator().manual_seed(self.seed)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def update(
        self,
        maps: Tensor,
        labels: Tensor,
        masks: Tensor,
        classify: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Add a batch.

        Args:
            maps: ``[B, …]`` of each image.
            labels: ``[B]`` integers in [0, K).
            masks: ``[S, B, N]`` of each draw, for each image's label, or pseudo-label.
            classify: maps and a mask ``[B, N]`` to logits ``[B, K]``.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.tensor("maps", maps)
        checks.labels("labels", labels, len(maps), self.num_classes)
        checks.floating("masks", masks)
        if masks.ndim != 3 or tuple(masks.shape[:2]) != (self.draws, len(maps)):
            raise ValueError(
                f"masks: got shape {tuple(masks.shape)}, want [{self.draws}, {len(maps)}, filters]:"
                " draws and the batch of maps"
            )
        if len(maps) == 0:
            return
        first, seen = self._seen == 0, self._seen
        if not first and self._kept is None:
            raise ValueError(f"maps: got an update after skip(), want keep() of {self._places}")
        others, replaced = self._pair(len(maps))
        if first:
            others = others.to(maps.device)
            self._add(maps[others], labels[others], labels, masks, classify)
            self._kept = maps.clone(), labels.clone()
            return
        assert self._kept is not None
        others = others.to(maps.device)
        self._add(self._kept[0][others], self._kept[1][others], labels, masks, classify)
        for slot, place in replaced.items():
            at = place - seen
            self._kept[0][slot], self._kept[1][slot] = maps[at], labels[at]

    def skip(self, sizes: Sequence[int]) -> list[int]:
        """Go on as after batches that were given to other ranks; before the first ``update``.

        Args:
            sizes: of these batches, in order.

        Returns:
            Which of their images others are now paired with: ``keep`` is to be given them next.

        Raises:
            TypeError, ValueError: a size that is no integer, or below 1.
        """
        for size in sizes:
            self._pair(checks.integer("sizes", size, 1))
        return list(self._places)

    def keep(self, maps: Tensor, labels: Tensor) -> None:
        """Take the images that ``skip`` named.

        Args:
            maps: ``[b, …]``, in the order in which they were named.
            labels: ``[b]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: other than so many, or labels out of range.
        """
        checks.tensor("maps", maps)
        checks.labels("labels", labels, len(self._places), self.num_classes)
        if len(maps) != len(self._places):
            raise ValueError(f"maps: got {len(maps)} images, want {len(self._places)}, of skip()")
        self._kept = maps.clone(), labels.clone()

    def _pair(self, size: int) -> tuple[Tensor, dict[int, int]]:
        """Draw for a batch of so many images.

        Returns:
            ``[size]``, with which of the images kept each is paired, in the first batch with which
            of its own; and which images are kept in the place of others from then on.
        """
        seen, self._seen = self._seen, self._seen + size
        if seen == 0:
            # An image that is alone in the first batch has no other to be paired with.
            shift = self._draw(1, size) if size > 1 else 0
            self._places = list(range(size))
            return torch.arange(size).roll(shift), {}
        others = torch.randint(len(self._places), (size,), generator=self._generator)
        replaced: dict[int, int] = {}
        for place in range(seen, seen + size):
            slot = self._draw(0, place + 1)
            if slot < len(self._places):
                self._places[slot] = replaced[slot] = place
        return others, replaced

    def forward(self, *args: Any, **kwargs: Any) -> MeanOverDraws:
        """Add a batch as ``update`` does, and return the value of this batch alone.

        Raises:
            TypeError, ValueError: as ``update`` does. The metric is then as it was before.
        """
        # Not in the metric itself, which would forget the images that others are paired with.
        alone = type(self)(self.num_classes, self.draws, seed=self.seed, sync_on_compute=False)
        alone.to(self.device).update(*args, **kwargs)
        self.update(*args, **kwargs)
        return alone.compute()

    def _draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._generator))

    def _add(
        self,
        maps: Tensor,
        labels_of_maps: Tensor,
        labels: Tensor,
        masks: Tensor,
        classify: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        kinds = torch.where(labels_of_maps == labels, _TOGETHER, _APART)
        if self._kept is None and len(maps) == 1:
            kinds.fill_(_ALONE)
        right = torch.stack([classify(maps, mask).argmax(-1) == labels for mask in masks], 1)
        self.append(labels=labels, kinds=kinds, right=right)

    def compute(self) -> MeanOverDraws:
        """Scalars; a mean in [0, 1], NaN where no two images of different classes were paired."""
        everyone = torch.ones(1, self.seen, dtype=torch.int64, device=self.device)
        return MeanOverDraws.of(self._leakage(everyone)[:, 0])

    def replicate(self, counts: Tensor) -> Tensor:
        """The mean over draws of each resample ``[R]``; an image is drawn with its pair.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return self._leakage(counts).mean(0)

    def _leakage(self, counts: Tensor) -> Tensor:
        """Of each draw in each resample, ``[S, R]``."""
        counts = counts.to(self.device)
        sizes = torch.zeros(len(counts), self.num_classes, dtype=self.wide, device=self.device)
        add_by_label(sizes.T, self.rows("labels"), counts.to(self.wide).T)
        one_class = (sizes / sizes.sum(1, keepdim=True)).square().sum(1)
        right, kinds = self.rows("right").to(self.wide), self.rows("kinds")
        apart, together = (
            resampled_means(right.where((kinds == kind)[:, None], math.nan), counts).T
            for kind in (_APART, _TOGETHER)
        )
        # So few pairs of one class that none was drawn weigh next to nothing.
        together = together.where(~together.isnan(), apart)
        return (1 - one_class) * apart + one_class * together
