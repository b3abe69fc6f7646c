"""Triton kernels of the masking family. ``picnn_fast.reference.masking`` is the definition.

Masks and pseudo-labels agree with the reference bit for bit: Philox and the softmax weights are
integers and single float32 roundings, and multiply-adds are never fused in the kernel that draws
labels. Sums over positions run in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from picnn_fast.reference import masking as reference
from picnn_fast.triton_kernels.conversions import narrow, widen

CLASS_BLOCK = 1024
TILE = 2048  # elements of a tile of [channels, positions]
# Beyond, samples would read the table too often one by one, and the library's product serves.
TABLE_ELEMENTS = 1 << 16
SAMPLES = 8  # of a tile whose rows are added up by label


@triton.jit
def _random_24_bits(index, seed, stream: tl.constexpr, rank):
    """Top 24 bits of the first Philox4x32-10 word for each int64 ``index``."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low ^ low
    word, _, _, _ = tl.philox(seed, low, high, zero + stream, zero + rank.to(tl.uint32))
    return word >> 8


@triton.jit
def _softmax_weight(x):
    """int64 ``round_down(exp(x) * 2**30)`` for float32 x <= 0, 0 below exp(-21) and for NaN."""
    in_range = x > -21.0
    x = tl.where(in_range, x, 0.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) - n * -2.1219444005469057e-4
    e = r * (1 / 5040) + (1 / 720)
    e = e * r + (1 / 120)
    e = e * r + (1 / 24)
    e = e * r + (1 / 6)
    e = e * r + (1 / 2)
    e = e * r + 1.0
    e = e * r + 1.0
    weight = (e * 1073741824.0).to(tl.int64) >> (-n).to(tl.int64)
    return tl.where(in_range, weight, 0)


@triton.jit
def _load_logits(logits, k, classes, stride_k):
    """A block of one row, NaN as +inf, -inf past the last class."""
    x = tl.load(logits + k * stride_k, mask=k < classes, other=-float("inf"))
    return tl.where(x != x, float("inf"), x)


@triton.jit(do_not_specialize=["rank"])
def pseudo_label_kernel(
    logits, seed, rank, label, classes, stride_b, stride_k, CLASS_BLOCK: tl.constexpr
):
    """One program a sample: categorical draw from softmax(logits) by inverse CDF."""
    b = tl.program_id(0).to(tl.int64)
    logits += b * stride_b
    offsets = tl.arange(0, CLASS_BLOCK).to(tl.int64)
    first = _load_logits(logits, offsets, classes, stride_k)
    for start in range(CLASS_BLOCK, classes, CLASS_BLOCK):
        first = tl.maximum(first, _load_logits(logits, start + offsets, classes, stride_k))
    largest = tl.max(first, 0)

    total = tl.zeros((), tl.int64)
    for start in range(0, classes, CLASS_BLOCK):
        x = _load_logits(logits, start + offsets, classes, stride_k)
        total += tl.sum(_softmax_weight((x - largest).to(tl.float32)), 0)
    bits = _random_24_bits(b, tl.load(seed), 1, rank).to(tl.int64)
    threshold = bits * (total >> 24) + ((bits * (total & 0xFFFFFF)) >> 24)

    passed = tl.zeros((), tl.int64)  # classes whose cumulative weight does not exceed the threshold
    below = tl.zeros((), tl.int64)
    for start in range(0, classes, CLASS_BLOCK):
        k = start + offsets
        weight = _softmax_weight(
            (_load_logits(logits, k, classes, stride_k) - largest).to(tl.float32)
        )
        reached = below + tl.cumsum(weight, 0)
        passed += tl.sum(((reached <= threshold) & (k < classes)).to(tl.int64), 0)
        below += tl.sum(weight, 0)
    tl.store(label + b, tl.minimum(passed, classes - 1))


@triton.jit
def _place(N, S, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """A program's sample, its channels, its positions and their number among its siblings."""
    channel_blocks = tl.cdiv(N, CHANNELS)
    position_blocks = tl.maximum(tl.cdiv(S, POSITIONS), 1)
    program = tl.program_id(0)
    part = program % position_blocks
    block = (program // position_blocks) % channel_blocks
    b = (program // position_blocks // channel_blocks).to(tl.int64)
    n = block.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    s = part.to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    return b, n, s, part


@triton.jit
def _scale(x, y, factor, b, n, s, N, S, x_b, x_n, x_s, y_b, y_n, y_s):
    """y = x * factor on a tile; exactly 0, and x not read, where the factor is 0."""
    inside = (n < N)[:, None] & (s < S)[None, :]
    needed = (factor != 0)[:, None]
    value = tl.load(
        x + b * x_b + n[:, None] * x_n + s[None, :] * x_s, mask=inside & needed, other=0.0
    )
    scaled = tl.where(needed, widen(value, factor.dtype) * factor[:, None], 0.0)
    tl.store(
        y + b * y_b + n[:, None] * y_n + s[None, :] * y_s,
        narrow(scaled, value.dtype),
        mask=inside,
    )


@triton.jit
def _kept(seed, index, p, rank, mask_type: tl.constexpr):
    """Bernoulli draws number ``index`` with probabilities ``p``, 1 or 0."""
    bits = _random_24_bits(index, tl.load(seed), 0, rank)
    return (bits.to(tl.float32) * 5.9604644775390625e-8 < p).to(mask_type)


@triton.jit(do_not_specialize=["rank"])
def filters_kernel(
    probabilities, labels, seed, rank, mask, N, count, p_b, p_n,
    BLOCK: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Bernoulli draws with a row of probabilities for each sample."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = index // N
    if BY_LABEL:
        row = tl.load(labels + row, mask=inside, other=0)
    p = tl.load(probabilities + row * p_b + index % N * p_n, mask=inside, other=0.0)
    tl.store(mask + index, _kept(seed, index, p, rank, mask.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rank"])
def bernoulli_kernel(
    features, correspondence, label, seed, rank, masked, mask,
    N, S, x_b, x_n, x_s, p_k, p_n, y_b, y_n, y_s,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Bernoulli draws of a block of channels, and their masked maps."""
    b, n, s, part = _place(N, S, CHANNELS, POSITIONS)
    k = tl.load(label + b)
    p = tl.load(correspondence + k * p_k + n * p_n, mask=n < N, other=0.0)
    factor = _kept(seed, b * N + n, p, rank, mask.dtype.element_ty)
    if part == 0:
        tl.store(mask + b * N + n, factor, mask=n < N)
    _scale(features, masked, factor, b, n, s, N, S, x_b, x_n, x_s, y_b, y_n, y_s)


@triton.jit
def channels_kernel(
    features, mask, labels, rows, masked,
    N, S, x_b, x_n, x_s, m_b, m_n, y_b, y_n, y_s,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Maps of a block of channels scaled by their masks."""
    b, n, s, part = _place(N, S, CHANNELS, POSITIONS)
    row = b
    if BY_LABEL:
        row = tl.load(labels + b)
    factor = tl.load(mask + row * m_b + n * m_n, mask=n < N, other=0.0)
    if BY_LABEL:  # noqa: SIM102 (known when it is compiled; the other when it runs)
        if part == 0:
            tl.store(rows + b * N + n, factor, mask=n < N)
    _scale(features, masked, factor, b, n, s, N, S, x_b, x_n, x_s, y_b, y_n, y_s)


@triton.jit
def backward_kernel(
    grad_masked, features, mask, grad_features, grad_mask,
    N, S, g_b, g_n, g_s, x_b, x_n, x_s, m_b, m_n, y_b, y_n, y_s,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of channels over all positions, reading both inputs once."""
    blocks = tl.cdiv(N, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    factor = tl.load(mask + b * m_b + n * m_n, mask=n < N, other=0.0)
    total = tl.zeros((CHANNELS, POSITIONS), factor.dtype)
    for start in range(0, S, POSITIONS):
        s = start + tl.arange(0, POSITIONS).to(tl.int64)
        inside = (n < N)[:, None] & (s < S)[None, :]
        grad = tl.load(
            grad_masked + b * g_b + n[:, None] * g_n + s[None, :] * g_s, mask=inside, other=0.0
        )
        x = tl.load(
            features + b * x_b + n[:, None] * x_n + s[None, :] * x_s, mask=inside, other=0.0
        )
        wide = widen(grad, factor.dtype)
        total += widen(x, factor.dtype) * wide
        scaled = tl.where((factor != 0)[:, None], wide * factor[:, None], 0.0)
        tl.store(
            grad_features + b * y_b + n[:, None] * y_n + s[None, :] * y_s,
            narrow(scaled, grad.dtype),
            mask=inside,
        )
    tl.store(grad_mask + b * N + n, tl.sum(total, 1), mask=n < N)


@triton.jit
def _sum_by_label(
    program, grad_rows, labels, by_label, B, N, r_b, r_n, BLOCK: tl.constexpr, SAMPLES: tl.constexpr
):
    """The rows of one class added up in a block of columns, in the order of the samples."""
    blocks = tl.cdiv(N, BLOCK)
    k = (program // blocks).to(tl.int64)
    n = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((SAMPLES, BLOCK), grad_rows.dtype.element_ty)
    for start in range(0, B, SAMPLES):
        b = start + tl.arange(0, SAMPLES).to(tl.int64)
        mine = tl.load(labels + b, mask=b < B, other=-1) == k
        total += tl.load(
            grad_rows + b[:, None] * r_b + n[None, :] * r_n,
            mask=mine[:, None] & (n < N)[None, :],
            other=0.0,
        )
    tl.store(by_label + k * N + n, tl.sum(total, 0), mask=n < N)


@triton.jit
def sums_kernel(
    grad_rows, labels, by_label, B, N, r_b, r_n, BLOCK: tl.constexpr, SAMPLES: tl.constexpr
):  # fmt: skip
    """One program a class and block of columns."""
    _sum_by_label(tl.program_id(0), grad_rows, labels, by_label, B, N, r_b, r_n, BLOCK, SAMPLES)


@triton.jit
def _logits_gradient(
    b, grad_rows, scores, table, gradient, K, N, r_b, r_n, l_b, l_k, p_k, p_n,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """Of one sample. ``gradient`` holds grad_rows @ table.T already where ``MULTIPLIED``."""
    scores += b * l_b
    gradient += b * K
    offsets = tl.arange(0, CLASSES).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    low = -float("inf")
    most = tl.load(scores + offsets * l_k, mask=offsets < K, other=low)
    for start in range(CLASSES, K, CLASSES):
        k = start + offsets
        most = tl.maximum(most, tl.load(scores + k * l_k, mask=k < K, other=low))
    largest = tl.max(most, 0)
    total = tl.zeros((CLASSES,), grad_rows.dtype.element_ty)
    weighted = tl.zeros((CLASSES,), grad_rows.dtype.element_ty)
    for start in range(0, K, CLASSES):
        k = start + offsets
        if MULTIPLIED:
            product = tl.load(gradient + k, mask=k < K, other=0.0)
        else:
            products = tl.zeros((CLASSES, BLOCK), grad_rows.dtype.element_ty)
            for first in range(0, N, BLOCK):
                n = first + columns
                row = tl.load(grad_rows + b * r_b + n * r_n, mask=n < N, other=0.0)
                part = tl.load(
                    table + k[:, None] * p_k + n[None, :] * p_n,
                    mask=(k < K)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                products += part * row[None, :]
            product = tl.sum(products, 1)
            tl.store(gradient + k, product, mask=k < K)
        weight = tl.exp(tl.load(scores + k * l_k, mask=k < K, other=low) - largest)
        weight = tl.where(k < K, weight, 0.0)
        total += weight
        weighted += weight * product
    sum_of_weights = tl.sum(total, 0)
    mean = tl.sum(weighted, 0) / sum_of_weights
    tl.debug_barrier()  # the products are read again by other threads
    for start in range(0, K, CLASSES):
        k = start + offsets
        weight = tl.exp(tl.load(scores + k * l_k, mask=k < K, other=low) - largest)
        product = tl.load(gradient + k, mask=k < K, other=0.0)
        tl.store(gradient + k, weight / sum_of_weights * (product - mean), mask=k < K)


@triton.jit
def parameters_kernel(
    grad_rows, scores, table, labels, gradient, by_label,
    B, K, N, r_b, r_n, l_b, l_k, p_k, p_n,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """The first programs a sample's logits each, the others the table."""
    program = tl.program_id(0)
    if program < B:
        _logits_gradient(
            program.to(tl.int64), grad_rows, scores, table, gradient,
            K, N, r_b, r_n, l_b, l_k, p_k, p_n, CLASSES, BLOCK, MULTIPLIED,
        )  # fmt: skip
    else:
        _sum_by_label(program - B, grad_rows, labels, by_label, B, N, r_b, r_n, BLOCK, SAMPLES)


def _flat(maps: Tensor) -> Tensor:
    """``[B, N, *spatial]`` as a view ``[B, N, S]``; the Python wrappers copy what has none."""
    return maps.view(*maps.shape[:2], math.prod(maps.shape[2:]))


def _tile(features: Tensor) -> tuple[int, int]:
    """Channels and positions of a tile, long along the axis that is contiguous in memory."""
    _, N, S = features.shape
    channels, positions = triton.next_power_of_2(max(N, 1)), triton.next_power_of_2(max(S, 1))
    if S > 1 and features.stride(1) == 1:
        channels = min(channels, 128)
        return channels, min(positions, TILE // channels)
    positions = min(positions, 512)
    return min(channels, TILE // positions), positions


def draw_labels(logits: Tensor, seed: Tensor, rank: int) -> Tensor:
    """Pseudo-labels; see ``reference.masking.draw_labels``."""
    B, classes = logits.shape
    label = logits.new_empty((B,), dtype=torch.int64)
    if B > 0:
        pseudo_label_kernel[(B,)](
            logits, seed, rank, label, classes, *logits.stride(),
            CLASS_BLOCK=min(CLASS_BLOCK, triton.next_power_of_2(classes)),
            enable_fp_fusion=False,
        )  # fmt: skip
    return label


def draw_filters(
    probabilities: Tensor,
    seed: Tensor,
    rank: int,
    labels: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Bernoulli masks; see ``reference.masking.draw_filters``."""
    if validate:
        reference.check_probabilities(probabilities, "probabilities")
    batch = len(probabilities)
    if labels is not None:
        reference.check_labels(labels, batch)
        batch, labels = len(labels), labels.contiguous()
    mask = probabilities.new_empty((batch, probabilities.shape[1]))
    if mask.numel() > 0:
        filters_kernel[(triton.cdiv(mask.numel(), TILE),)](
            probabilities, probabilities if labels is None else labels, seed, rank, mask,
            mask.shape[1], mask.numel(), *probabilities.stride(),
            BLOCK=TILE, BY_LABEL=labels is not None,
        )  # fmt: skip
    return mask


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    seed: Tensor,
    rank: int,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-label, Bernoulli mask and masked maps; see ``reference.masking.bernoulli_mask``."""
    if validate:
        reference.check_probabilities(correspondence)
    masked = torch.empty_like(features)
    features, flat = _flat(features), _flat(masked)
    B, N, S = features.shape
    mask_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    mask = features.new_empty((B, N), dtype=mask_dtype)
    label = draw_labels(logits, seed, rank)
    if B * N > 0:
        channels, positions = _tile(features)
        grid = (B * triton.cdiv(N, channels) * max(triton.cdiv(S, positions), 1),)
        bernoulli_kernel[grid](
            features, correspondence, label, seed, rank, flat, mask,
            N, S, *features.stride(), *correspondence.stride(), *flat.stride(),
            CHANNELS=channels, POSITIONS=positions,
        )  # fmt: skip
    return masked, mask, label


def mask_channels(features: Tensor, mask: Tensor) -> Tensor:
    """Maps scaled channel by channel; see ``reference.masking.mask_channels``."""
    return _scaled(features, mask)


def class_gate(features: Tensor, gate: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Maps scaled by their labels' rows; see ``reference.masking.class_gate``."""
    reference.check_labels(labels, len(gate))
    rows = gate.new_empty(features.shape[:2])
    if features.numel() == 0:
        return torch.empty_like(features), rows.copy_(gate[labels])
    return _scaled(features, gate, labels.contiguous(), rows), rows


def _scaled(
    features: Tensor, mask: Tensor, labels: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    masked = torch.empty_like(features)
    features, flat = _flat(features), _flat(masked)
    B, N, S = features.shape
    if features.numel() > 0:
        channels, positions = _tile(features)
        channels_kernel[(B * triton.cdiv(N, channels) * triton.cdiv(S, positions),)](
            features, mask, mask if labels is None else labels, mask if rows is None else rows,
            flat,
            N, S, *features.stride(), *mask.stride(), *flat.stride(),
            CHANNELS=channels, POSITIONS=positions, BY_LABEL=labels is not None,
        )  # fmt: skip
    return masked


def masking_backward(grad_masked: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``features * mask``; see ``reference.masking.masking_backward``."""
    grad_features = torch.empty_like(features)
    grad_masked, features, flat = _flat(grad_masked), _flat(features), _flat(grad_features)
    B, N, S = features.shape
    grad_mask = mask.new_empty((B, N))
    if B * N > 0:
        channels, positions = _tile(features)
        backward_kernel[(B * triton.cdiv(N, channels),)](
            grad_masked, features, mask, flat, grad_mask,
            N, S, *grad_masked.stride(), *features.stride(), *mask.stride(), *flat.stride(),
            CHANNELS=channels, POSITIONS=positions,
        )  # fmt: skip
    return grad_features, grad_mask


def sums_by_label(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Rows added up by label; see ``reference.masking.sums_by_label``."""
    filters = rows.shape[1]
    sums = rows.new_empty((classes, filters))
    if sums.numel() > 0:
        block = _columns(filters)
        sums_kernel[(classes * triton.cdiv(filters, block),)](
            rows, labels.contiguous(), sums, len(labels), filters, *rows.stride(),
            BLOCK=block, SAMPLES=SAMPLES,
        )  # fmt: skip
    return sums


def bernoulli_parameters_backward(
    grad_mask: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and correspondence, see
    ``reference.masking.bernoulli_parameters_backward``."""
    (batch, filters), classes = grad_mask.shape, len(correspondence)
    gradient = logits.new_empty((batch, classes))
    sums = correspondence.new_empty((classes, filters))
    multiplied = correspondence.numel() > TABLE_ELEMENTS
    if multiplied:
        with torch.autocast(logits.device.type, enabled=False):
            torch.mm(grad_mask, correspondence.T, out=gradient)
    block = _columns(filters)
    programs = batch + classes * triton.cdiv(filters, block)
    if programs > 0:
        parameters_kernel[(programs,)](
            grad_mask, logits, correspondence, pseudo_label.contiguous(), gradient, sums,
            batch, classes, filters,
            *grad_mask.stride(), *logits.stride(), *correspondence.stride(),
            CLASSES=min(16, triton.next_power_of_2(classes)), BLOCK=block, SAMPLES=SAMPLES,
            MULTIPLIED=multiplied,
        )  # fmt: skip
    return gradient, sums


def _columns(filters: int) -> int:
    """Of a block, a power of two."""
    return min(128, triton.next_power_of_2(max(filters, 1)))
