"""The command ``picnn-fast``, from ``demo`` and ``train`` to ``doctor``.

Nothing is imported until a command needs it, so that ``picnn-fast --help`` answers at once, and
``doctor``, with torch and numpy alone, on any installation.
"""

import argparse
import functools
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from picnn_fast._extras import extra, install_command
from picnn_fast._terminal import printable
from picnn_fast._version import __version__

if TYPE_CHECKING:
    from picnn_fast.evaluation import Figures, Measurement, Value
    from picnn_fast.training.run_folder import RunFolder

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
        return 2 if isinstance(error, ValueError) else 1  # an option, or else the world
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


@contextmanager
def _telling_how_to_go_on(folder: "RunFolder") -> Iterator[None]:
    """A training that is interrupted says what the same command would do."""
    from picnn_fast.training.launch import launch

    try:
        yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):
        if launch(None).first:  # one of several processes speaks for all
            kept = any(folder.work.rglob("*.ckpt"))
            how = "goes on from the last complete epoch" if kept else "starts anew"
            print(
                f"\npicnn-fast {folder.kind}: interrupted; the same command {how}",
                file=sys.stderr,
            )
        raise


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
        from picnn_fast.training.module import DivergenceError
        from picnn_fast.training.options import ConfigError
        from picnn_fast.training.run_folder import RunFolderError

        ours = (ConfigError, RunFolderError, DivergenceError)
    return *ours, OSError, ImportError


def _print_table(
    rows: Mapping[str, Sequence[Mapping[str, "Value"]]], title: str, *, notes: bool = True
) -> None:
    """Figures one below the other by topic, beside them the run, or several whose mean is shown.

    Args:
        rows: name to the figures of its runs.
        title: over the table.
        notes: say below what the marks are and what is missing, and how figures are read, or, of
            more than a few, where that is said; else the values are differences.
    """
    from picnn_fast.evaluation import FIGURES, TOPICS, full_headings

    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    # Names are taken as they are: one may hold what rich would take for a style or an emoji.
    console = Console(soft_wrap=True, markup=False, emoji=False)
    missing: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    topics = {key: topic for topic, figures in TOPICS.items() for key in figures}
    headings = full_headings()
    shown: list[str] = []
    cells: list[tuple[str, dict[str, tuple[str, str]]]] = []
    for key, figure in FIGURES.items():
        values = [run[key] for runs in rows.values() for run in runs if key in run]
        if not values:  # not asked for
            continue
        reasons = tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
        none = all(isinstance(value, str) for value in values)
        if reasons:
            missing.setdefault((none, reasons), []).append(headings[key])
        if none:
            continue
        row = {name: _cell(runs, key, sign=not notes) for name, runs in rows.items()}
        cells.append((f"{figure.heading} {_ARROWS[figure.better]}", row))
        shown.append(key)
    for names, between in _columns(cells, console.width):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for name in names:
            table.add_column(printable(name), justify="right", overflow="fold")
        topic = None
        for key, (heading, row) in zip(shown, cells, strict=True):
            if topic is not None and topics.get(key) != topic:
                table.add_section()
            topic = topics.get(key)
            table.add_row(heading, *(between.join(filter(None, row[name])) for name in names))
        console.print(table)
    if not notes:
        return
    every = [cell for _, row in cells for cell in row.values()]
    legend = ["↑: higher is better, ↓: lower"] * bool(every)
    if any(interval for _, interval in every):
        legend.append("[ ]: 95 % of resamples of the test images")
    if any("±" in text for text, _ in every):
        several = any(len(runs) > 1 for runs in rows.values())
        legend.append(f"±: standard {'deviation over seeds' if several else 'error over masks'}")
    said = ["; ".join(legend)] * bool(legend)
    for (none, reasons), without in missing.items():
        reason = "; ".join(reason.removeprefix("n/a: ") for reason in reasons)
        said.append(f"not {'here' if none else 'of all'}: {', '.join(without)} (n/a: {reason})")
    if len(shown) <= _FIGURES_EXPLAINED:
        said += [f"{FIGURES[key].heading}: {_explained_figure(key)}" for key in shown]
    else:
        said.append("picnn-fast figures   what each of them says, and how it is read")
    for note in said:
        _print_note(note, console.width)


_ARROWS = {"higher": "↑", "lower": "↓"}
# So many at most are explained below their table.
_FIGURES_EXPLAINED = 4


def _explained_figure(name: str) -> str:
    from picnn_fast.evaluation import FIGURES

    return f"{FIGURES[name].meaning}. {FIGURES[name].reading}"


def _print_note(note: str, width: int, first: str = "  ", then: str = "    ") -> None:
    print(textwrap.fill(note, width, initial_indent=first, subsequent_indent=then))


def _cell(runs: Sequence[Mapping[str, "Value"]], key: str, *, sign: bool) -> tuple[str, str]:
    """A figure for a table, and its interval; of a difference with its sign."""
    from picnn_fast.evaluation import format_figures, format_interval

    text = format_figures(runs, key)
    if sign and not text.startswith(("-", "n/a")):
        text = f"+{text}"
    return text, format_interval(runs[0], key, sign=sign) if len(runs) == 1 else ""


def _columns(
    cells: Sequence[tuple[str, Mapping[str, tuple[str, str]]]], width: int
) -> Iterator[tuple[list[str], str]]:
    """Which columns go into one table, so that none is cut, and what joins figure and interval.

    An interval stands beside its figure where all columns then fit into the width, else below it.
    """
    of_column: dict[str, list[tuple[str, str]]] = {}
    for _, row in cells:
        for name, cell in row.items():
            of_column.setdefault(name, []).append(cell)
    edge = 3  # a line between columns, and a space on each side of it
    left = width - max((len(heading) for heading, _ in cells), default=0) - edge - 1

    def widths(between: str) -> dict[str, int]:
        return {
            name: edge
            + max(
                min(len(printable(name)), 12),
                *(max(map(len, between.join(filter(None, cell)).split("\n"))) for cell in column),
            )
            for name, column in of_column.items()
        }

    between = " " if sum(widths(" ").values()) <= left else "\n"
    names: list[str] = []
    taken = 0
    for name, wide in widths(between).items():
        if names and taken + wide > left:
            yield names, between
            names, taken = [], 0
        names.append(name)
        taken += wide
    if names:
        yield names, between


def _add_overwrite(parser: Any) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew; what is in the output folder is replaced once the new run is complete",
    )


def _say_complete() -> None:
    print("This run was complete already. Redo it with --overwrite.")


def _demo(arguments: Sequence[str]) -> int:
    from picnn_fast.evaluation import FIGURES
    from picnn_fast.training.demo import EPOCHS, SPREAD, demo_folder, run_demo
    from picnn_fast.training.options import parse
    from picnn_fast.training.summary import REPORT

    def add(parser: Any) -> None:
        parser.add_argument("--output", type=str, default="runs/demo", help="folder of the results")
        parser.add_argument("--seed", type=int, default=0, help="of everything random")
        parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each network")
        _add_overwrite(parser)

    args = parse(
        arguments,
        prog="picnn-fast demo",
        description="Train an ordinary network (STD) and a PICNN on scikit-learn's handwritten"
        " digits, and show accuracy through all filters (ACC1), through those drawn for a"
        " pseudo-label, itself drawn from the softmax (ACC2), without those of the true class"
        " (ACC3), and the mutual information score (MIS). An interrupted demo goes on"
        " when started again.",
        groups=(),
        common=False,
        add=add,
    )
    output, same = args["output"], {"seed": args["seed"], "epochs": args["epochs"]}
    folder = demo_folder(output, **same)
    complete = not args["overwrite"] and folder.complete()
    with _telling_how_to_go_on(folder):
        figures = run_demo(output, overwrite=args["overwrite"], **same)
    rows = {name: [values] for name, values in figures.items()}
    _print_table(rows, "Test split, 360 handwritten digits")
    if args["epochs"] == EPOCHS:
        spread = ", ".join(f"{FIGURES[key].heading} {value}" for key, value in SPREAD.items())
        print(
            f"  Another seed or machine ends thereabouts; three seeds lay this far apart: {spread}"
        )
    for name, meaning in (
        ("correspondence.png", "which filters belong to which class"),
        ("curves.png", "losses and accuracies over training"),
        ("gradcam.png", "what all, class, complementary and random filters see"),
        ("metrics.json", "the figures above"),
        (REPORT, "all of it on one page: open it in a browser"),
    ):
        print(printable(f"  {Path(output) / name}: {meaning}"))
    if complete:
        _say_complete()
    return 0


def _train(arguments: Sequence[str]) -> int:
    from picnn_fast.training.launch import launch
    from picnn_fast.training.options import BY_IMAGE_SIZE, Options, parse
    from picnn_fast.training.run import train, train_folder

    args = parse(
        arguments,
        prog="picnn-fast train",
        description="Train and evaluate one network. Options come from --config, and flags"
        " override it. An interrupted run goes on when started again with the same options.",
        add=_add_overwrite,
    )
    del args["config"]
    overwrite = args.pop("overwrite")
    options = Options(**args)
    folder = train_folder(options)
    complete = not overwrite and folder.complete()
    name = options.backbone["name"]
    by_size = args["backbone"]["name"] == BY_IMAGE_SIZE != name
    if by_size and not complete and launch(None).first:
        print(f"backbone: {name}, by the size of the images; --backbone NAME takes another")
    with _telling_how_to_go_on(folder):
        figures = train(options, overwrite=overwrite)
    if not figures:  # a process beside the first one
        return 0
    _print_table({options.method["name"]: [figures]}, f"Test split of {options.data['name']}")
    logs = [f"{name}/" for name in ("csv", "tensorboard") if (folder.path / name).is_dir()]
    shown, output = ", ".join(["metrics.json", "last.ckpt", *logs]), shlex.quote(options.output)
    print(printable(f"  {options.output}: {shown}"))
    print(printable(f"  picnn-fast evaluate {output}   measures it again, or on other images"))
    if "tensorboard/" in logs:
        print(printable(f"  tensorboard --logdir {output}   draws its losses and figures"))
    if complete:
        _say_complete()
    return 0


def _compare(arguments: Sequence[str]) -> int:
    from picnn_fast.training.compare import (
        DEFAULT_METHODS,
        DEFAULT_SEEDS,
        RECIPES,
        VARIANTS,
        compare,
        compare_folder,
        methods_on,
    )
    from picnn_fast.training.options import GROUPS, Options, parse

    def add(parser: Any) -> None:
        parser.set_defaults({"output": "runs/compare"})
        parser.add_argument(
            "--methods",
            nargs="+",
            type=Literal[(*GROUPS["method"].rows, *VARIANTS)],
            default=list(DEFAULT_METHODS),
            help="rows of the table",
        )
        parser.add_argument(
            "--seeds",
            nargs="+",
            type=int,
            default=list(DEFAULT_SEEDS),
            help="of everything random but the split: as many networks of each method",
        )
        _add_overwrite(parser)

    def recipe(names: Mapping[str, str]) -> Mapping[str, Any]:
        return RECIPES[names["data"]].common if names["data"] in RECIPES else {}

    args = parse(
        arguments,
        prog="picnn-fast compare",
        description="Train several methods alike, several seeds of each, and show mean and standard"
        " deviation of their figures on the test split. Options are those of train; on digits the"
        " methods' own are what suits them there. An interrupted comparison goes on when started"
        " again, and more methods or seeds go on with a complete one.",
        groups=("backbone", "data", "optimizer"),
        without=("seed", "devices", "strategy"),
        recipe=recipe,
        add=add,
    )
    data = args["data"]["name"]
    del args["config"]
    overwrite, seeds = args.pop("overwrite"), args.pop("seeds")
    methods = methods_on(data, args.pop("methods"))
    options = Options(**args)
    folder = compare_folder(options, methods, seeds)
    complete = not overwrite and folder.complete()
    with _telling_how_to_go_on(folder):
        say = functools.partial(print, flush=True)  # a log file tells at once, too
        figures = compare(options, methods, seeds, overwrite=overwrite, say=say)
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    _print_table(figures, f"Test split of {data}, {count}")
    print(printable(f"  {options.output}: metrics.json, metrics.csv, a folder of each network"))
    if complete:
        _say_complete()
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from picnn_fast.evaluation import measure
    from picnn_fast.training.launch import device_of, launch
    from picnn_fast.training.options import check_range
    from picnn_fast.training.run import reading_images, try_image

    of_model = any(token.partition("=")[0] == "--model" for token in arguments)

    def add(parser: Any) -> None:
        _add_path(parser, nargs="*" if of_model else "+")
        _add_model(parser)
        parser.add_argument(
            "--figures",
            nargs="+",
            type=str,
            default=None,
            help="names, as picnn-fast figures lists them, or all; null: those that cost little",
        )
        parser.add_argument(
            "--batch_size", type=int | None, default=None, help="images a step; null: as trained"
        )
        parser.add_argument(
            "--seed", type=int | None, default=None, help="of the masks drawn; null: as trained"
        )
        parser.add_argument("--draws", type=int, default=8, help="masks drawn for each image")
        parser.add_argument(
            "--resamples",
            type=int,
            default=1000,
            help="of the test images, for intervals of 95 percent; 0: none",
        )
        parser.add_argument(
            "--accelerator",
            type=Literal["auto", "cpu", "gpu", "mps"],
            default="auto",
            help="device type",
        )
        parser.add_argument(
            "--output", type=Path | None, default=None, help="folder of metrics.json and .csv"
        )
        parser.add_argument("--json", action="store_true", help="print JSON in place of a table")

    if not launch(None).first:  # one of several processes measures, so that no image counts twice
        return 0
    args, trained = (_of_model if of_model else _of_trained)(
        arguments,
        prog="picnn-fast evaluate",
        description="Measure trained networks on a test split: of other data of the same"
        " classes, where --data says so, else of the data of the training. Several are measured"
        " side by side, seeds of one method as their mean and standard deviation, and what they"
        " differ by from the ordinary network (std), else from the first, with its interval."
        " --model NAME in place of runs measures any plain classifier on the images that --data"
        " names.",
        add=add,
    )
    if not of_model:
        _check_no_model(args)
    check_range("draws", args["draws"], 1)
    check_range("resamples", args["resamples"], 0)
    figures = _figures(args["figures"])
    _check_output(args["output"])
    runs: dict[str, _Trained] = {}
    measured: dict[str, Measurement] = {}
    told: list[str] = []
    for run in trained:
        with reading_images():
            try_image(run.network, run.data, f"the network in {run.checkpoint}")
            measured[run.name] = measure(
                run.network,
                run.data,
                figures=figures,
                resamples=args["resamples"],
                seed=run.options.seed,
                draws=args["draws"],
                device=device_of(args["accelerator"]),
                progress=sys.stdout.isatty() and not args["json"],
            )
        if of_model:
            layer, filters = run.network.layer, run.network.num_filters
            of = "" if layer is None else f" of layer {layer}"
            told.append(f"{args['model']}, as it is, by {filters} filters{of}")
        runs[run.name] = run._replace(network=None, data=None)
    groups = _seeds_together(runs)
    rows = {label: [measured[name].figures for name in names] for label, names in groups.items()}
    base = next((r for r, names in groups.items() if runs[names[0]].plain), next(iter(groups)))
    apart = _apart({label: [measured[n] for n in names] for label, names in groups.items()}, base)
    content = {name: measurement.figures for name, measurement in measured.items()} | apart
    if args["json"]:
        print(json.dumps(content, indent=2))
    if args["output"] is not None:
        _write_figures(args["output"], content)
    if args["json"]:
        return 0
    data = {run.options.data["name"] for run in runs.values()}
    images = sorted({measurement.images for measurement in measured.values()})
    title = f"Test split of {', '.join(sorted(data))}, {' and '.join(map(str, images))} images"
    _print_table(rows, title)
    if apart:
        _print_table({k: [v] for k, v in apart.items()}, "Differences on these images", notes=False)
    elif len(groups) > 1:
        print("  no differences: the runs were measured on other test images")
    if args["output"] is not None:
        told.append(f"{args['output']}: metrics.json, metrics.csv")
    for line in told:
        print(printable(f"  {line}"))
    return 0


def _list_figures(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="picnn-fast figures",
        description="List the figures that evaluate measures: their names, headings in tables,"
        " which way is better, what they say and how they are read.",
        allow_abbrev=False,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="some of them; none: all")
    chosen = _figures(parser.parse_args(arguments).names or ["all"])
    from picnn_fast.evaluation import TOPICS, full_headings

    headings, width = full_headings(), shutil.get_terminal_size().columns
    for topic, figures in TOPICS.items():
        names = [name for name in figures if name in (chosen or ())]
        if names:
            print(topic)
        for name in names:
            figure = figures[name]
            asked = "   where it is named alone" if figure.when == "asked" else ""
            print(f"  {name}   {headings[name]} {_ARROWS[figure.better]}{asked}")
            _print_note(_explained_figure(name), width, *["      "] * 2)
    return 0


def _figures(names: Sequence[str] | None) -> list[str] | None:
    """Names of figures; None: those of every evaluation.

    Raises:
        ConfigError: a name that there is not.
    """
    from picnn_fast.evaluation import FIGURES, full_headings
    from picnn_fast.ops.checks import did_you_mean
    from picnn_fast.training.options import ConfigError

    by_heading = {heading.lower(): name for name, heading in full_headings().items()}
    for name in names or ():
        if name not in FIGURES and name != "all":
            meant = by_heading.get(name.lower(), name)
            raise ConfigError(
                f"figures: got {name!r},{did_you_mean(meant, FIGURES)} want all, or names that"
                " picnn-fast figures lists, with spaces between them"
            )
    if names is None:
        return None
    return list(FIGURES) if "all" in names else list(names)


def _check_output(folder: Path | None) -> None:
    """
    Raises:
        ConfigError: it holds a run, whose own figures lie there, or cannot be written to.
    """
    from picnn_fast.training.options import ConfigError
    from picnn_fast.training.run_folder import RECORD

    if folder is None:
        return
    if (folder / RECORD).exists():
        raise ConfigError(f"output: got {folder}, which holds a run, want another folder")
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
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


def _write_figures(folder: Path, figures: Mapping[str, "Figures"]) -> None:
    from picnn_fast.evaluation import as_csv
    from picnn_fast.training.run_folder import write_atomically, write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", figures)
    rows = [{"name": name, **values} for name, values in figures.items()]
    write_atomically(folder / "metrics.csv", as_csv(rows, ("name",)))


def _seeds_together(runs: Mapping[str, "_Trained"]) -> dict[str, list[str]]:
    """Names of runs by the row that they are in: those of one method that other seeds trained."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        options = {k: v for k, v in run.options.identity().items() if k != "seed"}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(name)
    rows: dict[str, list[str]] = {}
    for names in groups.values():
        seeds = [runs[name].seed for name in names]
        labels = {name.removesuffix(f"-{seed}") for name, seed in zip(names, seeds, strict=True)}
        label = labels.pop() if len(labels) == 1 else runs[names[0]].options.method["name"]
        if len(names) == 1 or len(set(seeds)) < len(names) or label in rows:
            rows |= {name: [name] for name in names}
        else:
            rows[label] = names
    return rows


def _apart(groups: Mapping[str, Sequence["Measurement"]], base: str) -> dict[str, "Figures"]:
    """What rows differ from one of them by; nothing where the images are not the same."""
    from picnn_fast.evaluation import differences

    every = [run for runs in groups.values() for run in runs]
    if len({(run.images, run.split) for run in every}) > 1:
        return {}
    return {
        f"{name} − {base}": differences(runs, groups[base])
        for name, runs in groups.items()
        if name != base
    }


class _Trained(NamedTuple):
    name: str
    checkpoint: Path
    network: Any
    options: Any
    data: Any
    seed: int  # of the training

    @property
    def plain(self) -> bool:
        """Whether it is the ordinary network, which others are compared with."""
        return bool(self.options.method["name"] == "std")


def _add_path(parser: Any, nargs: str | None = None) -> None:
    parser.add_argument(
        "path",
        metavar="RUN_OR_CHECKPOINT",
        nargs=nargs,
        help="folder of a run, a demo or a comparison, or a .ckpt",
    )


def _of_trained(
    arguments: Sequence[str], **described: Any
) -> tuple[dict[str, Any], Iterator[_Trained]]:
    """The arguments of a command on trained networks, and these, each with its data.

    The data is that of the training, but for what the arguments say of it.
    """
    from picnn_fast.training.options import parse

    described["common"] = False
    if any(token in ("-h", "--help") for token in arguments):
        parse(arguments, groups=("data",), **described)
    # What can be said of the data hangs on the checkpoint, which has to be found first.
    rest, of_data = _without_data(arguments)
    args = parse(rest, groups=("data",), **described)
    del args["data"]
    return args, _with_data(args, arguments if of_data else None, described)


def _with_data(
    args: dict[str, Any], of_data: Sequence[str] | None, described: Mapping[str, Any]
) -> Iterator[_Trained]:
    import dataclasses

    from picnn_fast.training.checkpoint import load_checkpoint
    from picnn_fast.training.options import ConfigError, few, parse
    from picnn_fast.training.run import build_data

    paths = args["path"] if isinstance(args["path"], list) else [args["path"]]
    for name, checkpoint in _named(paths).items():
        network, options, class_names = load_checkpoint(checkpoint)
        seed = options.seed
        if of_data is not None:
            # What is not given is as in the training.
            defaults = {"data": options.data}
            args = parse(of_data, groups=("data",), defaults=defaults, **described)
        overrides = {
            key: args[key] for key in ("data", "batch_size", "seed") if args.get(key) is not None
        }
        options = dataclasses.replace(options, **overrides)
        try:
            data = build_data(dataclasses.replace(options, category=None))
        except ConfigError as error:
            if of_data is not None:
                raise
            raise ConfigError(
                f"{error}; --data.root, or another option of --data, says where else"
            ) from error
        if options.category is not None and options.category in data.class_names:
            data.single_out(options.category)
        if list(data.class_names) != class_names:
            raise ConfigError(
                f"data: {options.data['name']} has other classes ({few(data.class_names)}) than"
                f" {checkpoint} was trained on ({few(class_names)})"
            )
        name = options.method["name"] if name == "." else name
        yield _Trained(name, checkpoint, network, options, data, seed)


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """The checkpoints of runs by name: of one path within it, of several from where they part."""
    from picnn_fast.training.checkpoint import find_checkpoints

    found = {p.resolve(): p for path in paths for p in find_checkpoints(path)}
    if len(paths) == 1:
        path = Path(paths[0])
        return {
            str(p.parent.relative_to(path)) if path.is_dir() else ".": p for p in found.values()
        }
    folders = [checkpoint.parent for checkpoint in found]
    if len(set(folders)) < len(folders):  # files of one folder
        folders = [checkpoint.with_suffix("") for checkpoint in found]
    top = os.path.commonpath(folders) if len(folders) > 1 else str(folders[0].parent)
    return {
        os.path.relpath(folder, top): p for folder, p in zip(folders, found.values(), strict=True)
    }


def _add_model(parser: Any) -> None:
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="in place of a run: a plain classifier, trained anywhere. timm:NAME; a network of"
        " torchvision's, as resnet50; or module:function, which makes one. Images are made as the"
        " two libraries say, unless options of --data say otherwise",
    )
    parser.add_argument(
        "--layer",
        type=str | None,
        default=None,
        help="of --model: the module whose maps are measured; null: its last convolutional maps",
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="of --model; null: the library's trained ones, or the function's own. Or other ones by"
        " the library's name for them; a state dict (.pth, .pt, .safetensors); random",
    )


def _check_no_model(args: Mapping[str, Any]) -> None:
    from picnn_fast.training.options import ConfigError

    for name in ("layer", "weights"):
        if args[name] is not None:
            raise ConfigError(f"{name}: got {args[name]!r} with a run, want it with --model alone")


def _of_model(
    arguments: Sequence[str], **described: Any
) -> tuple[dict[str, Any], Iterator[_Trained]]:
    """The arguments of a command on a plain classifier, and this, with its data."""
    from picnn_fast.training.options import GROUPS, ConfigError, Options, parse
    from picnn_fast.training.plain import data_defaults, plain_network
    from picnn_fast.training.run import build_data, reading_images

    described |= {"common": False, "groups": ("data",)}
    rest, _ = _without_data(arguments)
    args = parse(rest, **described)
    model, flags = args["model"], [token.partition("=")[0] for token in arguments]
    if args["path"]:
        raise ConfigError(f"model: got {model!r} beside {args['path'][0]}, want one of the two")
    if model is not None and not {"--data", "--data.name"} & {*flags}:
        raise ConfigError(
            "data: got nothing with --model, want --data NAME, the images to measure it on; one of"
            f" {', '.join(GROUPS['data'].rows)}"
        )
    if model is None:
        raise ConfigError("model: got null, want the name of a network, or module:function")

    def as_trained(names: Mapping[str, str]) -> dict[str, Any]:
        told = data_defaults(model, args["weights"], names["data"])
        sized = {"__data.image_size", "__data.test_crop"}
        if sized & {flag.replace("-", "_") for flag in flags}:
            told.pop("resize", None)  # it goes with the library's size
        return {"data": {"name": names["data"], **told}}

    args = parse(arguments, recipe=as_trained, **described)
    given = {name: args[name] for name in ("batch_size", "seed") if args[name] is not None}
    options = Options(method="std", data=args["data"], **given)
    data = build_data(options)
    with reading_images():
        network = plain_network(
            model, data, weights=args["weights"], layer=args["layer"], seed=options.seed
        )
    return args, iter([_Trained(model, Path(model), network, options, data, options.seed)])


def _report(arguments: Sequence[str]) -> int:
    from picnn_fast.training.launch import device_of
    from picnn_fast.training.options import check_range, parse
    from picnn_fast.training.summary import FILTERS, IMAGES, REPORT, write_report

    def add(parser: Any) -> None:
        parser.add_argument(
            "paths",
            metavar="RUN_OR_CHECKPOINT",
            nargs="+",
            help="folders of runs, demos or comparisons, or .ckpt files",
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help=f"file to write; null: {REPORT} in the first of these folders",
        )
        parser.add_argument(
            "--images", type=int, default=IMAGES, help="test images that Grad-CAM shows"
        )
        parser.add_argument(
            "--filters",
            type=int,
            default=FILTERS,
            help="filters of each network whose images are shown; 0: none, and no pass over the"
            " test images to find them",
        )
        parser.add_argument(
            "--accelerator",
            type=Literal["auto", "cpu", "gpu", "mps"],
            default="auto",
            help="device type that this pass runs on",
        )

    args = parse(
        arguments,
        prog="picnn-fast report",
        description="Write one HTML file about some runs, which holds all it needs: their figures,"
        " which filter stands for which class, curves of the training, what filters see, and what"
        " it was made with.",
        groups=(),
        common=False,
        add=add,
    )
    check_range("images", args["images"], 1)
    check_range("filters", args["filters"], 0)
    path = write_report(
        args["paths"],
        args["output"],
        images=args["images"],
        filters=args["filters"],
        device=device_of(args["accelerator"]),
        progress=sys.stdout.isatty(),
    )
    print(printable(f"  {path}: open it in a browser"))
    return 0


def _explain(arguments: Sequence[str]) -> int:
    from picnn_fast.data.photographs import read_image
    from picnn_fast.explain import explain_image
    from picnn_fast.report import plot_explanation
    from picnn_fast.training.options import ConfigError, check_range
    from picnn_fast.training.run import reading_images, try_image

    of_filters = any(token.partition("=")[0] == "--filter" for token in arguments)

    def add(parser: Any) -> None:
        _add_path(parser)
        parser.add_argument(
            "images",
            metavar="IMAGE",
            type=Path,
            nargs="*" if of_filters else "+",
            help="image files; none with --filter",
        )
        parser.add_argument(
            "--output", type=Path, default=Path("explanations"), help="folder of the pictures"
        )
        parser.add_argument(
            "--target", type=str | None, default=None, help="class to explain; null: the predicted"
        )
        parser.add_argument("--filters", type=int, default=6, help="filters to show of each image")
        parser.add_argument(
            "--filter",
            type=int,
            nargs="+",
            default=None,
            help="in place of images: draw a page of each of these filters, with the images it"
            " fires on most and those it adds most to, out of an index that is made once",
        )
        parser.add_argument(
            "--split",
            type=Literal["test", "train"],
            default="test",
            help="images that the index of --filter is made of",
        )
        parser.add_argument(
            "--accelerator",
            type=Literal["auto", "cpu", "gpu", "mps"],
            default="auto",
            help="device type on which the index of --filter is made",
        )
        parser.add_argument("--json", action="store_true", help="print JSON in place of tables")

    args, trained = _of_trained(
        arguments,
        prog="picnn-fast explain",
        description="Show which filters carried a prediction, by the class they stand for, with"
        " their share of its logit, and what the prediction is without them; a picture of each"
        " image. Images are resized and normalised as the test images of the training's data."
        " Or, with --filter, show what filters stand for.",
        add=add,
    )
    _check_writable(args["output"])
    if of_filters:
        return _explain_filters(args, trained)
    check_range("filters", args["filters"], 1)
    told: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for name, checkpoint, network, _, data, _ in trained:
        names = list(data.class_names)
        if args["target"] is not None and args["target"] not in names:
            raise ConfigError(f"target: got {args['target']!r}, want one of {', '.join(names)}")
        target = None if args["target"] is None else names.index(args["target"])
        with reading_images():
            try_image(network, data, f"the network in {checkpoint}")
        # All are read before the first picture is written.
        images = {path: read_image(data, path) for path in args["images"]}
        for path, (taken, shown) in images.items():
            seen = explain_image(network.eval(), taken, target=target)
            args["output"].mkdir(parents=True, exist_ok=True)
            picture = args["output"] / _distinct(
                f"{path.stem}-{name.replace(os.sep, '-')}.png", written
            )
            plot_explanation(
                shown,
                seen,
                names,
                picture,
                filters=args["filters"],
                channel_dim=network.channel_dim,
            )
            told.setdefault(str(path), {})[name] = {
                **_explained(seen, names, args["filters"]),
                "picture": str(picture),
            }
    if args["json"]:
        print(json.dumps(told, indent=2))
    else:
        _print_explanations(told)
        first = next(iter(next(iter(told.values())).values()))
        numbers = " ".join(str(each["filter"]) for each in first["filters"][:_FILTERS_NAMED])
        run = shlex.quote(args["path"])
        print(printable(f"  picnn-fast explain {run} --filter {numbers}   shows what they fire on"))
    return 0


def _explain_filters(args: Mapping[str, Any], trained: Iterator[_Trained]) -> int:
    """Pages of single filters, from the index beside each checkpoint."""
    from picnn_fast.data import Batches, shown_image
    from picnn_fast.report import plot_filter_page
    from picnn_fast.training.filter_index import kept_filter_index
    from picnn_fast.training.launch import device_of
    from picnn_fast.training.options import ConfigError
    from picnn_fast.training.run import reading_images, try_image

    if args["images"]:
        raise ConfigError(f"images: got {len(args['images'])} beside --filter, want none")
    if args["target"] is not None:
        raise ConfigError("target: got one beside --filter, want it with images")
    numbers = list(dict.fromkeys(args["filter"]))
    device = device_of(args["accelerator"])
    told: dict[str, dict[str, Any]] = {}
    for name, checkpoint, network, options, data, _ in trained:
        for number in numbers:
            if not 0 <= number < network.num_filters:
                raise ConfigError(
                    f"filter: got {number}, want one of the {network.num_filters} of {checkpoint},"
                    f" from 0 to {network.num_filters - 1}"
                )
        split, names = args["split"], list(data.class_names)
        with reading_images():
            try_image(network, data, f"the network in {checkpoint}")
            index = kept_filter_index(
                checkpoint,
                network,
                options,
                data,
                split=split,
                device=device,
                progress=sys.stdout.isatty() and not args["json"],
            )
            shown = {i: shown_image(data, split, i) for i in index.images_of(numbers)}
        args["output"].mkdir(parents=True, exist_ok=True)
        part_names = Batches(data, split).part_names if index.by_activation.parts.shape[2] else []
        for number in numbers:
            picture = args["output"] / f"filter-{number}-{name.replace(os.sep, '-')}.png"
            plot_filter_page(index, number, shown, names, picture, part_names=part_names)
            told.setdefault(str(number), {})[name] = {
                **_told_of_filter(index, number, names, part_names),
                "split": split,
                "picture": str(picture),
            }
    if args["json"]:
        print(json.dumps(told, indent=2))
    else:
        _print_filters(told)
    return 0


def _told_of_filter(
    index: Any, number: int, names: Sequence[str], part_names: Sequence[str]
) -> dict[str, Any]:
    """What an index says of a filter, as JSON takes it."""
    owner, most = int(index.owner[number]), int(index.mutual_information[:, number].argmax())
    images = {}
    for key in ("by_activation", "by_contribution"):
        ranking = getattr(index, key)
        fields = (ranking.images, ranking.labels, ranking.predicted, ranking.values)
        columns = (column[number].tolist() for column in (*fields, ranking.boxes))
        images[key] = [
            {
                "image": image,
                "class": names[label],
                "predicted": names[predicted],
                "value": value,
                "box": box,
            }
            for image, label, predicted, value, box in zip(*columns, strict=True)
        ]
    on_parts = index.by_activation.parts[number].float().mean(0).tolist()
    columns = (column[number].tolist() for column in (index.neighbours, index.correlations))
    near = [{"filter": i, "correlation": value} for i, value in zip(*columns, strict=True)]
    return {
        "class": None if owner < 0 else names[owner],
        "ownership": float(index.owned[number]),
        "mutual_information": {
            "class": names[most],
            "nats": float(index.mutual_information[most, number]),
            "estimator": index.estimator,
        },
        "parts": dict(zip(part_names, on_parts, strict=True)),
        "neighbours": near,
        "exact": index.exact,
        "images": index.num_images,
        **images,
    }


_IMAGES_TOLD = 3


def _print_filters(told: Mapping[str, Mapping[str, Any]]) -> None:
    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    console = Console(soft_wrap=True, markup=False, emoji=False)
    names = list(dict.fromkeys(name for by_network in told.values() for name in by_network))
    for name in names:
        said = {number: by_network[name] for number, by_network in told.items()}
        first = next(iter(said.values()))
        table = Table(
            title=printable(f"{name}, {first['images']} images of the {first['split']} split"),
            title_justify="left",
            title_style="bold",
        )
        for heading in (
            "filter",
            "stands for",
            "tells most about",
            "fires most on",
            "adds most to",
        ):
            table.add_column(heading, overflow="fold")
        for number, one in said.items():
            owner, tells = one["class"], one["mutual_information"]
            kinds = [
                ", ".join(
                    f"{seen['class']} #{seen['image']}" for seen in one[ranking][:_IMAGES_TOLD]
                )
                for ranking in ("by_activation", "by_contribution")
            ]
            table.add_row(
                number,
                printable("no class" if owner is None else f"{owner} ({one['ownership']:.2f})"),
                printable(f"{tells['class']} ({tells['nats']:.3f} nats)"),
                *map(printable, kinds),
            )
        console.print(table)
        console.print("  #: the image's place in the split, from 0")
        for number, one in said.items():
            console.print(printable(f"  {one['picture']}: filter {number} on a page"))


def _distinct(name: str, taken: set[str]) -> str:
    """A file name of this command's own, numbered where another image or network took it.

    Upper and lower case are alike, as on some file systems.
    """
    stem, suffix = os.path.splitext(name)
    number = 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name.lower())
    return name


def _explained(seen: Any, names: Sequence[str], filters: int) -> dict[str, Any]:
    """An explanation as JSON takes it: numbers of the logit, and names of classes."""
    probabilities = seen.logits.softmax(0)
    owners = {i: g.owner for g in seen.groups for i in g.filters.tolist()}

    def named(owner: int | None) -> str | None:
        return None if owner is None else names[owner]

    groups = []
    for group in seen.groups:
        without = group.logits_without.softmax(0)
        groups.append(
            {
                "class": named(group.owner),
                "filters": len(group.filters),
                "contribution": group.contribution,
                "without": {
                    "predicted": names[int(without.argmax())],
                    "probability": float(without.max()),
                },
            }
        )
    return {
        "predicted": names[int(seen.logits.argmax())],
        "probability": float(probabilities.max()),
        "explained": names[seen.target],
        "logit": float(seen.logits[seen.target]),
        "offset": seen.offset,
        "exact": seen.exact,
        "groups": groups,
        "filters": [
            {
                "filter": i,
                "class": named(owners[i]),
                "contribution": float(seen.contributions[i]),
            }
            for i in seen.contributions.argsort(descending=True)[:filters].tolist()
        ],
    }


_GROUPS_SHOWN = 5
_FILTERS_NAMED = 3


def _print_explanations(told: Mapping[str, Mapping[str, Any]]) -> None:
    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    console = Console(soft_wrap=True, markup=False, emoji=False)
    for path, by_network in told.items():
        for name, said in by_network.items():
            table = Table(
                title=printable(f"{path}, {name}: {said['predicted']} ({said['probability']:.3f})"),
                title_justify="left",
                title_style="bold",
            )
            table.add_column("filters of")
            for heading in ("number", "add to the logit", "without them"):
                table.add_column(heading, justify="right")
            for group in said["groups"][:_GROUPS_SHOWN]:
                without = group["without"]
                table.add_row(
                    printable("no class" if group["class"] is None else group["class"]),
                    str(group["filters"]),
                    f"{group['contribution']:+.3f}",
                    printable(f"{without['predicted']} ({without['probability']:.3f})"),
                )
            console.print(table)
            left = len(said["groups"]) - _GROUPS_SHOWN
            if left > 0:
                console.print(f"  and {left} groups that add less")
            kind = "is" if said["exact"] else "is, to first order,"
            console.print(
                printable(
                    f"  the logit of {said['explained']}, {said['logit']:.3f}, {kind} what filters"
                    f" add to the {said['offset']:.3f} it has without any"
                )
            )
            most = ", ".join(f"{f['filter']} ({f['contribution']:+.3f})" for f in said["filters"])
            console.print(f"  most by filter {most}")
            console.print(printable(f"  {said['picture']}: these filters' maps"))


def _without_data(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments but ``--data`` and its options, and whether there were any."""
    rest: list[str] = []
    walk = iter(arguments)
    for token in walk:
        if token.partition("=")[0] == "--data" or token.startswith("--data."):
            if "=" not in token:
                next(walk, None)
        else:
            rest.append(token)
    return rest, len(rest) < len(arguments)


def _convert(arguments: Sequence[str]) -> int:
    from picnn_fast.training.checkpoint import convert
    from picnn_fast.training.options import parse

    def add(parser: Any) -> None:
        parser.add_argument("source", metavar="SOURCE", help="file that the authors' code wrote")
        parser.add_argument(
            "target", metavar="TARGET", help="checkpoint to write, a new .ckpt file"
        )
        parser.add_argument(
            "--root",
            type=Path,
            required=True,
            help="folder of the images it was trained on, train/<class>/… and test/<class>/…",
        )

    args = parse(
        arguments,
        prog="picnn-fast convert",
        description="Turn a checkpoint of the authors' PICNN (spdj2271/PICNN, on ResNet-18) into"
        " one of ours, with the same logits.",
        groups=(),
        common=False,
        add=add,
    )
    convert(args["source"], args["target"], args["root"])
    print(printable(f"  {args['target']}: picnn-fast evaluate measures it"))
    return 0


_TRAIN_PACKAGES = (
    "torchvision",
    "lightning",
    "torchmetrics",
    "tensorboard",
    "scikit-learn",
    "scipy",
    "h5py",
    "pyyaml",
    "rich",
    "jsonargparse",
    "argcomplete",
    "filelock",
)


def _doctor(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="picnn-fast doctor",
        description="Show versions, devices, which backend serves which operator, and why any is"
        " missing.",
    ).parse_args(arguments)
    import torch

    importlib.import_module("picnn_fast.functional")  # with which the operators are registered
    from picnn_fast.ops.registry import build_info

    print(f"picnn_fast    {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package, part in (
        ("torch", None),
        ("numpy", None),
        ("triton", None),
        *((package, "train") for package in _TRAIN_PACKAGES),
        *((package, "report") for package in ("matplotlib", "captum", "plotly", "jinja2")),
    ):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (f": {install_command(part)}" if part else "")
        print(f"{package:<14}{version}")

    print("\ndevices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu         {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        print(f"  cuda:{i}      {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"  cuda        none (torch is built with {built})")

    info = build_info()
    print("\ncompiled extension")
    for key, value in (info["extension"] or {"": "none"}).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"  {key:<20}{shown}")

    print("\nbackends")
    for backend, reason in info["backends"].items():
        print(f"  {backend:<12}{'available' if reason is None else f'missing: {reason}'}")

    print("\noperators")
    for operator, devices in info["operators"].items():
        served = ", ".join(f"{device}: {backend}" for device, backend in devices.items())
        print(f"  {operator:<32}{served}")
    return 0


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (
        _demo,
        "train an ordinary network and a PICNN on digits, and compare them",
    ),
    "train": (_train, "train and evaluate one network"),
    "compare": (_compare, "train several methods, several seeds of each, and compare them"),
    "evaluate": (_evaluate, "measure a trained network on a test split"),
    "figures": (_list_figures, "list what evaluate measures, and how it is read"),
    "report": (_report, "write one HTML file about some runs"),
    "explain": (_explain, "show which filters carried a prediction"),
    "convert": (_convert, "turn a checkpoint of the authors' PICNN into one of ours"),
    "doctor": (_doctor, "show what is installed, and what serves each operator"),
}
