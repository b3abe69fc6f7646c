"""Class-conditional histograms of activations, hard and soft, and what they tell of the classes.

The kernels in ``csrc/`` and ``triton_kernels/`` compute what this file says, the hard counts bit
for bit. Shapes: M samples, N filters, K classes.

Hard counts lie on a canonical grid: the width of a filter's bins is a power of two, 2**e, their
edges are its multiples, the first bin is the one that holds the minimum, and e is the smallest
exponent with which ``bins`` bins reach the maximum. The grid follows from the range alone, and a
wider range only merges bins of the narrower one. So counts depend neither on the order of the
samples, nor on how they were cut into batches, nor on which rank saw them, and no count is lost.
"""

import torch
from torch import Tensor

from picnn_fast.reference.masking import add_by_label, check_labels

# Bins are never narrower than 2**-20 of the largest magnitude (cells then fit 32 bits, and single
# precision has few more digits), nor than 2**-100.
SMALLEST_EXPONENT = -100
CELL_BITS = 20


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exactly; exponent int64 in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def smallest_exponent(minimum: Tensor, maximum: Tensor) -> Tensor:
    """The exponent below which no grid over [minimum, maximum] goes; int64."""
    magnitude = torch.maximum(minimum.abs(), maximum.abs())
    # The exponent bits; 0 and subnormal numbers come out below the smallest exponent of all.
    exponent = (magnitude.view(torch.int64) >> 52) - 1023
    return (exponent - CELL_BITS).clamp_min(SMALLEST_EXPONENT)


def _cells(x: Tensor, exponent: Tensor) -> Tensor:
    """floor(x * 2**-exponent), int64. x float64."""
    scaled = x * power_of_two(-exponent)
    # A product may underflow to -0, but what is negative lies in a negative cell.
    return torch.where((x < 0) & (scaled == 0), -1.0, scaled.floor()).long()


def grid(minimum: Tensor, maximum: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Grid of a range.

    Args:
        minimum: ``[N]`` float64, finite.
        maximum: ``[N]`` float64, finite, at least ``minimum``.
        bins: at least 2.

    Returns:
        exponent and first cell, int64 ``[N]``: bin j is ``[(first + j) * 2**exponent,
        (first + j + 1) * 2**exponent)``.

    Example:
        >>> import torch
        >>> low, high = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([2.5]).double()
        >>> [t.item() for t in grid(low, high, bins=4)]  # 4 bins of width 1 from -1
        [0, -1]
    """
    least = smallest_exponent(minimum, maximum)
    first, last = _cells(minimum, least), _cells(maximum, least)
    # floor(x * 2**-(e + s)) = floor(x * 2**-e) >> s, and |cells| <= 2**21.
    shifts = torch.arange(CELL_BITS + 3, device=minimum.device)
    fits = (last[:, None] >> shifts) - (first[:, None] >> shifts) < bins
    shift = fits.long().argmax(1)
    return least + shift, first >> shift


def bins_of(x: Tensor, minimum: Tensor, maximum: Tensor, bins: int) -> Tensor:
    """Bin of each x on the grid of its filter.

    Args:
        x: ``[M, N]`` float64.
        minimum, maximum: ``[N]`` float64, the range of each filter, in which its x lie.
        bins: at least 2.

    Returns:
        ``[M, N]`` int64 in [0, bins).
    """
    exponent, first = grid(minimum, maximum, bins)
    # By way of the smallest exponent, whose power of two is a normal number.
    least = smallest_exponent(minimum, maximum)
    return (_cells(x, least) >> (exponent - least)) - first


def widen(
    counts: Tensor, minimum: Tensor, maximum: Tensor, new_minimum: Tensor, new_maximum: Tensor
) -> Tensor:
    """Counts of the range [minimum, maximum] on the grid of one that contains it.

    Counts of ranks merge by widening each to the union of their ranges and adding up.

    Args:
        counts: ``[N, bins, K]`` int64.
        minimum, maximum: ``[N]`` float64; +inf, -inf for a filter without a sample.
        new_minimum, new_maximum: the range to go to.

    Returns:
        New counts ``[N, bins, K]``.
    """
    bins = counts.shape[1]
    empty, new_empty = minimum > maximum, new_minimum > new_maximum
    exponent, first = grid(torch.where(empty, 0.0, minimum), torch.where(empty, 0.0, maximum), bins)
    new_exponent, new_first = grid(
        torch.where(new_empty, 0.0, new_minimum), torch.where(new_empty, 0.0, new_maximum), bins
    )
    cell = first[:, None] + torch.arange(bins, device=counts.device)
    # No cell has more than 22 bits. Bins beyond the maximum, and filters without a sample, hold
    # no count: wherever theirs go, they add nothing.
    shift = (new_exponent - exponent).clamp(0, 40)
    moved = ((cell >> shift[:, None]) - new_first[:, None]).clamp(0, bins - 1)
    return torch.zeros_like(counts).scatter_add_(
        1, moved[:, :, None].expand(counts.shape).contiguous(), counts
    )


def histogram_update(
    counts: Tensor, minimum: Tensor, maximum: Tensor, activations: Tensor, labels: Tensor
) -> Tensor:
    """Add samples to class-conditional histograms, in place, widening the range where needed.

    Args:
        counts: ``[N, bins, K]`` int64, contiguous, bins >= 2.
        minimum, maximum: ``[N]`` float64, the range so far; +inf, -inf before the first sample.
        activations: ``[M, N]`` float32, float64, bfloat16 or float16.
        labels: ``[M]`` int64 in [0, K).

    Returns:
        0-dim int64: -1, or the first column that holds NaN or infinity; then nothing was written.
    """
    filters, bins, classes = counts.shape
    check_labels(labels, classes)
    finite = activations.isfinite()
    bad = ~finite.all(0)
    if activations.numel() == 0:
        return torch.full((), -1, dtype=torch.int64, device=counts.device)
    column = torch.where(bad.any(), bad.long().argmax(), -1)
    x = torch.where(finite, activations, 0).double()
    least, most = x.aminmax(dim=0)
    new_minimum, new_maximum = torch.minimum(minimum, least), torch.maximum(maximum, most)
    new_counts = widen(counts, minimum, maximum, new_minimum, new_maximum)
    row = torch.arange(filters, device=counts.device) * bins
    cell = (row + bins_of(x, new_minimum, new_maximum, bins)) * classes + labels[:, None]
    cell = cell.reshape(-1)
    new_counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
    good = column < 0
    counts.copy_(torch.where(good, new_counts, counts))
    minimum.copy_(torch.where(good, new_minimum, minimum))
    maximum.copy_(torch.where(good, new_maximum, maximum))
    return column


def soft_histogram(
    activations: Tensor,
    labels: Tensor,
    low: Tensor,
    width: Tensor,
    bins: int,
    num_classes: int,
) -> Tensor:
    """Linear binning: a sample counts in the two bins whose centres enclose it.

    With t = (x - low) / width, the position among the bin centres, and b = floor(t), bin b gets
    1 - (t - b) and bin b + 1 gets t - b; beyond the outer centres, the outer bin gets 1.
    Differentiable in the activations by autograd, which defines ``soft_histogram_backward`` but
    for the last centre itself, t = bins - 1, where that is 0.

    Args:
        activations: ``[M, N]`` of any floating dtype.
        labels: ``[M]`` int64 in [0, num_classes).
        low: ``[N]``, the centre of the first bin, float32; float64 for float64 activations.
        width: ``[N]``, from a centre to the next, positive, perhaps infinite, in the dtype of
            ``low``.
        bins: at least 2.
        num_classes: K.

    Returns:
        ``[N, bins, K]`` in the dtype of ``low``. NaN in a filter makes its counts of that class
        NaN in bins 0 and 1, and no other filter's.

    Source:
        Linear binning: Jones and Lotwick, "A remark on algorithm AS 176", Applied Statistics 33,
        1984.
    """
    check_labels(labels, num_classes)
    t = (activations.to(low.dtype) - low) / width
    below = t.detach().floor().clamp(0, bins - 2)
    below = torch.where(below.isnan(), 0, below)
    upper_weight = (t - below).clamp(0, 1)
    filters = low.shape[0]
    row = torch.arange(filters, device=low.device) * bins
    cell = ((row + below.long()) * num_classes + labels[:, None]).reshape(-1)
    counts = low.new_zeros(filters * bins * num_classes)
    counts = add_by_label(counts, cell, (1 - upper_weight).reshape(-1))
    counts = add_by_label(counts, cell + num_classes, upper_weight.reshape(-1))
    return counts.view(filters, bins, num_classes)


def soft_histogram_backward(
    grad_counts: Tensor, activations: Tensor, labels: Tensor, low: Tensor, width: Tensor
) -> Tensor:
    """Gradient of ``soft_histogram`` in the activations; ``low`` and ``width`` are constants.

    (G[n, b + 1, y] - G[n, b, y]) / width between the outer bin centres, 0 <= t < bins - 1; 0
    outside; NaN where the activation is.

    Args:
        grad_counts: ``[N, bins, K]`` in the dtype of ``low``.
        activations, labels, low, width: as in ``soft_histogram``.

    Returns:
        ``[M, N]`` like ``activations``.
    """
    filters, bins, classes = grad_counts.shape
    t = (activations.to(low.dtype) - low) / width
    inside = (t >= 0) & (t < bins - 1)
    below = torch.where(inside, t, 0).long()
    row = torch.arange(filters, device=low.device) * bins
    cell = (row + below) * classes + labels[:, None]
    flat = grad_counts.reshape(-1)
    slope = (flat[cell + classes] - flat[cell]) / width
    grad = torch.where(inside, slope, torch.where(t.isnan(), t, 0))
    return grad.to(activations.dtype)


def histogram_information(counts: Tensor, by_label: bool, corrected: bool) -> Tensor:
    """Plug-in mutual information of bin and class, in nats, with 0 log 0 = 0.

    Differentiable in soft counts by autograd, which defines ``histogram_information_backward``: the
    term of an empty cell, whose slope is infinite, passes no gradient, and neither does the
    correction.

    Args:
        counts: ``[N, bins, K]`` int64, float32 or float64, at least 0.
        by_label: of the bin and the class y, else of the bin and each 1[y = c].
        corrected: with Miller and Madow's (B_x + B_y - B_xy - 1) / (2 M), B the numbers of bins,
            classes and pairs of both in use and M that of samples.

    Returns:
        ``[N, K]``, or ``[N]`` by label; float64 for int64 counts, else in the dtype of ``counts``.
        NaN for a filter without samples.

    Source:
        Miller, "Note on the bias of information estimates", in Information Theory in Psychology,
        1955.
    """
    if not counts.is_floating_point():
        counts = counts.double()
    per_bin, per_class, total = _marginals(counts)
    rest = _rest(counts, per_bin)
    information = _cell_information(counts, per_bin, per_class, total)
    if by_label:
        result = information.sum((1, 2))
    else:
        others = _cell_information(rest, per_bin, total - per_class, total)
        result = (information + others).sum(1)
    if not corrected:
        return result
    bins_used = (per_bin > 0).sum(1)
    used = (counts > 0).sum(1)
    if by_label:
        classes_used = (per_class > 0).sum((1, 2))
        degrees = bins_used[:, 0] + classes_used - used.sum(1) - 1
        return result + degrees / (2 * total.detach()[:, 0, 0])
    classes_used = ((per_class > 0).long() + (total - per_class > 0).long())[:, 0]
    degrees = bins_used + classes_used - (used + (rest > 0).sum(1)) - 1
    return result + degrees / (2 * total.detach()[:, 0])


def _marginals(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin, of each class, of the filter; with three axes."""
    per_class = counts.sum(1, keepdim=True)
    return counts.sum(2, keepdim=True), per_class, per_class.sum(2, keepdim=True)


def _rest(counts: Tensor, per_bin: Tensor) -> Tensor:
    """Of the other classes. Rounding of the sums leaves a little where they have nothing."""
    rest = per_bin - counts
    slack = counts.shape[2] * torch.finfo(counts.dtype).eps
    return torch.where(rest > per_bin * slack, rest, 0)


def _log_ratio(joint: Tensor, first: Tensor, second: Tensor, total: Tensor) -> Tensor:
    """log(joint * total / (first * second)), 0 where joint is 0."""
    # Chosen before the logarithm, so that no gradient passes through log 0.
    some = joint > 0
    return (torch.where(some, joint * total, 1) / torch.where(some, first * second, 1)).log()


def _cell_information(joint: Tensor, first: Tensor, second: Tensor, total: Tensor) -> Tensor:
    return torch.where(joint > 0, joint, 0) / total * _log_ratio(joint, first, second, total)


def histogram_information_backward(
    grad: Tensor, counts: Tensor, information: Tensor, by_label: bool
) -> Tensor:
    """Gradient of ``histogram_information`` in soft counts.

    With T the number of samples, it is that of T times the information, which has no T below a
    fraction line, less the information itself, over T.

    Args:
        grad, information: ``[N, K]``, or ``[N]`` by label, in the dtype of ``counts``; the latter
            without correction.
        counts: ``[N, bins, K]`` float32 or float64.
        by_label: as in ``histogram_information``.

    Returns:
        ``[N, bins, K]`` like ``counts``.
    """
    per_bin, per_class, total = _marginals(counts)
    cell, bin_, class_, all_ = _slopes(counts, per_bin, per_class, total)
    if by_label:
        grad, information = grad[:, None, None], information[:, None, None]
        slope = cell + bin_.sum(2, keepdim=True) + class_ + all_.sum(2, keepdim=True)
        return (slope - information) * grad / total
    grad, information = grad[:, None], information[:, None]
    rest = _rest(counts, per_bin)
    others = _slopes(rest, per_bin, total - per_class, total)
    # A count is taken from the rest of its class, and added to those of the others.
    own = (cell - others[0] + class_ - others[2]) * grad
    every = (others[0] + bin_ + others[1] + others[2] + all_ + others[3] - information) * grad
    return (own + every.sum(2, keepdim=True)) / total


def _slopes(joint: Tensor, first: Tensor, second: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    """Of joint * log(joint * total / (first * second)) in each of the four, summed over bins for
    ``second`` and ``total``; 0 where it is 0."""
    some = joint > 0
    held = torch.where(some, joint, 0)
    per_class = held.sum(1, keepdim=True)
    in_cell = torch.where(some, _log_ratio(joint, first, second, total) + 1, 0)
    in_first = -held / torch.where(first > 0, first, 1)
    in_second = -per_class / torch.where(second > 0, second, 1)
    return in_cell, in_first, in_second, per_class / total
