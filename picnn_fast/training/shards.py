"""The part of a checkpoint that is dealt out to processes: a folder of shards beside its file.

The file, ``last.ckpt``, holds all else and names the folder, so that a checkpoint is there once its
file is. Shards are written and read by torch.distributed.checkpoint, by any number of processes.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

SHARDS = "shards"  # ends the names of the folders
KEY = "picnn_fast_shards"  # of the file, what it says of its folder
_STATE, _OPTIMIZERS = "state_dict", "optimizer_states"


class DamagedShardsError(RuntimeError):
    """Shards that a checkpoint names are gone, or are not as they were written."""


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """A checkpoint without the tensors that are dealt out, and these by name."""
    sharded: dict[str, DTensor] = {}

    def without(values: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
        own = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, DTensor)}
        sharded.update(own)
        return {k: v for k, v in values.items() if not isinstance(v, DTensor)}

    rest = {**checkpoint, _STATE: without(checkpoint[_STATE], _STATE)}
    states = []
    for number, state in enumerate(checkpoint.get(_OPTIMIZERS, ())):
        of_parameters = {
            key: without(values, f"{_OPTIMIZERS}/{number}/{key}")
            for key, values in state["state"].items()
        }
        states.append({**state, "state": of_parameters})
    if _OPTIMIZERS in checkpoint:
        rest[_OPTIMIZERS] = states
    return rest, sharded


def put_together(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``take_apart`` has taken apart; neither is changed."""
    whole = {**rest, _STATE: dict(rest[_STATE])}
    if _OPTIMIZERS in rest:
        whole[_OPTIMIZERS] = [
            {**state, "state": {key: dict(values) for key, values in state["state"].items()}}
            for state in rest[_OPTIMIZERS]
        ]
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        if kind == _STATE:
            whole[_STATE][key] = tensor
        else:
            number, parameter, part = key.split("/")
            whole[_OPTIMIZERS][int(number)]["state"][int(parameter)][part] = tensor
    return whole


def gathered(sharded: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """Each whole, on the CPU of the first process; the others must ask, too, and get none."""
    whole = {}
    for name, tensor in sharded.items():
        value: Tensor = tensor.full_tensor().detach()
        if distributed.get_rank() == 0:
            whole[name] = value.cpu()
    return whole


def write(path: Path, token: str, sharded: Mapping[str, DTensor]) -> dict[str, Any]:
    """What the file ``path`` is to say of shards, once each process has written its own.

    Args:
        path: of the file to come.
        token: the same on all processes, and new.
        sharded: by name.
    """
    folder = path.with_name(f".{path.name}.{token}.{SHARDS}")
    try:
        save(dict(sharded), checkpoint_id=folder)
    except CheckpointException as error:
        # Of the disk, most often, which says it better than a list of processes does.
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
    return {"folder": folder.name, "sizes": {f.name: f.stat().st_size for f in folder.iterdir()}}


def remove(path: Path, keep: str | None = None) -> None:
    """Remove the shards of the checkpoint ``path`` but those in the folder ``keep``."""
    for folder in path.parent.glob(f".{path.name}.*.{SHARDS}"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def read(
    path: Path,
    said: Mapping[str, Any],
    like: Callable[[str, torch.Size, torch.dtype], Tensor] = lambda name, size, dtype: torch.empty(
        size, dtype=dtype
    ),
    *,
    together: bool = False,
) -> dict[str, Tensor]:
    """The tensors that were dealt out, by name.

    Args:
        path: of the checkpoint's file.
        said: by it of its shards.
        like: makes the tensor that one is read into, of its name, size and type; whole on the CPU
            by default.
        together: whether all processes read, each what it makes room for.

    Raises:
        DamagedShardsError: shards are gone or damaged.
    """
    folder = path.with_name(said["folder"])
    for name, size in said["sizes"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            what = "is gone" if not file.is_file() else f"has not the {size} bytes it was saved in"
            raise DamagedShardsError(f"{folder.name}/{name} {what}")
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {
            name: like(name, kept.size, kept.properties.dtype)
            for name, kept in found.items()
            if isinstance(kept, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load.*")
            load(tensors, checkpoint_id=folder, no_dist=not together)
    # Of many kinds, by what was damaged; torch's is no Exception.
    except (Exception, CheckpointException) as error:
        raise DamagedShardsError(f"{folder.name} cannot be read") from error
    return tensors
