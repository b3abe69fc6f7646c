"""Functions on tensors: the operators of picnn_fast as plain PyTorch calls."""

from picnn_fast.ops.correlation import group_class_loss, group_correlation_loss
from picnn_fast.ops.filter_loss import FilterLossState, filter_loss, published_filter_loss
from picnn_fast.ops.masking import (
    bernoulli_mask,
    class_gate,
    draw_labels,
    draw_mask,
    gate_penalty,
    gumbel_mask,
    mask_channels,
    project_gate,
)
from picnn_fast.ops.mutual_information import (
    histogram_mutual_information,
    knn_mutual_information,
    mutual_information,
    mutual_information_score,
    soft_histogram_mutual_information,
)
from picnn_fast.ops.templates import map_peaks, template_mask

__all__ = [
    "FilterLossState",
    "bernoulli_mask",
    "class_gate",
    "draw_labels",
    "draw_mask",
    "filter_loss",
    "gate_penalty",
    "group_class_loss",
    "group_correlation_loss",
    "gumbel_mask",
    "histogram_mutual_information",
    "knn_mutual_information",
    "map_peaks",
    "mask_channels",
    "mutual_information",
    "mutual_information_score",
    "project_gate",
    "published_filter_loss",
    "soft_histogram_mutual_information",
    "template_mask",
]
