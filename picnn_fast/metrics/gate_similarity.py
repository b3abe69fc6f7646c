"""Whether what an image activates points the way of its class's row of the gate."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast.metrics.class_means import ClassMeans


class GateSimilarities(NamedTuple):
    """Of images that are classified rightly, and of those that are not.

    Attributes:
        true_positives: S_TP, of the images of a class that are given it.
        false_negatives: S_FN, of the images of a class that are given another.
    """

    true_positives: Tensor
    false_negatives: Tensor


class GateSimilarity(ClassMeans):
    """Cosine between a class's mean feature and each class's row of the gate.

    S ``[K, K]`` holds at (y, c) the cosine between the mean of the pooled maps over the images of
    class y and row c of the gate, or of whatever says which filter stands for which class: S_TP
    over the images of y that are given y, S_FN over those that are given another class. The paper
    finds S_TP diagonally dominant and S_FN far from it. The value is this dominance: the mean, over
    classes, of the cosine to a class's own row less the mean of those to the other rows.

    Args:
        ownership: ``[K, N]`` of any floating dtype: the gate G, or ``model.ownership()``.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: an ownership that is no matrix of two or more classes.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 4.2, "Mechanism of Class-Specific
        Differentiation", figure 6.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import GateSimilarity
        >>> metric = GateSimilarity(torch.eye(2))
        >>> activations = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> logits, labels = torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 1])
        >>> metric.update(activations, logits, labels)
        >>> tuple(round(value.item(), 3) for value in metric.compute())
        (1.0, 0.0)
    """

    higher_is_better = True

    right: list[Tensor]

    def __init__(self, ownership: Tensor, **kwargs: Any) -> None:
        checks.floating("ownership", ownership)
        if ownership.ndim != 2 or len(ownership) < 2 or ownership.shape[1] == 0:
            raise ValueError(
                f"ownership: got shape {tuple(ownership.shape)}, want [classes, filters], at least"
                " two classes"
            )
        super().__init__(*ownership.shape, **kwargs)
        self.add_rows("right", dtype=torch.uint8)
        self._rows = F.normalize(ownership.detach().to("cpu", torch.float64), dim=1)

    def update(  # type: ignore[override]
        self, activations: Tensor, logits: Tensor, labels: Tensor
    ) -> None:
        """Add a batch.

        Args:
            activations: ``[B, N]`` maps averaged over their positions, any floating dtype.
            logits: ``[B, K]`` by which the images are classified.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        classes = len(self._rows)
        checks.tensor("activations", activations)
        checks.floating("logits", logits)
        if tuple(logits.shape) != (len(activations), classes):
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, want {(len(activations), classes)}: the"
                " batch of activations and the classes of ownership"
            )
        super().update(activations, labels)
        self.append(right=logits.argmax(1) == labels)

    def matrices(self) -> GateSimilarities:
        """S_TP and S_FN ``[K, K]``: a row a class of images, a column a row of the gate.

        float64 on the CPU; NaN in the row of a class without such images, 0 beside a mean feature
        or a row of the gate that is 0 throughout.
        """
        return GateSimilarities(*(each[0] for each in self._matrices(None)))

    def compute(self) -> GateSimilarities:
        """Scalars in [-2, 2], float64 on the CPU; NaN where no class has such images."""
        return GateSimilarities(*(_dominance(each)[0] for each in self._matrices(None)))

    def replicate(self, counts: Tensor) -> GateSimilarities:
        """The values of each resample, ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        return GateSimilarities(*map(_dominance, self._matrices(counts)))

    def _matrices(self, counts: Tensor | None) -> list[Tensor]:
        """Of both kinds of images, ``[R, K, K]``."""
        right = self.rows("right").bool()
        means = [self.means(counts, kind) for kind in (right, ~right)]
        return [F.normalize(each, dim=-1) @ self._rows.T for each in means]


def _dominance(similarities: Tensor) -> Tensor:
    """Of matrices ``[R, K, K]``: their diagonal less the mean of the rest of its row, ``[R]``."""
    own = similarities.diagonal(dim1=1, dim2=2)
    others = (similarities.sum(2) - own) / (similarities.shape[2] - 1)
    return (own - others).nanmean(1)
