"""What filters do for the images of a class: their mean activations, kept so as to resample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from picnn_fast.ops import checks


class ClassMeans(Metric):
    """Mean activation of each filter over the images of each class: a base for metrics of it.

    All activations are kept in single precision, 4 · N bytes an image, so that images can be drawn
    again (``replicate`` of the metrics made of it).

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

    is_differentiable = False
    full_state_update = False

    pooled: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, num_filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        for name in ("pooled", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, pooled: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            pooled: ``[B, N]`` maps averaged over their positions, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.pooled("pooled", pooled)
        if pooled.shape[1] != self.num_filters:
            raise ValueError(f"pooled: got {pooled.shape[1]} filters, want {self.num_filters}")
        checks.labels("labels", labels, len(pooled), self.num_classes)
        # Copies: the caller may write into both before they are read again.
        self.pooled.append(pooled.detach().to(self.device, torch.float32, copy=True))
        self.labels.append(labels.to(self.device, torch.int64, copy=True))

    def compute(self) -> Any:
        """``[K, N]`` of the images seen so far, float64 on the CPU; NaN of a class without."""
        return self.class_means()[0]

    def class_means(self, counts: Tensor | None = None) -> Tensor:
        """Of the images seen so far, or of resamples of them.

        Args:
            counts: ``[R, M]`` integers: how often each resample holds each image, in order; None:
                each once, R = 1.

        Returns:
            ``[R, K, N]`` float64 on the CPU; NaN for a class without images.
        """
        labels = dim_zero_cat([*self._nothing()["labels"], *_batches(self.labels)]).cpu()
        pooled = dim_zero_cat([*self._nothing()["pooled"], *_batches(self.pooled)]).cpu()
        weights = torch.ones(1, len(labels)) if counts is None else counts.cpu()
        means = torch.empty(len(weights), self.num_classes, self.num_filters, dtype=torch.float64)
        for c in range(self.num_classes):
            members = labels == c
            weight = weights[:, members].double()
            means[:, c] = weight @ pooled[members].double() / weight.sum(1, keepdim=True)
        return means

    def _nothing(self) -> dict[str, list[Tensor]]:
        """The states of no image."""
        return {
            "pooled": [torch.empty(0, self.num_filters, device=self.device)],
            "labels": [torch.empty(0, dtype=torch.int64, device=self.device)],
        }

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., Any] = gather_all_tensors,
        process_group: Any = None,
    ) -> None:
        # Ranks gather tensors of one shape and dtype, also from one without images.
        if not self.labels:
            for name, state in self._nothing().items():
                setattr(self, name, state)
        super()._sync_dist(dist_sync_fn, process_group)


def _batches(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Tensors of a state that is a list, or was joined over ranks."""
    return [state] if isinstance(state, Tensor) else state
