"""Filter loss at the door: what is refused, by name, and what is taken."""

import re

import pytest
import torch

from picnn_fast import PartTemplate
from picnn_fast.functional import filter_loss
from picnn_fast.ops.filter_loss import FilterLossState
from tests.ops.cases import Recorder


def state(filters: int = 3, height: int = 4, width: int = 5, **options) -> FilterLossState:
    return FilterLossState.empty(filters, height, width, **options)


RUNNING = {"estimator": "running"}
TARGET = {"estimator": "target", "labels": torch.zeros(2, dtype=torch.int64)}
TARGET |= {"filter_category": torch.zeros(3, dtype=torch.int64)}

# what to change of a good call, the exception, the argument at fault, the rest of the message
BAD = [
    ({"x": 3.0}, TypeError, "x", "got float, want a torch.Tensor"),
    ({"x": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "x", "got dtype torch.int64"),
    ({"x": torch.ones(2, 3, 20)}, ValueError, "x", r"got shape \(2, 3, 20\), want maps"),
    ({"x": torch.ones(2, 3, 0, 5)}, ValueError, "x", "got maps with h = 0"),
    ({"template": "gradient"}, TypeError, "template", "got str, want a PartTemplate"),
    (
        {"template": PartTemplate(profile=torch.ones(5, 5))},
        ValueError,
        "template",
        r"got a table of shape \(5, 5\), want at least \(7, 9\)",
    ),
    ({"estimator": "exact"}, ValueError, "estimator", "got 'exact', want one of 'batch', 'run"),
    ({"estimator": None}, ValueError, "estimator", "got None, want one of"),
    ({"state": state()}, ValueError, "state", "got one with estimator='batch', want None"),
    (RUNNING, TypeError, "state", "got NoneType with estimator='running', want a FilterLossState"),
    (TARGET, TypeError, "state", "got NoneType with estimator='target'"),
    (RUNNING | {"state": (0, 0)}, TypeError, "state", "got tuple with estimator='running'"),
    *[
        (
            RUNNING | {"state": state(*sizes)},
            ValueError,
            "state",
            r"got log_mean of shape .*, want \(3, 21\) for maps of shape \(2, 3, 4, 5\)",
        )
        for sizes in ((2, 4, 5), (3, 5, 5), (4, 4, 5))
    ],
    (
        RUNNING | {"state": state(dtype=torch.float64)},
        TypeError,
        "state.log_mean",
        "got dtype torch.float64, want torch.float32 for torch.float32 maps",
    ),
    (
        RUNNING | {"state": state(device="meta")},
        ValueError,
        "state.log_mean",
        "got device meta, want cpu",
    ),
    *[
        (options | {name: TARGET[name]}, ValueError, name, "got one with .*want None")
        for name in ("labels", "filter_category")
        for options in ({}, RUNNING | {"state": state()})
    ],
    *[
        (
            TARGET | {"state": state(), name: None},
            ValueError,
            name,
            "got None, want both labels and filter_category, or neither",
        )
        for name in ("labels", "filter_category")
    ],
    *[
        (TARGET | {"state": state(), name: value}, error, name, message)
        for name, size, axis in (("labels", 2, "sample"), ("filter_category", 3, "filter"))
        for value, error, message in (
            ([0] * size, TypeError, "got list, want a torch.Tensor"),
            (torch.zeros(size), TypeError, "got dtype torch.float32, want integers"),
            (torch.zeros(size, dtype=torch.bool), TypeError, "got dtype torch.bool"),
            (
                torch.zeros(size + 1, dtype=torch.int64),
                ValueError,
                rf"got shape \({size + 1},\), want \({size},\), one a {axis}",
            ),
            (torch.zeros(size, 1, dtype=torch.int64), ValueError, "got shape"),
            (
                torch.zeros(size, dtype=torch.int64, device="meta"),
                ValueError,
                "got device meta, want cpu",
            ),
        )
    ],
]


@pytest.mark.parametrize(("change", "error", "name", "message"), BAD)
def test_bad_arguments_are_refused_by_name_before_anything_runs(change, error, name, message):
    arguments = {"x": torch.ones(2, 3, 4, 5), "template": PartTemplate()} | change
    given = arguments.get("state")
    if isinstance(given, FilterLossState) and given.log_mean.device.type == "cpu":
        before = given.log_mean.clone()
    with Recorder() as recorder, pytest.raises(error) as caught:
        filter_loss(**arguments)
    assert re.search(rf"^{name}: .*{message}", str(caught.value), re.DOTALL), str(caught.value)
    assert recorder.names == []
    if isinstance(given, FilterLossState) and given.log_mean.device.type == "cpu":
        assert torch.equal(given.log_mean, before)


@pytest.mark.parametrize("options", [{}, RUNNING, TARGET, {"estimator": "target"}])
def test_the_unchanged_arguments_of_these_tests_are_good(options):
    options = dict(options)
    if options:
        options["state"] = state()
    with Recorder() as recorder:
        filter_loss(torch.ones(2, 3, 4, 5), PartTemplate(), **options)
    assert recorder.names


# arguments of FilterLossState, the exception, the message
BAD_STATES = [
    ((torch.ones(3, 5), torch.ones(2)), ValueError, r"log_mean, log_ratio: got shapes \(3, 5\)"),
    ((torch.ones(3), torch.ones(3)), ValueError, "log_mean, log_ratio: got shapes"),
    ((torch.ones(3, 5), torch.ones(3, 1)), ValueError, "log_mean, log_ratio: got shapes"),
    ((torch.ones(3, 5).half(), torch.ones(3)), TypeError, "log_mean: got dtype torch.float16"),
    ((torch.ones(3, 5), torch.ones(3).long()), TypeError, "log_ratio: got dtype torch.int64"),
    (([1.0], torch.ones(3)), TypeError, "log_mean: got list, want a torch.Tensor"),
    ((torch.ones(3, 5), torch.ones(3), 0.0), ValueError, "momentum: got 0.0, want a number > 0"),
    ((torch.ones(3, 5), torch.ones(3), 1.01), ValueError, r"momentum: got 1.01, .* in \(0, 1\]"),
    ((torch.ones(3, 5), torch.ones(3), "0.1"), TypeError, "momentum: got str, want a number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_STATES)
def test_states_that_are_none_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        FilterLossState(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 2, 2), ValueError, "num_filters: got -1, want an int >= 0"),
        ((1, 0, 2), ValueError, "height: got 0, want an int >= 1"),
        ((1, 2, 0), ValueError, "width: got 0, want an int >= 1"),
        ((1.0, 2, 2), TypeError, "num_filters: got float, want an int"),
    ],
)
def test_states_for_maps_that_are_none_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FilterLossState.empty(*arguments)


def test_an_empty_state_has_seen_nothing():
    fresh = state(2, 3, 4, momentum=0.25, dtype=torch.float64)
    assert fresh.log_mean.shape == (2, 13)
    assert fresh.log_ratio.shape == (2,)
    assert fresh.momentum == 0.25
    for t in (fresh.log_mean, fresh.log_ratio):
        assert t.dtype == torch.float64
        assert (t == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_categories_of_any_integer_dtype_give_the_same(dtype):
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 100
    losses = []
    for kind in (torch.int64, dtype):
        labels = torch.tensor([0, 1], dtype=kind)
        mine = torch.tensor([1, 0, 1], dtype=kind)
        options = {"labels": labels, "filter_category": mine, "state": state()}
        losses.append(filter_loss(x, PartTemplate(), estimator="target", **options))
    assert torch.equal(*losses)


def test_the_state_is_renewed_in_place_and_the_maps_are_not():
    x = torch.rand(2, 3, 4, 5)
    before = x.clone()
    kept = state()
    tensors = kept.log_mean, kept.log_ratio
    filter_loss(x, PartTemplate(), estimator="running", state=kept)
    assert kept.log_mean is tensors[0]
    assert kept.log_ratio is tensors[1]
    assert all(t.isfinite().all() for t in tensors)
    assert torch.equal(x, before)


def test_without_filters_there_is_no_loss():
    assert filter_loss(torch.ones(2, 0, 3, 3), PartTemplate()).shape == (0,)
