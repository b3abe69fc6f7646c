"""Triton kernels of the mutual information family; ``picnn_fast.reference.mutual_information``
is the definition.

A filter's samples are sorted by value, then grouped by class in the order of their values. One
lane a sample finds

- the neighbours within its own class, for the row of that class;
- its neighbours whatever their class, which serve every row in which the sample is one of the rest
  and the class holds none of the neighbours found;
- once more, without that class, for each class that holds one of them.

So the work does not depend on the number of classes. Sums are integers, digamma times a power of
two: atomic additions give the same result in any order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # lanes of a program, two a thread: their loads are under way together


@triton.jit
def _below(distance):
    """``nextafter(distance, 0)`` for float64 distances that are not negative."""
    bits = distance.to(tl.int64, bitcast=True)
    return tl.where(bits > 0, bits - 1, bits).to(tl.float64, bitcast=True)


@triton.jit
def _edges(column, x, p, radius, below, above, active):
    """First and last sorted position within ``radius`` of the value ``x`` at ``p``.

    Positions from ``below`` down and from ``above`` up are known to lie outside.
    """
    first, last = p, p
    searching = active & ((first - below > 1) | (above - last > 1))
    while tl.max(searching.to(tl.int32), 0) > 0:
        # A side that is done tries its edge once more.
        left = below + ((first - below + 1) >> 1)
        right = last + ((above - last) >> 1)
        left_inside = x - tl.load(column + left, mask=searching, other=0.0) <= radius
        right_inside = tl.load(column + right, mask=searching, other=0.0) - x <= radius
        first = tl.where(left_inside, left, first)
        below = tl.where(left_inside, below, left)
        last = tl.where(right_inside, right, last)
        above = tl.where(right_inside, above, right)
        searching &= (first - below > 1) | (above - last > 1)
    return first, last


@triton.jit
def _walk(column, x, left, right, M, steps):
    """Takes the ``steps`` nearest neighbours of ``x`` from ``left`` down and ``right`` up.

    Returns the distance of the last and the positions just beyond.
    """
    distance = x - x
    while tl.max(steps, 0) > 0:
        walks = steps > 0
        lower = x - tl.load(column + left, mask=walks & (left >= 0), other=-float("inf"))
        upper = tl.load(column + right, mask=walks & (right < M), other=float("inf")) - x
        goes_left = lower <= upper
        distance = tl.where(walks, tl.minimum(lower, upper), distance)
        left -= (walks & goes_left).to(tl.int32)
        right += (walks & ~goes_left).to(tl.int32)
        steps -= 1
    return distance, left, right


@triton.jit
def _walk_without(column, labels, previous, following, x, left, right, M, steps, c):
    """``_walk`` that passes over the samples of class ``c``, a run of them at a time."""
    active = steps > 0
    distance = x - x
    more = tl.max(steps, 0) + 1  # once at the end to pass over what lies beyond
    while more > 0:
        has_left, has_right = active & (left >= 0), active & (right < M)
        skips_left = has_left & (tl.load(labels + left, mask=has_left, other=-1) == c)
        skips_right = has_right & (tl.load(labels + right, mask=has_right, other=-1) == c)
        left = tl.where(skips_left, tl.load(previous + left, mask=skips_left, other=0), left)
        right = tl.where(skips_right, tl.load(following + right, mask=skips_right, other=0), right)
        walks = steps > 0
        lower = x - tl.load(column + left, mask=walks & (left >= 0), other=-float("inf"))
        upper = tl.load(column + right, mask=walks & (right < M), other=float("inf")) - x
        goes_left = lower <= upper
        distance = tl.where(walks, tl.minimum(lower, upper), distance)
        left -= (walks & goes_left).to(tl.int32)
        right += (walks & ~goes_left).to(tl.int32)
        steps -= 1
        more -= 1
    return distance, left, right


@triton.jit
def _walk_class(column, grouped, x, q, begin, end, M, k, active):
    """``_walk`` by k steps along one class, whose sorted positions are ``grouped[begin:end]``."""
    left, right = q - 1, q + 1
    distance = x - x
    for _ in range(k):
        has_left, has_right = active & (left >= begin), active & (right < end)
        at_left = tl.load(grouped + left, mask=has_left, other=0)
        at_right = tl.load(grouped + right, mask=has_right, other=0)
        lower = x - tl.load(column + at_left, mask=has_left, other=-float("inf"))
        upper = tl.load(column + at_right, mask=has_right, other=float("inf")) - x
        goes_left = lower <= upper
        distance = tl.minimum(lower, upper)
        left -= goes_left.to(tl.int32)
        right += 1 - goes_left.to(tl.int32)
    below = tl.load(grouped + left, mask=active & (left >= begin), other=-1)
    above = tl.load(grouped + right, mask=active & (right < end), other=M)
    return distance, below, above


@triton.jit
def _brute_distance(column, grouped, x, own, gap, jump, size, k, active):
    """Distance of the k-th nearest among few samples as scikit-learn's brute force rounds it.

    The samples are ``size`` entries of ``grouped``, which jumps ``jump`` entries after the first
    ``gap``; entry ``own`` is the sample itself.
    """
    wanted = tl.where(active, tl.minimum(k, size - 1), 0)
    found = wanted - wanted
    square = x - x - 1.0
    x_square = x * x
    while tl.max(wanted - found, 0) > 0:
        # The next smallest square, and how many samples share it.
        searching = found < wanted
        nearest = x - x + float("inf")
        ties = found - found
        for e in range(tl.max(tl.where(searching, size, 0), 0)):
            inside = searching & (e < size) & (e != own)
            at = tl.load(grouped + e + tl.where(e >= gap, jump, 0), mask=inside, other=0)
            y = tl.load(column + at, mask=inside, other=0.0)
            candidate = (x_square + -2.0 * (x * y)) + y * y
            candidate = tl.where(candidate > 0, candidate, 0.0)
            inside &= (candidate > square) & (candidate <= nearest)
            ties = tl.where(inside, tl.where(candidate < nearest, 1, ties + 1), ties)
            nearest = tl.where(inside, candidate, nearest)
        square = tl.where(searching, nearest, square)
        found += ties
    return tl.sqrt(tl.maximum(square, 0.0))


@triton.jit
def _add_by_filter(sums, n, terms, active):
    """Lanes of a program nearly always share a filter: its terms are one addition."""
    shared = tl.min(n, 0)
    tl.atomic_add(sums + shared, tl.sum(tl.where(n == shared, terms, 0), 0), sem="relaxed")
    tl.atomic_add(sums + n, terms, mask=active & (n != shared), sem="relaxed")


@triton.jit(do_not_specialize=["N", "M"])
def runs_kernel(
    column_labels, grouped, starts, place, previous, following, N, M, BLOCK: tl.constexpr
):  # fmt: skip
    """Each sample's place in ``grouped``, and the nearest positions with another label."""
    M = M.to(tl.int32)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(lane // M, N - 1)
    q = (lane - n * M).to(tl.int32)
    active = q < M
    grouped += n * M
    p = tl.load(grouped + q, mask=active, other=0)
    row = n * M + p
    y = tl.load(column_labels + row, mask=active, other=0)
    begin = tl.load(starts + y, mask=active, other=0)
    end = tl.load(starts + y + 1, mask=active, other=0)
    # Most runs are of one sample: then nothing is left to search.
    joins_left = tl.load(grouped + q - 1, mask=active & (q > begin), other=-2) == p - 1
    joins_right = tl.load(grouped + q + 1, mask=active & (q + 1 < end), other=-2) == p + 1
    below = tl.where(joins_left, begin - 1, q - 1)
    above = tl.where(joins_right, end, q + 1)
    first, last = q, q
    searching = joins_left | joins_right
    while tl.max(searching.to(tl.int32), 0) > 0:
        # Entries of one class that follow each other in the column are equally far apart in both.
        left = below + ((first - below + 1) >> 1)
        right = last + ((above - last) >> 1)
        left_inside = p - tl.load(grouped + left, mask=searching, other=0) == q - left
        right_inside = tl.load(grouped + right, mask=searching, other=0) - p == right - q
        first = tl.where(left_inside, left, first)
        below = tl.where(left_inside, below, left)
        last = tl.where(right_inside, right, last)
        above = tl.where(right_inside, above, right)
        searching &= (first - below > 1) | (above - last > 1)
    tl.store(place + row, q, mask=active)
    tl.store(previous + row, p - (q - first) - 1, mask=active)
    tl.store(following + row, p + (last - q) + 1, mask=active)


@triton.jit(do_not_specialize=["N", "M", "K", "k"])
def samples_kernel(
    values, column_labels, grouped, place, previous, following, singles, starts, psi,
    class_sums, base_sum, joint_sum, N, M, K, k, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up psi(m) over the samples, and psi(n) - psi(k) over those within their own class.

    Where more than 2k + 1 samples are not of a class, the sum over them is that over all samples
    without regard to classes (``base_sum``), minus that over the class's own, plus corrections for
    the samples that have the class among their neighbours.
    """
    M, k = M.to(tl.int32), k.to(tl.int32)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(lane // M, N - 1)
    p = (lane - n * M).to(tl.int32)
    active = p < M
    values += n * M
    column_labels += n * M
    grouped += n * M
    previous += n * M
    following += n * M
    singles += n * M
    class_sums += n * K
    x = tl.load(values + p, mask=active, other=0.0)
    y = tl.load(column_labels + p, mask=active, other=0)
    begin = tl.load(starts + y, mask=active, other=0)
    end = tl.load(starts + y + 1, mask=active, other=0)
    size = end - begin

    q = tl.load(place + lane, mask=active, other=0)
    has_class = active & (size > 1)
    few = has_class & (size <= 2 * k + 1)
    many = has_class & (size > 2 * k + 1)
    distance, below, above = _walk_class(values, grouped, x, q, begin, end, M, k, many)
    if tl.max(few.to(tl.int32), 0) > 0:
        rounded = _brute_distance(values, grouped + begin, x, q - begin, size, 0, size, k, few)
        distance = tl.where(few, rounded, distance)
    radius = _below(distance)
    # The places beyond the neighbours are beyond the radius, but for ties at 0 and for rounding.
    unknown = few | (distance == 0)
    below = tl.where(unknown, -1, below)
    above = tl.where(unknown, M, above)
    first, last = _edges(values, x, p, radius, below, above, has_class)
    m = last - first + 1
    alone = tl.load(singles + last, mask=has_class, other=0)
    alone -= tl.load(singles + first - 1, mask=has_class & (first > 0), other=0)
    label_terms = tl.load(psi + size, mask=has_class, other=0)
    label_terms -= tl.load(psi + tl.minimum(k, size - 1), mask=has_class, other=0)
    kept_terms = label_terms + tl.load(psi + m - alone, mask=has_class, other=0)
    _add_by_filter(joint_sum, n, kept_terms, active)
    terms = label_terms + tl.load(psi + m, mask=has_class, other=0)
    # When all the others are one sample, the class's row leaves it out too.
    change = tl.where(M - size == 1, kept_terms, terms)

    if 2 * k + 1 < M:
        distance, left, right = _walk(values, x, p - 1, p + 1, M, tl.where(active, k, 0))
        below = tl.where(distance == 0, -1, left)
        above = tl.where(distance == 0, M, right)
        first, last = _edges(values, x, p, _below(distance), below, above, active)
        m = last - first + 1
        base = tl.load(psi + m, mask=active, other=0)
        _add_by_filter(base_sum, n, base, active)
        in_rest = active & (M - size > 2 * k + 1)
        change -= tl.where(in_rest, base, 0)
        # More than k equal samples: without one of them m is less by one for all the others, be it
        # among their k neighbours or not. If it is alone in its class, its own lane sees to it.
        crowd = distance == 0
        drops = in_rest & crowd & (size == 1)
        less = tl.load(psi + m - 1, mask=drops, other=0) - base
        change += tl.where(drops, (m - 1) * less, 0)

        for w in range(1, k + 2):  # the neighbours, and the sample itself
            c = tl.load(column_labels + left + w, mask=active, other=0)
            c_size = tl.load(starts + c + 1, mask=active, other=0)
            c_size -= tl.load(starts + c, mask=active, other=0)
            corrects = active & (c != y) & (M - c_size > 2 * k + 1) & ~(crowd & (c_size == 1))
            missing = p - p
            for u in range(1, k + 2):
                same = corrects & (tl.load(column_labels + left + u, mask=corrects, other=-1) == c)
                missing += same.to(tl.int32)
                corrects &= ~same | (u >= w)  # once for each class
            missing = tl.where(corrects, missing, 0)
            distance, below, above = _walk_without(
                values, column_labels, previous, following, x, left, right, M, missing, c
            )
            below = tl.where(distance == 0, -1, below)
            above = tl.where(distance == 0, M, above)
            first, last = _edges(values, x, p, _below(distance), below, above, corrects)
            left_out = (c_size == 1) & (first <= left + w) & (left + w <= last)
            m = last - first + 1 - left_out.to(tl.int32)
            psi_m = tl.load(psi + m, mask=corrects, other=0)
            tl.atomic_add(class_sums + c, psi_m - base, mask=corrects, sem="relaxed")
    tl.atomic_add(class_sums + y, change, mask=active, sem="relaxed")


@triton.jit(do_not_specialize=["N", "M", "K", "k", "slots"])
def few_others_kernel(
    values, grouped, starts, psi, class_sums, N, M, K, k, slots, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows of classes with at most 2k + 1 samples outside them: a lane for each of those."""
    M, k = M.to(tl.int32), k.to(tl.int32)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = lane // slots
    e = (lane - row * slots).to(tl.int32)
    n = tl.minimum(row // K, N - 1)
    c = row % K
    begin = tl.load(starts + c)
    c_size = tl.load(starts + c + 1) - begin
    size = (M - c_size).to(tl.int32)
    active = (row < n * K + K) & (size > 1) & (size <= 2 * k + 1) & (e < size)
    values += n * M
    grouped += n * M
    if tl.max(active.to(tl.int32), 0) > 0:
        p = tl.load(grouped + e + tl.where(e >= begin, c_size, 0), mask=active, other=0)
        x = tl.load(values + p, mask=active, other=0.0)
        radius = _below(_brute_distance(values, grouped, x, e, begin, c_size, size, k, active))
        first, last = _edges(values, x, p, radius, p - p - 1, p - p + M, active)
        alone = active & (c_size == 1)
        at = tl.load(grouped + begin, mask=alone, other=0)
        m = last - first + 1 - (alone & (first <= at) & (at <= last)).to(tl.int32)
        psi_m = tl.load(psi + m, mask=active, other=0)
        tl.atomic_add(class_sums + n * K + c, psi_m, mask=active, sem="relaxed")


def knn_mutual_information(
    values: Tensor, labels: Tensor, num_classes: int, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    """See ``reference.mutual_information.knn_mutual_information``.

    Memory beside the arguments: 45 bytes for each element of ``values`` at most, ``torch.sort``'s
    own included.
    """
    N, M = values.shape
    K, k = num_classes, n_neighbors
    device = values.device
    if max(M, K) >= 2**30:
        raise ValueError(f"samples and classes: got {M} and {K}, want fewer than 2^30")
    torch._assert_async(((labels >= 0) & (labels < K)).all(), "labels: want [0, num_classes)")
    if N == 0 or M < 2:
        return values.new_full((K, N), torch.nan), values.new_full((N,), torch.nan)
    k = min(k, M)  # no label has more neighbours

    column, order = values.contiguous().sort(dim=1, stable=True)
    finite = column[:, 0].isfinite() & column[:, -1].isfinite()
    column.masked_fill_(~finite[:, None], 0.0)
    column_labels = labels.int()[order]
    del order
    in_order, grouped = column_labels.sort(dim=1, stable=True)
    starts = torch.searchsorted(in_order[0], torch.arange(K + 1, device=device), out_int32=True)
    del in_order
    grouped = grouped.int()
    sizes = starts.diff()
    singles = (sizes == 1)[column_labels].cumsum(1, dtype=torch.int32)
    place, previous, following = (torch.empty_like(grouped) for _ in range(3))

    # |psi(m)| + |psi(n) - psi(k)| < 2 (ln M + 1), and sums over M samples fit into 63 bits.
    one = 2.0 ** math.floor(62 - math.log2(M * (math.log(M) + 1)))
    digamma = torch.arange(1, M + 1, device=device, dtype=torch.float64).digamma()
    psi = torch.nn.functional.pad((digamma * one).round().long(), (1, 0))
    class_sums = torch.zeros((N, K), dtype=torch.int64, device=device)
    base_sum, joint_sum = (torch.zeros(N, dtype=torch.int64, device=device) for _ in range(2))

    exact = {"BLOCK": BLOCK, "enable_fp_fusion": False}  # distances round as scikit-learn's
    grid = (triton.cdiv(N * M, BLOCK),)
    runs_kernel[grid](
        column_labels, grouped, starts, place, previous, following, N, M, BLOCK=BLOCK
    )  # fmt: skip
    samples_kernel[grid](
        column, column_labels, grouped, place, previous, following, singles, starts, psi,
        class_sums, base_sum, joint_sum, N, M, K, k, **exact,
    )  # fmt: skip
    slots = min(2 * k + 1, M)
    few_others_kernel[(triton.cdiv(N * K * slots, BLOCK),)](
        column, grouped, starts, psi, class_sums, N, M, K, k, slots, **exact
    )

    rest = M - sizes
    rest_terms = rest * (psi[rest] - psi[(rest - 1).clamp(0, k)])
    class_sums += torch.where(rest > 2 * k + 1, base_sum[:, None], 0)
    class_sums += torch.where(rest > 1, rest_terms, 0)
    kept = torch.where(sizes > 1, sizes, 0)
    samples = kept + torch.where(rest > 1, rest, 0)
    per_class = ((psi[samples] - class_sums.double() / samples) / one).clamp(min=0)
    samples = kept.sum(0, keepdim=True)
    joint = ((psi[samples] - joint_sum.double() / samples) / one).clamp(min=0)
    # No samples: 0 / 0.
    per_class.masked_fill_(~finite[:, None], torch.nan)
    return per_class.T.contiguous(), joint.masked_fill_(~finite, torch.nan)
