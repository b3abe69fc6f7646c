"""Plain classifiers by name or by the function that makes them, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from picnn_fast.backbones import small_resnet
from picnn_fast.data import DATA, SeededDataModule
from picnn_fast.training.options import ConfigError
from picnn_fast.training.plain import data_defaults, plain_network

OWN = """
import torch
from torch import nn
from picnn_fast.backbones import small_resnet

def network():
    torch.manual_seed(7)
    return small_resnet(1, 10)

def colour():
    return small_resnet(3, 10)

def of_three_classes():
    return small_resnet(1, 3)

def halves():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Conv2d(1, 4, 3), head

def dictionary():
    return {}

def broken():
    raise KeyError("weights")

made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
number = 3
"""


@pytest.fixture
def data() -> SeededDataModule:
    return DATA["digits"]()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # what is put on the path is taken off
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / "wants_more.py").write_text("import no_such_package\n")
    (tmp_path / "half_written.py").write_text("def network(:\n")
    yield name
    for module in (name, "wants_more", "half_written"):
        sys.modules.pop(module, None)


def image(data: SeededDataModule) -> torch.Tensor:
    return data.test_set[0][0][None]


def test_a_function_of_the_users_own_makes_the_network(own: str, data: SeededDataModule) -> None:
    model = plain_network(f"{own}:network", data)
    torch.manual_seed(7)
    network = small_resnet(1, 10)
    assert (model.num_filters, model.num_classes) == (128, 10)
    assert torch.equal(model.features[0].weight, network.features[0].weight)
    assert plain_network(f"{own}:made", data).num_filters == 4
    assert plain_network(f"{own}:halves", data).num_filters == 4
    assert plain_network(f"{own}:network", data, layer="features.2").num_filters == 64


@pytest.mark.parametrize("made", ["network", "halves"])
def test_a_file_of_weights_is_loaded_into_what_the_function_makes(
    own: str, made: str, data: SeededDataModule, tmp_path: Path
) -> None:
    first = plain_network(f"{own}:{made}", data)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    whole = first.discriminator()
    if made == "network":
        # The names of the network itself, in which the head has another.
        names = dict(small_resnet(1, 10).named_children())
        whole = nn.Sequential()
        for name, part in zip(names, (first.features, first.head), strict=True):
            whole.add_module(name, part)
    state = whole.state_dict()
    wanted = first(image(data)).logits
    torch.save(state, tmp_path / "weights.pth")
    again = plain_network(f"{own}:{made}", data, weights="weights.pth")
    torch.testing.assert_close(again(image(data)).logits, wanted)


@pytest.mark.filterwarnings("ignore:features. yield maps 1 x 1")
def test_a_network_of_a_library_has_the_classes_of_the_data(data: SeededDataModule) -> None:
    pytest.importorskip("timm")
    model = plain_network("timm:test_resnet", data, weights="random", seed=1)
    assert (model.num_classes, type(model).__name__) == (10, "STD")
    other = plain_network("timm:test_resnet", data, weights="random", seed=1)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("no_such_module:f", {}, "there is no module 'no_such_module' in "),
        ("wants_more:f", {}, "importing wants_more fails: ModuleNotFoundError: No module named"),
        ("half_written:f", {}, "importing half_written fails: SyntaxError"),
        ("a b:c", {}, "model: got 'a b:c', want module:function"),
        ("{own}:networks", {}, "has no 'networks'; did you mean 'network'?"),
        ("{own}:number", {}, "is of type int, want a function that makes an nn.Module"),
        ("{own}:broken", {}, "() fails: KeyError: 'weights'"),
        ("{own}:dictionary", {}, "returned a dict, want an nn.Module"),
        ("{own}:of_three_classes", {}, "of 3 classes, want 10, those of the data (10: 0, 1, 2"),
        ("{own}:colour", {}, "cannot take images of 8 x 8 pixels and 1 channel"),
        ("{own}:network", {"weights": "DEFAULT"}, "weights: got 'DEFAULT' with "),
        ("{own}:network", {"weights": "no.pth"}, "weights: got 'no.pth', want a file that is"),
        ("{own}:network", {"layer": "conv"}, "layer: got 'conv',"),
        ("resnet18", {}, "data: got images of 1 channel with trained weights, want colour"),
        ("resnet_18", {"weights": "random"}, "model: got 'resnet_18', did you mean 'resnet18'?"),
        ("timm:no", {"weights": "random"}, "model: got 'timm:no', want a model of timm's"),
    ],
)
def test_what_is_no_network_for_the_data_is_refused_in_a_line(
    own: str, data: SeededDataModule, model: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plain_network(model.format(own=own), data, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_are_made_as_the_library_says_where_the_data_has_such_options() -> None:
    pytest.importorskip("timm")
    half = (0.5, 0.5, 0.5)
    told = data_defaults("timm:vit_base_patch16_224", "augreg_in21k_ft_in1k", "folder")
    assert told == {"image_size": 224, "resize": 248, "mean": half, "std": half}
    assert data_defaults("resnet50", None, "part-animals").keys() == {"image_size", "mean", "std"}
    assert data_defaults("resnet50", None, "digits") == {}
    assert data_defaults("own:network", None, "folder") == {}
