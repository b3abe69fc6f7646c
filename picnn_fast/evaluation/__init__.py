"""The figures a trained network is measured by: one record each, and the loop that walks them."""

from picnn_fast.evaluation.callbacks import (
    FiguresCallback,
    MutualInformationCallback,
    log_figures,
)
from picnn_fast.evaluation.figures import (
    FIGURES,
    TOPICS,
    Figure,
    default_figures,
    full_headings,
    sharing,
)
from picnn_fast.evaluation.figures.attacks import Attack, adversarial_detection, convolution_means
from picnn_fast.evaluation.figures.removal import Confusions, confusion_without, removal_ownership
from picnn_fast.evaluation.loop import Measurement, NotFiniteError, differences, evaluate, measure
from picnn_fast.evaluation.observation import Observation, pool
from picnn_fast.evaluation.values import (
    Figures,
    Value,
    as_csv,
    format_figure,
    format_figures,
    format_interval,
    read_figures,
)

__all__ = [
    "FIGURES",
    "TOPICS",
    "Attack",
    "Confusions",
    "Figure",
    "Figures",
    "FiguresCallback",
    "Measurement",
    "MutualInformationCallback",
    "NotFiniteError",
    "Observation",
    "Value",
    "adversarial_detection",
    "as_csv",
    "confusion_without",
    "convolution_means",
    "default_figures",
    "differences",
    "evaluate",
    "format_figure",
    "format_figures",
    "format_interval",
    "full_headings",
    "log_figures",
    "measure",
    "pool",
    "read_figures",
    "removal_ownership",
    "sharing",
]
