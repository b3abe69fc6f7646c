"""Backbones by name: one row each."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from picnn_fast._extras import extra
from picnn_fast.backbones.networks import small_cnn, small_resnet, small_vgg, vgg_m, vgg_s
from picnn_fast.backbones.split import Split, split, split_halves
from picnn_fast.ops import checks


class Row(NamedTuple):
    """A backbone.

    Attributes:
        build: the whole network, of ``image_channels`` and, where it has trained ones, ``weights``.
        layer: behind which it is cut, as ``split`` takes it. What follows becomes the head.
        family: full name of the class whose instances, where given, are cut there too; or None.
    """

    build: Callable[..., nn.Module]
    layer: str
    family: str | None = None


def _of_torchvision(name: str, layer: str, family: str) -> Row:
    return Row(partial(torchvision_network, name), layer, f"torchvision.models.{family}")


def torchvision_network(name: str, image_channels: int = 3, weights: Any = None) -> nn.Module:
    """A network of torchvision's.

    Args:
        name: as ``torchvision.models.get_model`` takes it.
        image_channels: 3 for colour; another number makes a first convolution of its own.
        weights: None, or trained ones: a name such as "DEFAULT" or "IMAGENET1K_V1", or a member of
            the network's ``WeightsEnum``. Those that are not cached are downloaded by torchvision.

    Raises:
        ValueError: weights that the network has not, or with images that are not of colour.
        ImportError: torchvision is missing.
    """
    with extra("train"):
        from torchvision.models import get_model, get_model_weights
    if weights is not None:
        if image_channels != 3:
            raise ValueError(
                f"image_channels: got {image_channels} with weights={weights!r}, want 3:"
                " trained weights take colour images"
            )
        known = get_model_weights(name)
        try:
            weights = known.verify(weights)
        except (KeyError, TypeError):
            names = [*known.__members__]
            raise ValueError(
                f"weights: got {weights!r},{checks.did_you_mean(weights, names)} want one of"
                f" {', '.join(map(repr, names))}"
            ) from None
    network: nn.Module = get_model(name, weights=weights)
    if image_channels != 3:
        path, first = next(
            (path, module)
            for path, module in network.named_modules()
            if isinstance(module, nn.Conv2d)
        )
        options: dict[str, Any] = {
            n: getattr(first, n) for n in ("kernel_size", "stride", "padding")
        }
        new = nn.Conv2d(image_channels, first.out_channels, bias=first.bias is not None, **options)
        network.set_submodule(path, new)
    return network


BACKBONES: dict[str, Row] = {
    "small-resnet": Row(small_resnet, "features"),
    "small-cnn": Row(small_cnn, "features"),
    "small-vgg": Row(small_vgg, "features"),
    "resnet18": _of_torchvision("resnet18", "layer4", "resnet.ResNet"),
    "resnet34": _of_torchvision("resnet34", "layer4", "resnet.ResNet"),
    "resnet50": _of_torchvision("resnet50", "layer4", "resnet.ResNet"),
    "resnet101": _of_torchvision("resnet101", "layer4", "resnet.ResNet"),
    "resnet152": _of_torchvision("resnet152", "layer4", "resnet.ResNet"),
    "alexnet": _of_torchvision("alexnet", "features.-2", "alexnet.AlexNet"),
    "vgg11": _of_torchvision("vgg11", "features.-2", "vgg.VGG"),
    "vgg11_bn": _of_torchvision("vgg11_bn", "features.-2", "vgg.VGG"),
    "vgg13": _of_torchvision("vgg13", "features.-2", "vgg.VGG"),
    "vgg13_bn": _of_torchvision("vgg13_bn", "features.-2", "vgg.VGG"),
    "vgg16": _of_torchvision("vgg16", "features.-2", "vgg.VGG"),
    "vgg16_bn": _of_torchvision("vgg16_bn", "features.-2", "vgg.VGG"),
    "vgg19": _of_torchvision("vgg19", "features.-2", "vgg.VGG"),
    "vgg19_bn": _of_torchvision("vgg19_bn", "features.-2", "vgg.VGG"),
    "densenet121": _of_torchvision("densenet121", "relu", "densenet.DenseNet"),
    "mobilenet_v2": _of_torchvision("mobilenet_v2", "features", "mobilenetv2.MobileNetV2"),
    "vgg-m": Row(vgg_m, "features"),
    "vgg-s": Row(vgg_s, "features"),
}


def cut(
    backbone: Any,
    layer: str | None = None,
    *,
    image_channels: int | None = None,
    weights: Any = None,
) -> Split:
    """A backbone's name, or any network, cut in two.

    Args:
        backbone: a name of ``BACKBONES``, or a module: images to logits.
        layer: name of the module behind which it is cut, as "layer4" or "features.29". None:
            where the backbone of that name is cut, or a given network of its family, or one between
            its ``forward_features`` and ``forward_head``.
        image_channels: of the images, for a name. None: the network's own default.
        weights: trained weights, for a name that torchvision has them for, e.g. "DEFAULT" or
            "IMAGENET1K_V1"; None: random ones.

    Raises:
        TypeError: a backbone that is neither, or of which the layer is not known.
        ValueError: unknown names, arguments that do not apply; see ``split``.
        ImportError: torchvision is missing for a name that needs it.
    """
    if isinstance(backbone, str):
        row = BACKBONES.get(backbone)
        if row is None:
            raise ValueError(
                f"backbone: got {backbone!r},{checks.did_you_mean(backbone, BACKBONES)} want one"
                f" of {', '.join(map(repr, BACKBONES))}"
            )
        options: dict[str, Any] = {}
        if image_channels is not None:
            options["image_channels"] = checks.integer("image_channels", image_channels, 1)
        if weights is not None:
            if "weights" not in inspect.signature(row.build).parameters:
                raise ValueError(
                    f"weights: got {weights!r}, want None: {backbone!r} has no trained weights"
                )
            options["weights"] = weights
        return split(row.build(**options), row.layer if layer is None else layer)

    for name, value in (("image_channels", image_channels), ("weights", weights)):
        if value is not None:
            raise ValueError(
                f"{name}: got {value!r} with a backbone that is already built, want None"
            )
    if isinstance(backbone, nn.Module):
        if layer is None:
            layer = _layer_of(backbone)
        if layer is not None:
            return split(backbone, layer)
        if all(hasattr(backbone, name) for name in ("forward_features", "forward_head")):
            return split_halves(backbone)
    raise TypeError(
        f"backbone: got {type(backbone).__name__}, want a name such as 'resnet18', a module with"
        " layer=, the name of the layer behind which it is cut, or a pair (features, head) of"
        " modules"
    )


def _layer_of(network: nn.Module) -> str | None:
    families = {f"{kind.__module__}.{kind.__name__}" for kind in type(network).__mro__}
    return next((row.layer for row in BACKBONES.values() if row.family in families), None)
