"""Correlation family: every backend's loss and gradient are those over pairs of filters."""

import math

import pytest
import torch
from torch import Tensor

from picnn_fast.functional import group_correlation_loss
from picnn_fast.reference import correlation as reference
from picnn_fast.reference.masking import accumulate_dtype
from tests.cases import case_id, in_turn, kernel_cases, pairwise
from tests.conftest import Backend
from tests.ops.cases import (
    DTYPES,
    assert_within,
    dense,
    epsilon,
    on_device,
    steps,
    ulp,
)
from tests.ops.test_templates_parity import LAYOUTS, maps
from tests.reference.test_correlation import pairwise_loss

MAIN = LAYOUTS[:2]
NOT_FINITE = (math.nan, math.inf, -math.inf)
GROUPINGS = ("several", "one", "each its own")


def mean_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(shape[1:], generator=generator, dtype=torch.float64) / 2).to(dtype)


def grouping(name: str, filters: int) -> Tensor:
    generator = torch.Generator().manual_seed(filters)
    if name == "one":
        return torch.zeros(filters, dtype=torch.int64)
    if name == "each its own":
        return torch.randperm(filters, generator=generator)
    # Of the groups up to the last some are empty.
    return torch.randint(0, min(filters, 5), (filters,), generator=generator)


def assert_is_the_loss_over_pairs(
    backend: Backend, x: Tensor, mean: Tensor, groups: Tensor, positive: Tensor | None = None
) -> None:
    """Loss and gradient, within rounding; in float64 to 1e-10."""
    leaf = on_device(backend.device, x).requires_grad_()
    on = {"groups": groups, "mean": mean}
    if positive is not None:
        on["positive"] = positive
    on = {name: value.to(backend.device) for name, value in on.items()}
    loss = group_correlation_loss(leaf, **on)
    (grad,) = torch.autograd.grad(3 * loss, leaf)

    exact = x.detach().double().requires_grad_()
    counted = torch.ones(len(x)) if positive is None else positive
    accumulate = accumulate_dtype(x.dtype)
    expected = pairwise_loss(exact, mean.to(accumulate).double(), groups, counted)
    (want,) = torch.autograd.grad(3 * expected, exact)
    assert (loss.shape, loss.dtype) == ((), accumulate)
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    if dense(x):
        assert steps(grad) == steps(x)
    if x.dtype == torch.float64:
        torch.testing.assert_close(loss.detach().cpu(), expected.detach(), rtol=0, atol=1e-10)
        # Below the least norm gradients are as large as 1 / 1e-5.
        largest = max(1.0, want.abs().max().item())
        torch.testing.assert_close(grad.cpu(), want, rtol=0, atol=1e-10 * largest)
        return
    size = 64 * epsilon(accumulate)
    # Each gradient is a difference of sums over a map and a group.
    slack = torch.full_like(want, size * max(1.0, want.abs().max().item()))
    assert_within(loss, expected, torch.tensor(size * (1 + abs(expected.item()))))
    assert_within(grad, want, slack + ulp(want, x.dtype))


@kernel_cases(
    ("name", "dtype", "layout", "shape"),
    pairwise(GROUPINGS, (torch.float32, torch.float64), MAIN, [(3, 20, 7, 7), (1, 33, 4, 5)]),
    in_turn(GROUPINGS, (torch.float32, torch.float64), MAIN, [(1, 33, 4, 5)]),
)
def test_one_group_many_groups_and_as_many_as_filters(backend: Backend, name, dtype, layout, shape):
    x = maps(shape, layout, dtype)
    groups = grouping(name, shape[1])
    assert_is_the_loss_over_pairs(backend, x, mean_of(shape, torch.float64), groups)


@kernel_cases(
    ("counted", "dtype", "layout", "side"),
    pairwise(
        [(1, 1, 1), (0, 1, 0), (1, 0, 1)], [torch.bool, torch.int64, torch.uint8], MAIN, [5, 17]
    ),
    in_turn(
        [(1, 1, 1), (0, 1, 0), (1, 0, 1)], [torch.bool, torch.int64, torch.uint8], MAIN, [17, 5]
    ),
)
def test_images_that_do_not_count_may_hold_anything(backend: Backend, counted, dtype, layout, side):
    shape = (3, 7, side, 5)
    x = maps(shape, layout, torch.float32)
    positive = torch.tensor(counted).to(dtype)
    mean, groups = mean_of(shape, torch.float32), grouping("several", 7)
    assert_is_the_loss_over_pairs(backend, x, mean, groups, positive)
    leaf = on_device(backend.device, x)
    clean = group_correlation_loss(
        leaf, mean.to(leaf.device), groups.to(leaf.device), positive=positive.to(leaf.device)
    )
    leaf[positive.to(leaf.device) == 0] = math.nan
    leaf.requires_grad_()
    loss = group_correlation_loss(
        leaf, mean.to(leaf.device), groups.to(leaf.device), positive=positive.to(leaf.device)
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(loss, clean)
    assert not grad[positive.to(leaf.device) == 0].any()
    assert grad.isfinite().all()


@kernel_cases(
    ("layout", "dtype", "batch"),
    in_turn(MAIN, DTYPES, [0, 0, 2, 2]),
    in_turn(MAIN, DTYPES, [0, 2, 2, 0]),
)
def test_without_an_image_the_loss_is_zero_and_so_is_the_gradient(
    backend: Backend, layout, dtype, batch
):
    shape = (batch, 5, 3, 3)
    x = on_device(backend.device, maps(shape, layout, dtype)).requires_grad_()
    positive = torch.zeros(batch, dtype=torch.bool, device=x.device)
    mean = mean_of(shape, torch.float32).to(x.device)
    groups = grouping("several", 5).to(x.device)
    loss = group_correlation_loss(x, mean, groups, positive=positive if batch else None)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.shape == x.shape
    assert not grad.any()


@kernel_cases(
    ("dtype", "layout", "value"),
    in_turn(DTYPES, ["contiguous", "channels_last", "batch_innermost"], NOT_FINITE),
    in_turn(DTYPES, ["contiguous", "channels_last"], NOT_FINITE),
)
def test_a_value_that_is_not_finite_makes_loss_and_gradient_nan(
    backend: Backend, dtype, layout, value
):
    x = maps((2, 5, 3, 4), layout, dtype)
    x[1, 2, 2, 1] = value
    leaf = on_device(backend.device, x).requires_grad_()
    mean = mean_of(x.shape, torch.float32).to(leaf.device)
    loss = group_correlation_loss(leaf, mean, grouping("several", 5).to(leaf.device))
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isnan().all()


@kernel_cases(
    ("layout", "dtype", "side"),
    pairwise(MAIN, (torch.float32, torch.float64), [4, 18]),
    [("contiguous", torch.float32, 18), ("channels_last", torch.float64, 4)],
)
def test_dead_filters_are_similar_by_one(backend: Backend, layout, dtype, side):
    shape = (2, 6, side, 16)
    x = maps(shape, layout, dtype)
    mean = mean_of(shape, dtype)
    x[:, 1] = mean[1]
    x[1, 4] = mean[4]
    x[0, 5] = mean[5]
    x[0, 5, 0, 0] += 2e-6  # below the floor, not dead
    assert_is_the_loss_over_pairs(backend, x, mean, torch.tensor([0, 0, 1, 1, 2, 2]))
    x[:] = mean
    leaf = on_device(backend.device, x).requires_grad_()
    groups = torch.tensor([0, 0, 1, 1, 2, 2], device=leaf.device)
    loss = group_correlation_loss(leaf, mean.to(leaf.device), groups)
    assert loss.item() == pytest.approx(-1, abs=1e-5)
    assert not torch.autograd.grad(loss, leaf)[0].any()


@kernel_cases(["layout"], [(*MAIN[:1],), (*MAIN[1:],), ("sliced",)], [("channels_last",)])
def test_maps_that_no_tile_holds(backend: Backend, layout):
    shape = (1, 3, 65, 66)
    x = maps(shape, layout, torch.float32)
    assert_is_the_loss_over_pairs(backend, x, mean_of(shape, torch.float32), grouping("several", 3))


def test_more_groups_than_are_in_use_change_nothing(backend: Backend):
    x = maps((2, 6, 3, 3)).to(backend.device)
    mean = mean_of(x.shape, torch.float32).to(x.device)
    groups = grouping("several", 6).to(x.device)
    losses = [group_correlation_loss(x, mean, groups, num_groups=n) for n in (None, 5, 40)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_gradients_beyond_the_cache(cpp: Backend, layout, dtype):
    """Large enough to be written past the caches."""
    shape = (5, 500, 31, 31)
    x = maps(shape, layout, dtype).requires_grad_()
    mean, groups = mean_of(shape, torch.float32), grouping("several", 500)
    (grad,) = torch.autograd.grad(group_correlation_loss(x, mean, groups), x)
    arguments = (x.detach(), mean, groups, 5, None)
    kept = reference.group_correlation(*arguments)[1:]
    expected = reference.group_correlation_backward(torch.tensor(1.0), *arguments[:3], None, *kept)
    slack = torch.full_like(grad, 4e-6 * expected.abs().max().item(), dtype=torch.float64)
    assert_within(grad, expected.double(), slack + ulp(expected.double(), dtype))


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_group_out_of_range_is_refused_by_the_operator(backend: Backend, wrong):
    if backend.device.type == "cuda":
        pytest.skip("a failed device assertion ends the process")
    x, groups = torch.ones(2, 3, 2, 2), torch.tensor([0, wrong, 2])
    message = rf"groups: (got {wrong}, want|want indices in) \[0, 3\)|0 <= g && g < G"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.group_correlation(x, x[0], groups, 3, None)


@pytest.mark.parametrize("sides", [(0, 4), (4, 0)], ids=str)
def test_maps_of_no_position_are_refused_by_the_operators(backend: Backend, sides):
    """Where they are asked for shapes alone, too."""
    for device in (backend.device, torch.device("meta")):
        x = torch.ones(2, 3, *sides, device=device)
        groups, norms = torch.zeros(3, dtype=torch.int64, device=device), x.new_ones(2, 3)
        kept = norms, x.new_ones(2, 1, 0), x.new_ones(2, 1)
        with pytest.raises(RuntimeError, match=r"maps: got .*, want at least one position"):
            torch.ops.picnn_fast.group_correlation(x, x[0], groups, 1, None)
        with pytest.raises(RuntimeError, match=r"maps: got .*, want at least one position"):
            torch.ops.picnn_fast.group_correlation_backward(
                x.new_ones(()), x, x[0], groups, None, *kept
            )


# which argument of the operator, in place of a good one; the message
WRONG = {
    "mean": (1, torch.ones(3, 2, 3), r"mean: got shape \[3, 2, 3\], want \[3, 2, 2\]"),
    "mean of another dtype": (1, torch.ones(3, 2, 2, dtype=torch.float64), "mean: want float32"),
    "groups": (2, torch.zeros(4, dtype=torch.int64), r"groups: got shape \[4\], want \[3\]"),
    "positive": (4, torch.ones(3, dtype=torch.bool), r"positive: got shape \[3\], want \[2\]"),
    "positive of another dtype": (4, torch.ones(2), "positive: want bool"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_compiled_kernels_refuse_tensors_of_another_shape_or_dtype(cpp: Backend, name):
    x = torch.ones(2, 3, 2, 2)
    good = [x, x[0], torch.tensor([0, 1, 2]), 3, None]
    position, wrong, message = WRONG[name]
    bad = [*good[:position], wrong, *good[position + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.group_correlation(*bad)
    _, norms, sums, moments = torch.ops.picnn_fast.group_correlation(*good)
    kept = [bad[0], bad[1], bad[2], bad[4], norms, sums, moments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.group_correlation_backward(torch.tensor(1.0), *kept)
    for index in (4, 5, 6):
        less = [good[0], good[1], good[2], good[4], norms, sums, moments]
        less[index] = less[index][:1]
        with pytest.raises(RuntimeError, match="got shape"):
            torch.ops.picnn_fast.group_correlation_backward(torch.tensor(1.0), *less)
