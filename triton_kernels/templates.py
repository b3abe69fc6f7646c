"""Triton kernels of the template family. ``picnn_fast.reference.templates`` is the definition.

A template's values are looked up by offset. Multiply-adds are never fused, so that masks agree with
the reference bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.triton_kernels.conversions import narrow, widen

LONGEST = 4096  # positions that a program holds at once: maps up to 64 x 64
TILE = 2048  # elements of a tile of [channels, positions], but for long maps
NEAR = 4  # channels of a tile at least, and twice the tile, where they are neighbours in memory


@triton.jit
def number(value, dtype: tl.constexpr):
    """A Python float as a scalar; the interpreter passes it on as it is, the compiler as fp64."""
    return (value * tl.full((), 1, tl.float64)).to(dtype)


@triton.jit
def middle(offsets, h, w):
    """Where a template's value at its peak is."""
    return offsets + ((h - 1) * (2 * w - 1) + (w - 1))


@triton.jit
def place(position, w):
    """Of a position in the table of offsets, such that the offset of two is their difference."""
    return position + position // w * (w - 1)


@triton.jit
def _first_maximum(x, s, inside, last):
    """Of each row: whether there is a NaN, the maximum without them, where torch.argmax points."""
    nan = inside & (x != x)
    has_nan = tl.max(nan.to(tl.int32), 1)
    most = tl.max(tl.where(inside & (nan == 0), x, -float("inf")), 1)
    best = tl.where((has_nan > 0)[:, None], nan, inside & (x == most[:, None]))
    return has_nan, most, tl.min(tl.where(best, s, last), 1)


@triton.jit
def _peaks(x, maps, x_s, s, channels, S, dtype: tl.constexpr, POSITIONS: tl.constexpr):
    """Of maps whose first tile is ``x``."""
    has_nan, most, at = _first_maximum(widen(x, dtype), s, channels & (s < S), S - 1)
    for start in range(POSITIONS, S, POSITIONS):
        later = start + s
        inside = channels & (later < S)
        x_later = tl.load(maps + later.to(tl.int64) * x_s, mask=inside, other=0.0)
        has_nan_later, most_later, at_later = _first_maximum(
            widen(x_later, dtype), later, inside, S - 1
        )
        greater = (has_nan_later > has_nan) | ((has_nan == 0) & (most_later > most))
        at = tl.where(greater, at_later, at)
        has_nan = tl.maximum(has_nan, has_nan_later)
        most = tl.maximum(most, most_later)
    return at


@triton.jit
def peaks_kernel(
    maps, peak, labels, categories, N, S, x_b, x_n, x_s, p_b, p_n, l_b, c_n,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Peaks of a block of channels; S of a channel whose category is another than the image's."""
    WIDE: tl.constexpr = tl.float64 if maps.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(N, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    channels = (n < N)[:, None]
    maps += b * x_b + n[:, None] * x_n
    s = tl.arange(0, POSITIONS)[None, :]
    x = tl.load(maps + s.to(tl.int64) * x_s, mask=channels & (s < S), other=0.0)
    at = _peaks(x, maps, x_s, s, channels, S, WIDE, POSITIONS)
    if labels is not None:
        own = tl.load(labels + b * l_b) == tl.load(categories + n * c_n, mask=n < N, other=0)
        at = tl.where(own, at, S)
    tl.store(peak + b * p_b + n * p_n, at.to(tl.int64), mask=n < N)


@triton.jit
def _store_masked(y, x, s, inside, peak, offsets, h, w, factor, dtype: tl.constexpr):
    at = place(s, w) - place(peak, w)[:, None]
    value = tl.load(middle(offsets, h, w) + at, mask=inside, other=0.0)
    mask = tl.maximum(value, 0.0) * number(factor, dtype)
    tl.store(y, narrow(widen(x, dtype) * mask, x.dtype), mask=inside)


@triton.jit
def mask_kernel(
    maps, offsets, masked, peak,
    N, h, w, x_b, x_n, x_s, y_b, y_n, y_s, p_b, p_n, factor: tl.float64,
    FIND_PEAK: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
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
        at = _peaks(x, maps, x_s, s, channels, S, WIDE, POSITIONS)
        tl.store(peak, at.to(tl.int64), mask=n < N)
    else:
        given = tl.load(peak, mask=n < N, other=0)
        # Live with TRITON_DEBUG=1. Without it a peak off the map still reads inside the table.
        tl.device_assert((given >= 0) & (given < S), "peak off the map")
        at = tl.minimum(tl.maximum(given, 0), S - 1).to(tl.int32)
    _store_masked(masked + s.to(tl.int64) * y_s, x, s, inside, at, offsets, h, w, factor, WIDE)
    for start in range(POSITIONS, S, POSITIONS):
        later = start + s
        also = channels & (later < S)
        x = tl.load(maps + later.to(tl.int64) * x_s, mask=also, other=0.0)
        _store_masked(
            masked + later.to(tl.int64) * y_s, x, later, also, at, offsets, h, w, factor, WIDE
        )


def tile(maps: Tensor) -> tuple[int, int, int]:
    """Channels and positions of a tile of maps ``[B, N, S]``, and the warps to work on it."""
    _, N, S = maps.shape
    positions = min(triton.next_power_of_2(S), LONGEST)
    near = S > 1 and maps.stride(1) == 1
    channels = max(2 * TILE // positions, NEAR) if near else max(TILE // positions, 1)
    channels = min(channels, triton.next_power_of_2(N))
    return channels, positions, min(max(channels * positions // 512, 4), 32)


def _launch(maps: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and options for maps ``[B, N, S]``."""
    B, N, _ = maps.shape
    channels, positions, warps = tile(maps)
    options = {"CHANNELS": channels, "POSITIONS": positions, "num_warps": warps}
    return (B * triton.cdiv(N, channels),), options | {"enable_fp_fusion": False}


def _mask(maps: Tensor, peak: Tensor, offsets: Tensor, scale: float, *, find_peak: bool) -> Tensor:
    masked = torch.empty_like(maps)
    if maps.numel() == 0:
        return masked
    B, N, height, width = maps.shape
    x, y = (t.view(B, N, height * width) for t in (maps, masked))
    grid, options = _launch(x)
    mask_kernel[grid](
        x, offsets, y, peak,
        N, height, width, *x.stride(), *y.stride(), *peak.stride(), scale,
        FIND_PEAK=find_peak, **options,
    )  # fmt: skip
    return masked


def _empty_peaks(x: Tensor) -> Tensor:
    new = x.new_empty if x.numel() else x.new_zeros
    return new(x.shape[:2], dtype=torch.int64)


def map_peaks(
    x: Tensor, labels: Tensor | None = None, filter_category: Tensor | None = None
) -> Tensor:
    """The first maximum of each map; see ``reference.templates.map_peaks``."""
    peak = _empty_peaks(x)
    if x.numel() > 0:
        B, N, height, width = x.shape
        maps = x.view(B, N, height * width)
        grid, options = _launch(maps)
        given = [t for t in (labels, filter_category) if t is not None]
        peaks_kernel[grid](
            maps, peak, labels, filter_category,
            N, height * width, *maps.stride(), *peak.stride(),
            *(t.stride(0) for t in given or (peak, peak)), **options,
        )  # fmt: skip
    return peak


def template_mask(x: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked maps and their peaks; see ``reference.templates.template_mask``."""
    peak = _empty_peaks(x)
    return _mask(x, peak, offsets, scale, find_peak=True), peak


def template_mask_backward(
    grad_masked: Tensor, peak: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """The gradient times the mask; see ``reference.templates.template_mask_backward``."""
    return _mask(grad_masked, peak, offsets, scale, find_peak=False)
