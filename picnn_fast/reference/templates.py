"""Part templates and the mask layer in plain PyTorch: the definition the kernels are held to.

A template T_mu is known by its values in units of tau at each offset from mu: the *table*
``[2h - 1, 2w - 1]``, whose entry ``[di + h - 1, dj + w - 1]`` belongs to position mu + (di, dj).
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype

# What the operators' ``profile`` means: of the distance, or of a table given.
GRADIENT, UNIFORM, TABLE = 0, 1, 2


def distances(
    height: int, width: int, norm: int, dtype: npt.DTypeLike = np.float64
) -> npt.NDArray[np.floating]:
    """Distance from mu at each offset ``[2 height - 1, 2 width - 1]``, correctly rounded.

    By NumPy, whose square root is that of IEEE 754; PyTorch's is that of a library which on some
    processors is a unit in the last place off.
    """
    rows = np.arange(1 - height, height)[:, None]
    columns = np.arange(1 - width, width)
    if norm == 1:
        return (abs(rows) + abs(columns)).astype(dtype)
    length: npt.NDArray[np.floating] = np.sqrt((rows * rows + columns * columns).astype(dtype))
    return length


@functools.lru_cache(maxsize=16)
def _gradient(
    norm: int, slope: float, height: int, width: int, dtype: torch.dtype
) -> npt.NDArray[np.floating]:
    """Made once, on the host; every operation is rounded as IEEE 754 has it, in ``dtype``."""
    number = np.float64 if dtype == torch.float64 else np.float32
    values = 1 - number(slope) * distances(height, width, norm, number)
    return np.maximum(values, -1)


def offset_table(
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Values in units of tau, ``[2 height - 1, 2 width - 1]`` (part_templates.txt, section 4.2).

    With d the distance from mu, |di| + |dj| for norm 1 and sqrt(di² + dj²) for norm 2:
    GRADIENT is max(1 - slope·d, -1), slope = beta / n; UNIFORM is 1 where d (norm 1) or d² (norm 2)
    is below the integer ``limit``, else -1, so that no rounding decides; TABLE is ``table``.

    Kernels that make a value where they need it get these very numbers, for square root, product
    and difference are rounded correctly everywhere.
    """
    if profile == TABLE:
        assert table is not None
        return table.to(dtype)
    if profile == GRADIENT:
        return torch.tensor(_gradient(norm, slope, height, width, dtype), device=device)
    rows = torch.arange(1 - height, height, device=device)[:, None]
    columns = torch.arange(1 - width, width, device=device)
    distance = rows.abs() + columns.abs() if norm == 1 else rows * rows + columns * columns
    return torch.where(distance < limit, 1.0, -1.0).to(dtype)


def template_matrix(table: Tensor, height: int, width: int) -> Tensor:
    """Templates as rows ``[h·w, h·w]``: row mu holds T_mu at every position."""
    windows = table.unfold(0, height, 1).unfold(1, width, 1)
    return windows.flip(0, 1).reshape(height * width, height * width)


def _masks(
    peak: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
    like: Tensor,
) -> Tensor:
    """scale·max(T_peak, 0) ``[B, N, h, w]``, T in units of tau."""
    height, width = like.shape[2:]
    dtype = accumulate_dtype(like.dtype)
    values = offset_table(
        table, profile, norm, slope, limit, height, width, dtype, like.device
    ).clamp_min(0)
    rows = torch.arange(height, device=like.device)
    columns = torch.arange(width, device=like.device)
    di = rows[:, None] - (peak // width)[..., None, None] + height - 1
    dj = columns - (peak % width)[..., None, None] + width - 1
    return values[di, dj] * scale


def template_mask(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each map times the positive part of the template at its peak (ICNN, section 3).

    The peak is the first maximum in row-major order, NaN above all else.

    Returns:
        masked, like ``x``; peak ``[B, N]`` int64, row · w + column.
    """
    # For an empty batch torch's argmax has nothing to say about, but the shape is known.
    peak = x.flatten(2).argmax(-1) if x.numel() else x.new_zeros(x.shape[:2], dtype=torch.int64)
    return template_mask_backward(x, peak, table, profile, norm, slope, limit, scale), peak


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
    """The gradient times the same mask, which counts as a constant; laid out like ``grad_masked``.

    The mask layer itself is this function of its input.
    """
    mask = _masks(peak, table, profile, norm, slope, limit, scale, grad_masked)
    product = (grad_masked.to(mask.dtype) * mask).to(grad_masked.dtype)
    return torch.empty_like(grad_masked).copy_(product)
