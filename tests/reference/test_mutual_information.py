"""The reference estimate against scikit-learn, whose roundings it must share, and by hand."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import ThreadpoolController

from picnn_fast.reference import mutual_information as reference

EULER = 0.5772156649015329
THREADS = ThreadpoolController()

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
