"""Triton kernels of the filter loss, beyond the parity suite in tests/ops."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from picnn_fast import PartTemplate
from picnn_fast.reference import filter_loss as reference
from tests.conftest import HAS_GPU
from tests.ops.test_launches import launched
from tests.triton_kernels.conftest import Compiled, types

pytest.importorskip("triton")
kernels = pytest.importorskip("picnn_fast.triton_kernels.filter_loss")

DEVICE = "cuda" if HAS_GPU else "cpu"
TEMPLATE = PartTemplate("l2")


def test_every_kernel_compiles_for_hopper_in_every_dtype(
    compiled: Compiled,
) -> None:
    of_maps = {f"{name}_kernel" for name in ("columns", "rows", "information", "gradient")}
    records = compiled["filter_loss"]
    others = {"assigned_kernel", "losses_kernel"}
    assert {record["kernel"] for record in records} == of_maps | others
    for name in of_maps:
        assert types(records, name, "maps") == {"float32", "float64", "bfloat16", "float16"}, name
    assert types(records, "assigned_kernel", "weights") == {"float32", "float64"}


def batch(operators: Any, x: Tensor, tau: float, with_grad: bool = True) -> tuple[Tensor, ...]:
    offsets = TEMPLATE.offsets_for(*x.shape[2:], x)
    result: tuple[Tensor, ...] = operators.filter_loss(x, offsets, tau, with_grad)
    return result


def running(operators: Any, x: Tensor, tau: float, with_grad: bool = True) -> tuple[Tensor, ...]:
    return _running(operators, x, tau, with_grad, None)


def target(operators: Any, x: Tensor, tau: float, with_grad: bool = True) -> tuple[Tensor, ...]:
    count = x.shape[2] * x.shape[3] + 1
    assigned = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % count
    return _running(operators, x, tau, with_grad, assigned.to(x.device))


def _running(
    operators: Any, x: Tensor, tau: float, with_grad: bool, assigned: Tensor | None
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[2] * x.shape[3] + 1
    log_mean = torch.linspace(-1, 1, count, dtype=dtype, device=x.device).repeat(x.shape[1], 1)
    log_mean[0] = -math.inf
    log_ratio = log_mean[:, 0] / 10
    offsets = TEMPLATE.offsets_for(*x.shape[2:], x)
    result: tuple[Tensor, ...] = operators.filter_loss_running(
        x, log_mean, log_ratio, 0.3, assigned, offsets, tau, with_grad
    )
    return result


Estimator = Callable[..., tuple[Tensor, ...]]
ESTIMATORS = pytest.mark.parametrize("estimator", [batch, running, target])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAMPLES", "TEMPLATES", "DEPTH", "GRAD_TEMPLATES", "GRAD_POSITIONS"):
        monkeypatch.setattr(kernels, name, 16)
    monkeypatch.setattr(sys.modules["picnn_fast.triton_kernels.templates"], "LONGEST", 8)


@ESTIMATORS
@pytest.mark.gpu(else_cpu=True)
def test_statistics_carry_from_tile_to_tile(estimator: Estimator, small_tiles: None) -> None:
    """Two tiles of samples, of templates and of positions, their largest responses anywhere."""
    x = torch.randn(19, 2, 3, 6, generator=torch.Generator().manual_seed(0)).double()
    x *= torch.logspace(0, 3, 19, dtype=torch.float64)[torch.arange(19) * 8 % 19, None, None, None]
    x = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    expected = estimator(reference, x, 0.1)
    for got, want in zip(estimator(kernels, x, 0.1), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert got.stride() == want.stride()
    loss, grad, *state = estimator(kernels, x, 0.1, False)
    assert grad.numel() == 0
    assert grad.dtype == x.dtype
    for got, want in zip((loss, *state), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# Other pairs, in one tile: tests/ops/test_filter_loss_parity.py.
@pytest.mark.parametrize(
    ("estimator", "value"), [(batch, math.inf), (running, -math.inf), (target, math.nan)]
)
@pytest.mark.gpu(else_cpu=True)
def test_what_is_not_finite_ends_where_the_reference_has_it(
    estimator: Estimator, value: float, small_tiles: None
) -> None:
    x = torch.randn(20, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    x[17, 1, 1, 2] = value
    x = x.to(DEVICE)
    expected, got = (estimator(operators, x, 0.1) for operators in (reference, kernels))
    assert expected[0].isnan().tolist() == [False, True, False]
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.gpu(else_cpu=True)
def test_responses_that_rounding_hides_differences_of_leave_the_target_finite() -> None:
    """What a map's own template and all the others together yield is added up alike."""
    x = 1e9 * torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = PartTemplate.uniform("l1").offsets_for(5, 5, x)
    state = (
        torch.full((3, 26), -math.inf, device=DEVICE),
        torch.full((3,), -math.inf, device=DEVICE),
    )
    assigned = x.flatten(2).argmax(-1)
    got, want = (
        operators.filter_loss_running(x, *state, 0.5, assigned, offsets, 0.1, True)
        for operators in (kernels, reference)
    )
    for one, two in zip(got, want, strict=True):
        assert one.isfinite().all()
        assert two.isfinite().all()
    # No exponential exceeds that of the batch.
    assert got[0].abs().max() <= 6 * math.log(26 * 6)


class LargestNew(TorchDispatchMode):
    """Elements of the largest tensor of numbers made; the interpreter copies memory as bytes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.most = max(self.most, t.numel())
        return out


@ESTIMATORS
@pytest.mark.gpu(else_cpu=True)
def test_responses_are_never_stored(estimator: Estimator) -> None:
    x = torch.rand(9, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with LargestNew() as made:
        estimator(kernels, x, 0.1)
    assert made.most == x.numel()  # one more template than positions would be more
    with LargestNew() as made:
        estimator(reference, x, 0.1)
    assert made.most > x.numel()


@pytest.mark.parametrize(("estimator", "count"), [(batch, 5), (running, 4), (target, 4)])
def test_a_loss_and_its_gradient_are_a_few_kernels_and_nothing_of_pytorchs(
    estimator: Estimator, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []
    for name in vars(kernels).copy():
        if name.endswith("_kernel"):
            launch = lambda *_, name=name, **__: run.append(name)  # noqa: E731
            monkeypatch.setattr(kernels, name, defaultdict(lambda launch=launch: launch))
    others: list[str] = []

    def counted(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            names, results = launched(lambda: operator(*arguments))
            others.extend(names)
            return results

        return call

    names = ("filter_loss", "filter_loss_running")
    operators = SimpleNamespace(**{name: counted(getattr(kernels, name)) for name in names})
    with torch.device("meta"):
        estimator(operators, torch.rand(4, 3, 5, 5), 0.1)
    assert len(run) == count
    assert others == []


@pytest.mark.gpu(else_cpu=True)
def test_assigned_to_no_template_reads_within_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 4, 2, 3, generator=generator).to(DEVICE)
    offsets = PartTemplate(profile=torch.rand(3, 5, generator=generator)).offsets_for(2, 3, x)
    state = (torch.zeros(4, 7, device=DEVICE), torch.zeros(4, device=DEVICE), 0.5)
    assigned = torch.tensor([[-1, 7, 2**62, -(2**62)]], device=DEVICE)
    got, want = (
        kernels.filter_loss_running(x, *state, a, offsets, 0.1, True)
        for a in (assigned, assigned.clamp(0, 6))
    )
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
