"""CUDA kernels of the mutual information family on the CPU, beyond the parity suite in tests/ops.

Filters of more than one thread block, whose threads may run in any order.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.reference import mutual_information as reference


@pytest.fixture
def estimate(kernels: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    return kernels["knn_mutual_information"]


def filters(samples: int) -> tuple[Tensor, Tensor]:
    """Of several kinds: normal, with many zeros, integers, sorted by class, near-duplicates."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, samples, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 12, (samples,), generator=generator) ** 2 // 12  # some are empty
    labels[17], labels[18] = 12, 13  # one sample each
    values[1].relu_()
    values[2].mul_(3).round_()
    values[3] = values[3].sort().values[labels.argsort().argsort()]
    values[4] = values[4].round() + 1e-10 * values[0]
    return values, labels


@pytest.mark.parametrize(("samples", "n_neighbors"), [(600, 3), (300, 100)])
def test_filters_of_several_blocks_agree_with_the_reference(
    estimate: Callable[..., Any], samples: int, n_neighbors: int
) -> None:
    values, labels = filters(samples)
    got = estimate(values, labels, 14, n_neighbors)
    expected = reference.knn_mutual_information(values, labels, 14, n_neighbors)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_results_do_not_depend_on_the_order_of_threads(
    estimate: Callable[..., Any], schedule: Callable[[], None]
) -> None:
    values, labels = filters(300)
    expected = estimate(values, labels, 14, 2)
    schedule()
    got = estimate(values, labels, 14, 2)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_malformed_arguments_are_refused(estimate: Callable[..., Any]) -> None:
    values, labels = filters(20)
    for arguments, message in (
        ((values, labels - 1, 14, 3), "assertion failed in .*: 0 <= label && label < classes"),
        ((values, labels, 13, 3), "assertion failed in .*: 0 <= label && label < classes"),
        ((values, labels.int(), 14, 3), "labels: want int64"),
        ((values, labels[:19], 14, 3), "labels: got shape .*, want"),
        ((values.float(), labels, 14, 3), "values: want float64"),
        ((values[0], labels, 14, 3), r"values: got . axes, want \[N, M\]"),
        ((values, labels, 2**31, 3), "samples and .* classes, want fewer than"),
        ((values, labels, 14, 0), "n_neighbors: got 0, want 1 or more"),
    ):
        with pytest.raises(RuntimeError, match=message):
            estimate(*arguments)
