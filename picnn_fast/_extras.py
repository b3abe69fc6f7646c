"""Optional dependencies: the error a user sees when one is missing."""

import contextlib
from collections.abc import Iterator


def install_command(name: str) -> str:
    """How an extra is installed, by name or from the source."""
    return f"pip install 'picnn_fast[{name}]' (in the source folder: pip install '.[{name}]')"


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside this block come with ``picnn_fast[name]``; a missing one says how to get it.

    Raises:
        ImportError: naming the missing package and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with: {install_command(name)}",
            name=error.name,
        ) from error
