"""One training run: build, fit, evaluate, write.

``train`` is what ``picnn-fast train`` does; ``fit`` is one network in one folder.
"""

import csv
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from picnn_fast._extras import extra
from picnn_fast.backbones import receptive_field
from picnn_fast.data import (
    CUB200,
    AnimalPart,
    DigitsDataModule,
    ImageFolderDataModule,
    PartAnimals,
    PartDataModule,
    PartDataset,
    PartSample,
    VOCPart,
)
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.photographs import DamagedFileError
from picnn_fast.metrics import LocationInstability, PartInterpretability
from picnn_fast.models import make_interpretable
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops.templates import PartTemplate
from picnn_fast.training.config import ConfigError, TrainConfig, options
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.run_folder import RunFolder, RunFolderError, write_json

with extra("train"):
    import lightning as L
    from lightning.fabric.accelerators.cuda import CUDAAccelerator
    from lightning.fabric.accelerators.mps import MPSAccelerator
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.utilities import rank_zero_only

CHECKPOINT = "last.ckpt"
METRICS = "metrics.json"
_METRIC_NAMES = ("acc1", "acc2", "acc3", "mis")  # of any network and data
_SAVED = "picnn_fast"  # key of what we add to Lightning's checkpoints

# Data with part annotations that has to be fetched, and how many animals are drawn.
ANNOTATED: dict[str, Any] = {"voc-part": VOCPart, "cub": CUB200, "animal-part": AnimalPart}
TRAIN_ANIMALS, TEST_ANIMALS = 2000, 1200
# Of one map; the time of a filter loss grows with the square.
MANY_POSITIONS = 1024
# Of the maps that part interpretability has to keep; it needs somewhat more to compute.
MOST_MAP_BYTES = 3 << 29

Metrics = dict[str, float]


def train(config: TrainConfig, *, overwrite: bool = False, progress: bool = True) -> Metrics:
    """Train and evaluate one network, in ``config.output`` once complete.

    The folder then holds ``metrics.json`` (``{method: {"acc1", "acc2", "acc3", "mis"}}``),
    ``last.ckpt``, ``csv/`` and ``tensorboard/`` logs, and ``run.json``, the options.

    Args:
        config: options.
        overwrite: replace what is in the folder.
        progress: show progress.

    Returns:
        As ``evaluate``; a complete identical run's are read back.
        Empty in the processes that Lightning starts beside the first.

    Raises:
        ConfigError: options that do not go together, a device that is not there, or an image
            folder that is not laid out as expected or holds a damaged image.
        RunFolderError: the folder holds another run, or a damaged one, or cannot be written.
        DivergenceError: the loss is no finite number.
    """
    refuse_launchers()
    folder = train_folder(config)
    if getattr(rank_zero_only, "rank", 0) != 0:
        # A process that Lightning started beside the first one, which looks after the folder.
        return fit(config, folder.work, progress=False)
    if not overwrite and folder.complete():
        return read_metrics(folder.path, [config.method])[config.method]
    data = check(config)
    with folder.writing(overwrite=overwrite) as work:
        metrics = fit(config, work, data=data, progress=progress)
        write_json(work / METRICS, {config.method: metrics})
    return metrics


def train_folder(config: TrainConfig) -> RunFolder:
    """The folder of the run with these options."""
    return RunFolder(config.output, "train", config.identity())


def check(config: TrainConfig) -> SeededDataModule:
    """Refuse, before anything is written, options that no training can start with.

    Returns:
        The data, as of ``build_data``.

    Raises:
        ConfigError: data, network or devices cannot be had.
    """
    check_accelerator(config.accelerator)
    data = build_data(config)
    network = build_network(config, data).eval()
    with _reading_images():
        image = data.test_set[0][0]
    try:
        with torch.no_grad():
            activations = getattr(network(image[None]), "activations", ())
        if isinstance(data, PartDataModule):
            receptive_field(network.features, (image.shape[1], image.shape[2]))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"backbone: {config.backbone} cannot take images of {image.shape[2]} x"
            f" {image.shape[1]} pixels: {error}"
        ) from error
    maps = max(activations, key=lambda maps: maps[0, 0].numel(), default=None)
    if maps is not None and maps[0, 0].numel() > MANY_POSITIONS:
        warnings.warn(
            f"backbone: {config.backbone} makes maps of {maps.shape[3]} x {maps.shape[2]} of images"
            f" of {image.shape[2]} x {image.shape[1]}; filter losses take long on more than"
            f" {MANY_POSITIONS} positions, a deeper backbone or a smaller image_size takes less",
            stacklevel=2,
        )
    if config.batch_size == 1:
        try:
            network.train()(image[None])
        except ValueError as error:  # batch normalisation of maps of one position
            raise ConfigError(f"batch_size: got 1, want at least 2: {error}") from error
    try:
        with _quiet():
            L.Trainer(
                accelerator=config.accelerator,
                devices=config.devices,
                strategy=config.strategy,
                precision=config.precision,  # type: ignore[arg-type]
                logger=False,
                enable_checkpointing=False,
            )
    except (MisconfigurationException, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"accelerator {config.accelerator}, devices {config.devices}, strategy"
            f" {config.strategy}, precision {config.precision}: {text}"
        ) from error
    return data


def check_accelerator(accelerator: str) -> None:
    """
    Raises:
        ConfigError: there is no such device.
    """
    there = {
        "gpu": CUDAAccelerator.is_available() or MPSAccelerator.is_available(),
        "mps": MPSAccelerator.is_available(),
    }
    if not there.get(accelerator, True):
        raise ConfigError(
            f"accelerator: got {accelerator!r}, but torch finds none here; want cpu or auto"
        )


def read_metrics(folder: Path, methods: Collection[str]) -> dict[str, Metrics]:
    """What ``metrics.json`` of a complete run says of these methods.

    Raises:
        RunFolderError: it is gone or damaged.
    """
    path = folder / METRICS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for method in methods:
            if not (isinstance(content, dict) and _are_metrics(content.get(method))):
                raise ValueError(f"it holds no figures of {method}")
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"output: {path} cannot be read: {error}; redo the run with --overwrite"
        ) from error
    return {method: content[method] for method in methods}


def _are_metrics(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and values.keys() >= set(_METRIC_NAMES)
        and all(isinstance(value, int | float) for value in values.values())
    )


def refuse_launchers() -> None:
    """A run starts its own processes: every process of an outside launcher would open the folder.

    Raises:
        ConfigError: several processes were started by torchrun or by SLURM.
    """
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and environment().world_size() > 1:
            raise ConfigError(
                "devices: started by torchrun or srun with several processes; start one process"
                " and give --devices, it starts the others by itself"
            )


def fit(
    config: TrainConfig, folder: Path, *, data: SeededDataModule | None = None, progress: bool
) -> Metrics:
    """Train in ``folder``, from its last checkpoint if there is one, then evaluate.

    With several devices all ranks train and the first alone evaluates, so that no test image
    counts twice.

    Args:
        config: options.
        folder: of the checkpoint and logs.
        data: as of ``build_data``; None builds it.
        progress: show progress.

    Returns:
        As ``evaluate``; empty on ranks other than 0.

    Raises:
        ConfigError: an image cannot be read.
        RunFolderError: the checkpoint in the folder cannot be gone on from.
        DivergenceError: the loss is no finite number.
    """
    if data is None:
        data = build_data(config)
    checkpoint = folder / CHECKPOINT
    resume = checkpoint if checkpoint.exists() else None
    if resume:
        try:
            load_checkpoint(resume)
        except RunFolderError as error:
            raise RunFolderError(f"{error}; remove {folder} to start anew") from error
    with _quiet(), _reading_images():
        # Weights, and the random correspondence matrix of STD, follow from the seed.
        L.seed_everything(config.seed, workers=False, verbose=False)
        network = build_network(config, data)
        module = _module(config, network)
        callbacks: list[Callback] = [
            _SaveOptions(config, data),
            ModelCheckpoint(
                dirpath=folder, filename=Path(CHECKPOINT).stem, enable_version_counter=False
            ),
        ]
        if progress:
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else EpochLines())
        trainer = L.Trainer(
            default_root_dir=folder,
            max_epochs=config.epochs,
            precision=config.precision,  # type: ignore[arg-type]
            accelerator=config.accelerator,
            devices=config.devices,
            strategy=config.strategy,
            logger=[
                CSVLogger(folder, name="csv"),
                TensorBoardLogger(folder, name="tensorboard", version=""),
            ],
            callbacks=callbacks,
            plugins=[_AtomicCheckpoints()],
            enable_progress_bar=progress and sys.stdout.isatty(),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(module, data, ckpt_path=resume)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if trainer.global_rank != 0:
            return {}
        # Measured in float32, as from the checkpoint, also after training with 64-true.
        return evaluate(network.float(), data, seed=config.seed, accelerator=config.accelerator)


def evaluate(
    network: InterpretableNetwork,
    data: SeededDataModule,
    *,
    seed: int = 0,
    accelerator: str = "auto",
) -> Metrics:
    """ACC1, ACC2, ACC3 and MIS of a network on the test split, on one device.

    Of data with part annotations (``PartDataModule``) also the metrics of part semantics.

    Args:
        network: PICNN, ICNN or STD.
        data: data module.
        seed: of the masks and pseudo-labels that are drawn.
        accelerator: device type.

    Returns:
        acc1, acc2, acc3 in [0, 1], mis in nats; location_instability in image diagonals and
        part_interpretability in [0, 1].

    Raises:
        ConfigError: there is no such device, or an image cannot be read.
    """
    check_accelerator(accelerator)
    with _quiet(), _reading_images():
        tester = L.Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = InterpretableModule(network, seed=seed)
        (values,) = tester.test(module, data, verbose=False)
        metrics = {name: float(values[f"test/{name}"]) for name in _METRIC_NAMES}
        if isinstance(data, PartDataModule):
            metrics |= evaluate_parts(network, data, device=tester.strategy.root_device)
    return metrics


@torch.no_grad()
def evaluate_parts(
    network: InterpretableNetwork, data: PartDataModule, *, device: torch.device | str = "cpu"
) -> Metrics:
    """Location instability and part interpretability of the target layer on the test split.

    Where one category was singled out, of its images alone, as in the paper's tables 1 and 3.

    Returns:
        location_instability and part_interpretability, where the data has landmarks and masks, and
        images enough to tell. Part interpretability is left out, with a warning, where the maps of
        all test images would take more than 1.5 GiB.
    """
    network = network.to(device).eval()
    samples = data.part_sets["test"]
    seen = receptive_field(network.features, samples.image_size)
    classes = 1 if data.category is not None else data.num_classes
    parts = {
        "landmarks": (LocationInstability, len(samples.landmark_names)),
        "part_masks": (PartInterpretability, len(samples.part_names)),
    }
    if len(samples) * network.num_filters * math.prod(seen.map_size) * 4 > MOST_MAP_BYTES:
        warnings.warn(
            f"part_interpretability: left out, the maps of {len(samples)} images would take more"
            f" than {MOST_MAP_BYTES / 2**30:g} GiB",
            stacklevel=2,
        )
        del parts["part_masks"]
    metrics = {
        field: metric(network.num_filters, count, seen, num_classes=classes).to(device)
        for field, (metric, count) in parts.items()
        if count > 0
    }
    for batch in data.part_loader("test"):
        if data.category is not None:
            shown = batch.label == data.category
            if not shown.any():
                continue
            batch = PartSample(*(values[shown] for values in batch))
        labels = (batch.label if data.category is None else batch.label * 0).to(device)
        maps = network.filter_maps(data.normalise(batch.image.to(device)))
        for field, metric in metrics.items():
            metric.update(maps, getattr(batch, field).to(device), labels)
    names = {"landmarks": "location_instability", "part_masks": "part_interpretability"}
    values = {
        names[field]: float(metric.compute())
        for field, metric in metrics.items()
        if metric.update_called
    }
    # NaN: too few images of a category to tell.
    return {name: value for name, value in values.items() if not math.isnan(value)}


def build_data(config: TrainConfig) -> SeededDataModule:
    """The data module an option set asks for, set up.

    Raises:
        ConfigError: the data is not there, or does not suit the network.
    """
    if (config.category is None) == (config.task == "single"):
        raise ConfigError(
            f"category: got {config.category!r} with task {config.task}, want a class with task"
            " single, and none without"
        )
    if config.data == "digits":
        if config.backbone != "small-resnet":
            raise ConfigError(
                f"backbone: got {config.backbone!r} with the digits, 8x8 grey images;"
                " want small-resnet, or a folder of images as data"
            )
        digits = DigitsDataModule(
            config.batch_size,
            seed=config.seed,
            max_shift=int(config.augment),
            num_workers=config.num_workers or 0,
        )
        digits.setup()
        data: SeededDataModule = digits
    else:
        try:
            data = _images(config)
        except (OSError, ValueError) as error:
            text = str(error).removeprefix("root: ")
            option = "" if text.startswith("image_size: ") else "data: "
            raise ConfigError(option + text) from error
    images = len(data.test_set)  # type: ignore[arg-type]
    if images < 3:
        raise ConfigError(f"data: got {images} test images, want at least 3 to measure MIS")
    if config.category is not None:
        try:
            data.single_out(config.category)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return data


def _images(config: TrainConfig) -> SeededDataModule:
    workers = config.num_workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    kind, _, folder = config.data.partition(":")
    if kind in ANNOTATED and not folder:
        raise ValueError(f"got {config.data!r}, want {kind}:FOLDER")
    if config.data == "part-animals" or (kind in ANNOTATED and folder):
        if config.data == "part-animals":
            size = config.image_size or 128
            train_set: PartDataset = PartAnimals("train", TRAIN_ANIMALS, image_size=size)
            test_set: PartDataset = PartAnimals("test", TEST_ANIMALS, image_size=size)
            workers = config.num_workers or 0  # in memory
        else:
            size = config.image_size or 224
            train_set = ANNOTATED[kind](folder, "train", image_size=size)
            test_set = ANNOTATED[kind](folder, "test", image_size=size)
        return PartDataModule(
            train_set,
            test_set,
            config.batch_size,
            seed=config.seed,
            num_workers=workers,
            flip=config.augment,
        )
    images = ImageFolderDataModule(
        config.data,
        config.batch_size,
        image_size=config.image_size or 224,
        seed=config.seed,
        augment=config.augment,
        num_workers=workers,
    )
    images.setup()
    return images


def build_network(config: TrainConfig, data: SeededDataModule) -> InterpretableNetwork:
    """The network an option set asks for, for the classes and channels of ``data``."""
    return _network(config, data.num_classes, data.in_channels)


def _network(config: TrainConfig, num_classes: int, in_channels: int) -> InterpretableNetwork:
    extras: dict[str, Any]
    if config.method == "icnn":
        profile, _, norm = config.template.rpartition("-")
        extras = {
            "template": PartTemplate(
                norm,  # type: ignore[arg-type]
                profile or "gradient",  # type: ignore[arg-type]
                tau=config.tau,
            ),
            "estimator": config.estimator,
            "task": config.task,
            "filter_loss_weight": config.filter_loss_weight,
        }
    else:
        if config.task == "logistic":
            raise ConfigError(
                f"task: got logistic with method {config.method}, want softmax or single, or"
                " method icnn"
            )
        extras = {
            "normalization": config.normalization,
            "mask_at": config.mask_at,
            "inserted_activation": config.inserted_activation,
        }
    if config.method == "picnn":
        extras |= {
            "sampling": config.sampling,
            "initial": config.initial,
            "correspondence_lr": config.correspondence_lr,
            "correspondence_weight_decay": config.correspondence_weight_decay,
            "interpretation_loss_on": config.interpretation_loss_on,
            "interpretation_weight": config.interpretation_weight,
        }
    try:
        return make_interpretable(
            config.backbone,
            method=config.method,
            num_classes=num_classes,
            num_filters=config.num_filters,
            insert_conv=config.insert_conv,
            image_channels=in_channels,
            **extras,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _module(config: TrainConfig, network: InterpretableNetwork) -> InterpretableModule:
    return InterpretableModule(
        network,
        lr=config.lr,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        warmup_epochs=config.warmup_epochs,
        mutual_information_weight=config.mutual_information_weight,
        seed=config.seed,
    )


class _SaveOptions(Callback):
    """Adds to a checkpoint what is needed to build its network again."""

    def __init__(self, config: TrainConfig, data: SeededDataModule) -> None:
        self.saved = {
            "config": config.as_dict(),
            "num_classes": data.num_classes,
            "in_channels": data.in_channels,
            "class_names": list(data.class_names),
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_SAVED] = self.saved


class _AtomicCheckpoints(TorchCheckpointIO):
    """Lightning moves a file over from the system's temporary folder, which may copy: a kill then
    leaves half a checkpoint. Here it is renamed within its folder."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class EpochLines(Callback):
    """A line an epoch, where there is no terminal to draw a progress bar on."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {
            name: f"{value.item():.3f}"
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith("val/")
        }
        width = len(str(trainer.max_epochs))
        print(
            f"epoch {trainer.current_epoch + 1:{width}}/{trainer.max_epochs}",
            *(f"{name.removeprefix('val/')} {value}" for name, value in values.items()),
            sep="  ",
            flush=True,
        )


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
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _reading_images() -> Iterator[None]:
    """An image that cannot be read is told in a line, whichever process was reading it."""
    try:
        yield
    except (DamagedFileError, FileNotFoundError) as error:
        if error.errno is not None:  # of the system: no image, but a log or a checkpoint
            raise
        # Of a loader's process the message is a traceback, which ends with what happened.
        text = str(error).rpartition(f"{type(error).__name__}: ")[2]
        raise ConfigError(f"data: {' '.join(text.splitlines())}") from error


def load_checkpoint(path: str | Path) -> tuple[InterpretableNetwork, TrainConfig, list[str]]:
    """The network in a checkpoint of ``train``, with its options and the names of its classes.

    Raises:
        FileNotFoundError: no such file.
        RunFolderError: not a checkpoint of picnn-fast, damaged, or of another version's.

    Example:
        >>> from picnn_fast.training.run import load_checkpoint
        >>> network, config, names = load_checkpoint("runs/demo/picnn/last.ckpt")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu")
        saved = content[_SAVED]
        unknown = saved["config"].keys() - {field.name for field in options()}
    except PermissionError as error:
        raise RunFolderError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except Exception as error:
        raise RunFolderError(f"checkpoint: {path} is not one of picnn-fast train") from error
    if unknown:
        raise RunFolderError(
            f"checkpoint: {path} is of another version of picnn-fast, with the options"
            f" {', '.join(sorted(map(str, unknown)))}, which this one does not know"
        )
    prefix = "network."
    try:
        config = TrainConfig(**saved["config"])
        network = _network(config, saved["num_classes"], saved["in_channels"])
        network.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in content["state_dict"].items()
                if name.startswith(prefix)
            }
        )
        class_names = [str(name) for name in saved["class_names"]]
    except (AttributeError, ConfigError, KeyError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise RunFolderError(
            f"checkpoint: {path} is damaged, or of another version of picnn-fast: {text}"
        ) from error
    return network.eval(), config, class_names


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
            for row in csv.DictReader(file):
                epoch = int(row["epoch"])
                values = {key: float(value) for key, value in row.items() if value}
                epochs.setdefault(epoch, {}).update({**values, "epoch": float(epoch)})
    return [epochs[epoch] for epoch in sorted(epochs)]


def find_checkpoints(path: str | Path) -> list[Path]:
    """The checkpoints of a run: the file itself, ``path/last.ckpt``, or one per sub-folder.

    Hidden folders, such as those of interrupted runs, do not count.

    Raises:
        FileNotFoundError: none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    direct = path / CHECKPOINT
    found = [direct] if direct.is_file() else sorted(path.glob(f"[!.]*/{CHECKPOINT}"))
    if not found:
        raise FileNotFoundError(
            f"run: {path} holds no {CHECKPOINT}; want a checkpoint, or the folder of a run"
        )
    return found
