"""Calibration: how far the confidence of a classifier is from how often it is right."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric


class CalibrationError(PerImageMetric):
    """Expected calibration error: the gap between confidence and accuracy, over bins of confidence.

    An image's confidence is the greatest probability of its softmax. Bins are of one width and
    hold their upper edges; the mean over bins of |accuracy - mean confidence| is weighted by how
    many images they hold. Of few images it is too high by chance, and a resample's by as much more:
    an evaluation's interval takes that off.

    Args:
        num_classes: K.
        bins: M, of equal width in [0, 1].
        **kwargs: of ``torchmetrics.Metric``.

    Source:
        Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
        eq. 2 to 5, with 15 bins as in its tables. ``torchmetrics.classification`` has the same
        value as ``MulticlassCalibrationError``, but for confidences on an edge of bins.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import CalibrationError
        >>> metric = CalibrationError(num_classes=2)
        >>> probabilities = torch.tensor([[0.75, 0.25]])
        >>> metric.update(probabilities.log().expand(4, 2), torch.tensor([0, 0, 1, 1]))
        >>> round(metric.compute().item(), 4)
        0.25
    """

    higher_is_better = False
    resamples_lie_above = True

    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, num_classes: int, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.bins = checks.integer("bins", bins, 1)
        self.add_rows("confidence", dtype=torch.float32)
        self.add_rows("correct", dtype=torch.bool)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``[B, K]``, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.tensor("labels", labels)
        checks.labels("labels", labels, labels.numel(), self.num_classes)
        checks.floating("logits", logits)
        if tuple(logits.shape) != (len(labels), self.num_classes):
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, want"
                f" {(len(labels), self.num_classes)}: the batch of labels and num_classes"
            )
        confidence, predicted = checks.accumulable(logits).softmax(1).max(1)
        self.append(confidence=confidence, correct=predicted == labels)

    def compute(self) -> Tensor:
        """A scalar in [0, 1], float64 (float32 on MPS); NaN before the first image."""
        gaps = self._gaps()
        return gaps.sum(0).abs().sum() / len(gaps)

    def replicate(self, counts: Tensor) -> Tensor:
        """The error of each resample ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        gaps = self._gaps()
        weights = counts.to(gaps)
        return (weights @ gaps).abs().sum(1) / weights.sum(1)

    def _gaps(self) -> Tensor:
        """How far each image's correctness is above its confidence, in its bin's column."""
        confidence = self.rows("confidence").to(self.wide)
        gap = self.rows("correct").to(self.wide) - confidence
        edges = torch.linspace(0, 1, self.bins + 1, dtype=self.wide, device=gap.device)
        # A float32 confidence that is meant to be an edge is one, whatever its last digit.
        edges = edges.float().to(self.wide)
        of_bin = torch.bucketize(confidence, edges[1:-1])
        return gap.new_zeros(len(gap), self.bins).scatter_(1, of_bin[:, None], gap[:, None])
