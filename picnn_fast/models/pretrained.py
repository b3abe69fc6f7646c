"""Trained networks in a folder: weights as safetensors, and a card that says what they are of."""

import dataclasses
import hashlib
import json
import numbers
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast._files import replacing, write_atomically
from picnn_fast._version import __version__
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.factory import METHODS, make_interpretable

CARD, WEIGHTS = "config.json", "model.safetensors"  # the names that Hugging Face's have
FORMAT = 1  # of the card


def save(
    network: InterpretableNetwork,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """See ``InterpretableNetwork.save_pretrained``."""
    recipe = network.recipe
    if recipe is None:
        raise ValueError(
            f"network: got a {type(network).__name__} that was put together by hand, want one of"
            " make_interpretable, which knows how it is built again"
        )
    if class_names is not None and len(class_names) != network.num_classes:
        raise ValueError(
            f"class_names: got {len(class_names)}, want {network.num_classes}, one a class"
        )
    with extra("train"):
        from safetensors.torch import save as as_bytes
    # Copies: tensors that share memory, or lie in it with gaps, are no matter to the file.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    weights = as_bytes(state, metadata={"format": "pt"})
    told = {
        "class_names": class_names if class_names is None else [str(name) for name in class_names],
        "preprocessing": preprocessing,
        "notes": notes,
    }
    known = network.card or {}
    card = {
        "library": "picnn_fast",
        "format": FORMAT,
        "versions": {"picnn_fast": __version__, "torch": torch.__version__},
        **_plain("recipe", recipe),
        **{
            name: known.get(name) if value is None else _plain(name, value)
            for name, value in told.items()
        },
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as file:
        file.write(weights)
    write_atomically(folder / CARD, text)


def load(
    kind: type[InterpretableNetwork], folder: str | Path, *, backbone: Any = None
) -> InterpretableNetwork:
    """See ``InterpretableNetwork.from_pretrained``."""
    folder = Path(folder)
    card = read_card(folder)
    made = METHODS.get(card["method"])
    if made is None or not issubclass(made, kind):
        wanted = [name for name, method in METHODS.items() if issubclass(method, kind)]
        raise ValueError(
            f"card: {folder / CARD} is of method {card['method']!r}, want one of"
            f" {', '.join(wanted)}"
        )
    told = card["backbone"]
    if told is None and backbone is None:
        raise ValueError(
            "backbone: got None, want the module, or the pair of them, that the method was put on,"
            f" as in from_pretrained(folder, backbone=module): {folder / CARD} cannot tell how that"
            " is built"
        )
    if told is not None and backbone is not None:
        named = repr(told) if isinstance(told, str) else "the network that is explained"
        raise ValueError(f"backbone: got one, want None: {folder / CARD} tells {named}")
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"folder: {folder} holds no {WEIGHTS}; want one of save_pretrained")
    with path.open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != card["sha256"]:
        raise ValueError(
            f"weights: {path} is damaged, or not the file that its card was saved with"
        )
    with extra("train"):
        from safetensors.torch import load_file
    state = load_file(path)  # of bytes, safetensors 0.4 reads no empty tensor
    try:
        network = _made(card, backbone)
        for name, value in network.state_dict(keep_vars=True).items():
            if name in state:  # in the type that was saved
                value.data = value.data.to(state[name].dtype)
        network.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"card: {folder / CARD} does not build the network saved: {text}"
        ) from error
    network.card = card
    return network.eval()


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a folder of ``save_pretrained``.

    Raises:
        FileNotFoundError: no card is there.
        ValueError: it is none of picnn_fast's, damaged, or of a newer version.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise FileNotFoundError(f"folder: {folder} holds no {CARD}; want one of save_pretrained")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"card: {path} is no JSON: {error}") from error
    if not isinstance(card, dict) or card.get("library") != "picnn_fast":
        raise ValueError(f"card: {path} is none of picnn_fast's, want one of save_pretrained")
    version = card.get("format")
    if isinstance(version, int) and version > FORMAT:
        writer = card.get("versions", {}).get("picnn_fast")
        raise ValueError(
            f"card: {path} is of format {version}, of picnn_fast {writer}, which is newer than this"
            f" picnn_fast {__version__}, which reads format {FORMAT}; want a newer picnn_fast"
        )
    lacking = [
        key for key in ("method", "backbone", "network", "options", "sha256") if key not in card
    ]
    if version != FORMAT or lacking:
        raise ValueError(
            f"card: {path} is damaged, it tells no {' and no '.join(lacking) or 'format'}"
        )
    return card


def _made(card: Mapping[str, Any], backbone: Any) -> InterpretableNetwork:
    """The network of a card, or of one within it, with weights that nothing has trained."""
    told = card["backbone"]
    if isinstance(told, Mapping):
        told = _made(told, None)
    annotations = typing.get_type_hints(METHODS[card["method"]].__init__)
    options = {
        name: _as_given(value, annotations.get(name)) for name, value in card["options"].items()
    }
    return make_interpretable(
        backbone if told is None else told, card["method"], **card["network"], **options
    )


def _as_given(value: Any, annotation: Any = None) -> Any:
    """What ``_plain`` made JSON of."""
    if isinstance(value, Mapping):
        if value.keys() == {"tensor"}:
            return torch.tensor(value["tensor"])
        inner = {name: _as_given(item) for name, item in value.items()}
        for kind in (annotation, *typing.get_args(annotation)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                return kind(**inner)
        return inner
    return [_as_given(item) for item in value] if isinstance(value, list) else value


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it.

    Raises:
        ValueError: it has none of it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return {"tensor": value.tolist()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    raise ValueError(
        f"{name}: got a {type(value).__name__}, which a card cannot hold; want numbers, text, lists"
        " or tensors"
    )
