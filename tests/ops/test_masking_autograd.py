"""Masking family under autograd, torch.compile, autocast and opcheck, on every backend."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import picnn_fast
from picnn_fast.functional import (
    bernoulli_mask,
    class_gate,
    draw_mask,
    gumbel_mask,
    mask_channels,
)
from picnn_fast.reference import masking as reference
from picnn_fast.reference.histogram import soft_histogram
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


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_first_and_second_derivatives_equal_differences(backend: Backend, check):
    features, _, gate = inputs(backend.device, size=(1, 2))
    labels = torch.tensor([3, 0, 3], device=backend.device)
    tokens = features.detach().flatten(2).transpose(1, 2).requires_grad_()
    mask = gate.detach()[:BATCH].clone().requires_grad_()
    for function, leaves in (
        (mask_channels, (features, mask)),
        (lambda x, g: class_gate(x, g, labels, channel_dim=2), (tokens, gate)),
    ):
        assert check(function, leaves, fast_mode=backend.slow)


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
def test_an_inplace_layer_may_follow(backend: Backend, layout):
    features, logits, table = inputs(backend.device)
    x, channel_dim = laid_out(features, layout)
    before = x.detach().clone()
    labels = torch.tensor([3, 0, 3], device=backend.device)
    weight = torch.arange(x.numel(), device=x.device).view_as(x)

    def drawn(x: Tensor, logits: Tensor, table: Tensor) -> Tensor:
        return bernoulli_mask(x, logits, table, seed=SEED, channel_dim=channel_dim)[0]

    def gated(x: Tensor, table: Tensor) -> Tensor:
        return class_gate(x, table, labels, channel_dim=channel_dim)

    _, mask, label = bernoulli_mask(x, logits, table, seed=SEED, channel_dim=channel_dim)
    _, z = straight_through(torch.zeros_like(mask), logits, table, mask, label)
    for function, leaves, factor in (
        (drawn, (x, logits, table), z),
        (gated, (x, table), table[labels]),
    ):
        masked = function(*leaves)
        assert channel_dim != 1 or not masked._is_view()
        out = torch.nn.ReLU(inplace=True)(masked)
        assert out.data_ptr() == masked.data_ptr()
        assert torch.equal(x, before)
        want = (x * per_channel(factor, x, channel_dim)).relu()
        assert want.any()
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad((out * weight).sum(), leaves)
        expected = torch.autograd.grad((want * weight).sum(), leaves)
        for one, two in zip(got, expected, strict=True):
            assert two.any()
            torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inplace_layer_may_follow_under_compile(cpp: Backend, layout):
    features, logits, correspondence = inputs(cpp.device)
    x, channel_dim = laid_out(features, layout)
    labels = torch.tensor([3, 0, 3])

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


def test_the_hessian_is_that_of_the_straight_through_definition(backend: Backend):
    leaves = inputs(backend.device, size=(1, 2))
    _, mask, label = bernoulli_mask(*leaves, seed=SEED)
    assert 0 < mask.sum() < mask.numel()

    def loss(masked: Tensor, z: Tensor) -> Tensor:
        weight = torch.arange(masked.numel(), device=masked.device).view_as(masked)
        return (masked.sin() * weight).sum() + (z.exp() * weight.sum((2, 3))).sum()

    assert_same_second_derivatives(
        backend,
        lambda *leaves: loss(*bernoulli_mask(*leaves, seed=SEED)[:2]),
        lambda *leaves: loss(*straight_through(*leaves, mask, label)),
        leaves,
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_single_samples_reach_logits_and_tables_by_vmap(backend: Backend):
    x, logits, table = (t.detach() for t in inputs(backend.device))
    labels = torch.tensor([3, 0, 3], device=backend.device)

    def loss(table: Tensor, logits: Tensor, x: Tensor, label: Tensor) -> Tensor:
        x, logits, label = x[None], logits[None], label[None]
        masked, mask, _ = bernoulli_mask(x, logits, table, seed=SEED)
        gated = class_gate(x, table, label)
        drawn = draw_mask(table, label, seed=SEED)
        return masked.sin().sum() + mask.sum() + gated.sin().sum() + (drawn * logits.sum()).sum()

    gradient = torch.func.grad(loss, (0, 1))
    got = torch.func.vmap(gradient, (None, 0, 0, 0))(table, logits, x, labels)
    expected = [gradient(table, *sample) for sample in zip(logits, x, labels, strict=True)]
    for one, samples in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_that_have_gradients_are_the_usual_ones(cpp: Backend, dtype):
    features, logits, correspondence = inputs(cpp.device, dtype)
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


# Draws for labels that are given ------------------------------------------------------------------


def test_a_drawn_mask_has_the_gradient_of_its_probabilities(backend: Backend):
    _, _, table = inputs(backend.device)
    labels = torch.tensor([3, 0, 3], device=backend.device, dtype=torch.int32)
    mask = draw_mask(table, labels, seed=SEED)
    weight = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    (got,) = torch.autograd.grad((mask.exp() * weight).sum(), table)
    expected = torch.zeros_like(table).index_add(0, labels, mask.detach().exp() * weight)
    torch.testing.assert_close(got, expected)
    half = draw_mask(table.detach().half(), labels, seed=SEED)
    assert half.dtype == torch.float16
    assert torch.equal(half.double(), mask)


# Sums over samples of one label -------------------------------------------------------------------


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sums_by_label_are_added_up_in_one_order_on_a_gpu():
    """Where index_add_ would add atomically; only names of operators are seen without a GPU."""
    with FakeTensorMode():
        features = torch.rand(3, FILTERS, 2, device="cuda")
        labels = torch.zeros(3, dtype=torch.int64, device="cuda")
        low = torch.zeros(FILTERS, device="cuda")
        for shape, add in (
            (
                (CLASSES, FILTERS),
                lambda: reference.sums_by_label(features[..., 0], labels, CLASSES),
            ),
            (
                (FILTERS, 5, CLASSES),
                lambda: soft_histogram(features[..., 0], labels, low, low + 1, 5, CLASSES),
            ),
        ):
            with Names() as eager:
                assert add().shape == shape
            assert "index_put_" in eager.names
            assert not any("index_add" in name for name in eager.names)


def test_all_sums_by_label_are_made_by_one_function():
    """That which keeps their order on a GPU; sums of integers need none."""
    root = Path(picnn_fast.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("index_add_", "index_add")
    }
    assert callers == {"reference/masking.py", "reference/histogram.py"}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference-gpu", "triton-gpu", "cuda"], indirect=True)
def test_gradients_of_tables_have_the_same_bits_every_time(backend: Backend):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 64, 2, generator=generator).cuda()
    logits, table = torch.zeros(4096, 3).cuda(), torch.rand(3, 64, generator=generator).cuda()
    labels = torch.randint(0, 3, (4096,), generator=generator).cuda()
    table.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        outputs = (
            bernoulli_mask(features, logits, table, seed=SEED)[0],
            class_gate(features, table, labels),
            draw_mask(table, labels, seed=SEED) * features[..., 0],
        )
        return tuple(torch.autograd.grad((t * t).sum(), table)[0] for t in outputs)

    first = gradients()
    for _ in range(20):
        for one, two in zip(gradients(), first, strict=True):
            assert torch.equal(one, two)


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
def test_gradients_do_not_depend_on_autocast_around_backward(cpp: Backend, classes, filters):
    """All leaves are float32, so nothing here is autocast's to lower.

    The gradient of the larger logits is the library's product, which autocast would lower.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = tuple(
        torch.rand(size, generator=generator).to(cpp.device).requires_grad_()
        for size in ((BATCH, filters, 2, 1), (BATCH, classes), (classes, filters))
    )
    labels = torch.tensor([3, 1, 3], device=cpp.device)

    def gradients() -> tuple[Tensor, ...]:
        masked = bernoulli_mask(*leaves, seed=SEED)[0]
        gated = class_gate(leaves[0], leaves[2], labels)
        return torch.autograd.grad(masked.square().sum() + gated.square().sum(), leaves)

    expected = gradients()
    with torch.autocast(cpp.device.type, torch.bfloat16):
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
