"""Accuracy through all filters, through those of a class and without them, and what masks leak."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import MaskLeakage, PathwayAccuracy
from picnn_fast.models.base import InterpretableNetwork

# Above it the pattern of a mask names the class, and a run says so.
MOST_LEAKAGE = 0.9


def _needs_ownership(network: InterpretableNetwork, data: object) -> str | None:
    if not network.draws_masks:
        return f"{type(network).__name__} draws no masks of filters"
    if network.ownership() is None:
        return f"{type(network).__name__} gives no filter to a class"
    return None


def _remark_on_leakage(value: float) -> str | None:
    if value <= MOST_LEAKAGE:
        return None
    return (
        f"mask leakage is {value:.2f}: a mask drawn for a class gives that class with the maps of"
        " other images too, so that ACC2 says little of the maps"
    )


def _leakage(
    heading: str, meaning: str, reading: str, masks: Callable[[Observation], Tensor], **more: Any
) -> Figure:
    """Of the masks that ``masks`` takes from an observation."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="lower",
        reading=reading,
        metric=lambda network, data, draws: MaskLeakage(network.num_classes, draws),
        update=lambda metric, seen: metric.update(
            seen.maps, seen.labels, masks(seen), seen.network.head_logits
        ),
        needs=_needs_ownership,
        **more,
    )


FIGURES: dict[str, Figure] = {
    "acc1": Figure(
        heading="ACC1",
        meaning="accuracy by all filters",
        better="higher",
        reading=(
            "Higher is better: from chance, 1 / classes, to what a plain network reaches on the"
            " same images."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes),
        update=lambda metric, seen: metric.update(seen.logits, seen.labels),
        when="epoch",
    ),
    "acc2": Figure(
        heading="ACC2",
        meaning="by those drawn for the pseudo-label",
        better="higher",
        reading=(
            "Higher is better: chance is 1 / classes, ACC1 as much as there is to reach, and a"
            " plain network, whose filters are dealt out at random, lies between them."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes, draws),
        update=lambda metric, seen: metric.update(seen.masked_logits, seen.labels),
        needs=_needs_ownership,
        when="epoch",
    ),
    "acc3": Figure(
        heading="ACC3",
        meaning="without those of the true class",
        better="lower",
        reading=(
            "Lower is better: chance is 1 / classes, and a plain network, which misses a few"
            " random filters alone, stays near its ACC1."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes, draws),
        update=lambda metric, seen: metric.update(seen.complement_logits, seen.labels),
        needs=_needs_ownership,
        when="epoch",
    ),
    "leakage": _leakage(
        "leakage",
        "accuracy by the label's filters with the maps of another image, 1 / classes at best",
        "Lower is better: a mask that tells nothing by itself gives chance, 1 / classes, as a"
        " plain network's random ones nearly do, and one that names its class gives 1.",
        lambda seen: seen.label_masks,
        remark=_remark_on_leakage,
    ),
    "pseudo_label_leakage": _leakage(
        "… pseudo",
        "the same with the filters of ACC2, drawn for the pseudo-label",
        "Lower is better: chance and a plain network are as of leakage, and a mask that names"
        " its class gives ACC1.",
        lambda seen: seen.pseudo_label_masks,
    ),
}
