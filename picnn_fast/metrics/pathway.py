"""ACC1, ACC2, ACC3: accuracy by all filters, by a class's own and by all the others."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from picnn_fast.ops import checks


class PathwayAccuracy(Metric):
    """Accuracies of the discrimination pathway and of the masked ones (PICNN, "Evaluation Metric").

    - acc1: the discrimination pathway, every filter;
    - acc2: the mask drawn for the pseudo-label (``PICNNOutput.masked_logits``);
    - acc3: the complement of a mask drawn for the true label, ``1 - model.class_mask(labels)``.
      The lower, the more a class depends on its own filters.

    Args:
        num_classes: K.
        **kwargs: of ``torchmetrics.Metric``.

    Source:
        Guo et al., "PICNN", AAAI 2024, section "Experimental Settings".

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import PathwayAccuracy
        >>> metric = PathwayAccuracy(num_classes=2)
        >>> labels = torch.tensor([0, 1])
        >>> right, wrong = torch.eye(2), 1 - torch.eye(2)
        >>> metric.update(right, right, wrong, labels)
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'acc1': 1.0, 'acc2': 1.0, 'acc3': 0.0}
    """

    is_differentiable = False
    higher_is_better = None  # acc3 is better low
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.add_state("correct", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, masked_logits: Tensor, complement_logits: Tensor, labels: Tensor
    ) -> None:
        """Add a batch.

        Args:
            logits, masked_logits, complement_logits: ``[B, K]`` by all filters, by those drawn for
                the pseudo-label, by all but those drawn for the true label; any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.tensor("labels", labels)
        checks.labels("labels", labels, labels.numel(), self.num_classes)
        wanted = (len(labels), self.num_classes)
        given = {
            "logits": logits,
            "masked_logits": masked_logits,
            "complement_logits": complement_logits,
        }
        for name, value in given.items():
            checks.floating(name, value)
            if tuple(value.shape) != wanted:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, want {wanted}:"
                    " the batch of labels and num_classes"
                )
        correct = [(value.argmax(-1) == labels).sum() for value in given.values()]
        self.correct += torch.stack(correct).to(self.correct.device)
        self.total += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """``{"acc1", "acc2", "acc3"}``, scalars in [0, 1]; NaN before the first sample."""
        acc1, acc2, acc3 = (self.correct / self.total).unbind()
        return {"acc1": acc1, "acc2": acc2, "acc3": acc3}
