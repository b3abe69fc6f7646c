"""Backbones: shapes, sizes, and torchvision's ResNets cut where they should be."""

import pytest
import torch
from torch import nn

from picnn_fast.models import BACKBONES
from picnn_fast.models.backbones import (
    ResidualBlock,
    is_torchvision_resnet,
    pooling_head,
    resnet18,
    split_resnet,
)

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small-resnet", (2, 1, 8, 8)),
        ("small-resnet", (2, 3, 32, 32)),
        ("resnet18", (2, 3, 64, 64)),
        ("resnet18", (2, 1, 64, 64)),
        ("resnet50", (2, 3, 64, 64)),
    ],
)
def test_backbones_yield_the_channels_they_say_after_a_relu(
    name: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    features, channels, _ = BACKBONES[name](image_channels=shape[1])
    with torch.no_grad():
        maps = features(torch.randn(shape))
    assert maps.shape[:2] == (2, channels)
    assert maps.min() == 0
    assert maps.max() > 0


def test_the_small_resnet_has_five_3x3_convolutions() -> None:
    features = BACKBONES["small-resnet"]().features
    convs = [m for m in features.modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convs) == 5


def test_a_split_resnet_shares_its_layers_and_yields_the_same_maps() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    features, channels, _ = split_resnet(network)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = features(images).mean((2, 3))
        torch.testing.assert_close(network.fc(pooled), network(images))
    assert channels == 512
    assert features.layer4 is network.layer4


def test_resnets_are_told_from_other_modules() -> None:
    assert is_torchvision_resnet(torchvision.models.resnet18())
    assert not is_torchvision_resnet(torchvision.models.squeezenet1_1())
    assert not is_torchvision_resnet("resnet18")


def test_trained_weights_want_colour_images() -> None:
    with pytest.raises(ValueError, match="image_channels: got 1 with weights"):
        resnet18(image_channels=1, weights="DEFAULT")


def test_a_residual_block_adds_its_shortcut() -> None:
    block = ResidualBlock(4, 4).eval()
    for parameter in block.residual.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())
    assert ResidualBlock(4, 6, stride=2)(x).shape == (2, 6, 3, 3)


def test_the_pooling_head_averages_and_classifies() -> None:
    head = pooling_head(6, 3)
    maps = torch.randn(2, 6, 4, 5)
    expected = maps.mean((2, 3)) @ head[-1].weight.T + head[-1].bias
    torch.testing.assert_close(head(maps), expected)
