"""One call from a backbone to an interpretable network."""

import inspect
from typing import Any

from picnn_fast.models.backbones import (
    BACKBONES,
    Backbone,
    is_torchvision_resnet,
    is_torchvision_vgg,
    split_resnet,
    split_vgg,
)
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.icnn import ICNN
from picnn_fast.models.picnn import PICNN
from picnn_fast.models.std import STD
from picnn_fast.ops import checks

METHODS: dict[str, type[InterpretableNetwork]] = {"std": STD, "picnn": PICNN, "icnn": ICNN}
FILTERS_PER_CLASS = 12.8  # PICNN, figure 5


def make_interpretable(
    backbone: Any,
    method: str = "picnn",
    *,
    num_classes: int,
    num_filters: int | None = None,
    insert_conv: bool = True,
    in_channels: int | None = None,
    image_channels: int | None = None,
    weights: Any = None,
    **options: Any,
) -> InterpretableNetwork:
    """Put an interpretable target layer and a classifier on a backbone.

    Args:
        backbone: one of
            - a name: "small-resnet", "small-cnn", "resnet18", "resnet50", "alexnet", "vgg16",
              "vgg-m" or "vgg-s";
            - a torchvision ``ResNet``, ``VGG`` or ``AlexNet``: its layers up to the last
              convolution's ReLU are used in place, not copied; the classifier is a new one;
            - a pair ``(features, head)`` of modules: images to maps, maps to logits.
        method: "picnn", "icnn" or "std".
        num_classes: K.
        num_filters: N of the target layer. None: what the backbone yields for "icnn" and where no
            convolution is inserted (a pair without insertion must give it), else
            ``round(12.8 * num_classes)``.
        insert_conv: True puts a new 3x3 convolution to ``num_filters`` channels after the
            features, with a ReLU unless ``inserted_activation`` says otherwise; False takes the
            features' own last maps.
        in_channels: channels that the features of a *pair* yield, wanted where a convolution is
            inserted; known for the other backbones.
        image_channels: of the images, for a *name*; None takes 1 for "small-resnet", else 3.
        weights: trained weights for the names that torchvision has them for, as it takes them.
        **options: passed to the method's class (``PICNN``, ``ICNN``, ``STD``).

    Returns:
        A ``PICNN``, ``ICNN`` or ``STD`` model, on the device of a given backbone's features.

    Raises:
        TypeError: a backbone that is none of these; options that the method does not know.
        ValueError: unknown names; arguments that are missing, disagree or do not apply.
        ImportError: torchvision is missing for a name that needs it.

    Example:
        >>> import torch
        >>> from picnn_fast.models import make_interpretable
        >>> model = make_interpretable("small-resnet", "picnn", num_classes=10)
        >>> model.filter_maps(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 128, 4, 4])
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, want one of {', '.join(map(repr, METHODS))}")
    checks.integer("num_classes", num_classes, 1)
    known = inspect.signature(METHODS[method]).parameters
    for name in options:
        if name not in known:
            wanted = ", ".join(n for n, p in known.items() if p.kind is p.KEYWORD_ONLY)
            raise TypeError(f"{name}: method {method!r} has no such option, want one of {wanted}")

    if not isinstance(backbone, str):
        for name, value in (("image_channels", image_channels), ("weights", weights)):
            if value is not None:
                raise ValueError(
                    f"{name}: got {value!r} with a backbone that is already built, want None"
                )
    built = is_torchvision_resnet(backbone) or is_torchvision_vgg(backbone)
    if isinstance(backbone, str) or built:
        if in_channels is not None:
            raise ValueError(
                f"in_channels: got {in_channels}, want None: it is known for this backbone"
                " (the channels of the images are image_channels)"
            )
        if isinstance(backbone, str):
            parts = _named(backbone, image_channels, weights)
        else:
            parts = (split_resnet if is_torchvision_resnet(backbone) else split_vgg)(backbone)
        features, channels = parts.features, parts.channels
        if num_filters is None:
            num_filters = channels
            if insert_conv and method != "icnn":
                num_filters = round(FILTERS_PER_CLASS * num_classes)
        elif not insert_conv and num_filters != channels:
            raise ValueError(
                f"num_filters: got {num_filters} with insert_conv=False, want {channels},"
                " the channels that the backbone yields; or None"
            )
        in_channels = channels
        head: Any = parts.head(checks.integer("num_filters", num_filters, 1), num_classes)
    elif isinstance(backbone, tuple | list) and len(backbone) == 2:
        features, head = backbone
        if insert_conv and in_channels is None:
            raise ValueError(
                "in_channels: got None, want the channels that features yield, to insert a"
                " convolution after them; or insert_conv=False"
            )
        if not insert_conv and in_channels is not None:
            raise ValueError(f"in_channels: got {in_channels} with insert_conv=False, want None")
        if num_filters is None:
            if not insert_conv:
                raise ValueError(
                    "num_filters: got None with insert_conv=False, want the channels that"
                    " features yield"
                )
            num_filters = round(FILTERS_PER_CLASS * num_classes)
            if method == "icnn" and in_channels is not None:
                num_filters = in_channels
    else:
        raise TypeError(
            f"backbone: got {type(backbone).__name__}, want a name"
            f" ({', '.join(map(repr, BACKBONES))}), a torchvision ResNet, VGG or AlexNet, or a pair"
            " (features, head) of modules"
        )
    build: Any = METHODS[method]
    model: InterpretableNetwork = build(
        features,
        head,
        num_classes,
        num_filters,
        in_channels=in_channels if insert_conv else None,
        **options,
    )
    placed = next(features.parameters(), None)
    return model if placed is None else model.to(placed.device)


def _named(name: str, image_channels: int | None, weights: Any) -> Backbone:
    if name not in BACKBONES:
        raise ValueError(f"backbone: got {name!r}, want one of {', '.join(map(repr, BACKBONES))}")
    options: dict[str, Any] = {}
    if image_channels is not None:
        options["image_channels"] = checks.integer("image_channels", image_channels, 1)
    if weights is not None:
        if "weights" not in inspect.signature(BACKBONES[name]).parameters:
            raise ValueError(
                f"weights: got {weights!r}, want None: {name!r} has no trained weights"
            )
        options["weights"] = weights
    return BACKBONES[name](**options)
