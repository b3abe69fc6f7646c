"""Plain classifiers, trained anywhere: found by name, and measured as they are."""

import importlib
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast._terminal import counted
from picnn_fast.backbones import TIMM, classifier, is_weights_file, preprocessing
from picnn_fast.backbones.weights import load_weights_file
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.models import STD, as_std
from picnn_fast.training.options import GROUPS, ConfigError, few, one_line

RANDOM = "random"  # weights that nothing has trained
_WANTED = "want an nn.Module, or a pair (features, head) of them"


def plain_network(
    model: str,
    data: SeededDataModule,
    *,
    weights: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> STD:
    """A classifier as ``evaluate`` takes it, with its own logits; see ``picnn_fast.models.as_std``.

    Args:
        model: "timm:NAME", a classifier of torchvision's, or "module:function", which makes one.
        data: whose images it is to take, and whose classes to tell.
        weights: None: trained ones of torchvision's or timm's, or those that the function gives;
            "random"; a name that the library has; or a file of a state dict.
        layer: name of the module whose maps are measured; None: its last convolutional maps.
        seed: of random weights and of the random correspondence matrix.

    Raises:
        ConfigError: the network or its weights cannot be had, or are not for these images and
            classes.
        ImportError: torchvision, timm or safetensors is missing for what needs it.
    """
    image: Tensor = data.test_set[0][0][None]
    image, _ = data.on_after_batch_transfer([image, torch.zeros(1, dtype=torch.int64)], 0)
    torch.manual_seed(seed)
    try:
        network = _found(model, data, weights)
        _try(network, model, image, data)
        if _is_function(model) and weights is not None:
            load_weights_file(_whole(network), Path(weights))
        return as_std(network, image, layer=layer)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        argument, colon, rest = str(error).partition(":")
        name = "model" if argument in ("backbone", "network", "features", "head") else argument
        raise ConfigError(f"{name}{colon}{rest}") from error


def data_defaults(model: str, weights: str | None, data: str) -> dict[str, Any]:
    """Options of a data set by which its images are as a library's network wants them.

    Args:
        model, weights: see ``plain_network``.
        data: name of the data set.

    Returns:
        Of ``image_size``, ``resize``, ``mean`` and ``std`` those that the data set has; none for
        a network that no library tells of.
    """
    own = None if weights == RANDOM else weights
    told = None if _is_function(model) else preprocessing(model, own or "DEFAULT")
    if told is None:
        return {}
    known = GROUPS["data"].options(data)
    return {name: value for name, value in told._asdict().items() if name in known}


def _is_function(model: str) -> bool:
    return ":" in model and not model.startswith(TIMM)


def _found(model: str, data: SeededDataModule, weights: str | None) -> Any:
    if _is_function(model):
        if weights is not None and not is_weights_file(weights):
            raise ConfigError(
                f"weights: got {weights!r} with {model}, want a file of its state dict (.pth, .pt,"
                " .safetensors), or none: those that it is made with"
            )
        return _made(model)
    named = {None: "DEFAULT", RANDOM: None}.get(weights, weights)
    trained = named is not None and not is_weights_file(named)
    if data.in_channels != 3 and trained and not model.startswith(TIMM):
        raise ConfigError(
            f"data: got images of {counted(data.in_channels, 'channel')} with trained weights,"
            f" want colour images, which those take; or weights {RANDOM!r}"
        )
    return classifier(
        model, num_classes=data.num_classes, image_channels=data.in_channels, weights=named
    )


def _made(reference: str) -> Any:
    """What "module:function" makes; the module may lie in the working directory."""
    name, _, path = reference.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), *path.split("."))):
        raise ConfigError(f"model: got {reference!r}, want module:function, as in Python")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a user's own module raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"model: got {reference!r}, but there is no module {missing!r} in {os.getcwd()},"
                " nor one that is installed"
            ) from error
        raise ConfigError(f"model: importing {name} fails: {_told(error)}") from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [known for known in vars(found) if not known.startswith("_")]
            raise ConfigError(
                f"model: got {reference!r}, but {name} has no {path!r};"
                f"{checks.did_you_mean(part, names)} want a function that makes an nn.Module"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ConfigError(
            f"model: {reference} is of type {type(found).__name__}, want a function that makes an"
            " nn.Module"
        )
    try:
        made = found()
    except Exception as error:  # whatever a user's own function raises
        raise ConfigError(f"model: {reference}() fails: {_told(error)}") from error
    halves = made if isinstance(made, tuple | list) and len(made) == 2 else [made]
    for half in halves:
        if not isinstance(half, nn.Module):
            raise ConfigError(f"model: {reference} returned a {type(half).__name__}, {_WANTED}")
    return made


def _told(error: Exception) -> str:
    """What went wrong in code of the user's."""
    return f"{type(error).__name__}: {one_line(error)}"


def _whole(network: Any) -> nn.Module:
    """A pair as one module, named as ``discriminator()`` names it."""
    if isinstance(network, nn.Module):
        return network
    return nn.Sequential(OrderedDict(zip(("features", "head"), network, strict=True)))


def _try(network: Any, model: str, image: Tensor, data: SeededDataModule) -> None:
    """
    Raises:
        ConfigError: the network cannot take such an image, or tells other classes.
    """
    channels, height, width = image.shape[1:]
    try:
        with torch.no_grad():
            logits = _whole(network).eval()(image)
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"model: {model} cannot take images of {width} x {height} pixels and {channels}"
            f" channels: {one_line(error)}"
        ) from error
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] != data.num_classes:
        raise ConfigError(
            f"model: got {model} of {counted(logits.shape[1], 'class')}, want"
            f" {data.num_classes}, those of the data ({few(data.class_names)})"
        )
