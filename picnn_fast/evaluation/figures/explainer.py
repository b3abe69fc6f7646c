"""What an explainer is worth beside the network that it explains."""

from typing import Any

from picnn_fast._extras import extra
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import MeanOverImages
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from torchmetrics import MeanMetric


def _needs_performer(network: InterpretableNetwork, data: object) -> str | None:
    return "no performer" if network.performer() is None else None


def _share(metric: Any, seen: Observation) -> None:
    """Of the network alone: one batch is enough."""
    if not metric.update_called:
        metric.update(seen.network.logged()["p"])


def _more_errors(metric: Any, seen: Observation) -> None:
    """1 where the performer alone is right, -1 where it alone is wrong, else 0."""
    right = [
        (logits.argmax(1) == seen.labels).float() for logits in (seen.performed.logits, seen.logits)
    ]
    metric.update(right[0] - right[1])


FIGURES: dict[str, Figure] = {
    "p": Figure(
        heading="p",
        meaning="share of an explainer's interpretable track",
        better="higher",
        reading=(
            "Higher is better: 0.5 is where training starts, and of a plain network, which has no"
            " such track, or of chance there is none."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=_share,
        needs=_needs_performer,
    ),
    "more_errors": Figure(
        heading="Δ error",
        meaning="share of images that are wrong by the reconstruction, less the performer's",
        better="lower",
        reading=(
            "Lower is better: 0 is the plain network that is explained, and chance would add to"
            " it up to 1 - 1 / classes."
        ),
        metric=lambda network, data, draws: MeanOverImages(),
        update=_more_errors,
        needs=_needs_performer,
    ),
}
