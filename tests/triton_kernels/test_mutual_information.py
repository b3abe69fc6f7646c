"""Triton kernels of the mutual information family, beyond the parity suite in tests/ops."""

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.triton_kernels.conftest import Compiled

pytest.importorskip("triton")
kernels = pytest.importorskip("picnn_fast.triton_kernels.mutual_information")


def test_every_kernel_compiles_for_hopper_without_fused_multiply_adds(
    compiled: Compiled,
) -> None:
    """One would round distances otherwise than scikit-learn's brute-force search does."""
    names = {"runs_kernel", "samples_kernel", "few_others_kernel"}
    records = compiled["mutual_information"]
    assert {record["kernel"] for record in records} == names
    assert not any(record["fused"] for record in records)


@pytest.mark.parametrize("kernel", ["samples_kernel", "few_others_kernel"])
@pytest.mark.gpu(else_cpu=True)
def test_launcher_forbids_fused_multiply_adds(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **options: launches.append(options)

    monkeypatch.setattr(kernels, kernel, Recorder())
    device = "cuda" if HAS_GPU else "cpu"
    values = torch.zeros(1, 4, dtype=torch.float64, device=device)
    kernels.knn_mutual_information(values, torch.arange(4, device=device) // 2, 2, 1)
    assert [options["enable_fp_fusion"] for options in launches] == [False]


@pytest.mark.gpu(else_cpu=True)
def test_programs_that_share_filters_and_classes_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Programs of 16 lanes begin and end anywhere in a filter of 35 samples."""
    device = "cuda" if HAS_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 35, generator=generator, dtype=torch.float64).relu().to(device)
    # Classes of one sample, of few and of many, and an empty one.
    labels = torch.tensor([0, 1, 3] + 4 * [4] + 28 * [5])[torch.randperm(35, generator=generator)]
    labels = labels.to(device)
    expected = kernels.knn_mutual_information(values, labels, 6, 3)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    got = kernels.knn_mutual_information(values, labels, 6, 3)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


@pytest.mark.gpu(else_cpu=True)
def test_refusals_name_the_argument() -> None:
    device = "cuda" if HAS_GPU else "cpu"
    values = torch.zeros(1, 4, dtype=torch.float64, device=device)
    labels = torch.arange(4, device=device)
    with pytest.raises(ValueError, match="classes: got 4 and 1073741824, want fewer than 2"):
        kernels.knn_mutual_information(values, labels, 2**30, 3)
    if not HAS_GPU:  # there, a device-side assert, which ends the process's use of the GPU
        for labels_out_of_range in (labels - 1, labels + 1):
            with pytest.raises(RuntimeError, match=r"labels: want \[0, num_classes\)"):
                kernels.knn_mutual_information(values, labels_out_of_range, 4, 3)
