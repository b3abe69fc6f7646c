"""How many kernels a GPU is told to run for a call: each launch costs its host some microseconds.

Counted over tensors of the meta device, whose values the host cannot read either. A file of its
own: it is of the operators of several families, and of what a model makes of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import picnn_fast
from picnn_fast import PartTemplate
from picnn_fast.evaluation.observation import Observation
from picnn_fast.functional import (
    FilterLossState,
    bernoulli_mask,
    class_gate,
    draw_mask,
    filter_loss,
    histogram_mutual_information,
    soft_histogram_mutual_information,
    template_mask,
)

BATCH, FILTERS, SIDE, CLASSES = 4, 6, 5, 3
# Views, and tensors in new memory that nothing is written to.
_NO_LAUNCH = frozenset(
    (
        *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split"),
        *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
        "promote_types",
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)


class Launches(TorchDispatchMode):
    """Names of the operators that launch kernels, in the order in which they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and name not in _NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launched(call: Callable[[], Any]) -> tuple[list[str], Any]:
    with Launches() as launches:
        result = call()
    return launches.names, result


@pytest.fixture(autouse=True)
def without_values() -> Iterator[None]:
    with torch.device("meta"):
        yield


def maps() -> Tensor:
    return torch.rand(BATCH, FILTERS, SIDE, SIDE).requires_grad_()


def table() -> Tensor:
    return torch.rand(CLASSES, FILTERS).requires_grad_()


def labels() -> Tensor:
    return torch.zeros(BATCH, dtype=torch.int64)


def backward(outputs: Tensor) -> list[str]:
    # Leaves take their first gradient as it is.
    grad = torch.empty_like(outputs)
    return launched(lambda: outputs.backward(grad))[0]


def test_a_bernoulli_mask_is_a_seed_and_a_kernel_and_its_gradient_two():
    """The kernel makes the check of the probabilities."""
    x, logits, probabilities = maps(), torch.rand(BATCH, CLASSES).requires_grad_(), table()
    names, (masked, _, _) = launched(lambda: bernoulli_mask(x, logits, probabilities))
    assert names == ["randint", "bernoulli_mask"]
    assert backward(masked) == ["masking_backward", "bernoulli_parameters_backward"]


def test_a_class_gate_is_a_kernel_and_its_gradient_two():
    x, gate, given = maps(), table(), labels()
    names, gated = launched(lambda: class_gate(x, gate, given))
    assert names == ["class_gate"]
    assert backward(gated) == ["masking_backward", "sums_by_label"]


def test_a_template_mask_is_a_kernel_and_so_is_its_gradient():
    x, template = maps(), PartTemplate("l1")
    launched(lambda: template_mask(x, template))
    names, (masked, _) = launched(lambda: template_mask(x, template))
    assert names == ["template_mask"]
    assert backward(masked) == ["template_mask_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_filter_loss_is_a_kernel_and_scales_its_gradient_in_one(dtype):
    x, template = torch.rand(BATCH, FILTERS, SIDE, SIDE, dtype=dtype), PartTemplate("l1")
    filter_loss(x, template)
    x.requires_grad_()
    names, loss = launched(lambda: filter_loss(x, template))
    assert names == ["filter_loss"]
    assert backward(loss) == ["mul"]


def test_a_filter_loss_by_estimates_renews_both_at_once():
    x, state = maps(), FilterLossState.empty(FILTERS, SIDE, SIDE)
    template = PartTemplate("l1")
    filter_loss(x, template)
    names, loss = launched(lambda: filter_loss(x, template, estimator="running", state=state))
    assert names == ["filter_loss_running", "_foreach_copy_"]
    assert backward(loss) == ["mul"]


def test_a_filter_loss_by_assigned_templates_looks_for_peaks_and_categories_at_once():
    x, state = maps(), FilterLossState.empty(FILTERS, SIDE, SIDE)
    template, categories = PartTemplate("l1"), torch.zeros(FILTERS, dtype=torch.int64)
    filter_loss(x, template)
    options = {"state": state, "labels": labels(), "filter_category": categories}
    names, loss = launched(lambda: filter_loss(x, template, estimator="target", **options))
    assert names == ["map_peaks", "filter_loss_running", "_foreach_copy_"]
    assert backward(loss) == ["mul"]


def test_masks_that_are_given_labels_are_a_seed_and_a_draw():
    given, probabilities = labels(), table()
    names, _ = launched(lambda: draw_mask(probabilities, given))
    assert names == ["randint", "draw_filters"]


def test_the_pathways_of_validation_are_twenty_launches():
    """Logits by all filters, by those of a pseudo-label and by those not of the label."""
    network = picnn_fast.make_interpretable("small-cnn", "picnn", num_classes=CLASSES)
    network.eval()
    images, given = torch.rand(BATCH, 3, 32, 32), labels()
    seen = Observation(network, images, given, seed=0)
    with torch.no_grad():
        assert seen.maps.ndim == 4
        names, _ = launched(lambda: (seen.logits, seen.masked_logits, seen.complement_logits))
    assert len(names) <= 20, names


def test_soft_mutual_information_takes_few_launches_for_what_it_is():
    """The range and the distance of its centres; the kernels look at the labels themselves."""
    activations = torch.rand(50, FILTERS).requires_grad_()
    given = torch.zeros(50, dtype=torch.int64)
    names, m = launched(lambda: soft_histogram_mutual_information(activations, given, CLASSES))
    assert names[-2:] == ["soft_histogram", "histogram_information"]
    assert len(names) <= 11, names
    assert backward(m) == ["histogram_information_backward", "soft_histogram_backward"]


def test_mutual_information_by_histogram_is_what_its_counts_tell():
    """Of a block of filters: three make empty counts, and two check that values were finite."""
    activations, given = torch.rand(50, FILTERS), torch.zeros(50, dtype=torch.int64)
    names, _ = launched(lambda: histogram_mutual_information(activations, given, CLASSES))
    assert len(names) <= 7, names
    assert names[-1] == "histogram_information"
