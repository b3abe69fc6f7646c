"""Mutual information between filters and classes: nearest neighbours, and histograms.

Shapes: M samples, N filters, K classes. Every estimate is in nats.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from picnn_fast import backends, checks
from picnn_fast.ops.define import define
from picnn_fast.ops.histogram import MOST_BINS
from picnn_fast.ops.histogram import information as histogram_information
from picnn_fast.reference import mutual_information as reference

Target = Literal["class", "label"]
BiasCorrection = Literal["miller_madow"] | None

# Scratch that is taken however small the activations are.
_SCRATCH_BYTES = 2**24
# Filters whose activations side by side are 16 bytes or more in every type.
_ALIGNED = 8
# Elements that a step of ``prepare`` may hold beside the block it works on.
_CHUNK = 2**20
# Elements that numpy's passes over some columns find in the cache again.
_CACHED = 2**17
# Elements of a block that are too few to draw the noise twice for (256 MiB).
_SMALL = 2**25


def mutual_information(
    activations: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    estimator: Literal["knn", "histogram", "soft_histogram"] = "knn",
    random_state: int | torch.Generator = 0,
    n_neighbors: int = 3,
    bins: int = 64,
    bias_correction: BiasCorrection = None,
    target: Target = "class",
) -> Tensor:
    """Mutual information between filters and classes, in nats (CSG, section 4.1).

    m[c, i] tells how much filter i's pooled activation says about 1[y = c], whether a sample is of
    class c: from 0 to the entropy of 1[y = c], at most log 2.

    Args:
        activations: ``[M, N]``, M samples of N filters, maps averaged over their positions;
            float32, float64, bfloat16 or float16, any strides.
        labels: ``[M]`` integers in [0, K).
        num_classes: K, below 2**31.
        estimator: "knn", the papers' figure, is ``knn_mutual_information``; "histogram" is
            ``histogram_mutual_information``, "soft_histogram"
            ``soft_histogram_mutual_information``, which is differentiable. They say what the other
            options are, and which of them are their own.
        random_state, n_neighbors: of "knn".
        bins, bias_correction: of the histograms.
        target: "class", or "label" for the mutual information with y itself, up to log K.

    Returns:
        m ``[K, N]``, or ``[N]`` for target "label"; float64 on the device of ``activations``, but
        float32 of "soft_histogram" unless the activations are float64.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, devices or values out of range; labels that are no class; an option of
            another estimator; what the estimator refuses.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import mutual_information
        >>> labels = torch.arange(40) % 2
        >>> activations = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
        >>> activations[:, 0] += labels  # tells the classes apart: log 2 = 0.693, as estimated
        >>> mutual_information(activations, labels, 2)[:, 0].tolist()
        [0.705..., 0.705...]
        >>> mutual_information(activations, labels, 2, estimator="histogram", bins=8)[0, 1] < 0.2
        tensor(True)
    """
    checks.one_of("estimator", estimator, ("knn", "histogram", "soft_histogram"))
    what = f"estimator={estimator!r}, which has no such option"
    if estimator == "knn":
        checks.left_out(what, bins=(bins, 64), bias_correction=(bias_correction, None))
        return knn_mutual_information(
            activations,
            labels,
            num_classes,
            random_state=random_state,
            n_neighbors=n_neighbors,
            target=target,
        )
    checks.left_out(what, random_state=(random_state, 0), n_neighbors=(n_neighbors, 3))
    by_histogram = (
        histogram_mutual_information
        if estimator == "histogram"
        else soft_histogram_mutual_information
    )
    return by_histogram(
        activations,
        labels,
        num_classes,
        bins=bins,
        bias_correction=bias_correction,
        target=target,
    )


def knn_mutual_information(
    activations: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    random_state: int | torch.Generator = 0,
    n_neighbors: int = 3,
    target: Target = "class",
) -> Tensor:
    """Mutual information by nearest neighbours: the papers' figure.

    To 1e-9 that of ``sklearn.feature_selection.mutual_info_classif(activations, labels == c,
    discrete_features=False, n_neighbors=n_neighbors, random_state=random_state)``, for all classes
    at the cost of one: O(M (log M + n_neighbors log M)) a filter.

    Args:
        activations, labels, num_classes, target: see ``mutual_information``.
        random_state: of the noise of about 1e-10 that breaks ties. An int in [0, 2**32) seeds
            scikit-learn's noise, drawn on the host; the noise of a filter depends on its place in
            the matrix. A ``torch.Generator`` on the device of ``activations`` draws it there,
            without any work on the host: as good, but other noise.
        n_neighbors: at least 1: the neighbour that a radius reaches to. A class with no more
            samples takes its farthest.

    Returns:
        m ``[K, N]``, or ``[N]`` for target "label", float64, at least 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, devices or values out of range; labels that are no class; NaN or
            infinity; fewer samples than 2 of one label or 3, with target "label" 2 of some label.
            On a GPU values are checked there, without a host sync, and fail as a device-side
            assert, see ``bernoulli_mask``.

    Note:
        Where data are scarce it does as scikit-learn does. A class with one sample: that sample
        counts nowhere, and its row is that of the others alone, 0. A class without samples, and
        K = 1: likewise 0. The noise alone tells the samples of a constant filter apart, and the
        zeros that a ReLU leaves: about 0 nats. Where it is lost in rounding, equal samples count
        together.

        Takes at most twice the memory of the activations (as float32) beside them, by blocks of
        filters, and some 80 MB.

    Source:
        Liang et al., "Training Interpretable CNNs by Differentiating Class-Specific Filters",
        ECCV 2020; Ross, "Mutual Information between Discrete and Continuous Data Sets", PLoS ONE
        9(2), 2014.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import knn_mutual_information
        >>> labels = torch.arange(40) % 2
        >>> knn_mutual_information(labels[:, None].double(), labels, 2, target="label").item()
        0.705...
    """
    n_neighbors = checks.integer("n_neighbors", n_neighbors, 1)
    if not isinstance(random_state, torch.Generator):
        random_state = checks.integer("random_state", random_state, 0, 2**32)
    labels, num_classes = _checked(activations, labels, num_classes, target)
    activations = activations.detach()
    # By their ends: a mask of all would take as much memory again.
    finite = activations.amin(0).isfinite() & activations.amax(0).isfinite()
    _check_finite(finite.all(), finite.long().argmin())
    _check_enough(labels, target)
    if isinstance(random_state, torch.Generator):
        prepared = _prepare_with(activations, random_state)
    else:
        prepared = prepare(activations, random_state)
    n_neighbors = min(n_neighbors, len(activations))  # an int of any size
    parts = []
    for values in prepared:
        per_class, joint = torch.ops.picnn_fast.knn_mutual_information.default(
            values.to(activations.device), labels, num_classes, n_neighbors
        )
        parts.append(per_class if target == "class" else joint)
        del values  # before the next block is allocated
    return torch.cat(parts, -1)


def histogram_mutual_information(
    activations: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    bins: int = 64,
    bias_correction: BiasCorrection = None,
    target: Target = "class",
) -> Tensor:
    """Mutual information from the frequencies in bins of equal width: faster than neighbours.

    The bins of a filter are ``bins / 2`` to ``bins``, of a width that is a power of two. Too high
    by about (bins in use - 1) / 2M, which ``bias_correction`` takes off.

    Args:
        activations, labels, num_classes, target: see ``mutual_information``.
        bins: 2 to 2**24.
        bias_correction: None, or "miller_madow", which may leave less than 0.

    Returns:
        m ``[K, N]``, or ``[N]`` for target "label", float64.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, devices or values out of range; labels that are no class; NaN or
            infinity; no sample. On a GPU values are checked there, without a host sync, and fail
            as a device-side assert, see ``bernoulli_mask``.

    Note:
        Takes at least 100 bytes for each bin and class.

    Source:
        Miller, "Note on the bias of information estimates", in Information Theory in Psychology,
        1955.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import histogram_mutual_information
        >>> labels = torch.arange(8) // 4
        >>> histogram_mutual_information(labels[:, None].double(), labels, 2, bins=4)[:, 0]
        tensor([0.6931, 0.6931], dtype=torch.float64)
    """
    bins = _checked_bins(bins, bias_correction)
    labels, num_classes = _checked(activations, labels, num_classes, target, by_kernel=True)
    activations = activations.detach()
    # The counts of a block, and some ten times as much where the reference makes information of
    # them.
    scratch = max(_scratch_bytes(activations.device), 4 * activations.numel())
    size = max(1, scratch // (12 * 8 * bins * num_classes))
    if size > _ALIGNED:  # then kernels read whole vectors of every block
        size = size // _ALIGNED * _ALIGNED
    parts = []
    for start in range(0, activations.shape[1], size):
        columns = activations[:, start : start + size]
        width = columns.shape[1]
        counts = columns.new_zeros((width, bins, num_classes), dtype=torch.int64)
        minimum = columns.new_full((width,), torch.inf, dtype=torch.float64)
        try:
            bad = torch.ops.picnn_fast.histogram_update.default(
                counts, minimum, -minimum, columns, labels
            )
        except RuntimeError:
            checks.labels("labels", labels, len(activations), num_classes)
            raise
        _check_finite(bad < 0, start + bad if start else bad)
        parts.append(plug_in(counts, target, bias_correction))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _scratch_bytes(device: torch.device) -> int:
    """What a block of filters may take: as the caches of a CPU hold; of a GPU a part of its memory,
    since every block costs some ten launches."""
    if device.type == "cuda" and torch.cuda.is_available():
        return max(_SCRATCH_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)
    return _SCRATCH_BYTES


def soft_histogram_mutual_information(
    activations: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    bins: int = 64,
    bias_correction: BiasCorrection = None,
    target: Target = "class",
) -> Tensor:
    """Mutual information from linear binning, differentiable in the activations.

    A sample is shared out between the two nearest of ``bins`` bin centres, which lie evenly from
    the least to the greatest activation of a filter and are constants of the derivative. Of the
    samples at the ends, the least have a gradient, as those inside, and the greatest none. Second
    derivatives are without bound where a sample is at a centre, as the least and the greatest are.

    Args:
        activations, labels, num_classes, target: see ``mutual_information``.
        bins, bias_correction: see ``histogram_mutual_information``.

    Returns:
        m ``[K, N]``, or ``[N]`` for target "label"; float64 for float64 activations, else float32.
        NaN for a filter with NaN or infinity, and for no other.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, devices or values out of range; labels that are no class; no sample. On
            a GPU values are checked there, without a host sync, and fail as a device-side assert,
            see ``bernoulli_mask``.

    Source:
        Linear binning: Jones and Lotwick, "A remark on algorithm AS 176", Applied Statistics 33,
        1984.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import soft_histogram_mutual_information
        >>> activations = torch.tensor([[0.0], [0.4], [0.6], [1.0]], requires_grad=True)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> m = soft_histogram_mutual_information(activations, labels, 2, bins=2, target="label")
        >>> m.backward()
        >>> activations.grad[1:3, 0].sign().tolist()  # ascent moves the two classes apart
        [-1.0, 1.0]
    """
    bins = _checked_bins(bins, bias_correction)
    labels, num_classes = _checked(activations, labels, num_classes, target, by_kernel=True)
    dtype = torch.promote_types(activations.dtype, torch.float32)
    least, most = (end.to(dtype) for end in _ends(activations.detach()))
    try:
        counts = torch.ops.picnn_fast.soft_histogram.default(
            activations, labels, least, _centre_distance(least, most, bins), bins, num_classes
        )
    except RuntimeError:
        checks.labels("labels", labels, len(activations), num_classes)
        raise
    return plug_in(counts, target, bias_correction)


def _ends(activations: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each filter: at once, which takes a CPU ten times as long."""
    if activations.device.type == "cpu":
        return activations.amin(0), activations.amax(0)
    return torch.aminmax(activations, dim=0)


def _centre_distance(least: Tensor, most: Tensor, bins: int) -> Tensor:
    """Between ``bins`` centres from ``least`` to ``most``, infinite where these are the same.

    Rounded such that the position (most - least) / distance is never below bins - 1: on which side
    of the last centre the greatest sample lies, and so whether it has a gradient, is no matter of
    rounding.
    """
    span = most - least
    distance = span / (bins - 1)
    # Towards 0 where it is too long, else towards itself, which leaves it.
    towards = distance.masked_fill(span / distance < bins - 1, 0)
    distance = torch.nextafter(distance, towards)
    return distance.masked_fill(distance == 0, torch.inf)


def mutual_information_score(mi: Tensor) -> Tensor:
    """MIS: how much filters tell about the class they tell most about (CSG, section 4.1).

    Args:
        mi: m ``[K, N]`` of ``mutual_information``.

    Returns:
        A scalar: the mean over filters of the maximum over classes.

    Raises:
        TypeError: not a tensor of floating dtype.
        ValueError: of another shape, or without a class or a filter.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import mutual_information_score
        >>> mutual_information_score(torch.tensor([[0.5, 0.1], [0.0, 0.3]])).item()
        0.4000...
    """
    checks.floating("mi", mi)
    if mi.ndim != 2 or mi.numel() == 0:
        raise ValueError(
            f"mi: got shape {tuple(mi.shape)}, want [classes, filters], at least one of each"
        )
    return mi.amax(0).mean()


def plug_in(
    counts: Tensor,
    target: Target = "class",
    bias_correction: BiasCorrection = None,
) -> Tensor:
    """Plug-in mutual information of bin and class from class-conditional histograms.

    The entropy of the observed frequencies, in nats, with 0 log 0 = 0. Too large by about
    (bins in use - 1) * (classes - 1) / (2 M); Miller and Madow's correction takes that off to
    first order, which may leave less than 0: (B_x + B_y - B_xy - 1) / (2 M) is added, with B the
    numbers of bins, classes and pairs of both in use.

    Differentiable in soft counts: the term of an empty cell, whose slope is infinite, passes no
    gradient, and neither does the correction.

    Args:
        counts: ``[N, bins, K]`` from ``histogram_update`` or ``soft_histogram``.
        target: "class" for filter against each 1[y = c], "label" for filter against y.
        bias_correction: None or "miller_madow".

    Returns:
        ``[K, N]``, or ``[N]`` for target "label", in nats; float64 for integer counts, else in
        the dtype of ``counts``. NaN for a filter without samples.

    Source:
        Miller, "Note on the bias of information estimates", in Information Theory in Psychology,
        1955.

    Example:
        >>> import torch
        >>> counts = torch.tensor([[[5, 0], [0, 5]], [[2, 2], [3, 3]]])  # two filters
        >>> plug_in(counts, target="label").tolist()  # log 2, and 0
        [0.6931471805599453, 0.0]
    """
    if counts.dtype not in (torch.int64, torch.float32, torch.float64):
        counts = counts.float() if counts.is_floating_point() else counts.long()
    information: Tensor = histogram_information(
        counts, target == "label", bias_correction is not None
    )
    return information if target == "label" else information.T


def prepare(activations: Tensor, random_state: int) -> Iterator[Tensor]:
    """Scikit-learn's preparation of the columns, bit for bit: scale, then break ties by noise.

    Each filter is divided by its standard deviation (by 1 where that is below 10 eps) and gets
    noise of 1e-10 * max(1, mean absolute value). The noise is drawn for the whole matrix, so it
    depends on a filter's place in it.

    Args:
        activations: ``[M, N]``, any floating dtype, any strides; finite, M >= 1.
        random_state: seed of the noise, an int in [0, 2**32).

    Yields:
        The filters in order as float64 ``[n, M]`` on the CPU, in blocks of n filters that take
        about as much memory as the activations, or 256 MiB. Every block draws the noise again.
    """
    samples, filters = activations.shape
    size = max(1, filters * activations.element_size() // 8, _SMALL // samples)
    few = max(1, _CACHED // samples)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for start in range(0, filters, size):
            columns = activations[:, start : start + size]
            block = torch.empty((columns.shape[1], samples), dtype=torch.float64)
            list(threads.map(_copy_turned, *_tiles(block, columns)))
            values = block.numpy()
            parts = [values[i : i + few].T for i in range(0, len(values), few)]
            weights = 1e-10 * np.concatenate(list(threads.map(_standardise, parts)))
            del parts
            _add_noise(values, weights, start, filters, random_state)
            yield block
            del block, values  # before the next one is allocated


def _tiles(block: Tensor, columns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces of ``block`` and of ``columns``, which it is to hold turned, that fit in a cache."""
    tiles: tuple[list[Tensor], list[Tensor]] = ([], [])
    for wide, tall in zip(block.split(64), columns.split(64, 1), strict=True):
        tiles[0].extend(wide.split(500, 1))
        tiles[1].extend(tall.split(500))
    return tiles


def _copy_turned(block: Tensor, columns: Tensor) -> None:
    # A thread is not in the mode of the one that starts it, in which the block was made.
    with torch.inference_mode():
        block.copy_(columns.T)


def _standardise(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale ``columns`` in place and return the noise each gets, in units of 1e-10.

    ``columns`` is in Fortran order, on which the order of numpy's sums depends. The deviation is
    ``np.nanstd``'s, bit for bit, without the passes that look for NaN.
    """
    samples = len(columns)
    deviations = columns - columns.sum(axis=0, keepdims=True) / samples
    np.multiply(deviations, deviations, out=deviations)
    scale = np.sqrt(deviations.sum(axis=0) / samples)
    scale[scale < 10 * np.finfo(np.float64).eps] = 1.0
    columns /= scale
    np.abs(columns, out=deviations)
    noise: NDArray[np.float64] = np.maximum(1, deviations.mean(axis=0))
    return noise


def _add_noise(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    first: int,
    filters: int,
    random_state: int,
) -> None:
    """Add what ``RandomState(random_state).standard_normal((samples, filters))`` has in columns
    ``first`` and following, times ``weights``, to ``values`` ``[n, samples]``."""
    state = np.random.RandomState(random_state)
    if _compiled_noise_is_numpys():
        _, key, position, *_ = state.get_state(legacy=True)
        backends.extension.add_legacy_normal(key, position, filters, first, weights, values)
        return
    count, samples = values.shape
    rows = max(1, _CHUNK // filters)
    for row in range(0, samples, rows):
        noise = state.standard_normal((min(rows, samples - row), filters))
        values[:, row : row + rows] += (weights * noise[:, first : first + count]).T


@functools.cache
def _compiled_noise_is_numpys() -> bool:
    """Whether there is a compiled core that draws as this NumPy does: its compiler may have fused
    multiplications and additions, or its logarithm be another."""
    if backends.extension is None:
        return False
    state = np.random.RandomState(1)
    _, key, position, *_ = state.get_state(legacy=True)
    drawn = np.zeros((3, 2001))
    backends.extension.add_legacy_normal(key, position, 3, 0, np.ones(3), drawn)
    return np.array_equal(drawn.T, state.standard_normal((2001, 3)))


def _prepare_with(activations: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """As ``prepare``, with noise drawn on the device by ``generator``."""
    if generator.device != activations.device:
        raise ValueError(
            f"random_state: got a generator on {generator.device}, want {activations.device} like"
            " activations"
        )
    samples, filters = activations.shape
    size = max(1, filters * activations.element_size() // 8)
    few = max(1, _SCRATCH_BYTES // (8 * samples))
    for start in range(0, filters, size):
        columns = activations[:, start : start + size].T
        block = torch.empty(columns.shape, dtype=torch.float64, device=columns.device)
        for values, column in zip(block.split(few), columns.split(few), strict=True):
            values.copy_(column)
            scale = values.std(1, correction=0, keepdim=True)
            values /= torch.where(scale < 10 * torch.finfo(torch.float64).eps, 1.0, scale)
            weight = 1e-10 * values.abs().mean(1, keepdim=True).clamp_min(1)
            noise = torch.empty_like(values).normal_(generator=generator)
            values += noise.mul_(weight)
        yield block
        del block, values


# Checks -------------------------------------------------------------------------------------------


def _checked(
    activations: Tensor, labels: Tensor, num_classes: int, target: str, *, by_kernel: bool = False
) -> tuple[Tensor, int]:
    """The labels as int64, and the number of classes; refuses what no estimator takes.
    ``by_kernel``: but labels out of range."""
    checks.one_of("target", target, ("class", "label"))
    num_classes = checks.integer("num_classes", num_classes, 1, 2**31)
    checks.pooled("activations", activations)
    checks.labels("labels", labels, len(activations), num_classes, by_kernel=by_kernel)
    checks.same_device("labels", labels, "activations", activations)
    if len(activations) == 0:
        raise ValueError("activations: got no sample, want at least one")
    return labels.to(torch.int64), num_classes


def _checked_bins(bins: int, bias_correction: BiasCorrection) -> int:
    if bias_correction is not None:
        checks.one_of("bias_correction", bias_correction, ("miller_madow",))
    return checks.integer("bins", bins, 2, MOST_BINS + 1)


def _check_finite(finite: Tensor, column: Tensor) -> None:
    """``column`` names the first one that is not."""
    checks.holds(
        "activations", finite, lambda: f"NaN or infinity in column {column.item()}", "finite values"
    )


def _check_enough(labels: Tensor, target: str) -> None:
    """Samples for nearest neighbours."""
    samples = len(labels)
    if samples == 1:
        raise ValueError("activations: got 1 sample, want at least 2")
    if target == "label":
        ordered = labels.sort().values
        checks.holds(
            "labels",
            (ordered[1:] == ordered[:-1]).any(),
            lambda: "one sample of each label",
            "at least two of some label",
        )
    elif samples == 2:
        checks.holds(
            "activations",
            labels[0] == labels[1],
            lambda: "2 samples, of different classes",
            "at least 3",
        )


# Operator -----------------------------------------------------------------------------------------


def _fake_knn_mutual_information(
    values: Tensor, labels: Tensor, num_classes: int, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    filters = values.shape[0]
    return (
        values.new_empty((num_classes, filters), dtype=torch.float64),
        values.new_empty((filters,), dtype=torch.float64),
    )


define(
    "mutual_information",
    "knn_mutual_information(Tensor values, Tensor labels, SymInt num_classes, int n_neighbors)"
    " -> (Tensor per_class, Tensor joint)",
    reference=reference.knn_mutual_information,
    fake=_fake_knn_mutual_information,
)
