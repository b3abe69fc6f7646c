"""Filter loss under autograd, torch.compile, autocast and opcheck, on every backend."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.functional import filter_loss
from picnn_fast.ops.filter_loss import FilterLossState
from picnn_fast.reference import filter_loss as reference
from tests.conftest import Backend
from tests.reference.test_filter_loss import TEMPLATES, all_templates, of_filter, running_loss

SHAPE = (3, 2, 3, 4)
ESTIMATORS = ("batch", "running", "target")


def leaf(
    device: torch.device, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) + 0.5).relu() * 20
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(device, dtype).requires_grad_()


def options(estimator: str, x: Tensor) -> dict:
    """A state that has seen something, and categories."""
    if estimator == "batch":
        return {}
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = FilterLossState.empty(*SHAPE[1:], momentum=0.25, dtype=dtype, device=x.device)
    state.log_mean.copy_(torch.linspace(-1, 1, state.log_mean.numel()).view_as(state.log_mean))
    state.log_ratio.copy_(torch.tensor([0.3, 0.1]))
    if estimator == "running":
        return {"estimator": estimator, "state": state}
    labels = torch.tensor([0, 1, 1], device=x.device)
    mine = torch.tensor([1, 0], device=x.device)
    return {"estimator": estimator, "state": state, "labels": labels, "filter_category": mine}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_gradient_over_the_batch_is_that_of_the_definition(backend: Backend, name):
    x = leaf(backend.device)
    template = TEMPLATES[name]
    weight = torch.tensor([1.0, -2.5], dtype=torch.float64, device=x.device)
    loss = filter_loss(x, template)
    (grad,) = torch.autograd.grad(loss, x, weight)

    exact = x.detach().cpu().requires_grad_()
    arguments = (template.offsets_for(3, 4, exact), template.tau_for(3, 4))
    want = reference.definition(exact, *arguments)
    (expected,) = torch.autograd.grad(want, exact, weight.cpu())
    assert expected.any()
    torch.testing.assert_close(loss.detach().cpu(), want.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(grad.cpu(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", ["running", "target"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_running_gradients_are_their_formulas(backend: Backend, estimator, name):
    x = leaf(backend.device)
    given = options(estimator, x)
    state = given["state"]
    before = state.log_mean.tolist(), state.log_ratio.tolist()
    loss = filter_loss(x, TEMPLATES[name], **given)
    (grad,) = torch.autograd.grad(loss.sum(), x)

    rows = all_templates(TEMPLATES[name], 3, 4)
    for i in range(2):
        maps = of_filter(x.detach().cpu(), i)
        assigned = None
        if estimator == "target":
            # T of the peak where the image is of the filter's category, else the negative one.
            assigned = [
                row.index(max(row)) if label == mine else 12
                for row, label, mine in zip(maps, [0, 1, 1], [[1, 0][i]] * 3, strict=True)
            ]
        want = running_loss(maps, rows, before[0][i], before[1][i], 0.25, assigned)
        got = (loss[i], grad[:, i].flatten(1), state.log_mean[i], state.log_ratio[i])
        for one, two in zip(got, want, strict=True):
            expected = torch.tensor(two, dtype=torch.float64).view(one.shape)
            torch.testing.assert_close(one.detach().cpu(), expected, rtol=1e-9, atol=1e-10)


def test_without_categories_every_image_is_of_every_filter(backend: Backend):
    x = leaf(backend.device)
    losses = []
    for categories in (
        {},
        {
            "labels": torch.zeros(3, dtype=torch.int64, device=x.device),
            "filter_category": torch.zeros(2, dtype=torch.int64, device=x.device),
        },
    ):
        state = options("running", x)["state"]
        losses.append(filter_loss(x, PartTemplate(), estimator="target", state=state, **categories))
    assert torch.equal(*losses)


def test_the_gradient_is_differentiable_in_the_weight_of_the_loss(backend: Backend):
    x = leaf(backend.device)
    weight = torch.tensor([1.0, -2.5], dtype=x.dtype, device=x.device, requires_grad=True)
    loss = filter_loss(x, PartTemplate())
    (plain,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    (grad,) = torch.autograd.grad((loss * weight).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), weight)
    assert got.all()
    torch.testing.assert_close(got, 2 * weight.detach() * plain.square().sum((0, 2, 3)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_gradient_is_computed_unless_it_is_asked_for(backend: Backend, estimator):
    x = leaf(backend.device)
    expected = filter_loss(x, PartTemplate(), **options(estimator, x))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = filter_loss(x, PartTemplate(), **options(estimator, x))
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected)
    loss = filter_loss(x.detach(), PartTemplate(), **options(estimator, x))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    template = PartTemplate()
    arguments = (template.offsets_for(3, 4, x), template.tau_for(3, 4))
    for with_grad, count in ((False, 0), (True, x.numel())):
        grad = torch.ops.picnn_fast.filter_loss(x.detach(), *arguments, with_grad)[1]
        assert grad.numel() == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_grad", [True, False])
def test_shape_functions_hold_with_and_without_the_gradient(dtype, with_grad):
    x = leaf(torch.device("cpu"), dtype).detach()
    state = options("running", x)["state"]
    for shaped in (x, x[:0], x.contiguous(memory_format=torch.channels_last)):
        arguments = (TEMPLATES["l1"].offsets_for(3, 4, shaped), 0.01, with_grad)
        running = (shaped, state.log_mean, state.log_ratio, 0.5, None, *arguments)
        for operator, given in (
            (torch.ops.picnn_fast.filter_loss, (shaped, *arguments)),
            (torch.ops.picnn_fast.filter_loss_running, running),
        ):
            torch.library.opcheck(
                operator.default, given, test_utils=("test_schema", "test_faketensor")
            )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_into_one_graph(estimator):
    x = leaf(torch.device("cpu"))

    def loss(x: Tensor, **given: object) -> Tensor:
        return filter_loss(x.sin() * 20, TEMPLATES["l2"], **given).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    states = [options(estimator, x), options(estimator, x)]
    got, expected = compiled(x, **states[0]), loss(x, **states[1])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
    if estimator != "batch":
        one, two = (given["state"] for given in states)
        torch.testing.assert_close(one.log_mean, two.log_mean)
        torch.testing.assert_close(one.log_ratio, two.log_ratio)
