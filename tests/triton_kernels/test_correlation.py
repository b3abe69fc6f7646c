"""Triton kernels of the correlation family, beyond the parity suite in tests/ops."""

import pytest
import torch

from picnn_fast.reference import correlation as reference
from tests.cases import pairwise
from tests.conftest import HAS_GPU
from tests.triton_kernels.conftest import Compiled, types

pytest.importorskip("triton")
kernels = pytest.importorskip("picnn_fast.triton_kernels.correlation")

DEVICE = "cuda" if HAS_GPU else "cpu"


def test_every_kernel_compiles_for_hopper_in_every_dtype(
    compiled: Compiled,
) -> None:
    of_maps = {"norms_kernel", "sums_kernel", "gradient_kernel"}
    of_sums = {"moments_kernel": "group_sums", "weights_kernel": "group_sums"}
    records = compiled["correlation"]
    assert {record["kernel"] for record in records} == of_maps | set(of_sums)
    for name in of_maps:
        assert types(records, name, "maps") == {"float32", "float64", "bfloat16", "float16"}, name
    for name, argument in of_sums.items():
        assert types(records, name, argument) == {"float32", "float64"}, name


@pytest.mark.parametrize(
    ("sizes", "counted", "layout"),
    pairwise(
        [(8, 4096), (4096, 32), (16, 16)],
        [None, (True, False, True)],
        [torch.contiguous_format, torch.channels_last],
    ),
    ids=str,
)
@pytest.mark.gpu(else_cpu=True)
def test_tiles_do_not_matter(
    sizes: tuple[int, int],
    counted: tuple[bool, ...] | None,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Maps longer than a tile, which are read twice, and groups of several blocks of filters."""
    monkeypatch.setattr(kernels, "LONGEST", sizes[0])
    monkeypatch.setattr(kernels, "TILE", sizes[1])
    monkeypatch.setattr(kernels, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 11, 5, 7, generator=generator, dtype=torch.float64).relu().to(DEVICE)
    maps = maps.contiguous(memory_format=layout)
    mean = torch.rand(11, 5, 7, generator=generator, dtype=torch.float64).to(DEVICE)
    maps[1, 4] = mean[4]
    groups = torch.randint(0, 3, (11,), generator=generator).to(DEVICE)
    positive = None if counted is None else torch.tensor(counted, device=DEVICE)
    expected = reference.group_correlation(maps, mean, groups, 4, positive)
    got = kernels.group_correlation(maps, mean, groups, 4, positive)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    arguments = (torch.tensor(2.0, dtype=torch.float64, device=DEVICE), maps, mean, groups)
    grad = kernels.group_correlation_backward(*arguments, positive, *got[1:])
    want = reference.group_correlation_backward(*arguments, positive, *expected[1:])
    assert grad.stride() == want.stride()
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)
