"""``picnn-fast evaluate``: figures of trained networks, and of plain ones."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picnn_fast._terminal import counted, printable
from picnn_fast.cli.figures import figures_named
from picnn_fast.cli.output import check_writable
from picnn_fast.cli.plain import add_model, check_no_model, of_model
from picnn_fast.cli.tables import print_table
from picnn_fast.cli.trained import Trained, add_accelerator, add_path, of_trained

if TYPE_CHECKING:
    from picnn_fast.evaluation import Figures, Measurement
    from picnn_fast.training.launch import Launch


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.launch import launch

    started = launch(None)
    started.connect()
    try:
        if started.first:
            return _run(arguments, started)
        # The first speaks for all, of errors too: those of one process are raised on every one.
        with contextlib.suppress(Exception, SystemExit), _in_silence():
            _run(arguments, started)
        return 0
    finally:
        if started.outside:
            _disconnect()


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _disconnect() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _run(arguments: Sequence[str], started: "Launch") -> int:
    from picnn_fast.metrics.ranks import agreeing

    with agreeing():
        args, trained = _parse(arguments)
        figures = figures_named(args["figures"])
        if started.first:
            _check_output(args["output"])
    runs: dict[str, Trained] = {}
    measured: dict[str, Measurement] = {}
    told: list[str] = []
    while True:
        with agreeing():
            run = next(trained, None)
        if run is None:
            break
        measured[run.name] = _measure(run, args, figures, started)
        if args["model"] is not None:
            layer, filters = run.network.layer, run.network.num_filters
            of = "" if layer is None else f" of layer {layer}"
            told.append(f"{args['model']}, as it is, by {counted(filters, 'filter')}{of}")
        runs[run.name] = run._replace(network=None, data=None)
    if started.first:
        _tell(runs, measured, told, args)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[dict[str, Any], Iterator["Trained"]]:
    from picnn_fast.training.options import check_range

    plain = any(token.partition("=")[0] == "--model" for token in arguments)

    def add(parser: Any) -> None:
        add_path(parser, nargs="*" if plain else "+")
        add_model(parser)
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
        add_accelerator(parser, "device type")
        parser.add_argument(
            "--output", type=Path | None, default=None, help="folder of metrics.json and .csv"
        )
        parser.add_argument("--json", action="store_true", help="print JSON in place of a table")

    args, trained = (of_model if plain else of_trained)(
        arguments,
        prog="picnn-fast evaluate",
        description="Measure trained networks on a test split: of other data of the same"
        " classes, where --data says so, else of the data of the training. Several are measured"
        " side by side, seeds of one method as their mean and standard deviation, and what they"
        " differ by from the ordinary network (std), else from the first, with its interval."
        " --model NAME in place of runs measures any plain classifier on the images that --data"
        " names. Processes that torchrun or srun starts share the images.",
        add=add,
    )
    if not plain:
        check_no_model(args)
    check_range("draws", args["draws"], 1)
    check_range("resamples", args["resamples"], 0)
    return args, trained


def _measure(
    run: Trained, args: Mapping[str, Any], figures: Sequence[str] | None, started: "Launch"
) -> "Measurement":
    import torch

    from picnn_fast.evaluation import measure
    from picnn_fast.metrics.ranks import agreeing
    from picnn_fast.training.launch import device_of
    from picnn_fast.training.run import reading_images, try_image

    with reading_images():
        with agreeing():
            try_image(run.network, run.data, f"the network in {run.checkpoint}")
            device = device_of(args["accelerator"])
            if device.type == "cuda" and started.outside:
                place = started.rank % started.devices % torch.cuda.device_count()
                device = torch.device("cuda", place)
        return measure(
            run.network,
            run.data,
            figures=figures,
            resamples=args["resamples"],
            seed=run.options.seed,
            draws=args["draws"],
            device=device,
            progress=sys.stdout.isatty() and not args["json"],
        )


def _tell(
    runs: Mapping[str, Trained],
    measured: Mapping[str, "Measurement"],
    told: list[str],
    args: Mapping[str, Any],
) -> None:
    """Print what was measured, and write it where it is wanted."""
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
        return
    data = {run.options.data["name"] for run in runs.values()}
    images = sorted({measurement.images for measurement in measured.values()})
    title = f"Test split of {', '.join(sorted(data))}, {' and '.join(map(str, images))} images"
    print_table(rows, title)
    if apart:
        print_table({k: [v] for k, v in apart.items()}, "Differences on these images", notes=False)
    elif len(groups) > 1:
        print("  no differences: the runs were measured on other test images")
    if args["output"] is not None:
        told.append(f"{args['output']}: metrics.json, metrics.csv")
    for line in told:
        print(printable(f"  {line}"))


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
    check_writable(folder)


def _write_figures(folder: Path, figures: Mapping[str, "Figures"]) -> None:
    from picnn_fast._files import write_atomically
    from picnn_fast.evaluation import as_csv
    from picnn_fast.training.run_folder import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", figures)
    rows = [{"name": name, **values} for name, values in figures.items()]
    write_atomically(folder / "metrics.csv", as_csv(rows, ("name",)))


def _seeds_together(runs: Mapping[str, "Trained"]) -> dict[str, list[str]]:
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
