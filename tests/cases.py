"""Which combinations of values a test runs on which backend: few, and every pair of values."""

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from tests.conftest import BACKENDS, other_instruction_sets

Row = tuple[Any, ...]
# Where each machine code is to be run. ``backend`` itself has one instruction set of a processor:
# schema, shape function and autograd are the same on all.
every_instruction_set = pytest.mark.parametrize(
    "backend", [*BACKENDS, *other_instruction_sets()], indirect=True
)


def case_id(value: object) -> str:
    return str(value).removeprefix("torch.")


@contextlib.contextmanager
def noted(*values: object) -> Iterator[None]:
    """What fails inside says of which ``values``: for a test that asks several in one case."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(f"of {'-'.join(map(case_id, values))}")
        raise


def pairwise(*axes: Iterable[Hashable]) -> list[Row]:
    """A value of each axis in every row, such that any two values of two axes meet in one."""
    rows = list(itertools.product(*axes))
    pairs = [set(itertools.combinations(enumerate(row), 2)) for row in rows]
    left, chosen = set[Row]().union(*pairs), []
    while left:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & left))
        chosen.append(rows[best])
        left -= pairs[best]
    return chosen


def in_turn(*axes: Sequence[Any]) -> list[Row]:
    """Every value of every axis in some row; the shorter axes begin anew."""
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]


def few(shapes: Iterable[str], layouts: Sequence[str], *others: Sequence[Any]) -> list[Row]:
    """Rows of a shape, a layout and others: each shape in the first two layouts, which kernels tell
    apart; the first shape in every other layout; combinations of the others in turn."""
    shapes, rests = list(shapes), list(itertools.product(*others))
    rows = [
        (shape, layout, *rests[(i + j * len(rests) // 2) % len(rests)])
        for i, shape in enumerate(shapes)
        for j, layout in enumerate(layouts[:2])
    ]
    return rows + [
        (shapes[0], layout, *rests[i % len(rests)]) for i, layout in enumerate(layouts[2:])
    ]


def kernel_cases(
    names: Sequence[str],
    full: Sequence[Row],
    interpreted: Sequence[Row],
    *,
    fibres: Sequence[Row] | None = None,
    sets: Sequence[Row] | None = None,
) -> pytest.MarkDecorator:
    """The test's backends and cases: ``full`` where the code is compiled; ``interpreted`` on
    PyTorch's own operators, in Triton's interpreter, which is slow, and, unless it is empty, on
    the same code compiled for other instruction sets and on CUDA's bodies run as fibres, which
    take ``sets`` and ``fibres`` where they are given."""
    chosen = {"reference": interpreted, "reference-gpu": interpreted, "triton": interpreted}
    of_sets = (interpreted or full) if sets is None else sets
    chosen |= dict.fromkeys(other_instruction_sets(), of_sets)
    chosen["cuda-fibres"] = (interpreted or full) if fibres is None else fibres
    params = []
    for entry in (*BACKENDS, *other_instruction_sets()):
        backend, marks = (entry, ()) if isinstance(entry, str) else (entry.values[0], entry.marks)
        for row in chosen.get(str(backend), full):
            name = "-".join(map(case_id, (backend, *row)))
            params.append(pytest.param(backend, *row, marks=marks, id=name))
    return pytest.mark.parametrize(("backend", *names), params, indirect=["backend"])
