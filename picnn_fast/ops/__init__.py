"""Operators: schema, shape function, derivative and argument checks, one file a family."""

from picnn_fast import backends
from picnn_fast.ops import (
    correlation,
    filter_loss,
    histogram,
    masking,
    mutual_information,
    templates,
)

backends.load()

__all__ = [
    "correlation",
    "filter_loss",
    "histogram",
    "masking",
    "mutual_information",
    "templates",
]
