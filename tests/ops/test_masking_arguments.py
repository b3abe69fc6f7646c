"""Masking family at the door: what is refused, with which words, and what is taken."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast.functional import (
    bernoulli_mask,
    class_gate,
    draw_labels,
    draw_mask,
    gumbel_mask,
    mask_channels,
)
from tests.conftest import Backend
from tests.ops.cases import Recorder

nan, inf = float("nan"), float("inf")


def good() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "features": torch.randn(2, 3, 4, 4),
        "logits": torch.randn(2, 5),
        "correspondence": torch.rand(5, 3),
        "gate": torch.rand(5, 3),
        "labels": torch.tensor([4, 0]),
        "mask": torch.rand(2, 3),
        "seed": 1,
    }


ARGUMENTS = {
    bernoulli_mask: ("features", "logits", "correspondence", "seed"),
    gumbel_mask: ("features", "logits", "correspondence", "seed"),
    draw_mask: ("correspondence", "labels", "seed"),
    class_gate: ("features", "gate", "labels"),
    mask_channels: ("features", "mask"),
}
OF_MAPS = tuple(f for f in ARGUMENTS if f is not draw_mask)
OF_MASKS = (bernoulli_mask, gumbel_mask)
OF_DRAWS = (*OF_MASKS, draw_mask)
OF_LABELS = (class_gate, draw_mask)
OF_RANKS = (bernoulli_mask, draw_mask)
OF_GATE = (class_gate,)
OF_CHANNELS = (mask_channels,)


def table(value: float) -> Tensor:
    return torch.full((5, 3), 0.5).index_put((torch.tensor([4]), torch.tensor([2])), tensor(value))


def tensor(value: float) -> Tensor:
    return torch.tensor(value)


# functions, what to change, the exception, what the message says after the argument's name
BAD: list[tuple[tuple[Callable[..., Any], ...], dict[str, Any], type[Exception], str]] = [
    # wrong rank
    (OF_MAPS, {"features": torch.ones(3)}, ValueError, r"got shape \(3,\)"),
    (OF_MAPS, {"features": torch.ones(())}, ValueError, r"got shape \(\)"),
    (OF_MASKS, {"logits": torch.ones(5)}, ValueError, r"got shape \(5,\), want \(2, 5\)"),
    (OF_DRAWS, {"correspondence": torch.ones(3)}, ValueError, r"got shape \(3,\), want"),
    (OF_GATE, {"gate": torch.ones(5, 3, 1)}, ValueError, r"got shape \(5, 3, 1\), want"),
    (OF_LABELS, {"labels": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "got shape"),
    (OF_CHANNELS, {"mask": torch.ones(3)}, ValueError, r"got shape \(3,\), want \(2, 3\)"),
    (OF_CHANNELS, {"mask": torch.ones(2, 4)}, ValueError, r"got shape \(2, 4\), want \(2, 3\)"),
    (OF_CHANNELS, {"mask": torch.ones(1, 3)}, ValueError, r"got shape \(1, 3\), want \(2, 3\)"),
    # counts that disagree
    (OF_MASKS, {"correspondence": torch.ones(5, 4)}, ValueError, "got 4 filters.*want 3"),
    (OF_GATE, {"gate": torch.ones(5, 2)}, ValueError, "got 2 filters.*want 3"),
    (OF_MASKS, {"logits": torch.ones(2, 4)}, ValueError, r"got shape \(2, 4\), want \(2, 5\)"),
    (OF_MASKS, {"logits": torch.ones(3, 5)}, ValueError, r"got shape \(3, 5\), want \(2, 5\)"),
    (OF_MASKS, {"correspondence": torch.ones(0, 3)}, ValueError, "got no class"),
    (OF_GATE, {"labels": torch.tensor([0])}, ValueError, r"got shape \(1,\), want \(2,\)"),
    # the channel axis
    (OF_MAPS, {"channel_dim": 0}, ValueError, "got 0, want an axis"),
    (OF_MAPS, {"channel_dim": -4}, ValueError, "got -4, want an axis"),
    (OF_MAPS, {"channel_dim": 4}, ValueError, "got 4, want an axis"),
    # labels
    (OF_LABELS, {"labels": torch.tensor([0, 5])}, ValueError, r"values in \[0, 5\].*\[0, 5\)"),
    (OF_LABELS, {"labels": torch.tensor([-1, 0])}, ValueError, r"values in \[-1, 0\].*\[0, 5\)"),
    (OF_LABELS, {"labels": torch.tensor([0.0, 1.0])}, TypeError, "float32.*integer"),
    (OF_LABELS, {"labels": torch.tensor([True, False])}, TypeError, "bool.*integer"),
    (OF_LABELS, {"labels": [0, 1]}, TypeError, "got list, want a torch.Tensor"),
    # probabilities
    *[
        (OF_DRAWS, {"correspondence": table(value)}, ValueError, r"probabilities.*\[0, 1\]")
        for value in (-1e-6, 1.0000002, 2.0, nan, inf, -inf)
    ],
    # devices
    (OF_MASKS, {"logits": torch.ones(2, 5, device="meta")}, ValueError, "meta.*want cpu"),
    (OF_MASKS, {"correspondence": torch.ones(5, 3, device="meta")}, ValueError, "meta.*want cpu"),
    (OF_GATE, {"gate": torch.ones(5, 3, device="meta")}, ValueError, "meta.*want cpu"),
    (OF_CHANNELS, {"mask": torch.ones(2, 3, device="meta")}, ValueError, "meta.*want cpu"),
    (
        OF_LABELS,
        {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
        ValueError,
        "meta.*want cpu",
    ),
    (
        OF_DRAWS,
        {"seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "meta.*want cpu",
    ),
    # dtypes and kinds
    *[
        (functions, {name: torch.ones(size, dtype=dtype)}, TypeError, "got dtype.*want one of")
        for functions, name, size in (
            (OF_MAPS, "features", (2, 3, 4, 4)),
            (OF_MASKS, "logits", (2, 5)),
            (OF_DRAWS, "correspondence", (5, 3)),
            (OF_GATE, "gate", (5, 3)),
            (OF_CHANNELS, "mask", (2, 3)),
        )
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ],
    (OF_MAPS, {"features": [[1.0]]}, TypeError, "got list, want a torch.Tensor"),
    (OF_MASKS, {"logits": None}, TypeError, "got NoneType, want a torch.Tensor"),
    (OF_DRAWS, {"correspondence": 0.5}, TypeError, "got float, want a torch.Tensor"),
    (OF_GATE, {"gate": None}, TypeError, "got NoneType, want a torch.Tensor"),
    (OF_MAPS, {"features": torch.ones(2, 3).to_sparse()}, TypeError, "sparse.*want torch.strided"),
    # the seed
    (OF_DRAWS, {"seed": "0"}, TypeError, "got str, want an int"),
    (OF_DRAWS, {"seed": 1.0}, TypeError, "got float, want an int"),
    (OF_DRAWS, {"seed": True}, TypeError, "got bool, want an int"),
    (OF_DRAWS, {"seed": 2**64}, ValueError, "64 bits"),
    (OF_DRAWS, {"seed": -(2**63) - 1}, ValueError, "64 bits"),
    (OF_DRAWS, {"seed": torch.tensor(1.0)}, TypeError, "float32, want torch.int64"),
    (OF_DRAWS, {"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "int32, want torch.int64"),
    (OF_DRAWS, {"seed": torch.tensor([1, 2])}, ValueError, r"shape \(2,\), want one element"),
    # the rank
    (OF_RANKS, {"rank": -1}, ValueError, "got -1, want an int in"),
    (OF_RANKS, {"rank": 2**32}, ValueError, "got 4294967296, want an int in"),
    (OF_RANKS, {"rank": 0.0}, TypeError, "got float, want an int"),
    (OF_RANKS, {"rank": True}, TypeError, "got bool, want an int"),
    # the temperature
    *[
        ((gumbel_mask,), {"temperature": value}, ValueError, "want a number > 0")
        for value in (0, -1.0, nan)
    ],
    ((gumbel_mask,), {"temperature": "hot"}, TypeError, "got str, want"),
]


def call(function: Callable[..., Any], change: dict[str, Any]) -> Any:
    arguments = {name: value for name, value in good().items() if name in ARGUMENTS[function]}
    return function(**(arguments | change))


@pytest.mark.parametrize(
    ("functions", "change", "error", "message"),
    BAD,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_by_name_before_anything_runs(functions, change, error, message):
    kept = {
        name: value.clone()
        for name, value in change.items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    }
    (name,) = change
    for function in functions:
        with Recorder() as recorder, pytest.raises(error) as caught:
            call(function, change)
        assert re.search(rf"^{name}: .*{message}", str(caught.value), re.DOTALL), function
        assert recorder.names == []
    for key, value in kept.items():
        torch.testing.assert_close(change[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_unchanged_arguments_of_these_tests_are_good(function):
    with Recorder() as recorder:
        call(function, {})
    assert recorder.names


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "change"),
    [(class_gate, "labels"), (bernoulli_mask, "correspondence")],
)
def test_bad_values_on_a_gpu_are_refused_on_the_device(function, change):
    """In a process of its own: a device-side assert ends the CUDA context."""
    code = f"""
import torch
from picnn_fast.functional import {function.__name__} as function
arguments = dict(features=torch.ones(2, 3, 4, 4), logits=torch.ones(2, 5), seed=1,
                 correspondence=torch.full((5, 3), 2.0 if {change == "correspondence"} else 0.5),
                 gate=torch.ones(5, 3), labels=torch.tensor([0, 5]))
names = {ARGUMENTS[function]!r}
function(**{{k: v.cuda() if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items() if k in names}})
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("value", [-1e-6, 1.0000002, nan, inf])
def test_kernels_refuse_what_is_no_probability_where_the_host_does_not_look(
    backend: Backend, value
):
    if backend.device.type == "cuda":
        pytest.skip("a device-side assert ends the process's use of the GPU")
    features, logits = good()["features"], good()["logits"]
    seed = torch.zeros(1, dtype=torch.int64)
    operator = torch.ops.picnn_fast.bernoulli_mask
    operator(features, logits, table(0.5), seed, 0, True)
    with pytest.raises(RuntimeError):
        operator(features, logits, table(value), seed, 0, True)
    with pytest.raises(RuntimeError):
        operator(features[:0], logits[:0], table(value), seed, 0, True)
    operator(features, logits, table(value), seed, 0)
    draw = torch.ops.picnn_fast.draw_filters
    draw(table(0.5), seed, 0, None, True)
    with pytest.raises(RuntimeError):
        draw(table(value), seed, 0, None, True)
    with pytest.raises(RuntimeError):
        draw(table(value), seed, 0, seed[:0], True)
    draw(table(value), seed, 0)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_kernels_refuse_labels_of_no_class(backend: Backend, wrong):
    if backend.device.type == "cuda":
        pytest.skip("a device-side assert ends the process's use of the GPU")
    features, gate = good()["features"], good()["gate"]
    labels = torch.tensor([0, wrong])
    with pytest.raises(RuntimeError):
        torch.ops.picnn_fast.class_gate(features, gate, labels)
    with pytest.raises(RuntimeError):
        torch.ops.picnn_fast.draw_filters(gate, torch.zeros(1, dtype=torch.int64), 0, labels)


def test_probabilities_that_a_caller_vouches_for_are_not_looked_at():
    arguments = good()
    features, logits, seed = (arguments[k] for k in ("features", "logits", "seed"))
    for function in OF_MASKS:
        function(features, logits, table(2.0), seed=seed, validate=False)
    draw_mask(table(2.0), arguments["labels"], validate=False)


# What is taken ------------------------------------------------------------------------------------


def test_labels_drawn_alone_are_those_of_the_mask(backend: Backend):
    batch = 6 if backend.slow else 40
    logits = torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)).to(backend.device)
    maps, probabilities = (torch.ones(size, device=backend.device) for size in ((batch, 3), (6, 3)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        want = bernoulli_mask(maps, logits.to(dtype), probabilities, seed=4, rank=1)[2]
        assert torch.equal(draw_labels(logits.to(dtype), seed=4, rank=1), want)
    with pytest.raises(ValueError, match=r"logits: got shape \(6,\), want \[samples, classes\]"):
        draw_labels(logits[0])
    with pytest.raises(TypeError, match="logits: got dtype"):
        draw_labels(logits.long())


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_labels_of_any_integer_dtype_give_the_same(backend: Backend, dtype):
    features, gate, labels = (good()[k].to(backend.device) for k in ("features", "gate", "labels"))
    expected = class_gate(features, gate, labels)
    assert torch.equal(class_gate(features, gate, labels.to(dtype)), expected)


def test_labels_and_tables_may_be_strided(backend: Backend):
    arguments = {k: v.to(backend.device) for k, v in good().items() if isinstance(v, Tensor)}
    features, gate, labels = (arguments[k] for k in ("features", "gate", "labels"))
    expected = class_gate(features, gate, labels)
    spread = torch.stack((labels, labels), 1)[:, 0]
    assert torch.equal(class_gate(features, gate.T.contiguous().T, spread), expected)
    logits, table_ = arguments["logits"], arguments["correspondence"]
    want = bernoulli_mask(features, logits, table_, seed=3)
    got = bernoulli_mask(
        features, logits.T.contiguous().T, torch.stack((table_, table_), 2)[..., 0], seed=3
    )
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


def test_a_gate_without_classes_serves_an_empty_batch_alone(backend: Backend):
    gate = torch.ones(0, 3, device=backend.device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64, device=backend.device)
    gated = class_gate(torch.ones(0, 3, 2, 2, device=backend.device), gate, labels)
    assert gated.shape == (0, 3, 2, 2)
    gated.sum().backward()
    assert gate.grad.shape == (0, 3)
    with pytest.raises(ValueError, match=r"labels: .*want class indices in"):
        class_gate(torch.ones(2, 3), torch.ones(0, 3), torch.tensor([0, 0]))


def test_gumbel_takes_an_empty_batch():
    masked, mask, label = gumbel_mask(torch.ones(0, 3, 2), torch.ones(0, 5), torch.rand(5, 3))
    assert masked.shape == (0, 3, 2)
    assert mask.shape == (0, 3)
    assert label.shape == (0,)


def test_dtypes_may_differ_between_arguments(backend: Backend):
    arguments = good()
    features = arguments["features"].to(backend.device, torch.bfloat16).requires_grad_()
    logits = arguments["logits"].to(backend.device, torch.float16).requires_grad_()
    table_ = arguments["correspondence"].to(backend.device, torch.float32).requires_grad_()
    masked, mask, label = bernoulli_mask(features, logits, table_, seed=9)
    assert masked.dtype == mask.dtype == torch.bfloat16
    _, same_mask, same_label = bernoulli_mask(
        features.double(), logits.float(), table_.detach().double(), seed=9
    )
    assert torch.equal(label, same_label)
    assert torch.equal(mask.double(), same_mask)
    masked.float().sum().backward()
    for t in (features, logits, table_):
        assert t.grad.dtype == t.dtype
        assert t.grad.isfinite().all()

    gate = arguments["gate"].to(backend.device, torch.float64).requires_grad_()
    gated = class_gate(features, gate, label)
    assert gated.dtype == torch.bfloat16
    gated.float().sum().backward()
    assert gate.grad.dtype == torch.float64
    expected = torch.zeros_like(gate).index_add(0, label, features.detach().double().sum((2, 3)))
    torch.testing.assert_close(gate.grad, expected, rtol=1e-5, atol=1e-5)


def test_float64_probabilities_are_not_rounded(backend: Backend):
    """u is a multiple of 2**-24: a probability a hair above it keeps, exactly it drops."""
    features = torch.ones(1, 200, device=backend.device)
    logits = torch.zeros(1, 1, device=backend.device)

    def kept(p: Tensor) -> Tensor:
        return bernoulli_mask(features, logits, p[None], seed=2)[1][0].bool()

    low = torch.zeros(200, dtype=torch.float64, device=backend.device)
    high = torch.ones_like(low)
    for _ in range(24):  # bisect to u of every draw
        middle = (low + high) / 2
        keeps = kept(middle)
        low, high = torch.where(keeps, low, middle), torch.where(keeps, middle, high)
    u = low
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert not kept(u).any()
    assert kept(u + 2.0**-50).all()


# Seeds --------------------------------------------------------------------------------------------


def draw(seed: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    return bernoulli_mask(
        torch.ones(8, 40, device=device),
        torch.zeros(8, 30, device=device),
        torch.full((30, 40), 0.5, device=device),
        seed=seed,
    )[1:]


def same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_same_seed_gives_the_same_draws(backend: Backend):
    assert same(draw(4, backend.device), draw(4, backend.device))
    assert not same(draw(4, backend.device), draw(5, backend.device))


@given(st.integers(-(2**63), 2**63 - 1))
def test_seeds_are_the_same_as_int_tensor_or_wrapped_to_unsigned(seed):
    expected = draw(seed)
    for other in (torch.tensor(seed), torch.tensor([seed]), torch.tensor([[seed]]), seed % 2**64):
        assert same(draw(other), expected)


def test_without_a_seed_draws_are_fresh_and_follow_manual_seed(backend: Backend):
    torch.manual_seed(0)
    first, second = draw(None, backend.device), draw(None, backend.device)
    torch.manual_seed(0)
    assert same(draw(None, backend.device), first)
    assert same(draw(None, backend.device), second)
    assert not same(first, second)


def test_a_seed_leaves_torchs_generator_alone(backend: Backend):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(3, backend.device)
    assert torch.equal(torch.get_rng_state(), before)


def test_gumbel_follows_manual_seed():
    arguments = [good()[k] for k in ("features", "logits", "correspondence")]
    torch.manual_seed(0)
    first, second = gumbel_mask(*arguments), gumbel_mask(*arguments)
    torch.manual_seed(0)
    again = gumbel_mask(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("channel_dim", [1, 2, 3, -1])
def test_gumbel_takes_the_channel_axis_anywhere(channel_dim):
    features, logits, correspondence = (good()[k] for k in ("features", "logits", "correspondence"))
    torch.manual_seed(1)
    expected = gumbel_mask(features, logits, correspondence, seed=2)
    torch.manual_seed(1)
    moved = features.movedim(1, channel_dim)
    got = gumbel_mask(moved, logits, correspondence, seed=2, channel_dim=channel_dim)
    assert torch.equal(got[0].movedim(channel_dim, 1), expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
