"""Whole networks of torchvision's and timm's by name, with their own classifiers."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.backbones.registry import TIMM, timm_network, torchvision_network
from picnn_fast.backbones.weights import is_weights_file, load_weights_file


class Preprocessing(NamedTuple):
    """How the images were made that a network was trained on.

    Attributes:
        image_size: side of the square, pixels.
        resize: pixels of an image's shorter side, of which the square is the middle.
        mean, std: of each colour, on a scale of [0, 1].
    """

    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def classifier(
    name: str, *, num_classes: int, image_channels: int = 3, weights: Any = "DEFAULT"
) -> nn.Module:
    """A network of torchvision's or timm's, whole.

    Args:
        name: "timm:NAME", or a classifier of torchvision's, as "resnet50".
        num_classes: K of a network with random weights, or those of a file; trained weights that a
            library has come with as many classes as they were trained on.
        image_channels: of the images.
        weights: "DEFAULT", or another name that the library has; a file of a state dict (.pth,
            .pt, .safetensors); None: random ones.

    Raises:
        ValueError: a name or weights that are not there, or a file that is not of this network.
        ImportError: torchvision, timm or safetensors is missing for what needs it.
    """
    file = is_weights_file(weights)
    named = None if file else weights
    if name.startswith(TIMM):
        network = timm_network(name.removeprefix(TIMM), image_channels, named, num_classes)
    else:
        with extra("train"):
            from torchvision import models
        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(
                f"model: got {name!r},{checks.did_you_mean(name, known)} want '{TIMM}NAME', a"
                " classifier of torchvision's, or module:function"
            )
        classes = None if named is not None else num_classes
        network = torchvision_network(name, image_channels, named, classes)
    if file:
        load_weights_file(network, Path(weights))
    return network


def preprocessing(name: str, weights: Any = "DEFAULT") -> Preprocessing | None:
    """How a library says that images are made for a network of its own, or None.

    Args:
        name, weights: see ``classifier``. Weights that the library has not are taken to want what
            its own of this network do.
    """
    own = "DEFAULT" if weights is None or is_weights_file(weights) else weights
    if name.startswith(TIMM):
        with extra("timm"):
            import timm
            from timm.data.config import resolve_data_config
        full = name.removeprefix(TIMM) + ("" if own == "DEFAULT" else f".{own}")
        try:
            config = timm.get_pretrained_cfg(full)
        except RuntimeError:  # no such weights
            config = None
        if config is None:
            return None
        told = resolve_data_config({}, pretrained_cfg=config.to_dict())
        side = told["input_size"][-1]
        resize = math.floor(side / told["crop_pct"])
        return Preprocessing(side, resize, tuple(told["mean"]), tuple(told["std"]))
    with extra("train"):
        from torchvision import models
    if name not in models.list_models(module=models):
        return None
    try:
        preset: Any = models.get_model_weights(name).verify(own).transforms()
    except (KeyError, TypeError):
        return None
    return Preprocessing(
        preset.crop_size[0], preset.resize_size[0], tuple(preset.mean), tuple(preset.std)
    )
