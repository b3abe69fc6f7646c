"""Which filters carried a prediction: the share of the logit that each stands for."""

from typing import NamedTuple

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.gradients import logit_gradients

# Of the greatest contribution: what rounding leaves between the logit and the sum.
_ROUNDING = 1e-4


class ContributionMaps(NamedTuple):
    """What every filter adds to one logit of each image, position by position.

    Attributes:
        logits: ``[B, K]``.
        target: ``[B]`` int64, the class whose logit it is.
        maps: of the target layer, ``[B, N, h, w]`` or as the network's ``channel_dim`` says.
        terms: ``[B, N, h, w]``, or ``[B, N, T]`` of T tokens: maps times the gradient of the logit.
        offset: ``[B]``, the logit where every filter is at 0.
        exact: ``[B]`` bool, whether offset and terms sum up to the logit.
        bypass: what reaches the head past the filters, or None.
    """

    logits: Tensor
    target: Tensor
    maps: Tensor
    terms: Tensor
    offset: Tensor
    exact: Tensor
    bypass: Tensor | None


class FilterGroup(NamedTuple):
    """The filters that stand for one class.

    Attributes:
        owner: the class; None: they stand for none.
        filters: ``[n]`` indices, those that carried most of the logit first.
        contribution: of all of them to the logit.
        logits_without: ``[K]`` of the image with these filters at 0.
    """

    owner: int | None
    filters: Tensor
    contribution: float
    logits_without: Tensor


class ImageExplanation(NamedTuple):
    """What a network makes of an image, filter by filter.

    Attributes:
        logits: ``[K]``.
        target: the class whose logit is explained.
        contributions: ``[N]``, of each filter to that logit.
        offset: the logit where every filter is at 0: of biases, and what gets past the filters.
        exact: whether offset and contributions sum up to the logit, as behind a linear head. Else
            they are its first order alone.
        maps: of the target layer, ``[N, h, w]`` or as the network's ``channel_dim`` says.
        groups: filters by the class they stand for, those that carried most first.
    """

    logits: Tensor
    target: int
    contributions: Tensor
    offset: float
    exact: bool
    maps: Tensor
    groups: list[FilterGroup]


def contribution_maps(
    network: InterpretableNetwork, images: Tensor, *, target: int | None = None
) -> ContributionMaps:
    """What each filter adds to a logit at each position: its map times the logit's gradient.

    Where the head is linear behind the maps these terms and the offset are the logit; else they
    are its first order. Parameters keep the gradients that they have.

    Args:
        network: in eval mode.
        images: ``[B, C, H, W]`` as the network takes them, on its device.
        target: the class of the logit; None: of each image the one predicted.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: no batch of images, or a target that is no class.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import contribution_maps
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> seen = contribution_maps(network, torch.rand(2, 1, 8, 8))
        >>> total = seen.offset + seen.terms.sum((1, 2, 3))
        >>> torch.allclose(total, seen.logits.amax(1), atol=1e-5)
        True
    """
    if not isinstance(network, InterpretableNetwork):
        raise TypeError(
            f"network: got {type(network).__name__}, want an interpretable network, as of"
            " make_interpretable"
        )
    checks.floating("images", images)
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, want [B, C, H, W]")
    if target is not None:
        checks.integer("target", target, 0)
        if target >= network.num_classes:
            raise ValueError(f"target: got {target}, want a class in [0, {network.num_classes})")
    with torch.inference_mode(False), torch.no_grad():
        maps, bypass = network.encode(images.detach().clone())
        logits = network.head_logits(maps, bypass=bypass)
        chosen = (
            logits.argmax(1)
            if target is None
            else logits.new_tensor([target] * len(logits), dtype=torch.int64)
        )
        gradient = logit_gradients(network, maps, chosen[:, None], bypass)[:, 0]
        terms = (maps * gradient).movedim(network.channel_dim, 1)
        picked = chosen[:, None]
        offset = network.head_logits(torch.zeros_like(maps), bypass=bypass).gather(1, picked)[:, 0]
        added = terms.reshape(len(terms), network.num_filters, -1).sum(2)
        gap = (offset + added.sum(1) - logits.gather(1, picked)[:, 0]).abs()
        exact = gap <= _ROUNDING * (added.abs().sum(1) + offset.abs())
    return ContributionMaps(logits, chosen, maps, terms, offset, exact, bypass)


def explain_image(
    network: InterpretableNetwork, image: Tensor, *, target: int | None = None
) -> ImageExplanation:
    """The filters that carried a prediction, by the class they stand for, and it without them.

    A filter's contribution is its map times the gradient of the logit, summed over positions. Where
    the head is linear behind the maps, as average pooling and one layer are, that is exactly what
    the filter adds to the logit. A filter stands for the class that ``ownership`` gives most of it
    to; where no class has any of it, or the method gives filters to no class, it stands for none.

    Args:
        network: in eval mode.
        image: ``[C, H, W]`` or ``[1, C, H, W]`` as the network takes it, on its device.
        target: the class explained; None: the one predicted.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: no single image, or a target that is no class.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import explain_image
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> seen = explain_image(network, torch.rand(1, 8, 8))
        >>> seen.exact, seen.contributions.shape
        (True, torch.Size([128]))
        >>> sum(len(group.filters) for group in seen.groups)
        128
    """
    checks.floating("image", image)
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1:
        raise ValueError(f"image: got shape {tuple(image.shape)}, want one image [C, H, W]")
    seen = contribution_maps(network, batch, target=target)
    with torch.no_grad():
        contributions = seen.terms.reshape(network.num_filters, -1).sum(1)
        groups = []
        for owner, filters in _by_owner(network, contributions):
            mask = torch.ones(1, network.num_filters, device=batch.device)
            mask[0, filters] = 0
            without = network.head_logits(seen.maps, mask, seen.bypass)[0]
            groups.append(FilterGroup(owner, filters, float(contributions[filters].sum()), without))
    groups.sort(key=lambda group: -group.contribution)
    return ImageExplanation(
        seen.logits[0],
        int(seen.target),
        contributions,
        float(seen.offset),
        bool(seen.exact),
        seen.maps[0],
        groups,
    )


def owners(network: InterpretableNetwork) -> Tensor:
    """The class that each filter stands for: ``[N]`` int64, -1 where it stands for none.

    It is the one that ``ownership`` gives most of the filter to, the first of several.
    """
    ownership = network.ownership()
    if ownership is None:
        return torch.full((network.num_filters,), -1)
    most, owner = ownership.max(0)
    return owner.where(most > 0, -1)


def _by_owner(
    network: InterpretableNetwork, contributions: Tensor
) -> list[tuple[int | None, Tensor]]:
    order = contributions.argsort(descending=True, stable=True)
    owner = owners(network).to(order.device)[order]
    return [(c if c >= 0 else None, order[owner == c]) for c in owner.unique().tolist()]
