"""What every row of BACKBONES owes, and torchvision's networks, changed ones included."""

from functools import partial

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.backbones import BACKBONES, Row, cut, small_resnet

torchvision = pytest.importorskip("torchvision")


def on_meta(name: object, method: str = "std", **options: object) -> nn.Module:
    """A model whose weights are not drawn, for shapes alone."""
    with torch.device("meta"):
        return make_interpretable(name, method, **({"num_classes": 3} | options))


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_filters_and_classes_and_pools_before_its_classifier(
    name: str, image_channels: int
) -> None:
    if name == "vit_b_16":
        model = on_meta(name, insert_conv=False, image_channels=image_channels)
        maps = model.features(torch.empty(2, image_channels, 224, 224, device="meta"))
        assert maps.shape == (2, 197, 768)
        assert maps.shape[model.channel_dim] == model.num_filters
        assert model.head(maps).shape == (2, 3)
        return
    model = on_meta(name, num_filters=10, image_channels=image_channels)
    assert model.masked_head.late
    maps = model.features(torch.empty(2, image_channels, 96, 96, device="meta"))
    assert maps.shape[:2] == (2, 10)
    assert min(maps.shape[2:]) > 1
    assert model.head(maps).shape == (2, 3)
    assert all(isinstance(layer, nn.Linear) for layer in model.head if [*layer.parameters()])


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 512), ("resnet50", 2048), ("vgg11", 512), ("densenet121", 1024)],
)
def test_networks_of_torchvision_are_cut_after_a_relu_and_keep_their_layers(
    name: str, channels: int
) -> None:
    torch.manual_seed(0)
    network = BACKBONES[name].build().eval()
    parts = cut(network)
    assert parts.channels() == channels
    images = torch.randn(2, 3, 64, 64)
    head = parts.head(channels, channels, 1000)
    with torch.no_grad():
        maps = parts.features.eval()(images)
        assert maps.min() == 0
        old, new = (
            [m for m in half.modules() if isinstance(m, nn.Linear)] for half in (network, head)
        )
        for one, other in zip(new, old, strict=True):
            one.weight, one.bias = other.weight, other.bias
        torch.testing.assert_close(head.eval()(maps), network(images))
    own = set(network.parameters())
    assert all(parameter in own for parameter in parts.features.parameters())


def keys(name: str) -> dict[str, tuple[int, ...]]:
    """Of the features and the head of a model without an inserted convolution."""
    state = on_meta(name, "picnn", insert_conv=False).state_dict()
    assert state.pop("correspondence.weight").ndim == 2
    return {key: tuple(value.shape) for key, value in state.items()}


def test_checkpoints_keep_loading_their_keys_are_those_of_the_features_children() -> None:
    with torch.device("meta"):
        resnet18, vgg16 = torchvision.models.resnet18(), torchvision.models.vgg16()
    shapes = {f"features.{key}": tuple(value.shape) for key, value in resnet18.state_dict().items()}
    del shapes["features.fc.weight"], shapes["features.fc.bias"]
    assert keys("resnet18") == shapes | {"head.2.weight": (3, 512), "head.2.bias": (3,)}
    shapes = {key: tuple(value.shape) for key, value in vgg16.features.state_dict().items()}
    sizes = {3: (4096, 25088), 6: (4096, 4096), 9: (3, 4096)}
    head = {f"head.{layer}.weight": size for layer, size in sizes.items()}
    head |= {f"head.{layer}.bias": size[:1] for layer, size in sizes.items()}
    assert keys("vgg16") == {f"features.{key}": shape for key, shape in shapes.items()} | head
    weights = {key: shape for key, shape in keys("small-resnet").items() if len(shape) > 1}
    assert weights == {
        "features.0.weight": (64, 1, 3, 3),
        "features.3.residual.0.weight": (64, 64, 3, 3),
        "features.3.residual.3.weight": (64, 64, 3, 3),
        "features.4.residual.0.weight": (128, 64, 3, 3),
        "features.4.residual.3.weight": (128, 128, 3, 3),
        "features.4.shortcut.0.weight": (128, 64, 1, 1),
        "head.2.weight": (3, 128),
    }
    for name, convolutions in (("vgg-m", (0, 4, 8, 10, 12)), ("vgg-s", (0, 4, 7, 9, 11))):
        weights = {key for key in keys(name) if key.endswith("weight")}
        wanted = [f"features.{layer}.weight" for layer in convolutions]
        assert weights == {*wanted, "head.3.weight", "head.6.weight", "head.9.weight"}


def test_a_seed_draws_features_and_then_the_new_classifier() -> None:
    torch.manual_seed(0)
    features, linear = small_resnet().features, nn.Linear(128, 3)
    torch.manual_seed(0)
    model = make_interpretable("small-resnet", num_classes=3, insert_conv=False)
    for one, other in ((model.features, features), (model.head[2], linear)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_row_is_all_it_takes_to_add_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(image_channels: int = 3) -> nn.Module:
        features = nn.Conv2d(image_channels, 6, 3), nn.ReLU()
        return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

    monkeypatch.setitem(BACKBONES, "plain", Row(plain, "1"))
    model = make_interpretable("plain", num_classes=4, image_channels=2)
    assert model(torch.randn(2, 2, 8, 8)).logits.shape == (2, 4)


def changed(name: str, **modules: nn.Module) -> nn.Module:
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    for child, module in modules.items():
        setattr(network, child, module.to("meta"))
    return network


resnet, alexnet, vgg = (partial(changed, name) for name in ("resnet18", "alexnet", "vgg11"))


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (resnet(), [20]),
        (resnet(fc=nn.Identity()), [20]),
        (resnet(fc=nn.Linear(512, 5)), [20]),
        (resnet(fc=nn.Sequential(nn.Dropout(), nn.Linear(512, 9), nn.Linear(9, 5))), [20, 9]),
        (resnet(avgpool=nn.Identity(), fc=nn.Linear(512 * 4, 5)), [80]),
        (alexnet(), [20 * 36, 4096, 4096]),
        (alexnet(classifier=nn.Sequential(nn.Linear(9216, 7), nn.Linear(7, 5))), [20 * 36, 7]),
        (alexnet(avgpool=nn.Identity()), [20 * 36, 4096, 4096]),
        (vgg(classifier=nn.Identity()), [20 * 49]),
        (vgg(classifier=nn.Linear(512 * 49, 5)), [20 * 49]),
        (vgg(avgpool=nn.Identity(), classifier=nn.Linear(512 * 4, 5)), [80]),
        (vgg(avgpool=nn.AdaptiveAvgPool2d(1), classifier=nn.Linear(512, 5)), [20]),
    ],
)
def test_changed_classifiers_are_made_anew(network: nn.Module, inputs: list[int]) -> None:
    model = on_meta(network, num_filters=20)
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == inputs
    unpooled = isinstance(network, torchvision.models.AlexNet) and inputs[0] == 20 * 36
    images = torch.empty(2, 3, *((224, 224) if unpooled else (64, 64)), device="meta")
    assert model(images).logits.shape == (2, 3)


def test_the_networks_of_the_papers_are_there() -> None:
    deeper = {f"resnet{depth}" for depth in (18, 34, 50, 152, 20, 56)} | {"wide_resnet50_2"}
    vgg = {f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")}
    others = "alexnet densenet121 densenet161 mobilenet_v2 efficientnet_b0 vit_b_16 vgg-m vgg-s"
    assert deeper | vgg | {*others.split()} <= BACKBONES.keys()


def test_tokens_have_their_filters_last_and_the_head_looks_at_the_class_token() -> None:
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16)
    nn.init.normal_(network.heads.head.weight)  # 0 at first
    parts = cut(network.eval())
    assert (parts.channel_dim(), parts.channels()) == (-1, 8)
    head = parts.head(8, 8, 1000)
    (linear,) = (m for m in head.modules() if isinstance(m, nn.Linear))
    linear.load_state_dict(network.heads.head.state_dict())
    images = torch.randn(2, 3, 32, 32)
    maps = parts.features(images)
    assert maps.shape == (2, 5, 8)
    torch.testing.assert_close(head(maps), network(images))
    torch.testing.assert_close(head(maps[:, :1]), network(images))
    with pytest.raises(AssertionError, match="Wrong image height"):
        parts.features(torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize(
    ("name", "maps"),
    [("resnet18", (512, 4, 4)), ("densenet121", (1024, 4, 4)), ("vgg11", (512, 4, 4)),
     ("alexnet", (256, 15, 15)), ("mobilenet_v2", (1280, 2, 2)), ("vgg-m", (512, 7, 7))],
)  # fmt: skip
def test_a_stem_for_cifar_keeps_small_images_large(name: str, maps: tuple[int, ...]) -> None:
    model = on_meta(name, insert_conv=False, stem="cifar")
    images = torch.empty(2, 3, 32, 32, device="meta")
    assert model.features(images).shape[1:] == maps
    assert model.head(model.features(images)).shape == (2, 3)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    usual = on_meta(name, insert_conv=False).state_dict()
    assert model.state_dict().keys() == usual.keys()


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnet20", {"stem": "cifar"}, r"stem: got 'cifar', want 'default': 'resnet20' takes sm"),
        ("vit_b_16", {"stem": "cifar"}, r"stem: got 'cifar', want 'default': 'vit_b_16' starts w"),
        ("resnet18", {"stem": "cifr"}, r"stem: got 'cifr', want one of 'default', 'cifar'; did"),
        (resnet(), {"stem": "cifar"}, r"stem: got 'cifar' with a backbone that is already"),
        ("vit_b_16", {}, r"insert_conv: got True, want False: maps of layer 'encoder' have their"),
        (resnet(avgpool=nn.Identity()), {}, r"backbone: got maps of layer 'layer4' that nothing"),
        (vgg(avgpool=nn.Identity(), classifier=nn.Identity()), {}, r"backbone: got maps of layer"),
        (
            resnet(fc=nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 5))),
            {},
            r"num_filters: got 38, want 512: what follows layer 'layer4' takes no other",
        ),
        (resnet(), {"layer": "layr4"}, r"layer: got 'layr4', did you mean 'layer4'\? want"),
        (resnet(), {"layer": "layer4.1.conv1"}, r"layer: got 'layer4.1.conv1', which 'add' gets"),
        (resnet(), {"layer": "layer3"}, r"num_filters: got 38, want 256: what follows layer 'lay"),
        (resnet(), {"image_channels": 3}, r"image_channels: got 3 with a backbone that is already"),
        (
            "resnet81",
            {},
            r"backbone: got 'resnet81', did you mean 'resnet18'\? want one of 'small-",
        ),
        ("resnet18", {"weights": "IMAGENET"}, r"weights: got 'IMAGENET', did you mean 'IMAGENET1K"),
        ("vgg11", {"weights": 1}, r"weights: got 1, want one of 'IMAGENET1K_V1', 'DEFAULT'"),
        (
            "resnet18",
            {"weights": "DEFAULT", "image_channels": 1},
            r"image_channels: got 1 with wei",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(
    backbone: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        on_meta(backbone, "picnn", **options)
    assert "\n" not in str(caught.value)
