"""Backbones by name: one row each, and all of timm's."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.backbones.networks import (
    cifar_resnet,
    small_cnn,
    small_resnet,
    small_vgg,
    vgg_m,
    vgg_s,
)
from picnn_fast.backbones.split import Split, last_maps, split, split_halves
from picnn_fast.backbones.weights import is_weights_file, load_weights_file

TIMM = "timm:"  # begins the names of timm's networks
_OR_FILE = "or a file of its state dict (.pth, .pt, .safetensors)"


class Row(NamedTuple):
    """A backbone.

    Attributes:
        build: the whole network, of ``image_channels`` and, where it has trained ones, ``weights``.
        layer: behind which it is cut, as ``split`` takes it. What follows becomes the head. None:
            between its ``forward_features`` and ``forward_head``.
        family: full name of the class whose instances, where given, are cut there too; or None.
    """

    build: Callable[..., nn.Module]
    layer: str | None
    family: str | None = None


def _of_torchvision(name: str, layer: str, family: str) -> Row:
    return Row(partial(torchvision_network, name), layer, f"torchvision.models.{family}")


def torchvision_network(
    name: str, image_channels: int = 3, weights: Any = None, num_classes: int | None = None
) -> nn.Module:
    """A network of torchvision's.

    Args:
        name: as ``torchvision.models.get_model`` takes it.
        image_channels: 3 for colour; another number makes a first convolution of its own.
        weights: None, or trained ones: a name such as "DEFAULT" or "IMAGENET1K_V1", or a member of
            the network's ``WeightsEnum``. Those that are not cached are downloaded by torchvision.
        num_classes: K, without trained weights; None: as many as torchvision's own.

    Raises:
        ValueError: weights that the network has not, that cannot be downloaded, or with images that
            are not of colour.
        ImportError: torchvision is missing.
    """
    with extra("train"):
        from torchvision.models import get_model, get_model_weights
    verified = None
    if weights is not None:
        if image_channels != 3:
            raise ValueError(
                f"image_channels: got {image_channels} with weights={weights!r}, want 3:"
                " trained weights take colour images"
            )
        known = get_model_weights(name)
        try:
            verified = known.verify(weights)
        except (KeyError, TypeError):
            names = [*known.__members__]
            raise ValueError(
                f"weights: got {weights!r},{checks.did_you_mean(weights, names)} want one of"
                f" {', '.join(map(repr, names))}; {_OR_FILE}"
            ) from None
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        network: nn.Module = get_model(name, weights=verified, **classes)
    except OSError as error:
        raise _not_downloaded(name, weights, error) from error
    if image_channels != 3:
        _exchange_first_convolution(network, in_channels=image_channels)
    return network


def timm_network(
    name: str,
    image_channels: int = 3,
    weights: str | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """A network of timm's.

    Args:
        name: as ``timm.create_model`` takes it, without the name of weights.
        image_channels: 3 for colour; of trained weights timm makes those for another number.
        weights: None, or trained ones: "DEFAULT", or a name that timm has, as "in12k_ft_in1k".
            Those that are not cached are downloaded by timm.
        num_classes: K, without trained weights; None: as many as timm's own.

    Raises:
        ValueError: a name or weights that timm has not, or weights that cannot be downloaded.
        ImportError: timm is missing.
    """
    with extra("timm"):
        import timm
    if "." in name or not timm.is_model(name):
        # By timm's own spelling, which difflib's default would take long to compare with all.
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 1)
        hint = f" did you mean {TIMM + near[0]!r}?" if near else ""
        raise ValueError(f"backbone: got {TIMM + name!r},{hint} want a model of timm's")
    network: nn.Module
    if weights is None:
        classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        network = timm.create_model(name, in_chans=image_channels, **classes)
        return network
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if weights not in ("DEFAULT", *known):
        names = ["DEFAULT", *known] if known else []
        wanted = f"one of {', '.join(map(repr, names))}" if known else "None"
        raise ValueError(
            f"weights: got {weights!r},{checks.did_you_mean(weights, names)} want {wanted};"
            f" {_OR_FILE}"
        )
    full = name if weights == "DEFAULT" else f"{name}.{weights}"
    try:
        network = timm.create_model(full, pretrained=True, in_chans=image_channels)
    except Exception as error:  # of many kinds, by what of the download fails
        raise _not_downloaded(TIMM + name, weights, error) from error
    return network


def _not_downloaded(name: str, weights: object, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"weights: got {weights!r}, which cannot be had for {name!r} ({reason}), want None;"
        f" {_OR_FILE}"
    )


def _exchange_first_convolution(network: nn.Module, **changed: Any) -> nn.Conv2d:
    """Put a new convolution, with some options changed, in the place of the first; return that."""
    path, first = next(
        (path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )
    same = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    options: dict[str, Any] = {name: getattr(first, name) for name in same} | changed
    network.set_submodule(path, nn.Conv2d(**options, bias=first.bias is not None))
    return first


def _for_small_images(network: nn.Module, name: str) -> None:
    """The first convolution 3x3 and of stride 1, and the first max pooling left out."""
    pooling = next((p for p, m in network.named_modules() if isinstance(m, nn.MaxPool2d)), None)
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.kernel_size == first.stride:
        raise ValueError(f"stem: got 'cifar', want 'default': {name!r} starts with no such layers")
    if pooling is None and (first.kernel_size, first.stride) == ((3, 3), (1, 1)):
        raise ValueError(f"stem: got 'cifar', want 'default': {name!r} takes small images as it is")
    _exchange_first_convolution(network, kernel_size=3, stride=1, padding=1)
    if pooling is not None:
        network.set_submodule(pooling, nn.Identity())


BACKBONES: dict[str, Row] = {
    "small-resnet": Row(small_resnet, "features"),
    "small-cnn": Row(small_cnn, "features"),
    "small-vgg": Row(small_vgg, "features"),
    "resnet18": _of_torchvision("resnet18", "layer4", "resnet.ResNet"),
    "resnet34": _of_torchvision("resnet34", "layer4", "resnet.ResNet"),
    "resnet50": _of_torchvision("resnet50", "layer4", "resnet.ResNet"),
    "resnet101": _of_torchvision("resnet101", "layer4", "resnet.ResNet"),
    "resnet152": _of_torchvision("resnet152", "layer4", "resnet.ResNet"),
    "wide_resnet50_2": _of_torchvision("wide_resnet50_2", "layer4", "resnet.ResNet"),
    "resnet20": Row(partial(cifar_resnet, 20), "features"),
    "resnet56": Row(partial(cifar_resnet, 56), "features"),
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
    "densenet161": _of_torchvision("densenet161", "relu", "densenet.DenseNet"),
    "mobilenet_v2": _of_torchvision("mobilenet_v2", "features", "mobilenetv2.MobileNetV2"),
    "efficientnet_b0": _of_torchvision("efficientnet_b0", "features", "efficientnet.EfficientNet"),
    # Behind its last norm, for a filter that is masked before it would still move the others.
    "vit_b_16": _of_torchvision("vit_b_16", "encoder", "vision_transformer.VisionTransformer"),
    "vgg-m": Row(vgg_m, "features"),
    "vgg-s": Row(vgg_s, "features"),
}


def cut(
    backbone: Any,
    layer: str | None = None,
    *,
    image_channels: int | None = None,
    weights: Any = None,
    stem: Literal["default", "cifar"] = "default",
) -> Split:
    """A backbone's name, or any network, cut in two.

    Args:
        backbone: a name of ``BACKBONES``, "timm:NAME" for any network of timm's, or a module:
            images to logits.
        layer: name of the module behind which it is cut, as "layer4" or "features.29". None:
            where the backbone of that name is cut, or a given network of its family, or one between
            its ``forward_features`` and ``forward_head``.
        image_channels: of the images, for a name. None: the network's own default.
        weights: trained weights, for a name: "DEFAULT", or another name that torchvision or timm
            has, e.g. "IMAGENET1K_V1"; or a file of its state dict (.pth, .pt, .safetensors), whose
            classifier is not taken; None: random ones.
        stem: how a network of ``BACKBONES`` begins: "default", or "cifar", for images of about 32
            pixels: the first convolution is a new one of 3x3 and stride 1, and the first max
            pooling is left out.

    Raises:
        TypeError: a backbone that is neither, or of which the layer is not known.
        ValueError: unknown names, arguments that do not apply, a file that is not of that network;
            see ``split``.
        ImportError: torchvision, timm or safetensors is missing for what needs it.
    """
    checks.one_of("stem", stem, ("default", "cifar"))
    if isinstance(backbone, str):
        row = _row(backbone)
        options: dict[str, Any] = {}
        if image_channels is not None:
            options["image_channels"] = checks.integer("image_channels", image_channels, 1)
        file = is_weights_file(weights)
        if weights is not None and not file:
            if "weights" not in inspect.signature(row.build).parameters:
                raise ValueError(
                    f"weights: got {weights!r}, want None: {backbone!r} has no trained weights;"
                    f" {_OR_FILE}"
                )
            options["weights"] = weights
        network = row.build(**options)
        if stem == "cifar":
            if backbone.startswith(TIMM):
                raise ValueError(f"stem: got 'cifar' with {backbone!r}, want 'default'")
            _for_small_images(network, backbone)
        layer = row.layer if layer is None else layer
        parts = split_halves(network) if layer is None else split(network, layer)
        if file:
            load_weights_file(network, Path(weights), without=parts.replaced())
        return parts

    checks.left_out(
        "a backbone that is already built",
        image_channels=(image_channels, None),
        weights=(weights, None),
        stem=(stem, "default"),
    )
    if isinstance(backbone, nn.Module):
        known = _cut_known(backbone, layer)
        if known is not None:
            return known
    raise TypeError(
        f"backbone: got {type(backbone).__name__}, want a name such as 'resnet18', a module with"
        " layer=, the name of the layer behind which it is cut, or a pair (features, head) of"
        " modules"
    )


def cut_trained(network: nn.Module, images: Tensor, layer: str | None = None) -> Split:
    """A network, whatever it is of, cut in two to be measured as it is.

    Args:
        network: images to logits, in eval mode.
        images: ``[B, C, H, W]`` as it takes them.
        layer: as ``cut`` takes it; of networks of no known family None is ``last_maps``.

    Raises:
        TypeError, ValueError: see ``split`` and ``last_maps``.
    """
    known = _cut_known(network, layer)
    return split(network, last_maps(network, images)) if known is None else known


def _cut_known(network: nn.Module, layer: str | None) -> Split | None:
    """A network cut where it is known to be, or None."""
    if layer is None:
        layer = _layer_of(network)
    if layer is not None:
        return split(network, layer)
    if all(hasattr(network, name) for name in ("forward_features", "forward_head")):
        return split_halves(network)
    return None


def _row(name: str) -> Row:
    if name.startswith(TIMM):
        return Row(partial(timm_network, name.removeprefix(TIMM)), None)
    if name not in BACKBONES:
        raise ValueError(
            f"backbone: got {name!r},{checks.did_you_mean(name, BACKBONES)} want one of"
            f" {', '.join(map(repr, BACKBONES))}, or '{TIMM}NAME'"
        )
    return BACKBONES[name]


def _layer_of(network: nn.Module) -> str | None:
    families = {f"{kind.__module__}.{kind.__name__}" for kind in type(network).__mro__}
    return next((row.layer for row in BACKBONES.values() if row.family in families), None)
