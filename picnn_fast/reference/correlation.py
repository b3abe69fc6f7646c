"""Losses of ICCNN: filters of a group are to correlate with each other and with no others.

Shapes: B batch, C filters, P = h·w positions, A groups. The correlation of two filters is that of
their maps on one image about a mean map m: with u_i = x_i - m_i and û_i = u_i / max(‖u_i‖, 1e-5),
s[i, j] = ⟨û_i, û_j⟩ + 1, in [0, 2]. No matrix ``[C, C]`` is needed: sums of s over pairs of filters
are scalar products of sums of û.
"""

import torch
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype

# The least norm that is divided by, and what keeps a denominator from 0.
EPSILON = 1e-5


def check_has_positions(maps: Tensor) -> None:
    """Of the operators themselves, which may be called without the public function's checks."""
    _, _, height, width = maps.shape
    torch._check(
        height * width > 0,
        lambda: f"maps: got {height} x {width}, want at least one position",
    )


def _members(groups: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """``[A, C]``: 1 where the filter is of the group."""
    return (groups == torch.arange(num_groups, device=groups.device)[:, None]).to(dtype)


def _centred(maps: Tensor, mean: Tensor, positive: Tensor | None) -> Tensor:
    """u ``[B, C, P]``; 0 for images that do not count, whatever they hold."""
    centred = (maps.to(mean.dtype) - mean).flatten(2)
    return centred if positive is None else centred.where(positive[:, None, None], 0.0)


def group_correlation(
    maps: Tensor, mean: Tensor, groups: Tensor, num_groups: int, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-Σ_A Num_A / (Den_A + 1e-5) (ICCNN), and what its gradient needs.

    Num_A is the sum of s over pairs of filters in A, Den_A that over pairs of one in A and any
    other, both summed over the images that count and divided by B.

    Args:
        maps: ``[B, C, h, w]``.
        mean: ``[C, h, w]`` in the accumulation type of ``maps``.
        groups: ``[C]`` int64 in [0, ``num_groups``); others are refused.
        positive: ``[B]`` bool, the images that count; None, all.

    Returns:
        loss ``[]``; ‖u‖ ``[B, C]``; Σ_{i in A} û_i ``[B, A, P]``; Num and Den ``[2, A]``.
    """
    check_has_positions(maps)
    count = len(maps) if positive is None else positive.sum()
    centred = _centred(maps, mean, positive)
    norms = centred.square().sum(-1).sqrt()
    members = _members(groups, num_groups, mean.dtype)
    with torch.autocast(maps.device.type, enabled=False):
        sums = members @ (centred / norms.clamp_min(EPSILON)[..., None])
    sizes = members.sum(1)
    torch._assert_async(sizes.sum() == len(groups), f"groups: want indices in [0, {num_groups})")
    within = sums.square().sum((0, 2)) + count * sizes.square()
    across = (sums * sums.sum(1, keepdim=True)).sum((0, 2)) + count * sizes * len(groups)
    moments = torch.stack([within, across]) / max(len(maps), 1)
    return -(moments[0] / (moments[1] + EPSILON)).sum(), norms, sums, moments


def group_correlation_backward(
    grad_loss: Tensor,
    maps: Tensor,
    mean: Tensor,
    groups: Tensor,
    positive: Tensor | None,
    norms: Tensor,
    sums: Tensor,
    moments: Tensor,
) -> Tensor:
    """The gradient of ``group_correlation`` with respect to ``maps``, laid out like them.

    All û of a group have the same gradient g on an image:
    B·g = 2·dNum_A·S_A + dDen_A·Σ S_A' + Σ dDen_A'·S_A', with S the sums of û and dNum, dDen the
    loss's derivatives. That of u is (g - û⟨û, g⟩) / ‖u‖, or g / 1e-5 below that norm.
    """
    check_has_positions(maps)
    below = moments[1] + EPSILON
    d_within, d_across = (-1 / below)[:, None], (moments[0] / below.square())[:, None]
    grad_sums = 2 * d_within * sums + d_across * sums.sum(1, keepdim=True)
    grad_sums = (grad_sums + (d_across * sums).sum(1, keepdim=True)) * (
        grad_loss / max(len(maps), 1)
    )
    toward = grad_sums[:, groups]
    inverse = 1 / norms.clamp_min(EPSILON)[..., None]
    centred = _centred(maps, mean, positive)
    unit = centred * inverse
    along = (unit * toward).sum(-1, keepdim=True).where(norms[..., None] >= EPSILON, 0.0)
    grad = (toward - unit * along) * inverse
    if positive is not None:
        grad = grad.where(positive[:, None, None], 0.0)
    return torch.empty_like(maps).copy_(grad.view(maps.shape))


def group_class_loss(
    maps: Tensor, groups: Tensor, num_groups: int, labels: Tensor, num_classes: int
) -> Tensor:
    """-Σ_c Num_c / (Den_c + 1e-5), of how alike images of a class use the groups (ICCNN).

    An image's v ``[A]`` is |A|/(C·P) times the sum of its maps of group A, divided by its norm plus
    1e-5. Num_c is the sum of ⟨v_a, v_b⟩ over pairs of images of class c, Den_c that over pairs of
    one of class c and any other, both divided by B².
    """
    dtype = accumulate_dtype(maps.dtype)
    batch, filters, height, width = maps.shape
    members = _members(groups, num_groups, dtype)
    weights = members * (members.sum(1, keepdim=True) / (filters * height * width))
    # The one pass over the maps, in every layout.
    totals = maps.sum((2, 3), dtype=dtype)
    with torch.autocast(maps.device.type, enabled=False):
        v = totals @ weights.T
        v = v / (torch.linalg.vector_norm(v, dim=1, keepdim=True) + EPSILON)
        of_class = _members(labels, num_classes, dtype) @ v
    pairs = max(batch, 1) ** 2
    within = of_class.square().sum(1) / pairs
    across = (of_class * v.sum(0)).sum(1) / pairs
    loss: Tensor = -(within / (across + EPSILON)).sum()
    return loss
