"""Triton kernels of the template family, beyond the parity suite in tests/ops."""

import pytest
import torch

from picnn_fast import PartTemplate
from picnn_fast.reference import templates as reference
from tests.conftest import HAS_GPU
from tests.triton_kernels.conftest import Compiled, types

pytest.importorskip("triton")
kernels = pytest.importorskip("picnn_fast.triton_kernels.templates")

DEVICE = "cuda" if HAS_GPU else "cpu"


def test_every_kernel_compiles_for_hopper_in_every_dtype_without_fused_multiply_adds(
    compiled: Compiled,
) -> None:
    """One would round masks otherwise than the reference does."""
    records = compiled["templates"]
    assert {record["kernel"] for record in records} == {"mask_kernel", "peaks_kernel"}
    for name in ("mask_kernel", "peaks_kernel"):
        assert types(records, name, "maps") == {"float32", "float64", "bfloat16", "float16"}
    assert not any(record["fused"] for record in records)


@pytest.mark.gpu(else_cpu=True)
def test_launcher_forbids_fused_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **options: launches.append(options)

    monkeypatch.setattr(kernels, "mask_kernel", Recorder())
    x = torch.ones(1, 2, 3, 3, device=DEVICE)
    offsets = PartTemplate().offsets_for(3, 3, x)
    _, peak = kernels.template_mask(x, offsets, 1.0)
    kernels.template_mask_backward(x, peak, offsets, 1.0)
    assert [options["enable_fp_fusion"] for options in launches] == [False, False]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.gpu(else_cpu=True)
def test_maps_longer_than_a_tile_give_the_same_bits(
    dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 8 positions of 35: peaks, ties, infinity and NaN in any of them."""
    monkeypatch.setattr(kernels, "LONGEST", 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (4, 6, 5, 7), generator=generator).to(dtype)
    x[0, :, 4, 6] = torch.nan
    x[0, 1, 1, 3] = torch.inf
    x[0, 2, 0, 5] = torch.nan
    x[1, :3] = 0
    x[1, 3:] = -torch.inf
    x[2, 0, 3, 3] = torch.inf
    x = x.to(DEVICE).contiguous(memory_format=layout)
    offsets = PartTemplate("l2", beta=1.5).offsets_for(5, 7, x)
    masked, peak = reference.template_mask(x, offsets, 0.7)
    got, got_peak = kernels.template_mask(x, offsets, 0.7)
    assert torch.equal(got_peak, peak)
    torch.testing.assert_close(got, masked, rtol=0, atol=0, equal_nan=True)
    assert got.stride() == masked.stride()
    grad = torch.randn(x.shape, generator=generator).to(x)
    torch.testing.assert_close(
        kernels.template_mask_backward(grad, peak, offsets, 0.7),
        reference.template_mask_backward(grad, peak, offsets, 0.7),
        rtol=0,
        atol=0,
    )


@pytest.mark.gpu(else_cpu=True)
def test_a_peak_off_the_map_reads_within_the_table() -> None:
    grad = torch.rand(1, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    profile = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) + 1
    offsets = PartTemplate(profile=profile).offsets_for(3, 5, grad)
    peak = torch.tensor([[-1, 15, 2**62, -(2**62)]], device=DEVICE)
    expected = reference.template_mask_backward(grad, peak.clamp(0, 14), offsets, 1.0)
    assert torch.equal(kernels.template_mask_backward(grad, peak, offsets, 1.0), expected)


def test_maps_up_to_64_x_64_are_held_at_once() -> None:
    """So they are read once: a program's tile takes in the whole map."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(1, 32, 64, 64, device="meta").contiguous(memory_format=layout)
        channels, positions, warps = kernels.tile(x.view(1, 32, 4096))
        assert positions == 4096
        assert channels == (kernels.NEAR if layout == torch.channels_last else 1)
        assert channels * positions <= 32 * 32 * warps  # 32 elements a thread
