"""One training run: assemble, fit, evaluate, write. ``train`` is what ``picnn-fast train`` does."""

import copy
import csv
import json
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from picnn_fast._extras import extra, install_command
from picnn_fast._terminal import counted
from picnn_fast.data import DATA
from picnn_fast.data.files import DamagedFileError
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.evaluation import FIGURES, Figures, evaluate, read_figures
from picnn_fast.metrics.ranks import agreeing
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.training.checkpoint import (
    BEST,
    CHECKPOINT,
    FollowSchedule,
    SaveOptions,
    StepCheckpoints,
    WholeCheckpoints,
    build_network,
    load_checkpoint,
    read_checkpoint,
    read_source,
    settle,
)
from picnn_fast.training.launch import Launch, check_accelerator, launch_of, telling_of_lost
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.options import FREE, ConfigError, Options, few, one_line, qualified
from picnn_fast.training.progress import (
    Introduction,
    ProgressBar,
    ProgressLines,
    Work,
    work,
)
from picnn_fast.training.run_folder import RunFolder, RunFolderError, write_json
from picnn_fast.training.sharding import ShardedStrategy, check_sharding

with extra("train"):
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
    from lightning.pytorch.strategies import DDPStrategy, Strategy

METRICS = "metrics.json"


class Run(NamedTuple):
    """What a training consists of, built once: assemble, then ``fit``, then ``evaluate``."""

    options: Options
    data: SeededDataModule
    network: InterpretableNetwork
    module: InterpretableModule
    trainer: L.Trainer


def train(options: Options, *, overwrite: bool = False, progress: bool = True) -> Figures:
    """Train and evaluate one network, in ``options.output`` once complete.

    The folder then holds ``metrics.json`` (method to figures, as ``evaluate`` returns them),
    ``last.ckpt``, ``csv/`` and ``tensorboard/`` logs, and ``run.json``, the options.

    Args:
        options: of the run.
        overwrite: replace what is in the folder.
        progress: show progress.

    Returns:
        As ``evaluate``; a complete identical run's are read back. Empty in every process but the
        first, where there are several.

    Raises:
        ConfigError: options that do not go together, a device that is not there, or data that is
            not laid out as expected or holds a damaged image.
        RunFolderError: the folder holds another run, or a damaged one, or cannot be written.
        DivergenceError: the loss is no finite number.
        LostProcessError: another process is gone, or does not answer.
    """
    started = launch_of(options)
    folder = train_folder(options)
    with telling_of_lost(started, folder):
        return _train(options, started, folder, overwrite=overwrite, progress=progress)


def _train(
    options: Options, started: Launch, folder: RunFolder, *, overwrite: bool, progress: bool
) -> Figures:
    method = options.method["name"]
    if not started.child and started.decide(lambda: not overwrite and folder.complete()):
        return read_metrics(folder.path, [method])[method] if started.first else {}
    goes_on = folder.goes_on(overwrite=overwrite)
    run = assemble(options, folder.work, started=started, progress=progress, goes_on=goes_on)
    earlier = None if overwrite else folder.earlier()
    if earlier is not None and progress and started.first:
        print(_going_on(earlier["epochs"], options), flush=True)
    with started.owning(folder, overwrite=overwrite) as work:
        figures = fit(run, progress=progress)
        if started.first:
            write_json(work / METRICS, {method: figures})
    return figures


def train_folder(options: Options) -> RunFolder:
    """The folder of the run with these options, which may go on with one of fewer epochs."""
    return RunFolder(
        options.output,
        "train",
        options.identity(),
        free=FREE,
        growing=("epochs",),
        read=lambda config: Options(**config).identity(),
    )


def _going_on(epochs: int, options: Options) -> str:
    line = f"goes on with a run of {counted(epochs, 'epoch')}"
    if options.schedule == "cosine":
        line += (
            f"; its cosine was of that length, so this is not the run that"
            f" {counted(options.epochs, 'epoch')} from the start would be"
        )
    return line


def assemble(
    options: Options,
    folder: Path,
    *,
    started: Launch | None = None,
    progress: bool = True,
    goes_on: bool = False,
    introduce: bool = True,
) -> Run:
    """Build everything a run consists of, and refuse what no training can start with.

    Nothing is written.

    Args:
        options: of the run.
        folder: of the checkpoint and logs to come.
        started: as of ``launch``, by default.
        progress: show progress in training.
        goes_on: from a checkpoint, which has the weights that a backbone would begin with.
        introduce: say at the start what the run consists of, where progress is shown.

    Raises:
        ConfigError: data, network or devices cannot be had, or do not go together.
    """
    started = launch_of(options) if started is None else started
    check_accelerator(options.accelerator, options.precision)
    data = build_data(options)
    _choose_validation(options, data)
    with _quiet():
        # Weights, and the random correspondence matrix of STD, follow from the seed.
        L.seed_everything(options.seed, workers=False, verbose=False)
    source = read_source(options)
    if source is not None and list(data.class_names) != source.saved["class_names"]:
        raise ConfigError(
            f"data: got other classes ({few(data.class_names)}) than {options.source()} was"
            f" trained on ({few(source.saved['class_names'])})"
        )
    network = build_network(
        options, data.num_classes, data.in_channels, source, weights=not goes_on
    )
    if options.compile and not network.compiles_alone:
        raise ConfigError(
            f"compile: got true with method {options.method['name']}, whose loss takes gradients"
            " within the network, want false"
        )
    if options.strategy == "fsdp":
        check_sharding(options, network)
    cost = _try_image(options, network, data)
    optimizer = options.optimizer_class()
    module = InterpretableModule(
        network,
        lr=options.optimizer["lr"],
        optimizer=optimizer,
        schedule=options.schedule,
        schedule_floor=options.schedule_floor,
        schedule_steps=options.schedule_steps,
        schedule_factor=options.schedule_factor,
        warmup_epochs=options.warmup_epochs,
        accumulate_grad_batches=options.accumulate_grad_batches,
        compile=options.compile,
        mutual_information_weight=options.mutual_information_weight,
        seed=options.seed,
    )
    try:
        optimizer(network.parameter_groups(module.lr))
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    callbacks: list[Callback] = [SaveOptions(options, data, source), FollowSchedule()]
    if options.checkpoint_every is not None:
        callbacks.append(StepCheckpoints(folder / CHECKPOINT, options.checkpoint_every))
    if options.report_epoch != "last":
        # Before the last checkpoint, which tells of it: a kill between the two repeats the epoch.
        callbacks.append(
            ModelCheckpoint(
                dirpath=folder,
                filename=Path(BEST).stem,
                monitor="val/acc1",
                mode="max",
                enable_version_counter=False,
            )
        )
    callbacks.append(
        ModelCheckpoint(
            dirpath=folder, filename=Path(CHECKPOINT).stem, enable_version_counter=False
        )
    )
    if progress and introduce:
        introduction = Introduction(
            data,
            network,
            cost,
            data_name=options.data["name"],
            backbone=options.backbone["name"] if source is None else str(options.source()),
            output=options.output,
        )
        callbacks.append(introduction)
    if progress:
        callbacks.append(ProgressBar() if sys.stdout.isatty() else ProgressLines())
    try:
        with _quiet():
            trainer = L.Trainer(
                default_root_dir=folder,
                max_epochs=options.epochs,
                precision=options.precision,
                accelerator=options.accelerator,
                devices=started.devices,
                num_nodes=started.nodes,
                strategy=_strategy(options, started),
                # Where optimisers take turns the module does it: Lightning refuses.
                accumulate_grad_batches=options.accumulate_grad_batches
                if module.automatic_optimization
                else 1,
                logger=_loggers(folder),
                callbacks=callbacks,
                plugins=[WholeCheckpoints(data.class_names), started.environment],
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
            )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            f"accelerator {options.accelerator}, devices {started.devices}, strategy"
            f" {options.strategy}, precision {options.precision}: {one_line(error)}"
        ) from error
    return Run(options, data, network, module, trainer)


def _strategy(options: Options, started: Launch) -> Strategy | str:
    """How processes train one network together."""
    if options.strategy == "auto" and started.processes == 1:
        return "auto"
    if options.strategy == "fsdp":
        return ShardedStrategy(
            started.processes, started.timeout, channels_last=options.channels_last
        )
    return DDPStrategy(timeout=started.timeout)


def _choose_validation(options: Options, data: SeededDataModule) -> None:
    """
    Raises:
        ConfigError: the epoch to report is to be chosen on images that there are none of.
    """
    if options.report_epoch == "best_on_validation" and data.validation_set is None:
        raise ConfigError(
            "report_epoch: got 'best_on_validation' without validation images, want data.validation"
            " above 0"
        )
    if options.report_epoch == "best_on_test":
        if data.validation_set is not None:
            raise ConfigError(
                "report_epoch: got 'best_on_test' with validation images,"
                " want 'best_on_validation', or data.validation 0"
            )
        data.validation_set = data.test_set
        data.validation_source = (
            "the test split: the epoch reported is chosen on what it is tested on"
        )


def _loggers(folder: Path) -> list[Logger]:
    """Logs as CSV, and for TensorBoard where it is installed."""
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    try:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    except ModuleNotFoundError:
        warnings.warn(
            "tensorboard is not installed, logs are CSV alone; it comes with:"
            f" {install_command('train')}",
            stacklevel=3,
        )
    return loggers


def _try_image(options: Options, network: InterpretableNetwork, data: SeededDataModule) -> Work:
    """What training takes, by a forward pass.

    Raises:
        ConfigError: the network cannot take the images, or so small a batch of them.
    """
    image = try_image(network, data, f"backbone: {options.backbone['name']}")
    cost = work(network, image, inserted=options.insert_conv)
    network.train()
    if options.batch_size == 1:
        before = copy.deepcopy(network.state_dict())
        try:
            network(image)
        except ValueError as error:  # batch normalisation of maps of one position
            raise ConfigError(f"batch_size: got 1, want at least 2: {error}") from error
        network.load_state_dict(before)
    return cost


def try_image(
    network: InterpretableNetwork, data: SeededDataModule | torch.Tensor, what: str
) -> torch.Tensor:
    """A test image ``[1, C, H, W]`` of the data, or the one that is given, once it is taken.

    Raises:
        ConfigError: it cannot take the image, or makes no finite numbers of it; the message begins
            with ``what``, or with the method.
    """
    if isinstance(data, torch.Tensor):
        image = data
    else:
        with reading_images():
            image = data.test_set[0][0][None]
    height, width = image.shape[2:]
    try:
        with torch.no_grad():
            maps, bypass = network.eval().encode(image)
            logits = network.head_logits(maps, bypass=bypass)
            finite = bool(logits.isfinite().all())
            if finite:
                what = type(network).__name__  # what goes wrong from here on is the method's
                network(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{what} cannot take images of {width} x {height} pixels and"
            f" {counted(image.shape[1], 'channel')}: {one_line(error)}"
        ) from error
    if not finite:
        raise ConfigError(
            f"{what} makes NaN or infinity of the first image: its training diverged, or its"
            " weights are damaged; want another one"
        )
    return image


def fit(run: Run, *, progress: bool = True) -> Figures:
    """Train from the last checkpoint in the run's folder, if there is one, then evaluate.

    Several processes train and evaluate together; each test image counts once. The network that is
    measured is that of the first, as its checkpoint has it.

    Args:
        run: as of ``assemble``; it can be fitted once.
        progress: show progress.

    Returns:
        As ``evaluate``; empty in every process but the first.

    Raises:
        ConfigError: an image cannot be read.
        RunFolderError: the checkpoint in the folder cannot be gone on from.
        DivergenceError: the loss is no finite number.
    """
    trainer = run.trainer
    checkpoint = Path(trainer.default_root_dir) / CHECKPOINT
    with _quiet(), reading_images(), _compiling(run.options):
        trainer.fit(run.module, run.data, ckpt_path=checkpoint if checkpoint.exists() else None)
        run = _settled(run, checkpoint)
        try:
            figures = _evaluate(run, checkpoint.with_name(BEST), progress=progress)
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if trainer.global_rank != 0:
            return {}
        for name, value in figures.items():
            if name in FIGURES and isinstance(value, float):
                said = FIGURES[name].remark(value)
                if said is not None:
                    warnings.warn(said, stacklevel=2)
        return figures


@contextmanager
def _compiling(options: Options) -> Iterator[None]:
    """What the compiler cannot do, told in a line.

    Raises:
        ConfigError: in place of what torch raises.
    """
    try:
        yield
    except TorchDynamoException as error:
        if not options.compile:
            raise
        raise ConfigError(
            "compile: torch.compile failed, want false, or a machine where it works:"
            f" {one_line(error).split(' Set TORCH')[0][:300]}"
        ) from error


def _evaluate(run: Run, best: Path, *, progress: bool) -> Figures:
    """The figures of the epoch to report, on every process."""
    with agreeing():
        if run.trainer.global_rank == 0:
            for remark in run.network.remarks():
                warnings.warn(remark, stacklevel=2)
            if run.options.report_epoch != "last" and best.exists():
                run.module.load_state_dict(read_checkpoint(best)["state_dict"])
    # Measured in float32, as from the checkpoint, also after training with 64-true.
    return evaluate(
        run.network.float(),
        run.data,
        seed=run.options.seed,
        device=run.trainer.strategy.root_device,
        progress=progress and sys.stdout.isatty(),
    )


def _settled(run: Run, checkpoint: Path) -> Run:
    """The run with its network whole, from its last checkpoint, which becomes one file."""
    trainer = run.trainer
    if not isinstance(trainer.strategy, ShardedStrategy):
        return run
    with agreeing():  # none reads on before it is written
        if trainer.global_rank == 0:
            settle(checkpoint)
    network = load_checkpoint(checkpoint)[0]
    run.module.network = network
    return run._replace(network=network)


def build_data(options: Options) -> SeededDataModule:
    """The data module that options ask for, with one category singled out where they say so.

    Raises:
        ConfigError: the data is not there, or too little of it.
    """
    name = options.data["name"]
    try:
        data: SeededDataModule = DATA[name](
            batch_size=options.batch_size, seed=options.seed, **options.arguments("data")
        )
        data.setup("fit")
    except (OSError, TypeError, ValueError) as error:
        text = qualified(error, "data", name)
        raise ConfigError(text if text.startswith("data.") else f"data: {text}") from error
    images = len(data.test_set)  # type: ignore[arg-type]
    if images < 3:
        raise ConfigError(
            f"data: got {counted(images, 'test image')}, want at least 3 to measure MIS"
        )
    if options.category is not None:
        try:
            data.single_out(options.category)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return data


def read_metrics(folder: Path, methods: Collection[str]) -> dict[str, Figures]:
    """What ``metrics.json`` of a complete run says of these methods; see ``read_figures``.

    Raises:
        RunFolderError: it is gone or damaged.
    """
    path = folder / METRICS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        figures: dict[str, Figures] = {}
        for method in methods:
            if not isinstance(content, dict) or method not in content:
                raise ValueError(f"it holds no figures of {method}")
            figures[method] = read_figures(content[method])
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"output: {path} cannot be read: {error}; redo the run with --overwrite"
        ) from error
    return figures


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware found, on workers, and on folders it resumes in."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*but have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", message=".*across ranks is zero.*")
        # Those of a performer, whose place that is.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def reading_images() -> Iterator[None]:
    """An image that cannot be read is told in a line, whichever process was reading it."""
    try:
        yield
    except RuntimeError as error:
        killed = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if killed is None:
            raise
        raise ConfigError(
            f"data.num_workers: a process that reads images was killed ({killed[1]}), perhaps for"
            " want of memory; want fewer of them"
        ) from error
    except (DamagedFileError, FileNotFoundError) as error:
        if error.errno is not None:  # of the system: no image, but a log or a checkpoint
            raise
        # Of a loader's process the message is a traceback, which ends with what happened.
        text = str(error).rpartition(f"{type(error).__name__}: ")[2]
        raise ConfigError(f"data: {' '.join(text.splitlines())}") from error


def read_history(folder: Path) -> list[dict[str, float]]:
    """Logged values of each epoch of the run in ``folder``, interruptions and all.

    Returns:
        One mapping an epoch in order, from ``epoch`` (from 0), ``train/<term>`` and
        ``val/acc1`` … to values.
    """
    epochs: dict[int, dict[str, float]] = {}
    # Each resumption logs to a version of its own; epochs it repeated count as it had them.
    versions = sorted((folder / "csv").glob("version_*"), key=lambda p: int(p.name.split("_")[1]))
    for version in versions:
        if not (version / "metrics.csv").is_file():
            continue
        with open(version / "metrics.csv", encoding="utf-8", newline="") as file:
            # A full disk cuts the last row short.
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                epoch = int(row["epoch"])
                values = {key: float(value) for key, value in row.items() if value}
                epochs.setdefault(epoch, {}).update({**values, "epoch": float(epoch)})
    return [epochs[epoch] for epoch in sorted(epochs)]
