"""The losses of ICCNN at the door: what is refused, by name, and what is taken."""

import re

import pytest
import torch

from picnn_fast.functional import group_class_loss, group_correlation_loss
from tests.ops.cases import Recorder


def good() -> dict:
    return {
        "maps": torch.ones(2, 3, 4, 5),
        "mean": torch.zeros(3, 4, 5),
        "groups": torch.tensor([0, 1, 1]),
    }


def good_classes() -> dict:
    return {
        "maps": torch.ones(2, 3, 4, 5),
        "groups": torch.tensor([0, 1, 1]),
        "labels": torch.tensor([0, 6]),
        "num_classes": 7,
    }


# what to change of a good call of either loss
BAD_MAPS = [
    ({"maps": 3.0}, TypeError, "maps", "got float, want a torch.Tensor"),
    ({"maps": torch.ones(2, 3, 4, 5).long()}, TypeError, "maps", "got dtype torch.int64"),
    ({"maps": torch.ones(2, 3, 20)}, ValueError, "maps", r"got shape \(2, 3, 20\), want \[B, C, h"),
    ({"maps": torch.ones(2, 3, 0, 5)}, ValueError, "maps", r"got shape .*one\s+position"),
    ({"maps": torch.ones(2, 0, 4, 5)}, ValueError, "maps", "got shape .* at least one filter"),
    ({"groups": [0, 1, 1]}, TypeError, "groups", "got list, want a torch.Tensor"),
    ({"groups": torch.zeros(3)}, TypeError, "groups", "got dtype torch.float32, want integers"),
    (
        {"groups": torch.tensor([0, 1])},
        ValueError,
        "groups",
        r"got shape \(2,\), want \(3,\), one a filter",
    ),
    (
        {"groups": torch.tensor([0, 3, 1])},
        ValueError,
        "groups",
        r"got values in \[0, 3\], want group indices in \[0, 3\)",
    ),
    ({"groups": torch.tensor([0, -1, 1])}, ValueError, "groups", r"got values in \[-1, 1\]"),
    ({"num_groups": 1}, ValueError, "groups", r"got values in .*, want group indices in \[0, 1\)"),
    ({"groups": torch.zeros(3, device="meta").long()}, ValueError, "groups", "got device meta"),
    ({"num_groups": 0}, ValueError, "num_groups", "got 0, want an int >= 1"),
    ({"num_groups": 2.0}, TypeError, "num_groups", "got float, want an int"),
]
BAD_CORRELATION = [
    *BAD_MAPS,
    ({"mean": None}, TypeError, "mean", "got NoneType"),
    ({"mean": torch.zeros(3, 5, 4)}, ValueError, "mean", r"got shape \(3, 5, 4\), want \(3, 4, 5"),
    ({"mean": torch.zeros(3, 4, 5).long()}, TypeError, "mean", "got dtype torch.int64"),
    ({"mean": torch.zeros(3, 4, 5, device="meta")}, ValueError, "mean", "got device meta"),
    ({"positive": [1, 0]}, TypeError, "positive", "got list, want a torch.Tensor"),
    ({"positive": torch.ones(2)}, TypeError, "positive", "got dtype torch.float32"),
    (
        {"positive": torch.ones(3, dtype=torch.bool)},
        ValueError,
        "positive",
        r"got shape \(3,\), want \(2,\), one a sample",
    ),
    (
        {"positive": torch.tensor([0, 2])},
        ValueError,
        "positive",
        r"got values in \[0, 2\], want bool, or integers in \[0, 2\)",
    ),
    (
        {"positive": torch.ones(2, dtype=torch.bool, device="meta")},
        ValueError,
        "positive",
        "got device meta",
    ),
]
BAD_CLASSES = [
    *BAD_MAPS,
    ({"labels": torch.tensor([0, 7])}, ValueError, "labels", r"want class indices in \[0, 7\)"),
    ({"labels": torch.tensor([0])}, ValueError, "labels", "one a sample"),
    ({"num_classes": 0}, ValueError, "num_classes", "got 0, want an int >= 1"),
    ({"labels": torch.zeros(2, device="meta").long()}, ValueError, "labels", "got device meta"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "case"),
    [
        *[(group_correlation_loss, good(), case) for case in BAD_CORRELATION],
        *[(group_class_loss, good_classes(), case) for case in BAD_CLASSES],
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_runs(function, arguments, case):
    change, error, name, message = case
    with Recorder() as recorder, pytest.raises(error) as caught:
        function(**(arguments | change))
    assert re.search(rf"^{name}: .*{message}", str(caught.value)), str(caught.value)
    assert recorder.names == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_groups_and_labels_may_be_of_any_integer_type(dtype):
    given, classes = good(), good_classes()
    maps = torch.rand(2, 3, 4, 5)
    given["maps"] = classes["maps"] = maps
    expected = group_correlation_loss(**given), group_class_loss(**classes)
    for arguments in (given, classes):
        arguments["groups"] = arguments["groups"].to(dtype)
    classes["labels"] = classes["labels"].to(dtype)
    assert torch.equal(group_correlation_loss(**given), expected[0])
    assert torch.equal(group_class_loss(**classes), expected[1])


def test_the_mean_may_be_of_any_dtype_and_layout_and_gets_no_gradient():
    given = good()
    given["maps"] = torch.rand(2, 3, 4, 5, requires_grad=True)
    mean = (torch.rand(3, 4, 5) * 8).round() / 8
    expected = group_correlation_loss(**given | {"mean": mean})
    for other in (mean.double(), mean.bfloat16(), mean.mT.contiguous().mT):
        other.requires_grad_()
        loss = group_correlation_loss(**given | {"mean": other})
        assert torch.equal(loss, expected)
        loss.backward()
        assert other.grad is None


def test_the_number_of_groups_is_counted_where_it_is_not_given():
    shapes = []
    for arguments in ({}, {"num_groups": 3}):
        with Seen() as seen:
            group_correlation_loss(**good(), **arguments)
        shapes += seen.sizes
    assert shapes == [(2, 2, 20), (2, 3, 20)]


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Shapes of the sums by group that the operator keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "picnn_fast":
            self.sizes.append(tuple(result[2].shape))
        return result
