"""What a figure is: how it is called, what it needs and how it is computed."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from picnn_fast._extras import extra
from picnn_fast.evaluation.observation import Observation
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from torchmetrics import Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of evaluation.

    Those with the same ``metric``, ``update`` and ``prepare`` share one metric, which sees each
    image once: they are its parts.

    Attributes:
        heading: over its column of a table.
        meaning: what it measures, and its unit, in a few words.
        better: which way is better.
        reading: a sentence that says what chance gives, what a plain network gives, and which way
            is better.
        metric: network, data, draws to a new ``torchmetrics`` metric, whose ``compute`` yields a
            scalar, a ``MeanOverDraws``, or a NamedTuple of either.
        update: adds an observation to the metric.
        prepare: where given, it sees every image of the figure before the first update: a pass
            over the data of its own.
        prepares: whether ``prepare`` is of use for a network: else the pass is saved.
        part: which field of the NamedTuple that the metric computes; None: all it computes.
        needs: why the figure cannot be had of a network and data, or None where it can.
        when: "epoch": quick enough to be taken of the validation images every epoch, without a
            ``prepare``; "run": of every evaluation; "asked": where it is named alone, since it
            costs much.
        images: of at most so many images of the test split, spread evenly over it; None: of all.
        remark: what to say of a value at the end of a training, or None where nothing need be said.
    """

    heading: str
    meaning: str
    better: Literal["higher", "lower"]
    reading: str
    metric: Callable[[InterpretableNetwork, Any, int], Metric]
    update: Callable[[Any, Observation], None]
    prepare: Callable[[Any, Observation], None] | None = None
    prepares: Callable[[InterpretableNetwork], bool] = lambda network: True
    part: str | None = None
    needs: Callable[[InterpretableNetwork, Any], str | None] = lambda network, data: None
    when: Literal["epoch", "run", "asked"] = "run"
    images: int | None = None
    remark: Callable[[float], str | None] = lambda value: None

    @property
    def said(self) -> str:
        """What it measures, and of how many images where that is not all."""
        some = "" if self.images is None else f"; of {self.images} test images at most"
        return self.meaning + some

    def of(self, computed: Any) -> Any:
        """The figure's own part of what its metric computed: a scalar, or a ``MeanOverDraws``."""
        return computed if self.part is None else getattr(computed, self.part)
