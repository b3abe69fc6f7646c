"""The index of a trained network's filters, kept beside its checkpoint, made again when stale."""

import hashlib
import io
import json
import warnings
from pathlib import Path

import torch

from picnn_fast._files import replacing
from picnn_fast.data import Batches, SeededDataModule
from picnn_fast.explain import FilterIndex, filter_index
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.training.options import Options

# Raised when an index says something else of the same network and images.
_FORMAT = 1


def index_path(checkpoint: str | Path, split: str = "test") -> Path:
    """Where the index of a checkpoint's filters on a split is kept."""
    checkpoint = Path(checkpoint)
    return checkpoint.with_name(f"filter_index-{checkpoint.stem}-{split}.pt")


def kept_filter_index(
    checkpoint: str | Path,
    network: InterpretableNetwork,
    options: Options,
    data: SeededDataModule,
    *,
    split: str = "test",
    top: int = 9,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> FilterIndex:
    """The index kept beside a checkpoint, or else a new one, which is kept from then on.

    An index is used only where it was made of these weights and images: of a checkpoint with the
    same bytes, of the same split, options of the data and number of images. Images that were
    changed in place are not noticed.

    Args:
        checkpoint: file of the network.
        network: in it; left on ``device``, in eval mode, where an index is made.
        options: of the run, with those of ``data``.
        data: whose images are read.
        split: "train" or "test".
        top: images to keep of each filter.
        device: to make an index on.
        progress: show a progress bar while one is made.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: another split, or as of ``filter_index``.

    Warns:
        UserWarning: the index cannot be written down.
    """
    batches = Batches(data, split)
    made_of = _made_of(Path(checkpoint), options, data, split, batches.num_images, top)
    path = index_path(checkpoint, split)
    kept = _read(path, made_of)
    if kept is not None:
        return kept
    index = filter_index(network.to(device), batches, top=top, progress=progress)
    content = io.BytesIO()
    torch.save({"made_of": made_of, "index": index.as_dict()}, content)
    try:
        with replacing(path) as file:
            file.write(content.getbuffer())
    except OSError as error:
        warnings.warn(
            f"the index of the filters cannot be kept in {path} ({error.strerror}); it will be"
            " made again",
            stacklevel=2,
        )
    return index


def _made_of(
    checkpoint: Path, options: Options, data: SeededDataModule, split: str, images: int, top: int
) -> str:
    """What an index follows from, as text that is equal where that is."""
    with open(checkpoint, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {
        "format": _FORMAT,
        "weights": weights,
        "split": split,
        "images": images,
        "top": top,
        "data": options.data_identity(),
        "seed": options.seed,
        "classes": list(data.class_names),
    }
    return json.dumps(facts, sort_keys=True, default=str)


def _read(path: Path, made_of: str) -> FilterIndex | None:
    """The index in a file, None where there is none, or none made of that, or a damaged one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return FilterIndex.from_dict(content["index"]) if content["made_of"] == made_of else None
    except Exception:  # of many kinds, by what was damaged
        return None
