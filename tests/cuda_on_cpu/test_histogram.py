"""CUDA kernels of the histogram family, beyond the parity suite in tests/ops.

Sizes that make several blocks, several steps of a block, tables in shared memory and not, and
vectors along filters and along samples; whatever the order of threads and blocks.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.reference import histogram as reference
from tests.reference.test_histogram import fresh

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Samples, filters, bins, classes.
SHAPES = {
    "tables_in_shared_memory": (600, 16, 8, 3),
    "ragged": (531, 5, 4, 2),
    "tables_of_all_shared_memory": (270, 8, 40, 300),
    "tables_too_large": (90, 4, 70, 900),
    "sorted": (1950, 8, 8, 1900),
    "gradient_sorted": (1450, 8, 8, 360),
    "gradient_sorted_by_single_filters": (5000, 2, 8, 1230),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "samples":  # vectors along samples: a column of its own, 16 bytes aligned
        memory = torch.zeros(x.shape[1], (x.shape[0] + 7) // 8 * 8, dtype=x.dtype)
        memory[:, : x.shape[0]] = x.T
        return memory[:, : x.shape[0]].T
    if layout == "strided":
        memory = torch.zeros(x.shape[0], 2 * x.shape[1] + 1, dtype=x.dtype)
        memory[:, 1::2] = x
        return memory[:, 1::2]
    return x


def check(
    kernels: dict[str, Callable[..., Any]],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str,
) -> None:
    M, N, bins, classes = shape
    generator = torch.Generator().manual_seed(0)
    # The range grows within blocks and from call to call, in both directions.
    growth = torch.linspace(0, 4, M).exp2()[:, None]
    parts = [
        laid_out((torch.randn(M, N, generator=generator) * growth * s + s).to(dtype), layout)
        for s in (1, 0.1, -30)
    ]
    parts[1] = parts[1].relu()
    labels = torch.randint(0, classes, (2 * M,), generator=generator)[::2]
    expected, got = fresh(N, bins, classes), fresh(N, bins, classes)
    for part in parts:
        assert reference.histogram_update(*expected, part, labels).item() == -1
        assert kernels["histogram_update"](*got, part, labels).item() == -1
        for one, two in zip(got, expected, strict=True):
            assert torch.equal(one, two)

    x = parts[0].clone(memory_format=torch.preserve_format)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low = torch.linspace(-2, -1, N).to(wide)
    width = (torch.linspace(2, 4, 2 * N).to(wide) / bins)[::2]
    for value in (0.5, torch.nan):
        x[3, 1] = value
        torch.testing.assert_close(
            kernels["soft_histogram"](x, labels, low, width, bins, classes),
            reference.soft_histogram(x, labels, low, width, bins, classes),
            rtol=0,
            atol=M * torch.finfo(wide).eps,
            equal_nan=True,
        )
    x[3, 1] = 0.5
    slopes = torch.randn(N, classes, bins, generator=generator).to(wide).mT
    grad = kernels["soft_histogram_backward"](slopes, x, labels, low, width)
    wanted = reference.soft_histogram_backward(slopes, x, labels, low, width)
    assert grad.stride() == wanted.stride()
    torch.testing.assert_close(grad, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)

    x[M // 2, N - 1], x[M - 1, N // 2], x[1, N - 1] = torch.nan, -torch.inf, torch.inf
    assert kernels["histogram_update"](*got, x, labels).item() == N // 2
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        *itertools.product(list(SHAPES)[:5], ("filters", "samples", "strided"), [torch.float32]),
        *itertools.product(
            ["tables_in_shared_memory"], ("filters", "samples", "strided"), DTYPES[1:]
        ),
        *itertools.product(["gradient_sorted"], ["filters"], DTYPES[:3]),
        ("gradient_sorted_by_single_filters", "strided", torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_many_samples_equal_the_reference(
    kernels: dict[str, Callable[..., Any]], shape: str, layout: str, dtype: torch.dtype
) -> None:
    check(kernels, SHAPES[shape], dtype, layout)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *itertools.product(["tables_in_shared_memory"], ("filters", "samples", "strided")),
        ("tables_too_large", "filters"),
        ("sorted", "filters"),
        ("gradient_sorted", "filters"),
    ],
)
def test_the_order_of_threads_and_blocks_does_not_matter(
    kernels: dict[str, Callable[..., Any]],
    shape: str,
    layout: str,
    schedule: Callable[[], None],
) -> None:
    schedule()
    check(kernels, SHAPES[shape], torch.float32, layout)


def test_soft_counts_have_the_same_bits_in_every_order(
    kernels: dict[str, Callable[..., Any]], schedule: Callable[[], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (700,), generator=generator)
    given = []
    for dtype, bins in itertools.product((torch.float32, torch.float64), (6, 400)):
        x = torch.randn(700, 5, generator=generator).to(dtype)
        low, width = torch.full((5,), -3).to(dtype), torch.full((5,), 6 / bins).to(dtype)
        given.append((x, labels, low, width, bins, 3))
    expected = [kernels["soft_histogram"](*arguments) for arguments in given]
    schedule()
    for arguments, wanted in zip(given, expected, strict=True):
        assert torch.equal(kernels["soft_histogram"](*arguments), wanted)


def test_what_counts_tell_has_the_same_bits_in_every_order(
    kernels: dict[str, Callable[..., Any]], schedule: Callable[[], None]
) -> None:
    """Of fewer classes than a block has threads, and of more."""
    calls = []
    for (bins, classes), turn in itertools.product(((7, 3), (40, 300)), range(4)):
        generator = torch.Generator().manual_seed(turn)
        counts = torch.rand(3, bins, classes, generator=generator, dtype=torch.float64) - 0.3
        counts, by_label = counts.relu(), turn % 2 == 1
        information = reference.histogram_information(counts, by_label, False)
        grad = torch.randn(information.shape, generator=generator, dtype=torch.float64)
        calls += [
            ("histogram_information", (counts, by_label, turn > 1)),
            ("histogram_information_backward", (grad, counts, information, by_label)),
        ]
    expected = [kernels[name](*arguments) for name, arguments in calls]
    schedule()
    for (name, arguments), one in zip(calls, expected, strict=True):
        assert torch.equal(kernels[name](*arguments), one)
        torch.testing.assert_close(one, getattr(reference, name)(*arguments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("classes", [2, 3000])
@pytest.mark.parametrize("label", [-1, 3000, 2**32])
def test_a_label_out_of_range_ends_the_kernel(
    kernels: dict[str, Callable[..., Any]], classes: int, label: int
) -> None:
    x, labels = torch.arange(18.0).reshape(6, 3), torch.zeros(6, dtype=torch.int64)
    labels[4] = label
    low, width = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["histogram_update"](*fresh(3, 8, classes), x, labels)
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["soft_histogram"](x, labels, low, width, 8, classes)
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["soft_histogram_backward"](torch.zeros(3, 8, classes), x, labels, low, width)
