"""Interpretable convolutional networks: filters that stand for a class or for an object part."""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from picnn_fast._version import __version__

# The command ``picnn-fast`` imports by itself what it is asked for: its --version and --help are
# not to wait for torch. Everyone else has all of it, and all operators, with the package.
if TYPE_CHECKING or PurePath(*sys.argv[:1]).stem != "picnn-fast":
    from picnn_fast import functional, losses
    from picnn_fast.models import CSG, ICCNN, ICNN, PICNN, STD, make_interpretable
    from picnn_fast.ops.registry import available_backends, build_info, use_backend
    from picnn_fast.ops.templates import PartTemplate

__all__ = [
    "CSG",
    "ICCNN",
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
