"""Part templates and the mask layer in plain PyTorch: the definition the kernels are held to.

A template T_mu is known by its *offsets*, its values in units of tau at each offset from mu: a
tensor ``[2h - 1, 2w - 1]`` whose entry ``[di + h - 1, dj + w - 1]`` belongs to position
mu + (di, dj).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype


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


def gradient_offsets(
    height: int, width: int, norm: int, slope: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """max(1 - slope·d, -1), slope = beta / n (part_templates.txt, section 4.2).

    d is |di| + |dj| for norm 1 and sqrt(di² + dj²) for norm 2. Every operation is rounded as
    IEEE 754 has it, in ``dtype``.
    """
    number = np.float64 if dtype == torch.float64 else np.float32
    values = 1 - number(slope) * distances(height, width, norm, number)
    return torch.tensor(np.maximum(values, -1), device=device)


def uniform_offsets(
    height: int, width: int, norm: int, limit: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """1 where d (norm 1) or d² (norm 2) is below ``limit``, else -1: no rounding decides."""
    rows = torch.arange(1 - height, height, device=device)[:, None]
    columns = torch.arange(1 - width, width, device=device)
    distance = rows.abs() + columns.abs() if norm == 1 else rows * rows + columns * columns
    return torch.where(distance < limit, 1.0, -1.0).to(dtype)


def template_matrix(offsets: Tensor, height: int, width: int) -> Tensor:
    """Templates as rows ``[h·w, h·w]``: row mu holds T_mu at every position."""
    windows = offsets.unfold(0, height, 1).unfold(1, width, 1)
    return windows.flip(0, 1).reshape(height * width, height * width)


def map_peaks(
    x: Tensor, labels: Tensor | None = None, filter_category: Tensor | None = None
) -> Tensor:
    """The first maximum of each map in row-major order, NaN above all else.

    Args:
        labels, filter_category: both or neither: ``[B]`` and ``[N]`` int64, the categories of
            images and filters.

    Returns:
        ``[B, N]`` int64, row · w + column; h · w where the image is not of the filter's category.
    """
    # For an empty batch torch's argmax has nothing to say about, but the shape is known.
    peak = x.flatten(2).argmax(-1) if x.numel() else x.new_zeros(x.shape[:2], dtype=torch.int64)
    if labels is None or filter_category is None:
        return peak
    return torch.where(labels[:, None] == filter_category, peak, x.shape[2] * x.shape[3])


def template_mask(x: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Each map times scale·max(T_peak, 0), T in units of tau (ICNN, section 3).

    Returns:
        masked, like ``x``; peak ``[B, N]`` int64, see ``map_peaks``.
    """
    peak = map_peaks(x)
    return template_mask_backward(x, peak, offsets, scale), peak


def template_mask_backward(
    grad_masked: Tensor, peak: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """The gradient times the same mask, which counts as a constant; laid out like ``grad_masked``.

    The mask layer itself is this function of its input.
    """
    product = mask_about(grad_masked, peak, offsets[None], scale)
    return torch.empty_like(grad_masked).copy_(product)


def gradient_tables(slopes: Tensor, norm: int, height: int, width: int) -> Tensor:
    """max(1 - slope·d, -1) for each of ``slopes`` ``[N]``: ``[N, 2 height - 1, 2 width - 1]``.

    As ``gradient_offsets`` has it for one slope, but for rounding; in the dtype of ``slopes``.
    Sizes may be symbols.
    """
    rows = torch.arange(1 - height, height, device=slopes.device)[:, None]
    columns = torch.arange(1 - width, width, device=slopes.device)
    if norm == 1:
        distance = (rows.abs() + columns.abs()).to(slopes.dtype)
    else:
        distance = (rows * rows + columns * columns).to(slopes.dtype).sqrt()
    return (1 - slopes[:, None, None] * distance).clamp_min(-1)


def templates_at(centre: Tensor, tables: Tensor, height: int, width: int) -> Tensor:
    """T_centre in units of tau at every position, ``[B, N, height, width]``.

    Args:
        centre: ``[B, N]`` int64, row · width + column.
        tables: ``[1 or N, 2 height - 1, 2 width - 1]``, one for all filters or one for each.
    """
    windows = tables.unfold(1, height, 1).unfold(2, width, 1)  # a view [., h, w, h, w]
    filters = torch.arange(len(tables), device=centre.device)
    return windows[filters, height - 1 - centre // width, width - 1 - centre % width]


def centre_of_mass(x: Tensor) -> Tensor:
    """Where each map's mass Σ pos·x / Σ x comes to lie, rounded to a position.

    The published code of ICNN counts positions from 1, rounds halves away from zero and takes 1
    where the result is less, or no number. Counted from 0, row and column alike, that is
    floor(Σ pos·x / Σ x + 1/2), at least 0. So a half goes up; a map whose sum is 0 (a map of
    zeros above all) has its centre at 0; so has one with NaN or infinity, or whose sum overflows
    the accumulation type. Where signs are mixed the quotient may lie beyond the map: it is brought
    back to the nearest side, which the published code, made for maps after a ReLU, leaves out.
    Negating a map changes nothing.

    Args:
        x: maps ``[B, N, h, w]``; sums are in float32 at least.

    Returns:
        ``[B, N]`` int64, row · w + column.
    """
    dtype = accumulate_dtype(x.dtype)
    row, column = (_centre(x.sum(other, dtype=dtype)) for other in (3, 2))
    return row * x.shape[3] + column


def _centre(weights: Tensor) -> Tensor:
    """Along one axis: ``[B, N, side]`` to ``[B, N]``."""
    side = weights.shape[2]
    positions = torch.arange(side, dtype=weights.dtype, device=weights.device)
    mean = (weights * positions).sum(2) / weights.sum(2)
    return (mean + 0.5).floor().clamp(0, side - 1).nan_to_num(0.0).to(torch.int64)


def spread_about(x: Tensor, centre: Tensor) -> Tensor:
    """sqrt(Σ |pos - centre|² x / Σ x) of each map, in positions: ``[B, N]``; NaN where Σ x is 0."""
    dtype = accumulate_dtype(x.dtype)
    width = x.shape[3]
    squares = torch.zeros(x.shape[:2], dtype=dtype, device=x.device)
    for other, place in ((3, centre // width), (2, centre % width)):
        weights = x.sum(other, dtype=dtype)
        positions = torch.arange(weights.shape[2], dtype=dtype, device=x.device)
        squares += ((positions - place[..., None]).square() * weights).sum(2)
    return (squares / x.sum((2, 3), dtype=dtype)).sqrt()


def mask_about(x: Tensor, centre: Tensor, tables: Tensor, scale: float) -> Tensor:
    """Each map times scale·max(T_centre, 0); like ``x``, see ``templates_at``."""
    mask = templates_at(centre, tables, x.shape[2], x.shape[3]).clamp_min(0) * scale
    return (x.to(mask.dtype) * mask).to(x.dtype)
