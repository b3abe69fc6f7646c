"""What filters do for the images of a class: their mean activations, kept so as to resample."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric


class ClassMeans(PerImageMetric):
    """Mean activation of each filter over the images of each class: a base for metrics of it.

    All activations are kept in single precision, 4 · N bytes an image, so that images can be drawn
    again.

    Args:
        num_classes: K.
        num_filters: N.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: numbers that are no integers, or out of range.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import ClassMeans
        >>> seen = ClassMeans(num_classes=2, num_filters=1)
        >>> seen.update(torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([0, 1, 1]))
        >>> seen.compute().tolist()
        [[1.0], [4.0]]
    """

    higher_is_better: bool | None = None

    activations: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, num_filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        self.add_rows("activations", num_filters, dtype=torch.float32)
        self.add_rows("labels", dtype=torch.int64)

    def update(self, activations: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            activations: ``[B, N]`` maps averaged over their positions, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.pooled("activations", activations)
        if activations.shape[1] != self.num_filters:
            raise ValueError(
                f"activations: got {activations.shape[1]} filters, want {self.num_filters}"
            )
        checks.labels("labels", labels, len(activations), self.num_classes)
        self.append(activations=activations, labels=labels)

    def compute(self) -> Any:
        """``[K, N]``, float64 on the CPU; NaN of a class without images."""
        return self.means(None)[0]

    def means(self, counts: Tensor | None, counted: Tensor | None = None) -> Tensor:
        """Of resamples of the images, or of the images seen.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn; None: each once, R = 1.
            counted: ``[M]`` bool, the images that count; None: all.

        Returns:
            ``[R, K, N]`` float64 on the CPU; NaN of a class without images.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        labels, activations = self.rows("labels").cpu(), self.rows("activations").cpu()
        weights = torch.ones(1, len(labels))
        if counts is not None:
            self.check_counts(counts)
            weights = counts.cpu()
        means = torch.empty(len(weights), self.num_classes, self.num_filters, dtype=torch.float64)
        for c in range(self.num_classes):
            members = labels == c if counted is None else (labels == c) & counted.cpu()
            weight = weights[:, members].double()
            means[:, c] = weight @ activations[members].double() / weight.sum(1, keepdim=True)
        return means
