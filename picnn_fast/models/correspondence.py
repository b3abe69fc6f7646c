"""The filter-class correspondence matrix of PICNN: its probabilities and optimiser group."""

from typing import Any

import torch
from torch import Tensor, nn

from picnn_fast import checks

NORMALIZATIONS = ("class_softmax", "sigmoid")
INITIAL = ("uniform", "published")


class Correspondence(nn.Module):
    """P ``[K, N]``, the probability that filter i belongs to class k, from a free matrix W.

    Args:
        num_classes, num_filters: K and N.
        normalization: "class_softmax": P = softmax of W over the classes, each filter's column
            sums to 1; "sigmoid": P = sigmoid(W), independent probabilities.
        initial: "uniform": W uniform in [0, 1); "published": the softmax over classes of such
            numbers, as in the authors' code, which makes P flatter: [.095, .109] for ten classes.
        trained: W is a parameter; else a buffer, random as at the start.

    Attributes:
        weight: W ``[K, N]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Source:
        Guo et al., "PICNN", AAAI 2024, section "Filter-Class Correspondence Matrix".

    Example:
        >>> from picnn_fast.models.correspondence import Correspondence
        >>> Correspondence(4, 20)().sum(0).allclose(torch.ones(20))
        True
    """

    weight: Tensor

    def __init__(
        self,
        num_classes: int,
        num_filters: int,
        *,
        normalization: str = "class_softmax",
        initial: str = "uniform",
        trained: bool = True,
    ) -> None:
        super().__init__()
        checks.integer("num_classes", num_classes, 1)
        checks.integer("num_filters", num_filters, 1)
        self.normalization = checks.one_of("normalization", normalization, NORMALIZATIONS)
        self.initial = checks.one_of("initial", initial, INITIAL)
        weight = torch.rand(num_classes, num_filters)
        if initial == "published":
            weight = weight.softmax(0)
        if checks.boolean("trained", trained):
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        """P ``[K, N]``, float32 or wider."""
        weight = checks.accumulable(self.weight)
        return weight.softmax(0) if self.normalization == "class_softmax" else weight.sigmoid()

    def parameter_groups(
        self, rest: list[dict[str, Any]], lr: float | None, weight_decay: float | None
    ) -> list[dict[str, Any]]:
        """Optimiser groups with W taken out of ``rest`` and put apart, named "correspondence".

        Args:
            rest: groups of the whole network, the first with the network's ``lr``.
            lr: of W; None follows the network's.
            weight_decay: of W; None follows the optimiser's.
        """
        if not isinstance(self.weight, nn.Parameter):
            return rest
        for group in rest:
            group["params"] = [p for p in group["params"] if p is not self.weight]
        rate = rest[0]["lr"] if lr is None else lr
        own: dict[str, Any] = {"params": [self.weight], "lr": rate, "name": "correspondence"}
        if weight_decay is not None:
            own["weight_decay"] = weight_decay
        return [*rest, own]

    def extra_repr(self) -> str:
        return f"normalization={self.normalization!r}, initial={self.initial!r}"
