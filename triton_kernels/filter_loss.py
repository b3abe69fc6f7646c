"""Triton kernels of the filter loss. ``picnn_fast.reference.filter_loss`` is the definition.

The responses s of a filter, one for each sample and template, are never stored: each pass makes
them anew, tile by tile, as a matrix product of maps with templates looked up by offset. Passes are
over the columns (a template, all samples), the rows (a sample, all templates), the columns once
more for the exact gradient, and the gradient; in between, [N, P + 1] and [N, B] numbers. Sums run
in a fixed order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.triton_kernels.conversions import widen
from picnn_fast.triton_kernels.templates import middle, number, place, tile

# Sides of tiles, as large as the registers of a multiprocessor hold without spilling.
SAMPLES = 64  # of responses, [samples, templates]
TEMPLATES = 64
DEPTH = 16  # positions that a product takes in at a time
GRAD_TEMPLATES = 32  # of responses that a tile of the gradient, [samples, positions], takes in
GRAD_POSITIONS = 256  # of the gradient, for each tile of which the responses are made anew
if triton.knobs.runtime.interpret:  # takes its time by the operation, not by the element
    SAMPLES = TEMPLATES = DEPTH = GRAD_TEMPLATES = GRAD_POSITIONS = 1024


@triton.jit
def _product(x, y, total):
    """total + x @ y; float32 on matrix units too, in three products of halves."""
    if x.dtype == tl.float64:
        return tl.dot(x, y, total, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
def _templates(offsets, s, t, h, w):
    """Templates ``t`` at positions ``s`` in units of tau; the one past the last position is T⁻."""
    S = h * w
    inside = (s < S) & (t < S)
    value = tl.load(middle(offsets, h, w) + (place(s, w) - place(t, w)), mask=inside, other=0.0)
    return tl.where(t == S, -1.0, value)


@triton.jit
def _responses(
    maps, offsets, b, t, B, h, w, x_b, x_s, tau, dtype: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """s of samples ``b`` and templates ``t``: [samples, templates]."""
    S = h * w
    total = tl.zeros((b.shape[0], t.shape[0]), dtype)
    for start in range(0, S, DEPTH):
        s = start + tl.arange(0, DEPTH)
        x = tl.load(
            maps + b[:, None] * x_b + s[None, :].to(tl.int64) * x_s,
            mask=(b < B)[:, None] & (s < S)[None, :],
            other=0.0,
        )
        y = _templates(offsets, s[:, None], t[None, :], h, w)
        total = _product(widen(x, dtype), y, total)
    return total * number(tau, dtype)


@triton.jit
def _shift(most):
    """What to subtract before the exponential, finite as in torch.logsumexp."""
    return tl.where(tl.abs(most) < float("inf"), most, 0.0)


@triton.jit
def _shrinking(most, more):
    """The exponent by which a sum of exponentials shrinks as ``more`` replaces ``most``."""
    # An empty sum is 0 at any scale.
    return tl.where(most == -float("inf"), 0.0, _shift(most) - _shift(more))


@triton.jit
def _moving_average(old, new, log_kept, log_taken):
    """Of what these are logarithms of; ``new`` where there is no old, -inf."""
    kept, taken = old + number(log_kept, new.dtype), new + number(log_taken, new.dtype)
    shift = _shift(tl.maximum(kept, taken))
    mixed = shift + tl.log(tl.exp(kept - shift) + tl.exp(taken - shift))
    return tl.where(old == -float("inf"), new, mixed)


@triton.jit
def columns_kernel(
    maps, offsets, columns, log_mean,
    B, h, w, x_b, x_n, x_s, m_n, m_t,
    tau: tl.float64, log_batch: tl.float64, log_kept: tl.float64, log_taken: tl.float64,
    SAMPLES: tl.constexpr, TEMPLATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """log of the sum of exp(s) over the samples, less log_batch: [N, P + 1].

    Where a log_mean is kept, the moving average of both takes its place.
    """
    dtype = columns.dtype.element_ty
    count = h * w + 1
    blocks = tl.cdiv(count, TEMPLATES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * TEMPLATES + tl.arange(0, TEMPLATES)
    most = tl.full((TEMPLATES,), -float("inf"), dtype)
    total = tl.zeros((TEMPLATES,), dtype)
    for first in range(0, B, SAMPLES):
        b = first + tl.arange(0, SAMPLES).to(tl.int64)
        s = _responses(maps + n * x_n, offsets, b, t, B, h, w, x_b, x_s, tau, dtype, DEPTH)
        s = tl.where((b < B)[:, None], s, -float("inf"))
        more = tl.maximum(most, tl.max(s, 0))
        total = total * tl.exp(_shrinking(most, more))
        total += tl.sum(tl.exp(s - _shift(more)[None, :]), 0)
        most = more
    value = _shift(most) + tl.log(total) - number(log_batch, dtype)
    if log_mean is not None:
        old = tl.load(log_mean + n * m_n + t * m_t, mask=t < count, other=0.0)
        value = _moving_average(old, value, log_kept, log_taken)
    tl.store(columns + n * count + t, value, mask=t < count)


@triton.jit
def rows_kernel(
    maps, offsets, columns, row_sums, gains, assigned, relative,
    B, h, w, x_b, x_n, x_s, a_b, a_n, tau: tl.float64,
    SAMPLES: tl.constexpr, TEMPLATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """With r = s - columns: log of the sum of exp(r) over the templates, [N, B], and the gains.

    A gain is what the map tells about its template: log(P + 1) less the entropy of softmax(r).
    Where a template is assigned to each map, relative is its r: of the very s that columns are of,
    for large ones differ by more than r when they are added up in another order.
    """
    dtype = columns.dtype.element_ty
    count = h * w + 1
    blocks = tl.cdiv(B, SAMPLES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    b = (tl.program_id(0) % blocks).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    most = tl.full((SAMPLES,), -float("inf"), dtype)
    total = tl.zeros((SAMPLES,), dtype)
    weighted = tl.zeros((SAMPLES,), dtype)
    own = tl.zeros((SAMPLES,), dtype)
    if assigned is not None:
        given = tl.load(assigned + b * a_b + n * a_n, mask=b < B, other=0)
        # Live with TRITON_DEBUG=1. Without it the nearest template takes its place.
        tl.device_assert((given >= 0) & (given < count), "assigned to no template")
        given = tl.minimum(tl.maximum(given, 0), count - 1)
    for first in range(0, count, TEMPLATES):
        t = first + tl.arange(0, TEMPLATES)
        s = _responses(maps + n * x_n, offsets, b, t, B, h, w, x_b, x_s, tau, dtype, DEPTH)
        column = tl.load(columns + n * count + t, mask=t < count, other=0.0)
        inside = (t < count)[None, :] & (b < B)[:, None]
        r = tl.where(inside, s - column[None, :], -float("inf"))
        if assigned is not None:
            own += tl.sum(tl.where(inside & (t[None, :] == given[:, None]), r, 0.0), 1)
        more = tl.maximum(most, tl.max(r, 1))
        shrinking = _shrinking(most, more)
        below = tl.where(inside, r - _shift(more)[:, None], 0.0)
        terms = tl.where(inside, tl.exp(below), 0.0)
        weighted = (weighted + shrinking * total) * tl.exp(shrinking) + tl.sum(terms * below, 1)
        total = total * tl.exp(shrinking) + tl.sum(terms, 1)
        most = more
    total = tl.where(b < B, total, 1.0)
    tl.store(row_sums + n * B + b, _shift(most) + tl.log(total), mask=b < B)
    gain = weighted / total - tl.log(total / count)
    tl.store(gains + n * B + b, gain, mask=b < B)
    if assigned is not None:
        tl.store(relative + n * B + b, own, mask=b < B)


@triton.jit
def losses_kernel(
    row_sums, gains, relative, log_ratio, loss, terms, ratios,
    B, r_n, scale: tl.float64,
    log_all: tl.float64, log_count: tl.float64, log_kept: tl.float64, log_taken: tl.float64,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """The losses [N], by what rows_kernel found; a filter a program.

    With estimates, their ratios are renewed first: the log of the sum of exp(row_sums), less
    log_all, or where a log_ratio is kept the moving average of both. terms are of the losses, where
    a template is assigned to each map.
    """
    dtype = loss.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    if ratios is not None:
        most = tl.full((SAMPLES,), -float("inf"), dtype)
        total = tl.zeros((SAMPLES,), dtype)
        for first in range(0, B, SAMPLES):
            b = first + tl.arange(0, SAMPLES).to(tl.int64)
            row = tl.load(row_sums + n * B + b, mask=b < B, other=-float("inf"))
            more = tl.maximum(most, row)
            total = total * tl.exp(_shrinking(most, more)) + tl.exp(row - _shift(more))
            most = more
        top = tl.max(most, 0)
        total = tl.sum(total * tl.exp(_shrinking(most, top)), 0)
        ratio = _shift(top) + tl.log(total) - number(log_all, dtype)
        if log_ratio is not None:
            ratio = _moving_average(tl.load(log_ratio + n * r_n), ratio, log_kept, log_taken)
        tl.store(ratios + n, ratio)
    sums = tl.zeros((SAMPLES,), dtype)
    for first in range(0, B, SAMPLES):
        b = first + tl.arange(0, SAMPLES).to(tl.int64)
        if relative is not None:
            row = tl.load(relative + n * B + b, mask=b < B, other=0.0)
            gain = row - ratio
        else:
            row = tl.load(row_sums + n * B + b, mask=b < B, other=0.0)
            gain = tl.load(gains + n * B + b, mask=b < B, other=0.0)
            if ratios is not None:
                gain += row - number(log_count, dtype) - ratio
        term = -number(scale, dtype) * tl.exp(row) * gain
        if terms is not None:
            tl.store(terms + n * B + b, term, mask=b < B)
        sums += tl.where(b < B, term, 0.0)
    tl.store(loss + n, tl.sum(sums, 0))


@triton.jit
def information_kernel(
    maps, offsets, columns, row_sums, information,
    B, h, w, x_b, x_n, x_s, tau: tl.float64, log_count: tl.float64,
    SAMPLES: tl.constexpr, TEMPLATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum of exp(r)·(r - marginal), r = s - columns, over the samples: [N, P + 1].

    The marginal is the row's sum less log_count.
    """
    dtype = columns.dtype.element_ty
    count = h * w + 1
    blocks = tl.cdiv(count, TEMPLATES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * TEMPLATES + tl.arange(0, TEMPLATES)
    column = tl.load(columns + n * count + t, mask=t < count, other=0.0)
    total = tl.zeros((TEMPLATES,), dtype)
    for first in range(0, B, SAMPLES):
        b = first + tl.arange(0, SAMPLES).to(tl.int64)
        s = _responses(maps + n * x_n, offsets, b, t, B, h, w, x_b, x_s, tau, dtype, DEPTH)
        marginal = tl.load(row_sums + n * B + b, mask=b < B, other=0.0) - number(log_count, dtype)
        inside = (t < count)[None, :] & (b < B)[:, None]
        r = tl.where(inside, s - column[None, :], 0.0)
        total += tl.sum(tl.where(inside, tl.exp(r) * (r - marginal[:, None]), 0.0), 0)
    tl.store(information + n * count + t, total, mask=t < count)


@triton.jit
def gradient_kernel(
    maps, offsets, columns, rows, information, grad_maps,
    B, h, w, x_b, x_n, x_s, g_b, g_n, g_s, m_n, m_b,
    tau: tl.float64, factor: tl.float64, log_count: tl.float64,
    SAMPLES: tl.constexpr, GRAD_TEMPLATES: tl.constexpr, DEPTH: tl.constexpr,
    GRAD_POSITIONS: tl.constexpr,
):  # fmt: skip
    """factor · sum over T of exp(r)·(r - marginal - information)·T, r = s - columns.

    The marginal is that of ``rows``, [N, B] by any strides, less log_count.
    """
    dtype = columns.dtype.element_ty
    S = h * w
    count = S + 1
    position_blocks = tl.cdiv(S, GRAD_POSITIONS)
    blocks = tl.cdiv(B, SAMPLES) * position_blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    b = (block // position_blocks).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    k = (block % position_blocks) * GRAD_POSITIONS + tl.arange(0, GRAD_POSITIONS)
    marginal = tl.load(rows + n * m_n + b * m_b, mask=b < B, other=0.0)
    marginal -= number(log_count, dtype)
    total = tl.zeros((SAMPLES, GRAD_POSITIONS), dtype)
    for first in range(0, count, GRAD_TEMPLATES):
        t = first + tl.arange(0, GRAD_TEMPLATES)
        s = _responses(maps + n * x_n, offsets, b, t, B, h, w, x_b, x_s, tau, dtype, DEPTH)
        column = tl.load(columns + n * count + t, mask=t < count, other=0.0)
        inside = (t < count)[None, :] & (b < B)[:, None]
        r = tl.where(inside, s - column[None, :], 0.0)
        excess = r - marginal[:, None]
        if information is not None:
            mean = tl.load(information + n * count + t, mask=t < count, other=0.0)
            excess -= mean[None, :]
        weights = tl.where(inside, tl.exp(r) * excess, 0.0)
        y = _templates(offsets, k[None, :], t[:, None], h, w)
        total = _product(weights, y, total)
    tl.store(
        grad_maps + n * g_n + b[:, None] * g_b + k[None, :].to(tl.int64) * g_s,
        total * (number(factor, dtype) * number(tau, dtype)),
        mask=(b < B)[:, None] & (k < S)[None, :],
    )


@triton.jit
def assigned_kernel(
    offsets, assigned, weights, grad_maps,
    B, N, h, w, a_b, a_n, g_b, g_n, g_s, tau: tl.float64,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """weights, [N, B], times the assigned template of each map; a block of channels a program."""
    dtype = weights.dtype.element_ty
    S = h * w
    blocks = tl.cdiv(N, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    given = tl.load(assigned + b * a_b + n * a_n, mask=n < N, other=0)
    # As rows_kernel has it.
    t = tl.minimum(tl.maximum(given, 0), S).to(tl.int32)
    weight = tl.load(weights + n * B + b, mask=n < N, other=0.0) * number(tau, dtype)
    for start in range(0, S, POSITIONS):
        s = start + tl.arange(0, POSITIONS)
        y = _templates(offsets, s[None, :], t[:, None], h, w)
        tl.store(
            grad_maps + b * g_b + n[:, None] * g_n + s[None, :].to(tl.int64) * g_s,
            weight[:, None] * y,
            mask=(n < N)[:, None] & (s < S)[None, :],
        )


def _side(size: int, most: int, dtype: torch.dtype) -> int:
    """Of a tile; half as long for float64, which takes twice the registers; as products want it."""
    most = most // 2 if dtype == torch.float64 else most
    return max(min(triton.next_power_of_2(size), most), 16)


def _arguments(x: Tensor, offsets: Tensor, tau: float) -> dict[str, Any]:
    """What every pass over the responses of ``x`` takes."""
    B, N, height, width = x.shape
    maps = x.view(B, N, height * width)
    x_b, x_n, x_s = maps.stride()
    return {
        "maps": maps, "offsets": offsets, "B": B, "h": height, "w": width,
        "x_b": x_b, "x_n": x_n, "x_s": x_s, "tau": tau,
        "SAMPLES": _side(B, SAMPLES, x.dtype), "DEPTH": _side(height * width, DEPTH, x.dtype),
        "num_warps": 8,
    }  # fmt: skip


class _Renewal(NamedTuple):
    """How estimates take in a batch; the kernels' shares of what is kept and of what is new."""

    log_mean: Tensor | None
    log_ratio: Tensor | None
    shares: dict[str, float]

    @classmethod
    def by(cls, log_mean: Tensor, log_ratio: Tensor, momentum: float) -> "_Renewal":
        if momentum == 1:  # nothing is kept
            return cls(None, None, _ALL_NEW)
        shares = {"log_kept": math.log1p(-momentum), "log_taken": math.log(momentum)}
        return cls(log_mean, log_ratio, shares)


_ALL_NEW = {"log_kept": 0.0, "log_taken": 0.0}


def _columns(
    arguments: dict[str, Any], dtype: torch.dtype, renewal: _Renewal | None = None
) -> Tensor:
    """See ``columns_kernel``."""
    maps = arguments["maps"]
    B, N, S = maps.shape
    columns = maps.new_empty((N, S + 1), dtype=dtype)
    if N > 0:
        templates = _side(S + 1, TEMPLATES, maps.dtype)
        grid = (N * triton.cdiv(S + 1, templates),)
        log_mean, _, shares = renewal or _Renewal(None, None, _ALL_NEW)
        m_n, m_t = (0, 0) if log_mean is None else log_mean.stride()
        columns_kernel[grid](
            columns=columns, log_mean=log_mean, m_n=m_n, m_t=m_t,
            log_batch=math.log(B) if renewal else 0.0, **shares, TEMPLATES=templates, **arguments,
        )  # fmt: skip
    return columns


def _rows(
    arguments: dict[str, Any], columns: Tensor, assigned: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``rows_kernel``."""
    B, N, S = arguments["maps"].shape
    rows, gains = (columns.new_empty((N, B)) for _ in range(2))
    relative = None if assigned is None else columns.new_empty((N, B))
    if N > 0:
        templates = _side(S + 1, TEMPLATES, columns.dtype)
        grid = (N * triton.cdiv(B, arguments["SAMPLES"]),)
        a_b, a_n = (0, 0) if assigned is None else assigned.stride()
        rows_kernel[grid](
            columns=columns, row_sums=rows, gains=gains, assigned=assigned, relative=relative,
            a_b=a_b, a_n=a_n, TEMPLATES=templates, **arguments,
        )  # fmt: skip
    return rows, gains, relative


def _losses(
    rows: Tensor, gains: Tensor, relative: Tensor | None, count: int, renewal: _Renewal | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, and of estimates the terms and the new ratios; see ``losses_kernel``."""
    N, B = rows.shape
    loss = rows.new_empty(N)
    ratios = None if renewal is None else rows.new_empty(N)
    terms = None if relative is None else rows.new_empty((N, B))
    if N > 0:
        _, log_ratio, shares = renewal or _Renewal(None, None, _ALL_NEW)
        samples = max(min(triton.next_power_of_2(B), 1024), 16)
        losses_kernel[(N,)](
            rows, gains, relative, log_ratio, loss, terms, ratios,
            B, 0 if log_ratio is None else log_ratio.stride(0),
            scale=1 / (count if renewal is None else B * count),
            log_all=math.log(B * count), log_count=math.log(count), **shares, SAMPLES=samples,
        )  # fmt: skip
    return loss, rows if terms is None else terms, loss if ratios is None else ratios


def _information(arguments: dict[str, Any], columns: Tensor, rows: Tensor) -> Tensor:
    """See ``information_kernel``."""
    information = torch.empty_like(columns)
    N, count = columns.shape
    if N > 0:
        templates = _side(count, TEMPLATES, columns.dtype)
        information_kernel[(N * triton.cdiv(count, templates),)](
            columns=columns, row_sums=rows, information=information, log_count=math.log(count),
            TEMPLATES=templates, **arguments,
        )  # fmt: skip
    return information


def _gradient(
    x: Tensor,
    arguments: dict[str, Any],
    columns: Tensor,
    rows: Tensor,
    information: Tensor | None,
    factor: float,
) -> Tensor:
    """See ``gradient_kernel``; ``rows`` are marginals already where there is no information."""
    grad = torch.empty_like(x, dtype=columns.dtype)
    B, N, S = arguments["maps"].shape
    if x.numel() > 0:
        g_b, g_n, g_s = grad.view(B, N, S).stride()
        m_n, m_b = rows.stride()
        templates = _side(S + 1, GRAD_TEMPLATES, x.dtype)
        positions = _side(S, GRAD_POSITIONS, x.dtype)
        grid = (N * triton.cdiv(B, arguments["SAMPLES"]) * triton.cdiv(S, positions),)
        gradient_kernel[grid](
            columns=columns, rows=rows, information=information, grad_maps=grad,
            g_b=g_b, g_n=g_n, g_s=g_s, m_n=m_n, m_b=m_b, factor=factor,
            log_count=0.0 if information is None else math.log(S + 1),
            GRAD_TEMPLATES=templates, GRAD_POSITIONS=positions, **arguments,
        )  # fmt: skip
    return grad


def _assigned(x: Tensor, arguments: dict[str, Any], assigned: Tensor, weights: Tensor) -> Tensor:
    """See ``assigned_kernel``."""
    grad = torch.empty_like(x, dtype=weights.dtype)
    if x.numel() > 0:
        B, N, S = arguments["maps"].shape
        channels, positions, warps = tile(arguments["maps"])
        assigned_kernel[(B * triton.cdiv(N, channels),)](
            arguments["offsets"], assigned, weights, grad,
            B, N, *x.shape[2:], *assigned.stride(), *grad.view(B, N, S).stride(), arguments["tau"],
            CHANNELS=channels, POSITIONS=positions, num_warps=warps,
        )  # fmt: skip
    return grad


def filter_loss(x: Tensor, offsets: Tensor, tau: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Minus the mutual information over the batch; see ``reference.filter_loss.filter_loss``."""
    dtype = accumulate_dtype(x.dtype)
    B, N, height, width = x.shape
    if B == 0:
        grad = torch.empty_like(x, dtype=dtype) if with_grad else x.new_empty(0, dtype=dtype)
        return x.new_zeros(N, dtype=dtype), grad
    count = height * width + 1
    arguments = _arguments(x, offsets, tau)
    columns = _columns(arguments, dtype)
    rows, gains, _ = _rows(arguments, columns)
    loss, _, _ = _losses(rows, gains, None, count, None)
    if not with_grad:
        return loss, columns.new_empty(0)
    information = _information(arguments, columns, rows)
    return loss, _gradient(x, arguments, columns, rows, information, -1 / count)


def filter_loss_running(
    x: Tensor,
    log_mean: Tensor,
    log_ratio: Tensor,
    momentum: float,
    assigned: Tensor | None,
    offsets: Tensor,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss with running estimates; see ``reference.filter_loss.filter_loss_running``."""
    dtype = accumulate_dtype(x.dtype)
    B, N, height, width = x.shape
    if B == 0:
        grad = torch.empty_like(x, dtype=dtype) if with_grad else x.new_empty(0, dtype=dtype)
        old = [t.clone(memory_format=torch.contiguous_format) for t in (log_mean, log_ratio)]
        return x.new_zeros(N, dtype=dtype), grad, old[0], old[1]
    count = height * width + 1
    arguments = _arguments(x, offsets, tau)
    renewal = _Renewal.by(log_mean, log_ratio, momentum)
    log_mean = _columns(arguments, dtype, renewal)
    rows, gains, relative = _rows(arguments, log_mean, assigned)
    loss, terms, log_ratio = _losses(rows, gains, relative, count, renewal)
    if not with_grad:
        grad = log_mean.new_empty(0)
    elif assigned is not None:
        grad = _assigned(x, arguments, assigned, terms)
    else:
        marginals = log_ratio[:, None].expand(N, B)
        grad = _gradient(x, arguments, log_mean, marginals, None, -1 / (B * count))
    return loss, grad, log_mean, log_ratio
