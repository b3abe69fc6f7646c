"""What ``define`` promises of every operator: transforms, tracing, derivatives that are refused."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from picnn_fast import PartTemplate
from picnn_fast import functional as F

P = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 2, 0, 1, 2])
TEMPLATE = PartTemplate()


def mean(x: Tensor) -> Tensor:
    return torch.full(x.shape[1:], 0.3, dtype=x.dtype)


# Scalar functions of maps [B, 6, 5, 5], labels [B] and logits [B, 3].
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mask_channels": lambda x, y, z: F.mask_channels(x, z[:, GROUPS]).square().sum(),
    "class_gate": lambda x, y, z: F.class_gate(x, P, y).square().sum(),
    "bernoulli_mask": lambda x, y, z: F.bernoulli_mask(x, z, P, seed=0)[0].square().sum(),
    "template_mask": lambda x, y, z: F.template_mask(x, TEMPLATE)[0].square().sum(),
    "filter_loss": lambda x, y, z: F.filter_loss(x, TEMPLATE).sum(),
    "group_correlation_loss": lambda x, y, z: F.group_correlation_loss(
        x, mean(x), GROUPS, num_groups=3
    ),
    "group_class_loss": lambda x, y, z: F.group_class_loss(x, GROUPS, y, 3, num_groups=3),
    "soft_histogram": lambda x, y, z: F.mutual_information(
        x.mean((2, 3)), y, 3, estimator="soft_histogram", bins=4
    ).sum(),
}
REFUSES_SECOND = {"filter_loss", "group_correlation_loss"}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 6, 5, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 0]), z


def plain_gradient(name: str, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x, y, z), x)[0]


@every_function
def test_reverse_mode_of_torch_func_is_that_of_autograd(name):
    x, y, z = inputs()
    want = plain_gradient(name, x, y, z)
    torch.testing.assert_close(torch.func.grad(FUNCTIONS[name])(x, y, z), want)
    # Which maps over the gradient of the result alone.
    torch.testing.assert_close(torch.func.jacrev(FUNCTIONS[name])(x, y, z), want)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.grad(FUNCTIONS[name])(x, y, z), want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_function
def test_gradients_of_single_samples_by_vmap(name):
    samples = inputs()
    each = [plain_gradient(name, *(v[i : i + 1] for v in samples)) for i in range(4)]

    def of_one(*sample: Tensor) -> Tensor:
        return FUNCTIONS[name](*(value[None] for value in sample))

    got = torch.func.vmap(torch.func.grad(of_one))(*samples)
    torch.testing.assert_close(got, torch.cat(each))
    x = samples[0].requires_grad_()
    torch.func.vmap(of_one)(*samples).sum().backward()
    torch.testing.assert_close(x.grad, torch.cat(each))


@every_function
def test_second_derivatives_by_nested_transforms_are_right_or_refused(name):
    x, y, z = inputs()
    if name == "soft_histogram":
        pytest.skip("without bound where a sample is at a centre")

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(FUNCTIONS[name])(x, y, z).square().sum()

    for derivative in (torch.func.grad(penalty), lambda x: penalty(x).backward()):
        if name in REFUSES_SECOND:
            with pytest.raises(RuntimeError, match=f"^{name.removesuffix('_loss')}.*: got its"):
                derivative(x.requires_grad_())
    if name in REFUSES_SECOND:
        return
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](leaf, y, z), leaf, create_graph=True)
    (want,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert want.any()
    torch.testing.assert_close(torch.func.grad(penalty)(x.detach()), want)
    (outside,) = torch.autograd.grad(penalty(leaf), leaf)
    torch.testing.assert_close(outside, want)


@every_function
def test_forward_mode_is_refused_in_one_line(name):
    if name == "group_class_loss":
        pytest.skip("composed of PyTorch's operators, which have it")
    x, y, z = inputs()
    with pytest.raises(RuntimeError, match=r"^\w+: got forward-mode differentiation, want reverse"):
        torch.func.jvp(lambda x: FUNCTIONS[name](x, y, z), (x,), (x,))


def test_what_is_called_without_gradients_inside_a_transform_has_none():
    x, y, z = inputs()

    def half(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = FUNCTIONS["mask_channels"](x, y, z)
        return constant * x.sum()

    want = FUNCTIONS["mask_channels"](x, y, z)
    torch.testing.assert_close(torch.func.grad(half)(x), want.expand_as(x))


@pytest.mark.parametrize("name", ["bernoulli_parameters_backward", "soft_histogram_backward"])
def test_an_operator_without_a_derivative_refuses_to_be_differentiated(name):
    x, y, z = inputs()
    x.requires_grad_()
    if name == "bernoulli_parameters_backward":
        out = torch.ops.picnn_fast.bernoulli_parameters_backward(x[:, :, 0, 0], z, P, y)[0]
    else:
        counts = torch.rand(6, 4, 3, dtype=torch.float64)
        ones = torch.ones(6, dtype=torch.float64)
        out = torch.ops.picnn_fast.soft_histogram_backward(counts, x[:, :, 0, 0], y, ones, ones)
    with pytest.raises(RuntimeError, match=f"^{name}: got its result to differentiate"):
        out.sum().backward()


@every_function
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_yields_the_same_gradient(name, reentrant):
    x, y, z = inputs()
    leaf = x.detach().requires_grad_()
    checkpoint(FUNCTIONS[name], leaf, y, z, use_reentrant=reentrant).backward()
    torch.testing.assert_close(leaf.grad, plain_gradient(name, x, y, z))


@every_function
def test_fake_tensors_outside_a_compiler_have_the_shapes_of_real_ones(name):
    expected = FUNCTIONS[name](*inputs())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    got = FUNCTIONS[name](*(mode.from_tensor(value) for value in inputs()))
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)


# With sizes as symbols a trace asks for all that one of real sizes does, and for more.
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "symbolic") for name in FUNCTIONS]
    + [("bernoulli_mask", "real"), ("filter_loss", "real")],
)
def test_make_fx_traces_a_gradient(name, mode):
    x, y, z = inputs()
    gradient = torch.func.grad(FUNCTIONS[name])
    traced = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(x, y, z)
    torch.testing.assert_close(traced(x, y, z), plain_gradient(name, x, y, z))


def test_compiled_autograd_takes_the_backward_pass():
    x, y, z = inputs()
    want = plain_gradient("mask_channels", x, y, z)
    x.requires_grad_()
    loss = FUNCTIONS["mask_channels"](x, y, z)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(x.grad, want)


# The short way of a public function to its operator -----------------------------------------------


class Named(TorchFunctionMode):
    """Names of the operators of picnn_fast that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if hasattr(func, "_schema"):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A subclass that sees every call."""

    names: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if hasattr(func, "_schema"):
            cls.names.add(func._schema.name)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("recorded", [False, True])
def test_whoever_would_intercept_an_operator_sees_it(recorded):
    maps, mask = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    maps.requires_grad_(recorded)
    with Named() as named:
        got = F.mask_channels(maps, mask)
    assert "picnn_fast::mask_channels" in named.names
    assert got.requires_grad == recorded
    Own.names.clear()
    other = F.mask_channels(maps, mask.as_subclass(Own))
    assert Own.names >= {"picnn_fast::mask_channels"}
    assert torch.equal(other.as_subclass(Tensor), got)


def test_forward_mode_is_refused_without_gradients_too():
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(torch.rand(2, 3), torch.rand(2, 3))
        with pytest.raises(RuntimeError, match="got forward-mode differentiation"):
            F.mask_channels(dual, torch.rand(2, 3))


@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_are_recorded_as_before_once_an_operator_has_failed(recorded):
    x = torch.ones(1, 2, requires_grad=True)
    with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match="probabilities"):
        F.bernoulli_mask(x, torch.zeros(1, 1), torch.full((1, 2), 2.0))
    assert (x * 2).requires_grad


@pytest.mark.parametrize(
    ("unserved", "error", "message"),
    [
        (torch.ones(2, 3, 4, 4).to_mkldnn, RuntimeError, "mkldnn"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(3, 4, 4)] * 2, layout=torch.jagged),
            NotImplementedError,
            "mask_channels",
        ),
    ],
    ids=["mkldnn", "jagged"],
)
def test_tensors_that_no_kernel_serves_are_refused_at_once(unserved, error, message):
    """They have keys of autograd of their own, by which an operator might come to itself again."""
    with pytest.raises(error, match=message):
        torch.ops.picnn_fast.mask_channels(unserved(), torch.ones(2, 3))
