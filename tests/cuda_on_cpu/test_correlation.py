"""CUDA kernels of the correlation family on the CPU, beyond the parity suite in tests/ops.

Every way to go through maps: in registers of two widths, in tiles after their norms were found, and
channels side by side.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.reference import correlation as reference

# Batch, filters, height, width; groups.
SHAPES = {
    "narrow_registers": ((2, 37, 3, 5), 3),
    "wide_registers": ((2, 9, 13, 11), 4),
    "tiles": ((1, 11, 17, 31), 3),
    "several_ballots": ((1, 300, 2, 2), 2),
    "many_groups": ((1, 40, 2, 3), 300),
    "many_positions": ((1, 2, 33, 40), 2),
}


def arguments(name: str, layout: str, *, counted: bool = False) -> tuple[Any, ...]:
    """With a dead filter, and an image that does not count and holds NaN."""
    shape, num_groups = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64).relu()
    mean = torch.rand(shape[1:], generator=generator, dtype=torch.float64)
    maps[0, 1] = mean[1]
    positive = None
    if counted:
        maps = torch.cat([maps, torch.full_like(maps[:1], torch.nan)])
        positive = torch.tensor([True] * shape[0] + [False])
    if layout == "channels_last":
        maps = maps.contiguous(memory_format=torch.channels_last)
    groups = torch.randint(0, min(num_groups, shape[1]), shape[1:2], generator=generator)
    return maps, mean, groups, num_groups, positive


def assert_equals_the_reference(kernels: dict[str, Callable[..., Any]], given: Any) -> Tensor:
    expected = reference.group_correlation(*given)
    got = kernels["group_correlation"](*given)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    maps, mean, groups, _, positive = given
    backward = (torch.tensor(-1.5, dtype=torch.float64), maps, mean, groups, positive)
    grad = kernels["group_correlation_backward"](*backward, *got[1:])
    want = reference.group_correlation_backward(*backward, *expected[1:])
    assert grad.stride() == want.stride()
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)
    return torch.cat([got[0][None], grad.flatten()])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("counted", [False, True])
def test_loss_and_gradient_equal_the_reference(
    kernels: dict[str, Callable[..., Any]], name: str, layout: str, counted: bool
) -> None:
    assert_equals_the_reference(kernels, arguments(name, layout, counted=counted))


# What the usual order gives, for all others.
IN_ORDER: dict[tuple[str, str], Tensor] = {}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_order_of_threads_and_blocks_does_not_change_a_bit(
    kernels: dict[str, Callable[..., Any]],
    name: str,
    layout: str,
    schedule: Callable[[], None],
) -> None:
    given = arguments(name, layout)
    if (name, layout) not in IN_ORDER:
        IN_ORDER[name, layout] = assert_equals_the_reference(kernels, given)
    schedule()
    assert torch.equal(assert_equals_the_reference(kernels, given), IN_ORDER[name, layout])


@pytest.mark.parametrize("group", [-1, 4, 2**40])
def test_a_group_out_of_range_ends_the_kernel(
    kernels: dict[str, Callable[..., Any]], group: int
) -> None:
    maps, mean, groups, *rest = arguments("wide_registers", "contiguous")
    groups[3] = group
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["group_correlation"](maps, mean, groups, *rest)


def test_malformed_arguments_are_refused(kernels: dict[str, Callable[..., Any]]) -> None:
    maps, mean, groups, num_groups, _ = arguments("wide_registers", "contiguous")
    forward, backward = kernels["group_correlation"], kernels["group_correlation_backward"]
    for changed, message in (
        ((maps[0], mean, groups, num_groups, None), r"maps: got . axes, want \[B, C, h, w\]"),
        ((maps.long(), mean, groups, num_groups, None), "(mean|maps): want float32"),
        ((maps, mean[1:], groups, num_groups, None), r"mean: got shape .*, want"),
        ((maps, mean.float(), groups, num_groups, None), "mean: want .* float64 for float64"),
        ((maps, mean, groups.int(), num_groups, None), "groups: want int64"),
        ((maps, mean, groups[1:], num_groups, None), "groups: got shape .*, want"),
        ((maps, mean, groups, num_groups, torch.ones(2)), "positive: want bool"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*changed)
    _, norms, sums, moments = forward(maps, mean, groups, num_groups, None)
    one = torch.ones((), dtype=torch.float64)
    for kept, message in (
        ((norms[1:], sums, moments), "norms: got shape .*, want"),
        ((norms, sums[:, 1:], moments), "sums: got shape .*, want"),
        ((norms, sums, moments[:1]), r"moments: want \[2, num_groups\]"),
        ((norms, sums.float(), moments), "sums: want float32, float64 for float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(one, maps, mean, groups, None, *kept)
