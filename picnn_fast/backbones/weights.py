"""Trained weights from a file, into a network, or into one whose classifier is made anew."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from picnn_fast._extras import extra

_SUFFIXES = (".pt", ".pth", ".safetensors")
_WRAPPED = ("state_dict", "model_state_dict", "model")
_MOST_NAMED = 3  # keys in a message


def is_weights_file(weights: Any) -> bool:
    """Whether ``weights`` are a file, by their name, not those that a library knows."""
    if isinstance(weights, Path):
        return True
    return isinstance(weights, str) and (os.sep in weights or weights.endswith(_SUFFIXES))


def load_weights_file(
    network: nn.Module, path: str | Path, *, without: Sequence[nn.Module] = ()
) -> None:
    """Load a state dict into a network.

    Args:
        network: the whole.
        path: a file of ``torch.save``, read without running code, or of safetensors. Its state dict
            may be the value of "state_dict", "model_state_dict" or "model", and its keys may begin
            with "module.", as those of ``DataParallel``.
        without: layers that are not loaded: those whose place new ones take.

    Raises:
        ValueError: no such file, or one that is not of this network.
        ImportError: safetensors is missing for a file of it.
    """
    state = _read(Path(path))
    anew = tuple(
        f"{name}." for name, layer in network.named_modules() if any(layer is r for r in without)
    )
    own = {k: v for k, v in network.state_dict().items() if not k.startswith(anew)}
    given = {k: v for k, v in state.items() if not k.startswith(anew)}
    # Older versions of torch did not count batches.
    lacking = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    unknown = [k for k in given if k not in own]
    if lacking or unknown:
        found = [
            f"{says} {', '.join(keys[:_MOST_NAMED])}{f' and {more} more' if more > 0 else ''}"
            for says, keys in (("lacks", lacking), ("holds", unknown))
            if keys
            for more in (len(keys) - _MOST_NAMED,)
        ]
        raise ValueError(
            f"weights: {path} {' and '.join(found)}, want the state dict of this network"
        )
    for key, value in own.items():
        if key in given and given[key].shape != value.shape:
            raise ValueError(
                f"weights: {path} holds {key} {tuple(given[key].shape)}, want {tuple(value.shape)}"
            )
    network.load_state_dict(given, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"weights: got {str(path)!r}, want a file that is there")
    try:
        if path.suffix == ".safetensors":
            with extra("timm"):
                from safetensors.torch import load_file
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # of many kinds, with advice over many lines
        raise ValueError(f"weights: {path} cannot be read as tensors alone") from error
    for key in _WRAPPED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights: {path} holds no state dict, want tensors by name")
    return {str(key).removeprefix("module."): value for key, value in content.items()}
