"""Mutual information between filters and classes by nearest neighbours (Ross 2014).

As ``sklearn.feature_selection.mutual_info_classif`` estimates it, in nats. Shapes: M samples, N
filters, K classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Elements that a step may hold beside the block it works on.
_CHUNK = 2**20


def knn_mutual_information(
    values: Tensor, labels: Tensor, num_classes: int, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Mutual information of every filter with every class, and with the label, in nats.

    Args:
        values: ``[N, M]`` float64, filters scaled and with noise, as scikit-learn prepares them.
        labels: ``[M]`` int64 in [0, K).
        num_classes: K.
        n_neighbors: k >= 1.

    Returns:
        per_class ``[K, N]``, with 1[y = c], and joint ``[N]``, with y; float64, at least 0. NaN
        where no label has two samples, and for filters with values that are not finite.
    """
    rows = [_ross(values, (labels == c).long(), n_neighbors) for c in range(num_classes)]
    per_class = torch.stack(rows) if rows else values.new_empty((0, values.shape[0]))
    return per_class, _ross(values, labels, n_neighbors)


def _ross(values: Tensor, labels: Tensor, n_neighbors: int) -> Tensor:
    """Ross 2014, eq. 2, ``[N]``: psi(M) + <psi(k)> - <psi(n)> - <psi(m)>, floored at 0.

    A label's n samples look for k = min(n_neighbors, n - 1) neighbours among themselves; m counts
    the samples of all labels nearer than the k-th. Labels with one sample are left out.
    """
    counted = torch.bincount(labels)[labels] > 1
    samples = int(counted.sum())
    if samples == 0:
        return values.new_full((values.shape[0],), torch.nan)
    terms = ross_terms(values, labels, n_neighbors)[:, counted]
    mutual_information = terms.mean(1) + terms.new_tensor(samples).digamma()
    return torch.where(values.isfinite().all(1), mutual_information.clamp_min(0), torch.nan)


def ross_terms(values: Tensor, labels: Tensor, n_neighbors: int) -> Tensor:
    """What each sample adds to Ross's estimate: psi(k) - psi(n) - psi(m).

    Args:
        values: ``[N, M]`` float64, finite, filters scaled and with noise, as scikit-learn prepares
            them.
        labels: ``[M]`` int64, at least 0.
        n_neighbors: k >= 1.

    Returns:
        ``[N, M]`` float64; NaN for the sample of a label that has no other.
    """
    sizes = torch.bincount(labels)
    terms = torch.full_like(values, torch.nan)
    everyone = values[:, sizes[labels] > 1].sort().values
    for label in (sizes > 1).nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        own, order = values[:, members].sort()
        size = own.shape[1]
        k = min(n_neighbors, size - 1)
        # Which search scikit-learn's NearestNeighbors chooses: they round differently.
        distance = _rounded_distance(own, k) if k >= size // 2 else _distance(own, k)
        m = _count_within(everyone, own, torch.nextafter(distance, torch.zeros_like(distance)))
        constant = torch.tensor([k, size], dtype=torch.float64, device=values.device).digamma()
        terms.scatter_(1, members[order], constant[0] - constant[1] - m.double().digamma())
    return terms


def _distance(own: Tensor, k: int) -> Tensor:
    """Distance of each of the sorted values ``[N, n]`` to its k-th nearest other.

    The k nearest and the value itself are neighbours in order: the best of k + 1 windows.
    """
    best = torch.full_like(own, torch.inf)
    size = own.shape[1]
    for below in range(k + 1):
        inside = slice(below, size - k + below)  # values with k - below others above them
        low, high = own[:, : size - k], own[:, k:]
        farthest = torch.maximum(own[:, inside] - low, high - own[:, inside])
        best[:, inside] = torch.minimum(best[:, inside], farthest)
    return best


def _rounded_distance(own: Tensor, k: int) -> Tensor:
    """As ``_distance``, each distance rounded as sqrt(x^2 - 2xy + y^2): off by up to 1e-8 |x|.

    Scikit-learn's brute-force search computes distances by a matrix product.
    """
    few = max(1, _CHUNK // own.shape[1] ** 2)
    parts = []
    for x in own.split(few):
        norm = x * x
        product = -2.0 * (x[:, :, None] * x[:, None, :])
        squared = ((norm[:, :, None] + product) + norm[:, None, :]).clamp_min(0)
        parts.append(squared.kthvalue(k + 1).values)  # one of them is the value itself, 0
    # Numpy's root is rounded correctly; torch's on the CPU may be one float off.
    return torch.from_numpy(np.sqrt(torch.cat(parts).cpu().numpy())).to(own.device)


def _count_within(column: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """How many of the sorted ``column[n]`` are within ``radius`` of each ``x[n]``, as rounded."""

    size = column.shape[1]

    def first_where(holds: Callable[[Tensor], Tensor]) -> Tensor:
        """The first place whose value ``holds``, as all above it do; by bisection."""
        low = torch.zeros_like(x, dtype=torch.int64)
        high = torch.full_like(low, size)
        for _ in range(size.bit_length()):
            middle = (low + high) // 2
            found = holds(column.gather(1, middle.clamp_max(size - 1)))
            high = torch.where(found, middle, high)
            low = torch.where(found, low, torch.minimum(middle + 1, high))
        return low

    return first_where(lambda y: y - x > radius) - first_where(lambda y: x - y <= radius)
