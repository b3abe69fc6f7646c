"""Trained weights from a file: every layout that is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picnn_fast import make_interpretable
from picnn_fast.backbones import cut, is_weights_file, small_resnet

State = dict[str, Tensor]


def trained(classes: int = 7) -> nn.Module:
    torch.manual_seed(5)
    network = small_resnet(3, classes)
    network(torch.randn(2, 3, 8, 8))  # the lazy classifier takes its shape
    return network


def prefixed(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state_dict": prefixed(state)},
        prefixed,
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
        lambda state: {k: v for k, v in state.items() if "classifier" not in k},
        lambda state: state | {"classifier.2.0.weight": torch.ones(3)},  # another classifier
    ],
)
def test_a_state_dict_is_loaded_but_for_the_classifier(
    wrap: Callable[[State], Any], tmp_path: Path
) -> None:
    network = trained()
    path = tmp_path / "weights.pth"
    torch.save(wrap(network.state_dict()), path)
    for weights in (path, str(path)):
        model = make_interpretable(
            "small-resnet", "std", num_classes=2, image_channels=3, weights=weights
        )
        own = {k: v for k, v in model.features[0].state_dict().items() if "num_b" not in k}
        wanted = {k: v for k, v in network.features.state_dict().items() if k in own}
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)
        assert model.head[-1].out_features == 2


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    network = trained()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    parts = cut("small-resnet", image_channels=3, weights=tmp_path / "weights.safetensors")
    torch.testing.assert_close(parts.features.state_dict(), network.features.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vit_b_16", "timm:test_vit"])
def test_those_of_torchvision_and_timm_are_read(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm" if name.startswith("timm") else "torchvision")
    if name.startswith("timm"):
        network = pytest.importorskip("timm").create_model("test_vit", num_classes=7)
    else:
        network = pytest.importorskip("torchvision").models.get_model(name, num_classes=7)
    large = ("classifier.0", "classifier.3")  # of VGG, left out for the test's sake
    state = {k: v for k, v in network.state_dict().items() if not k.startswith(large)}
    torch.save(state, tmp_path / "weights.pt")
    parts = cut(name, weights=tmp_path / "weights.pt")
    kept = {value.data_ptr(): value for value in parts.features.state_dict().values()}
    assert len(kept) > 10
    values = list(network.state_dict().values())
    for value in kept.values():
        assert any(v.shape == value.shape and torch.equal(v, value) for v in values)


def test_a_file_fits_the_network_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path = tmp_path / "weights.pth"
    torch.save(cut("resnet18", stem="cifar", image_channels=1).features.state_dict(), path)
    parts = cut("resnet18", stem="cifar", image_channels=1, weights=path)
    assert parts.features.conv1.weight.shape == (64, 1, 3, 3)
    with pytest.raises(ValueError, match=r"holds conv1.weight \(64, 1, 3, 3\), want \(64, 3, 7, 7"):
        cut("resnet18", weights=path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"got '.*weights.pth', want a file that is there$"),
        (b"text", r".*weights.pth cannot be read as tensors alone$"),
        (Harmful(), r".*weights.pth cannot be read as tensors alone$"),
        ([1], r".*weights.pth holds no state dict, want tensors by name$"),
        ({"epoch": 3}, r".*weights.pth holds no state dict, want tensors by name$"),
        (
            {"a": torch.ones(1)},
            r".*weights.pth lacks features.0.weight, features.1.weight, features.1.bias and \d+"
            r" more and holds a, want the state dict of this network$",
        ),
    ],
)
def test_what_is_no_state_dict_of_the_backbone_is_refused_in_a_line(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^weights: {message}") as caught:
        cut("small-resnet", weights=path)
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_a_file_is_told_from_a_name() -> None:
    for file in (Path("a"), "a.pth", "x/a", "a.pt", "b.safetensors"):
        assert is_weights_file(file)
    for name in (None, "DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", 3):
        assert not is_weights_file(name)
