"""The figures a trained network is measured by: one record each, and the loop that walks them."""

from picnn_fast.evaluation.figures import (
    FIGURES,
    Figure,
    format_figure,
    format_figures,
    read_figures,
)
from picnn_fast.evaluation.loop import Figures, evaluate
from picnn_fast.evaluation.observation import Observation, pool

__all__ = [
    "FIGURES",
    "Figure",
    "Figures",
    "Observation",
    "evaluate",
    "format_figure",
    "format_figures",
    "pool",
    "read_figures",
]
