"""Grad-CAM of a subset of filters: what a class's own filters see, and what the others see."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.models.base import InterpretableNetwork

with extra("report"):
    from captum.attr import LayerGradCam


class PathwayGradCam(NamedTuple):
    """Grad-CAM maps ``[B, H, W]`` by the filters they add up, on one scale.

    Attributes:
        all_filters: through all of them.
        class_filters: through those of the true class.
        complement: through all others.
        random_filters: through as many as are the class's, drawn among all: the control. What the
            class's filters show counts where these show less.
    """

    all_filters: Tensor
    class_filters: Tensor
    complement: Tensor
    random_filters: Tensor


def filter_attributions(
    network: nn.Module, images: Tensor, targets: Tensor, layer: str | nn.Module | None = None
) -> Tensor:
    """Grad-CAM's term of each filter: its map, times the mean gradient of the target's logit.

    Args:
        network: taken as it is: call ``eval()`` first. An interpretable one, or any that makes
            logits ``[B, K]`` of images.
        images: ``[B, C, H, W]``.
        targets: class explained, ``[B]`` integers in [0, K).
        layer: a module of the network or its name in ``named_modules()``, whose output are maps
            ``[B, N, h, w]``. None takes the target layer, which interpretable networks and their
            ``discriminator()`` have.

    Returns:
        ``[B, N, h, w]``; the sum over N before the ReLU is Grad-CAM.

    Raises:
        TypeError, ValueError: see ``grad_cam``.

    Source:
        Selvaraju et al., "Grad-CAM", ICCV 2017, eq. 1-2; captum's ``LayerGradCam``.
    """
    _check_images("targets", targets, images)
    module = _module(network, layer)
    maps: list[Any] = []

    def logits(batch: Tensor) -> Tensor:
        if isinstance(network, InterpretableNetwork):
            reached, bypass = network.encode(batch)
            output: Any = network.head_logits(reached, bypass=bypass)
        else:
            output = network(batch)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise ValueError(f"network: yielded {_said(output)}, want logits [B, K]")
        checks.labels("targets", targets, len(output), output.shape[1])
        if not maps:
            raise ValueError(f"layer: got {layer!r}, which the network does not run")
        if not isinstance(maps[-1], Tensor) or maps[-1].ndim != 4:
            raise ValueError(f"layer: yielded {_said(maps[-1])}, want maps [B, N, h, w]")
        return output

    # Gradients whatever the caller's mode is, and though every parameter be frozen.
    with torch.inference_mode(False), torch.enable_grad():
        batch = images.detach().clone().requires_grad_()
        handle = module.register_forward_hook(lambda _, inputs, output: maps.append(output))
        try:
            method = LayerGradCam(logits, module)
            terms: Tensor = method.attribute(
                batch, target=targets.to(torch.int64), attr_dim_summation=False
            )
        finally:
            handle.remove()
    return terms.detach()


def grad_cam(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    filters: Tensor | None = None,
    *,
    layer: str | nn.Module | None = None,
) -> Tensor:
    """Grad-CAM of a class, through all filters or through some.

    Args:
        network: in eval mode: an interpretable one, or any that makes logits ``[B, K]`` of images.
        images: ``[B, C, H, W]``.
        targets: class explained, ``[B]`` integers in [0, K).
        filters: ``[B, N]`` weights, 1 for a filter that counts and 0 for one that does not; None
            takes all.
        layer: a module of the network or its name in ``named_modules()``, whose output are maps
            ``[B, N, h, w]``. None takes the target layer, which interpretable networks and their
            ``discriminator()`` have.

    Returns:
        ``[B, H, W]``, at least 0, resized to the images bilinearly; in units of the logit, not
        normalised.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that disagree, targets that are no class, a network that yields no
            logits, a layer that there is not or that yields no maps ``[B, N, h, w]``.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import grad_cam
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> images, targets = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
        >>> grad_cam(network, images, targets).shape
        torch.Size([2, 8, 8])
        >>> heat = grad_cam(network.discriminator(), images, targets, layer="features.0")
    """
    terms = filter_attributions(network, images, targets, layer)
    if filters is not None and filters.shape != terms.shape[:2]:
        raise ValueError(
            f"filters: got shape {tuple(filters.shape)}, want {tuple(terms.shape[:2])}:"
            " images, filters of the target layer"
        )
    return _combine(terms, filters, images)


def pathway_grad_cam(
    network: InterpretableNetwork, images: Tensor, labels: Tensor, *, seed: int = 0
) -> PathwayGradCam:
    """Grad-CAM of the true class through all filters, the class's, the rest, and a control.

    The class's filters are a mask drawn for the label's row of ``ownership()``, as in ACC3; the
    rest is its complement. Where that is near 0 and 1 (a trained PICNN) the draw hardly matters;
    where it is random (STD), it is a random tenth of the filters with ten classes. Few filters are
    dark by their number alone: the control is as many, drawn at random among all.

    Args:
        network: any whose filters belong to classes, in eval mode.
        images: ``[B, C, H, W]``.
        labels: true classes, ``[B]`` integers in [0, K).
        seed: of the draw.

    Returns:
        Four maps ``[B, H, W]``, comparable with one another.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that disagree, labels that are no class, filters that belong to none.
    """
    if not isinstance(network, InterpretableNetwork):
        raise TypeError(
            f"network: got {type(network).__name__}, want an InterpretableNetwork, whose filters"
            " belong to classes; grad_cam takes any network"
        )
    _check_images("labels", labels, images)
    mask = network.class_mask(labels, seed=seed)
    # A rank each, by a generator of its own: the mask's draws and torch's stay as they were.
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.rand(mask.shape, generator=draw).argsort(1).argsort(1).to(mask.device)
    control = (ranks < mask.sum(1, keepdim=True)).to(mask)
    terms = filter_attributions(network, images, labels)
    return PathwayGradCam(
        _combine(terms, None, images),
        _combine(terms, mask, images),
        _combine(terms, 1 - mask, images),
        _combine(terms, control, images),
    )


def _module(network: nn.Module, layer: str | nn.Module | None) -> nn.Module:
    """The module of ``network`` that ``layer`` says."""
    checks.module("network", network)
    modules: dict[str, nn.Module] = {name: m for name, m in network.named_modules() if name}
    if isinstance(network, InterpretableNetwork) and layer is None:
        if network.channel_dim != 1:
            raise ValueError(
                f"network: got one with channel_dim={network.channel_dim}, want maps [B, N, h, w]"
            )
        return modules["features"]
    if layer is None:
        if [name for name, _ in network.named_children()] == ["features", "head"]:  # discriminator
            return modules["features"]
        raise ValueError(
            f"layer: got None with a {type(network).__name__}, want one of its modules, whose maps"
            " count, or its name in named_modules()"
        )
    if isinstance(layer, nn.Module):
        if all(layer is not module for module in modules.values()):
            raise ValueError(
                f"layer: got a {type(layer).__name__} that is no module of the network, want one"
            )
        return layer
    if not isinstance(layer, str):
        raise TypeError(f"layer: got {type(layer).__name__}, want a module or its name")
    if layer not in modules:
        raise ValueError(
            f"layer: got {layer!r},{checks.did_you_mean(layer, modules)} want a module, named as in"
            " named_modules() of the network"
        )
    return modules[layer]


def _check_images(name: str, labels: Tensor, images: Tensor) -> None:
    checks.floating("images", images)
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, want [batch, channels, h, w]")
    checks.tensor(name, labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: got shape {tuple(labels.shape)}, want ({len(images)},), one an image"
        )


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _combine(terms: Tensor, filters: Tensor | None, images: Tensor) -> Tensor:
    if filters is not None:
        terms = terms * filters[:, :, None, None]
    heat = torch.relu(terms.sum(1, keepdim=True))
    return F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
