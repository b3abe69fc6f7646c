"""CSG equals the paper, written out plainly; its gate, turns of epochs, layers and warnings."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picnn_fast.models import CSG

CLASSES, FILTERS = 3, 6
LABELS = torch.tensor([0, 2, 1, 2])


def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, FILTERS, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, CLASSES))
    return features.double(), head.double()


def model(**options: Any) -> CSG:
    network = CSG(*parts(), CLASSES, FILTERS, **{"start": 1, "period": 2, **options})
    if isinstance(network.gate, nn.Parameter):
        generator = torch.Generator().manual_seed(1)
        network.gate.data = torch.rand(CLASSES, FILTERS, generator=generator).double()
    return network


def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def plainly(network: CSG, epoch: int, weight: float, bound: float, norm: str) -> Tensor:
    """Algorithm 1 of the paper with its comparison put right, epochs from 1, period 2 from 2."""
    conv, linear = network.features[0], network.head[2]
    maps = nn.functional.conv2d(images(), conv.weight, conv.bias).relu()
    if epoch != 2:
        return nn.functional.cross_entropy(linear(maps.mean((2, 3))), LABELS)
    gated = maps * torch.stack([network.gate[y] for y in LABELS.tolist()])[:, :, None, None]
    excess = sum(abs(value) for value in network.gate.flatten().unbind()) - bound
    excess = torch.relu(torch.as_tensor(excess))
    penalty = {
        "l1": excess,
        "l2": excess**2,
        "smooth_l1": nn.functional.smooth_l1_loss(
            excess, torch.zeros_like(excess), reduction="sum"
        ),
    }[norm]
    loss: Tensor = nn.functional.cross_entropy(linear(gated.mean((2, 3))), LABELS)
    return 0.7 * loss + weight * penalty


@pytest.mark.parametrize("mask_at", ["maps", "late"])
@pytest.mark.parametrize("norm", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_loss_and_gradients_are_those_of_the_paper(epoch: int, norm: Any, mask_at: Any) -> None:
    options = {"penalty_norm": norm, "penalty_weight": 0.3, "classification_weight": 0.7}
    network = model(**options, bound=FILTERS, mask_at=mask_at)
    other = copy.deepcopy(network)
    network.begin_epoch(epoch)
    loss = network.loss(network(images(), LABELS), LABELS)
    expected = plainly(other, epoch, 0.3, FILTERS, norm)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        wanted = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, wanted, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("epoch", [1, 2])
def test_with_a_fixed_gate_loss_and_gradients_are_those_of_the_paper(epoch: int) -> None:
    network = model(fixed=(1, 3), classification_weight=0.7)
    # Section 4.3: a filter for each class alone, then those for all; nothing to penalise.
    assert network.gate.tolist() == [[1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    network.begin_epoch(epoch)
    loss = network.loss(network(images(), LABELS), LABELS)
    expected = plainly(network, epoch, 0.0, 0.0, "l1")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    parameters = list(network.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=0,
        atol=1e-10,
    )


def test_the_gate_is_projected_after_steps_of_its_own_path_alone() -> None:
    network = model()
    before = network.gate.detach().clone()
    network.begin_epoch(1)
    network.after_step()
    torch.testing.assert_close(network.gate.detach(), before, rtol=0, atol=0)
    network.begin_epoch(2)
    network.after_step()
    expected = (before / before.max(0).values).clamp(0, 1)
    torch.testing.assert_close(network.gate.detach(), expected)


def test_every_third_epoch_after_the_tenth_is_of_the_gate_but_not_the_last() -> None:
    network = CSG(*parts(), CLASSES, FILTERS)
    published = [e + 1 for e in range(151) if e >= 10 and e % 3 == 2]
    assert len(published) == 47
    of_csg = [e for e in range(1, 152) if network.optimizer_of(e, 151) == "csg"]
    assert of_csg == published
    assert network.optimizer_of(150, 150) == "std"
    assert network.optimizer_of(150) == "csg"


def test_a_gate_that_is_fixed_is_for_each_class_and_for_all_and_is_not_learnt() -> None:
    features = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, CLASSES))
    network = CSG(features, head, CLASSES, 7, fixed=(2, 1), start=0, period=1)
    rows = [[1, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1]]
    assert network.ownership().tolist() == rows
    assert [group["name"] for group in network.parameter_groups(0.1)] == ["network"]
    network.begin_epoch(1)
    terms = network.loss_terms(network(torch.rand(4, 3, 8, 8), LABELS), LABELS)
    assert "penalty" not in terms
    network.after_step()
    assert network.ownership().tolist() == rows
    assert "gate" in network.state_dict()
    assert not network.remarks()


def test_each_path_has_an_optimiser_and_layers_of_its_own() -> None:
    network = model(std_layers=["features", "head"], csg_layers=["head"], csg_lr=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = network.optimizers(0.1)
    learns = {
        (path, group["lr"]): {names[id(p)] for p in group["params"]}
        for path, of_path in groups.items()
        for group in of_path
        if group["name"] != "gate"
    }
    head = {"head.2.weight", "head.2.bias"}
    assert learns == {
        ("std", 0.1): {"features.0.weight", "features.0.bias"} | head,
        ("csg", 0.5): head,
    }
    named = [(group["name"], group["lr"]) for group in groups["csg"]]
    assert named == [("csg", 0.5), ("gate", 0.5)]
    apart = model(csg_lr=0.5, gate_lr=0.25).optimizers(0.1)["csg"]
    assert [group["lr"] for group in apart] == [0.5, 0.25]
    alone = model(csg_layers=[]).optimizers(0.1)["csg"]
    assert [group["name"] for group in alone] == ["gate"]
    frozen = model(std_layers=["head"], csg_layers=["head"])
    assert [p.requires_grad for p in frozen.features.parameters()] == [False, False]


def test_a_gate_that_stays_dense_is_told() -> None:
    network = model()
    network.gate.data.fill_(1.0)
    (remark,) = network.remarks()
    assert "density 1.000, want at most 0.367" in remark
    network.gate.data[1:] = 0
    assert math.isclose(network.logged()["density"].item(), 1 / 3)
    assert not network.remarks()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bound": 5.0}, ValueError, "bound: got 5.0, want at least 6"),
        ({"bound": math.nan}, ValueError, "bound: got nan"),
        ({"bound": "6"}, TypeError, "bound: got"),
        ({"fixed": 3}, TypeError, "fixed: got 3, want two numbers"),
        ({"fixed": (1, 2, 3)}, TypeError, r"fixed: got \(1, 2, 3\), want two numbers"),
        ({"std_layers": 3}, TypeError, "std_layers: got a int"),
        ({"period": 0}, ValueError, "period: got 0"),
        ({"csg_lr": 0.0}, ValueError, "csg_lr: got 0"),
        ({"gate_lr": 0.0}, ValueError, "gate_lr: got 0"),
        ({"penalty_norm": "l3"}, ValueError, "penalty_norm: got 'l3'"),
        ({"fixed": (3, 1)}, ValueError, "fixed: got 3 filters a class and 1 for all, 10, want"),
        ({"csg_layers": ["haed"]}, ValueError, "csg_layers: got 'haed', did you mean 'head'"),
        ({"std_layers": "head"}, TypeError, "std_layers: got a str"),
        ({"std_layers": ["feat"]}, ValueError, "std_layers: got 'feat'"),
        ({"std_layers": []}, ValueError, r"std_layers: got \[\], with which nothing learns in"),
        ({"fixed": (1, 3), "csg_layers": []}, ValueError, r"csg_layers: got \[\], with which noth"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CSG(*parts(), CLASSES, FILTERS, **options)


def test_the_loss_of_a_forward_without_labels_is_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match="want forward\\(images, labels\\)"):
        network.loss(network(images()), LABELS)


def test_the_gated_path_is_taken_without_gradients_where_they_would_count_nothing() -> None:
    network = model()
    for epoch, learns in ((1, False), (2, True)):
        network.begin_epoch(epoch)
        output = network(images(), LABELS)
        assert output.gated_logits is not None
        assert output.gated_logits.requires_grad == learns
        network.zero_grad()
        network.loss(output, LABELS).backward()
        assert isinstance(network.gate, nn.Parameter)
        assert network.gate.grad is not None
        assert (network.gate.grad != 0).any() == learns
