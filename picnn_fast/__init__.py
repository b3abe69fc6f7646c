"""Interpretable convolutional networks: filters that stand for a class or for an object part."""

from picnn_fast import functional, losses
from picnn_fast._version import __version__
from picnn_fast.models import CSG, ICNN, PICNN, STD, make_interpretable
from picnn_fast.ops.registry import available_backends, build_info, use_backend
from picnn_fast.ops.templates import PartTemplate

__all__ = [
    "CSG",
    "ICNN",
    "PICNN",
    "STD",
    "PartTemplate",
    "__version__",
    "available_backends",
    "build_info",
    "functional",
    "losses",
    "make_interpretable",
    "use_backend",
]
