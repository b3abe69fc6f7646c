"""How a method is put on a backbone, whatever that is given as."""

from typing import Any, Literal, NamedTuple

from torch import nn

from picnn_fast import checks
from picnn_fast.backbones import cut

# A bound of ours: with so many for each of a thousand classes the inserted convolution would be
# most of the network.
MOST_TIMES_THE_CHANNELS = 4


class Parts(NamedTuple):
    """What a method's class is made of: its arguments by position, and the options that follow."""

    features: nn.Module
    head: nn.Module
    num_classes: int
    num_filters: int
    options: dict[str, Any]


def parts_on_backbone(
    backbone: Any,
    *,
    filters_per_class: float | None,
    takes_channel_dim: bool,
    num_classes: int,
    layer: str | None,
    num_filters: int | None,
    insert_conv: bool,
    in_channels: int | None,
    image_channels: int | None,
    weights: Any,
    stem: Literal["default", "cifar"],
    options: dict[str, Any],
) -> Parts:
    """Features and a new head of a backbone, cut behind a layer.

    Args:
        filters_per_class: see ``InterpretableNetwork``.
        takes_channel_dim: whether the method can be told the filter axis of the maps.
        options: of the method; ``in_channels`` is added where a convolution is inserted.
        others: see ``make_interpretable``.

    Raises:
        TypeError, ValueError: see ``make_interpretable``.
    """
    per_class = filters_per_class if insert_conv else None

    if isinstance(backbone, tuple | list) and len(backbone) == 2:
        features, head = backbone
        checks.left_out(
            "a pair (features, head)",
            layer=(layer, None),
            image_channels=(image_channels, None),
            weights=(weights, None),
            stem=(stem, "default"),
        )
        if insert_conv and in_channels is None:
            raise ValueError(
                "in_channels: got None, want the channels that features yield, to insert a"
                " convolution after them; or insert_conv=False"
            )
        if not insert_conv and in_channels is not None:
            raise ValueError(f"in_channels: got {in_channels} with insert_conv=False, want None")
        if not insert_conv and num_filters is None:
            raise ValueError(
                "num_filters: got None with insert_conv=False, want the channels that features"
                " yield"
            )
        if num_filters is None and in_channels is not None:
            checks.integer("in_channels", in_channels, 1)
            num_filters = _default_filters(per_class, num_classes, in_channels)
    else:
        parts = cut(backbone, layer, image_channels=image_channels, weights=weights, stem=stem)
        features = parts.features
        channel_dim = options.get("channel_dim")
        if channel_dim is None and parts.channel_dim() != 1:
            channel_dim = parts.channel_dim()
            if not takes_channel_dim:
                raise ValueError(
                    f"backbone: got one whose maps of layer {parts.layer!r} have their channels"
                    " last, as tokens, want maps [B, N, h, w], or a method with channel_dim"
                )
            if insert_conv:
                raise ValueError(
                    f"insert_conv: got True, want False: maps of layer {parts.layer!r} have their"
                    " channels last, as tokens, which no convolution takes"
                )
            options = {**options, "channel_dim": channel_dim}
        channels = parts.channels(channel_dim)
        if in_channels is not None:
            checks.integer("in_channels", in_channels, 1)
        elif channels is None:
            raise ValueError(
                f"in_channels: got None, want the channels that layer {parts.layer!r} yields:"
                " only running the network can tell"
            )
        else:
            in_channels = channels
        if channels not in (None, in_channels):
            raise ValueError(
                f"in_channels: got {in_channels}, want None: it is known for this backbone,"
                f" {channels} (the channels of the images are image_channels)"
            )
        if not insert_conv and num_filters not in (None, in_channels):
            raise ValueError(
                f"num_filters: got {num_filters} with insert_conv=False, want {in_channels},"
                " the channels that the backbone yields; or None"
            )
        if num_filters is None:
            num_filters = _default_filters(per_class, num_classes, in_channels)
        checks.integer("num_filters", num_filters, 1)
        head = parts.head(in_channels, num_filters, num_classes)
    if insert_conv:
        options = {**options, "in_channels": in_channels}
    assert num_filters is not None
    return Parts(features, head, num_classes, num_filters, options)


def _default_filters(per_class: float | None, num_classes: int, channels: int) -> int:
    if per_class is None:
        return channels
    return min(round(per_class * num_classes), MOST_TIMES_THE_CHANNELS * channels)
