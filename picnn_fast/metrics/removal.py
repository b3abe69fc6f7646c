"""What a network still classifies without the filters of a class."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means
from picnn_fast.metrics.class_means import ClassMeans
from picnn_fast.metrics.ranks import agreeing, gather_objects, world

# Of more classes, so many are removed, spread evenly.
MOST_CLASSES = 20


def owned_filters(ownership: Tensor, classes: Sequence[int], threshold: float = 0.5) -> Tensor:
    """The filters that stand for any of the classes: those whose share exceeds the threshold.

    Args:
        ownership: ``[K, N]`` in [0, 1]: the gate G, or ``model.ownership()``.
        classes: indices in [0, K).
        threshold: in [0, 1).

    Returns:
        ``[N]`` bool, on the device of ``ownership``.

    Raises:
        TypeError, ValueError: an ownership that is no matrix, classes out of range.

    Source:
        Liang et al., ECCV 2020, section 4.2, "Indispensability for Related Class".

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import owned_filters
        >>> owned_filters(torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, 0.9]]), [1])
        tensor([False,  True,  True])
    """
    _check_matrix("ownership", ownership)
    return (ownership[_indices(classes, len(ownership))] > threshold).any(0)


def most_active_filters(means: Tensor, classes: Sequence[int], share: float = 0.1) -> Tensor:
    """The share of filters that images of the classes activate most, of the mean over classes.

    Args:
        means: ``[K, N]`` mean activation of each filter over the images of each class; NaN for a
            class without, which does not count.
        classes: indices in [0, K).
        share: of the filters, in (0, 1]; rounded, at least one filter.

    Returns:
        ``[N]`` bool, on the device of ``means``.

    Raises:
        TypeError, ValueError: means that are no matrix, classes or a share out of range.

    Source:
        Liang et al., ECCV 2020, section 4.2, of the ordinary network; its share is a tenth.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import most_active_filters
        >>> most_active_filters(torch.tensor([[3.0, 1.0, 2.0], [0.0, 9.0, 9.0]]), [0])
        tensor([ True, False, False])
    """
    _check_matrix("means", means)
    if checks.positive("share", share) > 1:
        raise ValueError(f"share: got {share}, want a number above 0 and at most 1")
    count = max(1, round(share * means.shape[1]))
    order = means[_indices(classes, len(means))].nanmean(0).argsort(descending=True, stable=True)
    chosen = torch.zeros(means.shape[1], dtype=torch.bool, device=means.device)
    chosen[order[:count]] = True
    return chosen


class RemovalAccuracies(NamedTuple):
    """Accuracies without the filters of one class, mean over the classes removed in turn.

    Attributes:
        removed: of the images of that class.
        others: of the images of all other classes.
    """

    removed: Tensor
    others: Tensor


class FilterRemoval(PerImageMetric):
    """Accuracy without the filters of a class, on its images and on those of the others.

    Filters are removed class by class. Those of a class are the ones ``owned_filters`` gives or,
    without ``ownership``, as with an ordinary network, the tenth of ``most_active_filters``, for
    which ``prepare`` has to see the images first. Where filters are a class's own and nothing else
    stands for it, the class is no longer recognised, and the others are as they were.

    Args:
        num_classes: K.
        num_filters: N.
        ownership: ``[K, N]`` in [0, 1], or None.
        classes: that are removed, one at a time; None takes all, or 20 spread evenly over more.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 4.2, "Indispensability for Related Class",
        figure 5, whose confusion matrices ``evaluation.confusion_without`` gives.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import FilterRemoval
        >>> metric = FilterRemoval(2, 2, ownership=torch.eye(2))
        >>> maps, labels = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
        >>> metric.update(maps, labels, lambda maps, mask: maps * mask + torch.tensor([0.0, 0.5]))
        >>> tuple(value.item() for value in metric.compute())
        (0.0, 1.0)
    """

    higher_is_better = None  # of the one accuracy lower is better, of the other higher

    right: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        num_filters: int,
        *,
        ownership: Tensor | None = None,
        classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        if ownership is not None:
            _check_matrix("ownership", ownership)
            if tuple(ownership.shape) != (num_classes, num_filters):
                raise ValueError(
                    f"ownership: got shape {tuple(ownership.shape)}, want"
                    f" {(num_classes, num_filters)}: classes and filters"
                )
        if classes is None:
            every = torch.linspace(0, num_classes - 1, min(num_classes, MOST_CLASSES))
            classes = every.round().int().tolist()
        self.classes = _indices(classes, num_classes)
        self._ownership = ownership
        self._seen = ClassMeans(num_classes, num_filters, sync_on_compute=False)
        self._removed: Tensor | None = None
        self.add_rows("right", len(self.classes), dtype=torch.uint8)
        self.add_rows("labels", dtype=torch.int64)

    def reset(self) -> None:
        super().reset()
        self._seen.reset()
        self._removed = None

    def prepare(self, activations: Tensor, labels: Tensor) -> None:
        """Show a batch of images before the first ``update``, where there is no ownership.

        Each of several processes removes the filters that its own images activate most, unless all
        call ``join_prepared`` before the first ``update``.

        Args:
            activations: ``[B, N]`` maps averaged over their positions, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        self._seen.update(activations, labels)
        self._removed = None

    def join_prepared(self, group: Any = None) -> None:
        """Remove the filters that the images of all ranks activate most; all ranks call it.

        Args:
            group: of ``torch.distributed``; None: of all processes.
        """
        if self._ownership is not None:
            return
        self._seen.join(0, group)  # activations lie on one rank alone, 4 · N bytes an image
        self._removed = None
        with agreeing(group):
            removed = self.removed() if world(group)[0] == 0 else None
        self._removed = gather_objects(removed, group)[0]

    def removed(self) -> Tensor:
        """``[S, N]`` bool on the CPU: which filters are removed for each of ``classes``.

        Raises:
            ValueError: neither ownership nor an image that ``prepare`` saw.
        """
        if self._removed is None:
            if self._ownership is not None:
                each = [owned_filters(self._ownership, [c]) for c in self.classes]
            elif self._seen.seen == 0:
                raise ValueError("prepare: got no image, want all of them before the first update")
            else:
                means = self._seen.compute()
                each = [most_active_filters(means, [c]) for c in self.classes]
            self._removed = torch.stack(each).cpu()
        return self._removed

    def update(
        self, maps: Tensor, labels: Tensor, classify: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Add a batch.

        Args:
            maps: ``[B, …]`` of each image.
            labels: ``[B]`` integers in [0, K).
            classify: maps and a mask ``[B, N]`` to logits ``[B, K]``.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range; see ``removed``.
        """
        checks.floating("maps", maps)
        checks.labels("labels", labels, len(maps), self.num_classes)
        kept = (~self.removed()).to(maps.device, maps.dtype)
        predicted = [classify(maps, mask.repeat(len(maps), 1)).argmax(1) for mask in kept]
        self.append(right=torch.stack(predicted, 1) == labels[:, None], labels=labels)

    def compute(self) -> RemovalAccuracies:
        """Scalars in [0, 1], float64; NaN where no image is of such a class."""
        return RemovalAccuracies(*(each[0] for each in self._values(None)))

    def replicate(self, counts: Tensor) -> RemovalAccuracies:
        """The values of each resample, ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return self._values(counts)

    def _values(self, counts: Tensor | None) -> RemovalAccuracies:
        right, labels = self.rows("right").to(self.wide), self.rows("labels")
        own = labels[:, None] == torch.tensor(self.classes, device=labels.device)
        if counts is None:
            counts = torch.ones(1, len(labels), dtype=torch.int64)
        each = [resampled_means(right.where(kind, torch.nan), counts) for kind in (own, ~own)]
        return RemovalAccuracies(*(values.nanmean(1) for values in each))


def _indices(classes: Sequence[int], num_classes: int) -> list[int]:
    if isinstance(classes, str | Tensor) or not isinstance(classes, Sequence):
        raise TypeError(f"classes: got {type(classes).__name__}, want a list of class indices")
    if not classes:
        raise ValueError("classes: got none, want class indices")
    return [checks.integer("classes", c, 0, num_classes) for c in classes]


def _check_matrix(name: str, value: Tensor) -> None:
    checks.floating(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want [classes, filters]")
