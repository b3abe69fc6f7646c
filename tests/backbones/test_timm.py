"""Networks of timm's by name."""

import sys

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.backbones import cut

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "side", "maps"),
    [
        ("convnext_tiny", 64, (38, 2, 2)),
        ("test_resnet", 64, (38, 2, 2)),
        ("test_efficientnet", 64, (38, 2, 2)),
        ("test_vit", 160, (101, 64)),
        ("swin_tiny_patch4_window7_224", 224, (7, 7, 768)),
        ("mixer_s16_224", 224, (196, 512)),
    ],
)
def test_a_name_is_enough_and_the_axis_of_the_filters_is_found(
    name: str, side: int, maps: tuple[int, ...]
) -> None:
    insert = maps[0] == 38
    model = make_interpretable(f"timm:{name}", num_classes=3, insert_conv=insert).to("meta")
    output = model(torch.empty(2, 3, side, side, device="meta"))
    assert output.maps.shape[1:] == maps
    assert maps[model.channel_dim - insert] == model.num_filters
    assert output.logits.shape == output.masked_logits.shape == (2, 3)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_a_step_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = make_interpretable(f"timm:{name}", num_classes=3, insert_conv=name != "test_vit")
    output = model(torch.randn(2, 3, 160, 160))
    model.loss(output, torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_its_parts_are_the_network(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    parts = cut(network)
    channels = parts.channels()
    head = parts.head(channels, channels, 5).eval()
    new, old = ([m for m in half.modules() if isinstance(m, nn.Linear)] for half in (head, network))
    new[-1].load_state_dict(old[-1].state_dict())
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(head(parts.features.eval()(images)), network(images))


def test_the_norm_before_the_classifier_takes_the_filters_of_the_target_layer() -> None:
    model = make_interpretable("timm:test_convnext", num_classes=3, num_filters=10)
    (norm,) = (m for m in model.head.modules() if isinstance(m, nn.LayerNorm))
    assert norm.weight.tolist() == [1] * 10
    maps = torch.randn(2, 10, 2, 2)
    vectors = nn.functional.layer_norm(maps.mean((2, 3)), (10,), eps=norm.eps)
    torch.testing.assert_close(model.head(maps), model.head[-1](vectors))


def test_images_of_other_channels_are_taken() -> None:
    model = make_interpretable("timm:test_resnet", num_classes=3, image_channels=1)
    assert model(torch.randn(2, 1, 64, 64)).logits.shape == (2, 3)


@pytest.mark.parametrize("weights", ["DEFAULT", "r160_in1k"])
def test_weights_are_asked_of_timm_by_name(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    cut("timm:test_resnet", weights=weights)
    assert asked == [("test_resnet" + f".{weights}" * (weights != "DEFAULT"), True)]

    def offline(*arguments: object, **options: object) -> nn.Module:
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=rf"^weights: got '{weights}', which cannot be had for 't"):
        cut("timm:test_resnet", weights=weights)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "timm:convnxt_tiny",
            {},
            r"backbone: got 'timm:convnxt_tiny', did you mean 'timm:convnext",
        ),
        ("timm:", {}, r"backbone: got 'timm:', want a model of timm's"),
        ("timm:test_vit.r160_in1k", {}, r"backbone: got 'timm:test_vit.r160_in1k', did you mean"),
        ("timm:test_resnet", {"weights": "r160"}, r"weights: got 'r160', did you mean 'r160_in1k'"),
        ("timm:test_resnet", {"stem": "cifar"}, r"stem: got 'cifar' with 'timm:test_resnet', want"),
        ("timm:test_vit", {}, r"insert_conv: got True, want False: maps of layer 'forward_featur"),
        (
            "timm:test_vit",
            {"method": "icnn", "insert_conv": False},
            r"backbone: got one whose maps of layer 'forward_features' have their channels last",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        make_interpretable(name, num_classes=3, **options)
    assert "\n" not in str(caught.value)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is not installed; .*pip install 'picnn_fast\[tim"):
        cut("timm:test_vit")
