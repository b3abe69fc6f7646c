"""One call from a backbone to an interpretable network."""

import inspect
from typing import Any, Literal

from picnn_fast import checks
from picnn_fast.layers import MOST_FILTERS, check_insert_kernel
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.csg import CSG
from picnn_fast.models.explainer import Explainer
from picnn_fast.models.iccnn import ICCNN
from picnn_fast.models.icnn import ICNN
from picnn_fast.models.picnn import PICNN
from picnn_fast.models.std import STD

METHODS: dict[str, type[InterpretableNetwork]] = {
    "std": STD,
    "picnn": PICNN,
    "csg": CSG,
    "icnn": ICNN,
    "iccnn": ICCNN,
    "explainer": Explainer,
}


def make_interpretable(
    backbone: Any,
    method: str = "picnn",
    *,
    num_classes: int,
    layer: str | None = None,
    num_filters: int | None = None,
    insert_conv: bool = True,
    insert_kernel: int = 3,
    in_channels: int | None = None,
    image_channels: int | None = None,
    weights: Any = None,
    stem: Literal["default", "cifar"] = "default",
    **options: Any,
) -> InterpretableNetwork:
    """Put an interpretable target layer and a classifier on a backbone.

    Args:
        backbone: one of
            - a name of ``picnn_fast.backbones.BACKBONES``, e.g. "small-resnet" or "resnet18", or
              "timm:NAME" for any network of timm's;
            - any module, images to logits, that ``torch.fx`` can trace down to ``layer``: its own
              layers are used in place, not copied, and its classifier made anew for N filters and
              K classes; or one with ``forward_features`` and ``forward_head``, as timm's have;
            - a pair ``(features, head)`` of modules: images to maps, maps to logits.
        method: "picnn", "csg", "icnn", "iccnn", "explainer" or "std". For "explainer" the backbone
            is the trained network to explain, which keeps its classifier; see
            ``Explainer.on_backbone``.
        num_classes: K.
        layer: name of the module behind which the backbone is cut, "layer4" or "features.29", see
            ``picnn_fast.backbones.split``. None: where the named ones are cut, and torchvision's
            networks of their families; between ``forward_features`` and ``forward_head``.
        num_filters: N of the target layer. None: what the backbone yields where no convolution is
            inserted (a pair without insertion must give it) and for methods without
            ``filters_per_class``, as "icnn" and "iccnn"; else
            ``round(filters_per_class * num_classes)``, 12.8 a class (PICNN, figure 5), but at most
            four times the channels that the backbone yields, a bound of ours: with 1000 classes
            2048 on a ResNet-18.
        insert_conv: True puts a new convolution to ``num_filters`` channels after the features,
            with a ReLU unless ``inserted_activation`` says otherwise; False takes the features'
            own last maps, as a method that has no ``in_channels`` wants it, and a backbone whose
            maps are tokens ``[B, T, N]``, such as "vit_b_16". Filters are the channels of all
            tokens then, the class token among them, which may be all that the head looks at.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        in_channels: channels that the features of a *pair* yield, wanted where a convolution is
            inserted; known for the other backbones, unless only running them can tell.
        image_channels: of the images, for a *name*; None takes 1 for "small-resnet", else 3.
        weights, stem: for a *name*: trained weights, and how it begins, see
            ``picnn_fast.backbones.cut``.
        **options: passed to the method's class (``METHODS``).

    Returns:
        A model of the method's class, on the device of a given backbone's features.

    Raises:
        TypeError: a backbone that is none of these; options that the method does not know.
        ValueError: unknown names; arguments that are missing, disagree or do not apply; a backbone
            that cannot be cut there, or whose classifier cannot be made anew.
        ImportError: torchvision is missing for a name that needs it.

    Example:
        >>> import torch
        >>> from picnn_fast.models import make_interpretable
        >>> model = make_interpretable("small-resnet", "picnn", num_classes=10)
        >>> model.filter_maps(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 128, 4, 4])
    """
    if method not in METHODS:
        raise ValueError(
            f"method: got {method!r},{checks.did_you_mean(method, METHODS)} want one of"
            f" {', '.join(map(repr, METHODS))}"
        )
    num_classes = checks.integer("num_classes", num_classes, 1)
    if num_filters is not None:
        num_filters = checks.integer("num_filters", num_filters, 1, MOST_FILTERS)
    insert_conv = checks.boolean("insert_conv", insert_conv)
    check_insert_kernel(insert_kernel, inserted=insert_conv)
    # A network that is explained is told itself, not from where.
    given = {name: value for name, value in options.items() if name != METHODS[method].network_from}
    if insert_kernel != 3:  # methods need not know of it
        options["insert_kernel"] = insert_kernel
    kind = METHODS[method]
    known = inspect.signature(kind).parameters
    for name in options:
        if name not in known:
            wanted = ", ".join(n for n, p in known.items() if p.kind is p.KEYWORD_ONLY)
            raise TypeError(f"{name}: method {method!r} has no such option, want one of {wanted}")
    if insert_conv and "in_channels" not in known:
        raise ValueError(
            f"insert_conv: got True, want False: method {method!r} has no in_channels, and puts no"
            " convolution after the features"
        )
    model: InterpretableNetwork = kind.on_backbone(
        backbone,
        num_classes=num_classes,
        layer=layer,
        num_filters=num_filters,
        insert_conv=insert_conv,
        in_channels=in_channels,
        image_channels=image_channels,
        weights=weights,
        stem=stem,
        **options,
    )
    model.recipe = {
        "method": method,
        "backbone": _told(backbone),
        "network": {
            "num_classes": num_classes,
            "layer": layer,
            "num_filters": num_filters,
            "insert_conv": insert_conv,
            "insert_kernel": insert_kernel,
            "in_channels": in_channels,
            "image_channels": image_channels,
            "stem": stem,
        },
        "options": given,
    }
    placed = next(model.features.parameters(), None)
    return model if placed is None else model.to(placed.device)


def _told(backbone: Any) -> Any:
    """The name of a backbone, or the recipe of a network, or None where neither builds it again."""
    if isinstance(backbone, InterpretableNetwork):
        recipe = backbone.recipe
        return recipe if recipe is not None and recipe["backbone"] is not None else None
    return backbone if isinstance(backbone, str) else None
