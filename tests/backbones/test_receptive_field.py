"""Receptive fields against gradients: which pixels a position really depends on."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from picnn_fast.backbones import ReceptiveField, ResidualBlock, cut, receptive_field, small_resnet

torchvision = pytest.importorskip("torchvision")


def conv(inputs: int, outputs: int, kernel: int, **options: object) -> nn.Conv2d:
    """A convolution all of whose weights are 1."""
    layer = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)  # type: ignore[arg-type]
    nn.init.ones_(layer.weight)
    return layer


def seen(features: nn.Module, size: tuple[int, int], y: int, x: int) -> Tensor:
    """How much position (y, x) depends on each pixel: the gradient of its channels' sum."""
    images = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
    features.double()(images)[0, :, y, x].sum().backward()
    assert images.grad is not None
    return images.grad[0, 0]


@st.composite
def linear_networks(draw: st.DrawFn) -> nn.Sequential:
    """Convolutions, average pools, residual and parallel branches."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "pool", "same", "branches", "pad", "adaptive"]))
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        if kind == "conv":
            dilation = draw(st.integers(1, 2))
            options = {"stride": stride, "padding": draw(st.integers(0, 2)), "dilation": dilation}
            layers.append(conv(1, 1, kernel, **options))
        elif kind == "pool":
            ceil = draw(st.booleans())
            layers.append(nn.AvgPool2d(kernel, stride, kernel // 2, ceil_mode=ceil))
        elif kind == "same":
            layers.append(conv(1, 1, kernel, padding="same"))
        elif kind == "pad":
            layers.append(nn.ZeroPad2d((1, 2, 0, draw(st.integers(0, 2)))))
        elif kind == "adaptive":
            layers.append(nn.AdaptiveAvgPool2d((None, 1)))
            break
        else:
            layers.append(Branches(kernel, stride, draw(st.booleans())))
        layers.append(nn.Hardtanh(-1e9, 1e9))
    return nn.Sequential(*layers)


class Branches(nn.Module):
    """Two windows of different size over the same positions, added or put side by side."""

    def __init__(self, kernel: int, stride: int, add: bool) -> None:
        super().__init__()
        self.wide = conv(1, 1, 2 * kernel + 1, stride=stride, padding=kernel)
        self.narrow = conv(1, 1, 1, stride=stride)
        self.mixed = conv(2, 1, 1)
        self.add = add

    def forward(self, maps: Tensor) -> Tensor:
        wide, narrow = self.wide(maps), self.narrow(maps)
        return wide + narrow if self.add else self.mixed(torch.cat([wide, narrow], dim=1))


@given(network=linear_networks(), height=st.integers(14, 24), width=st.integers(14, 24))
def test_no_pixel_outside_the_field_has_a_gradient(
    network: nn.Sequential, height: int, width: int
) -> None:
    size = (height, width)
    try:
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 1, *size)).shape[2:])
    except RuntimeError:  # nothing is left of the image
        with pytest.raises(ValueError, match=r"^features: .* cannot take \(1, "):
            receptive_field(network, size, channels=1)
        return
    field = receptive_field(network, size, channels=1)
    assert field.map_size == shape
    boxes = field.boxes()
    assert boxes.shape == (*shape, 4)
    for y in {0, shape[0] // 2, shape[0] - 1}:
        for x in {0, shape[1] // 2, shape[1] - 1}:
            rows, columns = seen(network, size, y, x).nonzero(as_tuple=True)
            x0, y0, x1, y1 = boxes[y, x].tolist()
            assert ((x0 <= columns) & (columns < x1)).all()
            assert ((y0 <= rows) & (rows < y1)).all()


@given(network=linear_networks())
def test_far_from_the_border_the_field_is_the_box_of_the_pixels_with_a_gradient(
    network: nn.Sequential,
) -> None:
    size = (210, 190)
    field = receptive_field(network, size, channels=1)
    y, x = field.map_size[0] // 2, field.map_size[1] // 2
    rows, columns = seen(network, size, y, x).nonzero(as_tuple=True)
    centre = field.centres()[y, x].tolist()
    pairs = zip((columns, rows), centre, field.size[::-1], size[::-1], strict=True)
    for seen_pixels, middle, span, pixels in pairs:
        if span > pixels // 2:  # pooled over the whole width
            continue
        least, most = seen_pixels.min().item(), seen_pixels.max().item()
        assert most + 1 - least == span
        assert (least + most + 1) / 2 == middle


def test_centre_and_spread_are_those_of_the_weight_of_the_pixels() -> None:
    network = nn.Sequential(
        conv(1, 1, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3, 2),
        conv(1, 1, 3, dilation=2),
        conv(1, 1, 4),
    )
    field = receptive_field(network, (91, 81), channels=1)
    y, x = field.map_size[0] // 2, field.map_size[1] // 2
    weight = seen(network, (91, 81), y, x)
    weight = weight / weight.sum()
    rows, columns = (torch.arange(n) + 0.5 for n in weight.shape)
    centre = torch.stack([(weight.sum(0) * columns).sum(), (weight.sum(1) * rows).sum()])
    torch.testing.assert_close(centre, field.centres()[y, x].double())
    spread = ((weight.sum(1) * (rows - centre[1]) ** 2).sum()).sqrt().item()
    assert field.spread == pytest.approx((spread, spread))
    assert field.diameters() == pytest.approx((2.35482 * spread,) * 2, rel=1e-5)
    x0, y0, x1, y1 = field.boxes()[y, x].tolist()
    assert (x1 - x0, y1 - y0) == field.size  # nothing is clipped in the middle


@pytest.mark.parametrize(
    ("features", "size", "wanted", "maps"),
    [
        (lambda: torchvision.models.alexnet().features, 227, (195, 32, 31.5), 6),
        (lambda: cut("alexnet").features, 227, (163, 16, 15.5), 13),
        (lambda: torchvision.models.vgg16().features, 224, (212, 32, 16.0), 7),
        (lambda: cut("resnet18").features, 224, (435, 32, 0.5), 7),
        (lambda: cut("resnet18", "layer4.1.relu").features, 224, (435, 32, 0.5), 7),  # a graph
        (lambda: small_resnet(3).features, 32, (13, 2, 0.5), 16),
    ],
)
def test_known_networks(
    features: Callable[[], nn.Module], size: int, wanted: tuple[int, int, float], maps: int
) -> None:
    field = receptive_field(features(), size)
    assert (field.size[0], field.stride[0], field.first_centre[0]) == wanted
    assert field.map_size == (maps, maps)
    assert field.size[0] == field.size[1]
    assert field.image_size == (size, size)


def test_max_pooling_sees_every_pixel_of_its_window() -> None:
    field = receptive_field(nn.MaxPool2d(3, 2, 1), 9, channels=1)
    assert (field.size, field.stride, field.first_centre) == ((3, 3), (2, 2), (0.5, 0.5))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 5))
        self.scale = nn.Parameter(torch.ones(1, 2, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(images, self.weight, padding=(1, 2)) * self.scale.exp() + 1)
        maps = F.max_pool2d(maps, 2).relu_().contiguous()
        return F.adaptive_avg_pool2d(F.avg_pool2d(maps, 3, stride=1, padding=1), (4, 2))


def test_functions_are_read_like_layers() -> None:
    layers = nn.Sequential(
        nn.Conv2d(1, 2, (3, 5), padding=(1, 2)),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d((2, 4)),
    )
    assert receptive_field(Functional(), 16, channels=1) == receptive_field(layers, 16, channels=1)


class Untraceable(nn.Module):
    elementwise = True

    def forward(self, maps: Tensor) -> Tensor:
        return maps if maps.sum() > 0 else -maps


def test_a_module_may_say_that_it_is_elementwise() -> None:
    plain = receptive_field(nn.Conv2d(3, 2, 3), 8)
    assert receptive_field(nn.Sequential(nn.Conv2d(3, 2, 3), Untraceable()), 8) == plain
    network = nn.Sequential(nn.Conv2d(3, 2, 3), Untraceable())
    network[1].elementwise = False
    with pytest.raises(ValueError, match=r"^features: got a Sequential that torch.fx cannot trace"):
        receptive_field(network, 8)


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(ResidualBlock(3, 3, 2), nn.BatchNorm2d(3)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    receptive_field(network, 16)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


class Two(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Disagree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 1, 1, stride=2), nn.Conv2d(3, 1, 9)

    def forward(self, images: Tensor) -> Tensor:
        return self.a(images) + self.b(images)


@pytest.mark.parametrize(
    ("network", "size", "error", "message"),
    [
        (nn.Sequential(nn.Upsample(scale_factor=2)), 8, TypeError, r"got layer '0' \(Upsample\)"),
        (nn.Sequential(nn.Flatten()), 8, TypeError, r"got layer '0' \(Flatten\)"),
        (nn.AdaptiveAvgPool2d(3), 8, ValueError, r"takes maps \(8, 8\) to \(3, 3\)"),
        (nn.Conv2d(3, 1, 3, 1, 1, padding_mode="circular"), 8, ValueError, "padding_mode='circ"),
        (nn.MaxPool2d(2, return_indices=True), 8, TypeError, "yields tuple"),
        (nn.Conv2d(1, 1, 3), 8, ValueError, r"cannot take \(3, 8, 8\)"),
        (Two(), 8, TypeError, "yields tuple"),
        (Disagree(), 16, ValueError, r"joins branches of strides \[1, 2\]"),
        ("vgg16", 8, TypeError, "got str"),
    ],
)
def test_what_it_does_not_know_is_named(
    network: nn.Module, size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^features: .*{message}"):
        receptive_field(network, size)


def test_bad_arguments_are_refused() -> None:
    for size, error in (((8, 8, 8), ValueError), (0, ValueError), (8.0, TypeError)):
        with pytest.raises(error, match=r"^image_size: got"):
            receptive_field(nn.Identity(), size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^channels: got 0"):
        receptive_field(nn.Identity(), 8, channels=0)
    field = receptive_field(nn.Identity(), 8)
    with pytest.raises(ValueError, match=r"^maps: got shape \(1, 3, 8, 7\), want \[B, N, 8, 8\]"):
        field.peaks(torch.zeros(1, 3, 8, 7))
    with pytest.raises(TypeError, match=r"^maps: got dtype torch.int64"):
        field.peaks(torch.zeros(1, 3, 8, 8, dtype=torch.int64))


def test_peaks_are_the_first_highest_positions() -> None:
    field = ReceptiveField((4, 6), (2, 3), (1.0, 2.5), (3, 4), (8, 12))
    maps = torch.zeros(1, 2, 3, 4)
    maps[0, 1, 1, 2] = maps[0, 1, 2, 0] = 5
    activations, centres = field.peaks(maps)
    assert activations.tolist() == [[0.0, 5.0]]
    assert centres.tolist() == [[[2.5, 1.0], [8.5, 3.0]]]
    assert field.boxes()[0, 0].tolist() == [0.0, 0.0, 5.5, 3.0]
    assert field.boxes()[2, 3].tolist() == [8.5, 3.0, 12.0, 7.0]
