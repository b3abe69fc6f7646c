"""What the figures of localisation are told of images, and what they need."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.parts import PartDataModule
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import (
    ActivMapLocalisation,
    CAMLocalisation,
    GradMapLocalisation,
    PointingGame,
    SaliencyLocalisation,
)
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.gradients import class_activation, class_saliency, filter_saliency

# Elements of the saliency that is held at a time.
_MOST_SALIENCY = 2**25
# Sides of the pointing game's grids: the greatest whose images are all of different classes.
_GRIDS = (3, 2)


def needs_object_masks(network: InterpretableNetwork, data: object) -> str | None:
    """Why a figure that compares pixels with the object cannot be had, or None."""
    return None if isinstance(data, PartDataModule) else "the data has no object masks"


def needs_maps_and_object_masks(network: InterpretableNetwork, data: object) -> str | None:
    """The same of a figure that resizes maps to the image."""
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    return needs_object_masks(network, data)


def gradmap(network: InterpretableNetwork, data: object, draws: int) -> GradMapLocalisation:
    return GradMapLocalisation(network.num_filters, network.num_classes)


def prepare_gradmap(metric: GradMapLocalisation, seen: Observation) -> None:
    metric.prepare(seen.pooled, seen.labels)


def update_gradmap(metric: GradMapLocalisation, seen: Observation) -> None:
    # Twice the pixels of what is kept, with what is made of it.
    pixels = seen.images[0, 0].numel() * metric.filters
    masks, filters = _object_masks(seen), metric.top_filters(seen.labels)
    for rows in torch.arange(len(filters)).split(max(1, _MOST_SALIENCY // pixels)):
        rows = rows.to(filters.device)
        saliency = filter_saliency(seen.network, seen.images[rows], filters[rows])
        metric.update(saliency, masks[rows])


def class_gradmap(network: InterpretableNetwork, data: object, draws: int) -> SaliencyLocalisation:
    return SaliencyLocalisation()


def update_class_gradmap(metric: SaliencyLocalisation, seen: Observation) -> None:
    saliency = class_saliency(seen.network, seen.images, seen.labels)
    metric.update(saliency[:, None], _object_masks(seen))


def activmap(network: InterpretableNetwork, data: object, draws: int) -> ActivMapLocalisation:
    return ActivMapLocalisation(network.num_filters, network.num_classes)


def prepare_activmap(metric: ActivMapLocalisation, seen: Observation) -> None:
    metric.prepare(seen.maps)


def update_activmap(metric: ActivMapLocalisation, seen: Observation) -> None:
    metric.update(seen.maps, _object_masks(seen), seen.labels)


def cam(network: InterpretableNetwork, data: object, draws: int) -> CAMLocalisation:
    return CAMLocalisation()


def update_cam(metric: CAMLocalisation, seen: Observation) -> None:
    metric.update(seen.class_activation, _object_masks(seen))


def needs_grids(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    """Why the pointing game cannot be played, or None."""
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    size = _grid_size(network)
    if size is None:
        return f"{network.num_classes} classes are too few for a grid of different ones"
    images: Any = data.test_set
    image = images[0][0]
    grid = image.new_zeros(1, len(image), *(size * side for side in image.shape[1:]))
    grid = grid.to(next(network.parameters()).device)
    try:
        with torch.no_grad():
            maps, bypass = network.encode(grid)
            network.head_logits(maps, bypass=bypass)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the network takes no images of {size} times the size: {reason}"
    return None


def pointing_game(network: InterpretableNetwork, data: object, draws: int) -> PointingGame:
    size = _grid_size(network)
    assert size is not None
    return PointingGame(network.num_classes, partial(_attribution, network), size=size)


def update_pointing_game(metric: PointingGame, seen: Observation) -> None:
    metric.update(seen.images, seen.logits, seen.labels)


def _grid_size(network: InterpretableNetwork) -> int | None:
    return next((size for size in _GRIDS if network.num_classes >= size**2), None)


def _attribution(network: InterpretableNetwork, images: Tensor, targets: Tensor) -> Tensor:
    """Grad-CAM of each class, ``[B, T, H, W]``, as ``explain.grad_cam`` resizes it."""
    with torch.no_grad():
        maps, bypass = network.encode(images)
    heat = class_activation(network, maps, targets, bypass).relu()
    return F.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)


def _object_masks(seen: Observation) -> Tensor:
    parts = seen.parts
    assert parts is not None
    masks: Any = parts.object_mask
    return masks  # type: ignore[no-any-return]
