"""The figures a trained network is measured by: one record each, and the loop that walks them."""

from picnn_fast.evaluation.attacks import Attack, adversarial_detection, convolution_means
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
from picnn_fast.evaluation.removal import Confusions, confusion_without, removal_ownership

__all__ = [
    "FIGURES",
    "Attack",
    "Confusions",
    "Figure",
    "Figures",
    "FiguresCallback",
    "MutualInformationCallback",
    "Observation",
    "adversarial_detection",
    "confusion_without",
    "convolution_means",
    "default_figures",
    "evaluate",
    "format_figure",
    "format_figures",
    "log_figures",
    "pool",
    "read_figures",
    "removal_ownership",
    "sharing",
]
