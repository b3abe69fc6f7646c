"""The command ``picnn-fast``, from ``demo`` and ``train`` to ``doctor``.

A file a command. Nothing is imported until a command needs it, so that ``picnn-fast --help``
answers at once, and ``doctor``, with torch and numpy alone, on any installation.
"""

import argparse
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from picnn_fast._terminal import printable
from picnn_fast._version import __version__
from picnn_fast.cli import compare, convert, demo, doctor, evaluate, explain, figures, report, train

# What a shell reports of a process ended by Ctrl-C and by SIGTERM.
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
# As if by SIGPIPE, which there is not everywhere: nothing reads the output any more.
_UNREAD = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: in place of ``sys.argv[1:]``.
    """
    if "_ARGCOMPLETE" in os.environ:
        arguments = _words_to_complete()
    parser = argparse.ArgumentParser(
        prog="picnn-fast", description="Interpretable convolutional networks.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"picnn-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, meaning) in _COMMANDS.items():
        commands.add_parser(name, help=meaning, add_help=False)
    _prepare_streams()
    try:
        try:
            args, rest = parser.parse_known_args(arguments)
            return _run(args.command, rest)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD


def _run(command: str, arguments: Sequence[str]) -> int:
    try:
        with _terminable(command), _warnings_in_a_line(command):
            return _COMMANDS[command][0](arguments)
    except BrokenPipeError:
        raise
    except _expected_errors() as error:
        print(printable(f"picnn-fast {command}: error: {error}"), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1  # what was given, or else the world
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if stop.code not in (1, _TERMINATED):
            raise
        return _TERMINATED if stop.code == _TERMINATED else _INTERRUPTED


def _prepare_streams() -> None:
    """Output that a terminal has no letters for is escaped, and one that was closed goes nowhere.

    Of ASCII, for one, which lacks a name's accents and the lines of a table.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _words_to_complete() -> list[str]:
    """What has been typed; argcomplete is told that the command is the program."""
    words = os.environ["COMP_LINE"].split()[1:]
    if words and words[0] in _COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"
    return words[:1] + [word for word in words[1:] if word not in ("-h", "--help")]


@contextmanager
def _warnings_in_a_line(command: str) -> Iterator[None]:
    """What a warning says, without the place in the code, which tells a user nothing."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place: printable(
        f"picnn-fast {command}: warning: {' '.join(str(message).split())}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _terminable(command: str) -> Iterator[None]:
    """SIGTERM ends a training like Ctrl-C: at once, and tidily.

    Lightning's own handler would wait for the next batch, and then end with status 0; it calls
    the handler it finds.
    """
    if command not in ("demo", "train", "compare") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says all a user needs, without a traceback."""
    ours: tuple[type[Exception], ...] = ()
    # Known only to those who can have raised them.
    if "picnn_fast.training.options" in sys.modules:
        from picnn_fast.training.launch import LostProcessError
        from picnn_fast.training.module import DivergenceError
        from picnn_fast.training.options import ConfigError
        from picnn_fast.training.run_folder import RunFolderError

        ours = (ConfigError, RunFolderError, DivergenceError, LostProcessError)
    if "picnn_fast.evaluation" in sys.modules:
        from picnn_fast.evaluation import NotFiniteError

        ours = (*ours, NotFiniteError)
    return *ours, OSError, ImportError


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (
        demo.run,
        "train an ordinary network and a PICNN on digits, and compare them",
    ),
    "train": (train.run, "train and evaluate one network"),
    "compare": (compare.run, "train several methods, several seeds of each, and compare them"),
    "evaluate": (evaluate.run, "measure a trained network on a test split"),
    "figures": (figures.run, "list what evaluate measures, and how it is read"),
    "report": (report.run, "write one HTML file about some runs"),
    "explain": (explain.run, "show which filters carried a prediction"),
    "convert": (convert.run, "turn a checkpoint of the authors' PICNN into one of ours"),
    "doctor": (doctor.run, "show what is installed, and what serves each operator"),
}
