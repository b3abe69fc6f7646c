"""The splitter: where networks of all kinds are cut, what is shared, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picnn_fast import make_interpretable
from picnn_fast.backbones import ResidualBlock, cut_trained, last_maps, split, split_halves


class Functional(nn.Module):
    """Functions in the place of layers, as in many a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.block = ResidualBlock(6, 8)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 7), nn.Linear(7, 5, bias=False)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        maps = self.block(F.relu(self.bn(self.conv(images)), inplace=True))
        maps = F.adaptive_avg_pool2d(F.max_pool2d(maps, 2), (4, 4))
        vectors = maps.view(maps.size(0), -1)
        return self.fc2(F.dropout(self.fc1(vectors).relu(), 0.4, self.training))


class Branched(nn.Module):
    """Branches before the layer and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.act = nn.ReLU()
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.stem(images))
        maps = self.act(self.left(maps) + self.right(maps))
        return self.fc(maps.mean((2, 3)) + maps.amax((2, 3)))


class Halves(nn.Module):
    """timm's protocol; its first half decides by values, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward_features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images)
        return maps.relu() if maps.sum() > -1e9 else maps

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        vectors = maps.mean((2, 3))
        return vectors if pre_logits else self.fc(vectors)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def same(network: nn.Module, parts: object, channels: int) -> nn.Module:
    """The parts behind one another are the network, but for linear layers, copied here."""
    features, head = parts.features, parts.head(channels, channels, 5)
    old = [m for m in network.modules() if isinstance(m, nn.Linear)]
    new = [m for m in head.modules() if isinstance(m, nn.Linear)]
    for one, other in zip(new, old, strict=True):
        assert one is not other
        one.load_state_dict(other.state_dict())
    for module in (network, features, head):
        module.eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(head(features(images)), network(images))
    return head


def test_functions_become_layers_of_a_chain() -> None:
    network = Functional()
    parts = split(network, "block")
    assert list(dict(parts.features.named_children())) == ["conv", "bn", "relu", "block"]
    assert parts.features.block is network.block
    assert parts.channels() == 8
    head = same(network, parts, 8)
    kinds = [type(layer).__name__ for layer in head]
    wanted = "MaxPool2d AdaptiveAvgPool2d Flatten Linear ReLU Dropout Linear"
    assert kinds == wanted.split()
    assert head[5].p == 0.4
    assert head[6].bias is None
    head = parts.head(8, 10, 3)
    assert (head[3].in_features, head[3].out_features, head[6].out_features) == (160, 7, 3)


def test_a_layer_within_a_block_and_a_function_can_be_the_cut() -> None:
    network = Functional()
    parts = split(network, "relu")  # the first function of that name, after bn
    assert list(dict(parts.features.named_children())) == ["conv", "bn", "relu"]
    same(network, parts, 6)
    parts = split(nn.Sequential(network.conv, nn.Sequential(nn.ReLU(), nn.ReLU())), "1.-2")
    assert isinstance(parts.features, torch.fx.GraphModule)  # layers of several parents
    assert set(parts.features.state_dict()) == {"0.weight", "0.bias"}
    assert parts.features(torch.randn(1, 3, 4, 4)).min() == 0


def test_branches_become_graphs_of_the_same_layers() -> None:
    network = Branched()
    parts = split(network, "act")  # its last run
    assert set(parts.features.state_dict()) == {
        f"{layer}.{name}" for layer in ("stem", "left", "right") for name in ("weight", "bias")
    }
    assert parts.features.left is network.left
    head = same(network, parts, 6)
    assert network.fc.out_features == 5
    assert set(head.state_dict()) == {"fc.weight", "fc.bias"}
    twin = copy.deepcopy(head)
    maps = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(twin(maps), head(maps))
    model = make_interpretable(network, "std", layer="act", num_classes=3, num_filters=6)
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match=r"^num_filters: got 7, want 6: what follows layer 'act'"):
        make_interpretable(network, "std", layer="act", num_classes=3, num_filters=7)


def test_dropout_among_branches_follows_the_mode() -> None:
    network = DroppingBranches()
    parts = split(network.train(), "act")
    same(network, parts, 6)  # in eval mode
    images = torch.randn(2, 3, 16, 16)
    half = parts.features.train()
    assert not torch.equal(half(images), half(images))
    head = parts.own_head().train()
    maps = half.eval()(images)
    assert not torch.equal(head(maps), head(maps))
    torch.testing.assert_close(head.eval()(maps), network.eval()(images))


def test_what_cannot_be_traced_is_cut_between_its_halves() -> None:
    network = Halves()
    parts = split_halves(network)
    assert parts.features.network.body is network.body
    assert set(parts.features.state_dict()) == {"network.body.weight", "network.body.bias"}
    assert set(network.state_dict()) > {"fc.weight"}
    head = same(network, parts, 6)
    assert [type(layer) for layer in head] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    with pytest.raises(ValueError, match=r"^in_channels: got None, want the channels that layer"):
        make_interpretable(network, num_classes=3)
    model = make_interpretable(network, num_classes=3, in_channels=6)
    output = model(torch.randn(2, 3, 8, 8))
    model.loss(output, torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"^backbone: got a Halves that torch.fx cannot trace"):
        make_interpretable(network, layer="fc", num_classes=3)


def test_networks_of_timm_are_used() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=7)
    for options in ({}, {"layer": "layer4"}):
        model = make_interpretable(network, num_classes=3, **options)
        assert any(module is network.layer4 for module in model.features.modules())
        output = model(torch.randn(2, 3, 64, 64))
        assert output.logits.shape == (2, 3)
        model.loss(output, torch.tensor([0, 2])).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TwoOutputs(nn.Sequential):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        maps = self[0](images)
        return maps, maps


class DroppingBranches(Branched):
    def forward(self, images: Tensor) -> Tensor:
        maps = F.dropout2d(self.stem(images), 0.5, self.training)
        maps = self.act(self.left(maps) + self.right(maps))
        return self.fc(F.dropout(maps.mean((2, 3)) + maps.amax((2, 3)), 0.5, self.training))


class NormingBranches(Branched):
    def forward(self, images: Tensor) -> Tensor:
        maps = F.instance_norm(F.alpha_dropout(self.stem(images), 0.5, self.training))
        return self.fc(self.act(self.left(maps) + self.right(maps)).mean((2, 3)))


CONV = nn.Conv2d(3, 6, 3)


@pytest.mark.parametrize(
    ("network", "layer", "error", "message"),
    [
        (Functional(), 4, TypeError, r"layer: got int"),
        (Functional(), "blok", ValueError, r"layer: got 'blok', did you mean 'block'\? want a mod"),
        (Functional(), "", ValueError, r"layer: got '', want a module that the forward of Func"),
        (Functional(), "images", ValueError, r"layer: got 'images', want a module"),
        (nn.Sequential(CONV, nn.ReLU()), "-3", ValueError, r"layer: got '-3', want a module"),
        (Branched(), "left", ValueError, r"layer: got 'left', which 'right' gets round; want"),
        (
            TwoOutputs(CONV),
            "0",
            ValueError,
            r"backbone: got a TwoOutputs whose forward yields a",
        ),
        (NormingBranches(), "act", ValueError, r"backbone: got .* the function 'alpha_dropout'"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(network, layer, error, message) -> None:
    with pytest.raises(error, match=rf"^{message}") as caught:
        split(network, layer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("behind", "num_filters", "message"),
    [
        ([], 6, "backbone: got maps of layer '0' that nothing pools"),
        ([nn.Flatten()], 6, "backbone: got maps of layer '0' that nothing pools"),
        ([nn.Flatten(), nn.Linear(6, 2)], 6, "backbone: got maps of layer '0' that nothing pools"),
        ([nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()], 7, "num_filters: got 7, wan"),
    ],
)
def test_a_classifier_that_cannot_be_made_anew_is_refused(behind, num_filters, message) -> None:
    parts = split(nn.Sequential(CONV, *behind), "0")
    with pytest.raises(ValueError, match=rf"^{message}"):
        parts.head(6, num_filters, 3)


def test_a_graph_without_a_linear_layer_is_refused() -> None:
    class Sum(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            maps = self[0](images)
            return maps.mean((2, 3)) + maps.amax((2, 3))

    with pytest.raises(ValueError, match=r"^backbone: got no nn.Linear behind layer '0', want a"):
        split(Sum(CONV), "0").head(6, 6, 3)


def test_vectors_whose_length_hangs_on_the_images_are_as_long_as_the_old_classifier_says() -> None:
    network = nn.Sequential(CONV, nn.Flatten(), nn.Linear(6 * 9, 2))
    head = split(network, "0").head(6, 8, 3)
    assert head(torch.randn(2, 8, 3, 3)).shape == (2, 3)


@pytest.mark.parametrize("side", [2, 7, 8])
def test_a_pooling_by_a_window_leaves_as_many_positions_as_the_old_classifier_says(side) -> None:
    for positions in (1, 4):
        size = (side * int(positions**0.5),) * 2
        network = nn.Sequential(CONV, nn.AvgPool2d(side), nn.Flatten(), nn.Linear(6 * positions, 2))
        head = split(network, "0").head(6, 8, 3)
        assert head(torch.randn(2, 8, *size)).shape == (2, 3)


def test_the_axis_of_the_channels_is_checked() -> None:
    parts = split(nn.Sequential(CONV, nn.Flatten()), "0")
    assert (parts.channels(), parts.channels(-3)) == (6, 6)
    with pytest.raises(ValueError, match=r"^channel_dim: got 4, want an axis of maps of 4 axes"):
        parts.channels(4)


class Tutorial(nn.Module):
    """Two convolutions as tutorials write them, in a network that another holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(6 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(F.relu(self.conv1(images)))
        maps = self.pool(F.relu(self.conv2(maps)))
        return F.log_softmax(self.fc(torch.flatten(maps, 1)), dim=1)


class Holding(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone = network

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)


class Squeezed(nn.Module):
    """The last convolutions see a single position; one before them is the last of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 6, 3), nn.SiLU(inplace=True)
        self.pool, self.wide, self.fc = nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 8, 1), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.wide(self.pool(self.act(self.conv(images)))).flatten(1))


class Deciding(nn.Module):
    """What comes before the maps is a module that decides by values, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        halves = Halves()
        self.body, self.norm, self.fc = _Body(halves), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(images)).mean((2, 3)))


class _Body(nn.Module):
    def __init__(self, halves: Halves) -> None:
        super().__init__()
        self.halves = halves

    def forward(self, images: Tensor) -> Tensor:
        return self.halves.forward_features(images)


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (Functional(), "block"),
        (Branched(), "act"),
        (Tutorial(), "relu_1"),
        (Holding(Tutorial()), "relu_1"),
        (Holding(Functional()), "backbone.block"),
        (Squeezed(), "act"),
        (Deciding(), "norm"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "0"),
    ],
)
def test_the_last_maps_are_found_behind_the_last_convolution(network, layer) -> None:
    images = torch.randn(2, 3, 16, 16)
    network.eval()
    assert last_maps(network, images) == layer
    parts = cut_trained(network, images)
    logits = parts.own_head().eval()(parts.features.eval()(images))
    torch.testing.assert_close(logits, network(images))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("vgg11", "features.19"),
        ("densenet121", "relu"),
        ("mobilenet_v2", "features"),
        ("googlenet", "inception5b"),
    ],
)
def test_the_last_maps_of_known_networks_are_where_they_are_cut(name: str, layer: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    network = models.get_model(name, weights=None, **options).eval()
    assert last_maps(network, torch.randn(1, 3, 64, 64)) == layer


def test_maps_that_others_bypass_or_that_are_none_are_refused_in_a_line() -> None:
    class Bypassed(Tutorial):
        def forward(self, images: Tensor) -> Tensor:
            maps = F.relu(self.conv2(self.pool(F.relu(self.conv1(images)))))
            return self.fc(self.pool(maps).flatten(1)) + images.mean((1, 2, 3))[:, None]

    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^layer: got None, want .* \(layer: got 'conv2', which"):
        last_maps(Bypassed().eval(), images)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    with pytest.raises(ValueError, match=r"^layer: got None with a Sequential that runs no nn.Con"):
        last_maps(linear, images)


def test_looking_for_the_last_maps_leaves_no_hook() -> None:
    network = Tutorial().eval()
    last_maps(network, torch.randn(1, 3, 16, 16))
    assert not any(module._forward_hooks for module in network.modules())
