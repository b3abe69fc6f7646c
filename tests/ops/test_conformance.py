"""What every operator owes, written once, over all operators and backends.

``cases.py`` says how an operator's arguments are made and how far its results may be from the
reference's. What is particular to a family is in the family's own files.
"""

import contextlib
import itertools
import math
import mmap
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast import backends
from tests.cases import Row, case_id, few, in_turn, noted
from tests.conftest import BACKENDS, Backend, other_instruction_sets
from tests.ops.cases import (
    CASES,
    MAP_LAYOUTS,
    Arguments,
    OperatorCase,
    as_tuple,
    assert_near,
    dense,
    on_device,
    steps,
)

OPCHECKS = {
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
}
DIFFERENTIABLE = [case for case in CASES if case.leaves]
COMPILED = ("cpp", "cuda-fibres", "cuda")


def over(
    cases: Iterable[OperatorCase],
    names: tuple[str, ...] = (),
    rows: Callable[[OperatorCase, str], Iterable[Row]] = lambda case, backend: [()],
    backends: Callable[[str], bool] = lambda backend: backend in ALL,
) -> pytest.MarkDecorator:
    """Each case on each backend that ``backends`` wants, in its rows."""
    params = []
    for case in cases:
        for entry in (*BACKENDS, *other_instruction_sets()):
            name, marks = (entry, ()) if isinstance(entry, str) else (entry.values[0], entry.marks)
            backend = str(name)
            if backends(backend):
                for row in rows(case, backend):
                    words = "-".join(map(case_id, (case, backend, *row)))
                    params.append(pytest.param(backend, case, *row, marks=marks, id=words))
    return pytest.mark.parametrize(("backend", "case", *names), params, indirect=["backend"])


ALL = [entry if isinstance(entry, str) else entry.values[0] for entry in BACKENDS]


def other_instruction_set(backend: str) -> bool:
    return backend not in ALL


def traced(backend: str) -> bool:
    """Of the CPU's two: what is traced does not depend on the kernel."""
    return backend in ("reference", "cpp") or backend.endswith(("-gpu", "cuda"))


# Running a case -----------------------------------------------------------------------------------


def moved(backend: Backend, arguments: Arguments) -> Arguments:
    return tuple(on_device(backend.device, t) if isinstance(t, Tensor) else t for t in arguments)


def bits(t: Tensor) -> Tensor:
    """The elements as integers, by which NaN equals itself."""
    if not t.is_floating_point():
        return t
    return (
        t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])
    )


def run(case: OperatorCase, arguments: Arguments) -> tuple[Tensor, ...]:
    """The operator's results, then what it wrote to; the other arguments are as they were."""
    written = case.written()
    given = [a.clone() if i in written else a for i, a in enumerate(arguments)]
    before = [bits(a).clone() if isinstance(a, Tensor) else a for a in given]
    results = as_tuple(case.operator(*given))
    for i, (one, two) in enumerate(zip(given, before, strict=True)):
        if isinstance(one, Tensor) and i not in written:
            assert torch.equal(bits(one), two), f"argument {i} was written to"
    return (*results, *(given[i] for i in written))


def expected(case: OperatorCase, arguments: Arguments) -> tuple[Tensor, ...]:
    """The reference's, of arguments on the CPU."""
    written = case.written()
    given = [a.clone() if i in written else a for i, a in enumerate(arguments)]
    return (*case.reference(*given), *(given[i] for i in written))


def wide(arguments: Arguments) -> Arguments:
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def with_leaves(case: OperatorCase, arguments: Arguments) -> tuple[Arguments, list[Tensor]]:
    given = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    leaves = [given[i].requires_grad_() for i in case.leaves]
    return tuple(given), leaves


def cotangents(results: Iterable[Tensor]) -> list[Tensor]:
    """For results that have gradients, laid out like them."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator).relu() - 0.4)
        for t in results
    ]


def gradients(case: OperatorCase, arguments: Arguments) -> tuple[Tensor, ...]:
    """The results, then the gradients of the leaves."""
    given, leaves = with_leaves(case, arguments)
    results = as_tuple(case.operator(*given))
    outputs = [t for t in results if t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, cotangents(outputs))
    return (*(t.detach() for t in results), *grads)


def expected_gradients(case: OperatorCase, arguments: Arguments) -> tuple[Tensor, ...]:
    given, leaves = with_leaves(case, wide(arguments) if case.judged_wide else arguments)
    shapes, _ = with_leaves(case, arguments)
    outputs = [t for t in as_tuple(case.operator(*shapes)) if t.requires_grad]
    results = as_tuple((case.plain or case.reference)(*given))[: len(outputs)]
    return torch.autograd.grad(
        results, leaves, [g.to(t) for g, t in zip(cotangents(outputs), results, strict=True)]
    )


def accumulate(case: OperatorCase, arguments: Arguments) -> torch.dtype:
    doubles = arguments[case.maps[0]].dtype == torch.float64
    return torch.float64 if doubles else torch.float32


def assert_conforms(backend: Backend, case: OperatorCase, arguments: Arguments) -> None:
    """Results and gradients are the reference's, of its types and in its layout."""
    sums = accumulate(case, arguments)
    results = run(case, moved(backend, arguments))
    same = expected(case, arguments)
    exact = expected(case, wide(arguments)) if case.judged_wide else same
    for got, one, two, units in zip(results, same, exact, case.rounding, strict=True):
        assert (got.shape, got.dtype) == (one.shape, one.dtype)
        assert got.device.type == backend.device.type
        if got.numel():
            assert steps(got) == steps(one)
        if units is None:
            assert torch.equal(got.cpu(), one)
        else:
            assert_near(got, two, units, sums, case.least)
    if not case.leaves:
        return
    grads = gradients(case, moved(backend, arguments))[len(results) :]
    want = expected_gradients(case, arguments)
    for i, got, two, units in zip(case.leaves, grads, want, case.gradient_rounding, strict=True):
        leaf = arguments[i]
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
        if dense(leaf):
            assert steps(got) == steps(leaf)
        assert_near(got, two, units, sums, case.least)


# Which backend runs -------------------------------------------------------------------------------


def test_every_operator_has_a_case():
    assert sorted(case.name for case in CASES) == sorted(backends.operators())


# Results ------------------------------------------------------------------------------------------


def result_rows(case: OperatorCase, backend: str) -> list[Row]:
    """In full for one shape, and few others; few altogether where machine code is slow."""
    if backend in ("cpp", "cuda"):
        others = [name for name in case.shapes if name != "odd"]
        return [
            *itertools.product(["odd"], case.layouts, case.dtypes),
            *few(others, case.layouts[:2], case.dtypes),
        ]
    if backend == "cuda-fibres":
        rows = few(case.shapes, case.layouts, case.dtypes)
        # What costs is the thread, not the layout: those shapes in one layout each.
        return [row for row in rows if row[0] not in case.heavy or row[1] != case.layouts[1]]
    if backend.startswith("reference"):
        # Its numbers are those that it is held to: what is asked is the way to it.
        rows = in_turn(["odd"], case.layouts, case.dtypes)
        return [*rows, ("empty_batch", case.layouts[0], case.dtypes[0])]
    shapes = [name for name in case.shapes if name not in case.heavy]
    return in_turn(shapes, case.layouts, case.dtypes)


@over(CASES, ("shape", "layout", "dtype"), result_rows)
def test_results_and_gradients_are_the_references(backend: Backend, case, shape, layout, dtype):
    assert_conforms(backend, case, case.arguments(shape, layout, dtype))


@over(CASES, ("dtype",), lambda case, _: [(t,) for t in case.dtypes], other_instruction_set)
def test_another_instruction_set_gives_the_references_results(backend: Backend, case, dtype):
    """The same source compiled again: the layouts that kernels tell apart in every dtype, and of
    the shapes and the other layouts each in one."""
    main = itertools.product(case.layouts[:2], case.dtypes)
    rows = [(shape, *row) for shape, row in in_turn(list(case.shapes), list(main))]
    rows += in_turn(["odd"], case.layouts[2:], case.dtypes) if case.layouts[2:] else []
    for shape, layout, of in rows:
        if of == dtype:
            with noted(shape, layout, dtype):
                assert_conforms(backend, case, case.arguments(shape, layout, dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_shape_gives_the_reference(cpp: Backend, case):
    @given(
        shape=case.any_shape,
        layout=st.sampled_from(case.layouts),
        dtype=st.sampled_from(case.dtypes),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=25)
    def holds(shape, layout, dtype, seed):
        assert_conforms(cpp, case, case.arguments(shape, layout, dtype, seed))

    holds()


@over(CASES, backends=lambda backend: backend.startswith("cpp"))
def test_any_number_of_threads_gives_the_same_bits(backend: Backend, case, threads):
    for layout in case.layouts[:2]:
        arguments = case.arguments(case.many, layout)
        runs = []
        for count in (1, 2, 5) if backend.name == "cpp" else (1, 5):
            threads(count)
            results = (gradients if case.leaves else run)(case, arguments)
            runs.append([bits(t) for t in results])
        for others in zip(*runs, strict=True):
            assert all(torch.equal(others[0], other) for other in others[1:])


# Arguments ----------------------------------------------------------------------------------------


@over(CASES, backends=lambda backend: backend in ("cpp", "cuda-fibres"))
def test_arguments_of_another_shape_or_dtype_are_refused_by_name(backend: Backend, case):
    # In float64 every optional argument is given.
    arguments = moved(backend, case.arguments(dtype=torch.float64))
    names = [a.name for a in case.operator._schema.arguments]
    # The kernels' own words for maps.
    words = [*names, "x", "maps"]
    wrong: list[tuple[str, Arguments]] = []
    for i, value in enumerate(arguments):
        if not isinstance(value, Tensor):
            continue
        others = [("another axis", value[None])] if value.numel() > 1 else []
        others += [
            (f"less of axis {axis}", value.narrow(axis, 0, value.shape[axis] - 1))
            for axis in range(value.ndim)
            if axis not in case.free.get(i, ())
        ]
        others += [("complex", value.to(torch.complex64))]
        if not value.is_floating_point():
            others += [("short", value.to(torch.int16))]
        wrong += [
            (f"{names[i]}: {what}", (*arguments[:i], other, *arguments[i + 1 :]))
            for what, other in others
        ]
    for what, bad in wrong:
        try:
            case.operator(*bad)
        except (RuntimeError, TypeError, ValueError) as error:
            message = str(error).splitlines()[0]
        else:
            pytest.fail(f"taken: {what}")
        assert any(re.search(rf"\b{word}\b", message) for word in words), f"{what}: {message}"


# Whether a copy is made, the operator decides, not the kernel of an instruction set.
@over(CASES, backends=lambda backend: backend in COMPILED)
def test_kernels_read_their_arguments_where_they_lie(backend: Backend, case):
    if backend.name.startswith(case.copied):
        pytest.skip("copied by design")
    for layout in case.layouts[:3]:
        arguments = moved(backend, case.arguments("odd", layout))
        size = min(arguments[i].numel() for i in case.maps)
        with Copies(size) as copies:
            case.operator(*arguments)
        assert copies.names == [], layout


def far_apart(t: Tensor, axes: Sequence[int]) -> Tensor:
    """``t`` where the last along each of ``axes`` lies 2**31 elements behind the first, in a file
    of holes: what lies between is never touched, and costs nothing."""
    strides = list(t.narrow(0, 0, 1).contiguous().stride())
    for i, axis in enumerate(axes, start=1):
        strides[axis] = (2**31 // (t.shape[axis] - 1) // 64 + i) * 64
    last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    with tempfile.TemporaryFile() as file:
        file.truncate((last + 1) * t.itemsize)
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=t.dtype)
    far = memory.as_strided(t.shape, strides).copy_(t)
    assert torch.equal(far, t)  # no two elements in one place
    return far


@over(CASES, backends=lambda backend: backend in ("cpp", "cuda-fibres", "triton"))
def test_maps_may_lie_further_apart_than_32_bits_count(backend: Backend, case):
    batch, *rest = case.shapes["small"]
    arguments = case.arguments((max(batch, 3), *rest), dtype=case.dtypes[-1])
    axes = (0,) if "rows_apart" in case.layouts else (0, 1)
    far = [far_apart(a, axes) if i in case.maps else a for i, a in enumerate(arguments)]
    assert_conforms(backend, case, tuple(far))


# Sizes of what is expanded to maps [2, 3, 5, 7].
EXPANDED = [(2, 3, 5, 1), (2, 3, 1, 7), (2, 3, 1, 1), (2, 1, 5, 1), (1, 1, 1, 1)]


@over([case for case in CASES if case.layouts == MAP_LAYOUTS])
def test_expanded_maps_are_read_where_they_are_or_refused(backend: Backend, case):
    """The public functions copy such maps. Never outside of their memory."""
    arguments = list(moved(backend, case.arguments((2, 3, 5, 7))))
    for sizes in EXPANDED:
        small = torch.rand(sizes, generator=torch.Generator().manual_seed(0)).to(backend.device)
        results = []
        for maps in (small.expand(2, 3, 5, 7).contiguous(), small.expand(2, 3, 5, 7)):
            for i in case.maps:
                arguments[i] = maps
            with contextlib.ExitStack() as stack:
                # One step for all positions, or none: where there are two, it is refused.
                two = maps.stride()[2:] in ((1, 0), (0, 1))
                if two and not backend.name.startswith("reference"):
                    stack.enter_context(pytest.raises(RuntimeError, match="stride"))
                results.append(as_tuple(case.operator(*arguments)))
        torch.testing.assert_close(results[-1], results[0])


class Copies:
    """Names of the copies of at least ``size`` elements that were made inside."""

    def __init__(self, size: int) -> None:
        self.size, self.names = size, []
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )

    def __enter__(self) -> "Copies":
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = self.profile.events()
        assert any(event.name.startswith("picnn_fast::") for event in events)
        self.names += [
            event.name
            for event in events
            if event.name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous")
            and any(shape and math.prod(shape) >= self.size for shape in event.input_shapes)
        ]


@over(CASES)
def test_values_that_are_not_finite_are_those_of_the_reference(backend: Backend, case):
    for layout in case.layouts[:2]:  # the two that kernels tell apart
        assert_same_values_that_are_not_finite(backend, case, layout)


def assert_same_values_that_are_not_finite(
    backend: Backend, case: OperatorCase, layout: str
) -> None:
    arguments = list(case.arguments(layout=layout))
    for i in case.maps:
        x = arguments[i] = arguments[i].clone()
        for place, value in enumerate((math.nan, math.inf, -math.inf)):
            # One a filter, be that the first axis or the second.
            at = (place, 1) if case.name.startswith("knn") else (1, place)
            x[(*at, *(side // 2 for side in x.shape[2:]))] = value
    got, want = run(case, moved(backend, tuple(arguments))), expected(case, tuple(arguments))
    for i, (one, two) in enumerate(zip(got, want, strict=True)):
        if i not in case.internal:
            finite = two.isfinite()
            assert torch.equal(one.cpu().isfinite(), finite)
            torch.testing.assert_close(one.cpu()[finite], two[finite], rtol=1e-4, atol=1e-4)


# Beside autograd ----------------------------------------------------------------------------------


@over(CASES)
def test_autocast_no_grad_and_inference_mode_change_nothing(backend: Backend, case):
    arguments = moved(backend, case.arguments())

    def everything() -> list[Tensor]:
        return [bits(t) for t in (gradients if case.leaves else run)(case, arguments)]

    plain = everything()
    with torch.autocast(backend.device.type, torch.bfloat16):
        for one, two in zip(everything(), plain, strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)
    given, _ = with_leaves(case, arguments)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            results = run(case, given)
        assert not any(t.requires_grad for t in results)
        for one, two in zip(results, plain, strict=False):
            assert torch.equal(bits(one), two)


@over(DIFFERENTIABLE)
def test_gradients_are_given_as_they_are_asked_for(backend: Backend, case):
    """Twice; of one argument alone; of none."""
    arguments = moved(backend, case.arguments())
    given, leaves = with_leaves(case, arguments)
    outputs = [t for t in as_tuple(case.operator(*given)) if t.requires_grad]
    first, second = (
        torch.autograd.grad(outputs, leaves, cotangents(outputs), retain_graph=True)
        for _ in range(2)
    )
    for position, one, two in zip(case.leaves, first, second, strict=True):
        assert torch.equal(one, two)
        alone = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        leaf = alone[position].requires_grad_()
        some = [t for t in as_tuple(case.operator(*alone)) if t.requires_grad]
        (grad,) = torch.autograd.grad(some, leaf, cotangents(some))
        assert torch.equal(grad, one)
    for t in outputs:
        nothing = torch.autograd.grad(
            Unused.apply(t).sum() + sum(leaf.sum() for leaf in leaves), leaves, retain_graph=True
        )
        assert all((grad == 1).all() for grad in nothing)


class Unused(torch.autograd.Function):
    """Without a gradient for its input, whatever becomes of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def penalty(outputs: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the squared gradients of a sum that is not linear in the outputs."""
    total = sum((t * 2 + 1).sin().sum() for t in outputs())
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@over(DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused_never_zero(backend: Backend, case):
    arguments = case.arguments(dtype=torch.float64)
    given, leaves = with_leaves(case, moved(backend, arguments))

    def outputs() -> tuple[Tensor, ...]:
        return tuple(t for t in as_tuple(case.operator(*given)) if t.requires_grad)

    if not case.second:
        with pytest.raises(RuntimeError, match=r"^\w+: got its (gradient|result) to differ"):
            penalty(outputs, leaves)
        return
    count = len(outputs())
    got = penalty(outputs, leaves)
    plain, exact = with_leaves(case, arguments)
    want = penalty(lambda: as_tuple((case.plain or case.reference)(*plain))[:count], exact)
    for one, two in zip(got, want, strict=True):
        assert two.any()
        torch.testing.assert_close(one.cpu(), two, rtol=1e-9, atol=1e-9)


@over([case for case in CASES if not case.leaves and not case.written()], backends=traced)
def test_what_has_no_derivative_refuses_to_be_differentiated(backend: Backend, case):
    arguments = moved(backend, case.arguments())
    given = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    outputs = [t for t in as_tuple(case.operator(*given)) if t.is_floating_point()]
    assert all(t.requires_grad for t in outputs)
    if not outputs:
        return  # whole numbers have no derivative to ask for
    with pytest.raises(RuntimeError, match=rf"^{case.name}: got its result to differentiate.*$"):
        sum(t.sum() for t in outputs).backward()


@over(DIFFERENTIABLE, backends=traced)
def test_reverse_mode_of_torch_func_is_that_of_autograd(backend: Backend, case):
    arguments = moved(backend, case.arguments())

    def total(*leaves: Tensor) -> Tensor:
        given = list(arguments)
        for i, leaf in zip(case.leaves, leaves, strict=True):
            given[i] = leaf
        results = as_tuple(case.operator(*given))
        return sum((results[i] * weight).sum() for i, weight in weights.items())

    given, leaves = with_leaves(case, arguments)
    results = as_tuple(case.operator(*given))
    wanted = {i: t for i, t in enumerate(results) if t.requires_grad}
    weights = dict(zip(wanted, cotangents(wanted.values()), strict=True))
    got = torch.func.grad(total, tuple(range(len(leaves))))(*(t.detach() for t in leaves))
    want = torch.autograd.grad(list(wanted.values()), leaves, list(weights.values()))
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)


# torch.library and torch.compile ------------------------------------------------------------------


def example(case: OperatorCase) -> bool:
    """One operator of a family, if it can be with derivatives: where a graph only calls kernels."""
    family = [other for other in CASES if other.family == case.family]
    return case is next((other for other in family if other.leaves), family[0])


def opcheck_rows(case: OperatorCase, backend: str) -> list[Row]:
    """In the layouts that kernels tell apart; shapes and strides of all others are asked below."""
    if backend == "reference":
        return [(case.layouts[0],)] if example(case) else []
    return [(name,) for name in case.layouts[: 2 if backend == "cpp" else 1]]


@over(CASES, ("layout",), opcheck_rows, traced)
def test_opcheck(backend: Backend, case, layout):
    arguments, _ = with_leaves(case, moved(backend, case.arguments("small", layout)))
    assert set(torch.library.opcheck(case.operator, arguments)) == OPCHECKS


@over(CASES)
def test_schema_and_shape_function_hold_for_every_dtype_and_layout(backend: Backend, case):
    rows = in_turn(case.dtypes, case.layouts, ["small", "empty_batch"])
    for dtype, layout, shape in rows[:2] if backend.slow else rows:
        torch.library.opcheck(
            case.operator,
            moved(backend, case.arguments(shape, layout, dtype)),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@over(CASES, (), lambda case, name: [()] if name != "reference" or example(case) else [], traced)
def test_compiles_into_one_graph(backend: Backend, case):
    arguments = moved(backend, case.arguments())

    def everything(*arguments: Any) -> tuple[Tensor, ...]:
        return as_tuple(case.operator(*arguments))

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, everything):
        given, leaves = with_leaves(
            case, tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
        )
        outputs = function(*given)
        parts = [t for t in outputs if t.requires_grad]
        grads = torch.autograd.grad(parts, leaves, cotangents(parts)) if leaves else ()
        results.append([*outputs, *grads, *(given[i] for i in case.written())])
    for one, two in zip(*results, strict=True):
        assert torch.equal(bits(one), bits(two))
