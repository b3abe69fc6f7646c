"""Means over images, and their resamples, against images that are repeated."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.metrics import (
    MeanOverImages,
    bootstrap,
    draw_counts,
    percentile_interval,
    resampled_means,
)


@given(
    values=st.lists(st.floats(-9, 9) | st.just(math.nan), min_size=1, max_size=8),
    seed=st.integers(0, 999),
    size=st.integers(1, 5),
)
def test_a_resample_is_the_mean_of_images_that_are_repeated(values, seed, size):
    metric = MeanOverImages()
    for batch in torch.tensor(values, dtype=torch.float64).split(size):
        metric.update(batch)
    counts = torch.randint(4, (3, len(values)), generator=torch.Generator().manual_seed(seed))
    counts[0] = 1
    for value, times in zip(metric.replicate(counts).tolist(), counts.tolist(), strict=True):
        held = [x for x, n in zip(values, times, strict=True) for _ in range(n) if x == x]
        assert value == pytest.approx(statistics.fmean(held) if held else math.nan, nan_ok=True)
    assert metric.compute().item() == pytest.approx(metric.replicate(counts)[0].item(), nan_ok=True)


def test_columns_have_means_of_their_own():
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]])
    counts = torch.tensor([[1, 1], [3, 1], [2, 0]])
    wanted = torch.tensor([[2.0, 5.0], [1.5, 5.0], [1.0, math.nan]], dtype=torch.float64)
    torch.testing.assert_close(resampled_means(values, counts), wanted, equal_nan=True)


def test_values_are_copied_and_kept_in_double_precision():
    metric, buffer = MeanOverImages(), torch.tensor([0.5])
    metric.update(buffer)
    buffer += 1
    metric.update(torch.tensor([1 / 3], dtype=torch.float64))
    metric.set_dtype(torch.float16)
    assert metric.compute().item() == (0.5 + 1 / 3) / 2
    metric.reset()
    assert metric.seen == 0


def test_forward_gives_the_batch_and_adds_to_the_total():
    metric = MeanOverImages()
    assert metric(torch.tensor([1.0, 3.0])).item() == 2
    assert metric(torch.tensor([8.0])).item() == 8
    assert metric.compute().item() == 4
    assert metric.replicate(torch.tensor([[0, 1, 1]])).item() == 5.5


def test_what_are_no_values_or_counts_is_refused():
    metric = MeanOverImages()
    for values, error, message in (
        ([1.0], TypeError, "values: got list"),
        (torch.tensor([1]), TypeError, "values: got dtype torch.int64"),
        (torch.ones(2, 1), ValueError, r"values: got shape \(2, 1\), want \[B\]"),
    ):
        with pytest.raises(error, match=message):
            metric.update(values)
    metric.update(torch.ones(2))
    for counts, error, message in (
        ([[1, 1]], TypeError, "counts: got list"),
        (torch.ones(1, 2), TypeError, "counts: got dtype torch.float32, want torch.int64"),
        (torch.ones(1, 3).long(), ValueError, r"counts: got shape \(1, 3\), want \[resamples, 2\]"),
    ):
        with pytest.raises(error, match=message):
            metric.replicate(counts)


def test_counts_are_those_of_as_many_images_drawn_with_replacement(monkeypatch):
    (counts,) = draw_counts(40, 500)
    assert (counts.shape, counts.dtype) == ((500, 40), torch.int64)
    assert (counts.sum(1) == 40).all()
    # An image is drawn a binomial number of times, 40 draws of 1 / 40.
    zero = (counts == 0).double().mean().item()
    assert zero == pytest.approx((1 - 1 / 40) ** 40, abs=0.01)
    assert counts.double().var().item() == pytest.approx(1 - 1 / 40, abs=0.03)
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)
    blocks = list(draw_counts(40, 500))
    assert [len(block) for block in blocks] == [2] * 250
    assert torch.equal(torch.cat(blocks), counts)
    assert torch.equal(next(draw_counts(40, 1)), counts[:1])
    assert not torch.equal(next(draw_counts(40, 2, seed=1)), counts[:2])


def test_an_interval_holds_the_middle_of_the_values():
    values = torch.arange(1000.0)[torch.randperm(1000)]
    assert percentile_interval(values) == pytest.approx((0.025 * 999, 0.975 * 999))
    some = torch.cat([values, torch.full((1000,), math.nan)])
    assert percentile_interval(some) == percentile_interval(values)
    assert percentile_interval(torch.cat([some, some[-1:]])) is None
    with pytest.raises(ValueError, match="level: got 1, want a share below 1"):
        percentile_interval(values, 1)


def test_intervals_of_means_hold_the_truth_about_as_often_as_they_say():
    draw, held = torch.Generator().manual_seed(0), 0
    for trial in range(300):
        values = torch.rand(60, generator=draw, dtype=torch.float64)
        (counts,) = draw_counts(60, 400, seed=trial)
        low, high = percentile_interval(resampled_means(values, counts))
        held += low <= 0.5 <= high
    assert held / 300 == pytest.approx(0.95, abs=0.04)
