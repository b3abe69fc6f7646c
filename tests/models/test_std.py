"""The baseline: an ordinary network that can be measured like an interpretable one."""

import copy

import pytest
import torch
from torch import nn

from picnn_fast.backbones import cifar_resnet, small_cnn
from picnn_fast.models import PICNN, STD, as_std

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


class Scores(nn.Module):
    """A user's own network, with functions in the place of layers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.relu(self.conv1(images), inplace=True)
        maps = nn.functional.relu(self.norm(self.conv2(maps)), inplace=True)
        vectors = nn.functional.dropout(maps.mean((2, 3)), 0.5, self.training)
        return self.fc(vectors)


def trained(network: nn.Module) -> nn.Module:
    """With statistics of its batch norms that are not those of a new network."""
    torch.manual_seed(3)
    network(torch.randn(8, 3, 32, 32))
    return network


@pytest.mark.parametrize(
    ("build", "filters", "layer"),
    [
        (Scores, 6, "relu_1"),
        (lambda: cifar_resnet(20, 3, 5), 64, "features"),
        (lambda: small_cnn(3, 5), 96, "features"),
    ],
)
def test_a_plain_network_keeps_its_logits_its_weights_and_its_layers(build, filters, layer) -> None:
    torch.manual_seed(0)
    network = trained(build())
    before = copy.deepcopy(network).eval()
    shown = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = as_std(network, shown[:1], num_classes=5)
    assert isinstance(model, STD)
    assert (model.num_filters, model.num_classes, model.layer) == (filters, 5, layer)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(shown).logits, before(shown))
        torch.testing.assert_close(model.discriminator()(shown), before(shown))
        assert (model.filter_maps(shown) >= 0).all()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    own = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == own


def test_a_layer_by_name_and_a_pair_are_measured_too() -> None:
    torch.manual_seed(0)
    network, shown = Scores(), torch.randn(2, 3, 16, 16)
    model = as_std(network, shown, layer="conv1")
    torch.testing.assert_close(model(shown).maps, network.conv1(shown))
    torch.testing.assert_close(model(shown).logits, network(shown))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = as_std((network.conv1, head), shown)
    torch.testing.assert_close(model(shown).logits, head(network.conv1(shown)))
    assert not head.training


def test_tokens_of_a_transformer_have_their_filters_last() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=4).eval()
    shown = torch.randn(2, 3, 160, 160)
    model = as_std(network, shown)
    assert (model.channel_dim, model.num_filters) == (-1, 64)
    torch.testing.assert_close(model(shown).logits, network(shown))


def test_the_matrix_of_a_plain_network_is_random_and_follows_from_the_seed() -> None:
    network, shown = Scores(), images()

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return as_std(network, shown).ownership()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.testing.assert_close(drawn(1).sum(0), torch.ones(6))


def test_what_is_no_plain_classifier_is_refused_in_a_line() -> None:
    class Tuple(Scores):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, :, None]

    class Noisy(Scores):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.norm(self.conv2(self.conv1(images)))
            return self.fc(maps.mean((2, 3)) + torch.randn(()))

    shown = images()
    model = build(STD)
    pair = (nn.Conv2d(3, 4, 3), nn.Flatten())
    cases = [
        ((3, shown), {}, TypeError, r"^network: got int, want a torch.nn.Module$"),
        ((Scores(), shown), {"num_classes": 7}, ValueError, r"^num_classes: got 7, want 5, those"),
        ((Scores(), shown), {"layer": "conv3"}, ValueError, r"^layer: got 'conv3', did you mean"),
        ((Tuple(), shown), {}, ValueError, r"^network: yielded \(4, 5, 1\), want logits \[B, K\]$"),
        ((Noisy(), shown), {}, ValueError, r"^network: cut in two it yields logits that differ by"),
        ((model, shown), {}, ValueError, r"^network: yielded STDOutput, want logits \[B, K\]$"),
        ((pair, shown), {"layer": "0"}, ValueError, r"^layer: got '0' with a pair"),
        (((nn.ReLU(), 3), shown), {}, TypeError, r"^head: got int"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            as_std(*arguments, **options)
