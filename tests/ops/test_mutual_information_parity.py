"""Nearest-neighbour mutual information: every backend agrees with scikit-learn to 1e-9 nats.

Scikit-learn's own estimate of one column, ``_compute_mi_cd``, is the judge where columns hold exact
ties, which its public function breaks by noise; the public function where columns are prepared.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import mutual_info_classif
from sklearn.feature_selection._mutual_info import _compute_mi_cd
from threadpoolctl import ThreadpoolController
from torch import Tensor

from picnn_fast.ops.mutual_information import prepare
from picnn_fast.reference import mutual_information as reference
from tests.cases import noted
from tests.conftest import Backend

TOLERANCE = 1e-9
# Scikit-learn starts threads for every few distances; on a busy machine they wait for each other.
one_thread = ThreadpoolController().wrap(limits=1, user_api="openmp")


def estimate(values: Tensor, labels: Tensor, classes: int, n_neighbors: int) -> tuple[Tensor, ...]:
    return torch.ops.picnn_fast.knn_mutual_information(values, labels, classes, n_neighbors)


@one_thread
def sklearn_estimate(
    values: Tensor, labels: Tensor, classes: int, n_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """What scikit-learn says of prepared filters; NaN where it fails for want of samples."""

    def rows(target: np.ndarray) -> list[float]:
        enough = len(target) > 0 and np.unique(target, return_counts=True)[1].max() > 1
        return [
            _compute_mi_cd(x, target, n_neighbors) if enough else np.nan for x in values.numpy()
        ]

    y = labels.numpy()
    absent = rows(np.zeros_like(y))  # the same for every class without samples
    present = [rows(y == c) if (y == c).any() else absent for c in range(classes)]
    return np.array(present).reshape(classes, len(values)), np.array(rows(y))


def assert_agrees(got: tuple[Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == torch.float64
        np.testing.assert_allclose(one.cpu().numpy(), two, rtol=0, atol=TOLERANCE)


# Cases --------------------------------------------------------------------------------------------


def normal(filters: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(filters, samples, generator=generator, dtype=torch.float64)


def random_labels(samples: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(seed))


def class_sizes(*sizes: int) -> Tensor:
    """Labels with so many samples of each class, in random order."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]


def duplicate_groups() -> Tensor:
    """Groups of 2 to 6 equal values: smaller, as large as, and larger than k + 1 for k = 3."""
    sizes = torch.tensor([2, 3, 4, 5, 6, 4, 5, 6])
    return torch.arange(len(sizes)).double().repeat_interleave(sizes)[None]


def singletons_in_groups() -> Tensor:
    """Labels for ``duplicate_groups``: classes 2 … 7 have one sample each, in groups of 4 to 6."""
    groups = [[0, 1], [0, 0, 1], [0, 0, 1, 2], [0, 1, 1, 3, 0], [0, 0, 4, 1, 1, 5]]
    groups += [[1, 0, 0, 0], [6, 1, 1, 0, 0], [0, 0, 0, 1, 1, 7]]
    return torch.tensor(list(itertools.chain(*groups)))


def grid(samples: int) -> Tensor:
    return torch.arange(1, samples + 1, dtype=torch.float64)[None]


def sorted_by_class() -> tuple[Tensor, Tensor]:
    labels = torch.arange(4).repeat_interleave(11)
    return normal(2, 44).sort(1).values, labels


def row_strided() -> Tensor:
    """Rows of a larger matrix."""
    return normal(6, 50)[::2, 3:43]


# Values [N, M], labels [M], K, k.
Case = tuple[Tensor, Tensor, int, int]
Cases = dict[str, Callable[[], Case]]
SIZES: Cases = {
    "random": lambda: (normal(3, 60), random_labels(60, 4), 4, 3),
    "informative": lambda: (normal(2, 60) + random_labels(60, 3), random_labels(60, 3), 3, 3),
    "one_neighbour": lambda: (normal(2, 30), random_labels(30, 3), 3, 1),
    "ten_neighbours": lambda: (normal(2, 90), random_labels(90, 3), 3, 10),
    "hundred_neighbours": lambda: (normal(1, 24), random_labels(24, 2), 2, 100),
    "one_class": lambda: (normal(2, 20), torch.zeros(20, dtype=torch.int64), 1, 3),
    "empty_classes": lambda: (normal(2, 40), random_labels(40, 3) * 2 + 1, 7, 3),
    "many_classes": lambda: (normal(1, 50), random_labels(50, 20) * 20, 400, 3),
    "single_samples": lambda: (normal(2, 40), class_sizes(1, 20, 1, 17, 1), 5, 3),
    "all_but_one": lambda: (normal(2, 30), class_sizes(29, 1), 2, 3),
    "all_single": lambda: (normal(2, 12), torch.arange(12), 12, 3),
    "own_brute_force_or_not": lambda: (normal(2, 61), class_sizes(2, 3, 6, 7, 8, 9, 26), 7, 3),
    "rest_brute_force_or_not": lambda: (normal(2, 31), class_sizes(25, 6), 2, 3),
    "rest_of_seven": lambda: (normal(2, 31), class_sizes(24, 4, 3), 3, 3),
    "rest_of_eight": lambda: (normal(2, 31), class_sizes(23, 4, 4), 3, 3),
    "rest_of_two": lambda: (normal(2, 31), class_sizes(29, 1, 1), 3, 3),
    "all_rests_brute_force": lambda: (normal(2, 7), class_sizes(1, 2, 4), 4, 3),
}
FEW_SAMPLES: Cases = {
    "three_samples": lambda: (normal(3, 3), torch.tensor([0, 1, 1]), 2, 3),
    "two_of_one_label": lambda: (normal(3, 2), torch.tensor([1, 1]), 2, 3),
    "two_labels": lambda: (normal(3, 2), torch.tensor([0, 1]), 2, 3),
    "one_sample": lambda: (normal(3, 1), torch.tensor([0]), 2, 3),
    "no_samples": lambda: (normal(2, 0), random_labels(0, 3), 3, 3),
}
TIES: Cases = {
    "sorted_by_class": lambda: (*sorted_by_class(), 4, 3),
    "relu_zeros": lambda: (normal(3, 60).relu(), random_labels(60, 4), 4, 3),
    "zeros_sorted_by_class": lambda: (normal(1, 44).mul(0), sorted_by_class()[1], 4, 3),
    "zeros_of_both_signs": lambda: (normal(1, 40).mul(0), random_labels(40, 4), 4, 3),
    "integers": lambda: (normal(3, 70).mul(3).round(), random_labels(70, 5), 5, 3),
    "constant_one": lambda: (1 + 1e-10 * normal(2, 50), random_labels(50, 9), 9, 3),
    "constant_million": lambda: (1e6 + 1e-9 * normal(2, 50), random_labels(50, 3), 3, 3),
    "near_duplicates": lambda: (
        normal(3, 50).relu() * 9 + 1e-10 * normal(3, 50, seed=5),
        random_labels(50, 10),
        10,
        3,
    ),
    "duplicate_groups": lambda: (duplicate_groups(), random_labels(35, 3), 3, 3),
    "singletons_in_groups": lambda: (duplicate_groups(), singletons_in_groups(), 8, 3),
    "singletons_alone_with_duplicates": lambda: (
        normal(1, 40).mul(0),
        torch.arange(40).clamp_min(20) - 20,
        20,
        3,
    ),
}
# Two neighbours on a grid are equally far: psi(k) > psi(m), so that the floor at 0 hides no mistake
# in rows that are 0 otherwise.
GRIDS: Cases = {
    "grid_all_but_one": lambda: (grid(40), class_sizes(39, 1), 2, 2),
    "grid_with_single_samples": lambda: (grid(41), class_sizes(1, 20, 1, 18, 1), 5, 2),
    "grid_of_six": lambda: (grid(6), class_sizes(1, 2, 3), 3, 2),
    "grid_with_singletons_in_groups": lambda: (
        torch.cat((-9 * duplicate_groups()[:, :14], grid(40)), 1),
        torch.tensor([0, 6, 0, 0, 1, 0, 2, 6, 3, 0, 0, 6, 4, 5] + 4 * [0, 6, 6] + 14 * [6, 0]),
        7,
        2,
    ),
}
MEMORY: Cases = {
    "row_strided": lambda: (row_strided(), random_labels(40, 3), 3, 3),
    "no_filters": lambda: (normal(0, 20), random_labels(20, 3), 3, 3),
    "no_filters_strided": lambda: (normal(20, 3).T[:0], random_labels(20, 3), 3, 3),
}
KINDS = {"sizes": SIZES, "few_samples": FEW_SAMPLES, "ties": TIES, "grids": GRIDS, "memory": MEMORY}


@functools.cache
def judged_case(kind: str, name: str) -> tuple[Case, tuple[np.ndarray, np.ndarray]]:
    case = KINDS[kind][name]()
    return case, sklearn_estimate(*case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_agrees_with_scikit_learn(backend: Backend, kind):
    for name in KINDS[kind]:
        (values, labels, classes, n_neighbors), expected = judged_case(kind, name)
        on_device = values
        if backend.device.type != "cpu":
            # A copy to the device would make the rows dense.
            on_device = values.new_zeros(len(values), values.shape[1] + 3, device=backend.device)
            on_device = on_device[:, : values.shape[1]].copy_(values)
        with noted(name):
            got = estimate(on_device, labels.to(backend.device), classes, n_neighbors)
            assert all(t.device.type == backend.device.type for t in got)
            assert got[0].shape == (classes, len(values))
            assert_agrees(got, expected)


def test_a_value_that_is_not_finite_spoils_its_own_filter_only(backend: Backend):
    clean, labels = normal(3, 30), random_labels(30, 3)
    expected = sklearn_estimate(clean[[0, 2]], labels, 3, 3)
    for value in (torch.nan, torch.inf, -torch.inf):
        values = clean.clone()
        values[1, 17] = value
        with noted(value):
            per_class, joint = estimate(values.to(backend.device), labels.to(backend.device), 3, 3)
            assert per_class[:, 1].isnan().all()
            assert joint[1].isnan()
            assert_agrees((per_class[:, [0, 2]], joint[[0, 2]]), expected)


# Arbitrary inputs ---------------------------------------------------------------------------------


@st.composite
def arbitrary_case(draw) -> dict[str, Any]:
    samples, classes = draw(st.integers(3, 80)), draw(st.integers(1, 6))
    state = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = state.standard_normal((samples, draw(st.integers(1, 2))))
    kind = draw(st.sampled_from(["normal", "relu", "grid", "partly_grid", "constant", "adjacent"]))
    if kind == "relu":
        x = x.clip(0)
    elif kind == "grid":
        x = np.round(x * 2)
    elif kind == "partly_grid":
        x = np.where(state.random(x.shape) < 0.5, np.round(x), x)
    elif kind == "constant":
        x = np.full_like(x, draw(st.sampled_from([0.0, 1.0, 1e6])))
    elif kind == "adjacent":  # neighbouring floats
        x = 1 + 2.0**-52 * np.round(x * 4)
    skew = draw(st.sampled_from([0, 1, 4]))  # some classes are rare, or absent
    weights = state.random(classes) ** skew
    y = state.choice(classes, samples, p=weights / weights.sum())
    if draw(st.booleans()):  # classes side by side, ties included
        y[np.argsort(x[:, 0], kind="stable")] = np.sort(y)
    n_neighbors = draw(st.integers(1, 10))
    return {"x": x, "y": y, "classes": classes, "n_neighbors": n_neighbors}


@given(arbitrary_case())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
def test_compiled_kernel_agrees_with_scikit_learn_on_ties(cpp: Backend, case):
    values, labels = torch.from_numpy(case["x"].T.copy()), torch.from_numpy(case["y"])
    arguments = (values, labels, case["classes"], case["n_neighbors"])
    assert_agrees(estimate(*arguments), sklearn_estimate(*arguments))


@given(arbitrary_case(), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prepared_columns_agree_with_mutual_info_classif(cpp: Backend, case, random_state, dtype):
    x, y, classes = case["x"].astype(dtype), case["y"], case["classes"]
    values = torch.cat(list(prepare(torch.from_numpy(x), random_state)))
    per_class, joint = estimate(values, torch.from_numpy(y), classes, case["n_neighbors"])

    @one_thread
    def judge(target: np.ndarray) -> np.ndarray:
        return mutual_info_classif(
            x,
            target,
            discrete_features=False,
            n_neighbors=case["n_neighbors"],
            random_state=random_state,
        )

    expected = np.stack([judge(y == c) for c in range(classes)])
    if np.bincount(y).max() == 1:
        assert joint.isnan().all()
        assert_agrees((per_class,), (expected,))
    else:
        assert_agrees((per_class, joint), (expected, judge(y)))


# Compiled kernel: sizes, threads, refusals --------------------------------------------------------


@pytest.mark.parametrize(("samples", "classes"), [(8_000, 10), (8_000, 1000)])
def test_long_columns_agree_with_the_reference(cpp: Backend, samples, classes):
    labels = random_labels(samples, classes)
    values = (normal(2, samples) + labels % 7 / 2).relu()
    values[0] += 1e-10 * normal(1, samples, seed=3)[0]
    per_class, joint = estimate(values, labels, classes, 3)
    some = torch.tensor([0, 1, classes - 1])
    for c in some:
        row, _ = reference.knn_mutual_information(values, (labels == c).long(), 2, 3)
        assert (per_class[c] - row[1]).abs().max() < TOLERANCE
    _, expected = reference.knn_mutual_information(values, labels, 0, 3)
    assert (joint - expected).abs().max() < TOLERANCE


def test_samples_times_classes_beyond_32_bits(cpp: Backend):
    """Integers 0 … M - 1 with label i mod K: all counts are known."""
    samples, classes, k = 2_200_000, 1000, 3
    assert samples * classes > 2**31
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    got, _ = estimate(order.double()[None], order % classes, classes, k)

    def psi(n: Any) -> Tensor:
        return torch.as_tensor(n, dtype=torch.float64).digamma()

    # Of its own class, the third neighbour is 2K away, 3K at the ends; m counts the nearer ones.
    i = torch.arange(samples)
    reach = torch.where((i < classes) | (i >= samples - classes), 3, 2) * classes - 1
    m = torch.minimum(i, reach) + torch.minimum(samples - 1 - i, reach) + 1
    own = psi(m).view(-1, classes).sum(0)
    # Of the rest, it is 2 away and 3 samples are nearer, whichever class is left out; but at the
    # ends it is farther.
    size = samples // classes
    rest = psi(3).repeat(classes) * (samples - size)
    for end in (*range(4), *range(samples - 4, samples)):
        nearby = [j for j in range(end - 8, end + 9) if 0 <= j < samples and j != end]
        nearby.sort(key=lambda j: abs(j - end))
        for c in range(classes):
            if c != end % classes:
                farthest = abs([j for j in nearby if j % classes != c][k - 1] - end)
                nearer = 1 + sum(abs(j - end) < farthest for j in nearby)
                rest[c] += psi(nearer) - psi(3)
    sizes = size * psi(size) + (samples - size) * psi(samples - size)
    expected = psi(samples) + psi(k) - (sizes + own + rest) / samples
    assert (got[:, 0] - expected.clamp_min(0)).abs().max() < TOLERANCE
    assert expected.max() > 0


def test_no_column_takes_quadratic_time(cpp: Backend):
    """Ties, runs of a class and classes of a sample each: not far from what random columns take."""
    samples = 200_000
    values, labels = normal(1, samples), random_labels(samples, 10)
    places = torch.arange(samples)

    def seconds(values: Tensor, labels: Tensor, n_neighbors: int = 3) -> float:
        start = time.perf_counter()
        estimate(values, labels, int(labels.max()) + 1, n_neighbors)
        return time.perf_counter() - start

    usual = min(seconds(values, labels) for _ in range(3))
    by_class = values.sort().values, labels.sort().values
    for column in (
        by_class,
        (*by_class, 100),
        (0 * values, labels),
        (0 * values, labels.sort().values),
        (0 * values, places),
        (values, places // 2),
        (values.relu(), labels),
        ((places // 4).double()[None], torch.where(places % 4 == 0, 1 + places // 4, 0)),
    ):
        assert seconds(*column) < 50 * usual  # all pairs would take thousands of times as long


def test_malformed_arguments_are_refused_by_name(cpp: Backend):
    values, labels = normal(2, 20), random_labels(20, 3)
    for arguments, message in (
        ((values, labels - 1, 3, 3), r"labels: got -1, want \[0, 3\)"),
        ((values, labels, 2, 3), r"labels: got 2, want \[0, 2\)"),
        ((values, labels.int(), 3, 3), "labels: want int64"),
        ((values, labels[:19], 3, 3), r"labels: got shape \[19\], want \[20\]"),
        ((values.float(), labels, 3, 3), "values: want float64"),
        ((values[0], labels, 3, 3), r"values: want \[filters, samples\]"),
        ((values.T.contiguous().T, labels, 3, 3), "values: want contiguous rows"),
        ((values, labels, 3, 0), "n_neighbors: got 0, want at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            estimate(*arguments)
