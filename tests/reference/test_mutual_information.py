"""The reference estimate against scikit-learn, whose roundings it must share, and by hand."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_selection import _mutual_info, mutual_info_classif
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import ThreadpoolController

from picnn_fast.reference import mutual_information as reference

EULER = 0.5772156649015329
THREADS = ThreadpoolController()

# Preparation --------------------------------------------------------------------------------------


def sklearn_columns(monkeypatch, x: np.ndarray, random_state: int) -> np.ndarray:
    """The columns ``[N, M]`` that scikit-learn estimates from, as ``mutual_info_classif`` does."""
    columns = []

    def record(column, *_):
        columns.append(column.copy())
        return 0.0

    monkeypatch.setattr(_mutual_info, "_compute_mi", record)
    y = np.arange(len(x)) % 2
    mutual_info_classif(x, y, discrete_features=False, random_state=random_state)
    return np.stack(columns)


def activations(samples: int, filters: int) -> torch.Tensor:
    """After a ReLU, with a constant, a zero and a nearly constant filter where there are four."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, filters, generator=generator, dtype=torch.float64).relu() * 37
    if filters >= 4:
        x[:, 1] = 1e6
        x[:, 2] = 0
        x[:, 3] = 3 + 1e-15 * x[:, 0]
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 1), (130, 7), (20_011, 1), (20_011, 70)])
def test_columns_are_prepared_as_scikit_learn_does_bit_for_bit(monkeypatch, size, dtype):
    x = activations(*size).to(dtype).nan_to_num(posinf=1e4)
    exact = x if dtype != torch.bfloat16 else x.float()  # which numpy does not know
    expected = sklearn_columns(monkeypatch, exact.numpy(), random_state=3)
    (whole,) = reference.prepare(x, 3)
    assert np.array_equal(whole.numpy(), expected)
    monkeypatch.setattr(reference, "_SMALL", 0)
    blocks = list(reference.prepare(x, 3))
    assert np.array_equal(torch.cat(blocks).numpy(), expected)
    assert all(block.dtype == torch.float64 and block.is_contiguous() for block in blocks)
    budget = max(8 * size[0], x.numel() * x.element_size())
    assert max(block.numel() * 8 for block in blocks) <= budget


def test_columns_do_not_depend_on_the_layout_of_the_activations(monkeypatch):
    x = activations(501, 6)
    expected = sklearn_columns(monkeypatch, np.asfortranarray(x.numpy()), random_state=0)
    padded = torch.full((501, 12), torch.nan, dtype=torch.float64)
    padded[:, ::2] = x
    for strided in (x, x.T.contiguous().T, padded[:, ::2]):
        assert np.array_equal(torch.cat(list(reference.prepare(strided, 0))).numpy(), expected)


def test_preparation_holds_little_beside_a_block(monkeypatch):
    x = activations(4001, 60)
    (whole,) = reference.prepare(x, 1)
    monkeypatch.setattr(reference, "_SMALL", 0)
    monkeypatch.setattr(reference, "_CHUNK", 2**13)
    tracemalloc.start()
    try:
        blocks = list(reference.prepare(x, 1))  # of torch's memory, which is not traced
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(torch.cat(blocks), whole)
    assert peak < 6 * 8 * 2**13 < x.numel() * 8 / 4


# Distances ----------------------------------------------------------------------------------------


@st.composite
def sorted_values(draw) -> np.ndarray:
    size = draw(st.integers(2, 30))
    state = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1e-10, 1.0, 100.0]))
    centre = draw(st.sampled_from([0.0, 1.0, 1e4]))
    values = state.standard_normal(size).clip(draw(st.sampled_from([-np.inf, 0.0]))) * spread
    return np.sort(centre + values + 1e-10 * draw(st.booleans()) * state.standard_normal(size))


@given(sorted_values(), st.integers(1, 10))
def test_distances_are_those_of_scikit_learn_bit_for_bit(values, n_neighbors):
    size = len(values)
    k = min(n_neighbors, size - 1)
    neighbours = NearestNeighbors(n_neighbors=k).fit(values[:, None])
    with THREADS.limit(limits=1, user_api="openmp"):  # few distances, started for again and again
        expected = neighbours.kneighbors()[0][:, -1]
    brute = k >= size // 2
    assert (neighbours._fit_method == "brute") == brute
    search = reference._rounded_distance if brute else reference._distance
    assert np.array_equal(search(torch.from_numpy(values)[None], k)[0].numpy(), expected)


def test_samples_are_counted_as_their_distances_round():
    # 0.3 - 0.1 and 0.1 + 0.2 round differently: neither bound may be computed from the radius.
    column = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.5]], dtype=torch.float64)
    for radius in (0.0, 0.1, 0.2, 0.3 - 0.1, 0.30000000000000004, 1.0):
        expected = [sum(abs(y - x) <= radius for y in column[0]) for x in column[0]]
        got = reference._count_within(column, column, torch.full_like(column, radius))
        assert got[0].tolist() == expected


# The estimate -------------------------------------------------------------------------------------


def test_the_estimate_of_six_samples_is_that_by_hand():
    values = torch.tensor([[0.0, 1.0, 3.0, 10.0, 11.0, 14.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # Nearest of the same label at 1, 1, 2, 1, 1, 3; strictly nearer, with itself: one sample each.
    psi_1, psi_3, psi_6 = -EULER, 1.5 - EULER, 137 / 60 - EULER
    expected = psi_6 + psi_1 - psi_3 - psi_1
    per_class, joint = reference.knn_mutual_information(values, labels, 2, 1)
    assert per_class.shape == (2, 1)
    assert abs(joint.item() - expected) < 1e-14
    assert (per_class - expected).abs().max() < 1e-14


def test_a_class_that_is_alone_or_absent_leaves_the_row_of_the_others():
    values = torch.tensor([[0.0, 1.0, 3.0, 7.0, 7.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 2])
    per_class, joint = reference.knn_mutual_information(values, labels, 3, 1)
    # Nobody there; one sample, left out; and the rest, left out.
    assert max(per_class.abs().max(), joint.abs().max()) < 1e-15


def test_labels_of_one_sample_each_have_no_estimate():
    values = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    per_class, joint = reference.knn_mutual_information(values, torch.arange(3), 3, 1)
    assert joint.isnan().all()
    assert not per_class.isnan().any()
    per_class, joint = reference.knn_mutual_information(values[:, :2], torch.arange(2), 2, 1)
    assert per_class.isnan().all()
    assert joint.isnan().all()


def test_no_samples_filters_or_classes():
    empty = torch.empty(0, dtype=torch.int64)
    per_class, joint = reference.knn_mutual_information(torch.empty(2, 0).double(), empty, 3, 3)
    assert per_class.shape == (3, 2)
    assert per_class.isnan().all()
    assert joint.isnan().all()
    labels = torch.arange(20) % 3
    per_class, joint = reference.knn_mutual_information(torch.empty(0, 20).double(), labels, 3, 3)
    assert per_class.shape == (3, 0)
    assert joint.shape == (0,)
