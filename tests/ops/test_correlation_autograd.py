"""The losses of ICCNN under autograd, torch.compile, autocast and opcheck, on every backend."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from picnn_fast.functional import group_class_loss, group_correlation_loss
from tests.cases import in_turn
from tests.conftest import Backend

SHAPE = (3, 5, 3, 4)
GROUPS = (0, 2, 1, 2, 2)


def leaf(
    device: torch.device, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).relu()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat((x, x), 1)[:, 2:7]
    return x.to(device, dtype).requires_grad_()


def options(x: Tensor) -> dict:
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(SHAPE[1:], generator=generator, dtype=torch.float64) / 2
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return {
        "mean": mean.to(x.device, wide),
        "groups": torch.tensor(GROUPS, device=x.device),
        "num_groups": 3,
    }


def loss_of(x: Tensor, **more: object) -> Tensor:
    return group_correlation_loss(x, **options(x) | more)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layout", "counted"),
    in_turn(["contiguous", "channels_last", "sliced"], [None, (True, False, True)]),
    ids=str,
)
def test_gradcheck(backend: Backend, layout, counted):
    x = leaf(backend.device, layout=layout)
    positive = None if counted is None else torch.tensor(counted, device=x.device)
    assert gradcheck(lambda t: loss_of(t, positive=positive), x, fast_mode=backend.slow)


def test_gradcheck_of_the_class_loss():
    x = leaf(torch.device("cpu"))
    groups, labels = torch.tensor(GROUPS), torch.tensor([0, 1, 0])
    assert gradcheck(lambda t: group_class_loss(t, groups, labels, 2), x)
    assert torch.autograd.gradgradcheck(lambda t: group_class_loss(t, groups, labels, 2), x)


def test_second_derivatives_are_refused_never_zero(backend: Backend):
    x = leaf(backend.device)
    refused = pytest.raises(
        RuntimeError, match=r"^group_correlation_backward: .* no derivative of it is offered$"
    )
    for function in (
        loss_of,
        lambda x: loss_of(x).square(),
        lambda x: loss_of(x) + x.pow(3).sum(),
    ):
        with refused:
            torch.autograd.functional.hessian(function, x)
        (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
        with refused:
            torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_reverse_mode_and_vmap_of_torch_func(backend: Backend):
    x = leaf(backend.device)
    values, given = x.detach(), options(x)  # drawn outside: vmap refuses to

    def loss(maps: Tensor) -> Tensor:
        return group_correlation_loss(maps, **given)

    (want,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(values), want)
    torch.testing.assert_close(torch.func.jacrev(loss)(values), want)
    each = torch.stack([torch.func.grad(loss)(image[None])[0] for image in values])
    of_each = torch.func.grad(lambda image: loss(image[None]))
    torch.testing.assert_close(torch.func.vmap(of_each)(values), each)
    losses = torch.func.vmap(lambda image: loss(image[None]))(x)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), x)[0], each)
    with pytest.raises(RuntimeError, match=r"^group_correlation_backward: .* no derivative of it"):
        torch.func.jacrev(torch.func.grad(loss))(values)


def test_forward_mode_is_refused(backend: Backend):
    x = leaf(backend.device).detach()
    refused = pytest.raises(RuntimeError, match=r"^group_correlation: got forward-mode")
    with refused:
        torch.func.jvp(loss_of, (x,), (x,))
    with refused, torch.autograd.forward_ad.dual_level():
        loss_of(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_maps_changed_in_place_after_the_forward_pass_are_refused(backend: Backend):
    x = leaf(backend.device)
    maps = x * 1
    loss = loss_of(maps)
    maps.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_accumulate_in_float32(backend: Backend, dtype):
    x = leaf(backend.device, dtype)
    wide = x.detach().float().requires_grad_()
    losses = [loss_of(t) for t in (x, wide)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(value, t)[0] for value, t in zip(losses, (x, wide), strict=True)]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("num_groups", "counted"), [(None, [True, False, True]), (3, None)], ids=str
)
def test_compiles_into_one_graph(cpp: Backend, num_groups, counted):
    """The graph of every backend; which operators it calls, the conformance suite asks of each."""
    x = leaf(cpp.device)
    positive = None if counted is None else torch.tensor(counted, device=x.device)
    labels = torch.tensor([0, 1, 0], device=x.device)

    given = options(x) | {"num_groups": num_groups, "positive": positive}

    def total(x: Tensor) -> Tensor:
        maps = x.sin()
        loss = group_correlation_loss(maps, **given)
        return loss + group_class_loss(maps, given["groups"], labels, 2, num_groups=num_groups)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), total(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_for_a_batch_whose_size_only_a_run_tells(cpp: Backend):
    def loss(maps: Tensor, kept: Tensor) -> Tensor:
        return group_correlation_loss(maps[kept], mean, groups, num_groups=2)

    maps, mean, groups = torch.rand(4, 3, 2, 2), torch.zeros(3, 2, 2), torch.tensor([0, 0, 1])
    kept = torch.tensor([True, False, True, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        assert torch.equal(compiled(maps, kept), loss(maps, kept))


def test_autocast_leaves_the_class_loss_in_float32():
    x = leaf(torch.device("cpu"), torch.float32)
    arguments = (torch.tensor(GROUPS), torch.tensor([0, 1, 0]), 2)
    expected = group_class_loss(x, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss = group_class_loss(x, *arguments)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))
