"""Template family under autograd, torch.compile, autocast and opcheck, on every backend."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.autograd import gradcheck, gradgradcheck

from picnn_fast import PartTemplate
from picnn_fast.functional import template_mask
from picnn_fast.layers import TemplateMask
from tests.conftest import Backend
from tests.ops.test_conformance import OPCHECKS
from tests.ops.test_masking_autograd import assert_same_second_derivatives

SHAPE = (2, 3, 4, 3)
TEMPLATES = {
    "l1": PartTemplate("l1", beta=1.5),
    "l2": PartTemplate("l2", beta=1.5),
    "uniform": PartTemplate("l2", "uniform"),
    "table": PartTemplate(
        profile=torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) - 0.3
    ),
}


def leaf(device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Maps whose values are far enough apart that no small change moves a peak."""
    generator = torch.Generator().manual_seed(0)
    count = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
    values = torch.randperm(count, generator=generator).double() / 8 - 3
    return values.view(SHAPE).to(device, dtype).requires_grad_()


def masks(x: Tensor, template: PartTemplate, scale: float = 1.0) -> Tensor:
    """From the table, entry by entry."""
    h, w = x.shape[2:]
    table = template.table(h, w).double().clamp_min(0) * scale
    peak = x.detach().cpu().flatten(2).argmax(-1)
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, n in torch.cartesian_prod(torch.arange(len(x)), torch.arange(x.shape[1])).tolist():
        i, j = divmod(peak[b, n].item(), w)
        out[b, n] = table[h - 1 - i : 2 * h - 1 - i, w - 1 - j : 2 * w - 1 - j]
    return out.to(x.device)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_a_constant_in_the_backward_pass(backend: Backend, name):
    x = leaf(backend.device)
    masked, peak = template_mask(x, TEMPLATES[name], scale=2.0)
    mask = masks(x, TEMPLATES[name], 2.0)
    torch.testing.assert_close(masked, (x * mask).detach(), rtol=1e-6, atol=1e-6)
    weight = torch.arange(float(x.numel()), device=x.device).view_as(x).double()
    (grad,) = torch.autograd.grad((masked * weight).sum(), x)
    torch.testing.assert_close(grad, weight * mask, rtol=1e-6, atol=1e-6)
    assert masked.requires_grad
    assert not peak.requires_grad


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(backend: Backend, name, layout):
    x = leaf(backend.device).detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert gradcheck(
        lambda t: template_mask(t, TEMPLATES[name])[0],
        x.requires_grad_(),
        fast_mode=backend.slow,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_second_derivatives_are_those_of_a_constant_mask(backend: Backend, name):
    x = leaf(backend.device).detach()[:1, :2].requires_grad_()
    mask = masks(x, TEMPLATES[name], 2.0)
    weight = torch.arange(float(x.numel()), device=x.device).view_as(x).double()

    def ours(x: Tensor) -> Tensor:
        return (template_mask(x, TEMPLATES[name], scale=2.0)[0].sin() * weight).sum()

    assert_same_second_derivatives(
        backend, ours, lambda x: ((x * mask).sin() * weight).sum(), (x,), 1e-5
    )
    assert gradgradcheck(lambda x: template_mask(x, TEMPLATES[name])[0], x, fast_mode=backend.slow)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_may_be_asked_for_twice(backend: Backend, layout):
    x = leaf(backend.device, torch.float32).detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    total = template_mask(x.requires_grad_(), TEMPLATES["l1"])[0].square().sum()
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x, create_graph=True)
    assert torch.equal(first, second)
    assert first.stride() == second.stride() == x.stride()


def test_a_peak_alone_sends_nothing_back(backend: Backend):
    x = leaf(backend.device)
    masked, peak = template_mask(x, TEMPLATES["l1"])
    assert peak.dtype == torch.int64
    (grad,) = torch.autograd.grad(masked.sum() * 0 + x.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_an_inplace_layer_may_follow(backend: Backend):
    x = leaf(backend.device)
    before = x.detach().clone()
    masked, _ = template_mask(x, TEMPLATES["l1"])
    assert not masked._is_view()
    out = torch.nn.ReLU(inplace=True)(masked)
    assert out.data_ptr() == masked.data_ptr()
    assert torch.equal(x, before)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    mask = masks(x, TEMPLATES["l1"])
    torch.testing.assert_close(grad, 2 * (x.detach() * mask).relu() * mask, rtol=1e-6, atol=1e-6)


def test_inference_mode_and_no_grad_give_the_same_forward(backend: Backend):
    x = leaf(backend.device)
    expected = template_mask(x, TEMPLATES["l2"])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for one, two in zip(template_mask(x, TEMPLATES["l2"]), expected, strict=True):
                assert torch.equal(one, two)
                assert not one.requires_grad


def test_the_operator_called_directly_is_differentiable(backend: Backend):
    x = leaf(backend.device)
    offsets = TEMPLATES["table"].offsets_for(4, 3, x)
    direct = torch.ops.picnn_fast.template_mask(x, offsets, 1.0)
    public = template_mask(x, TEMPLATES["table"])
    for one, two in zip(direct, public, strict=True):
        assert torch.equal(one, two)
    got, expected = (torch.autograd.grad(t[0].square().sum(), x)[0] for t in (direct, public))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(backend: Backend, name, layout):
    if backend.slow and layout != "contiguous" and name != "l1":
        pytest.skip("one template is enough where every thread is run by itself")
    x = leaf(backend.device, torch.float32).detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat((x, x), 1)[:, 1:4]
    arguments = (TEMPLATES[name].offsets_for(4, 3, x), 1.0)
    ops = torch.ops.picnn_fast
    results = torch.library.opcheck(ops.template_mask.default, (x.requires_grad_(), *arguments))
    assert set(results) == OPCHECKS
    peak = x.detach().flatten(2).argmax(-1)
    grad_masked = torch.ones_like(x).detach()
    results = torch.library.opcheck(
        ops.template_mask_backward.default, (grad_masked, peak, *arguments)
    )
    assert set(results) == OPCHECKS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_shape_functions_hold_for_every_dtype(backend: Backend, dtype):
    x = leaf(backend.device, dtype).detach()
    for shaped in (x, x[:0], x[:, :0]):
        arguments = (TEMPLATES["table"].offsets_for(4, 3, shaped), 1.0)
        torch.library.opcheck(
            torch.ops.picnn_fast.template_mask.default,
            (shaped, *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("scale", [0.5, "tau"])
def test_compiles_into_one_graph(backend: Backend, name, scale):
    x = leaf(backend.device)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        masked, peak = template_mask(x.sin(), TEMPLATES[name], scale=scale)
        return masked.relu_().square().sum(), peak

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), loss(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got[0], x), torch.autograd.grad(expected[0], x))


def test_autocast_keeps_the_maps_type(backend: Backend):
    convolution = torch.nn.Conv2d(3, 4, 3).to(backend.device)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast(backend.device.type, torch.bfloat16):
        maps = convolution(images.to(backend.device))
        masked, _ = template_mask(maps, TEMPLATES["l1"])
    assert maps.dtype == masked.dtype == torch.bfloat16
    masked.float().square().sum().backward()
    for t in convolution.parameters():
        assert t.grad.isfinite().all()
        assert t.grad.any()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_decomposition_is_the_operator_in_pytorchs_own(name, dtype):
    (decomposition,) = get_decompositions([torch.ops.picnn_fast.template_mask]).values()
    generator = torch.Generator().manual_seed(0)
    for shape in (SHAPE, (1, 2, 3, 2), (2, 3, 1, 1), (0, *SHAPE[1:]), (2, 0, *SHAPE[2:])):
        x = torch.randn(shape, generator=generator).to(dtype)
        x[:, :, -1:] = x[:, :, :1]  # equal peaks
        arguments = (TEMPLATES[name].offsets_for(*shape[2:], x), 0.5)
        expected = torch.ops.picnn_fast.template_mask(x, *arguments)
        torch.testing.assert_close(decomposition(x, *arguments), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_exported_mask_keeps_the_operator_until_it_is_decomposed(name):
    layer = TemplateMask(TEMPLATES[name])
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(layer, (torch.rand(SHAPE),), dynamic_shapes=({0: batch},))
        plain = program.run_decompositions(get_decompositions([torch.ops.picnn_fast.template_mask]))
        x = torch.rand(7, *SHAPE[1:])
        for each, kept in ((program, True), (plain, False)):
            assert any("picnn_fast" in str(node.target) for node in each.graph.nodes) is kept
            torch.testing.assert_close(each.module()(x), layer(x))
