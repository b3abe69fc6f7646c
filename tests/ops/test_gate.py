"""The projection and the penalty of a class-specific gate."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from hypothesis.extra.numpy import array_shapes, arrays

from picnn_fast.functional import gate_penalty, project_gate

GATES = arrays(
    np.float64, array_shapes(min_dims=2, max_dims=2), elements=strategies.floats(-1e6, 1e6)
)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(GATES)
def test_a_projected_gate_is_allowed_and_stays_as_it_is(values: np.ndarray) -> None:
    gate = project_gate(torch.from_numpy(values))
    assert ((gate >= 0) & (gate <= 1)).all()
    assert (gate.amax(0) == 1).all()
    assert torch.equal(project_gate(gate), gate)
    # The same class stays the strongest.
    assert (gate.gather(0, torch.from_numpy(values).argmax(0)[None]) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_columns_without_anything_positive_keep_their_greatest_and_nan_stays(dtype) -> None:
    nan = float("nan")
    gate = torch.tensor([[0.0, -1.0, 0.5, nan], [0.0, -0.5, -2.0, 1.0]], dtype=dtype)
    got = project_gate(gate)
    assert got.dtype == dtype
    assert got[:, :3].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert got[:, 3].isnan().all()


def test_the_smallest_numbers_do_not_overflow() -> None:
    gate = torch.tensor([[1e-45, 1e-45], [-3e38, 3e38]])
    assert project_gate(gate).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("norm", "want"), [("l1", (0, 0.5, 2)), ("l2", (0, 0.25, 4)), ("smooth_l1", (0, 0.125, 1.5))]
)
def test_the_penalty_is_of_what_exceeds_the_bound(norm, want) -> None:
    gate = torch.tensor([[-1.0, 2.0], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    for bound, value in zip((5.0, 3.5, 2.0), want, strict=True):
        assert gate_penalty(gate, bound, norm=norm).item() == value
    torch.autograd.gradcheck(lambda g: gate_penalty(g, 3.5, norm=norm), gate)


def test_it_is_summed_in_single_precision_at_least() -> None:
    gate = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    penalty = gate_penalty(gate, 4095.0)
    assert penalty.dtype == torch.float32
    assert penalty.item() == 1


@pytest.mark.parametrize("function", [project_gate, lambda gate: gate_penalty(gate, 1.0)])
def test_what_is_no_gate_is_refused_by_name(function) -> None:
    with pytest.raises(ValueError, match=r"gate: got shape \(3,\), want \[classes, filters\]"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="at least one class"):
        function(torch.ones(0, 3))
    with pytest.raises(TypeError, match=r"gate: got dtype torch\.int64"):
        function(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="bound: got -1"):
        gate_penalty(torch.ones(2, 3), -1.0)
    with pytest.raises(ValueError, match="norm: got 'l0'"):
        gate_penalty(torch.ones(2, 3), 1.0, norm="l0")
