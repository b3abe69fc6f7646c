"""Backbones cut at their last convolutional block: features, and how many channels they yield."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from picnn_fast._extras import extra


class Backbone(NamedTuple):
    """The part of a network before the target layer.

    Attributes:
        features: images ``[B, C, H, W]`` to maps ``[B, channels, h, w]``, after a ReLU.
        channels: of those maps.
    """

    features: nn.Module
    channels: int


def pooling_head(num_filters: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear classifier: ``[B, N, h, w]`` to ``[B, K]``."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_filters, num_classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al., CVPR 2016, figure 5 left).

    Args:
        in_channels, out_channels: of the maps before and after.
        stride: of the first convolution; the shortcut becomes a 1x1 convolution where it or the
            channels change.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = (self.shortcut(maps) + self.residual(maps)).relu()
        return output


def small_resnet(image_channels: int = 1) -> Backbone:
    """A residual network of five 3x3 convolutions for small images (8x8 digits, 32x32 photographs).

    Args:
        image_channels: 1 for grey images, 3 for colour.

    Returns:
        A backbone that yields 128 channels at half the size of the image.
    """
    features = nn.Sequential(
        nn.Conv2d(image_channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ResidualBlock(64, 64),
        ResidualBlock(64, 128, stride=2),
    )
    return Backbone(features, 128)


def split_resnet(network: Any) -> Backbone:
    """The layers of a torchvision ResNet up to ``layer4``, shared with ``network``, not copied."""
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    features = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in names))
    return Backbone(features, network.fc.in_features)


def is_torchvision_resnet(network: object) -> bool:
    """Whether ``network`` is an instance of torchvision's ``ResNet``."""
    # No instance exists unless its module has been imported: no need to import torchvision here.
    module = sys.modules.get("torchvision.models.resnet")
    return module is not None and isinstance(network, module.ResNet)


def _torchvision_resnet(name: str, image_channels: int, weights: Any) -> Backbone:
    with extra("train"):
        from torchvision.models import get_model
    if weights is not None and image_channels != 3:
        raise ValueError(
            f"image_channels: got {image_channels} with weights={weights!r}, want 3:"
            " trained weights take colour images"
        )
    network = get_model(name, weights=weights)
    if image_channels != 3:
        network.conv1 = nn.Conv2d(image_channels, 64, 7, stride=2, padding=3, bias=False)
    return split_resnet(network)


def resnet18(image_channels: int = 3, weights: Any = None) -> Backbone:
    """torchvision's ResNet-18 up to ``layer4``: 512 channels at 1/32 of the image's size.

    Args:
        image_channels: 3 for colour; another number makes a first convolution of its own.
        weights: None, or what ``torchvision.models.resnet18`` takes; weights that are not cached
            are downloaded by torchvision.
    """
    return _torchvision_resnet("resnet18", image_channels, weights)


def resnet50(image_channels: int = 3, weights: Any = None) -> Backbone:
    """torchvision's ResNet-50 up to ``layer4``: 2048 channels at 1/32 of the image's size.

    Args:
        image_channels, weights: see ``resnet18``.
    """
    return _torchvision_resnet("resnet50", image_channels, weights)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "small-resnet": small_resnet,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
