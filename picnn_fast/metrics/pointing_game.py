"""The grid pointing game: whether an attribution tells a class's image from those of others."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means
from picnn_fast.metrics.ranks import agreeing, gather_objects, gather_rows, world

T = TypeVar("T")


class _Kept(NamedTuple):
    """A confident image: of which class's probability, which of the images seen, and itself."""

    confidence: float
    place: int
    image: Tensor


class _Told(NamedTuple):
    """What ranks know of an image that one of them keeps; in order, the first is to be chosen."""

    doubt: float  # the negative of its confidence
    place: int  # among the images of all ranks
    rank: int


class PointingGame(PerImageMetric):
    """Share of the positive attribution of a class that lies on its own image in a grid of images.

    A grid is of ``size`` x ``size`` images of different classes, all that the network classifies
    right: of each class first the one with the highest probability, then the next. Of every class
    in the grid the attribution to its logit is asked for, and the share of its positive part that
    lies in the class's cell is the value of that image; 0 where no part is positive. The metric is
    the mean over the images in grids. An attribution that ignores the images has 1 / size².

    Classes take turns so that grids hold all alike; of more classes than places, those at even
    distances. ``update`` keeps on the metric's device as many images of each class as are needed
    where all have as many; where some have fewer, there are fewer grids. Over ranks grids are of
    the images of all, each of which is sent to the rank that makes its grid. ``forward`` is not
    offered: a batch makes no grid.

    Args:
        num_classes: K, at least ``size``².
        attribution: of grids ``[b, C, size · H, size · W]`` and classes ``[b, T]`` int64 to
            attributions ``[b, T, size · H, size · W]`` of either sign.
        size: images along a side of a grid, at least 2.
        grids: most grids to make.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Böhle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable
        Classifications", CVPR 2021, eq. 11.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import PointingGame
        >>> def brightness(grids, classes):  # whatever the class
        ...     return grids.expand(-1, classes.shape[1], -1, -1)
        >>> metric = PointingGame(num_classes=4, attribution=brightness, size=2)
        >>> images = torch.tensor([0.0, 1.0, 1.0, 2.0]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
        >>> metric.update(images, logits=torch.eye(4), labels=torch.arange(4))
        >>> metric.per_image()
        tensor([0.0000, 0.2500, 0.2500, 0.5000], dtype=torch.float64)
        >>> metric.compute().item()
        0.25
    """

    higher_is_better = True

    values: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        attribution: Callable[[Tensor, Tensor], Tensor],
        *,
        size: int = 3,
        grids: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.size = checks.integer("size", size, 2)
        self.cells = size**2
        if num_classes < self.cells:
            raise ValueError(
                f"size: got {size} with num_classes={num_classes}, want {self.cells} classes or"
                " more: those of a grid are different"
            )
        self.grids = checks.integer("grids", grids, 1)
        self.attribution = attribution
        places = min(num_classes, grids * self.cells)
        self.classes = [place * num_classes // places for place in range(places)]
        self.add_rows("values", dtype=torch.float64)
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[int, list[_Kept]] = {c: [] for c in self.classes}
        self._count = 0
        self._played: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self._forget()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("PointingGame: got forward(), want update() and, at the end, compute()")

    def update(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of images.

        Args:
            images: ``[B, C, H, W]`` as the network takes them, all of one size.
            logits: ``[B, K]``, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.floating("images", images)
        if images.ndim != 4:
            raise ValueError(f"images: got shape {tuple(images.shape)}, want [B, C, H, W]")
        checks.labels("labels", labels, len(images), self.num_classes)
        checks.floating("logits", logits)
        if tuple(logits.shape) != (len(images), self.num_classes):
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, want"
                f" {(len(images), self.num_classes)}: the batch and num_classes"
            )
        probabilities, predicted = logits.detach().to(self.device, self.wide).softmax(1).max(1)
        right = (predicted == labels.to(self.device)).nonzero()[:, 0].tolist()
        confidences, chosen = probabilities.tolist(), labels.tolist()
        for at in right:
            kept = self._kept.get(chosen[at])
            if kept is None or (len(kept) == self._most and confidences[at] <= kept[-1].confidence):
                continue
            image = images[at].detach().to(self.device, copy=True)
            kept.append(_Kept(confidences[at], self._count + at, image))
            kept.sort(key=lambda image: -image.confidence)  # stable: of equal ones the first
            del kept[self._most :]
        self._count += len(images)
        self._played = None
        # Known once grids are made.
        self.append(values=torch.full((len(images),), math.nan, dtype=self.wide))

    def per_image(self) -> Tensor:
        """The value of each image seen ``[M]``, float64; NaN where it is in no grid."""
        self._play()
        return self.rows("values")

    def compute(self) -> Tensor:
        """A scalar in [0, 1], float64 (float32 on MPS); NaN where there are too few images."""
        return self.per_image().nanmean()

    def replicate(self, counts: Tensor) -> Tensor:
        """The mean of each resample ``[R]``, of the grids of all images.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return resampled_means(self.per_image(), counts)

    @property
    def _most(self) -> int:
        """Images of each class that grids can take."""
        return math.ceil(self.grids / (len(self.classes) // self.cells))

    def join(self, to: int | None = None, group: Any = None) -> None:
        """Take in what the other ranks have seen; all ranks call it, and each makes some grids.

        Args:
            to: the rank in the group that is to compute, and alone gets what there is; None: every
                rank.
            group: of ``torch.distributed``; None: of all processes.
        """
        starts, chosen = self._choose(group)
        grids = list(self._grids(chosen))
        rank, ranks = world(group)
        each = [self._sent(grids[k::ranks], k, starts[rank], group) for k in range(ranks)]
        of_grids = each[rank].split(self.cells)
        places, shares = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.wide)
        with agreeing(group):
            for grid, images in zip(grids[rank::ranks], of_grids, strict=False):
                value = self._shares([c for c, _ in grid], images)
                shares = torch.cat([shares, value.to(shares)])
                places = torch.cat([places, torch.tensor([told.place for _, told in grid])])
        known = gather_rows(places, to, group), gather_rows(shares, to, group)
        if known[0] is not None and known[1] is not None:
            joined = torch.full((starts[-1],), math.nan, dtype=self.wide)
            joined[known[0]] = known[1]
            self.values = [joined.to(self.device)]
            if len(joined) == self._count:  # the others have none
                self._played = self.values[0]

    def _choose(self, group: Any) -> tuple[list[int], dict[int, list[_Told]]]:
        """Of all ranks: where each's images begin, and end; and what grids are made of."""
        own = {c: [(-x.confidence, x.place) for x in kept] for c, kept in self._kept.items()}
        every = gather_objects((self._count, own), group)
        starts = list(itertools.accumulate((count for count, _ in every), initial=0))
        chosen: dict[int, list[_Told]] = {}
        for c in self.classes:
            told = [
                _Told(doubt, start + place, rank)
                for rank, (start, (_, kept)) in enumerate(zip(starts, every, strict=False))
                for doubt, place in kept[c]
            ]
            chosen[c] = sorted(told)[: self._most]
        return starts, chosen

    def _sent(
        self, grids: Sequence[list[tuple[int, _Told]]], maker: int, start: int, group: Any
    ) -> Tensor:
        """On the rank that makes these grids, their images ``[n, C, H, W]``, one after another."""
        rank, _ = world(group)
        wanted = [told for grid in grids for _, told in grid]
        held = {start + x.place: x.image for kept in self._kept.values() for x in kept}
        own = [held[x.place] for x in wanted if x.rank == rank]
        images = gather_rows(torch.stack(own) if own else None, maker, group)
        if images is None:
            return torch.empty(0, device=self.device)
        # They came rank by rank.
        came = sorted(range(len(wanted)), key=lambda at: wanted[at].rank)
        back = torch.empty(len(wanted), dtype=torch.int64)
        back[came] = torch.arange(len(wanted))
        return images[back.to(images.device)].to(self.device)

    def _play(self) -> None:
        """Put the images' values in the place of those that were not known."""
        # Other ranks' images are there too once they were joined, with the values of them all.
        if self.seen != self._count or self._count == 0:
            return
        if self._played is None:
            values = torch.full((self._count,), math.nan, dtype=self.wide, device=self.device)
            for grid in self._grids(self._kept):
                indices = torch.tensor([image.place for _, image in grid], device=self.device)
                images = torch.stack([image.image for _, image in grid])
                values[indices] = self._shares([c for c, _ in grid], images).to(self.wide)
            self._played = values
        self.values = [self._played]

    def _grids(self, kept: Mapping[int, Sequence[T]]) -> Iterator[list[tuple[int, T]]]:
        """Classes and their images, row by row."""
        made = 0
        for rank in range(self._most):
            classes = [c for c in self.classes if len(kept[c]) > rank]
            turn = rank % max(1, len(classes))
            classes = classes[turn:] + classes[:turn]
            for first in range(0, len(classes) - self.cells + 1, self.cells):
                if made < self.grids:
                    yield [(c, kept[c][rank]) for c in classes[first : first + self.cells]]
                made += 1

    def _shares(self, of: Sequence[int], images: Tensor) -> Tensor:
        """Of each class, ``[cells]``, of the image of each."""
        height, width = images.shape[2:]
        cells = images.unflatten(0, (self.size, self.size)).permute(2, 0, 3, 1, 4)
        whole = cells.reshape(1, images.shape[1], self.size * height, self.size * width)
        classes = torch.tensor([of], device=images.device)
        heat = self.attribution(whole, classes).to(self.device)
        wanted = (1, self.cells, *whole.shape[2:])
        if tuple(heat.shape) != wanted:
            raise ValueError(f"attribution: yielded {tuple(heat.shape)}, want {wanted}")
        heat = heat[0].clamp_min(0).to(self.wide)
        heat = heat.unflatten(2, (self.size, width)).unflatten(1, (self.size, height))
        parts = heat.sum((2, 4)).flatten(1)  # of each class, in each cell
        shares: Tensor = parts.diagonal() / parts.sum(1)
        return shares.nan_to_num(0.0)
