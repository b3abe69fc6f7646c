"""Triton kernels of the histogram family. ``picnn_fast.reference.histogram`` is the definition.

Hard counts take three kernels: the range, what was counted so far on its grid, and then the counts.
There is no host sync. Soft counts are sums of
integers, weights times a power of two, so that they do not depend on the order of the additions.
What counts tell of the classes is worked out from them and their marginals in one kernel more.

Tables that no cache holds are gone through class by class, of samples sorted by their labels: of
others each sample would be a miss.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.reference import histogram as reference
from picnn_fast.triton_kernels.conversions import narrow, widen

TILE = 2048  # elements of a tile of [samples, filters]
PROGRAMS = 1024  # about what keeps a large device busy
SLOTS = 1024  # counters of a table that a program keeps for itself; counting costs as many / 32
BLOCK = 1024  # counters of a filter that a program moves at a time
CACHE = 2**25  # bytes of a table that the cache of a large device holds beside activations
CELLS = 512  # of a filter's counts that a program looks at together
CELL_BITS = tl.constexpr(reference.CELL_BITS)
SMALLEST_EXPONENT = tl.constexpr(reference.SMALLEST_EXPONENT)
POISON = tl.constexpr(-(2**63))  # the sign bit: a soft count with a NaN in it


@triton.jit
def _place(N, rows, ROWS: tl.constexpr, FILTERS: tl.constexpr):
    """A program's filters, their offsets, the samples of its first tile and their number."""
    tiles = tl.cdiv(N, FILTERS)
    n = (tl.program_id(0) % tiles).to(tl.int64) * FILTERS + tl.arange(0, FILTERS)
    split = tl.program_id(0) // tiles
    m = split.to(tl.int64) * rows + tl.arange(0, ROWS)
    return n, m, split


@triton.jit
def _labels(labels, m, M, stride, classes):
    label = tl.load(labels + m * stride, mask=m < M, other=0)
    # Live with TRITON_DEBUG=1. Without it a label that no check caught still counts in the table.
    tl.device_assert((label >= 0) & (label < classes), "labels out of range")
    return tl.minimum(tl.maximum(label, 0), classes - 1)


@triton.jit
def _samples(order, m, M, SORTED: tl.constexpr):
    """The numbers of the samples at places m of the order, which is only there where SORTED."""
    if SORTED:
        m = tl.load(order + m, mask=m < M, other=0)
    return m


@triton.jit
def range_kernel(
    activations, labels, least, most, column, M, N, classes, x_m, x_n, l_m, rows,
    ROWS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """Range of the finite values of a split of the samples, [splits, N].

    Of column, N at first, the number of the first column that holds another value. The number
    behind it becomes 0 where a label is no class.
    """
    n, first, split = _place(N, rows, ROWS, FILTERS)
    dtype = least.dtype.element_ty
    low = tl.full((ROWS, FILTERS), float("inf"), dtype)
    high = tl.full((ROWS, FILTERS), -float("inf"), dtype)
    strange = tl.zeros((ROWS, FILTERS), tl.int32)
    # Of the programs with the same samples, the first looks at their labels.
    labelled = tl.where(tl.program_id(0) % tl.cdiv(N, FILTERS) == 0, M, 0)
    outside = tl.zeros((ROWS,), tl.int32)
    for start in range(0, rows, ROWS):
        m = first + start
        inside = (m < M)[:, None] & (n < N)[None, :]
        x = widen(
            tl.load(activations + m[:, None] * x_m + n[None, :] * x_n, mask=inside, other=0.0),
            dtype,
        )
        usual = tl.abs(x) < float("inf")  # NaN: no
        low = tl.minimum(low, tl.where(inside & usual, x, float("inf")))
        high = tl.maximum(high, tl.where(inside & usual, x, -float("inf")))
        strange |= (usual == 0).to(tl.int32)
        label = tl.load(labels + m * l_m, mask=m < labelled, other=0)
        outside |= ((label < 0) | (label >= classes)).to(tl.int32)
    at = split.to(tl.int64) * N + n
    tl.store(least + at, tl.min(low, 0), mask=n < N)
    tl.store(most + at, tl.max(high, 0), mask=n < N)
    bad = (tl.max(strange, 0) > 0) & (n < N)
    first_bad = tl.min(tl.where(bad, n, N), 0)
    if first_bad < N:
        tl.atomic_min(column, first_bad, sem="relaxed")
    if tl.max(outside, 0) > 0:
        tl.store(column + 1, 0)


@triton.jit
def _cell(x, scale):
    """Number of the cell of width 1 / scale that holds float64 x."""
    scaled = tl.floor(x * scale)
    # A product may underflow to -0, but what is negative lies in a negative cell.
    return tl.where((x < 0) & (scaled == 0), -1.0, scaled).to(tl.int64)


@triton.jit
def _grid(low, high, bins):
    """Of a finite range: the smallest exponent, the shift to that of the grid, the first cell."""
    magnitude = tl.maximum(tl.abs(low), tl.abs(high))
    exponent = (magnitude.to(tl.int64, bitcast=True) >> 52) - 1023 - CELL_BITS
    exponent = tl.maximum(exponent, SMALLEST_EXPONENT)
    scale = _inverse_power(exponent)
    first, last = _cell(low, scale), _cell(high, scale)
    shifts = tl.arange(0, 32)  # more than are ever needed
    fits = (last >> shifts) - (first >> shifts) < bins
    shift = tl.min(tl.where(fits, shifts, 31), 0).to(tl.int64)
    return exponent, shift, first >> shift


@triton.jit
def _inverse_power(exponent):
    """2**-exponent, where that is a normal number."""
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def regrid_kernel(
    counts, before, minimum, maximum, least, most, column, scale, shift, first_cell,
    N, splits, bins, classes, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a filter: its range takes in those of the splits, and its counts go to its grid.

    Which scale, shift and first_cell tell. before: as large as the counts, written where they move.
    """
    if tl.load(column) < N:
        return
    n = tl.program_id(0).to(tl.int64)
    low, high = tl.load(minimum + n), tl.load(maximum + n)
    new_low, new_high = low, high
    for start in range(0, splits, BLOCK):
        s = start + tl.arange(0, BLOCK).to(tl.int64)
        here = tl.load(least + s * N + n, mask=s < splits, other=float("inf"))
        new_low = tl.minimum(new_low, tl.min(here, 0).to(tl.float64))
        here = tl.load(most + s * N + n, mask=s < splits, other=-float("inf"))
        new_high = tl.maximum(new_high, tl.max(here, 0).to(tl.float64))
    exponent, up, first = _grid(new_low, new_high, bins)
    tl.store(minimum + n, new_low)
    tl.store(maximum + n, new_high)
    tl.store(scale + n, _inverse_power(exponent))
    tl.store(shift + n, up)
    tl.store(first_cell + n, first)
    if low <= high:
        old_exponent, old_up, old_first = _grid(low, high, bins)
        further = exponent + up - old_exponent - old_up
        if (further > 0) | (old_first != first):
            counts += n * bins * classes
            before += n * bins * classes
            for start in range(0, bins * classes, BLOCK):
                i = start + tl.arange(0, BLOCK).to(tl.int64)
                old = tl.load(counts + i, mask=i < bins * classes, other=0)
                tl.store(before + i, old, mask=i < bins * classes)
                tl.store(counts + i, tl.zeros((BLOCK,), tl.int64), mask=i < bins * classes)
            tl.debug_barrier()  # what other threads of the program write comes before the sums
            for start in range(0, bins * classes, BLOCK):
                i = start + tl.arange(0, BLOCK).to(tl.int64)
                old = tl.load(before + i, mask=i < bins * classes, other=0)
                # Bins without a count may have no place on the new grid.
                j = ((old_first + i // classes) >> further) - first
                at = counts + j * classes + i % classes
                tl.atomic_add(at, old, mask=old > 0, sem="relaxed")


@triton.jit
def count_kernel(
    activations, labels, order, column, scale, shift, first_cell, counts,
    M, N, bins, classes, x_m, x_n, l_m, rows,
    ROWS: tl.constexpr, FILTERS: tl.constexpr, SLOTS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Count a split of the samples, in a table of SLOTS > 0 of the program's own or in place."""
    if tl.load(column) < N:
        return
    n, first, _ = _place(N, rows, ROWS, FILTERS)
    scales = tl.load(scale + n, mask=n < N, other=1.0)[None, :]
    shifts = tl.load(shift + n, mask=n < N, other=0)[None, :]
    first_cells = tl.load(first_cell + n, mask=n < N, other=0)[None, :]
    row = tl.arange(0, FILTERS).to(tl.int64)[None, :] * bins
    table = counts + tl.min(n, 0) * bins * classes
    if SLOTS > 0:
        own = tl.zeros((SLOTS,), tl.int32)
    for start in range(0, rows, ROWS):
        m = first + start
        label = _labels(labels, m, M, l_m, classes)
        inside = (m < M)[:, None] & (n < N)[None, :]
        m = _samples(order, m, M, SORTED)
        x = tl.load(activations + m[:, None] * x_m + n[None, :] * x_n, mask=inside, other=0.0)
        cell = _cell(widen(x, tl.float64).to(tl.float64), scales) >> shifts
        slot = (row + cell - first_cells) * classes + label[:, None]
        if SLOTS > 0:
            flat = tl.reshape(slot, (ROWS * FILTERS,)).to(tl.int32)
            own += tl.histogram(flat, SLOTS, mask=tl.reshape(inside, (ROWS * FILTERS,)))
        else:
            one = tl.full((ROWS, FILTERS), 1, tl.int64)
            tl.atomic_add(table + slot, one, mask=inside, sem="relaxed")
    if SLOTS > 0:
        slots = tl.arange(0, SLOTS)
        tl.atomic_add(table + slots, own.to(tl.int64), mask=own > 0, sem="relaxed")


@triton.jit
def _soft_position(x, low, width):
    """Position among the bin centres, every operation rounded to nearest."""
    if x.dtype == tl.float64:
        return (x - low) / width
    else:
        return tl.div_rn(x - low, width)


@triton.jit
def soft_kernel(
    activations, labels, order, low, width, sums,
    M, N, bins, classes, x_m, x_n, l_m, low_n, width_n, fraction_bits, rows,
    ROWS: tl.constexpr, FILTERS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Add the weights of a split of the samples, in units of 2**-fraction_bits."""
    n, first, _ = _place(N, rows, ROWS, FILTERS)
    lows = tl.load(low + n * low_n, mask=n < N, other=0.0)[None, :]
    widths = tl.load(width + n * width_n, mask=n < N, other=1.0)[None, :]
    one = tl.full((ROWS, FILTERS), 1, tl.int64) << fraction_bits
    last = bins - 1
    for start in range(0, rows, ROWS):
        m = first + start
        label = _labels(labels, m, M, l_m, classes)
        inside = (m < M)[:, None] & (n < N)[None, :]
        m = _samples(order, m, M, SORTED)
        x = tl.load(activations + m[:, None] * x_m + n[None, :] * x_n, mask=inside, other=0.0)
        t = _soft_position(widen(x, lows.dtype), lows, widths)
        nan = t != t
        t = tl.where(t > 0, t, 0.0)  # NaN too
        t = tl.where(t < last, t, last.to(t.dtype))
        below = tl.minimum(t.to(tl.int64), last - 1)
        upper = tl.floor((t - below.to(t.dtype)) * one.to(t.dtype) + 0.5).to(tl.int64)
        at = sums + (n[None, :] * bins + below) * classes + label[:, None]
        tl.atomic_add(at, one - upper, mask=inside & (upper < one), sem="relaxed")
        tl.atomic_add(at + classes, upper, mask=inside & (upper > 0), sem="relaxed")
        poison = tl.full((ROWS, FILTERS), POISON, tl.int64)
        tl.atomic_or(at, poison, mask=inside & nan, sem="relaxed")
        tl.atomic_or(at + classes, poison, mask=inside & nan, sem="relaxed")


@triton.jit
def soft_backward_kernel(
    grad_counts, activations, labels, order, low, width, grad,
    M, N, bins, classes, g_n, g_b, g_k, x_m, x_n, l_m, low_n, width_n, y_m, y_n,
    rows, ROWS: tl.constexpr, FILTERS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Gradients of a split of the samples."""
    n, first, _ = _place(N, rows, ROWS, FILTERS)
    lows = tl.load(low + n * low_n, mask=n < N, other=0.0)[None, :]
    widths = tl.load(width + n * width_n, mask=n < N, other=1.0)[None, :]
    for start in range(0, rows, ROWS):
        m = first + start
        label = _labels(labels, m, M, l_m, classes)
        inside = (m < M)[:, None] & (n < N)[None, :]
        m = _samples(order, m, M, SORTED)
        x = tl.load(activations + m[:, None] * x_m + n[None, :] * x_n, mask=inside, other=0.0)
        t = _soft_position(widen(x, lows.dtype), lows, widths)
        sloped = (t >= 0) & (t < bins - 1)
        below = tl.where(sloped, t, 0.0).to(tl.int64)
        at = grad_counts + n[None, :] * g_n + below * g_b + label[:, None] * g_k
        lower = tl.load(at, mask=inside & sloped, other=0.0)
        upper = tl.load(at + g_b, mask=inside & sloped, other=0.0)
        result = tl.where(sloped, (upper - lower) / widths, tl.where(t == t, 0.0, t))
        tl.store(grad + m[:, None] * y_m + n[None, :] * y_n, narrow(result, x.dtype), mask=inside)


@triton.jit
def _log_quotient(a, b):
    """log(a / b) of normal numbers above 0, as ``csrc/common/information.h`` has it."""
    if a.dtype == tl.float64:
        fraction: tl.constexpr = 52
        terms: tl.constexpr = 11
        of_a, of_b = a.to(tl.int64, bitcast=True), b.to(tl.int64, bitcast=True)
    else:
        fraction: tl.constexpr = 23
        terms: tl.constexpr = 5
        of_a, of_b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    one = tl.full((1, 1), 1, of_a.dtype) << fraction
    exponent = (of_a - of_b + (one >> 1)) >> fraction
    b = (of_b + (exponent << fraction)).to(a.dtype, bitcast=True)
    s = (a - b) / (a + b)
    z = s * s
    series = tl.zeros_like(s) + 1.0 / (2 * terms - 1)
    for i in tl.static_range(1, terms):
        series = series * z + 1.0 / (2 * (terms - i) - 1)
    return exponent.to(a.dtype) * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def _log_ratio(joint, first, second, total):
    """log(joint * total / (first * second)), 0 for a joint count of 0."""
    some = joint > 0
    return _log_quotient(tl.where(some, joint * total, 1.0), tl.where(some, first * second, 1.0))


@triton.jit
def _slope(joint, first, second, total):
    """What a count adds to the slope of ``total`` times the information."""
    some = (first > 0).to(joint.dtype) + (second > 0).to(joint.dtype)
    return _log_ratio(joint, first, second, total) + tl.where(joint > 0, 0.0, 1.0 - some)


@triton.jit
def _rest(joint, per_bin, slack):
    """Of the other classes; rounding of the sums leaves a little where they have nothing."""
    rest = per_bin - joint
    return tl.where(rest > per_bin * slack, rest, 0.0)


@triton.jit
def _sum_of_products(a, a_step, b, b_step, size, BLOCK: tl.constexpr):
    """A filter's."""
    total = tl.zeros((BLOCK,), a.dtype.element_ty)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        left = tl.load(a + i * a_step, mask=i < size, other=0.0)
        total += left * tl.load(b + i * b_step, mask=i < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _cells(counts, per_bin, per_class, b, k, bins, classes, c_b, c_k):
    """A tile of a filter's counts, those of its bins and of its classes."""
    inside = (b < bins)[:, None] & (k < classes)[None, :]
    joint = tl.load(counts + b[:, None] * c_b + k[None, :] * c_k, mask=inside, other=0)
    in_bin = tl.load(per_bin + b, mask=b < bins, other=0.0)[:, None]
    in_class = tl.load(per_class + k, mask=k < classes, other=0.0)[None, :]
    return joint.to(per_bin.dtype.element_ty), in_bin, in_class, inside


@triton.jit
def histogram_information_kernel(
    counts, per_bin, per_class, totals, out, bins, classes, c_n, c_b, c_k, slack,
    BY_LABEL: tl.constexpr, CORRECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a filter by label, else one for some of its classes."""
    dtype: tl.constexpr = per_bin.dtype.element_ty
    tiles = 1 if BY_LABEL else tl.cdiv(classes, COLUMNS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * COLUMNS
    last = classes if BY_LABEL else first + 1
    counts += n * c_n
    per_bin += n * bins
    per_class += n * classes
    total = tl.load(totals + n)
    information = tl.zeros((COLUMNS,), dtype)
    degrees = tl.zeros((COLUMNS,), tl.int64)
    for start in range(first, last, COLUMNS):
        k = start + tl.arange(0, COLUMNS).to(tl.int64)
        for begin in range(0, bins, ROWS):
            b = begin + tl.arange(0, ROWS).to(tl.int64)
            joint, in_bin, own, _ = _cells(
                counts, per_bin, per_class, b, k, bins, classes, c_b, c_k
            )
            terms = joint * _log_ratio(joint, in_bin, own, total)
            used = (joint > 0).to(tl.int64)
            if not BY_LABEL:
                rest = _rest(joint, in_bin, slack)
                terms += rest * _log_ratio(rest, in_bin, total - own, total)
                used += (rest > 0).to(tl.int64)
            information += tl.sum(terms, 0)
            if CORRECTED:
                degrees -= tl.sum(used, 0)
        if CORRECTED:
            own = tl.load(per_class + k, mask=k < classes, other=0.0)
            degrees += (own > 0).to(tl.int64)
            if not BY_LABEL:
                degrees += (total - own > 0).to(tl.int64)
    bins_used = tl.zeros((ROWS,), tl.int64)
    if CORRECTED:
        for begin in range(0, bins, ROWS):
            b = begin + tl.arange(0, ROWS).to(tl.int64)
            bins_used += (tl.load(per_bin + b, mask=b < bins, other=0.0) > 0).to(tl.int64)
    more = tl.sum(bins_used, 0) - 1
    k = first + tl.arange(0, COLUMNS).to(tl.int64)
    if BY_LABEL:
        result = tl.sum(information, 0) / total
        if CORRECTED:
            result += (tl.sum(degrees, 0) + more).to(dtype) / (2.0 * total)
        tl.store(out + n, result)
    else:
        result = information / total
        if CORRECTED:
            result += (degrees + more).to(dtype) / (2.0 * total)
        tl.store(out + n * classes + k, result, mask=k < classes)


@triton.jit
def histogram_slopes_kernel(
    grad, counts, information, per_bin, per_class, totals, out, bins, classes,
    g_n, g_k, c_n, c_b, c_k, i_n, i_k, o_n, o_b, o_k, slack,
    BY_LABEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for some of the bins of a filter."""
    dtype: tl.constexpr = per_bin.dtype.element_ty
    tiles = tl.cdiv(bins, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)
    counts += n * c_n
    per_bin += n * bins
    per_class += n * classes
    grad += n * g_n
    total = tl.load(totals + n)
    # Of all slopes: each count is one of those in all.
    size = 1 if BY_LABEL else classes
    shift = _sum_of_products(grad, g_k, information + n * i_n, i_k, size, COLUMNS)
    every = tl.zeros((ROWS,), dtype)  # what is added to the rest of every class
    if not BY_LABEL:
        for start in range(0, classes, COLUMNS):
            k = start + tl.arange(0, COLUMNS).to(tl.int64)
            weight = tl.load(grad + k * g_k, mask=k < classes, other=0.0)[None, :]
            joint, in_bin, own, _ = _cells(
                counts, per_bin, per_class, b, k, bins, classes, c_b, c_k
            )
            rest = _rest(joint, in_bin, slack)
            every += tl.sum(weight * _slope(rest, in_bin, total - own, total), 1)
    for start in range(0, classes, COLUMNS):
        k = start + tl.arange(0, COLUMNS).to(tl.int64)
        weight = tl.load(grad + k * g_k, mask=k < classes, other=0.0)[None, :]
        joint, in_bin, own, inside = _cells(
            counts, per_bin, per_class, b, k, bins, classes, c_b, c_k
        )
        slopes = _slope(joint, in_bin, own, total)
        if not BY_LABEL:
            rest = _rest(joint, in_bin, slack)
            slopes -= _slope(rest, in_bin, total - own, total)
        result = (weight * slopes + every[:, None] - shift) / total
        at = out + n * o_n + b[:, None] * o_b + k[None, :] * o_k
        tl.store(at, result, mask=inside)


def _tiling(
    activations: Tensor, most_filters: int = TILE, *, in_order: bool = False
) -> tuple[int, int, int, int]:
    """Programs, samples of each, and samples and filters of a tile, long where memory runs.

    Where samples are ``in_order`` of their labels a program has half a tile, so that those that run
    at a time have few classes.
    """
    M, N = activations.shape
    size = TILE // 2 if in_order else TILE
    filters = min(triton.next_power_of_2(N), most_filters)
    if activations.stride(1) <= activations.stride(0):
        filters = min(filters, 32)
        rows = min(triton.next_power_of_2(M), size // filters)
    else:
        rows = min(triton.next_power_of_2(M), size // min(filters, 4))
        filters = min(filters, size // rows)
    tiles = triton.cdiv(N, filters)
    each = triton.cdiv(triton.cdiv(M, max(PROGRAMS // tiles, 1)), rows) * rows
    if in_order:
        each = rows
    return tiles * triton.cdiv(M, each), each, rows, filters


def _by_class(activations: Tensor, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
    """The labels in order and the numbers of their samples, or the labels as they are and None.

    In order where there are more counters than a cache holds and one sample at least to two of a
    filter's, and filters lie side by side: the samples of a class do not.
    """
    per_filter = table.numel() // max(len(table), 1)
    few = table.nbytes <= CACHE or activations.shape[0] * 2 < per_filter
    if few or activations.stride(0) < activations.stride(1):
        return labels, None
    in_order, order = labels.sort()
    return in_order, order


def histogram_update(
    counts: Tensor, minimum: Tensor, maximum: Tensor, activations: Tensor, labels: Tensor
) -> Tensor:
    """Add samples to histograms, in place; see ``reference.histogram.histogram_update``."""
    M, N = activations.shape
    _, bins, classes = counts.shape
    if activations.numel() == 0:
        return torch.full((), -1, dtype=torch.int64, device=counts.device)
    programs, each, rows, filters = _tiling(activations)
    splits = triton.cdiv(M, each)
    wide = torch.float64 if activations.dtype == torch.float64 else torch.float32
    least, most = (activations.new_empty((splits, N), dtype=wide) for _ in range(2))
    column, within = labels.new_full((2,), N)
    range_kernel[(programs,)](
        activations, labels, least, most, column, M, N, classes, *activations.stride(),
        *labels.stride(), each,
        ROWS=rows, FILTERS=filters,
    )  # fmt: skip
    torch._assert_async(within, f"labels: want class indices in [0, {classes})")
    scale = minimum.new_empty(N)
    shift, first_cell = (labels.new_empty(N) for _ in range(2))
    before = torch.empty_like(counts)
    regrid_kernel[(N,)](
        counts, before, minimum, maximum, least, most, column, scale, shift, first_cell,
        N, splits, bins, classes, BLOCK=BLOCK,
    )  # fmt: skip
    slots = triton.next_power_of_2(bins * classes)
    own = slots <= SLOTS
    labels, order = (labels, None) if own else _by_class(activations, labels, counts)
    programs, each, rows, filters = _tiling(
        activations, SLOTS // slots if own else TILE, in_order=order is not None
    )
    count_kernel[(programs,)](
        activations, labels, order, column, scale, shift, first_cell, counts,
        M, N, bins, classes, *activations.stride(), *labels.stride(), each,
        ROWS=rows, FILTERS=filters,
        # As many as a histogram needs: one for each thread of a warp.
        SLOTS=max(filters * slots, 32) if own else 0, SORTED=order is not None,
    )  # fmt: skip
    return column.masked_fill_(column == N, -1)


def soft_histogram(
    activations: Tensor,
    labels: Tensor,
    low: Tensor,
    width: Tensor,
    bins: int,
    num_classes: int,
) -> Tensor:
    """Linear binning; see ``reference.histogram.soft_histogram``."""
    M, N = activations.shape
    reference.check_labels(labels, num_classes)
    sums = labels.new_zeros((N, bins, num_classes))
    # The finest unit, of those the weights can tell apart, of which M cannot reach the sign bit.
    fraction_bits = min(52 if low.dtype == torch.float64 else 24, 62 - M.bit_length())
    if activations.numel() > 0:
        labels, order = _by_class(activations, labels, sums)
        programs, each, rows, filters = _tiling(activations, in_order=order is not None)
        soft_kernel[(programs,)](
            activations, labels, order, low, width, sums,
            M, N, bins, num_classes, *activations.stride(), *labels.stride(), *low.stride(),
            *width.stride(), fraction_bits, each,
            ROWS=rows, FILTERS=filters, SORTED=order is not None,
        )  # fmt: skip
    counts = sums.double() * 2.0**-fraction_bits
    return torch.where(sums < 0, torch.nan, counts).to(low.dtype)


def soft_histogram_backward(
    grad_counts: Tensor, activations: Tensor, labels: Tensor, low: Tensor, width: Tensor
) -> Tensor:
    """Gradient in the activations; see ``reference.histogram.soft_histogram_backward``."""
    M, N = activations.shape
    _, bins, classes = grad_counts.shape
    grad = torch.empty_like(activations)
    if activations.numel() > 0:
        labels, order = _by_class(activations, labels, grad_counts)
        programs, each, rows, filters = _tiling(activations, in_order=order is not None)
        soft_backward_kernel[(programs,)](
            grad_counts, activations, labels, order, low, width, grad,
            M, N, bins, classes, *grad_counts.stride(), *activations.stride(), *labels.stride(),
            *low.stride(), *width.stride(), *grad.stride(), each,
            ROWS=rows, FILTERS=filters, SORTED=order is not None,
        )  # fmt: skip
    return grad


def _marginals(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of bins, of classes, of filters; contiguous."""
    per_class = counts.sum(1, dtype=dtype)
    return counts.sum(2, dtype=dtype), per_class, per_class.sum(1)


def _cell_tile(bins: int, classes: int) -> tuple[int, int]:
    """Bins and classes that are looked at together."""
    columns = min(triton.next_power_of_2(classes), 32)
    return min(triton.next_power_of_2(bins), CELLS // columns), columns


def histogram_information(counts: Tensor, by_label: bool, corrected: bool) -> Tensor:
    """Plug-in mutual information; see ``reference.histogram.histogram_information``."""
    N, bins, classes = counts.shape
    dtype = torch.float32 if counts.dtype == torch.float32 else torch.float64
    out = counts.new_empty((N,) if by_label else (N, classes), dtype=dtype)
    if out.numel() > 0:
        rows, columns = _cell_tile(bins, classes)
        histogram_information_kernel[(N if by_label else N * triton.cdiv(classes, columns),)](
            counts, *_marginals(counts, dtype), out, bins, classes, *counts.stride(),
            classes * torch.finfo(dtype).eps,
            BY_LABEL=by_label, CORRECTED=corrected, ROWS=rows, COLUMNS=columns,
            enable_fp_fusion=False,  # equal products are to be equal
        )  # fmt: skip
    return out


def histogram_information_backward(
    grad: Tensor, counts: Tensor, information: Tensor, by_label: bool
) -> Tensor:
    """Gradient in the counts; see ``reference.histogram.histogram_information_backward``."""
    N, bins, classes = counts.shape
    out = torch.empty_like(counts)
    if out.numel() > 0:
        rows, columns = _cell_tile(bins, classes)
        if by_label:  # every class has the filter's
            grad, information = (t[:, None].expand(N, classes) for t in (grad, information))
        histogram_slopes_kernel[(N * triton.cdiv(bins, rows),)](
            grad, counts, information, *_marginals(counts, counts.dtype), out, bins, classes,
            *grad.stride(), *counts.stride(), *information.stride(), *out.stride(),
            classes * torch.finfo(counts.dtype).eps,
            BY_LABEL=by_label, ROWS=rows, COLUMNS=columns,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
