"""The executor of CUDA kernels on a CPU computes what a GPU would, and catches mistakes."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picnn_fast.reference.masking import (
    bernoulli_parameters_backward,
    masking_backward,
    sums_by_label,
)
from tests.cuda_on_cpu import barriers, build

HERE = Path(__file__).parent
ORDERS = ("forward", "reversed", "shuffled:0", "shuffled:1")


@pytest.fixture(scope="module")
def executor() -> ctypes.CDLL:
    if build.compiler() is None:
        pytest.skip("no C++ compiler to build the kernels")
    return ctypes.CDLL(str(build.build(HERE / "executor_kernels.cu")))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PICNN_FAST_FIBRE_ORDER", request.param)
    return request.param


def run(library: ctypes.CDLL, name: str, *arguments: object) -> str:
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    converted = [
        argument.ctypes.data_as(ctypes.c_void_p) if isinstance(argument, np.ndarray) else argument
        for argument in arguments
    ]
    message: bytes = function(*converted)
    return message.decode()


def test_block_reduction_is_exact_in_every_order(executor: ctypes.CDLL, order: str) -> None:
    x = np.arange(10_000, dtype=np.float32) % 97
    sums = np.zeros(3, np.float32)
    assert run(executor, "block_sum", x, len(x), sums, 3) == ""
    threads = np.arange(len(x)) // 256 % 3
    assert sums.tolist() == [x[threads == block].sum() for block in range(3)]


def test_warp_operations_give_what_cuda_defines(executor: ctypes.CDLL, order: str) -> None:
    out = np.full((13, 64), -1, np.int32)
    assert run(executor, "warp_operations", out) == ""
    t = np.arange(64)
    warp, lane = t // 32, t % 32
    value = 100 * warp + lane
    ballot = sum(1 << i for i in range(0, 32, 3))
    expected = [
        100 * warp + 5,
        100 * warp + (lane ^ 3),
        np.where(lane >= 2, value - 2, value),
        np.where(lane % 8 < 6, value + 2, value),
        np.full(64, ballot),
        np.full(64, 1),
        np.full(64, 0),
        100 * warp + np.where(lane < 16, 1, 17),
        np.full(64, 2),
        np.full(64, 1),
        np.full(64, 0),
        100 * warp + 31,
        100 * warp + 7,
    ]
    for row, wanted in zip(out, expected, strict=True):
        assert row.tolist() == np.asarray(wanted).astype(np.int32).tolist()


def test_atomics_lose_no_update(executor: ctypes.CDLL, order: str) -> None:
    counters = np.zeros(5, np.int32)
    assert run(executor, "atomics", counters) == ""
    assert counters.tolist() == [120, 39, -39, 1, 255]


def test_a_barrier_orders_shared_memory(executor: ctypes.CDLL, order: str) -> None:
    out = np.zeros(64, np.int32)
    assert run(executor, "neighbour", out, 64, True) == ""
    assert out.tolist() == [*range(1, 64), 0]


def test_a_missing_barrier_shows(executor: ctypes.CDLL, order: str) -> None:
    out = np.zeros(64, np.int32)
    assert run(executor, "neighbour", out, 64, False) == ""
    assert out.tolist() != [*range(1, 64), 0]
    assert -1 in out.tolist()  # what no thread had written yet


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_a_warp_may_run_far_ahead_of_the_others(
    executor: ctypes.CDLL, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a missing barrier shows, where warps that take turns at every operation hide it."""
    monkeypatch.setenv("PICNN_FAST_FIBRE_ORDER", order)
    hidden = {}
    for warps in ("in_turn", "one_by_one"):
        monkeypatch.setenv("PICNN_FAST_FIBRE_WARPS", warps)
        for with_barrier in (True, False):
            out = np.zeros(64, np.int32)
            assert run(executor, "other_warp", out, with_barrier) == ""
            hidden[warps, with_barrier] = out.tolist() == [496] * 64
    assert hidden["in_turn", True]
    assert hidden["one_by_one", True]
    assert hidden["in_turn", False] or order == "reversed"
    assert hidden["one_by_one", False] == (order == "forward")


def test_a_block_may_find_what_the_one_before_left(
    executor: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PICNN_FAST_FIBRE_MEMORY", "kept")
    out = np.zeros(2, np.float32)
    assert run(executor, "unwritten_shared", out) == ""
    assert out.tolist() == [1, 1]


def test_every_block_finds_its_shared_memory_poisoned(executor: ctypes.CDLL) -> None:
    out = np.zeros(2, np.float32)
    assert run(executor, "unwritten_shared", out) == ""
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("kernel", "tensor", "message"),
    [
        ("returns_before_barrier", False, "thread 3 of block (0, 0, 0) has returned, while"),
        ("divergent_barriers", False, "waits in __syncthreads at"),
        ("lane_misses_shuffle", True, "for lanes that never come: mask ffffffff, arrived ffffff7f"),
        ("reads_outside_mask", True, "which is not in the mask"),
        ("mixed_warp_operations", True, "but other lanes wait in"),
        ("writes_past_shared", False, "wrote past its 16 bytes of dynamic shared memory"),
    ],
)
def test_mistakes_are_reported(
    executor: ctypes.CDLL, kernel: str, tensor: bool, message: str
) -> None:
    arguments = [np.zeros(64, np.int32)] if tensor else []
    assert message in run(executor, kernel, *arguments)
    # The next launch is not the worse for it.
    assert run(executor, "block_of", 64, 0) == ""


def test_device_assertion_names_thread_and_condition(executor: ctypes.CDLL) -> None:
    assert run(executor, "asserts", 4) == ""
    message = run(executor, "asserts", 2)
    assert "assertion failed in thread 2 of block (0, 0, 0)" in message
    assert "< limit" in message


@pytest.mark.parametrize(("threads", "shared"), [(0, 0), (1025, 0), (32, 49153)])
def test_launches_a_gpu_would_refuse_are_refused(
    executor: ctypes.CDLL, threads: int, shared: int
) -> None:
    assert run(executor, "block_of", threads, shared).startswith("cuda_on_cpu: ")


def test_shared_memory_is_granted_as_far_as_asked_for(executor: ctypes.CDLL) -> None:
    out = np.zeros(2, np.float32)
    assert run(executor, "unwritten_shared_of", out, 227 << 10, 227 << 10) == ""
    assert np.isnan(out).all()
    assert "232449 bytes" in run(executor, "unwritten_shared_of", out, 232449, 232448)


def cut(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def test_matrix_units_multiply_what_ten_bits_hold(executor: ctypes.CDLL, order: str) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((16, 8), np.float32)
    b = generator.standard_normal((8, 8), np.float32)
    c = np.full((16, 8), np.nan, np.float32)
    assert run(executor, "matrix_units", a, b, c) == ""
    expected = cut(a).astype(np.float64) @ cut(b).astype(np.float64)
    np.testing.assert_array_equal(c, toward_zero(expected))
    assert np.abs(c - a @ b).max() > 1e-5  # the rest of the mantissas is lost


def toward_zero(exact: np.ndarray) -> np.ndarray:
    nearest = exact.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


def test_matrix_units_may_truncate_after_each_product(
    executor: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((16, 8), np.float32)
    b = generator.standard_normal((8, 8), np.float32)
    c = np.full((2, 16, 8), np.nan, np.float32)
    for out, sums in zip(c, ("once", "each"), strict=True):
        monkeypatch.setenv("PICNN_FAST_FIBRE_SUMS", sums)
        assert run(executor, "matrix_units", a, b, out) == ""
    products = cut(a)[:, :, None].astype(np.float64) * cut(b)[None]
    expected = np.zeros((16, 8), np.float32)
    for k in range(8):
        expected = toward_zero(expected + products[:, k])
    np.testing.assert_array_equal(c[1], expected)
    assert (c[0] != c[1]).any()


def test_numbers_split_into_two_of_ten_bits(executor: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(1024) * 10.0 ** generator.uniform(-25, 37, 1024)).astype(
        np.float32
    )
    x[:8] = 0, -0.0, 1, -1, 1e38, np.inf, -np.inf, np.nan
    out = np.full((3, len(x)), np.nan, np.float32)
    assert run(executor, "split_numbers", x, len(x), out) == ""
    high, low, splits = out
    assert splits.tolist() == [float(abs(value) <= 1e38) for value in x.tolist()]
    high, low, x = (part[splits == 1] for part in (high, low, x))
    for part in (high, low):
        np.testing.assert_array_equal(part, cut(part))
    rest = np.abs(x.astype(np.float64) - high - low)
    assert (rest <= 2.0**-22 * np.abs(x)).all()


def test_an_unknown_order_is_refused(
    executor: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PICNN_FAST_FIBRE_ORDER", "sideways")
    assert "want forward, reversed or shuffled:SEED" in run(executor, "block_of", 1, 0)


@pytest.mark.parametrize("mode", ["WARPS", "MEMORY", "SUMS"])
def test_an_unknown_mode_is_refused(
    executor: ctypes.CDLL, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"PICNN_FAST_FIBRE_{mode}", "any")
    assert f"PICNN_FAST_FIBRE_{mode}: got any, want " in run(executor, "block_of", 1, 0)


def test_masking_kernels_do_not_depend_on_the_order(
    kernels: dict[str, Callable[..., Any]], schedule: Callable[[], None]
) -> None:
    """Warps and blocks may run in any order: a missing barrier would give other bits in some."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 300, generator=generator)
    p = torch.rand(300, 70, generator=generator)
    seed = torch.tensor([11])

    def run_all(maps: torch.Tensor) -> list[torch.Tensor]:
        masked, mask, label = kernels["bernoulli_mask"](maps, logits, p, seed, 0)
        gated = kernels["mask_channels"](maps, p[label])
        return [masked, mask, label, gated, *kernels["masking_backward"](gated, maps, mask)]

    contiguous = torch.randn(3, 70, 121, generator=generator)
    # So many positions are cut into pieces where channels lie side by side.
    many = torch.randn(3, 300, 70, generator=generator).mT
    layouts = (contiguous, contiguous.mT.contiguous().mT, contiguous[:, :, ::2], many)
    expected = [run_all(maps) for maps in layouts]
    schedule()
    for maps, wanted in zip(layouts, expected, strict=True):
        assert all(map(torch.equal, run_all(maps), wanted))
        _, mask, _, gated, *gradients = wanted
        for one, two in zip(gradients, masking_backward(gated, maps, mask), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_gradients_of_masking_parameters_do_not_depend_on_the_order(
    kernels: dict[str, Callable[..., Any]], schedule: Callable[[], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Labels in two portions, and filters and classes for more than a warp.
    labels = torch.randint(0, 2, (260,), generator=generator)
    rows = torch.randn(260, 40, generator=generator)
    grad, logits = (torch.randn(3, n, generator=generator) for n in (33, 40))
    given = grad, logits, torch.rand(40, 33, generator=generator), torch.tensor([39, 0, 7])

    def run_all() -> list[torch.Tensor]:
        sums = kernels["sums_by_label"](rows, labels, 2)
        return [sums, *kernels["bernoulli_parameters_backward"](*given)]

    expected = run_all()
    schedule()
    assert all(map(torch.equal, run_all(), expected))
    wanted = sums_by_label(rows, labels, 2), *bernoulli_parameters_backward(*given)
    for one, two in zip(expected, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_every_barrier_has_been_taken_out_to_see_whether_a_test_notices() -> None:
    files = sorted((HERE.parent.parent / "csrc" / "cuda").glob("*.cu*"))
    there = {file.name: len(barriers.barriers(file)) for file in files}
    asked = {name: len(found) for name, found in json.loads(barriers.OUTCOME.read_text()).items()}
    assert asked == {name: count for name, count in there.items() if count}, (
        "python -m tests.cuda_on_cpu.barriers FILE asks anew"
    )


def test_what_is_loaded_lies_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor word; do out=$word; done\n: > "$out"\n')
    compiler.chmod(0o755)
    # A launcher before the compiler is taken too.
    monkeypatch.setenv("CXX", f"env {compiler}")
    library = build.build(source)
    library.unlink()
    assert library.parent.is_relative_to(HERE.parent.parent)
    assert library.parent.stat().st_uid == HERE.stat().st_uid
