"""The figures a trained network is measured by: one record each, and the loop that walks them."""

from picnn_fast.evaluation.callbacks import (
    FiguresCallback,
    MutualInformationCallback,
    log_figures,
)
from picnn_fast.evaluation.figures import (
    FIGURES,
    Figure,
    default_figures,
    format_figure,
    format_figures,
    read_figures,
    sharing,
)
from picnn_fast.evaluation.loop import Figures, evaluate
from picnn_fast.evaluation.observation import Observation, pool

__all__ = [
    "FIGURES",
    "Figure",
    "Figures",
    "FiguresCallback",
    "MutualInformationCallback",
    "Observation",
    "default_figures",
    "evaluate",
    "format_figure",
    "format_figures",
    "log_figures",
    "pool",
    "read_figures",
    "sharing",
]
