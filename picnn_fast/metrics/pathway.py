"""Accuracy of a pathway whose filters are drawn: its mean over draws and their standard error."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means


class MeanOverDraws(NamedTuple):
    """A figure that rests on random draws.

    Attributes:
        mean: over the draws.
        standard_error: of that mean, by the spread of the draws; NaN for a single one.
    """

    mean: Tensor
    standard_error: Tensor

    @classmethod
    def of(cls, each: Tensor) -> Self:
        """Of the figure of each draw, ``[S]``."""
        mean = each.mean()
        variance = (each - mean).square().sum() / (len(each) - 1)  # of one draw 0 / 0
        return cls(mean, (variance / len(each)).sqrt())


class PathwayAccuracy(PerImageMetric):
    """Accuracy by some of the filters (PICNN, "Experimental Settings"), as masks are drawn anew.

    ACC1 is that of all filters, a single draw; ACC2 that of the mask drawn for the pseudo-label;
    ACC3 that of the complement of a mask drawn for the true label, ``1 -
    model.class_mask(labels)``: the lower, the more a class depends on its own filters.

    Args:
        num_classes: K.
        draws: S, masks drawn for each image; S bytes are kept of each.
        **kwargs: of ``torchmetrics.Metric``.

    Source:
        Guo et al., "PICNN", AAAI 2024, section "Experimental Settings".

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import PathwayAccuracy
        >>> metric = PathwayAccuracy(num_classes=2, draws=2)
        >>> right = torch.eye(2)
        >>> metric.update(torch.stack([right, 1 - right]), torch.tensor([0, 1]))
        >>> mean, standard_error = metric.compute()
        >>> round(mean.item(), 2), round(standard_error.item(), 2)
        (0.5, 0.5)
    """

    higher_is_better = None  # ACC3 is better low

    right: list[Tensor]

    def __init__(self, num_classes: int, draws: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.draws = checks.integer("draws", draws, 1)
        self.add_rows("right", draws, dtype=torch.uint8)  # Gloo gathers no bool

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``[S, B, K]`` of each draw; ``[B, K]`` where there is one. Any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.tensor("labels", labels)
        checks.labels("labels", labels, labels.numel(), self.num_classes)
        checks.floating("logits", logits)
        wanted = (self.draws, len(labels), self.num_classes)
        if tuple(logits.shape) != wanted and (self.draws, *logits.shape) != (1, *wanted[1:]):
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, want {wanted}: draws, the batch of"
                " labels and num_classes"
            )
        self.append(right=(logits.reshape(wanted).argmax(-1) == labels).T)

    def compute(self) -> MeanOverDraws:
        """Scalars; a mean in [0, 1], NaN before the first sample."""
        right = self.rows("right")
        # Counted in whole numbers: batches of any size give the same.
        return MeanOverDraws.of(right.sum(0).to(self.wide) / len(right))

    def replicate(self, counts: Tensor) -> Tensor:
        """The mean over draws of each resample ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return resampled_means(self.rows("right").sum(1) / self.draws, counts)
