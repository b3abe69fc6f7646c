"""Intervals of figures by bootstrap: images drawn anew from those that were seen.

A metric that is a function of images may offer ``replicate(counts)``. Of counts ``[R, M]`` int64,
how often each of the M images seen, in the order of ``update``, is drawn in each of R resamples,
it gives what ``compute`` would of those images, with a leading axis ``[R]``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from picnn_fast import checks
from picnn_fast.metrics.ranks import JoinedMetric, gather_rows

# Counts that are drawn at a time: 128 MiB.
_BLOCK = 2**24


def draw_counts(images: int, resamples: int, *, seed: int = 0) -> Iterator[Tensor]:
    """Resamples of images: as many of them, drawn with replacement.

    Args:
        images: M, at least 1.
        resamples: R, at least 1.
        seed: the first of two numbers of resamples are the same with one seed.

    Yields:
        Counts ``[r, M]`` int64, how often each image is drawn in each resample; R in all, in blocks
        of bounded size.

    Example:
        >>> from picnn_fast.metrics.bootstrap import draw_counts
        >>> [counts.sum(1).tolist() for counts in draw_counts(5, 3)]
        [[5, 5, 5]]
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(1, _BLOCK // images)
    for first in range(0, resamples, most):
        rows = min(most, resamples - first)
        drawn = torch.randint(images, (rows, images), generator=generator)
        drawn += images * torch.arange(rows)[:, None]
        yield drawn.view(-1).bincount(minlength=rows * images).view(rows, images)


def check_counts(counts: Tensor, images: int) -> None:
    """Refuse what are no counts of so many images.

    Raises:
        TypeError: no tensor of int64.
        ValueError: of another shape than ``[R, M]``.
    """
    checks.tensor("counts", counts)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got dtype {counts.dtype}, want torch.int64")
    if counts.ndim != 2 or counts.shape[1] != images:
        raise ValueError(
            f"counts: got shape {tuple(counts.shape)}, want [resamples, {images}], the images seen"
        )


def percentile_interval(values: Tensor, level: float = 0.95) -> tuple[float, float] | None:
    """Where the middle ``level`` of the values lies.

    Args:
        values: ``[R]`` of the resamples; NaN where one has no value.
        level: share in (0, 1).

    Returns:
        The least and the greatest; None where fewer than half of the resamples have a value.

    Source:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics.bootstrap import percentile_interval
        >>> percentile_interval(torch.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    if checks.positive("level", level) >= 1:
        raise ValueError(f"level: got {level}, want a share below 1")
    values = values.cpu().double()
    values = values[~values.isnan()] if 2 * values.isnan().sum() <= len(values) else values[:0]
    if len(values) == 0:
        return None
    ends = values.new_tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = values.quantile(ends).tolist()
    return low, high


class PerImageMetric(JoinedMetric):
    """A metric whose states are rows, one an image, in the order of the images.

    A subclass declares each with ``add_rows``, appends a batch of rows in ``update`` with
    ``append`` and reads them with ``rows``. Over ranks they are joined, rank by rank, also with
    those of a rank that has seen no image.

    Args:
        **kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    #: Resamples that ``replicate`` is to be asked for, at most; fewer where each costs much.
    most_resamples: int | None = None
    #: Whether resamples lie to one side of the figure, such as those of a least value among many:
    #: an interval then has their spread about the figure.
    resamples_lie_aside = False
    #: Whether the figure, never below 0, is too great by chance, and a resample by as much more: an
    #: interval is then the basic one, of resamples reflected about the figure, and may lie below it
    #: (Davison, Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2.1).
    resamples_lie_above = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add_rows(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        """Declare a state, the attribute ``name``, of which a row has this shape and dtype."""
        self._shapes[name] = shape, dtype
        self.add_state(name, [], dist_reduce_fx="cat")

    def append(self, **rows: Tensor) -> None:
        """Add rows ``[B, …]`` of a batch to each state, copied onto the metric's device."""
        for name, values in rows.items():
            dtype = self._no_rows(name).dtype
            values = values.detach().to(self.device, dtype, copy=True)
            getattr(self, name).append(values.contiguous())

    def rows(self, name: str) -> Tensor:
        """All rows of a state, ``[M, …]``."""
        state = getattr(self, name)  # a tensor once ranks were joined
        parts = [state] if isinstance(state, Tensor) else state
        return parts[0] if len(parts) == 1 else torch.cat([*parts, self._no_rows(name)])

    @property
    def wide(self) -> torch.dtype:
        """Double precision, or single on MPS, which has no other."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def seen(self) -> int:
        """M, how many images were seen."""
        state = getattr(self, next(iter(self._shapes)))
        return len(state) if isinstance(state, Tensor) else sum(map(len, state))

    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Does nothing: states keep their dtypes."""
        return self

    def check_counts(self, counts: Tensor) -> None:
        """Refuse what are no counts ``[R, M]`` of the images seen, see ``check_counts``."""
        check_counts(counts, self.seen)

    def _no_rows(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        dtype = self.wide if dtype == torch.float64 else dtype
        return torch.empty(0, *shape, dtype=dtype, device=self.device)

    def join(self, to: int | None = None, group: Any = None) -> None:
        for name in self._shapes:
            joined = gather_rows(self.rows(name), to, group)
            if joined is not None:
                setattr(self, name, [joined])


def resampled_means(values: Tensor, counts: Tensor) -> Tensor:
    """Means over the images of each resample.

    Args:
        values: ``[M]``, or ``[M, N]`` of N columns; NaN where an image does not count.
        counts: ``[R, M]`` int64, how often each image is drawn.

    Returns:
        ``[R]`` or ``[R, N]`` float64 (float32 on MPS); NaN where no image counts.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics.bootstrap import resampled_means
        >>> resampled_means(torch.tensor([1.0, 4.0]), torch.tensor([[1, 1], [2, 0]]))
        tensor([2.5000, 1.0000], dtype=torch.float64)
    """
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    values, weights = values.to(dtype), counts.to(values.device, dtype)
    counted = ~values.isnan()
    return (weights @ values.where(counted, 0.0)) / (weights @ counted.to(dtype))


class MeanOverImages(PerImageMetric):
    """The mean over images of a value that each of them has.

    Args:
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import math, torch
        >>> from picnn_fast.metrics import MeanOverImages
        >>> metric = MeanOverImages()
        >>> metric.update(torch.tensor([1.0, 4.0, math.nan]))  # the third does not count
        >>> metric.compute().item()
        2.5
        >>> metric.replicate(torch.tensor([[2, 0, 1]])).tolist()
        [1.0]
    """

    higher_is_better = None  # that hangs on what it is the mean of

    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("values", dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add a batch.

        Args:
            values: ``[B]`` of each image, any floating dtype; NaN where an image does not count.

        Raises:
            TypeError: not a tensor of floating dtype.
            ValueError: of another shape.
        """
        checks.floating("values", values)
        if values.ndim != 1:
            raise ValueError(f"values: got shape {tuple(values.shape)}, want [B], one an image")
        self.append(values=values)

    def compute(self) -> Tensor:
        """A scalar, float64 (float32 on MPS); NaN where no image counts."""
        return self.rows("values").nanmean()

    def replicate(self, counts: Tensor) -> Tensor:
        """The mean of each resample ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return resampled_means(self.rows("values"), counts)
