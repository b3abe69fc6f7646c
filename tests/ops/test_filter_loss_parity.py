"""Filter loss: every backend gives the float64 reference's values and gradients.

Within a bound on what rounding does to the responses s, hence to exp(s), for any order of
summation.
"""

import math

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.functional import filter_loss
from picnn_fast.ops.filter_loss import FilterLossState
from picnn_fast.reference import filter_loss as reference
from picnn_fast.reference.masking import accumulate_dtype
from tests.cases import few, in_turn, kernel_cases, noted, pairwise
from tests.conftest import Backend
from tests.ops.cases import DTYPES, dense, epsilon, on_device, steps
from tests.ops.test_templates_parity import LAYOUTS, SHAPES, TEMPLATES, first_peaks, maps

ESTIMATORS = ("batch", "running", "target")
MAIN = LAYOUTS[:2]


def state_before(x: Tensor, estimator: str) -> FilterLossState | None:
    """Estimates from other maps, and of one filter none."""
    if estimator == "batch":
        return None
    generator = torch.Generator().manual_seed(3)
    dtype = accumulate_dtype(x.dtype)
    state = FilterLossState.empty(*x.shape[1:], momentum=0.3, dtype=dtype)
    state.log_mean.copy_(torch.randn(state.log_mean.shape, generator=generator))
    state.log_ratio.copy_(0.1 * torch.randn(state.log_ratio.shape, generator=generator))
    state.log_mean[:1] = state.log_ratio[:1] = -math.inf
    return state


def categories(x: Tensor, estimator: str) -> tuple[Tensor | None, Tensor | None]:
    if estimator != "target":
        return None, None
    return torch.arange(len(x)) % 3, torch.arange(x.shape[1]) % 2


class Expected:
    """Loss, gradient and new state in float64, and how far rounding may lead away from them."""

    def __init__(self, x: Tensor, template: PartTemplate, estimator: str) -> None:
        height, width = x.shape[2:]
        wide = x.detach().cpu().double()
        offsets = template.offsets_for(height, width, wide)
        tau = template.tau_for(height, width)
        state = state_before(wide, estimator)
        self.state: tuple[Tensor, ...] = ()
        assigned = None
        if state is None:
            self.loss, self.grad = reference.filter_loss(wide, offsets, tau, True)
        else:
            labels, mine = categories(x, estimator)
            if labels is not None and mine is not None:
                assigned = torch.where(labels[:, None] == mine, first_peaks(x), height * width)
            self.loss, self.grad, *new = reference.filter_loss_running(
                wide,
                state.log_mean,
                state.log_ratio,
                state.momentum,
                assigned,
                offsets,
                tau,
                True,
            )
            self.state = tuple(new)
        self._bounds(wide, epsilon(accumulate_dtype(x.dtype)), offsets, tau, assigned)

    def _bounds(
        self, x: Tensor, eps: float, offsets: Tensor, tau: float, assigned: Tensor | None
    ) -> None:
        templates = reference._templates(x, offsets, tau)
        size = templates.abs()
        responses = reference._responses(x, templates)
        batch, count = len(x), responses.shape[-1]
        if batch == 0:
            self.loss_bound = self.state_bound = torch.zeros(x.shape[1])
            self.grad_bound = torch.zeros_like(x)
            return
        # Of s, of a logarithm of a sum, and of the state's own numbers, for each filter.
        off = (x.flatten(2).abs() @ size.T).amax((0, 2)) * (8 + 2 * math.sqrt(count)) * eps
        off = 4 * off + eps * (32 + 4 * math.log(batch * count))
        if self.state:
            off = off + 8 * eps * self.state[0].abs().amax(-1) + 8 * eps * self.state[1].abs()
        off = off[:, None]
        if self.state:
            relative = responses - self.state[0]
            share = relative.exp() / (batch * count)
            log_ratio = (relative - self.state[1][:, None]).abs()
            if assigned is not None:
                share = share * torch.zeros_like(share).scatter_(2, assigned[..., None], 1.0)
        else:
            given, log_ratio = reference.batch_terms(responses)
            share = given / count
            log_ratio = log_ratio.abs() + (given * log_ratio).sum(0).abs()
        wrong = share * (log_ratio + 2) * off * off.exp()
        weights = share * log_ratio
        # What is next to nothing may be nothing.
        wrong = wrong + 1e-30
        self.loss_bound = wrong.sum((0, 2)) + eps * self.loss.abs()
        rounding = (8 + 2 * math.sqrt(count)) * eps * weights @ size
        self.grad_bound = (wrong @ size + rounding).view(x.shape)
        self.state_bound = off[:, 0]


def assert_near(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = (got.detach().cpu().double() - expected).abs() - bound
    assert not excess.isnan().any()
    assert not (excess > 0).any(), f"off by {excess.max():.3g} beyond the rounding bound"


def assert_parity(
    backend: Backend, x: Tensor, template: PartTemplate, estimator: str
) -> tuple[Tensor, Tensor]:
    """Runs the public function and its backward pass; everything it yields is as expected."""
    expected = Expected(x, template, estimator)
    leaf = on_device(backend.device, x).requires_grad_()
    state = state_before(x, estimator)
    if state is not None:
        state = FilterLossState(
            state.log_mean.to(backend.device), state.log_ratio.to(backend.device), state.momentum
        )
    labels, mine = (None if t is None else t.to(backend.device) for t in categories(x, estimator))
    loss = filter_loss(
        leaf, template, estimator=estimator, state=state, labels=labels, filter_category=mine
    )
    weight = torch.arange(1.0, 1 + x.shape[1]) * 2
    (grad,) = torch.autograd.grad(loss, leaf, weight.to(loss))
    assert loss.dtype == accumulate_dtype(x.dtype)
    assert grad.dtype == x.dtype
    assert loss.shape == x.shape[1:2]
    assert grad.shape == x.shape
    assert_near(loss, expected.loss, expected.loss_bound)
    weight = weight.double().view(-1, 1, 1)
    bound = expected.grad_bound * weight
    if x.dtype != torch.float64:
        exact = expected.grad * weight
        bound = bound + (exact.abs() + bound) * epsilon(x.dtype)
        if x.dtype == torch.float16:
            bound = bound + 2.0**-24
    assert_near(grad, expected.grad * weight, bound)
    if state is not None:
        for got, want in zip((state.log_mean, state.log_ratio), expected.state, strict=True):
            # -inf where there has been no batch yet.
            known = want.isfinite()
            assert torch.equal(got.cpu()[~known].double(), want[~known])
            of_filter = expected.state_bound if want.ndim == 1 else expected.state_bound[:, None]
            assert_near(got.cpu()[known], want[known], of_filter.expand_as(want)[known])
    return loss, grad


@kernel_cases(
    ("shape_name", "layout", "estimator", "dtype"),
    few(SHAPES, LAYOUTS, ESTIMATORS, DTYPES),
    in_turn(list(SHAPES), LAYOUTS, ESTIMATORS, DTYPES),
)
def test_forward_and_backward(backend: Backend, shape_name, layout, estimator, dtype):
    x = maps(SHAPES[shape_name], layout, dtype) * 30  # responses of a few units
    _, grad = assert_parity(backend, x, TEMPLATES["l1"], estimator)
    if dense(x):
        assert steps(grad) == steps(x)


@kernel_cases(
    ("name", "estimator", "layout", "dtype"),
    pairwise(TEMPLATES, ESTIMATORS, MAIN, (torch.float32, torch.float64)),
    # To a kernel each is a table of numbers.
    in_turn(["function", "table", "l2 uniform"], ESTIMATORS, MAIN, [torch.float32, torch.float64]),
)
def test_every_kind_of_template(backend: Backend, name, estimator, layout, dtype):
    x = maps((4, 2, 7, 5), layout, dtype) * 30
    assert_parity(backend, x, TEMPLATES[name], estimator)


@kernel_cases(
    ("estimator", "dtype", "scale"),
    pairwise(ESTIMATORS, (torch.float32, torch.bfloat16), (1.0, 1e4, 6e4)),
    in_turn(ESTIMATORS, (torch.bfloat16, torch.float32), (6e4, 1e4, 1.0)),
)
def test_large_activations_stay_finite(backend: Backend, estimator, dtype, scale):
    """One-hot maps: of responses up to hundreds, only differences count."""
    x = maps((5, 3, 7, 7), dtype=dtype)
    x[0] = 0
    x[1, 0] = (torch.arange(49) == 24).view(7, 7) * 3.0
    loss, grad = assert_parity(backend, (x * scale).to(dtype), TEMPLATES["l2"], estimator)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_large_activations_that_differ_little(backend: Backend):
    """Responses of hundreds whose differences, not they themselves, make the loss."""
    for estimator in ESTIMATORS:
        with noted(estimator):
            assert_parity(backend, 1e4 + 30 * maps((5, 3, 7, 7)), TEMPLATES["l2"], estimator)


def test_maps_of_zeros_tell_nothing(backend: Backend):
    for estimator in ESTIMATORS:
        with noted(estimator):
            loss, grad = assert_parity(backend, torch.zeros(3, 2, 5, 5), TEMPLATES["l1"], estimator)
            if estimator == "batch":
                assert not loss.abs().gt(1e-6).any()
                assert not grad.abs().gt(1e-6).any()


@kernel_cases(
    ("batch", "estimator"),
    pairwise([1, 2, 9], ESTIMATORS),
    [(1, "batch"), (2, "running"), (9, "target")],
)
def test_batches_of_any_size(backend: Backend, estimator, batch):
    x = maps((batch, 3, 4, 4)) * 30
    loss, grad = assert_parity(backend, x, TEMPLATES["l1"], estimator)
    if estimator == "batch" and batch == 1:
        assert not loss.abs().gt(1e-6).any()
        assert not grad.abs().gt(1e-6).any()


LARGE = [
    *(((2, 2, 20, 34), estimator) for estimator in ESTIMATORS),
    ((2, 3, 1, 280), "batch"),
    ((2, 1, 64, 64), "batch"),
]


@kernel_cases(
    ("shape", "estimator", "layout"),
    [(*case, layout) for case in LARGE for layout in MAIN],
    [(*case, layout) for case, layout in zip(LARGE, MAIN + MAIN + MAIN[:1], strict=True)],
)
def test_large_maps(backend: Backend, shape, estimator, layout):
    b, n, h, w = shape
    if backend.slow:
        h, w = (h + 3) // 4, (w + 3) // 4
    x = maps((b, n, h, w), layout) * 1000
    assert_parity(backend, x, PartTemplate("l2", beta=1.5), estimator)


@kernel_cases(
    ("filters", "layout"),
    pairwise([1, 15, 16, 37], MAIN),
    [(1, "channels_last"), (16, "contiguous")],
)
def test_any_number_of_filters(backend: Backend, layout, filters):
    x = maps((2, filters, 3, 3), layout) * 30
    assert_parity(backend, x, TEMPLATES["table"], "batch")


@kernel_cases(
    ("value", "estimator", "layout"),
    pairwise([math.nan, math.inf, -math.inf], ESTIMATORS, MAIN),
    in_turn([math.nan, math.inf, -math.inf], ESTIMATORS, MAIN),
)
def test_a_value_that_is_not_finite_spoils_its_filter_alone(
    backend: Backend, value, estimator, layout
):
    clean = maps((3, 4, 5, 5), layout) * 30
    x = clean.clone()
    x[1, 2, 3, 3] = value
    others = torch.tensor([0, 1, 3])
    results = []
    for t in (clean, x):
        leaf = on_device(backend.device, t).requires_grad_()
        state = None
        if estimator != "batch":
            state = FilterLossState.empty(4, 5, 5, device=backend.device)
        loss = filter_loss(leaf, TEMPLATES["l1"], estimator=estimator, state=state)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss.detach().cpu(), grad.cpu()))
    (clean_loss, clean_grad), (loss, grad) = results
    assert loss[2].isnan()
    assert not grad[1, 2].isfinite().any()
    if estimator == "batch":
        assert grad[:, 2].isnan().all()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(grad[:, others], clean_grad[:, others])


def test_running_estimates_renew_themselves_batch_by_batch(backend: Backend):
    template = TEMPLATES["l2"]
    offsets = template.offsets_for(4, 3, torch.empty(0, dtype=torch.float64))
    for momentum in (1e-3, 0.5, 1.0):
        state = FilterLossState.empty(2, 4, 3, momentum=momentum, device=backend.device)
        want = FilterLossState.empty(2, 4, 3, dtype=torch.float64)
        for seed in range(3):
            x = maps((3, 2, 4, 3), seed=seed) * 20
            expected, _, want.log_mean, want.log_ratio = reference.filter_loss_running(
                x.double(),
                want.log_mean,
                want.log_ratio,
                momentum,
                None,
                offsets,
                template.tau_for(4, 3),
                False,
            )
            with noted("momentum", momentum, "batch", seed):
                loss = filter_loss(x.to(backend.device), template, estimator="running", state=state)
                for got, exact in (
                    (loss, expected),
                    (state.log_mean, want.log_mean),
                    (state.log_ratio, want.log_ratio),
                ):
                    torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-5, atol=2e-5)


def test_an_empty_batch_leaves_the_state(backend: Backend):
    state = FilterLossState.empty(2, 3, 3, device=backend.device)
    state.log_mean.copy_(torch.randn(2, 10))
    state.log_ratio.fill_(0.25)
    before = state.log_mean.clone(), state.log_ratio.clone()
    x = torch.ones(0, 2, 3, 3, device=backend.device, requires_grad=True)
    loss = filter_loss(x, TEMPLATES["l1"], estimator="running", state=state)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert x.grad.shape == x.shape
    assert torch.equal(state.log_mean, before[0])
    assert torch.equal(state.log_ratio, before[1])


def test_an_assignment_out_of_range_is_refused(cpp: Backend):
    offsets = TEMPLATES["l1"].offsets_for(3, 3, torch.empty(0))
    state = FilterLossState.empty(3, 3, 3)
    for wrong in (-1, 10, 2**40):
        assigned = torch.zeros(2, 3, dtype=torch.int64)
        assigned[1, 1] = wrong
        message = rf"assigned: got {wrong}, want \[0, 10\)"
        with noted(wrong), pytest.raises(RuntimeError, match=message):
            torch.ops.picnn_fast.filter_loss_running(
                torch.ones(2, 3, 3, 3),
                state.log_mean,
                state.log_ratio,
                0.1,
                assigned,
                offsets,
                0.1,
                True,
            )


# what to change of the operator's log_mean, log_ratio, momentum; the message
WRONG = {
    "log_mean": ((torch.ones(3, 9), torch.ones(3), 0.1), r"log_mean: got shape \[3, 9\]"),
    "log_ratio": ((torch.ones(3, 10), torch.ones(2), 0.1), r"log_ratio: got shape \[2\]"),
    "dtype": ((torch.ones(3, 10).double(), torch.ones(3), 0.1), "want float32"),
    "momentum": ((torch.ones(3, 10), torch.ones(3), 1.5), "momentum: got 1.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_compiled_kernel_refuses_a_state_that_is_none(cpp: Backend, name):
    state, message = WRONG[name]
    offsets = TEMPLATES["l1"].offsets_for(3, 3, torch.empty(0))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.filter_loss_running(
            torch.ones(2, 3, 3, 3), *state, None, offsets, 0.1, True
        )
