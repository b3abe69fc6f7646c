"""Triton kernels of the histogram family, beyond the parity suite in tests/ops."""

from typing import Any

import pytest
import torch

from picnn_fast.reference import histogram as reference
from tests.cases import pairwise
from tests.conftest import HAS_GPU
from tests.ops.test_launches import launched
from tests.reference.test_histogram import fresh
from tests.triton_kernels.conftest import Compiled, types

pytest.importorskip("triton")
triton_histogram = pytest.importorskip("picnn_fast.triton_kernels.histogram")


def test_every_kernel_compiles_for_hopper_in_every_dtype(
    compiled: Compiled,
) -> None:
    kernels = {"range_kernel", "count_kernel", "soft_kernel", "soft_backward_kernel"}
    records = compiled["histogram"]
    others = {"regrid_kernel", "histogram_information_kernel", "histogram_slopes_kernel"}
    assert {record["kernel"] for record in records} == kernels | others
    for name in kernels:
        of_maps = types(records, name, "activations")
        assert of_maps == {"float32", "float64", "bfloat16", "float16"}, name


@pytest.mark.parametrize(
    ("programs", "slots", "order", "cache"),
    [
        *pairwise([1, 6], [0, 64, 4096], ["c_order", "f_order"], [triton_histogram.CACHE]),
        (1, 0, "f_order", 0),
        (6, 0, "c_order", 0),
    ],
)
@pytest.mark.gpu(else_cpu=True)
def test_tiles_and_tables_do_not_matter(
    programs: int, slots: int, order: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of several tiles; counts in the program's own table, in place, and by class."""
    monkeypatch.setattr(triton_histogram, "CACHE", cache)
    monkeypatch.setattr(triton_histogram, "PROGRAMS", programs)
    monkeypatch.setattr(triton_histogram, "SLOTS", slots)
    monkeypatch.setattr(triton_histogram, "TILE", 64)
    device = "cuda" if HAS_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 5, generator=generator).to(device)
    x = x.T.contiguous().T if order == "f_order" else x
    labels = torch.randint(0, 3, (150,), generator=generator).to(device)
    expected, got = ([t.to(device) for t in fresh(5, 6, 3)] for _ in range(2))
    for scale in (1, 100):
        assert reference.histogram_update(*expected, x * scale, labels).item() == -1
        assert triton_histogram.histogram_update(*got, x * scale, labels).item() == -1
        for one, two in zip(got, expected, strict=True):
            assert torch.equal(one, two)

    low, width = torch.linspace(-2, -1, 5, device=device), torch.full((5,), 0.6, device=device)
    counts = triton_histogram.soft_histogram(x, labels, low, width, 6, 3)
    torch.testing.assert_close(
        counts, reference.soft_histogram(x, labels, low, width, 6, 3), rtol=1e-5, atol=1e-5
    )
    grad = triton_histogram.soft_histogram_backward(counts, x, labels, low, width)
    wanted = reference.soft_histogram_backward(counts, x, labels, low, width)
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)


def test_an_update_is_at_most_ten_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: kernels.append(self.name)

    for name in ("range_kernel", "regrid_kernel", "count_kernel"):
        monkeypatch.setattr(triton_histogram, name, Recorder(name))
    arguments = *fresh(40, 64, 200), torch.rand(90, 40), torch.arange(90)
    others, _ = launched(lambda: triton_histogram.histogram_update(*arguments))
    assert kernels == ["range_kernel", "regrid_kernel", "count_kernel"]
    assert others
    assert len(kernels) + len(others) <= 10, others
    assert not any("clone" in name or "copy" in name for name in others)


@pytest.mark.gpu(else_cpu=True)
def test_nothing_is_written_when_a_value_is_not_finite() -> None:
    device = "cuda" if HAS_GPU else "cpu"
    state = [t.to(device) for t in fresh(4, 6, 2)]
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(20, device=device) % 2
    triton_histogram.histogram_update(*state, x, labels)
    before = [t.clone() for t in state]
    x[3, 2] = -torch.inf
    x[7, 3] = torch.nan
    assert triton_histogram.histogram_update(*state, 10 * x, labels).item() == 2
    for one, two in zip(state, before, strict=True):
        assert torch.equal(one, two)
