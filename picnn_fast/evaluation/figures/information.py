"""Mutual information of filters and classes, by several estimators."""

from picnn_fast._extras import extra
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import MutualInformationEstimates
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from torchmetrics import Metric


def _estimates(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    return MutualInformationEstimates(network.num_classes)


def _update_estimates(metric: Metric, seen: Observation) -> None:
    metric.update(seen.pooled, seen.labels)


def _information(heading: str, meaning: str, reading: str, part: str) -> Figure:
    """By one estimator, of activations that all of them share."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="higher",
        reading=reading,
        metric=_estimates,
        update=_update_estimates,
        part=part,
    )


FIGURES: dict[str, Figure] = {
    "mis": _information(
        "MIS",
        "mutual information score by nearest neighbours, nats",
        "Higher is better: by chance, of filters that tell nothing of the classes, about 0, of one"
        " that tells a class from all others its entropy, 0.33 with ten classes of one size, and a"
        " plain network lies between them.",
        "knn",
    ),
    "mis_histogram": _information(
        "… histogram",
        "the same by counts in bins",
        "Higher is better: chance gives about 32 / images too much, and a plain network what MIS"
        " says and somewhat more.",
        "histogram",
    ),
    "mis_miller_madow": _information(
        "… Miller-Madow",
        "the same with what it is too high by taken off",
        "Higher is better: chance gives about 0, and a plain network what MIS says or somewhat"
        " less.",
        "miller_madow",
    ),
    "mis_soft_histogram": _information(
        "… soft histogram",
        "by counts shared out between the two nearest bins, as it can be trained by",
        "Higher is better: chance gives somewhat above 0, and a plain network about what MIS says.",
        "soft_histogram",
    ),
}
