"""Time, by the clock."""

from typing import Any

from picnn_fast._extras import extra
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import Throughput
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from torchmetrics import Metric


def _throughput(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    return Throughput()


def _update_throughput(metric: Any, seen: Observation) -> None:
    metric.update(seen.network, seen.network.discriminator(), seen.images)


def _timed(heading: str, meaning: str, reading: str, **more: Any) -> Figure:
    """Of wall-clock time, which another run does not repeat."""
    return Figure(
        heading=heading,
        meaning=meaning,
        reading=reading,
        metric=_throughput,
        update=_update_throughput,
        when="asked",
        **more,
    )


FIGURES: dict[str, Figure] = {
    "throughput": _timed(
        "images/s",
        "of one forward pass of the network, by the clock",
        "Higher is better: that of the plain network in it is as much as there is to reach, and"
        " there is no chance in it.",
        better="higher",
        part="images_per_second",
    ),
    "throughput_plain": _timed(
        "… plain",
        "of the plain network in it, its discriminator",
        "Higher is better: the mark that the network is compared with, and there is no chance in"
        " it.",
        better="higher",
        part="plain_images_per_second",
    ),
    "overhead": _timed(
        "overhead",
        "how many times as long as its discriminator the network takes",
        "Lower is better: 1 is as fast as the plain network in it, and there is no chance in it.",
        better="lower",
        part="overhead",
    ),
}
