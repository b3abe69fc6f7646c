"""Backbones cut at their last convolutional block: features, and how many channels they yield."""

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from picnn_fast._extras import extra


def pooling_head(num_filters: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear classifier: ``[B, N, h, w]`` to ``[B, K]``."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_filters, num_classes))


class Backbone(NamedTuple):
    """The part of a network before the target layer, and how its maps are classified.

    Attributes:
        features: images ``[B, C, H, W]`` to maps ``[B, channels, h, w]``, after a ReLU.
        channels: of those maps.
        head: a new classifier for so many filters and classes.
    """

    features: nn.Module
    channels: int
    head: Callable[[int, int], nn.Sequential] = pooling_head


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


def small_cnn(image_channels: int = 3) -> Backbone:
    """A plain network of five 3x3 convolutions with batch norm, for images of 64 to 128 pixels.

    Without shortcuts, which make a map hold patterns of several filters (ICNN, section 5).

    Args:
        image_channels: 1 for grey images, 3 for colour.

    Returns:
        A backbone that yields 96 channels at 1/8 of the image's size, and max pooling before the
        classifier.
    """
    layers: list[nn.Module] = []
    channels = image_channels
    for width, stride, pooled in ((24, 2, True), (48, 1, True), (96, 1, False), (96, 1, False)):
        layers += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if pooled:
            layers.append(nn.MaxPool2d(2))
        channels = width

    def head(num_filters: int, num_classes: int) -> nn.Sequential:
        return nn.Sequential(
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(num_filters * 16, num_classes),
        )

    return Backbone(nn.Sequential(*layers), channels, head)


def split_vgg(network: Any) -> Backbone:
    """The layers of a torchvision AlexNet or VGG up to the last ReLU, shared, not copied.

    The head is its last pooling and a new classifier like its own.
    """
    *layers, pool = network.features
    channels = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]
    side = network.avgpool.output_size
    positions = side**2 if isinstance(side, int) else side[0] * side[1]

    def head(num_filters: int, num_classes: int) -> nn.Sequential:
        linear = [layer for layer in network.classifier if isinstance(layer, nn.Linear)]
        sizes = [num_filters * positions, *(one.out_features for one in linear[:-1]), num_classes]
        new = iter(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        classifier = [
            next(new) if isinstance(layer, nn.Linear) else layer for layer in network.classifier
        ]
        return nn.Sequential(pool, network.avgpool, nn.Flatten(), *classifier)

    return Backbone(nn.Sequential(*layers), channels, head)


def is_torchvision_vgg(network: object) -> bool:
    """Whether ``network`` is an instance of torchvision's ``VGG`` or ``AlexNet``."""
    for name, kind in (("vgg", "VGG"), ("alexnet", "AlexNet")):
        module = sys.modules.get(f"torchvision.models.{name}")
        if module is not None and isinstance(network, getattr(module, kind)):
            return True
    return False


def _torchvision_vgg(name: str, image_channels: int, weights: Any) -> Backbone:
    with extra("train"):
        from torchvision.models import get_model
    if weights is not None and image_channels != 3:
        raise ValueError(
            f"image_channels: got {image_channels} with weights={weights!r}, want 3:"
            " trained weights take colour images"
        )
    network = get_model(name, weights=weights)
    if image_channels != 3:
        first = network.features[0]
        network.features[0] = nn.Conv2d(
            image_channels, first.out_channels, first.kernel_size, first.stride, first.padding
        )
    return split_vgg(network)


def alexnet(image_channels: int = 3, weights: Any = None) -> Backbone:
    """torchvision's AlexNet up to its fifth convolution: 256 channels, 13 x 13 of 224 pixels.

    Args:
        image_channels, weights: see ``resnet18``.
    """
    return _torchvision_vgg("alexnet", image_channels, weights)


def vgg16(image_channels: int = 3, weights: Any = None) -> Backbone:
    """torchvision's VGG-16 up to conv5_3: 512 channels at 1/16 of the image's size.

    Args:
        image_channels, weights: see ``resnet18``.
    """
    return _torchvision_vgg("vgg16", image_channels, weights)


def _chatfield(
    image_channels: int, first_pool: nn.Module, second: nn.Conv2d, pools: Sequence[nn.Module]
) -> Backbone:
    """What CNN-M and CNN-S share; poolings keep what sticks out at the border (``ceil_mode``)."""
    middle, last = pools
    features = nn.Sequential(
        nn.Conv2d(image_channels, 96, 7, stride=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
        first_pool,
        second,
        nn.ReLU(),
        *([nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if second.stride[0] == 2 else []),
        middle,
        nn.Conv2d(256, 512, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1),
        nn.ReLU(),
    )

    def head(num_filters: int, num_classes: int) -> nn.Sequential:
        return nn.Sequential(
            last,
            nn.AdaptiveAvgPool2d(6),  # nothing to do at 224 pixels
            nn.Flatten(),
            nn.Linear(num_filters * 36, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    return Backbone(features, 512, head)


def vgg_m(image_channels: int = 3) -> Backbone:
    """VGG-M (CNN-M) up to its fifth convolution: 512 channels, 13 x 13 of 224 pixels.

    Args:
        image_channels: 3 for colour.

    Source:
        Chatfield, Simonyan, Vedaldi, Zisserman, "Return of the Devil in the Details", BMVC 2014,
        table 1; padding and rounding of the poolings as in the published models.
    """
    return _chatfield(
        image_channels,
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 256, 5, stride=2, padding=1),
        (nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2)),
    )


def vgg_s(image_channels: int = 3) -> Backbone:
    """VGG-S (CNN-S) up to its fifth convolution: 512 channels, 18 x 18 of 224 pixels.

    Args:
        image_channels: 3 for colour.

    Source:
        Chatfield, Simonyan, Vedaldi, Zisserman, "Return of the Devil in the Details", BMVC 2014,
        table 1; padding and rounding of the poolings as in the published models.
    """
    return _chatfield(
        image_channels,
        nn.MaxPool2d(3, 3, ceil_mode=True),
        nn.Conv2d(96, 256, 5, padding=1),
        (nn.MaxPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(3, 3, ceil_mode=True)),
    )


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "small-resnet": small_resnet,
    "small-cnn": small_cnn,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "alexnet": alexnet,
    "vgg16": vgg16,
    "vgg-m": vgg_m,
    "vgg-s": vgg_s,
}
