"""Whether filters stand for parts, against annotated landmarks and masks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from picnn_fast._extras import extra
from picnn_fast.backbones.receptive_field import ReceptiveField, receptive_field
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.parts import PartDataModule
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import LocationInstability, PartInterpretability
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from torchmetrics import Metric

# Of the maps that part interpretability has to keep; it needs somewhat more to compute.
MOST_MAP_BYTES = 3 << 29
# Whose maps a figure is of: the layers from the images to them, and their channels.
Layers = Callable[[InterpretableNetwork], tuple[nn.Module, int] | str]


def _filters(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    return network.features, network.num_filters


def _performer_target(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    performer = network.performer()
    if performer is None:
        return "no performer"
    return performer.target, performer.target_channels


def _performer_top(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    performer = network.performer()
    if performer is None or performer.top is None:
        return "no performer" if performer is None else "no convolution above the target layer"
    return nn.Sequential(performer.target, performer.top), performer.top_channels


def _field(layers: nn.Module, data: PartDataModule) -> ReceptiveField:
    return receptive_field(layers, data.part_sets["test"].image_size)


def _needs_parts(
    kind: str, layers: Layers = _filters
) -> Callable[[InterpretableNetwork, SeededDataModule], str | None]:
    def needs(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
        of = layers(network)
        if isinstance(of, str):
            return of
        if not isinstance(data, PartDataModule):
            return "the data has no part annotations"
        if not getattr(data.part_sets["test"], f"{kind}_names"):
            return f"the data has no {kind}s"
        if network.channel_dim != 1:
            return "the maps are not [B, N, h, w]"
        try:
            field = _field(of[0], data)
        except (TypeError, ValueError) as error:
            return str(error)
        samples = len(data.part_sets["test"])
        size = samples * of[1] * math.prod(field.map_size) * 4
        if kind == "part" and size > MOST_MAP_BYTES:
            return (
                f"the maps of {samples} images would take more than {MOST_MAP_BYTES / 2**30:g} GiB"
            )
        return None

    return needs


def _part_metric(
    kind: type[LocationInstability] | type[PartInterpretability],
    names: str,
    layers: Layers = _filters,
    filters: int | None = None,
) -> Callable[[InterpretableNetwork, PartDataModule, int], Metric]:
    """Of so many filters; None: as many as the layers have."""

    def metric(network: InterpretableNetwork, data: PartDataModule, draws: int) -> Metric:
        of = layers(network)
        assert not isinstance(of, str)
        count = len(getattr(data.part_sets["test"], names))
        # Of one category's images alone, where one was singled out (ICNN, tables 1 and 3).
        classes = 1 if data.category is not None else data.num_classes
        return kind(filters or of[1], count, _field(of[0], data), num_classes=classes)

    return metric


def _maps(seen: Observation) -> Tensor:
    return seen.maps


def _middle(seen: Observation) -> Tensor:
    """The maps of a filter that peaks in the middle of every image."""
    maps = torch.zeros_like(seen.maps[:, :1])
    maps[..., maps.shape[2] // 2, maps.shape[3] // 2] = 1
    return maps


def _anywhere(seen: Observation) -> Tensor:
    """Maps that peak anywhere, every place as likely as any other."""
    draw = torch.Generator().manual_seed(seen.seed)
    return torch.rand(seen.maps.shape, generator=draw).to(seen.maps.device)


def _update_parts(
    annotation: str, look: Callable[[Observation], Tensor] = _maps
) -> Callable[[Metric, Observation], None]:
    def update(metric: Any, seen: Observation) -> None:
        parts = seen.parts
        assert parts is not None
        maps, labels = look(seen), seen.labels
        annotations = getattr(parts, annotation)
        if metric.num_classes != seen.network.num_classes:  # the category, label 1
            shown = labels == 1
            if not shown.any():
                return
            maps, annotations, labels = maps[shown], annotations[shown], labels[shown] - 1
        metric.update(maps, annotations, labels)

    return update


def _top_maps(seen: Observation) -> Tensor:
    assert seen.performed.top is not None
    return seen.performed.top


def _location_instability(
    heading: str,
    meaning: str,
    reading: str,
    look: Callable[[Observation], Tensor] = _maps,
    layers: Layers = _filters,
    filters: int | None = None,
) -> Figure:
    """Of the maps that ``look`` makes of an observation, as those of ``layers``."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="lower",
        reading=reading,
        metric=_part_metric(LocationInstability, "landmark_names", layers, filters),
        update=_update_parts("landmarks", look),
        needs=_needs_parts("landmark", layers),
    )


FIGURES: dict[str, Figure] = {
    "location_instability": _location_instability(
        "location instab.",
        "of a filter's peak about the landmarks, image diagonals",
        "Lower is better, and says something of parts below that of the middle alone: chance is"
        " that of filters that peak anywhere, and a plain network lies between these two or"
        " thereabouts.",
    ),
    "location_instability_middle": _location_instability(
        "… of the middle",
        "of filters that always peak in the middle, and say nothing of parts",
        "A mark to beat, lower than chance: a plain network, and others, that do not lie below"
        " it say nothing of parts.",
        _middle,
        filters=1,  # others would be the same
    ),
    "location_instability_random": _location_instability(
        "… at random",
        "of filters that peak anywhere",
        "What chance gives, whatever the network, a plain one too; lower is better.",
        _anywhere,
    ),
    "location_instability_performer": _location_instability(
        "… performer",
        "of the maps that are explained",
        "What the plain network gives that is explained, its explainer's are to be lower;"
        " chance is that of filters that peak anywhere.",
        lambda seen: seen.performed.target,
        _performer_target,
    ),
    "location_instability_top": _location_instability(
        "… its top conv.",
        "of the performer's last convolution",
        "What the top of the plain network gives that is explained, its explainer's are to be"
        " lower; chance is that of filters that peak anywhere.",
        _top_maps,
        _performer_top,
    ),
    "part_interpretability": Figure(
        heading="part interpr.",
        meaning="share of images whose part a filter finds",
        better="higher",
        reading=(
            "Higher is better: filters that fire by chance cover a part in few images, a plain"
            " network's are the mark to beat, and what a fixed place gives was not measured."
        ),
        metric=_part_metric(PartInterpretability, "part_names"),
        update=_update_parts("part_masks"),
        needs=_needs_parts("part"),
    ),
}
