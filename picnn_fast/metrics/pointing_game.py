"""The grid pointing game: whether an attribution tells a class's image from those of others."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means


class _Kept(NamedTuple):
    """A confident image: of which class's probability, which of the images seen, and itself."""

    confidence: float
    place: int
    image: Tensor


class PointingGame(PerImageMetric):
    """Share of the positive attribution of a class that lies on its own image in a grid of images.

    A grid is of ``size`` x ``size`` images of different classes, all that the network classifies
    right: of each class first the one with the highest probability, then the next. Of every class
    in the grid the attribution to its logit is asked for, and the share of its positive part that
    lies in the class's cell is the value of that image; 0 where no part is positive. The metric is
    the mean over the images in grids. An attribution that ignores the images has 1 / size².

    Classes take turns so that grids hold all alike; of more classes than places, those at even
    distances. ``update`` keeps on the metric's device as many images of each class as are needed
    where all have as many; where some have fewer, there are fewer grids. Over ranks, each makes
    grids of its own images. ``forward`` is not offered: a batch makes no grid.

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

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        self._play()
        super()._sync_dist(*args, **kwargs)

    def _play(self) -> None:
        """Put the images' values in the place of those that were not known."""
        if self._is_synced or self._count == 0:
            return
        if self._played is None:
            values = torch.full((self._count,), math.nan, dtype=self.wide, device=self.device)
            for grid in self._grids():
                indices = torch.tensor([image.place for _, image in grid], device=self.device)
                values[indices] = self._shares(grid).to(self.wide)
            self._played = values
        self.values = [self._played]

    def _grids(self) -> Iterator[list[tuple[int, _Kept]]]:
        """Classes and their images, row by row."""
        made = 0
        for rank in range(self._most):
            classes = [c for c in self.classes if len(self._kept[c]) > rank]
            turn = rank % max(1, len(classes))
            classes = classes[turn:] + classes[:turn]
            for first in range(0, len(classes) - self.cells + 1, self.cells):
                if made < self.grids:
                    yield [(c, self._kept[c][rank]) for c in classes[first : first + self.cells]]
                made += 1

    def _shares(self, grid: list[tuple[int, _Kept]]) -> Tensor:
        """Of each class, ``[cells]``."""
        images = torch.stack([image.image for _, image in grid])
        height, width = images.shape[2:]
        cells = images.unflatten(0, (self.size, self.size)).permute(2, 0, 3, 1, 4)
        whole = cells.reshape(1, images.shape[1], self.size * height, self.size * width)
        classes = torch.tensor([[c for c, _ in grid]], device=images.device)
        heat = self.attribution(whole, classes).to(self.device)
        wanted = (1, self.cells, *whole.shape[2:])
        if tuple(heat.shape) != wanted:
            raise ValueError(f"attribution: yielded {tuple(heat.shape)}, want {wanted}")
        heat = heat[0].clamp_min(0).to(self.wide)
        heat = heat.unflatten(2, (self.size, width)).unflatten(1, (self.size, height))
        parts = heat.sum((2, 4)).flatten(1)  # of each class, in each cell
        shares: Tensor = parts.diagonal() / parts.sum(1)
        return shares.nan_to_num(0.0)
