"""Layers: functions of ``picnn_fast.functional`` as modules, and what is put into a network."""

from typing import Literal

import torch
from torch import Tensor, fx, nn

from picnn_fast import checks, functional
from picnn_fast.ops.filter_loss import published_beta
from picnn_fast.ops.templates import CENTERS, PartTemplate, check_scale, check_template

# More would not be refused by the allocator before the machine has run out of memory.
MOST_FILTERS = 2**20


class LearnedBeta(nn.Module):
    """The beta of a gradient template, one a filter, which follows how far the maps spread.

    As in the authors' published code of ICNN, on coordinates from -1 to 1: T / tau =
    max(1 - beta·(2d / (n - 1)), -1), from 2 on. Every step moves it by rate / B of the way to
    clip(3 / spread, 1.5, 3), B the batch. The spread of a filter is the mean of
    sqrt(Σ|pos - mu|² x / Σ x), in positions, mu the rounded centre of mass, over the images of its
    category, weighted by the strengths of ``functional.published_filter_loss``. A filter without
    such an image in the batch, or without activations there, keeps its beta.

    The published rate is 500 times the network's, which falls from 1e-4 to 1e-5; ours stays. Nor is
    their optimiser's momentum taken over.

    Args:
        template: its norm counts; a gradient template.
        num_filters: N.
        rate: in (0, 1].

    Attributes:
        value: ``[N]``, a buffer.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of range.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.layers import LearnedBeta
        >>> beta = LearnedBeta(PartTemplate(), num_filters=1)
        >>> maps = torch.zeros(1, 1, 7, 7)
        >>> maps[0, 0, 3, 3] = 1  # one position alone: towards 3
        >>> beta.observe(maps, labels=torch.tensor([0]), filter_category=torch.tensor([0]))
        >>> beta.step()
        >>> beta.value
        tensor([2.0500])
    """

    value: Tensor
    move: Tensor

    def __init__(self, template: PartTemplate, num_filters: int, rate: float = 0.05) -> None:
        super().__init__()
        self.template = check_template(template)
        if not isinstance(template.profile, str) or template.profile != "gradient":
            raise ValueError(f"template: got {template}, want a gradient template to learn beta of")
        num_filters = checks.integer("num_filters", num_filters, 1)
        self.rate = checks.positive("rate", rate)
        if rate > 1:
            raise ValueError(f"rate: got {rate}, want a number in (0, 1]")
        self.register_buffer("value", torch.full((num_filters,), 2.0))
        # Of the step to come: a checkpoint is of between steps, when it is 0.
        self.register_buffer("move", torch.zeros(num_filters), persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """``[N]`` as ``PartTemplate`` and ``functional.template_mask`` count beta, on such maps."""
        n = max(height, width)
        return self.value * (2 * n / max(n - 1, 1))

    def observe(self, maps: Tensor, labels: Tensor, filter_category: Tensor) -> None:
        """See where beta is to go; ``step`` takes it there.

        Args:
            maps: ``[B, N, h, w]`` before the mask.
            labels: ``[B]`` integers, the images' categories.
            filter_category: ``[N]`` integers, each filter's.
        """
        # Single precision at least, whatever ``half()`` made of the buffers: steps would be lost.
        dtype = torch.promote_types(self.value.dtype, torch.float32)
        self.value, self.move = self.value.to(dtype), self.move.to(dtype)
        goal = published_beta(
            maps,
            self.template,
            labels=labels,
            filter_category=filter_category,
            beta=self(*maps.shape[2:]),
        ).to(dtype)
        way = torch.where(goal.isfinite(), goal - self.value, 0.0)
        self.move.copy_(way * (self.rate / max(len(maps), 1)))

    def step(self) -> None:
        """Told after each step of the optimiser, when no backward pass needs the old beta."""
        self.value.add_(self.move)
        self.move.zero_()

    def extra_repr(self) -> str:
        return f"num_filters={len(self.value)}, rate={self.rate}"


class TemplateMask(nn.Module):
    """The mask layer: keeps of each map what lies around its peak (``functional.template_mask``).

    Args:
        template: see ``PartTemplate``.
        scale: what the peak is multiplied by, or "tau".
        center: "argmax" or "mass".
        beta: of each filter, in place of the template's own; None keeps that.

    Raises:
        TypeError, ValueError: a template that is none, a scale that is no number > 0, another
            center.

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

    def __init__(
        self,
        template: PartTemplate,
        *,
        scale: float | Literal["tau"] = 1.0,
        center: Literal["argmax", "mass"] = "argmax",
        beta: LearnedBeta | None = None,
    ) -> None:
        super().__init__()
        self.template = check_template(template)
        self.scale = check_scale(scale)
        checks.one_of("center", center, CENTERS)
        self.center = center
        self.beta = beta

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, N, h, w]`` to the same shape."""
        if isinstance(maps, fx.Proxy) and isinstance(maps.tracer, fx.Tracer):
            # A trace takes the layer as it is, as it takes those of torch.nn.
            path = maps.tracer.path_of_module(self)
            return maps.tracer.create_proxy("call_module", path, (maps,), {})
        beta = None if self.beta is None else self.beta(*maps.shape[2:])
        return functional.template_mask(
            maps, self.template, scale=self.scale, center=self.center, beta=beta
        )[0]

    def extra_repr(self) -> str:
        return f"{self.template}, scale={self.scale!r}, center={self.center!r}"


def with_target_layer(
    features: nn.Module,
    in_channels: int | None,
    num_filters: int,
    *,
    activation: str = "relu",
    channel_dim: int = 1,
    kernel: int = 3,
) -> nn.Module:
    """``features`` and a new target layer: a convolution that keeps the size (bias, no batch norm).

    Args:
        features: images to maps ``[B, in_channels, h, w]``.
        in_channels: of those maps; None inserts nothing.
        num_filters: of the convolution.
        activation: after it: "relu", or "none", as in PICNN's published code: maps have both signs.
        channel_dim: the filter axis that the network is told of; 1 alone will do.
        kernel: see ``inserted_convolution``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """
    checks.one_of("inserted_activation", activation, ("relu", "none"))
    if in_channels is None:
        check_insert_kernel(kernel, inserted=False)
        if activation != "relu":
            raise ValueError(
                f"inserted_activation: got {activation!r}, want 'relu': no convolution is inserted"
            )
        return features
    checks.module("features", features)
    if channel_dim != 1:
        raise ValueError(
            f"in_channels: got {in_channels} with channel_dim={channel_dim}, want None:"
            " the inserted convolution takes maps [B, N, h, w]"
        )
    conv = inserted_convolution(in_channels, num_filters, kernel)
    return nn.Sequential(features, conv, *([nn.ReLU()] if activation == "relu" else []))


def inserted_convolution(in_channels: int, num_filters: int, kernel: int) -> nn.Conv2d:
    """The convolution of a new target layer, which leaves maps as large as they are.

    Args:
        in_channels: of the maps it takes.
        num_filters: it yields.
        kernel: side of its windows, 3 or 1: a 1x1 convolution has a ninth of the weights, and sees
            no neighbours.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.
    """
    in_channels = checks.integer("in_channels", in_channels, 1)
    num_filters = checks.integer("num_filters", num_filters, 1, MOST_FILTERS)
    check_insert_kernel(kernel)
    return nn.Conv2d(in_channels, num_filters, kernel_size=kernel, padding=kernel // 2)


def check_insert_kernel(kernel: int, inserted: bool = True) -> None:
    """
    Raises:
        TypeError, ValueError: a side other than 1 and 3; 1 where no convolution is inserted.
    """
    checks.integer("insert_kernel", kernel, 1)
    if kernel not in (1, 3):
        raise ValueError(f"insert_kernel: got {kernel}, want 1 or 3")
    if kernel != 3 and not inserted:
        raise ValueError(f"insert_kernel: got {kernel}, want 3: no convolution is inserted")
