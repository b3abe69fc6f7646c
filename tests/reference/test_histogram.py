"""The reference histograms against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast.reference import histogram

finite = st.floats(allow_nan=False, allow_infinity=False)


def exact_cell(x: float, exponent: int) -> int:
    return math.floor(Fraction(x) / Fraction(2) ** exponent)


def exact_grid(minimum: float, maximum: float, bins: int) -> tuple[int, int]:
    """Exponent and first cell by the definition, on Python's integers."""
    magnitude = max(abs(minimum), abs(maximum))
    exponent = max(-100, math.frexp(magnitude)[1] - 1 - 20) if magnitude > 0 else -100
    while exact_cell(maximum, exponent) - exact_cell(minimum, exponent) >= bins:
        exponent += 1
    return exponent, exact_cell(minimum, exponent)


def exact_counts(x: np.ndarray, labels: np.ndarray, bins: int, classes: int) -> np.ndarray:
    counts = np.zeros((x.shape[1], bins, classes), dtype=np.int64)
    for n, column in enumerate(x.T.astype(np.float64).tolist()):
        if column:
            exponent, first = exact_grid(min(column), max(column), bins)
            for value, label in zip(column, labels.tolist(), strict=True):
                counts[n, exact_cell(value, exponent) - first, label] += 1
    return counts


def fresh(filters: int, bins: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    infinite = torch.full((filters,), math.inf, dtype=torch.float64)
    return torch.zeros(filters, bins, classes, dtype=torch.int64), infinite, -infinite


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(finite, finite, st.integers(2, 300))
def test_the_grid_is_the_finest_that_holds_the_range(one, two, bins):
    minimum, maximum = min(one, two), max(one, two)
    exponent, first = histogram.grid(vector(minimum), vector(maximum), bins)
    assert (exponent.item(), first.item()) == exact_grid(minimum, maximum, bins)


@pytest.mark.parametrize(
    ("minimum", "maximum", "bins"),
    [
        (0.0, 0.0, 2),
        (-0.0, 5e-324, 64),
        (-5e-324, 1.7e308, 64),
        (-1.7976931348623157e308, 1.7976931348623157e308, 2),
        (-1.0, 1.0, 2),
        (1e6, 1e6 + 1e-9, 64),
        (2.0**20, 2.0**20 + 63, 64),
        (2.0**20, 2.0**20 + 64, 64),
    ],
)
def test_the_grid_of_extreme_ranges(minimum, maximum, bins):
    exponent, first = histogram.grid(vector(minimum), vector(maximum), bins)
    assert (exponent.item(), first.item()) == exact_grid(minimum, maximum, bins)


@given(
    st.lists(st.tuples(finite, finite, st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(2, 9),
)
def test_counts_of_any_numbers_are_exact(samples, bins):
    x = np.array([row[:2] for row in samples], dtype=np.float64)
    labels = np.array([row[2] for row in samples])
    state = fresh(2, bins, 3)
    column = histogram.histogram_update(*state, torch.from_numpy(x), torch.from_numpy(labels))
    assert column.item() == -1
    np.testing.assert_array_equal(state[0].numpy(), exact_counts(x, labels, bins, 3))
    np.testing.assert_array_equal(state[1].numpy(), x.min(0))
    np.testing.assert_array_equal(state[2].numpy(), x.max(0))


@given(finite, finite, finite, finite, st.integers(2, 70))
def test_a_wider_range_never_has_a_finer_grid(a, b, c, d, bins):
    low, *_, high = sorted((a, b, c, d))
    inner, _ = histogram.grid(vector(min(a, b)), vector(max(a, b)), bins)
    outer, _ = histogram.grid(vector(low), vector(high), bins)
    assert inner <= outer


def test_ranges_of_width_use_half_the_bins_or_more():
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    exponent, first = histogram.grid(ends.amin(0), ends.amax(0), 64)
    used = (ends.amax(0) * torch.exp2(-exponent.double())).floor().long() - first + 1
    assert (used <= 64).all()
    assert (used > 31).all()


def test_widening_of_nothing_is_nothing():
    counts, minimum, maximum = fresh(2, 4, 3)
    wide = histogram.widen(counts, minimum, maximum, minimum - 1, maximum + 1)
    assert wide.sum() == 0
    wide = histogram.widen(counts, minimum, maximum, vector(-1, 0), vector(5, 0))
    assert wide.sum() == 0


def test_soft_counts_of_a_few_samples():
    x = torch.tensor([[-9.0], [0.5], [1.25], [2.0], [2.5], [7.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    counts = histogram.soft_histogram(x, labels, vector(0.5), vector(1), 3, 2)
    expected = torch.zeros(1, 3, 2, dtype=torch.float64)
    expected[0, :, 0] = vector(1 + 0.25, 0.75, 1)
    expected[0, :, 1] = vector(1, 0.5, 0.5 + 1)
    assert torch.equal(counts, expected)


def test_soft_gradient_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 4, (50,), generator=generator)
    low, width = vector(-1, -2, 0), vector(0.3, 1, 0.1)
    grad = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    counts = histogram.soft_histogram(x, labels, low, width, 6, 4)
    (expected,) = torch.autograd.grad(counts, x, grad)
    got = histogram.soft_histogram_backward(grad, x.detach(), labels, low, width)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
