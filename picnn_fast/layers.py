"""Layers: functions of ``picnn_fast.functional`` as modules, and what is put into a network."""

from typing import Literal

from torch import Tensor, nn

from picnn_fast import functional
from picnn_fast.ops import checks
from picnn_fast.ops.templates import PartTemplate, check_scale, check_template


class TemplateMask(nn.Module):
    """The mask layer: keeps of each map what lies around its peak (``functional.template_mask``).

    Args:
        template: see ``PartTemplate``.
        scale: what the peak is multiplied by, or "tau".

    Raises:
        TypeError, ValueError: a template that is none, a scale that is no number > 0.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.layers import TemplateMask
        >>> layer = TemplateMask(PartTemplate("l2"))
        >>> layer(torch.rand(2, 8, 14, 14)).shape
        torch.Size([2, 8, 14, 14])
    """

    # A position of the output shows the same pixels as the one of the input.
    elementwise = True

    def __init__(self, template: PartTemplate, *, scale: float | Literal["tau"] = 1.0) -> None:
        super().__init__()
        self.template = check_template(template)
        self.scale = check_scale(scale)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, N, h, w]`` to the same shape."""
        return functional.template_mask(maps, self.template, scale=self.scale)[0]

    def extra_repr(self) -> str:
        return f"{self.template}, scale={self.scale!r}"


def with_target_layer(
    features: nn.Module,
    in_channels: int | None,
    num_filters: int,
    *,
    activation: str = "relu",
    channel_dim: int = 1,
) -> nn.Module:
    """``features`` and a new target layer: a 3x3 convolution (padding 1, bias, no batch norm).

    Args:
        features: images to maps ``[B, in_channels, h, w]``.
        in_channels: of those maps; None inserts nothing.
        num_filters: of the convolution.
        activation: after it: "relu", or "none", as in PICNN's published code: maps have both signs.
        channel_dim: the filter axis that the network is told of; 1 alone will do.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """
    checks.one_of("inserted_activation", activation, ("relu", "none"))
    if in_channels is None:
        if activation != "relu":
            raise ValueError(
                f"inserted_activation: got {activation!r}, want 'relu': no convolution is inserted"
            )
        return features
    if not isinstance(features, nn.Module):
        raise TypeError(f"features: got {type(features).__name__}, want a torch.nn.Module")
    checks.integer("in_channels", in_channels, 1)
    checks.integer("num_filters", num_filters, 1)
    if channel_dim != 1:
        raise ValueError(
            f"in_channels: got {in_channels} with channel_dim={channel_dim}, want None:"
            " the inserted convolution takes maps [B, N, h, w]"
        )
    conv = nn.Conv2d(in_channels, num_filters, kernel_size=3, padding=1)
    return nn.Sequential(features, conv, *([nn.ReLU()] if activation == "relu" else []))
