"""Which filters carried a prediction, and what it is without them."""

import pytest
import torch
from torch import nn

from picnn_fast.explain import explain_image
from picnn_fast.models import METHODS, make_interpretable

CLASSES, FILTERS = 3, 6


def network(method="picnn", head=None, **options):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, FILTERS, 3, padding=1), nn.ReLU())
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, CLASSES))
    model = make_interpretable(
        (features, head),
        method,
        num_classes=CLASSES,
        num_filters=FILTERS,
        insert_conv=False,
        **options,
    )
    return model.eval()


@pytest.mark.parametrize("target", [None, 0, 2])
def test_of_a_linear_head_contributions_are_weight_times_pooled_map(target):
    model, image = network(), torch.rand(1, 5, 4)
    seen = explain_image(model, image, target=target)
    with torch.no_grad():
        maps = model.filter_maps(image[None])[0]
        logits = model(image[None]).logits[0]
    linear = model.head[2]
    assert seen.target == (int(logits.argmax()) if target is None else target)
    torch.testing.assert_close(seen.logits, logits)
    torch.testing.assert_close(seen.maps, maps)
    expected = linear.weight.detach()[seen.target] * maps.mean((1, 2))
    torch.testing.assert_close(seen.contributions, expected)
    assert seen.offset == pytest.approx(linear.bias[seen.target].item())
    assert seen.exact
    total = seen.offset + seen.contributions.sum().item()
    assert total == pytest.approx(logits[seen.target].item(), abs=1e-5)


def test_a_head_with_biases_between_its_layers_is_not_exact():
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    model = network(head=head)
    with torch.no_grad():
        model.head[2].bias.fill_(-0.05)
    assert not explain_image(model, torch.rand(1, 5, 4)).exact


def test_groups_are_the_filters_of_each_class_and_logits_those_without_them():
    model, image = network(), torch.rand(1, 5, 4)
    with torch.no_grad():
        model.correspondence.weight.copy_(50 * torch.eye(3)[:, [0, 0, 1, 1, 1, 2]])
    seen = explain_image(model, image)
    assert {group.owner: set(group.filters.tolist()) for group in seen.groups} == {
        0: {0, 1},
        1: {2, 3, 4},
        2: {5},
    }
    values = [group.contribution for group in seen.groups]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(seen.contributions.sum().item(), abs=1e-6)
    for group in seen.groups:
        parts = seen.contributions[group.filters]
        assert parts.tolist() == sorted(parts.tolist(), reverse=True)
        # Behind a linear head, what is left is the logit without their contribution.
        left = seen.logits[seen.target].item() - group.contribution
        assert group.logits_without[seen.target].item() == pytest.approx(left, abs=1e-5)


def test_filters_that_no_class_owns_stand_for_none(monkeypatch):
    model = network()
    monkeypatch.setattr(type(model), "ownership", lambda self: None)
    (group,) = explain_image(model, torch.rand(1, 5, 4)).groups
    assert group.owner is None
    assert sorted(group.filters.tolist()) == list(range(FILTERS))
    owned = torch.zeros(CLASSES, FILTERS)
    owned[1, :4] = 0.5
    monkeypatch.setattr(type(model), "ownership", lambda self: owned)
    groups = explain_image(model, torch.rand(1, 5, 4)).groups
    assert {group.owner: len(group.filters) for group in groups} == {1: 4, None: 2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_explained_in_inference_mode_too(method):
    torch.manual_seed(0)
    model = make_interpretable(
        "small-cnn", method, num_classes=CLASSES, insert_conv=False, image_channels=1
    ).eval()
    image = torch.rand(1, 32, 32)
    with torch.inference_mode():
        inside = explain_image(model, image)
    outside = explain_image(model, image)
    torch.testing.assert_close(inside.contributions, outside.contributions)
    assert sum(len(group.filters) for group in outside.groups) == model.num_filters
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image": torch.rand(2, 1, 5, 4)}, ValueError, r"image: got shape \(2, 1, 5, 4\), want"),
        ({"image": torch.rand(5, 4)}, ValueError, r"image: got shape \(5, 4\), want one image"),
        ({"image": torch.ones(1, 5, 4, dtype=torch.uint8)}, TypeError, "image: got dtype"),
        ({"target": 3}, ValueError, r"target: got 3, want a class in \[0, 3\)"),
        ({"target": 1.0}, TypeError, "target: got float"),
        ({"network": nn.Flatten()}, TypeError, "network: got Flatten, want an interpretable"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, error, text):
    arguments = {"network": network(), "image": torch.rand(1, 5, 4), **change}
    with pytest.raises(error, match=text):
        explain_image(**arguments)
