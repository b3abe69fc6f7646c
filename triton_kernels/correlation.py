"""Triton kernels of the correlation family. ``picnn_fast.reference.correlation`` is the definition.

Filters are gone through in the order of their groups, so that a program sums those of one group.
Maps that a tile holds are read once in the forward pass. Sums are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.reference import correlation as reference
from picnn_fast.triton_kernels.conversions import narrow, widen

EPSILON = tl.constexpr(reference.EPSILON)
LONGEST = 4096  # positions that a program holds at once: maps up to 64 x 64
TILE = 4096  # elements of a tile of [filters, positions]
BLOCK = 256  # positions of a program that goes through groups


@triton.jit
def _centred(maps, mean, x_n, x_s, P, filters, some, s, dtype: tl.constexpr):
    """u of a tile; 0 outside."""
    inside = some[:, None] & (s < P)[None, :]
    at = s.to(tl.int64)[None, :]
    x = tl.load(maps + filters[:, None] * x_n + at * x_s, mask=inside, other=0.0)
    about = tl.load(mean + filters[:, None] * P + at, mask=inside, other=0.0)
    return widen(x, dtype) - about


@triton.jit
def _inverse(norm):
    """1 / max(norm, 1e-5); NaN stays."""
    return 1.0 / tl.where(norm < EPSILON, norm * 0 + EPSILON, norm)


@triton.jit
def norms_kernel(
    maps, mean, positive, norms, N, P, x_b, x_n, x_s,
    COUNTED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """‖u‖ of one map, for maps that no tile holds."""
    WIDE: tl.constexpr = norms.dtype.element_ty
    b = (tl.program_id(0) // N).to(tl.int64)
    n = (tl.program_id(0) % N).to(tl.int64) + tl.arange(0, 1)
    squares = tl.zeros((1, POSITIONS), WIDE)
    counts = True
    if COUNTED:
        counts = tl.load(positive + b) != 0
    if counts:
        for start in range(0, P, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            u = _centred(maps + b * x_b, mean, x_n, x_s, P, n, n < N, s, WIDE)
            squares += u * u
    tl.store(norms + b * N + n, tl.sqrt(tl.sum(squares, 1)))


@triton.jit
def sums_kernel(
    maps, mean, positive, order, begins, norms, group_sums, N, G, P, x_b, x_n, x_s,
    COUNTED: tl.constexpr, FIND_NORMS: tl.constexpr, CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Σ û over a group of filters of one image, at a tile of positions."""
    WIDE: tl.constexpr = norms.dtype.element_ty
    tiles = tl.cdiv(P, POSITIONS)
    tile = tl.program_id(0) % tiles
    g = (tl.program_id(0) // tiles) % G
    b = (tl.program_id(0) // tiles // G).to(tl.int64)
    s = tile * POSITIONS + tl.arange(0, POSITIONS)
    begin = tl.load(begins + g).to(tl.int32)
    end = tl.load(begins + g + 1).to(tl.int32)
    counts = True
    if COUNTED:
        counts = tl.load(positive + b) != 0
    total = tl.zeros((POSITIONS,), WIDE)
    for first in range(begin, end, CHANNELS):
        at = first + tl.arange(0, CHANNELS)
        some = at < end
        filters = tl.load(order + at, mask=some, other=0)
        if counts:
            u = _centred(maps + b * x_b, mean, x_n, x_s, P, filters, some, s, WIDE)
            if FIND_NORMS:
                norm = tl.sqrt(tl.sum(u * u, 1))
                tl.store(norms + b * N + filters, norm, mask=some)
            else:
                norm = tl.load(norms + b * N + filters, mask=some, other=1.0)
            total += tl.sum(u * _inverse(norm)[:, None], 0)
        elif FIND_NORMS:
            tl.store(norms + b * N + filters, tl.zeros((CHANNELS,), WIDE), mask=some)
    tl.store(group_sums + (b * G + g) * P + s, total, mask=s < P)


@triton.jit
def moments_kernel(group_sums, moments, G, P, POSITIONS: tl.constexpr):
    """⟨S, S⟩ and ⟨S, Σ S⟩ of every group of an image."""
    WIDE: tl.constexpr = group_sums.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    group_sums += b * G * P
    moments += b * 2 * G
    for start in range(0, P, POSITIONS):
        s = start + tl.arange(0, POSITIONS)
        total = tl.zeros((POSITIONS,), WIDE)
        for g in range(G):
            total += tl.load(group_sums + g * P + s, mask=s < P, other=0.0)
        for g in range(G):
            own = tl.load(group_sums + g * P + s, mask=s < P, other=0.0)
            within = tl.sum(own * own, 0)
            across = tl.sum(own * total, 0)
            if start > 0:
                within += tl.load(moments + g)
                across += tl.load(moments + G + g)
            tl.store(moments + g, within)
            tl.store(moments + G + g, across)


@triton.jit
def weights_kernel(group_sums, own, total, weights, G, P, POSITIONS: tl.constexpr):
    """The gradient of û by group, at a tile of positions of one image."""
    WIDE: tl.constexpr = group_sums.dtype.element_ty
    tiles = tl.cdiv(P, POSITIONS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    s = (tl.program_id(0) % tiles) * POSITIONS + tl.arange(0, POSITIONS)
    inside = s < P
    group_sums += b * G * P + s
    weights += b * G * P + s
    all_sums = tl.zeros((POSITIONS,), WIDE)
    weighted = tl.zeros((POSITIONS,), WIDE)
    for g in range(G):
        value = tl.load(group_sums + g * P, mask=inside, other=0.0)
        all_sums += value
        weighted += tl.load(total + g) * value
    for g in range(G):
        value = tl.load(group_sums + g * P, mask=inside, other=0.0)
        value = tl.load(own + g) * value + tl.load(total + g) * all_sums + weighted
        tl.store(weights + g * P, value, mask=inside)


@triton.jit
def gradient_kernel(
    maps, mean, groups, positive, norms, weights, grad, N, G, P,
    x_b, x_n, x_s, y_b, y_n, y_s,
    COUNTED: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of maps of one image; maps that a tile holds are read once."""
    WIDE: tl.constexpr = norms.dtype.element_ty
    blocks = tl.cdiv(N, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    some = n < N
    rows = (b * G + tl.load(groups + n, mask=some, other=0))[:, None] * P
    maps += b * x_b
    grad += b * y_b + n[:, None] * y_n
    counts = True
    if COUNTED:
        counts = tl.load(positive + b) != 0
    if counts:
        norm = tl.load(norms + b * N + n, mask=some, other=1.0)
        inverse = _inverse(norm)
        product = tl.zeros((CHANNELS,), WIDE)
        for start in range(0, P, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            inside = some[:, None] & (s < P)[None, :]
            u = _centred(maps, mean, x_n, x_s, P, n, some, s, WIDE)
            toward = tl.load(weights + rows + s[None, :], mask=inside, other=0.0)
            product += tl.sum(u * toward, 1)
        along = product * inverse * inverse * inverse
        along = tl.where(norm >= EPSILON, along, tl.zeros((CHANNELS,), WIDE))
        for start in range(0, P, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            inside = some[:, None] & (s < P)[None, :]
            u = _centred(maps, mean, x_n, x_s, P, n, some, s, WIDE)
            toward = tl.load(weights + rows + s[None, :], mask=inside, other=0.0)
            value = inverse[:, None] * toward - along[:, None] * u
            tl.store(
                grad + s.to(tl.int64)[None, :] * y_s,
                narrow(value, grad.dtype.element_ty),
                mask=inside,
            )
    else:
        for start in range(0, P, POSITIONS):
            s = start + tl.arange(0, POSITIONS)
            inside = some[:, None] & (s < P)[None, :]
            zero = narrow(tl.zeros((CHANNELS, POSITIONS), WIDE), grad.dtype.element_ty)
            tl.store(grad + s.to(tl.int64)[None, :] * y_s, zero, mask=inside)


def group_correlation(
    maps: Tensor, mean: Tensor, groups: Tensor, num_groups: int, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and what its gradient needs; see ``reference.correlation.group_correlation``."""
    reference.check_has_positions(maps)
    B, N, height, width = maps.shape
    G, P = num_groups, height * width
    order = groups.argsort(stable=True)
    labels = torch.arange(G + 1, device=groups.device)
    begins = torch.searchsorted(groups[order], labels)
    within = (begins[0] == 0) & (begins[-1] == N)
    torch._assert_async(within, f"groups: want indices in [0, {num_groups})")
    norms = mean.new_empty(B, N)
    sums = mean.new_empty(B, G, P)
    of_images = mean.new_empty(B, 2, G)
    x = maps.view(B, N, P)
    counted = positive is not None
    positions = min(triton.next_power_of_2(P), LONGEST)
    channels = max(TILE // positions, 1)
    if maps.numel() and G:
        if positions < P:
            norms_kernel[(B * N,)](
                x, mean, positive, norms, N, P, *x.stride(), COUNTED=counted, POSITIONS=positions
            )
        sums_kernel[(B * G * triton.cdiv(P, positions),)](
            x, mean, positive, order, begins, norms, sums, N, G, P, *x.stride(),
            COUNTED=counted, FIND_NORMS=positions >= P, CHANNELS=channels, POSITIONS=positions,
        )  # fmt: skip
        moments_kernel[(B,)](sums, of_images, G, P, POSITIONS=min(positions, 1024))
    sizes = begins.diff().to(mean.dtype)
    count = B if positive is None else positive.sum()
    pairs = count * torch.stack([sizes.square(), sizes * N])
    moments = (of_images.sum(0) + pairs) / max(B, 1)
    return -(moments[0] / (moments[1] + reference.EPSILON)).sum(), norms, sums, moments


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
    """The gradient; see ``reference.correlation.group_correlation_backward``."""
    reference.check_has_positions(maps)
    grad = torch.empty_like(maps)
    if maps.numel() == 0:
        return grad
    B, N, height, width = maps.shape
    G, P = moments.shape[1], height * width
    below = moments[1] + reference.EPSILON
    scale = grad_loss / B
    own, total = -2 / below * scale, moments[0] / below.square() * scale
    norms, sums = norms.contiguous(), sums.contiguous()
    weights = torch.empty_like(sums)
    weights_kernel[(B * triton.cdiv(P, BLOCK),)](sums, own, total, weights, G, P, POSITIONS=BLOCK)
    x, y = (t.view(B, N, P) for t in (maps, grad))
    positions = min(triton.next_power_of_2(P), LONGEST)
    most = TILE // 2 if norms.dtype == torch.float64 else TILE  # registers hold half as many
    channels = min(max(most // positions, 1), triton.next_power_of_2(N))
    gradient_kernel[(B * triton.cdiv(N, channels),)](
        x, mean, groups, positive, norms, weights, grad, N, G, P, *x.stride(), *y.stride(),
        COUNTED=positive is not None, CHANNELS=channels, POSITIONS=positions,
        num_warps=min(max(channels * positions // 256, 4), 16),
    )  # fmt: skip
    return grad
