"""Where a network sees the object of single images, to be looked at: CAM and GradMap."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast.metrics.localisation import region_ious, saliency_maps, top_regions
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.gradients import class_activation, class_saliency


class LocalisationExamples(NamedTuple):
    """Of images ``[B]``, as the figures of localisation have them.

    Attributes:
        cam: the class activation map of the label, of either sign, ``[B, H, W]``.
        cam_regions: the top 30 % of its pixels, ``[B, H, W]`` bool.
        cam_ious: of these and the object ``[B]``; NaN where the object mask is empty.
        gradmap: the saliency of the label's probability over its root mean square, smoothed,
            ``[B, H, W]``.
        gradmap_regions: where that is above 1, ``[B, H, W]`` bool.
        gradmap_ious: of these and the object ``[B]``; NaN where the object mask is empty.
    """

    cam: Tensor
    cam_regions: Tensor
    cam_ious: Tensor
    gradmap: Tensor
    gradmap_regions: Tensor
    gradmap_ious: Tensor


def localisation_examples(
    network: InterpretableNetwork, images: Tensor, labels: Tensor, object_masks: Tensor
) -> LocalisationExamples:
    """What some images have in the figures CAM and GradMap class, to be drawn.

    Args:
        network: in eval mode, with maps ``[B, N, h, w]``.
        images: ``[B, C, H, W]`` as the network takes them, on its device.
        labels: ``[B]`` integers in [0, K).
        object_masks: ``[B, H, W]`` bool.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that disagree, labels that are no class, a network with tokens for maps.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import localisation_examples
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> object_masks = torch.ones(2, 8, 8, dtype=torch.bool)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
        >>> seen = localisation_examples(network, images, labels, object_masks)
        >>> seen.cam.shape, seen.gradmap_ious.shape
        (torch.Size([2, 8, 8]), torch.Size([2]))
    """
    checks.floating("images", images)
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, want [B, C, H, W]")
    checks.labels("labels", labels, len(images), network.num_classes)
    checks.tensor("object_masks", object_masks)
    size = images.shape[2:]
    if object_masks.dtype != torch.bool or object_masks.shape != (len(images), *size):
        raise ValueError(
            f"object_masks: got {object_masks.dtype} {tuple(object_masks.shape)}, want torch.bool"
            f" {(len(images), *size)}"
        )
    if network.channel_dim != 1:
        raise ValueError(
            f"network: got one with channel_dim={network.channel_dim}, want maps [B, N, h, w]"
        )
    labels = labels.to(torch.int64)
    with torch.no_grad():
        maps, bypass = network.encode(images)
    heat = class_activation(network, maps, labels[:, None], bypass)
    cam_regions = top_regions(heat[:, 0], size, 0.3)
    gradmap = saliency_maps(class_saliency(network, images, labels))
    return LocalisationExamples(
        F.interpolate(heat, size=size, mode="bilinear", align_corners=False)[:, 0],
        cam_regions,
        region_ious(cam_regions, object_masks),
        gradmap,
        gradmap > 1,
        region_ious(gradmap > 1, object_masks),
    )
