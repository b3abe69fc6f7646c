"""Masking family under autograd, torch.compile, autocast and opcheck, on every backend."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from picnn_fast.functional import bernoulli_mask, class_gate, gumbel_mask, mask_channels
from tests.conftest import Backend

BATCH, FILTERS, CLASSES = 3, 5, 4
SEED = 17


def inputs(
    device: torch.device, dtype: torch.dtype = torch.float64, size: tuple[int, ...] = (2, 3)
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and correspondence, leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, FILTERS, *size, generator=generator, dtype=torch.float64)
    logits = torch.randn(BATCH, CLASSES, generator=generator, dtype=torch.float64)
    correspondence = torch.rand(CLASSES, FILTERS, generator=generator, dtype=torch.float64)
    return tuple(t.to(device, dtype).requires_grad_() for t in (features, logits, correspondence))


def straight_through(
    features: Tensor, logits: Tensor, correspondence: Tensor, mask: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Masked maps and z by PICNN's definition, for draws already made, in plain autograd."""
    y1 = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(pseudo_label, logits.shape[-1]).to(y1.dtype)
    p = (one_hot + y1 - y1.detach()) @ correspondence
    z = mask.detach() + p - p.detach()
    return features * z.view(*z.shape, *[1] * (features.ndim - 2)), z


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The straight-through definition ------------------------------------------------------------------


@pytest.mark.parametrize("through", ["masked", "mask", "both"])
def test_bernoulli_gradients_are_the_straight_through_definition(backend: Backend, through):
    leaves = inputs(backend.device)
    masked, mask, label = bernoulli_mask(*leaves, seed=SEED)
    want_masked, want_mask = straight_through(*leaves, mask, label)
    torch.testing.assert_close(masked, want_masked, rtol=0, atol=1e-14)

    def loss(a: Tensor, z: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        if through != "mask":
            total = total + (a.sin() * torch.arange(a.numel(), device=a.device).view_as(a)).sum()
        if through != "masked":
            total = total + (z * torch.arange(z.numel(), device=z.device).view_as(z)).sum()
        return total

    got = torch.autograd.grad(loss(masked, mask), leaves, allow_unused=True)
    expected = torch.autograd.grad(
        loss(want_masked, want_mask), leaves, allow_unused=True, materialize_grads=False
    )
    assert (got[0] is None) == (expected[0] is None) == (through == "mask")
    for one, two in zip(got, expected, strict=True):
        if two is not None:
            assert two.abs().sum() > 0
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_bernoulli_gradients_of_tokens_and_vectors_are_the_same_definition(backend: Backend):
    features, logits, correspondence = inputs(backend.device)
    tokens = features.detach().flatten(2).transpose(1, 2).contiguous().requires_grad_()
    masked, mask, label = bernoulli_mask(tokens, logits, correspondence, seed=SEED, channel_dim=-1)
    got = torch.autograd.grad(masked.square().sum(), (tokens, logits, correspondence))
    want, _ = straight_through(features, logits, correspondence, mask, label)
    expected = torch.autograd.grad(want.square().sum(), (features, logits, correspondence))
    torch.testing.assert_close(got[0].transpose(1, 2), expected[0].flatten(2))
    torch.testing.assert_close(got[1:], expected[1:])

    vectors = features.detach().mean((2, 3)).requires_grad_()
    masked, mask, label = bernoulli_mask(vectors, logits, correspondence, seed=SEED)
    got = torch.autograd.grad(masked.square().sum(), (vectors, logits, correspondence))
    want, _ = straight_through(vectors, logits, correspondence, mask, label)
    torch.testing.assert_close(
        got, torch.autograd.grad(want.square().sum(), (vectors, logits, correspondence))
    )


def test_bernoulli_gradcheck_in_the_features(backend: Backend):
    features, logits, correspondence = inputs(backend.device)
    assert gradcheck(
        lambda x: bernoulli_mask(x, logits.detach(), correspondence.detach(), seed=SEED)[0],
        features,
        fast_mode=backend.slow,
    )


def test_class_gate_gradcheck(backend: Backend):
    features, _, gate = inputs(backend.device)
    labels = torch.tensor([3, 0, 3], device=backend.device)
    assert gradcheck(
        lambda x, g: class_gate(x, g, labels), (features, gate), fast_mode=backend.slow
    )
    tokens = features.detach().flatten(2).transpose(1, 2).requires_grad_()
    assert gradcheck(
        lambda x, g: class_gate(x, g, labels, channel_dim=2), (tokens, gate), fast_mode=backend.slow
    )


def test_only_the_gradients_asked_for_are_computed(backend: Backend):
    leaves = inputs(backend.device)
    everything = bernoulli_mask(*leaves, seed=SEED)[0].sum()
    expected = torch.autograd.grad(everything, leaves)
    for wanted in range(3):
        some = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
        masked, _, label = bernoulli_mask(*some, seed=SEED)
        masked.sum().backward()
        torch.testing.assert_close(some[wanted].grad, expected[wanted])
        assert all(t.grad is None for i, t in enumerate(some) if i != wanted)
        some[wanted].grad = None
        assert not label.requires_grad
    masked, mask, _ = bernoulli_mask(*(t.detach() for t in leaves), seed=SEED)
    assert not masked.requires_grad
    assert not mask.requires_grad


def test_a_dropped_filter_still_learns(backend: Backend):
    """The gradient of a probability does not depend on how its draw fell out."""
    features, logits, _ = inputs(backend.device)
    correspondence = torch.zeros(
        CLASSES, FILTERS, dtype=torch.float64, device=backend.device, requires_grad=True
    )
    masked, mask, label = bernoulli_mask(features, logits, correspondence, seed=SEED)
    assert not mask.any()
    (grad,) = torch.autograd.grad(masked.sum(), correspondence)
    expected = torch.zeros_like(correspondence).index_add(0, label, features.sum((2, 3)))
    torch.testing.assert_close(grad, expected.detach())


@pytest.mark.parametrize(
    ("logits_dtype", "table_dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float16),
    ],
)
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float64])
def test_gradients_of_parameters_of_two_dtypes(
    backend: Backend, features_dtype, logits_dtype, table_dtype
):
    """Each in its own dtype, computed in the wider one."""
    features, logits, correspondence = inputs(backend.device)
    # Small whole numbers: their sums are exact in every dtype, so that rounding shows elsewhere.
    x = features.detach().mul(4).round().to(features_dtype).requires_grad_()
    parameters = (
        logits.detach().to(logits_dtype).requires_grad_(),
        correspondence.detach().to(table_dtype).requires_grad_(),
    )
    weight = torch.arange(x.numel(), device=x.device).view_as(x) % 7 - 3
    masked, mask, label = bernoulli_mask(x, *parameters, seed=SEED)
    got = torch.autograd.grad((masked * weight).sum(), (x, *parameters))
    assert [t.dtype for t in got] == [features_dtype, logits_dtype, table_dtype]

    exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    want, _ = straight_through(*exact, mask.double(), label)
    expected = torch.autograd.grad((want * weight).sum(), exact)
    for one, two in zip(got, expected, strict=True):
        assert two.any()
        rounding = max(torch.finfo(one.dtype).eps, 1e-13)
        torch.testing.assert_close(one.double(), two, rtol=rounding, atol=1e-13)


LAYOUTS = ["maps", "tokens", "vectors"]


def laid_out(features: Tensor, layout: str) -> tuple[Tensor, int]:
    """A leaf with the values of ``features`` [B, N, H, W] (their mean as vectors), channel axis."""
    x = features.detach()
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2).contiguous().requires_grad_(), -1
    if layout == "vectors":
        return x.mean((2, 3)).requires_grad_(), 1
    return x.clone().requires_grad_(), 1


def per_channel(rows: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """``rows`` [B, N] broadcastable against ``x``."""
    return rows.view(*rows.shape, *[1] * (x.ndim - 2)).movedim(1, channel_dim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inplace_layer_may_follow_the_bernoulli_mask(backend: Backend, layout):
    features, *parameters = inputs(backend.device)
    x, channel_dim = laid_out(features, layout)
    before = x.detach().clone()
    relu = torch.nn.ReLU(inplace=True)
    weight = torch.arange(x.numel(), device=x.device).view_as(x)
    masked, mask, label = bernoulli_mask(x, *parameters, seed=SEED, channel_dim=channel_dim)
    assert channel_dim != 1 or not masked._is_view()
    out = relu(masked)
    assert out.data_ptr() == masked.data_ptr()
    assert (out >= 0).all()
    assert torch.equal(x, before)
    got = torch.autograd.grad((out * weight).sum(), (x, *parameters))

    _, z = straight_through(torch.zeros_like(mask), *parameters, mask, label)
    want = (x * per_channel(z, x, channel_dim)).relu()
    assert want.any()
    torch.testing.assert_close(out, want)
    expected = torch.autograd.grad((want * weight).sum(), (x, *parameters))
    for one, two in zip(got, expected, strict=True):
        assert two.any()
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inplace_layer_may_follow_the_class_gate(backend: Backend, layout):
    features, _, gate = inputs(backend.device)
    x, channel_dim = laid_out(features, layout)
    before = x.detach().clone()
    labels = torch.tensor([3, 0, 3], device=backend.device)
    weight = torch.arange(x.numel(), device=x.device).view_as(x)
    masked = class_gate(x, gate, labels, channel_dim=channel_dim)
    assert channel_dim != 1 or not masked._is_view()
    out = torch.nn.ReLU(inplace=True)(masked)
    assert out.data_ptr() == masked.data_ptr()
    assert torch.equal(x, before)
    got = torch.autograd.grad((out * weight).sum(), (x, gate))

    want = (x * per_channel(gate[labels], x, channel_dim)).relu()
    torch.testing.assert_close(out, want)
    expected = torch.autograd.grad((want * weight).sum(), (x, gate))
    for one, two in zip(got, expected, strict=True):
        assert two.any()
        torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inplace_layer_may_follow_under_compile(backend: Backend, layout):
    features, logits, correspondence = inputs(backend.device)
    x, channel_dim = laid_out(features, layout)
    labels = torch.tensor([3, 0, 3], device=backend.device)

    def loss(x: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
        masked, _, _ = bernoulli_mask(x, logits, correspondence, seed=SEED, channel_dim=channel_dim)
        gated = class_gate(x, correspondence, labels, channel_dim=channel_dim)
        return masked.relu_().square().sum() + gated.relu_().sin().sum()

    leaves = (x, logits, correspondence)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    expected = loss(*leaves)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)
    )


# Second derivatives -------------------------------------------------------------------------------


def assert_same_second_derivatives(
    backend: Backend,
    got: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    tolerance: float = 1e-10,
) -> None:
    """Hessians and gradients of a gradient penalty of two functions that return a number.

    Where kernels are slow, the penalty alone: a product with the Hessian.
    """
    if not backend.slow:
        one, two = (torch.autograd.functional.hessian(f, leaves) for f in (got, expected))
        for row, want in zip(one, two, strict=True):
            torch.testing.assert_close(row, want, rtol=tolerance, atol=tolerance)
    penalties = []
    for f in (got, expected):
        grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    assert all(grad.any() for grad in penalties[1])
    torch.testing.assert_close(*penalties, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("through", ["masked", "mask", "both"])
@pytest.mark.parametrize("layout", ["maps", "tokens", "vectors"])
def test_bernoulli_second_derivatives_are_the_straight_through_definition(
    backend: Backend, layout, through
):
    features, *parameters = inputs(backend.device, size=(1, 2))
    x, channel_dim = laid_out(features, layout)
    _, mask, label = bernoulli_mask(x, *parameters, seed=SEED, channel_dim=channel_dim)
    assert 0 < mask.sum() < mask.numel()

    def loss(masked: Tensor, z: Tensor) -> Tensor:
        total = masked.new_zeros(())
        if through != "mask":
            weight = torch.arange(masked.numel(), device=masked.device).view_as(masked)
            total = total + (masked.sin() * weight).sum()
        if through != "masked":
            total = total + (z.exp() * torch.arange(z.numel(), device=z.device).view_as(z)).sum()
        return total

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        return loss(*bernoulli_mask(x, *parameters, seed=SEED, channel_dim=channel_dim)[:2])

    def definition(x: Tensor, *parameters: Tensor) -> Tensor:
        _, z = straight_through(torch.zeros_like(mask), *parameters, mask, label)
        return loss(x * per_channel(z, x, channel_dim), z)

    if through == "mask":  # nothing depends on the maps
        assert_same_second_derivatives(
            backend,
            lambda *leaves: ours(x, *leaves),
            lambda *leaves: definition(x, *leaves),
            (*parameters,),
        )
    else:
        assert_same_second_derivatives(backend, ours, definition, (x, *parameters))


@pytest.mark.parametrize("layout", ["maps", "tokens", "vectors"])
def test_class_gate_second_derivatives_are_those_of_the_product(backend: Backend, layout):
    features, _, gate = inputs(backend.device, size=(1, 2))
    x, channel_dim = laid_out(features, layout)
    gate = gate.detach().index_fill(1, torch.tensor([1], device=x.device), 0).requires_grad_()
    labels = torch.tensor([3, 0, 3], device=x.device)
    weight = torch.arange(x.numel(), device=x.device).view_as(x)
    assert_same_second_derivatives(
        backend,
        lambda x, g: (class_gate(x, g, labels, channel_dim=channel_dim).sin() * weight).sum(),
        lambda x, g: ((x * per_channel(g[labels], x, channel_dim)).sin() * weight).sum(),
        (x, gate),
    )
    assert gradgradcheck(
        lambda x, g: class_gate(x, g, labels, channel_dim=channel_dim),
        (x, gate),
        fast_mode=backend.slow,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_have_gradients_are_the_usual_ones(backend: Backend, dtype):
    features, logits, correspondence = inputs(backend.device, dtype)
    # Whole numbers: sums are exact in whatever order. Infinity in a filter that the gate drops.
    x = features.detach().mul(4).round().requires_grad_()
    gate = torch.arange(4.0, device=x.device)[:, None].expand(4, FILTERS).clone().requires_grad_()
    labels = torch.tensor([3, 0, 3], device=x.device)
    weight = torch.arange(x.numel(), device=x.device).view_as(x).to(dtype) % 7 - 3
    gate_weight = weight.clone()
    gate_weight[1, 0] = torch.inf
    masked, mask, _ = bernoulli_mask(x, logits, correspondence, seed=SEED)
    gated = class_gate(x, gate, labels)
    leaves = (x, logits, correspondence, gate)
    outputs, weights = (masked, mask, gated), (weight, mask.detach() * 2, gate_weight)
    usual, differentiable = (
        torch.autograd.grad(outputs, leaves, weights, retain_graph=True, create_graph=graph)
        for graph in (False, True)
    )
    assert usual[0].isfinite().all()
    for one, two in zip(usual, differentiable, strict=True):
        assert one.any()
        assert two.requires_grad
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(two, one, rtol=4 * eps, atol=4 * eps, equal_nan=True)


# Beside autograd ----------------------------------------------------------------------------------


def test_operators_called_directly_are_differentiable(backend: Backend):
    leaves = inputs(backend.device)
    flat = leaves[0].detach().flatten(2).requires_grad_()
    seed = torch.tensor([SEED], device=backend.device)
    ops = torch.ops.picnn_fast
    direct = ops.bernoulli_mask(flat, leaves[1], leaves[2], seed, 0)
    public = bernoulli_mask(*leaves, seed=SEED)
    for one, two in zip(direct, public, strict=True):
        assert torch.equal(one.view_as(two), two)
    assert not direct[2].requires_grad
    got = torch.autograd.grad(
        direct[0].square().sum() + direct[1].sum(), (flat, leaves[1], leaves[2])
    )
    expected = torch.autograd.grad(public[0].square().sum() + public[1].sum(), leaves)
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one.view_as(two), two)
    mask = leaves[2].detach()[:BATCH].contiguous().requires_grad_()
    got = torch.autograd.grad(ops.mask_channels(flat, mask).square().sum(), (flat, mask))
    expected = torch.autograd.grad(mask_channels(leaves[0], mask).square().sum(), (leaves[0], mask))
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one.view_as(two), two)


def test_inference_mode_and_no_grad_give_the_same_forward(backend: Backend):
    leaves = inputs(backend.device)
    expected = bernoulli_mask(*leaves, seed=SEED)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for one, two in zip(bernoulli_mask(*leaves, seed=SEED), expected, strict=True):
                assert torch.equal(one, two)
                assert not one.requires_grad


def test_gumbel_gradients_reach_all_inputs_and_vanish_nowhere_by_accident():
    leaves = inputs(torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    masked, mask, label = gumbel_mask(*leaves, temperature=1.0, seed=SEED)
    assert masked.shape == leaves[0].shape
    assert ((mask >= 0) & (mask <= 1)).all()
    torch.testing.assert_close(masked, leaves[0] * mask[..., None, None])
    assert torch.equal(label, bernoulli_mask(*leaves, seed=SEED)[2])
    for grad in torch.autograd.grad(masked.square().sum(), leaves):
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() > 0


def test_gumbel_assigns_filters_as_often_as_the_correspondence_says():
    """At low temperature the class of a filter is a categorical draw from its column."""
    torch.manual_seed(0)
    column = torch.tensor([0.1, 0.2, 0.7])
    filters = 20_000  # independent columns
    _, mask, label = gumbel_mask(
        torch.ones(1, filters),
        torch.tensor([[-100.0, -100.0, 100.0]]),
        column[:, None].expand(-1, filters),
        seed=0,
    )
    assert label.tolist() == [2]
    assert abs(mask.detach().mean().item() - 0.7) < 5 * (0.7 * 0.3 / filters) ** 0.5
    assert ((mask < 0.01) | (mask > 0.99)).double().mean() > 0.97


# opcheck ------------------------------------------------------------------------------------------


OPCHECKS = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}


@pytest.mark.parametrize("operator", ["bernoulli_mask", "mask_channels", "masking_backward"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(backend: Backend, operator, layout):
    features, logits, correspondence = inputs(backend.device, torch.float32)
    memory = {"contiguous": features, "sliced": features[:, :, ::2]}.get(layout)
    if memory is None:
        memory = features.contiguous(memory_format=torch.channels_last)
    flat = memory.detach().flatten(2).requires_grad_()
    arguments: dict[str, tuple[Any, ...]] = {
        "bernoulli_mask": (
            flat,
            logits,
            correspondence,
            torch.tensor([SEED], device=backend.device),
            0,
        ),
        "mask_channels": (flat, correspondence.detach()[:BATCH].contiguous().requires_grad_()),
        "masking_backward": (
            torch.ones_like(flat),
            flat.detach(),
            correspondence.detach()[:BATCH].contiguous(),
        ),
    }
    results = torch.library.opcheck(
        getattr(torch.ops.picnn_fast, operator).default, arguments[operator]
    )
    assert set(results) == OPCHECKS


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("size", [(3, 5, 4), (1, 1, 1), (0, 3, 4), (3, 257, 256)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_parameters_backward(backend: Backend, size, layout, dtype):
    batch, classes, filters = size
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.rand(shape, generator=generator, dtype=dtype).to(backend.device)
        for shape in ((batch, filters), (batch, classes), (classes, filters))
    ]
    if layout == "transposed":
        tables = [t.T.contiguous().T for t in tables]
    label = torch.randint(0, classes, (batch,), generator=generator).to(backend.device)
    operator = torch.ops.picnn_fast.bernoulli_parameters_backward.default
    assert set(torch.library.opcheck(operator, (*tables, label))) == OPCHECKS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_shape_functions_hold_for_every_dtype(backend: Backend, dtype):
    features, logits, correspondence = (
        t.detach() for t in inputs(backend.device, dtype, size=(4,))
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    seed = torch.tensor([SEED], device=backend.device)
    ops = torch.ops.picnn_fast
    for operator, arguments in (
        (ops.bernoulli_mask, (features, logits.float(), correspondence.float(), seed, 0)),
        (ops.mask_channels, (features, correspondence.to(wide)[:BATCH])),
        (ops.masking_backward, (features, features, correspondence.to(wide)[:BATCH])),
        (
            ops.bernoulli_parameters_backward,
            (
                correspondence.to(wide)[:BATCH],
                logits.to(wide),
                correspondence.to(wide),
                torch.tensor([3, 0, 3], device=backend.device),
            ),
        ),
    ):
        torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


# torch.compile ------------------------------------------------------------------------------------


def step(features: Tensor, logits: Tensor, correspondence: Tensor, labels: Tensor) -> Any:
    masked, mask, label = bernoulli_mask(features, logits, correspondence, seed=SEED)
    gated = class_gate(features.relu(), correspondence, labels)
    loss = masked.square().sum() + (mask * 3).sum() + gated.sin().sum()
    return loss, masked, mask, label, gated


def assert_compiled_equals_eager(compiled: Any, leaves: tuple[Tensor, ...], labels: Tensor) -> None:
    got, expected = compiled(*leaves, labels), step(*leaves, labels)
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[3], expected[3])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], leaves), torch.autograd.grad(expected[0], leaves)
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_fullgraph_equals_eager(backend: Backend):
    leaves = inputs(backend.device, torch.float32)
    labels = torch.tensor([3, 1, 3], device=backend.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_compiled_equals_eager(compiled, leaves, labels)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_inductor_equals_eager(cpp: Backend):
    leaves = inputs(cpp.device, torch.float32)
    labels = torch.tensor([3, 1, 3])
    assert_compiled_equals_eager(torch.compile(step, fullgraph=True), leaves, labels)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_batch_and_map_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes alike in the first call, which would tie them together for good.
    for batch, side in ((7, 8), (11, 5), (16, 2)):
        generator = torch.Generator().manual_seed(batch)
        leaves = (
            torch.randn(batch, FILTERS, side, side + 1, generator=generator).requires_grad_(),
            torch.randn(batch, CLASSES, generator=generator).requires_grad_(),
            torch.rand(CLASSES, FILTERS, generator=generator).requires_grad_(),
        )
        labels = torch.randint(0, CLASSES, (batch,), generator=generator)
        assert_compiled_equals_eager(compiled, leaves, labels)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_draws_are_fresh_and_follow_manual_seed():
    features, logits = torch.ones(8, 64, 2, 2), torch.zeros(8, 4)
    correspondence = torch.full((4, 64), 0.5)
    compiled = torch.compile(
        lambda x: bernoulli_mask(x, logits, correspondence)[1], fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first, second = compiled(features), compiled(features)
    torch.manual_seed(3)
    assert torch.equal(compiled(features), first)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_still_refuses_bad_values():
    features, logits = torch.ones(2, 3, 2, 2), torch.zeros(2, 4)
    compiled = torch.compile(
        lambda p: bernoulli_mask(features, logits, p, seed=0)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(torch.full((4, 3), 0.5))
    with pytest.raises(RuntimeError, match="correspondence"):
        compiled(torch.full((4, 3), 1.5))


# Autocast -----------------------------------------------------------------------------------------


def network(device: torch.device) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, FILTERS, 3).to(device)
    images = torch.randn(BATCH, 3, 6, 6, device=device)
    _, logits, correspondence = inputs(device, torch.float32)
    return convolution, images, logits, correspondence


def test_autocast_keeps_the_maps_type_and_the_draws(backend: Backend):
    convolution, images, logits, correspondence = network(backend.device)
    expected = bernoulli_mask(convolution(images), logits, correspondence, seed=SEED)
    with torch.autocast(backend.device.type, torch.bfloat16):
        features = convolution(images)
        masked, mask, label = bernoulli_mask(features, logits, correspondence, seed=SEED)
        gated = class_gate(features, correspondence, label)
    assert features.dtype == masked.dtype == mask.dtype == gated.dtype == torch.bfloat16
    assert torch.equal(mask.float(), expected[1])
    assert torch.equal(label, expected[2])
    assert torch.equal(masked, features * mask[..., None, None])
    (masked.float().square().sum() + gated.float().sum()).backward()
    for t in (logits, correspondence, *convolution.parameters()):
        assert t.grad.dtype == torch.float32
        assert torch.isfinite(t.grad).all()
        assert t.grad.abs().sum() > 0


@pytest.mark.parametrize(("classes", "filters"), [(CLASSES, FILTERS), (257, 256)])
def test_gradients_do_not_depend_on_autocast_around_backward(backend: Backend, classes, filters):
    """All leaves are float32, so nothing here is autocast's to lower.

    The gradient of the larger logits is the library's product, which autocast would lower.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = tuple(
        torch.rand(size, generator=generator).to(backend.device).requires_grad_()
        for size in ((BATCH, filters, 2, 1), (BATCH, classes), (classes, filters))
    )
    labels = torch.tensor([3, 1, 3], device=backend.device)

    def gradients() -> tuple[Tensor, ...]:
        masked = bernoulli_mask(*leaves, seed=SEED)[0]
        gated = class_gate(leaves[0], leaves[2], labels)
        return torch.autograd.grad(masked.square().sum() + gated.square().sum(), leaves)

    expected = gradients()
    with torch.autocast(backend.device.type, torch.bfloat16):
        got = gradients()
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_gpu_and_graphs_draw_afresh() -> None:
    features = torch.randn(8, 32, 7, 7, device="cuda", requires_grad=True)
    logits = torch.randn(8, 5, device="cuda", requires_grad=True)
    correspondence = torch.full((5, 32), 0.5, device="cuda", requires_grad=True)

    def step() -> Tensor:
        masked, mask, _ = bernoulli_mask(features, logits, correspondence)
        masked.sum().backward()
        return mask

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, on a stream of its own
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = step()
    graph.replay()
    first = mask.clone()
    graph.replay()
    assert not torch.equal(first, mask)
