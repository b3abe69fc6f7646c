"""Folders that commands write: going on in them, and whether they can be written."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from picnn_fast.training.run_folder import RunFolder


@contextmanager
def telling_how_to_go_on(
    folder: "RunFolder", speaks: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """A training that is interrupted says what the same command would do.

    Args:
        folder: of the run.
        speaks: whether this one of several processes speaks for all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        if speaks():
            kept = any(folder.work.rglob("*.ckpt"))
            how = "goes on from the last checkpoint" if kept else "starts anew"
            print(
                f"\npicnn-fast {folder.kind}: interrupted; the same command {how}",
                file=sys.stderr,
            )
        raise


def add_overwrite(parser: Any) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew; what is in the output folder is replaced once the new run is complete",
    )


def say_complete() -> None:
    print("This run was complete already. Redo it with --overwrite.")


def check_writable(folder: Path) -> None:
    """Before anything is computed, that it can be written down.

    Raises:
        ConfigError: the folder is none, or cannot be written to or made.
    """
    from picnn_fast.training.options import ConfigError

    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "which is no folder" if there == folder else f"but {there} is no folder"
        raise ConfigError(f"output: got {folder}, {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output: got {folder}, but {there} cannot be written to, want another folder"
        )
