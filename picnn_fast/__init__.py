"""Interpretable convolutional networks: filters that stand for a class or for an object part."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from picnn_fast._version import __version__


def _is_command() -> bool:
    """Whether this process is ``picnn-fast``, or ``python -m picnn_fast``."""
    arguments = sys.argv or [""]
    if arguments[0] == "-m":  # the module's own name is gone from them
        return sys.orig_argv[-len(arguments)] in (__name__, f"-m{__name__}")
    return PurePath(arguments[0]).stem == "picnn-fast"


# The command imports by itself what it is asked for: its --version and --help are not to wait for
# torch. Everyone else has all of it, and all operators, with the package.
if TYPE_CHECKING or not _is_command():
    from picnn_fast import functional, losses
    from picnn_fast.backends import available_backends, build_info, use_backend
    from picnn_fast.models import CSG, ICCNN, ICNN, PICNN, STD, make_interpretable
    from picnn_fast.ops.templates import PartTemplate
else:

    def __getattr__(name: str) -> Any:
        """For a user's own module that the command imports."""
        if name in ("functional", "losses"):
            return importlib.import_module(f"{__name__}.{name}")
        if name in __all__:
            for home in ("models", "backends", "ops.templates"):
                module = importlib.import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
