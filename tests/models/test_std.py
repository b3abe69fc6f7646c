"""The baseline: an ordinary network that can be measured like an interpretable one."""

import copy

import pytest
import torch
from torch import nn

from picnn_fast.models import PICNN, STD

LABELS = torch.tensor([0, 1, 2, 0])


def build(method: type[PICNN] | type[STD], **options: object) -> PICNN | STD:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return method(features, head, num_classes=3, num_filters=6, in_channels=5, **options)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_forward_gives_logits_and_maps_alone() -> None:
    output = build(STD)(images())
    assert output.logits.shape == (4, 3)
    assert output.maps.shape[:2] == (4, 6)
    assert output._fields == ("logits", "maps")


def test_the_loss_is_the_cross_entropy() -> None:
    model = build(STD)
    output = model(images())
    terms = model.loss_terms(output, LABELS)
    expected = nn.functional.cross_entropy(output.logits, LABELS)
    assert list(terms) == ["discrimination"]
    torch.testing.assert_close(terms["discrimination"], expected)
    torch.testing.assert_close(model.loss(output, LABELS), expected)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_loss_and_gradients_are_those_of_the_plain_network(activation: str) -> None:
    model = build(STD, inserted_activation=activation).double()
    conv, norm, _ = model.features[0]
    inserted, linear = model.features[1], model.head[2]
    x = nn.functional.conv2d(images().double(), conv.weight, conv.bias)
    deviation = x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps
    x = (x - x.mean((0, 2, 3), keepdim=True)) / deviation.sqrt()
    x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp_min(0)
    x = nn.functional.conv2d(x, inserted.weight, inserted.bias, padding=1)
    x = x.clamp_min(0) if activation == "relu" else x
    logits = x.mean((2, 3)) @ linear.weight.T + linear.bias
    chosen = logits[range(4), LABELS]
    expected = (logits.exp().sum(1).log() - chosen).mean()
    loss = model.loss(model(images().double()), LABELS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("initial", ["uniform", "published"])
def test_the_same_seed_starts_the_same_network_and_matrix_as_picnn(initial: str) -> None:
    std, picnn = build(STD, initial=initial), build(PICNN, initial=initial)
    torch.testing.assert_close(std.state_dict(), picnn.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(std.discriminator()(images()), picnn.discriminator()(images()))


def test_it_trains_as_the_plain_network_does_and_leaves_the_matrix() -> None:
    model = build(STD)
    plain = copy.deepcopy(model.discriminator())
    matrix = model.ownership().clone()
    ours = torch.optim.AdamW(model.parameter_groups(lr=0.1))
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for _ in range(3):
        ours.zero_grad()
        model.loss(model(images()), LABELS).backward()
        ours.step()
        theirs.zero_grad()
        nn.functional.cross_entropy(plain(images()), LABELS).backward()
        theirs.step()
    torch.testing.assert_close(model.discriminator().state_dict(), plain.state_dict())
    torch.testing.assert_close(model.ownership(), matrix, rtol=0, atol=0)
    assert "correspondence.weight" not in dict(model.named_parameters())
