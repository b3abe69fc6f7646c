"""How alike filters are: cosines between their weights, redundancy, correlation between classes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast.metrics.class_means import ClassMeans


def filter_cosines(weights: Tensor) -> Tensor:
    """Cosine between the weights of every two filters.

    Args:
        weights: ``[N, …]`` of each filter, any floating dtype, as ``models.filter_weights`` gives.

    Returns:
        ``[N, N]`` in [-1, 1], float64 on the CPU; 0 beside a filter whose weights are all 0.

    Raises:
        TypeError: weights that are no floating tensor.
        ValueError: weights of fewer than two axes.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 4.3, "Filter Orthogonality Analysis".

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import filter_cosines
        >>> filter_cosines(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    checks.floating("weights", weights)
    if weights.ndim < 2:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, want [filters, …]")
    rows = F.normalize(weights.detach().flatten(1).to("cpu", torch.float64), dim=1)
    return (rows @ rows.T).clamp(-1, 1) + 0.0  # + 0.0: no -0.0


def filter_redundancy(cosines: Tensor, threshold: float = 0.1) -> Tensor:
    """r_s: the share of pairs of different filters whose cosine is at least ``threshold``.

    Args:
        cosines: ``[N, N]``, of ``filter_cosines``.
        threshold: s, in [-1, 1].

    Returns:
        A scalar in [0, 1], float64 on the CPU; NaN of a single filter.

    Raises:
        TypeError, ValueError: cosines that are no square matrix; a threshold out of range.

    Source:
        Liang et al., ECCV 2020, section 4.3, "Filter Redundancy", figures 7 and 8. The paper does
        not say whether the diagonal counts; here it does not, for it is 1 of any filter.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import filter_cosines, filter_redundancy
        >>> weights = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
        >>> round(filter_redundancy(filter_cosines(weights)).item(), 3)
        0.333
    """
    _check_cosines(cosines)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"threshold: got {type(threshold).__name__}, want a number")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, want a cosine, in [-1, 1]")
    others = cosines.new_ones(cosines.shape, dtype=torch.bool).fill_diagonal_(False)
    return (cosines >= threshold)[others].double().mean().cpu()


class InterClassCorrelation(ClassMeans):
    """C_IC: the mean cosine between filters that different classes activate most.

    The group A_c of a class is the ``filters_per_class`` filters with the greatest mean activation
    over its images. The mean goes over ordered pairs of different classes and, for each, over all
    pairs of a filter of one group and a filter of the other; a filter in both groups counts with
    its cosine of 1. The lower, the less alike what different classes activate. Classes without
    images do not count.

    Args:
        cosines: ``[N, N]`` of the filters, of ``filter_cosines``.
        num_classes: K.
        filters_per_class: m1; None takes N / K rounded down, at least 1, as in the paper's networks
            (25 of 256 and 6 of 64 filters for 10 classes).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Source:
        Liang et al., ECCV 2020, section 4.3, "Highly Class-Related Representation"; its m is m1.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import InterClassCorrelation, filter_cosines
        >>> cosines = filter_cosines(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> metric = InterClassCorrelation(cosines, num_classes=2)
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        >>> round(metric.compute().item(), 3)
        0.707
    """

    higher_is_better = False

    def __init__(
        self,
        cosines: Tensor,
        num_classes: int,
        filters_per_class: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check_cosines(cosines)
        super().__init__(num_classes, len(cosines), **kwargs)
        if filters_per_class is None:
            filters_per_class = max(1, len(cosines) // num_classes)
        self.filters_per_class = checks.integer(
            "filters_per_class", filters_per_class, 1, len(cosines) + 1
        )
        self._cosines = cosines.detach().to("cpu", torch.float64)

    def compute(self) -> Tensor:
        """A scalar in [-1, 1], float64 on the CPU; NaN of images of fewer than two classes."""
        return self._values(None)[0]

    def replicate(self, counts: Tensor) -> Tensor:
        """The value of each resample ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        return self._values(counts)

    def _values(self, counts: Tensor | None) -> Tensor:
        means = self.means(counts)
        shown = ~means.isnan().any(-1)  # [R, K]
        groups = means.argsort(dim=-1, descending=True, stable=True)[..., : self.filters_per_class]
        members = torch.zeros_like(means).scatter_(-1, groups, 1.0) * shown[..., None]
        # Over all pairs of classes, less those of a class with itself.
        total = members.sum(1)
        pairs = torch.einsum("rn,nm,rm->r", total, self._cosines, total)
        pairs -= torch.einsum("rkn,nm,rkm->r", members, self._cosines, members)
        classes = shown.sum(1)
        return pairs / (classes * (classes - 1) * self.filters_per_class**2)


def _check_cosines(cosines: Tensor) -> None:
    checks.floating("cosines", cosines)
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or not len(cosines):
        raise ValueError(
            f"cosines: got shape {tuple(cosines.shape)}, want [filters, filters], of filter_cosines"
        )
