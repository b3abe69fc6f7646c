"""Networks of our own, as whole networks."""

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.backbones import ResidualBlock, cifar_resnet, small_cnn, small_resnet, vgg_m, vgg_s


@pytest.mark.parametrize(
    ("network", "pixels", "maps"),
    [
        (small_resnet(1), 8, (128, 4, 4)),
        (small_resnet(3), 32, (128, 16, 16)),
        (small_cnn(), 64, (96, 8, 8)),
        (small_cnn(1), 128, (96, 16, 16)),
    ],
)
def test_their_features_yield_maps_after_a_relu_and_their_classifiers_logits(network, pixels, maps):
    torch.manual_seed(0)
    images = torch.rand(2, next(network.parameters()).shape[1], pixels, pixels)
    with torch.no_grad():
        features = network.features(images)
        assert network(images).shape == (2, 1000)
    assert features.shape == (2, *maps)
    assert features.min() == 0
    assert features.max() > 0


@pytest.mark.parametrize(("build", "side"), [(vgg_m, 13), (vgg_s, 18)])
def test_vgg_m_and_vgg_s_have_the_published_sizes(build, side):
    network = build().features.to("meta")
    assert network(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 512, side, side)
    linear = [layer for layer in build(1, 20).classifier if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [4096, 4096, 20]


def test_the_small_resnet_has_five_3x3_convolutions() -> None:
    convs = [m for m in small_resnet().modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convs) == 5


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_cifar_resnets_have_the_parameters_of_the_papers_and_those_of_their_shortcuts(
    depth: int, parameters: int
) -> None:
    features = cifar_resnet(depth, 3).features
    convolutions = [m for m in features.modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.kernel_size == (3, 3) for conv in convolutions) + 1 == depth  # and one linear
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # weights, and batch norms, of two
    linear = 64 * 10 + 10
    assert sum(p.numel() for p in features.parameters()) + linear == parameters + shortcuts
    assert features.to("meta")(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 64, 8, 8)
    with pytest.raises(ValueError, match=r"^depth: got 18, want 6n \+ 2, such as 20 or 56$"):
        cifar_resnet(18)


@pytest.mark.parametrize("build", [small_resnet, small_cnn, vgg_m, vgg_s])
def test_their_classifier_is_not_drawn_where_a_new_one_takes_its_place(
    build,
) -> None:
    torch.manual_seed(0)
    network = build()
    lazy = [m for m in network.modules() if isinstance(m, nn.LazyLinear)]
    assert lazy
    assert all(layer.has_uninitialized_params() for layer in lazy)
    model = make_interpretable(network, "std", layer="features", num_classes=2, num_filters=5)
    assert not any(isinstance(layer, nn.LazyLinear) for layer in model.modules())


def test_a_residual_block_adds_its_shortcut() -> None:
    block = ResidualBlock(4, 4).eval()
    for parameter in block.residual.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())
    assert ResidualBlock(4, 6, stride=2)(x).shape == (2, 6, 3, 3)
