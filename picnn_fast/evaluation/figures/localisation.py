"""Whether filters are active where the object is (CSG, section 5.1)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast._terminal import counted
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.parts import PartDataModule
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import (
    ActivMapLocalisation,
    CAMLocalisation,
    GradMapLocalisation,
    Localisation,
    PointingGame,
    SaliencyLocalisation,
)
from picnn_fast.metrics.ranks import agreeing
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.gradients import class_activation, class_saliency, filter_saliency

# Images whose gradients are taken together, which a small batch makes slow, and elements of their
# saliency, at most.
_TOGETHER = 32
_MOST_SALIENCY = 2**25
# Sides of the pointing game's grids: the greatest whose images are all of different classes.
_GRIDS = (3, 2)


def _needs_object_masks(network: InterpretableNetwork, data: object) -> str | None:
    """Why a figure that compares pixels with the object cannot be had, or None."""
    return None if isinstance(data, PartDataModule) else "the data has no object masks"


def _needs_maps_and_object_masks(network: InterpretableNetwork, data: object) -> str | None:
    """The same of a figure that resizes maps to the image."""
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    return _needs_object_masks(network, data)


class _GradMap(GradMapLocalisation):
    """``GradMapLocalisation`` that takes the gradients itself, of images of several batches.

    Few of a batch are chosen, and a backward pass of few costs nearly as much as one of many.

    Args:
        network: whose filters they are.
        batch_size: images of which gradients are taken together, at most.
        **kwargs: of ``GradMapLocalisation``.
    """

    def __init__(self, network: InterpretableNetwork, batch_size: int, **kwargs: Any) -> None:
        super().__init__(network.num_filters, network.num_classes, **kwargs)
        # The network itself would be a part of the metric, which is a module.
        self._saliency = partial(filter_saliency, network)
        self._batch_size = min(batch_size, _TOGETHER)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(  # type: ignore[override]
        self, images: Tensor, object_masks: Tensor, labels: Tensor
    ) -> None:
        """Add a batch of images ``[B, C, H, W]``; the rest as of ``ActivMapLocalisation``."""
        filters = self.top_filters(labels)
        fitting = _MOST_SALIENCY // (images[0, 0].numel() * self.filters)
        together = max(1, min(self._batch_size, fitting))
        self._waiting += zip(images, object_masks, filters, strict=True)
        while len(self._waiting) >= together:
            self._look(together)

    def compute(self) -> Localisation:
        self._look(len(self._waiting))
        return super().compute()

    def join(self, to: int | None = None, group: Any = None) -> None:
        with agreeing(group):
            self._look(len(self._waiting))
        super().join(to, group)

    def reset(self) -> None:
        super().reset()
        self._waiting = []

    def _look(self, count: int) -> None:
        """Take gradients of the first images that wait."""
        if count > 0:
            some, self._waiting = self._waiting[:count], self._waiting[count:]
            images, masks, filters = map(torch.stack, zip(*some, strict=True))
            super().update(self._saliency(images, filters), masks)


def _gradmap(network: InterpretableNetwork, data: SeededDataModule, draws: int) -> _GradMap:
    return _GradMap(network, data.batch_size)


def _prepare_gradmap(metric: _GradMap, seen: Observation) -> None:
    metric.prepare(seen.pooled, seen.labels)


def _update_gradmap(metric: _GradMap, seen: Observation) -> None:
    metric.update(seen.images, _object_masks(seen), seen.labels)


def _class_gradmap(network: InterpretableNetwork, data: object, draws: int) -> SaliencyLocalisation:
    return SaliencyLocalisation()


def _update_class_gradmap(metric: SaliencyLocalisation, seen: Observation) -> None:
    saliency = class_saliency(seen.network, seen.images, seen.labels)
    metric.update(saliency[:, None], _object_masks(seen))


def _activmap(network: InterpretableNetwork, data: object, draws: int) -> ActivMapLocalisation:
    return ActivMapLocalisation(network.num_filters, network.num_classes)


def _prepare_activmap(metric: ActivMapLocalisation, seen: Observation) -> None:
    metric.prepare(seen.maps)


def _update_activmap(metric: ActivMapLocalisation, seen: Observation) -> None:
    metric.update(seen.maps, _object_masks(seen), seen.labels)


def _cam(network: InterpretableNetwork, data: object, draws: int) -> CAMLocalisation:
    return CAMLocalisation()


def _update_cam(metric: CAMLocalisation, seen: Observation) -> None:
    metric.update(seen.class_activation, _object_masks(seen))


def _needs_grids(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    """Why the pointing game cannot be played, or None."""
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    size = _grid_size(network)
    if size is None:
        return f"{counted(network.num_classes, 'class')}: too few for a grid of different ones"
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


def _pointing_game(network: InterpretableNetwork, data: object, draws: int) -> PointingGame:
    size = _grid_size(network)
    assert size is not None
    return PointingGame(network.num_classes, partial(_attribution, network), size=size)


def _update_pointing_game(metric: PointingGame, seen: Observation) -> None:
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


def _localisation(
    name: str, heading: str, percent: int, iou: str, precision: str, reading: str, **told: Any
) -> dict[str, Figure]:
    """The two parts of a metric of localisation: IoU, and its precision at so many per cent."""
    common: Any = {"better": "higher", "reading": reading, **told}
    return {
        f"{name}_iou": Figure(heading=f"{heading} IoU", meaning=iou, part="iou", **common),
        f"{name}_ap{percent}": Figure(
            heading=f"{heading} AP{percent}", meaning=precision, part="precision", **common
        ),
    }


FIGURES: dict[str, Figure] = {
    # 30 backward passes an image, each of a forward pass or more: no way of computing it is quicker
    # than a forward pass over the same images, so that it is of few.
    **_localisation(
        "gradmap",
        "GradMap",
        20,
        "IoU of the object and the pixels that move a class's 30 filters most, mean over them",
        "share of images in which that mean is at least 0.2",
        "Higher is better: pixels at chance have at most the share of the image that the object"
        " fills, and a plain ResNet-152 on VOC Part was published at 0.26 and 0.70.",
        metric=_gradmap,
        prepare=_prepare_gradmap,
        update=_update_gradmap,
        needs=_needs_object_masks,
        when="asked",
        images=200,
    ),
    **_localisation(
        "gradmap_class",
        "GradMap class",
        20,
        "IoU of the object and the pixels that move the true class's probability most",
        "share of images in which that is at least 0.2",
        "Higher is better: chance is as of GradMap, and a plain network, which is trained on that"
        " probability, is the mark to beat.",
        metric=_class_gradmap,
        update=_update_class_gradmap,
        needs=_needs_object_masks,
        when="asked",
        images=500,
    ),
    **_localisation(
        "activmap",
        "ActivMap",
        30,
        "IoU of the object and a filter's top 30 %, of its best class, mean over filters",
        "share of that class's images in which that is above 0.3, mean over filters",
        "Higher is better: chance is about 0.3 o / (0.3 + 0.7 o) of an object that fills a share o,"
        " o of a filter that fires in less than 30 % of places and so marks the whole image, and a"
        " plain ResNet-152 on VOC Part was published at 0.36 and 0.68.",
        metric=_activmap,
        prepare=_prepare_activmap,
        update=_update_activmap,
        needs=_needs_maps_and_object_masks,
    ),
    **_localisation(
        "cam",
        "CAM",
        30,
        "IoU of the object and the top 30 % of the true class's activation map",
        "share of images in which that is above 0.3",
        "Higher is better: chance is about 0.3 o / (0.3 + 0.7 o) of an object that fills a share o,"
        " and a plain ResNet-152 on VOC Part was published at 0.35 and 0.69.",
        metric=_cam,
        update=_update_cam,
        needs=_needs_maps_and_object_masks,
    ),
    "pointing_game": Figure(
        heading="pointing game",
        meaning="share of Grad-CAM in the class's cell of 3 x 3 images, 2 x 2 below nine classes",
        better="higher",
        reading=(
            "Higher is better: chance is 1/9, 1/4 below nine classes, 1 is all of a class's"
            " attribution on its own image, and a plain network lies between them."
        ),
        metric=_pointing_game,
        update=_update_pointing_game,
        needs=_needs_grids,
    ),
}
