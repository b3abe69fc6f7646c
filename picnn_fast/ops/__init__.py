"""Operators: schema, shape function, autograd.Function and argument checks, one file a family."""

from picnn_fast.ops import (
    correlation,
    filter_loss,
    histogram,
    masking,
    mutual_information,
    registry,
    templates,
)

registry.load_extension()
registry.register_triton_for_cuda()

__all__ = [
    "correlation",
    "filter_loss",
    "histogram",
    "masking",
    "mutual_information",
    "registry",
    "templates",
]
