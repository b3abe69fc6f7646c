"""Template family under autograd, torch.compile, autocast and opcheck, on every backend."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._decomp import get_decompositions

from picnn_fast import PartTemplate
from picnn_fast.functional import template_mask
from picnn_fast.layers import TemplateMask
from tests.conftest import Backend

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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("scale", [0.5, "tau"])
def test_a_template_is_made_within_the_graph(name, scale):
    x = leaf(torch.device("cpu"))

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        masked, peak = template_mask(x.sin(), TEMPLATES[name], scale=scale)
        return masked.relu_().square().sum(), peak

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), loss(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got[0], x), torch.autograd.grad(expected[0], x))


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
