"""Masking of feature maps by Bernoulli draws (PICNN) and by class-specific gates (CSG).

The kernels in ``csrc/`` and ``triton_kernels/`` compute what this file says, the random
draws bit for bit. Shapes: B batch, N filters (channels), S positions (all spatial axes
flattened), K classes.
"""

import math

import torch
from torch import Tensor

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

FILTER_STREAM = 0
LABEL_STREAM = 1


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 block cipher on 32-bit words held in int64.

    Args:
        counter: ``[..., 4]`` int64, each word in [0, 2**32).
        key: ``[..., 2]`` int64, broadcastable against ``counter``'s leading axes.

    Returns:
        ``[..., 4]`` int64, each word in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves intact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def random_24_bits(index: Tensor, seed: Tensor, stream: int, rank: int) -> Tensor:
    """The top 24 bits of the first Philox word for each draw ``index`` (int64)."""
    counter = torch.stack(
        (
            index & _WORD,
            (index >> 32) & _WORD,
            torch.full_like(index, stream),
            torch.full_like(index, rank & _WORD),
        ),
        -1,
    )
    seed = seed.reshape(())
    key = torch.stack((seed & _WORD, (seed >> 32) & _WORD))
    return philox4x32_10(counter, key)[..., 0] >> 8


# softmax(logits) in integer weights of 2**-30 of the largest class. Only IEEE float32 additions
# and multiplications, each rounded on its own, in a fixed order, then integers: the weights are
# the same on every machine, and integer sums do not depend on the order of summation. So the
# pseudo-label is the same on every backend, bit for bit.
WEIGHT_BITS = 30
_SMALLEST = -21.0  # exp(-21) < 2**-30
_LOG2_E = math.log2(math.e)
_LN2_HIGH = 0.693359375  # 355/512: exact products with |n| <= 2**15
_LN2_LOW = math.log(2) - _LN2_HIGH
_TAYLOR = tuple(1 / math.factorial(n) for n in range(7, -1, -1))  # |r| <= ln(2)/2: error < 6e-9


def softmax_weights(logits: Tensor) -> Tensor:
    """Integer softmax weights, ``round_down(exp(logit - max) * 2**30)``, int64 ``[B, K]``.

    ``logits`` is float32 or float64. Classes below exp(-21) of the largest weigh 0. A row with
    NaN or +inf, or with -inf alone, weighs 0 everywhere.
    """
    logits = torch.where(logits.isnan(), math.inf, logits)
    x = (logits - logits.amax(-1, keepdim=True)).float()
    in_range = x > _SMALLEST
    x = torch.where(in_range, x, 0.0)
    n = torch.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    e = torch.full_like(r, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        e = e * r + coefficient
    weights = (e * 2.0**WEIGHT_BITS).to(torch.int64) >> (-n).to(torch.int64)
    return torch.where(in_range, weights, 0)


def draw_labels(logits: Tensor, seed: Tensor, rank: int) -> Tensor:
    """Pseudo-labels, categorical draws from softmax(logits) by inverse CDF (PICNN eq. 9-10).

    Returns:
        int64 ``[B]``: the first class whose cumulative weight exceeds u * total, u a multiple of
        2**-24. A row without a finite distribution falls to the last class.
    """
    batch, classes = logits.shape
    cumulative = softmax_weights(logits).cumsum(-1)
    total = cumulative[:, -1]
    bits = random_24_bits(torch.arange(batch, device=logits.device), seed, LABEL_STREAM, rank)
    # floor(bits * total / 2**24) without leaving 64 bits
    threshold = bits * (total >> 24) + ((bits * (total & 0xFFFFFF)) >> 24)
    return (cumulative <= threshold[:, None]).sum(-1).clamp_max(classes - 1)


def draw_filters(
    probabilities: Tensor,
    seed: Tensor,
    rank: int,
    labels: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Independent Bernoulli draws: 1 where u < p, else 0 (PICNN eq. 7).

    ``probabilities`` ``[B, N]`` is float32 or float64, and so is the mask. With ``labels`` ``[B]``
    int64 it is ``[K, N]``, and sample b's are those of row ``labels[b]``. ``validate``: refuse what
    is no probability.
    """
    if validate:
        check_probabilities(probabilities, "probabilities")
    if labels is not None:
        check_labels(labels, len(probabilities))
        probabilities = probabilities[labels]
    index = torch.arange(probabilities.numel(), device=probabilities.device)
    bits = random_24_bits(index.view(probabilities.shape), seed, FILTER_STREAM, rank)
    kept = bits.float() * 2.0**-24 < probabilities
    return kept.to(probabilities.dtype, memory_format=torch.contiguous_format)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the type of masks and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` ``[B, N]`` with an axis of one for each spatial axis of ``x``."""
    return mask.reshape(*mask.shape, *(1 for _ in x.shape[2:]))


def mask_channels(features: Tensor, mask: Tensor) -> Tensor:
    """``features[b, i, …] * mask[b, i]``, 0 where the mask is 0, whatever ``features`` hold there.

    ``features`` is ``[B, N, *spatial]``, ``mask`` ``[B, N]`` in the accumulate type.
    """
    mask = _beside(mask, features)
    scaled = torch.where(mask == 0, 0.0, features.to(mask.dtype) * mask)
    return torch.empty_like(features).copy_(scaled)


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    seed: Tensor,
    rank: int,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudo-label, Bernoulli mask and masked maps (PICNN eq. 4, 7, 10).

    Args:
        features: ``[B, N, *spatial]``, any strides.
        logits: ``[B, K]`` float32 or float64.
        correspondence: ``[K, N]`` probabilities, float32 or float64.
        seed: int64, one element.
        rank: separates the draws of processes that share a seed.
        validate: refuse what is no probability.

    Returns:
        masked, like ``features``; mask ``[B, N]`` (float32; float64 for float64 features) and
        pseudo_label ``[B]`` int64.
    """
    if validate:
        check_probabilities(correspondence)
    pseudo_label = draw_labels(logits, seed, rank)
    mask = draw_filters(correspondence[pseudo_label], seed, rank)
    mask = mask.to(accumulate_dtype(features.dtype))
    return mask_channels(features, mask), mask, pseudo_label


def straight_through(
    features: Tensor, logits: Tensor, correspondence: Tensor, seed: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``bernoulli_mask`` by autograd alone: the definition of its gradients (PICNN eq. 5, 8).

    Arguments and results as ``bernoulli_mask``; every product is an ordinary one, so NaN in a
    dropped map shows here.
    """
    pseudo_label = draw_labels(logits.detach(), seed, rank)
    y1 = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(pseudo_label, logits.shape[-1])
    p = (one_hot + y1 - y1.detach()) @ correspondence
    kept = draw_filters(correspondence.detach()[pseudo_label], seed, rank)
    mask = (kept + p - p.detach()).to(accumulate_dtype(features.dtype))
    return features * _beside(mask, features).to(features.dtype), mask, pseudo_label


def bernoulli_parameters_backward(
    grad_mask: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients of ``mask = one_hot(pseudo_label) @ correspondence``.

    The one-hot pseudo-label carries the gradient of softmax(logits) (PICNN eq. 8). All float
    arguments have one dtype, float32 or float64; ``grad_mask`` is ``[B, N]``.

    Returns:
        grad_logits ``[B, K]`` and grad_correspondence ``[K, N]``.
    """
    # backward() may be called inside autocast: keep full precision.
    with torch.autocast(logits.device.type, enabled=False):
        grad_y1 = grad_mask @ correspondence.T
    y1 = logits.softmax(-1)
    grad_logits = y1 * (grad_y1 - (y1 * grad_y1).sum(-1, keepdim=True))
    return grad_logits, sums_by_label(grad_mask, pseudo_label, len(correspondence))


def sums_by_label(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Rows ``[B, N]`` added up by label, ``[classes, N]``; the same bits every time.

    ``rows`` is float32 or float64, ``labels`` ``[B]`` int64, of classes that there are.
    """
    return add_by_label(rows.new_zeros(classes, rows.shape[1]), labels, rows)


def add_by_label(sums: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Add each of ``rows`` ``[B, *]`` to the row of ``sums`` ``[K, *]`` that its label names.

    In place, and the same bits every time. All are on one device, rows and sums of one dtype.

    Returns:
        ``sums``.
    """
    if rows.is_cuda:
        # index_add_ would add there in whatever order threads come; this sorts the labels first.
        return sums.index_put_((labels,), rows, accumulate=True)
    return sums.index_add_(0, labels, rows)


def class_gate(features: Tensor, gate: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``mask_channels(features, gate[labels])`` (CSG, section 3.1), and ``gate[labels]``.

    ``gate`` is ``[K, N]`` in the accumulate type, ``labels`` ``[B]`` int64; labels that are none of
    the K classes are refused.
    """
    check_labels(labels, len(gate))
    rows = gate[labels]
    return mask_channels(features, rows), rows


def check_probabilities(value: Tensor, name: str = "correspondence") -> None:
    """Refuse others than finite numbers in [0, 1], on a GPU without waiting for it."""
    within = (value >= 0) & (value <= 1)
    torch._assert_async(within.all(), f"{name}: want probabilities: finite, in [0, 1]")


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse others than class indices, likewise."""
    within = (labels >= 0) & (labels < classes)
    torch._assert_async(within.all(), f"labels: want class indices in [0, {classes})")


def masking_backward(grad_masked: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``masked = features * mask`` in one read of both inputs.

    Returns:
        grad_features, 0 where the mask is 0, laid out as ``features``; grad_mask ``[B, N]``, the
        sum over positions of features * grad_masked, in the mask's type.
    """
    products = features.to(mask.dtype) * grad_masked.to(mask.dtype)
    grad_mask = products.reshape(*mask.shape, math.prod(features.shape[2:])).sum(-1)
    grad_features = torch.empty_like(features).copy_(mask_channels(grad_masked, mask))
    return grad_features, grad_mask


def project_gate(gate: Tensor) -> Tensor:
    """Each filter's column by its greatest element, clipped to [0, 1].

    A column without a positive element becomes 1 at its greatest and 0 elsewhere; one that holds
    NaN keeps it.
    """
    highest, owner = gate.max(0)
    single = torch.zeros_like(gate).scatter(0, owner[None], 1.0)
    return torch.where(highest <= 0, single, (gate / highest).clamp(0, 1))


def gate_penalty(gate: Tensor, bound: float, norm: str) -> Tensor:
    """ψ(max(‖gate‖₁ - bound, 0)), ψ(r) = r, r² or Huber's: r²/2 up to 1, r - 1/2 beyond."""
    excess = (gate.abs().sum() - bound).relu()
    if norm == "l1":
        return excess
    if norm == "l2":
        return excess.square()
    return torch.where(excess < 1, excess.square() / 2, excess - 0.5)
