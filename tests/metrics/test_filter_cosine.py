"""Cosines between filters, redundancy and C_IC against loops written from the text."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.metrics import (
    ClassMeans,
    InterClassCorrelation,
    filter_cosines,
    filter_redundancy,
)

CLASSES, FILTERS = 4, 9


def _draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _images(seed, count, classes=CLASSES):
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    return _draw(seed, count, FILTERS), labels


def _c_ic(cosines, pooled, labels, m1):
    """The paper's sum, over ordered pairs of different classes that have images."""
    groups = {}
    for c in set(labels.tolist()):
        means = pooled[labels == c].double().mean(0).tolist()
        groups[c] = sorted(range(FILTERS), key=lambda k, means=means: -means[k])[:m1]
    terms = [
        cosines[k][j]
        for c in groups
        for d in groups
        if c != d
        for k in groups[c]
        for j in groups[d]
    ]
    return sum(terms) / len(terms)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_cosines_equal_a_loop_over_pairs_of_filters(filters, width, seed):
    weights = _draw(seed, filters, width, 3, 3)
    rows = weights.flatten(1).double().tolist()
    expected = [[_cosine(a, b) for b in rows] for a in rows]
    torch.testing.assert_close(filter_cosines(weights), torch.tensor(expected, dtype=torch.float64))


def test_a_filter_without_weights_is_at_right_angles_to_all():
    weights = torch.stack([torch.zeros(4), torch.ones(4)])
    assert filter_cosines(weights).tolist() == [[0.0, 0.0], [0.0, 1.0]]


@given(st.floats(-1, 1), st.integers(0, 99))
def test_redundancy_counts_pairs_of_different_filters_at_or_above_the_threshold(s, seed):
    cosines = filter_cosines(_draw(seed, 6, 3))
    pairs = [cosines[i, j].item() >= s for i in range(6) for j in range(6) if i != j]
    assert filter_redundancy(cosines, s).item() == pytest.approx(sum(pairs) / 30)


def test_an_element_that_equals_the_threshold_counts_and_the_diagonal_does_not():
    cosines = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    assert filter_redundancy(cosines, 0.5).item() == 1.0
    assert filter_redundancy(cosines, 0.75).item() == 0.0
    assert filter_redundancy(torch.ones(1, 1)).isnan()


@pytest.mark.parametrize("m1", [1, 2, 3])
def test_c_ic_is_the_papers_sum_over_ordered_pairs_of_classes(m1):
    pooled, labels = _images(0, 40)
    cosines = filter_cosines(_draw(1, FILTERS, 5))
    metric = InterClassCorrelation(cosines, CLASSES, m1)
    for some in torch.arange(40).split(7):
        metric.update(pooled[some], labels[some])
    expected = _c_ic(cosines.tolist(), pooled, labels, m1)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


def test_the_default_group_is_that_of_the_papers_networks():
    for filters, m1 in ((256, 25), (64, 6), (5, 1)):
        assert InterClassCorrelation(torch.eye(filters), 10).filters_per_class == m1


def test_a_filter_in_two_groups_counts_with_its_own_cosine():
    metric = InterClassCorrelation(torch.eye(2), 2, 1)
    metric.update(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    assert metric.compute().item() == 1.0


def test_classes_without_images_do_not_count():
    pooled, labels = _images(2, 30, classes=3)
    cosines = filter_cosines(_draw(1, FILTERS, 5))
    metric = InterClassCorrelation(cosines, CLASSES, 2)
    metric.update(pooled, labels)
    expected = _c_ic(cosines.tolist(), pooled, labels, 2)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)
    metric.reset()
    metric.update(pooled[labels == 1], labels[labels == 1])
    assert metric.compute().isnan()


def test_a_resample_is_the_value_of_its_images():
    pooled, labels = _images(3, 25)
    counts = torch.randint(0, 4, (5, 25), generator=torch.Generator().manual_seed(0))
    cosines = filter_cosines(_draw(1, FILTERS, 5))
    metric = InterClassCorrelation(cosines, CLASSES, 2)
    metric.update(pooled, labels)
    for count, value in zip(counts, metric.replicate(counts), strict=True):
        drawn = torch.arange(25).repeat_interleave(count)
        again = InterClassCorrelation(cosines, CLASSES, 2)
        again.update(pooled[drawn], labels[drawn])
        assert value.item() == pytest.approx(again.compute().item(), abs=1e-12)


def test_class_means_of_no_image_are_nan_and_batches_are_copied():
    seen = ClassMeans(2, 3)
    assert seen.means(None).isnan().all()
    pooled, labels = torch.ones(2, 3), torch.tensor([0, 1])
    seen.update(pooled, labels)
    pooled.zero_()
    labels.zero_()
    assert seen.compute().tolist() == [[1.0] * 3] * 2


def test_states_of_ranks_join():
    pooled, labels = _images(4, 20)
    first, second, whole = (ClassMeans(CLASSES, FILTERS) for _ in range(3))
    first.update(pooled[:13], labels[:13])
    second.update(pooled[13:], labels[13:])
    whole.update(pooled, labels)
    for name in ("activations", "labels"):
        setattr(first, name, torch.cat([*getattr(first, name), *getattr(second, name)]))
    torch.testing.assert_close(first.means(None)[0], whole.compute(), equal_nan=True)


def test_bad_input_is_refused_by_name():
    cases = [
        (lambda: filter_cosines(torch.ones(3)), ValueError, r"weights: got shape \(3,\)"),
        (lambda: filter_cosines(torch.ones(3, 2).int()), TypeError, "weights: got dtype"),
        (lambda: filter_redundancy(torch.ones(2, 3)), ValueError, "cosines: got shape"),
        (lambda: filter_redundancy(torch.ones(2, 2), 2), ValueError, "threshold: got 2"),
        (lambda: filter_redundancy(torch.ones(2, 2), "0"), TypeError, "threshold: got str"),
        (lambda: InterClassCorrelation(torch.eye(2), 0), ValueError, "num_classes: got 0"),
        (lambda: InterClassCorrelation(torch.eye(2), 2, 3), ValueError, "filters_per_class: got 3"),
    ]
    metric = InterClassCorrelation(torch.eye(2), 2)
    pooled, labels = torch.ones(3, 2), torch.tensor([0, 1, 1])
    cases += [
        (
            lambda: metric.update(pooled[:, :1], labels),
            ValueError,
            "activations: got 1 filters",
        ),
        (lambda: metric.update(pooled, labels + 1), ValueError, "labels: got values"),
        (lambda: metric.update(pooled, labels[:2]), ValueError, "labels: got shape"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            call()
