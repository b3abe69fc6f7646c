"""Checkpoints: written whole or not at all, and read back as a network with its options."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from picnn_fast._extras import extra
from picnn_fast._files import replacing
from picnn_fast._terminal import counted
from picnn_fast.data import ImageFolderDataModule, Preprocessing, SeededDataModule
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.convert import published_picnn
from picnn_fast.models.pretrained import CARD
from picnn_fast.training import shards
from picnn_fast.training.options import (
    BY_IMAGE_SIZE,
    ConfigError,
    Options,
    few,
    one_line,
    qualified,
)
from picnn_fast.training.run_folder import RunFolderError

with extra("train"):
    import lightning as L
    from lightning.pytorch.callbacks import Callback, Checkpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO

CHECKPOINT = "last.ckpt"
BEST = "best.ckpt"  # of the epoch to report, where that is not the last
_SAVED = "picnn_fast"  # key of what we add to Lightning's checkpoints
_TRAINING = "training"  # key of the same among the notes of a card
_PREFIX = "network."  # of the network's parameters in the module that trains it


class Source(NamedTuple):
    """A trained network that another is put on, and what its checkpoint says of it."""

    network: InterpretableNetwork
    saved: dict[str, Any]


def build_network(
    options: Options,
    num_classes: int,
    in_channels: int,
    source: Source | None = None,
    *,
    weights: bool = True,
) -> InterpretableNetwork:
    """The network that options ask for.

    Args:
        options: of the run.
        num_classes: K.
        in_channels: of the images.
        source: of ``read_source``; None reads it, where the options name one.
        weights: whether with the trained weights that the options name, which need not be there any
            more where those of a checkpoint follow.

    Raises:
        ConfigError: options that do not go together.
    """
    source = read_source(options) if source is None else source
    try:
        if source is not None:
            _check_source(options, source, num_classes, in_channels)
        named = {"image_channels": in_channels, **options.arguments("backbone")}
        if not weights:
            named["weights"] = None
        if source is not None:
            named = {"layer": named["layer"]}
        network = make_interpretable(
            options.backbone["name"] if source is None else source.network,
            options.method["name"],
            num_classes=num_classes,
            num_filters=options.num_filters,
            insert_conv=options.insert_conv,
            insert_kernel=options.insert_kernel,
            **named,
            **options.arguments("method"),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(_as_option(error, options, num_classes, in_channels)) from error
    # Convolutions take the layout of their weights, whatever that of the images is.
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return network.to(memory_format=layout)


def read_source(options: Options) -> Source | None:
    """The network of the run that the method is put on, or None where it is put on a backbone.

    Raises:
        ConfigError: no run is named, or none is there, or it cannot be read.
    """
    option = METHODS[options.method["name"]].network_from
    if option is None:
        return None
    path = options.source()
    if path is None:
        raise ConfigError(
            f"method.{option}: got null, want the folder of a run of picnn-fast train, or its"
            " checkpoint"
        )
    try:
        found = find_checkpoints(path)
        if len(found) > 1:
            raise ConfigError(
                f"method.{option}: got {path}, which holds {few([str(x) for x in found])}; want one"
            )
        content = read_checkpoint(found[0])
        return Source(_network_in(content), content[_SAVED])
    except (FileNotFoundError, RunFolderError) as error:
        text = str(error).partition(": ")[2]
        raise ConfigError(f"method.{option}: {text}") from error


def _check_source(options: Options, source: Source, num_classes: int, in_channels: int) -> None:
    """
    Raises:
        ValueError: another backbone, or data of other classes or channels, than the source's.
    """
    config, backbone = source.saved["config"], options.backbone
    own = Options(**config)
    name = own.backbone["name"]
    if backbone["name"] not in (BY_IMAGE_SIZE, name):
        raise ValueError(
            f"backbone: got {backbone['name']!r}, want {name!r}, as of {options.source()}, or none"
        )
    for option, default in (("weights", None), ("stem", "default")):
        if backbone[option] not in (default, own.backbone[option]):
            raise ValueError(
                f"backbone.{option}: got {backbone[option]!r}, want {default or 'null'}: those of"
                f" {options.source()} are taken"
            )
    for what, got, want in (
        ("classes", num_classes, source.saved["num_classes"]),
        ("channels", in_channels, source.saved["in_channels"]),
    ):
        if got != want:
            raise ValueError(
                f"data: got images of {got} {what}, want {want}, as {options.source()} was trained"
                " on"
            )


def _as_option(error: Exception, options: Options, num_classes: int, in_channels: int) -> str:
    """An error about an argument of the network, as one about what a run can be told."""
    argument = str(error).partition(":")[0]
    if argument == "image_channels":
        return (
            f"backbone.weights: got {options.backbone['weights']!r} with images of {in_channels}"
            " channels, want null, or data of colour images, which trained weights take"
        )
    if argument == "num_classes" and options.method.get("task") == "single":
        return (
            f"method.task: got 'single' with {counted(num_classes, 'class')}, want --category NAME,"
            " the class that is told from all others"
        )
    for key in ("method", "backbone"):
        text = qualified(error, key, getattr(options, key)["name"])
        if text != str(error):
            return text
    return str(error)


class SaveOptions(Callback):
    """Adds to a checkpoint what is needed to build its network again."""

    def __init__(
        self, options: Options, data: SeededDataModule, source: Source | None = None
    ) -> None:
        self.saved: dict[str, Any] = {
            "config": options.as_dict(),
            "num_classes": data.num_classes,
            "in_channels": data.in_channels,
            "class_names": list(data.class_names),
            "preprocessing": None if data.preprocessing is None else data.preprocessing.as_dict(),
        }
        if source is not None:  # its weights are in the network's own
            self.saved["source"] = source.saved

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_SAVED] = self.saved


class StepCheckpoints(Checkpoint):
    """Writes a checkpoint every so many steps, but where that of the epoch's end comes next.

    Args:
        path: of the file, which the one of the epoch's end replaces, too.
        every: steps.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,  # that of picnn-fast
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        before, self._steps = self._steps, trainer.global_step
        # Of batches that make a step together the last does: gradients of the others are not saved.
        if self._steps == before or self._steps % self.every or trainer.is_last_batch:
            return
        pl_module.check_weights(batch[0])
        trainer.save_checkpoint(self.path)


class FollowSchedule(Callback):
    """Learning rates are those of this run's schedule, also where it goes on with a shorter run.

    A checkpoint holds the rates that the shorter run would have gone on with.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            groups = schedule.optimizer.param_groups
            for group, lr, share in zip(
                groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = lr * share(schedule.last_epoch)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that a kill leaves whole, and that are told in a line where they are not.

    Lightning moves a file over from the system's temporary folder, which may copy: a kill then
    leaves half a checkpoint. Here it is renamed within its folder.

    Args:
        class_names: of the data; a checkpoint of other classes is refused.
    """

    def __init__(self, class_names: Sequence[str] | None = None) -> None:
        self.class_names = class_names

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
            said = checkpoint.get(shards.KEY)
            shards.remove(path, keep=None if said is None else said["folder"])
        except RuntimeError as error:
            # torch tells that its archive is short, and not what the system said.
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else error from None
        finally:
            torch.serialization.set_crc32_options(checksums)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self._checked(Path(path), whole=True)

    def load_rest(self, path: Path) -> dict[str, Any]:
        """What the file itself holds, without the shards that it may name."""
        return self._checked(path, whole=False)

    def load_shards(self, path: Path, said: Any, like: Any) -> dict[str, torch.Tensor]:
        """See ``shards.read``, by all processes together."""
        try:
            return shards.read(path, said, like, together=True)
        except shards.DamagedShardsError as error:
            raise RunFolderError(
                f"checkpoint: {path} is damaged: {error}; remove {path.parent} to start anew"
            ) from error

    def _checked(self, path: Path, *, whole: bool) -> dict[str, Any]:
        try:
            content = read_checkpoint(path, whole=whole)
            names = [str(name) for name in content[_SAVED].get("class_names") or ()]
            if self.class_names is not None and names != list(self.class_names):
                raise RunFolderError(
                    f"checkpoint: {path} is of other classes ({few(names)}) than the data"
                    f" ({few(self.class_names)})"
                )
            return content
        except RunFolderError as error:
            raise RunFolderError(f"{error}; remove {path.parent} to start anew") from error


def settle(path: Path) -> None:
    """Make a checkpoint of shards one file, as all that is not training reads it.

    Raises:
        RunFolderError: see ``read_checkpoint``.
    """
    content = read_checkpoint(path)
    if content.pop(shards.KEY, None) is not None:
        WholeCheckpoints().save_checkpoint(content, path)


def read_checkpoint(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """The content of a checkpoint of ``train``, on the CPU.

    Args:
        path: of its file.
        whole: whether with the tensors that lie in shards beside it, where there are any.

    Raises:
        FileNotFoundError: no such file.
        RunFolderError: not a checkpoint of picnn-fast, damaged, or of another version's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    try:
        damaged = _damaged_part(path)
        if damaged is not None:
            raise RunFolderError(f"checkpoint: {path} is damaged: {damaged} is not as it was saved")
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content[_SAVED]["config"]
        if whole and shards.KEY in content:
            content = shards.put_together(content, shards.read(path, content[shards.KEY]))
    except shards.DamagedShardsError as error:
        raise RunFolderError(f"checkpoint: {path} is damaged: {error}") from error
    except RunFolderError:
        raise
    except PermissionError as error:
        raise RunFolderError(f"checkpoint: cannot read {path}: {error.strerror}") from error
    except Exception as error:
        raise RunFolderError(f"checkpoint: {path} is not one of picnn-fast train") from error
    if isinstance(saved, dict) and isinstance(saved.get("method"), str):
        raise RunFolderError(
            f"checkpoint: {path} is of an earlier picnn_fast, which had other names for its"
            " options; train it again"
        )
    return content  # type: ignore[no-any-return]


def _damaged_part(path: Path) -> str | None:
    """The part of a checkpoint whose checksum is wrong, which torch does not look at."""
    with open(path, "rb") as file:
        begun = file.read(2) == b"PK"
    if not begun and not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception as error:  # of many kinds, by what was damaged
        return f"the archive ({one_line(error)})"


def load_checkpoint(path: str | Path) -> tuple[InterpretableNetwork, Options, list[str]]:
    """The network in a checkpoint of ``train``, with its options and the names of its classes.

    Raises:
        FileNotFoundError: no such file.
        RunFolderError: not a checkpoint of picnn-fast, damaged, or of another version's.

    Example:
        >>> from picnn_fast.training.checkpoint import load_checkpoint
        >>> network, options, names = load_checkpoint("runs/demo/picnn/last.ckpt")  # doctest: +SKIP
    """
    content = read_checkpoint(Path(path))
    try:
        saved = content[_SAVED]
        options = Options(**saved["config"])
        network = _network_in(content)
        class_names = [str(name) for name in saved["class_names"]]
    except (AttributeError, ConfigError, KeyError, RuntimeError, TypeError) as error:
        raise RunFolderError(
            f"checkpoint: {path} is damaged, or of another version of picnn-fast: {one_line(error)}"
        ) from error
    return network.eval(), options, class_names


def read_preprocessing(path: str | Path) -> Preprocessing | None:
    """How images become what the network in a checkpoint takes; None where it does not tell.

    Raises:
        FileNotFoundError: no such file.
        RunFolderError: not a checkpoint of picnn-fast, damaged, or of another version's.
    """
    told = read_checkpoint(Path(path))[_SAVED].get("preprocessing")
    return None if told is None else Preprocessing(**told)


def _network_in(content: dict[str, Any]) -> InterpretableNetwork:
    """The trained network in the content of a checkpoint."""
    network = _untrained(content[_SAVED])
    network.load_state_dict(
        {
            name.removeprefix(_PREFIX): value
            for name, value in content["state_dict"].items()
            if name.startswith(_PREFIX)
        }
    )
    return network.eval()


def _untrained(saved: dict[str, Any]) -> InterpretableNetwork:
    """The network that a checkpoint is of, without its weights; no other file is wanted."""
    below = saved.get("source")
    source = None if below is None else Source(_untrained(below), below)
    options = Options(**saved["config"])
    return build_network(options, saved["num_classes"], saved["in_channels"], source, weights=False)


def find_checkpoints(path: str | Path) -> list[Path]:
    """The checkpoints of a run: the file itself, the one in the folder, or one per sub-folder.

    That is ``best.ckpt`` where a run reports another epoch than the last, else ``last.ckpt``.

    Hidden folders, such as those of interrupted runs, do not count.

    Raises:
        FileNotFoundError: none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    direct = path / CHECKPOINT
    found = [direct] if direct.is_file() else sorted(path.glob(f"[!.]*/{CHECKPOINT}"))
    found = [best if (best := last.with_name(BEST)).is_file() else last for last in found]
    if not found:
        raise FileNotFoundError(
            f"run: {path} holds no {CHECKPOINT}; want a checkpoint, or the folder of a run"
        )
    return found


def convert(source: str | Path, target: str | Path, root: str | Path | None = None) -> None:
    """Write a network in another form.

    Args:
        source: run of picnn-fast, or its checkpoint; folder of ``save_pretrained`` that this wrote;
            or, with ``root``, file of spdj2271/PICNN, a network on ResNet-18.
        target: a folder as of ``save_pretrained``, or, where the source is no checkpoint of ours, a
            file that ends in ``.ckpt``, which ``evaluate`` takes; must not exist.
        root: folder of the images that the authors' network was trained on,
            ``train/<class>/…`` and ``test/<class>/…``: names of the classes, and what ``evaluate``
            measures on.

    Raises:
        ConfigError: another kind of file, classes that do not match, or a target that is there.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ConfigError(f"target: got {target}, which exists; want a new file or folder")
    to_checkpoint = target.suffix == Path(CHECKPOINT).suffix
    if root is not None:
        content = _of_authors(source, target, root)
    elif (source / CARD).is_file():
        if not to_checkpoint:
            raise ConfigError(
                f"target: got {target}, want a file that ends in .ckpt: {source} is such a folder"
            )
        content = _of_folder(source)
    else:
        if to_checkpoint:
            raise ConfigError(
                f"target: got {target} with {source}, want a folder; or, of a file of the authors',"
                " --root, too"
            )
        content = _of_run(source)
    if to_checkpoint:
        target.parent.mkdir(parents=True, exist_ok=True)
        WholeCheckpoints().save_checkpoint(content, target)
        return
    saved = content[_SAVED]
    _network_in(content).save_pretrained(
        target,
        class_names=saved["class_names"],
        preprocessing=saved.get("preprocessing"),
        notes={_TRAINING: saved},
    )


def _of_run(source: Path) -> dict[str, Any]:
    """The content of a checkpoint of ours."""
    try:
        found = find_checkpoints(source)
        if len(found) > 1:
            raise ConfigError(
                f"source: got {source}, which holds {few([str(path) for path in found])}; want one"
            )
        return read_checkpoint(found[0])
    except (FileNotFoundError, RunFolderError) as error:
        text = str(error).partition(": ")[2]
        raise ConfigError(f"source: {text}; a file of the authors' wants --root, too") from error


def _of_folder(folder: Path) -> dict[str, Any]:
    """What a folder of ``save_pretrained`` holds, as a checkpoint."""
    try:
        network = InterpretableNetwork.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"source: {error}") from error
    saved = ((network.card or {}).get("notes") or {}).get(_TRAINING)
    if saved is None:
        raise ConfigError(
            f"source: {folder} tells of no training, want one that picnn-fast convert wrote of a"
            " run; InterpretableNetwork.from_pretrained loads it"
        )
    state = {_PREFIX + name: value for name, value in network.state_dict().items()}
    return {"state_dict": state, _SAVED: saved}


def _of_authors(source: Path, target: Path, root: str | Path) -> dict[str, Any]:
    """A checkpoint of the authors' PICNN as one of ours."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"source: cannot read {source}: {error.strerror}") from error
    except Exception as error:  # of many kinds, with advice over many lines
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ConfigError(
            f"source: {source} holds {code[1]}, which could run code when it is read; want tensors"
            if code
            else f"source: {source} is not a PyTorch checkpoint"
        ) from error
    try:
        state = published_picnn(content)
        if state["correspondence.weight"].ndim != 2:
            raise ValueError("its correlation is no matrix")
    except (AttributeError, TypeError, ValueError) as error:
        text = str(error).removeprefix("checkpoint: ")
        raise ConfigError(f"source: {source} is no checkpoint of PICNN's: {text}") from error
    classes, filters = state["correspondence.weight"].shape
    options = Options(
        method={"name": "picnn", "initial": "published", "inserted_activation": "none"},
        backbone="resnet18",
        num_filters=filters,
        data={"name": "folder", "root": str(Path(root).resolve()), "resize": 256},
        output=str(target.parent),
    )
    try:
        data = ImageFolderDataModule(root, resize=options.data["resize"])
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if data.num_classes != classes:
        raise ConfigError(
            f"root: got {counted(data.num_classes, 'class')} in {root}, want {classes}, those of"
            f" {source}"
        )
    network = build_network(options, classes, data.in_channels)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"source: {source} is not a PICNN on ResNet-18: {one_line(error)}"
        ) from error
    saved = SaveOptions(options, data).saved
    return {"state_dict": {_PREFIX + k: v for k, v in state.items()}, _SAVED: saved}
