"""Histogram family: every backend counts as the reference does, to the last sample and bit."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast import backends
from picnn_fast.ops import histogram
from picnn_fast.reference import histogram as reference
from tests.cases import case_id, in_turn, kernel_cases, pairwise
from tests.conftest import Backend
from tests.ops.cases import DTYPES
from tests.reference.test_histogram import exact_counts, fresh

OPS = torch.ops.picnn_fast
State = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    samples: int
    filters: int
    bins: int
    classes: int


ODD = Shape(67, 5, 4, 4)
LAYOUTS = ("c_order", "f_order", "sliced", "expanded")


def laid_out(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """``x`` on the device with the memory layout named; "expanded" repeats its first row."""
    if layout == "f_order":
        return x.to(device).T.contiguous().T
    if layout == "sliced":
        memory = torch.full((2 * x.shape[0] + 1, 3 * x.shape[1] + 2), math.nan, dtype=x.dtype)
        memory[1::2, 2::3] = x
        return memory.to(device)[1::2, 2::3]
    if layout == "expanded" and len(x) > 0:
        return x[:1].to(device).expand(x.shape)
    return x.to(device)


def normal(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 activations of very different scales, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.samples, shape.filters, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.arange(shape.filters) % 7 - 3.0)
    return x, torch.randint(0, shape.classes, (shape.samples,), generator=generator)


def state_on(device: torch.device, state: State) -> State:
    return tuple(t.to(device).clone() for t in state)


def updated(state: State, x: Tensor, labels: Tensor) -> State:
    """A copy of ``state`` with samples added by the backend in charge."""
    state = tuple(t.clone() for t in state)
    assert OPS.histogram_update(*state, x, labels).item() == -1
    return state


def reference_updated(state: State, x: Tensor, labels: Tensor) -> State:
    state = tuple(t.cpu().clone() for t in state)
    assert reference.histogram_update(*state, x.cpu(), labels.cpu()).item() == -1
    return state


def assert_same(got: State, expected: State) -> None:
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one.cpu(), two.cpu())


# Counts -------------------------------------------------------------------------------------------


def special_columns(dtype: torch.dtype) -> Tensor:
    """Columns ``[12, N]`` at the edges of what a dtype holds."""
    info = torch.finfo(dtype)
    # The smallest positive number; what it rounds to in other arithmetic must not matter.
    tiny = torch.tensor(info.smallest_normal, dtype=dtype) * info.eps
    steps = torch.arange(12, dtype=torch.float64)
    largest = torch.full((12,), info.max, dtype=torch.float64)
    columns = [
        torch.full((12,), 3.0),
        torch.zeros(12),
        torch.tensor([0.0, -0.0] * 6),
        torch.full((12,), -1e4),
        6e4 + steps * 32,
        1e3 + steps * 2.0**-10,
        tiny.double() * steps,
        -tiny.double() * steps,
        torch.where(steps < 6, -tiny.double() * steps, steps / 16 * largest),
        torch.where(steps < 6, tiny.double() * (steps - 3), largest),
        torch.where(steps % 2 == 0, largest, -largest),
        largest * (steps / 6 - 1).clamp(-1, 1),
        torch.where(steps == 0, -1.0, 2.0**-15 * steps),
        steps - 6,
        (steps - 6) * 0.999,
    ]
    return torch.stack([column.double() for column in columns], 1).to(dtype)


@kernel_cases(("dtype", "bins"), pairwise(DTYPES, [2, 3, 7, 64]), in_turn(DTYPES, [2, 64, 3, 7]))
def test_counts_of_special_numbers_are_exact(backend: Backend, dtype, bins):
    x = special_columns(dtype)
    if backend.device.type == "cpu" and not backend.slow:
        x = x.repeat(1, 2)
    labels = torch.arange(12) % 3
    state = state_on(backend.device, fresh(x.shape[1], bins, 3))
    got = updated(state, x.to(backend.device), labels.to(backend.device))
    expected = exact_counts(x.double().numpy(), labels.numpy(), bins, 3)
    assert torch.equal(got[0].cpu(), torch.from_numpy(expected))


@kernel_cases(["dtype"], [(torch.float32,), (torch.float64,)], [(torch.float32,)])
def test_values_widen_the_range_in_both_directions(backend: Backend, dtype):
    """Sample by sample, each beyond what was seen: below, above, far off, and back at zero."""
    rows = torch.tensor([[1.0, 0.0, 5.0], [1.5, -1.0, 5.0], [0.25, 2.0, -5.0], [-7.0, -40.0, 5.0]])
    rows = torch.cat((rows, rows * 1000, rows * 1e-3, rows.flip(0) * 1e5)).to(dtype)
    labels = torch.arange(len(rows)) % 2
    state = state_on(backend.device, fresh(3, 16, 2))
    for row, label in zip(rows.to(backend.device), labels.to(backend.device), strict=True):
        state = updated(state, row[None], label[None])
    expected = exact_counts(rows.double().numpy(), labels.numpy(), 16, 2)
    assert torch.equal(state[0].cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("classes", "dtype", "layout"),
    [
        *((3, dtype, "c_order") for dtype in DTYPES),
        (3, torch.float32, "f_order"),
        (600, torch.float32, "c_order"),
        *((100, dtype, "c_order") for dtype in DTYPES),
    ],
    ids=case_id,
)
def test_long_inputs_equal_the_reference(cpp: Backend, classes, dtype, layout):
    """Several tiles, runs and threads, growing as they go; tables in scratch, in place, and of some
    classes at a time."""
    samples, filters = 9001, 37
    generator = torch.Generator().manual_seed(0)
    growth = torch.linspace(0, 9, samples).exp2()[:, None]
    x = torch.randn(samples, filters, generator=generator) * growth
    x[:, 1] = x[:, 1].sort().values
    x[:, 2] = x[:, 2].sort(descending=True).values
    x = laid_out(x.to(dtype), layout, cpp.device)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    start = fresh(filters, 50, classes)
    for part, y in zip(x.split(6000), labels.split(6000), strict=True):
        expected = reference_updated(start, part, y)
        assert_same(updated(start, part, y), expected)
        start = expected


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        *((Shape(1500, 100, 33, 10), dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
        (Shape(200, 32, 2, 1), torch.float32, "c_order"),
        (Shape(400, 64, 16, 3), torch.float32, "c_order"),
        (Shape(9000, 128, 17, 2), torch.float32, "c_order"),
        (Shape(8200, 200, 64, 64), torch.float32, "c_order"),
        (Shape(70_000, 64, 8, 2), torch.float32, "c_order"),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("growth", [0.1, 9])
def test_many_samples_of_each_class_are_counted_exactly(cpp: Backend, shape, dtype, layout, growth):
    """Where samples of a class are counted together: uneven classes, one without any."""
    values, labels = normal(shape)
    values *= torch.linspace(0, growth, shape.samples, dtype=torch.float64).exp2()[:, None]
    labels[labels == shape.classes // 2] = 0
    x = laid_out(values.to(dtype), layout, cpp.device)
    start = fresh(shape.filters, shape.bins, shape.classes)
    for part, y in zip(x.split(6000), labels.split(6000), strict=True):
        expected = reference_updated(start, part, y)
        assert_same(updated(start, part, y), expected)
        start = expected


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(3000, 70, 64, 1003), torch.float32),
        (Shape(3000, 70, 33, 303), torch.bfloat16),
        (Shape(9000, 40, 16, 100), torch.float32),
        (Shape(2000, 64, 2, 65), torch.float64),
    ],
    ids=case_id,
)
def test_many_classes_of_very_different_sizes_are_counted_exactly(cpp: Backend, shape, dtype):
    """Two to a few hundred samples beside classes with one or none, and long stretches of these."""
    values, _ = normal(shape)
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(shape.samples, generator=generator) ** 8 * shape.classes).long()
    labels[labels > shape.classes // 2] = shape.classes - 1
    x = values.to(dtype)
    expected = reference_updated(fresh(shape.filters, shape.bins, shape.classes), x, labels)
    assert_same(updated(fresh(shape.filters, shape.bins, shape.classes), x, labels), expected)


@kernel_cases(
    ("dtype", "samples"),
    pairwise([torch.float32, torch.bfloat16, torch.float16], [4, 600]),
    [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4)],
)
def test_small_types_are_counted_on_grids_wider_than_they_reach(backend: Backend, dtype, samples):
    """The inverse of a bin's width is then 0 in the type the samples are counted in."""
    wide = torch.exp2(torch.arange(150.0, 186, dtype=torch.float64))[None].repeat(2, 1)
    wide[0, ::2] = 0
    start = reference_updated(fresh(36, 16, 2), wide, torch.tensor([0, 0]))
    largest = torch.finfo(dtype).max
    values = torch.linspace(0, largest, 36 * samples, dtype=torch.float64).view(samples, 36)
    x, labels = values.to(dtype), torch.arange(samples) % 2
    expected = reference_updated(start, x.double(), labels)
    got = updated(state_on(backend.device, start), x.to(backend.device), labels.to(backend.device))
    assert_same(got, expected)


def test_one_bin_counts_past_sixteen_bits(cpp: Backend):
    samples = 200_001
    x, labels = torch.ones(samples, 2), torch.zeros(samples, dtype=torch.int64)
    state = updated(fresh(2, 4, 2), x, labels)
    assert (state[0].amax((1, 2)) == samples).all()
    assert (state[0].sum((1, 2)) == samples).all()


def test_samples_times_classes_beyond_32_bits(cpp: Backend):
    samples, classes = 2_200_000, 1000
    assert samples * classes > 2**31
    labels = torch.arange(samples) % classes
    x = (labels[:, None] >= 500).float()
    counts, _, _ = updated(fresh(1, 2, classes), x, labels)
    assert (counts[0, 0, :500] == samples // classes).all()
    assert (counts[0, 1, 500:] == samples // classes).all()
    assert counts.sum() == samples


# Chunks, orders and ranks -------------------------------------------------------------------------

number = st.one_of(
    st.floats(-100, 100, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1e6, 1e6 + 0.125, 1e-45, -1e-45]),
)


@st.composite
def stream(draw) -> tuple[np.ndarray, np.ndarray, int, list[int], list[int]]:
    """Samples, labels, bins, an order, and the sizes of the chunks."""
    filters = draw(st.integers(1, 3))
    rows = draw(st.lists(st.tuples(*[number] * filters, st.integers(0, 2)), max_size=25))
    x = np.array([row[:filters] for row in rows], dtype=np.float32).reshape(-1, filters)
    labels = np.array([row[filters] for row in rows], dtype=np.int64)
    order = draw(st.permutations(range(len(rows))))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    sizes = np.diff([0, *cuts, len(rows)]).tolist()
    return x, labels, draw(st.integers(2, 20)), order, sizes


@given(stream())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_chunks_and_order_do_not_matter(cpp: Backend, case):
    x, labels, bins, order, sizes = case
    expected = torch.from_numpy(exact_counts(x, labels, bins, 3))
    state = fresh(x.shape[1], bins, 3)
    chunks = zip(
        torch.from_numpy(x)[order].split(sizes),
        torch.from_numpy(labels)[order].split(sizes),
        strict=True,
    )
    for part, label in chunks:
        state = updated(state, part, label)
    assert torch.equal(state[0], expected)
    assert (state[0].sum((1, 2)) == len(x)).all()


def test_chunks_do_not_matter_on_any_backend(backend: Backend):
    shape = Shape(60, 3, 6, 3)
    values, labels = normal(shape)
    values[40:] *= 100
    x, labels = values.float().to(backend.device), labels.to(backend.device)
    empty = state_on(backend.device, fresh(3, 6, 3))
    whole = updated(empty, x, labels)
    state, order = empty, torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for rows in order.to(backend.device).split(23):
        state = updated(state, x[rows], labels[rows])
    assert_same(state, whole)


def test_ranks_merge_by_widening(backend: Backend):
    shape = Shape(40, 4, 10, 3)
    values, labels = normal(shape)
    values[20:] = values[20:] * 37 + 5
    x, labels = values.float().to(backend.device), labels.to(backend.device)
    empty = state_on(backend.device, fresh(4, 10, 3))
    ranks = [updated(empty, x[part], labels[part]) for part in (slice(20), slice(20, 40))]
    ranks.append(empty)  # one that saw nothing
    minimum = torch.stack([rank[1] for rank in ranks]).amin(0)
    maximum = torch.stack([rank[2] for rank in ranks]).amax(0)
    counts = sum(reference.widen(*rank, minimum, maximum) for rank in ranks)
    assert_same((counts, minimum, maximum), updated(empty, x, labels))


# Refusals -----------------------------------------------------------------------------------------


@kernel_cases(
    ("bad", "classes", "dtype"),
    pairwise([math.nan, math.inf, -math.inf], [2, 500], DTYPES),
    in_turn([math.nan, math.inf, -math.inf], [2, 500], DTYPES),
)
def test_the_first_column_that_is_not_finite_is_named(backend: Backend, bad, classes, dtype):
    shape = Shape(30, 20, 4, classes)
    values, labels = normal(shape)
    start = state_on(backend.device, reference_updated(fresh(20, 4, classes), values, labels))
    values[29, 17] = bad
    values[3, 18] = math.nan
    state = tuple(t.clone() for t in start)
    column = OPS.histogram_update(
        *state, values.to(dtype).to(backend.device), labels.to(backend.device)
    )
    assert (column.shape, column.dtype, column.item()) == ((), torch.int64, 17)
    if backend.name.startswith(("reference", "cpp")):
        assert_same(state, start)


@pytest.mark.parametrize(("filters", "classes"), [(20, 2), (64, 2), (64, 100)])
def test_the_first_column_that_is_not_finite_is_named_wherever_its_sample_lies(
    cpp: Backend, filters, classes
):
    values = torch.randn(20_000, filters)
    values[0, 9], values[19_999, 5] = math.inf, math.nan
    labels = torch.arange(20_000) % classes
    state = fresh(filters, 64, classes)
    assert OPS.histogram_update(*state, values, labels).item() == 5
    assert_same(state, fresh(filters, 64, classes))


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_update_refuses_and_writes_nothing(name: str):
    if name not in backends.available_backends():
        pytest.skip(f"{name} is not available")
    with backends.use_backend(name):
        state = fresh(3, 4, 2)
        histogram.update(*state, torch.randn(8, 3), torch.arange(8, dtype=torch.int32) % 2)
        before = tuple(t.clone() for t in state)
        x = torch.zeros(4, 3)
        x[2, 1] = math.inf
        labels = torch.tensor([0, 1, 1, 0])
        with pytest.raises(ValueError, match="activations: got NaN or infinity in column 1"):
            histogram.update(*state, x, labels)
        with pytest.raises(ValueError, match="labels: got values in"):
            histogram.update(*state, x * 0, labels + 1)
        with pytest.raises(ValueError, match="activations: got 2 filters, want 3"):
            histogram.update(*state, x[:, :2], labels)
        with pytest.raises(TypeError, match=r"counts: got dtype torch\.int32"):
            histogram.update(state[0].int(), *state[1:], x, labels)
        with pytest.raises(ValueError, match="counts: got shape"):
            histogram.update(state[0][:, :1], *state[1:], x, labels)
        many = torch.empty((3, 2**24 + 1, 1), dtype=torch.int64, device="meta")
        with pytest.raises(ValueError, match="counts: got shape"):
            histogram.update(many, *state[1:], x, labels)
        with pytest.raises(ValueError, match="counts: got strides"):
            histogram.update(state[0].mT.contiguous().mT, *state[1:], x, labels)
        with pytest.raises(TypeError, match=r"minimum: got dtype torch\.float32"):
            histogram.update(state[0], state[1].float(), state[2], x, labels)
        with pytest.raises(ValueError, match="maximum: got shape"):
            histogram.update(*state[:2], state[2][:2], x, labels)
        assert_same(state, before)


def test_compiled_kernel_refuses_what_would_leave_memory(cpp: Backend):
    x, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for wrong in (torch.tensor([0, 0, 2, 0]), torch.tensor([0, -1, 0, 0])):
        with pytest.raises(RuntimeError, match="labels: got"):
            OPS.histogram_update(*fresh(3, 4, 2), x, wrong)
        with pytest.raises(RuntimeError, match="labels: got"):
            OPS.soft_histogram(x, wrong, torch.zeros(3), torch.ones(3), 4, 2)
    for low, high in ((math.nan, 1.0), (-math.inf, 1.0), (1.0, 0.0), (math.inf, 1.0)):
        counts, minimum, maximum = fresh(3, 4, 2)
        minimum[1], maximum[1] = low, high
        with pytest.raises(RuntimeError, match="minimum, maximum: got"):
            OPS.histogram_update(counts, minimum, maximum, x, labels)
    counts, minimum, maximum = fresh(3, 4, 2)
    with pytest.raises(RuntimeError, match=r"counts: got shape \[2, 4, 2\], want \[3, 4, 2\]"):
        OPS.histogram_update(counts[:2], minimum, maximum, x, labels)
    with pytest.raises(RuntimeError, match="want 2 to"):
        OPS.histogram_update(counts[:, :1].contiguous(), minimum, maximum, x, labels)


# Soft counts --------------------------------------------------------------------------------------


def soft_inputs(
    shape: Shape, layout: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations, labels, low and width: some samples beyond the range, some at bin centres."""
    values, labels = normal(shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spread = torch.exp2(torch.arange(shape.filters) % 7 - 3.0)
    low = (-1.7 * spread).to(wide)
    width = (3.1 * spread / shape.bins).to(wide)
    values[::5] = low + torch.arange(len(values[::5]))[:, None] % shape.bins * width
    x = laid_out(values.to(dtype), layout, device)
    return x, labels.to(device), low.to(device), width.to(device)


def test_soft_counts_are_the_definition_in_double_precision(backend: Backend):
    shape = Shape(45, 4, 6, 3)
    x, labels, low, width = soft_inputs(shape, "c_order", torch.float64, backend.device)
    x = (x + 0.01 * width).requires_grad_()  # off the centres, where the slope has a step
    counts = OPS.soft_histogram(x, labels, low, width, 6, 3)
    # Weight max(0, 1 - |t - j|) for bin j of a position clamped to the outer centres.
    t = ((x - low) / width).clamp(0, 5)
    weights = (1 - (t[..., None] - torch.arange(6, device=x.device)).abs()).clamp_min(0)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    definition = torch.einsum("mnb,mk->nbk", weights, one_hot)
    torch.testing.assert_close(counts, definition, rtol=0, atol=1e-12)
    grad = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grad = grad.to(backend.device)
    (got,) = torch.autograd.grad(counts, x, grad)
    (expected,) = torch.autograd.grad(definition, x, grad)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_only_the_activations_have_a_gradient(backend: Backend):
    x, labels, low, width = soft_inputs(ODD, "c_order", torch.float32, backend.device)
    for leaf in (x, low, width):
        leaf.requires_grad_()
    counts = OPS.soft_histogram(x, labels, low, width, 4, 4)
    (grad,) = torch.autograd.grad(counts.square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert low.grad is None
    assert width.grad is None
    direct = OPS.soft_histogram(x, labels, low, width, 4, 4)
    (expected,) = torch.autograd.grad(direct.square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_long_soft_sums_stay_accurate(cpp: Backend):
    shape = Shape(60_001, 3, 8, 2)
    x, labels, low, width = soft_inputs(shape, "c_order", torch.float32, cpp.device)
    counts = OPS.soft_histogram(x, labels, low, width, 8, 2)
    expected = reference.soft_histogram(x.double(), labels, low.double(), width.double(), 8, 2)
    torch.testing.assert_close(counts.double(), expected, rtol=1e-4, atol=1e-2)


def test_update_compiles_into_one_graph(backend: Backend):
    torch._dynamo.reset()
    values, labels = normal(ODD)
    x, labels = values.float().to(backend.device), labels.to(backend.device)
    eager, traced = (state_on(backend.device, fresh(5, 4, 4)) for _ in range(2))
    histogram.update(*eager, x, labels)
    torch.compile(histogram.update, fullgraph=True, backend="aot_eager")(*traced, x, labels)
    assert_same(traced, eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("bins", [3, 64])
def test_special_numbers_count_the_same_through_tables(cpp: Backend, dtype, bins):
    """Column by column too: how cells are found depends on the filters side by side."""
    x = special_columns(dtype)[torch.arange(768) % 12]
    x = x[:, torch.arange(40) % x.shape[1]]
    labels = torch.arange(768) % 3
    expected = torch.from_numpy(exact_counts(x.double().numpy(), labels.numpy(), bins, 3))
    assert torch.equal(updated(fresh(x.shape[1], bins, 3), x, labels)[0], expected)
    for n in range(x.shape[1]):
        got = updated(fresh(1, bins, 3), x[:, n : n + 1].contiguous(), labels)
        assert torch.equal(got[0][0], expected[n])


@pytest.mark.parametrize(
    ("samples", "bins", "classes"),
    [(65_535, 4, 2), (65_536, 4, 2), (131_071, 4, 2), (131_071, 64, 700)],
)
def test_one_bin_holds_every_sample_where_runs_end(cpp: Backend, samples, bins, classes):
    x, labels = torch.ones(samples, 40), torch.zeros(samples, dtype=torch.int64)
    counts, _, _ = updated(fresh(40, bins, classes), x, labels)
    assert (counts.amax((1, 2)) == samples).all()
