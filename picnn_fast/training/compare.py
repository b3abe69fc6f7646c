"""Several methods side by side: each trained from several seeds, everything else alike."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from picnn_fast import checks
from picnn_fast._files import write_atomically
from picnn_fast._terminal import counted
from picnn_fast.evaluation import Figures, as_csv
from picnn_fast.models.factory import METHODS
from picnn_fast.training.checkpoint import CHECKPOINT
from picnn_fast.training.launch import launch_of
from picnn_fast.training.options import FREE, ConfigError, Options
from picnn_fast.training.run import METRICS, assemble, fit, read_metrics
from picnn_fast.training.run_folder import RunFolder, write_json

TABLE = "metrics.csv"
DEFAULT_METHODS = ("std", "iccnn", "csg", "picnn", "picnn-gumbel")  # as in PICNN's table 1
DEFAULT_SEEDS = (0, 1, 2)
# Rows of their own that are another method with some of its options.
VARIANTS: dict[str, dict[str, Any]] = {"picnn-gumbel": {"name": "picnn", "sampling": "gumbel"}}


class Recipe(NamedTuple):
    """What suits a data set.

    Attributes:
        common: options of every run, by name.
        methods: options of a method, by its name or that of a variant.
    """

    common: dict[str, Any]
    methods: dict[str, dict[str, Any]]


# Found by trials. The digits are small and few: shifts would blur which filter tells which class,
# and lower MIS; so few steps teach correspondence matrix and gate at rates of their own alone.
RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        common={
            "data": {"name": "digits", "max_shift": 0},
            "optimizer": {"name": "adamw", "weight_decay": 0.0},
            "num_filters": 128,
        },
        methods={
            "picnn": {"correspondence_lr": 0.1},
            "picnn-gumbel": {"correspondence_lr": 0.1},
            "csg": {"start": 3, "period": 2, "csg_lr": 0.003, "gate_lr": 0.03},
        },
    ),
}


def methods_on(data: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name to options of these methods and variants, as they suit a data set.

    Args:
        data: name of the data set; where it has no recipe, methods have their own defaults.
        names: of ``METHODS`` or ``VARIANTS``.

    Raises:
        ConfigError: a name that there is not.

    Example:
        >>> from picnn_fast.training.compare import methods_on
        >>> methods_on("folder", ["std", "picnn-gumbel"])
        {'std': {'name': 'std'}, 'picnn-gumbel': {'name': 'picnn', 'sampling': 'gumbel'}}
    """
    known = [*METHODS, *VARIANTS]
    own = RECIPES[data].methods if data in RECIPES else {}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"methods: got {name!r},{checks.did_you_mean(name, known)} want one of"
                f" {', '.join(known)}"
            )
    return {name: {**VARIANTS.get(name, {"name": name}), **own.get(name, {})} for name in names}


def compare(
    options: Options,
    methods: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int] = DEFAULT_SEEDS,
    *,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, list[Figures]]:
    """Train every method from every seed, alike otherwise, and measure each on the test split.

    The folder ``options.output`` then holds ``metrics.json`` and ``metrics.csv``, the figures of
    every run, and for each a folder ``METHOD-SEED`` as of ``train``. More methods or seeds go on
    with a complete comparison.

    Args:
        options: of every run, but for its method, seed and output.
        methods: row to the method's name and options, see ``methods_on``.
        seeds: of everything random but the split.
        overwrite: replace what is in the folder.
        progress: show a bar for each network on a terminal.
        say: takes the lines that tell what is being done.

    Returns:
        Row to the figures of each seed, in the order of the seeds; those of a complete identical
        comparison are read back.

    Raises:
        ConfigError: options that do not go together, or several devices.
        RunFolderError: the folder holds something else.
        DivergenceError: the loss is no finite number.

    Example:
        >>> from picnn_fast.training.compare import compare, methods_on
        >>> from picnn_fast.training.options import Options
        >>> options = Options(data="digits", output="runs/compare", epochs=5)
        >>> figures = compare(options, methods_on("digits", ["std", "csg"]))  # doctest: +SKIP
    """
    started = launch_of(options)
    if started.processes > 1:
        raise ConfigError(
            f"devices: got {started.processes}, want 1: networks are trained one after the other"
        )
    runs = _runs(options, methods, seeds)
    folder = compare_folder(options, methods, seeds)
    if overwrite or not folder.complete():
        with folder.writing(overwrite=overwrite) as work:
            rows = []
            for count, ((name, seed), run) in enumerate(runs.items(), 1):
                figures = train_part(
                    run,
                    work / f"{name}-{seed}",
                    f"{name}, seed {seed} ({count} of {len(runs)})",
                    progress=progress and sys.stdout.isatty(),
                    introduce=False,
                    say=say,
                )
                rows.append({"method": name, "seed": seed, **figures})
            _write(work, rows)
    return {
        name: [
            read_metrics(folder.path / f"{name}-{seed}", [method["name"]])[method["name"]]
            for seed in seeds
        ]
        for name, method in methods.items()
    }


def compare_folder(
    options: Options, methods: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> RunFolder:
    """The folder of the comparison, which may go on with one of fewer methods or seeds."""
    return RunFolder(
        options.output,
        "compare",
        _identity(_runs(options, methods, seeds)),
        free=FREE,
        growing=("runs",),
        read=_read_identity,
    )


def _runs(
    options: Options, methods: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[tuple[str, int], Options]:
    """The options of every run by row and seed; all rows of a seed come before the next seed."""
    if not methods or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"methods, seeds: got {len(methods)} methods and seeds {list(seeds)}, want at least one"
            " of each, and no seed twice"
        )
    return {
        (name, seed): dataclasses.replace(
            options,
            method=method,
            seed=seed,
            output=str(Path(options.output) / f"{name}-{seed}"),
        )
        for seed in seeds
        for name, method in methods.items()
    }


def _identity(runs: Mapping[tuple[str, int], Options]) -> dict[str, Any]:
    """What a comparison notes about itself: the options of all, method and seed of each."""
    own: dict[str, Any] = {}
    for (name, seed), options in runs.items():
        common = options.identity()
        own[f"{name}-{seed}"] = {key: common.pop(key) for key in ("method", "seed")}
    return {**common, "runs": own}


def _read_identity(config: dict[str, Any]) -> dict[str, Any]:
    """What a comparison noted, with the defaults of options that are new since.

    Raises:
        TypeError, ValueError: what is noted is no comparison's.
    """
    if "runs" not in config:
        raise ValueError("runs: got nothing, want those of a comparison")
    common = {key: value for key, value in config.items() if key != "runs"}
    runs = {}
    for name, own in config["runs"].items():
        runs[name.rpartition("-")[0], own["seed"]] = Options(**common, **own)
    return _identity(runs)


def train_part(
    options: Options,
    folder: Path,
    title: str,
    *,
    progress: bool = True,
    introduce: bool = True,
    say: Callable[[str], None] = print,
) -> Figures:
    """One network of several, in a folder within that of them all.

    What was complete there is read back, and what was interrupted goes on.

    Args:
        options: of the run.
        folder: of its checkpoint, logs and ``metrics.json``.
        title: what to call it.
        progress: show progress.
        introduce: say at the start what the run consists of, where progress is shown.
        say: takes the lines that tell what is being done.
    """
    method = options.method["name"]
    if (folder / METRICS).exists() and (folder / CHECKPOINT).exists():
        say(f"{title}: trained before")
        return read_metrics(folder, [method])[method]
    goes_on = (folder / CHECKPOINT).exists()
    resumed = " (goes on from its last checkpoint)" if goes_on else ""
    run = assemble(options, folder, progress=progress, introduce=introduce, goes_on=goes_on)
    images = len(run.data.train_set)  # type: ignore[arg-type]
    say(f"{title}: {counted(options.epochs, 'epoch')} on {counted(images, 'image')}{resumed}")
    start = time.perf_counter()
    figures = fit(run, progress=progress)
    say(f"{title}: trained and measured in {time.perf_counter() - start:.0f} s")
    write_json(folder / METRICS, {method: figures})
    return figures


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The figures of every run as JSON and as CSV."""
    write_json(folder / METRICS, {"runs": rows})
    write_atomically(folder / TABLE, as_csv(rows, ("method", "seed")))
