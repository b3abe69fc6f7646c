"""Backbones of our own: whole networks, each to be cut behind its ``features``.

Their classifiers are lazy: weights that a new classifier replaces are never drawn.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


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


def small_resnet(image_channels: int = 1, num_classes: int = 1000) -> nn.Sequential:
    """A residual network of five 3x3 convolutions for small images (8x8 digits, 32x32 photographs).

    Its ``features`` yield 128 channels at half the size of the image.

    Args:
        image_channels: 1 for grey images, 3 for colour.
        num_classes: K.
    """
    features = nn.Sequential(
        nn.Conv2d(image_channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ResidualBlock(64, 64),
        ResidualBlock(64, 128, stride=2),
    )
    return _network(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes))


def cifar_resnet(depth: int, image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """A residual network for images of 32 pixels, three stages of 16, 32 and 64 channels.

    Its ``features`` yield 64 channels at a quarter of the image's size.

    Args:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56, 110.
        image_channels, num_classes: see ``small_resnet``.

    Raises:
        ValueError: another depth.

    Source:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
        As in the code of CSG's authors, a shortcut between stages is a 1x1 convolution with batch
        norm (option B); the paper's has no weights (option A).

    Example:
        >>> from picnn_fast.backbones import cifar_resnet
        >>> sum(p.numel() for p in cifar_resnet(20, 3).features.parameters())
        271824
    """
    blocks, left_over = divmod(depth - 2, 6)
    if blocks < 1 or left_over:
        raise ValueError(f"depth: got {depth}, want 6n + 2, such as 20 or 56")
    layers: list[nn.Module] = [
        nn.Conv2d(image_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            layers.append(ResidualBlock(channels, width, stride=width // channels))
            channels = width
    features = nn.Sequential(*layers)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return _network(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes))


def small_cnn(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """A plain network of five 3x3 convolutions with batch norm, for images of 64 to 128 pixels.

    Without shortcuts, which make a map hold patterns of several filters (ICNN, section 5). Its
    ``features`` yield 96 channels at 1/8 of the image's size; the classifier starts with max
    pooling.

    Args:
        image_channels, num_classes: see ``small_resnet``.
    """
    layers = ((24, 2, True), (48, 1, True), (96, 1, False), (96, 1, False))
    return _network(
        _plain(image_channels, layers),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


def small_vgg(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """A plain network as VGG's, with fc6 and fc7, for images of 64 to 128 pixels.

    Four 3x3 convolutions with batch norm, the last two of them with 64 channels at 1/4 of the
    image's size, and three fully connected layers, without dropout.

    Args:
        image_channels, num_classes: see ``small_resnet``.
    """
    layers = ((32, 2, True), (64, 1, False), (64, 1, False), (64, 1, False))
    return _network(
        _plain(image_channels, layers),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(8),  # nothing to do at 64 pixels
        nn.Flatten(),
        nn.LazyLinear(256),
        nn.ReLU(),
        nn.LazyLinear(256),
        nn.ReLU(),
        nn.LazyLinear(num_classes),
    )


def _plain(image_channels: int, layers: Sequence[tuple[int, int, bool]]) -> nn.Sequential:
    """3x3 convolutions by width and stride, and whether pooling by 2 follows."""
    plain: list[nn.Module] = []
    channels = image_channels
    for width, stride, pooled in layers:
        plain += [
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if pooled:
            plain.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*plain)


def vgg_m(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """VGG-M (CNN-M): 512 channels after the fifth convolution, 13 x 13 of 224 pixels.

    Args:
        image_channels, num_classes: see ``small_resnet``.

    Source:
        Chatfield, Simonyan, Vedaldi, Zisserman, "Return of the Devil in the Details", BMVC 2014,
        table 1; padding and rounding of the poolings as in the published models.
    """
    return _chatfield(
        image_channels,
        num_classes,
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 256, 5, stride=2, padding=1),
        (nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2)),
    )


def vgg_s(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """VGG-S (CNN-S): 512 channels after the fifth convolution, 18 x 18 of 224 pixels.

    Args:
        image_channels, num_classes: see ``small_resnet``.

    Source:
        As of ``vgg_m``.
    """
    return _chatfield(
        image_channels,
        num_classes,
        nn.MaxPool2d(3, 3, ceil_mode=True),
        nn.Conv2d(96, 256, 5, padding=1),
        (nn.MaxPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(3, 3, ceil_mode=True)),
    )


def _chatfield(
    image_channels: int,
    num_classes: int,
    first_pool: nn.Module,
    second: nn.Conv2d,
    pools: Sequence[nn.Module],
) -> nn.Sequential:
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
    return _network(
        features,
        last,
        nn.AdaptiveAvgPool2d(6),  # nothing to do at 224 pixels
        nn.Flatten(),
        nn.LazyLinear(4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.LazyLinear(4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.LazyLinear(num_classes),
    )


def _network(features: nn.Module, *classifier: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(features=features, classifier=nn.Sequential(*classifier)))
