"""CUDA kernels of the template family on the CPU, beyond the parity suite in tests/ops.

Every way to share a map among threads: several maps to a warp, a warp, a block, and channels side
by side, with maps that fit in registers and maps that are read twice.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.reference import templates as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TEMPLATES = {
    "gradient": PartTemplate(),
    "gradient_l2": PartTemplate("l2"),
    "uniform": PartTemplate("l1", "uniform", beta=4.0),
    "table": PartTemplate(profile=torch.linspace(-1, 1, 399 * 399).cos().view(399, 399)),
}
# Batch, filters, height, width.
SHAPES = {
    "maps_share_a_warp": (3, 13, 7, 5),
    "warp": (2, 9, 13, 11),
    "vectors_share_a_warp": (3, 5, 14, 14),
    "block": (1, 2, 33, 40),
    "block_reads_twice": (1, 2, 67, 64),
    "wide_tile": (1, 37, 3, 5),
    "narrow_tile": (2, 3, 20, 21),
}


def maps(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """With ties, a NaN, infinities and a map of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=generator)).round().relu().to(dtype)
    x[0, 0, -1, -1] = torch.nan
    x[-1, -1, 0, -1], x[-1, -1, -1, 0] = torch.inf, -torch.inf
    x[-1, 1] = 0
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        memory = torch.zeros(*shape[:3], 2 * shape[3], dtype=dtype)
        memory[..., 1::2] = x
        return memory[..., 1::2]
    if layout == "not_aligned":
        memory = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(shape)
        return memory.copy_(x)
    return x


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "template"),
    [
        *itertools.product(
            SHAPES, ("contiguous", "channels_last", "strided"), [torch.float32], ["gradient"]
        ),
        *itertools.product(
            ["warp", "wide_tile"], ("contiguous", "channels_last"), DTYPES[1:], ["gradient_l2"]
        ),
        *itertools.product(["vectors_share_a_warp"], ["contiguous"], DTYPES[1:], ["gradient_l2"]),
        ("vectors_share_a_warp", "not_aligned", torch.float32, "gradient"),
        *itertools.product(["warp", "block"], ["contiguous"], [torch.float32], list(TEMPLATES)[2:]),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_mask_layer_equals_the_reference_bit_for_bit(
    kernels: dict[str, Callable[..., Any]],
    shape: str,
    layout: str,
    dtype: torch.dtype,
    template: str,
) -> None:
    x = maps(SHAPES[shape], layout, dtype)
    offsets = TEMPLATES[template].offsets_for(*x.shape[2:], x)
    expected, peak = reference.template_mask(x, offsets, 0.7)
    masked, found = kernels["template_mask"](x, offsets, 0.7)
    assert torch.equal(found, peak)
    assert masked.stride() == expected.stride()
    assert torch.equal(masked.nan_to_num(3), expected.nan_to_num(3))
    grad = torch.randn_like(x)
    got = kernels["template_mask_backward"](grad, peak.mT.contiguous().mT, offsets, 0.7)
    assert torch.equal(got, reference.template_mask_backward(grad, peak, offsets, 0.7))
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_order_of_threads_and_blocks_does_not_matter(
    kernels: dict[str, Callable[..., Any]],
    shape: str,
    layout: str,
    schedule: Callable[[], None],
) -> None:
    schedule()
    x = maps(SHAPES[shape], layout, torch.float32)
    offsets = TEMPLATES["gradient"].offsets_for(*x.shape[2:], x)
    expected = reference.template_mask(x, offsets, 1.0)
    got = kernels["template_mask"](x, offsets, 1.0)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0].nan_to_num(3), expected[0].nan_to_num(3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("position", [-1, 20, 2**40])
def test_a_peak_outside_the_map_ends_the_kernel(
    kernels: dict[str, Callable[..., Any]], layout: str, position: int
) -> None:
    x = maps((1, 6, 5, 4), layout, torch.float32)
    offsets = TEMPLATES["table"].offsets_for(5, 4, x)
    peak = torch.zeros(1, 6, dtype=torch.int64)
    peak[0, 4] = position
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["template_mask_backward"](x, peak, offsets, 1.0)


def test_malformed_arguments_are_refused(kernels: dict[str, Callable[..., Any]]) -> None:
    x = torch.zeros(2, 3, 4, 5)
    offsets = TEMPLATES["table"].offsets_for(4, 5, x)
    peak = torch.zeros(2, 3, dtype=torch.int64)
    mask, backward = kernels["template_mask"], kernels["template_mask_backward"]
    for operator, arguments, message in (
        (mask, (x[0], offsets), r"x: want maps \[B, N, h, w\]"),
        (mask, (x.long(), offsets), "x: want float32, float64, bfloat16 or float16"),
        (mask, (x, offsets[1:]), "offsets: got shape .*, want"),
        (mask, (x, offsets.double()), "offsets: want float32"),
        (backward, (x, peak.int(), offsets), "peak: want int64"),
        (backward, (x, peak[:, :2], offsets), "peak: got shape .*, want"),
        (backward, (x[0], peak, offsets), r"grad_masked: want maps \[B, N, h, w\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, 1.0)
