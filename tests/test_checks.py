"""Argument checks that every floor shares."""

import numpy as np
import pytest
import torch

from picnn_fast import PartTemplate, checks, make_interpretable
from picnn_fast import functional as F
from picnn_fast.evaluation import evaluate
from picnn_fast.metrics import DetectionError
from picnn_fast.models.correspondence import Correspondence
from picnn_fast.training.run_folder import RunFolder


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(kind):
    got = checks.integer("n", kind(3), 1)
    assert (got, type(got)) == (3, int)
    assert checks.positive("x", kind(3)) == checks.positive("x", np.float32(3)) == 3.0
    assert checks.non_negative("x", np.float16(0)) == 0.0
    assert PartTemplate(tau=np.float32(0.5)).tau_for(2, 2) == 0.5
    x, y = torch.rand(6, 2), torch.arange(6) % 2
    assert torch.equal(F.mutual_information(x, y, kind(2)), F.mutual_information(x, y, 2))
    model = make_interpretable("small-resnet", num_classes=kind(3))
    assert type(model.num_classes) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float64(3), "3", None])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match=rf"^n: got {type(value).__name__}, want an int$"):
        checks.integer("n", value, 1)


def test_what_is_neither_true_nor_false_is_refused():
    assert checks.boolean("b", np.bool_(False)) is False
    for value in (0, None, "no"):
        with pytest.raises(TypeError, match=rf"^b: got {value!r}, want True or False$"):
            checks.boolean("b", value)


SWITCHES = {
    "all_attacked": lambda no: DetectionError(all_attacked=no),
    "intervals": lambda no: evaluate(None, None, intervals=no),
    "over_ranks": lambda no: evaluate(None, None, over_ranks=no),
    "overwrite": lambda no: RunFolder("run", "train", {}).writing(overwrite=no).__enter__(),
    "renew": lambda no: F.filter_loss(
        torch.rand(2, 2, 3, 3),
        PartTemplate(),
        estimator="running",
        state=F.FilterLossState.empty(2, 3, 3),
        renew=no,
    ),
    "trained": lambda no: Correspondence(2, 3, trained=no),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(name, tmp_path, monkeypatch):
    """Those of methods and of data sets are asked for with these."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=f"^{name}: got 'no', want True or False$"):
        SWITCHES[name]("no")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ["mask_channels", "template_mask", "mutual_information"])
def test_nested_tensors_are_refused_by_name(name, layout):
    maps = [torch.rand(2, 3, 3), torch.rand(4, 3, 3)]
    nested = torch.nested.nested_tensor(maps, layout=layout)
    others = {"mask_channels": torch.ones(2, 2), "template_mask": PartTemplate()}
    arguments = [others[name]] if name in others else [torch.zeros(2, dtype=torch.int64), 1]
    with pytest.raises(TypeError, match=r"^(features|x|activations): got a nested tensor"):
        getattr(F, name)(nested, *arguments)


@pytest.mark.parametrize("filters", [2**31, 10**14])
def test_more_filters_than_any_memory_holds_are_refused_by_name(filters):
    with pytest.raises(ValueError, match=r"^num_filters: got \d+, want an int >= 1 and below"):
        make_interpretable("small-resnet", "picnn", num_classes=2, num_filters=filters)


def test_true_and_false_are_probabilities_where_values_are_not_read_too():
    for device in ("cpu", "meta"):
        checks.probabilities("p", torch.zeros(3, dtype=torch.bool, device=device))
