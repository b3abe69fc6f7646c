"""Triton kernels of the template family. ``picnn_fast.reference.templates`` is the definition.

A template is made where it is needed, from the distance or from the table. Multiply-adds are never
fused, so that masks agree with the reference bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.reference import templates as reference
from picnn_fast.triton_kernels.conversions import narrow, widen

UNIFORM = tl.constexpr(reference.UNIFORM)
TABLE = tl.constexpr(reference.TABLE)
LONGEST = 4096  # positions that a program holds at once: maps up to 64 x 64
TILE = 2048  # elements of a tile of [channels, positions], but for long maps
NEAR = 4  # channels of a tile at least, and twice the tile, where they are neighbours in memory


@triton.jit
def number(value, dtype: tl.constexpr):
    """A Python float as a scalar; the interpreter passes it on as it is, the compiler as fp64."""
    return (value * tl.full((), 1, tl.float64)).to(dtype)


@triton.jit
def template(
    table, di, dj, inside, h, w, slope, limit,
    dtype: tl.constexpr, PROFILE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """T_mu in units of tau at mu + (di, dj); ``inside`` is where both are positions of a map."""
    if PROFILE == TABLE:
        at = (di + h - 1).to(tl.int64) * (2 * w - 1) + (dj + w - 1)
        return tl.load(table + at, mask=inside, other=0.0)
    else:
        distance = tl.abs(di) + tl.abs(dj) if NORM == 1 else di * di + dj * dj
        if PROFILE == UNIFORM:
            return tl.where(distance < limit, 1.0, -1.0).to(dtype)
        else:
            length = distance.to(dtype)
            if NORM == 2:
                length = tl.sqrt(length) if dtype == tl.float64 else tl.sqrt_rn(length)
            return tl.maximum(1.0 - number(slope, dtype) * length, -1.0)


@triton.jit
def _first_maximum(x, s, inside, last):
    """Of each row: whether there is a NaN, the maximum without them, where torch.argmax points."""
    nan = inside & (x != x)
    has_nan = tl.max(nan.to(tl.int32), 1)
    most = tl.max(tl.where(inside & (nan == 0), x, -float("inf")), 1)
    best = tl.where((has_nan > 0)[:, None], nan, inside & (x == most[:, None]))
    return has_nan, most, tl.min(tl.where(best, s, last), 1)


@triton.jit
def _store_masked(
    y, x, s, inside, peak, table, h, w, slope, limit, factor,
    dtype: tl.constexpr, PROFILE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    di = s // w - (peak // w)[:, None]
    dj = s % w - (peak % w)[:, None]
    value = template(table, di, dj, inside, h, w, slope, limit, dtype, PROFILE, NORM)
    mask = tl.maximum(value, 0.0) * number(factor, dtype)
    tl.store(y, narrow(widen(x, dtype) * mask, x.dtype), mask=inside)


@triton.jit
def mask_kernel(
    maps, table, masked, peak,
    N, h, w, x_b, x_n, x_s, y_b, y_n, y_s, p_b, p_n,
    slope: tl.float64, limit, factor: tl.float64,
    FIND_PEAK: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    PROFILE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Masked maps of a block of channels, about peaks to be found or given.

    Maps that one tile holds are read once.
    """
    WIDE: tl.constexpr = tl.float64 if maps.dtype.element_ty == tl.float64 else tl.float32
    S = h * w
    blocks = tl.cdiv(N, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    channels = (n < N)[:, None]
    maps += b * x_b + n[:, None] * x_n
    masked += b * y_b + n[:, None] * y_n
    peak += b * p_b + n * p_n
    s = tl.arange(0, POSITIONS)[None, :]
    inside = channels & (s < S)
    x = tl.load(maps + s.to(tl.int64) * x_s, mask=inside, other=0.0)
    if FIND_PEAK:
        has_nan, most, at = _first_maximum(widen(x, WIDE), s, inside, S - 1)
        for start in range(POSITIONS, S, POSITIONS):
            later = start + s
            also = channels & (later < S)
            x_later = tl.load(maps + later.to(tl.int64) * x_s, mask=also, other=0.0)
            has_nan_later, most_later, at_later = _first_maximum(
                widen(x_later, WIDE), later, also, S - 1
            )
            greater = (has_nan_later > has_nan) | ((has_nan == 0) & (most_later > most))
            at = tl.where(greater, at_later, at)
            has_nan = tl.maximum(has_nan, has_nan_later)
            most = tl.maximum(most, most_later)
        tl.store(peak, at.to(tl.int64), mask=n < N)
    else:
        given = tl.load(peak, mask=n < N, other=0)
        # Live with TRITON_DEBUG=1. Without it a peak off the map still reads inside the table.
        tl.device_assert((given >= 0) & (given < S), "peak off the map")
        at = tl.minimum(tl.maximum(given, 0), S - 1).to(tl.int32)
    _store_masked(
        masked + s.to(tl.int64) * y_s, x, s, inside, at, table, h, w, slope, limit, factor,
        WIDE, PROFILE, NORM,
    )  # fmt: skip
    for start in range(POSITIONS, S, POSITIONS):
        later = start + s
        also = channels & (later < S)
        x = tl.load(maps + later.to(tl.int64) * x_s, mask=also, other=0.0)
        _store_masked(
            masked + later.to(tl.int64) * y_s, x, later, also, at, table, h, w, slope,
            limit, factor, WIDE, PROFILE, NORM,
        )  # fmt: skip


def tile(maps: Tensor) -> tuple[int, int, int]:
    """Channels and positions of a tile of maps ``[B, N, S]``, and the warps to work on it."""
    _, N, S = maps.shape
    positions = min(triton.next_power_of_2(S), LONGEST)
    near = S > 1 and maps.stride(1) == 1
    channels = max(2 * TILE // positions, NEAR) if near else max(TILE // positions, 1)
    channels = min(channels, triton.next_power_of_2(N))
    return channels, positions, min(max(channels * positions // 512, 4), 16)


def _mask(
    maps: Tensor,
    peak: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
    *,
    find_peak: bool,
) -> Tensor:
    masked = torch.empty_like(maps)
    if maps.numel() == 0:
        return masked
    B, N, height, width = maps.shape
    x, y = (t.view(B, N, height * width) for t in (maps, masked))
    channels, positions, warps = tile(x)
    mask_kernel[(B * triton.cdiv(N, channels),)](
        x, table, y, peak,
        N, height, width, *x.stride(), *y.stride(), *peak.stride(), slope, limit, scale,
        FIND_PEAK=find_peak, CHANNELS=channels, POSITIONS=positions,
        PROFILE=profile, NORM=norm, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return masked


def template_mask(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Masked maps and their peaks; see ``reference.templates.template_mask``."""
    new = x.new_empty if x.numel() else x.new_zeros
    peak = new(x.shape[:2], dtype=torch.int64)
    return _mask(x, peak, table, profile, norm, slope, limit, scale, find_peak=True), peak


def template_mask_backward(
    grad_masked: Tensor,
    peak: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> Tensor:
    """The gradient times the mask; see ``reference.templates.template_mask_backward``."""
    return _mask(grad_masked, peak, table, profile, norm, slope, limit, scale, find_peak=False)
