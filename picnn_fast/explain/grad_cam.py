"""Grad-CAM of a subset of filters: what a class's own filters see, and what the others see."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast._extras import extra
from picnn_fast.models.base import InterpretableNetwork

with extra("report"):
    from captum.attr import LayerGradCam


class PathwayGradCam(NamedTuple):
    """Grad-CAM maps ``[B, H, W]`` by the filters they add up, on one scale."""

    all_filters: Tensor
    class_filters: Tensor
    complement: Tensor


def filter_attributions(network: InterpretableNetwork, images: Tensor, targets: Tensor) -> Tensor:
    """Grad-CAM's term of each filter: its map, times the mean gradient of the target's logit.

    Args:
        network: PICNN or STD, taken as it is: call ``eval()`` first.
        images: ``[B, C, H, W]``.
        targets: class explained, ``[B]`` integers.

    Returns:
        ``[B, N, h, w]``; the sum over N before the ReLU is Grad-CAM.

    Raises:
        ValueError: a network whose maps are not ``[B, N, h, w]``.

    Source:
        Selvaraju et al., "Grad-CAM", ICCV 2017, eq. 1-2; captum's ``LayerGradCam``.
    """

    def logits(batch: Tensor) -> Tensor:
        return network.head_logits(network.filter_maps(batch))

    if network.channel_dim != 1:
        raise ValueError(
            f"network: got one with channel_dim={network.channel_dim}, want maps [B, N, h, w]"
        )
    method = LayerGradCam(logits, network.features)
    terms: Tensor = method.attribute(images, target=targets, attr_dim_summation=False)
    return terms.detach()


def grad_cam(
    network: InterpretableNetwork, images: Tensor, targets: Tensor, filters: Tensor | None = None
) -> Tensor:
    """Grad-CAM of a class, through all filters or through some.

    Args:
        network: PICNN or STD in eval mode.
        images: ``[B, C, H, W]``.
        targets: class explained, ``[B]`` integers.
        filters: ``[B, N]`` weights, 1 for a filter that counts and 0 for one that does not; None
            takes all.

    Returns:
        ``[B, H, W]``, at least 0, resized to the images bilinearly; in units of the logit, not
        normalised.

    Raises:
        ValueError: shapes that disagree.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import grad_cam
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> grad_cam(network, torch.rand(2, 1, 8, 8), torch.tensor([3, 7])).shape
        torch.Size([2, 8, 8])
    """
    _check(images, targets)
    terms = filter_attributions(network, images, targets)
    if filters is not None and filters.shape != terms.shape[:2]:
        raise ValueError(
            f"filters: got shape {tuple(filters.shape)}, want {tuple(terms.shape[:2])}:"
            " images, filters of the target layer"
        )
    return _combine(terms, filters, images)


def pathway_grad_cam(
    network: InterpretableNetwork, images: Tensor, labels: Tensor, *, seed: int = 0
) -> PathwayGradCam:
    """Grad-CAM of the true class through all filters, the class's filters, and the rest.

    The class's filters are a mask drawn for the label's row of the correspondence matrix, as in
    ACC3; the rest is its complement. Where the matrix is near 0 and 1 (a trained PICNN) the draw
    hardly matters; for STD, whose matrix is random, it is a random tenth of the filters with ten
    classes.

    Args:
        network: PICNN or STD in eval mode.
        images: ``[B, C, H, W]``.
        labels: true classes, ``[B]`` integers.
        seed: of the draw.

    Returns:
        Three maps ``[B, H, W]`` an image, comparable with one another.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(images, labels)
    mask = network.class_mask(labels, seed=seed)
    terms = filter_attributions(network, images, labels)
    return PathwayGradCam(
        _combine(terms, None, images),
        _combine(terms, mask, images),
        _combine(terms, 1 - mask, images),
    )


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, want [batch, channels, h, w]")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, want ({len(images)},), one an image"
        )


def _combine(terms: Tensor, filters: Tensor | None, images: Tensor) -> Tensor:
    if filters is not None:
        terms = terms * filters[:, :, None, None]
    heat = torch.relu(terms.sum(1, keepdim=True))
    return F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
