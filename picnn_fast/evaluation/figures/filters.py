"""Filters beside each other, and beside the classes they are given to."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import (
    GateSimilarity,
    InterClassCorrelation,
    filter_cosines,
    filter_redundancy,
)
from picnn_fast.models import filter_weights
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.csg import CSG

with extra("train"):
    from torchmetrics import MeanMetric, Metric

# s of r_s, of the paper's figure 7.
CORRELATED = 0.1


def _needs_gate(network: InterpretableNetwork, data: object) -> str | None:
    return None if isinstance(network, CSG) else f"{type(network).__name__} has no gate"


def _update_density(metric: Metric, seen: Observation) -> None:
    """Of the gate alone: one batch is enough."""
    assert isinstance(seen.network, CSG)
    if not metric.update_called:
        metric.update(seen.network.density())


def _weights(network: InterpretableNetwork, data: SeededDataModule) -> Tensor:
    """Of the filters, found by an image of zeros."""
    image: Tensor = data.test_set[0][0]
    return filter_weights(network, torch.zeros_like(image[None], device=_device(network)))


def _device(network: InterpretableNetwork) -> torch.device:
    return next((x.device for x in network.parameters()), torch.device("cpu"))


def _needs_weights(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    if len(data.test_set) == 0:  # type: ignore[arg-type]
        return "the test split has no image"
    try:
        _weights(network, data)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return None


def _update_redundancy(metric: Any, seen: Observation) -> None:
    """Of the weights alone: one batch is enough."""
    if not metric.update_called:
        weights = filter_weights(seen.network, seen.images[:1])
        metric.update(filter_redundancy(filter_cosines(weights), CORRELATED))


def _inter_class_correlation(
    network: InterpretableNetwork, data: SeededDataModule, draws: int
) -> Metric:
    cosines = filter_cosines(_weights(network, data))
    fixed = network.fixed if isinstance(network, CSG) else None
    return InterClassCorrelation(cosines, network.num_classes, fixed and fixed[0])


def _needs_classes_of_filters(network: InterpretableNetwork, data: object) -> str | None:
    if network.num_classes < 2:
        return "there is a single class"
    if network.ownership() is None:
        return f"{type(network).__name__} gives no filter to a class"
    return None


def _gate_similarity(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    ownership = network.ownership()
    assert ownership is not None
    return GateSimilarity(ownership)


def _update_similarity(metric: Any, seen: Observation) -> None:
    metric.update(seen.pooled, seen.logits, seen.labels)


FIGURES: dict[str, Figure] = {
    "density": Figure(
        heading="L1-density",
        meaning="of the gate: the share of its elements that it sums to",
        better="lower",
        reading=(
            "Lower is better: 1 where every filter serves every class, as in a plain network, and"
            " 1 / classes, where each serves one, is the least; there is no chance in it."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=_update_density,
        needs=_needs_gate,
    ),
    "filter_redundancy": Figure(
        heading="r_0.1",
        meaning="share of pairs of filters whose weights have a cosine of 0.1 or more",
        better="lower",
        reading=(
            "Lower is better: filters alike in nothing give 0, those with a few hundred weights"
            " drawn at random, chance, a few hundredths at most, and a plain network more."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=_update_redundancy,
        needs=_needs_weights,
    ),
    "inter_class_correlation": Figure(
        heading="C_IC",
        meaning="mean cosine between the weights of filters that different classes activate most",
        better="lower",
        reading=(
            "Lower is better: filters with weights drawn at random give about 0, chance, unless"
            " classes share those that they activate most, as in a plain network, about twice as"
            " much in the paper as with CSG."
        ),
        metric=_inter_class_correlation,
        update=lambda metric, seen: metric.update(seen.pooled, seen.labels),
        needs=_needs_weights,
    ),
    "s_tp": Figure(
        heading="S_TP",
        meaning="cosine of a class's mean feature and its own filters, less others', if right",
        better="higher",
        reading=(
            "Higher is better: 0 is chance, what a plain network's random filters give, and 1 where"
            " images classified rightly activate the filters of their class alone."
        ),
        metric=_gate_similarity,
        update=_update_similarity,
        part="true_positives",
        needs=_needs_classes_of_filters,
    ),
    "s_fn": Figure(
        heading="S_FN",
        meaning="the same of images that are classified wrongly",
        better="higher",
        reading=(
            "Higher is better: 0 is chance, what a plain network's random filters give; below S_TP"
            " where images are classified wrongly since they activate filters of other classes."
        ),
        metric=_gate_similarity,
        update=_update_similarity,
        part="false_negatives",
        needs=_needs_classes_of_filters,
    ),
}
