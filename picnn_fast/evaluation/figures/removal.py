"""A network without the filters of some classes (CSG, figure 5)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation, pool
from picnn_fast.metrics import ClassMeans, FilterRemoval, most_active_filters, owned_filters
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.std import STD

with extra("train"):
    from torchmetrics import Metric
    from torchmetrics.functional.classification import multiclass_confusion_matrix


class Confusions(NamedTuple):
    """Confusion matrices with all filters, and without some.

    Attributes:
        complete: ``[K, K]`` int64 of all filters: images by their class, a row each, and by the
            class they are given.
        without: ``[S, K, K]`` int64, likewise, of each set of classes whose filters are removed.
        removed: ``[S, N]`` bool, which filters these are.
    """

    complete: Tensor
    without: Tensor
    removed: Tensor


def removal_ownership(network: InterpretableNetwork) -> Tensor | None:
    """``ownership``, by which a class's filters are removed; None where nothing learnt says so.

    That of an ordinary network is drawn at random, and there the filters are those that the class
    activates most.
    """
    return None if isinstance(network, STD) else network.ownership()


@torch.no_grad()
def confusion_without(
    network: InterpretableNetwork,
    batches: Iterable[tuple[Tensor, ...]],
    removed: Sequence[Sequence[int]],
) -> Confusions:
    """Confusion matrices after the filters of chosen classes are removed.

    Filters of a class are those whose ownership exceeds 0.5; of a network whose filters belong to
    none, or an ordinary one, the tenth that images of the classes activate most.

    Args:
        network: in eval mode.
        batches: images ``[B, C, H, W]`` as the network takes them, and labels ``[B]``, on any
            device; what can be iterated twice, such as ``data.Batches`` of a split.
        removed: sets of classes: ``[[0], [0, 5]]`` removes the filters of class 0, then those of 0
            and 5.

    Returns:
        Matrices on the CPU, and which filters were removed.

    Raises:
        TypeError, ValueError: classes out of range, or none.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 4.2, figure 5.

    Example:
        >>> import torch
        >>> from picnn_fast import make_interpretable
        >>> from picnn_fast.evaluation import confusion_without
        >>> network = make_interpretable("small-cnn", "csg", num_classes=3, num_filters=6).eval()
        >>> batches = [(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))]
        >>> confusions = confusion_without(network, batches, [[0], [0, 2]])
        >>> confusions.without.shape, confusions.complete.sum(1).tolist()
        (torch.Size([2, 3, 3]), [2, 1, 1])
    """
    device = next(network.parameters()).device
    classes = network.num_classes
    ownership = removal_ownership(network)
    if ownership is not None:
        chosen = [owned_filters(ownership, some) for some in removed]
    else:
        seen = ClassMeans(classes, network.num_filters)
        for some, labels, *_ in batches:
            maps = network.filter_maps(some.to(device))
            seen.update(pool(maps, network.channel_dim), labels)
        means = seen.compute()
        chosen = [most_active_filters(means, some) for some in removed]
    masks = torch.stack(chosen).cpu()
    kept = (~masks).to(device)
    matrices = torch.zeros(1 + len(masks), classes, classes, dtype=torch.int64)
    for some, labels, *_ in batches:
        maps, bypass = network.encode(some.to(device))
        for matrix, mask in zip(matrices, [None, *kept.to(maps.dtype)], strict=True):
            repeated = None if mask is None else mask.repeat(len(maps), 1)
            predicted = network.head_logits(maps, repeated, bypass).argmax(1).cpu()
            matrix += multiclass_confusion_matrix(predicted, labels.cpu(), classes)
    return Confusions(matrices[0], matrices[1:], masks)


def _removal(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    ownership = removal_ownership(network)
    return FilterRemoval(network.num_classes, network.num_filters, ownership=ownership)


def _prepare_removal(metric: Any, seen: Observation) -> None:
    metric.prepare(seen.pooled, seen.labels)


def _update_removal(metric: Any, seen: Observation) -> None:
    def classify(maps: Tensor, mask: Tensor) -> Tensor:
        return seen.network.head_logits(maps, mask, seen.bypass)

    metric.update(seen.maps, seen.labels, classify)


def _of_removal(heading: str, meaning: str, reading: str, **more: Any) -> Figure:
    """Without the filters of one class after another."""
    return Figure(
        heading=heading,
        meaning=meaning,
        reading=reading,
        metric=_removal,
        update=_update_removal,
        prepare=_prepare_removal,
        prepares=lambda network: removal_ownership(network) is None,
        **more,
    )


FIGURES: dict[str, Figure] = {
    "removed_class": _of_removal(
        "removed",
        "accuracy of a class without its filters, mean over classes, 20 at most",
        "Lower is better: 0 where a class cannot be told without its filters, chance is 1 /"
        " classes, ACC1 what it stays at where it owns none by more than a half, and a plain"
        " network without the tenth that it activates most lies between them.",
        better="lower",
        part="removed",
    ),
    "removed_others": _of_removal(
        "… others",
        "accuracy of all other classes without those filters",
        "Higher is better: chance is 1 / classes, ACC1 as much as there is to reach, and a plain"
        " network, of whose filters a tenth is gone, lies between them; chance, too, where a class"
        " owns all filters.",
        better="higher",
        part="others",
    ),
}
