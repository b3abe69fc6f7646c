"""Folders of ``save_pretrained``: what the protocol's test does not reach."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import picnn_fast
from picnn_fast import PartTemplate
from picnn_fast.models import CSG, ICNN, PICNN, InterpretableNetwork, make_interpretable
from picnn_fast.models.pretrained import CARD, WEIGHTS


class Tied(nn.Module):
    """Two convolutions of one weight, whose memory is a part of a larger one's, with gaps."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.one.weight = self.two.weight = nn.Parameter(torch.randn(3, 3, 3, 6)[..., ::2])
        self.act, self.fc = nn.ReLU(), nn.Linear(3, 2)

    def forward(self, images):
        return self.fc(self.act(self.two(self.one(images))).mean((2, 3)))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = make_interpretable("small-cnn", "picnn", num_classes=2, num_filters=6)
    network.save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, **values}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tied_weights_stay_tied_and_keep_values_type_and_no_gaps(tmp_path, dtype):
    options = {"method": "picnn", "num_classes": 2, "layer": "act", "num_filters": 4}
    network = make_interpretable(Tied(), **options).to(dtype)
    network = network.to(memory_format=torch.channels_last)
    network.save_pretrained(tmp_path)
    loaded = PICNN.from_pretrained(tmp_path, backbone=Tied())
    state = loaded.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype, name
    layers = dict(loaded.named_modules())
    one, two = (next(m for n, m in layers.items() if n.endswith(end)) for end in (".one", ".two"))
    assert one.weight is two.weight
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert set(file.keys()) == state.keys()
        assert file.metadata() == {"format": "pt"}


def test_a_backbone_that_no_name_tells_is_asked_for_and_no_other_is_taken(tmp_path, saved):
    network = make_interpretable(Tied(), "std", num_classes=2, layer="act", num_filters=4)
    network.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"^backbone: got None, want the module.*backbone=module"):
        InterpretableNetwork.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"^backbone: got one, want None: .* tells 'small-cnn'"):
        InterpretableNetwork.from_pretrained(saved, backbone=Tied())
    other = nn.Sequential(Tied())
    with pytest.raises(ValueError, match="does not build the network saved: layer: got 'act'") as e:
        InterpretableNetwork.from_pretrained(tmp_path / "own", backbone=other)
    assert "\n" not in str(e.value)


def test_an_explainer_takes_the_network_that_it_explains_along(tmp_path):
    performer = make_interpretable(
        "small-vgg", "std", num_classes=2, insert_conv=False, image_channels=3
    )
    template = PartTemplate("l2", beta=3.0)
    network = make_interpretable(performer, "explainer", num_classes=2, template=template)
    network.save_pretrained(tmp_path)
    loaded = InterpretableNetwork.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    card = json.loads((tmp_path / CARD).read_text())
    assert card["backbone"]["backbone"] == "small-vgg"
    assert card["options"]["template"]["beta"] == 3.0
    assert repr(loaded.template) == repr(template)
    with pytest.raises(ValueError, match=r"got one, want None: .* tells the network that is expl"):
        InterpretableNetwork.from_pretrained(tmp_path, backbone=performer)


def test_a_class_loads_its_own_method_alone(saved):
    assert type(PICNN.from_pretrained(saved)) is PICNN
    with pytest.raises(ValueError, match=r"config\.json is of method 'picnn', want one of csg$"):
        CSG.from_pretrained(saved)
    change(saved, method="groups")
    with pytest.raises(ValueError, match="is of method 'groups', want one of std, picnn, csg"):
        InterpretableNetwork.from_pretrained(saved)


def test_what_cannot_be_loaded_is_told_in_a_line(saved, tmp_path):
    card = (saved / CARD).read_text()
    change(saved, format=7, versions={"picnn_fast": "3.1.0"})
    with pytest.raises(
        ValueError, match=rf"format 7, of picnn_fast 3\.1\.0, .* this picnn_fast {_version()}, "
    ):
        PICNN.from_pretrained(saved)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", r"is none of picnn_fast's"),
        ('{"model_type": "bert"}', r"is none of picnn_fast's"),
        (
            '{"library": "picnn_fast", "format": 1}',
            "is damaged, it tells no method and no backbone",
        ),
        (
            card.replace('"inserted_activation"', '"x"').replace(
                '"options": {', '"options": {"x": 1'
            ),
            "x: method 'picnn' has no",
        ),
    ):
        (saved / CARD).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            PICNN.from_pretrained(saved)
        assert "\n" not in str(caught.value)
    (saved / CARD).write_text(card)
    weights = bytearray((saved / WEIGHTS).read_bytes())
    weights[len(weights) // 2] ^= 1
    (saved / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=r"weights: .*model\.safetensors is damaged, or not"):
        PICNN.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors; want one of save"):
        PICNN.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; want one of save_pretr"):
        PICNN.from_pretrained("someone/picnn-resnet18")


def _version():
    return picnn_fast.__version__


def test_options_that_are_numpy_s_are_kept_as_python_s(tmp_path):
    network = make_interpretable(
        "small-cnn",
        "iccnn",
        num_classes=2,
        num_filters=np.int32(6),
        groups=np.int64(3),
        published_mean=np.bool_(True),
        correlation_weight=np.float32(0.5),
    )
    network.save_pretrained(tmp_path)
    loaded = InterpretableNetwork.from_pretrained(tmp_path)
    assert loaded.published_mean is True
    assert loaded.correlation_weight == 0.5
    assert json.loads((tmp_path / CARD).read_text())["options"]["published_mean"] is True


def test_what_a_card_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    template = PartTemplate(profile=lambda distance: -distance)
    network = make_interpretable(
        "small-cnn", "icnn", num_classes=2, insert_conv=False, template=template
    )
    folder = tmp_path / "x"
    with pytest.raises(ValueError, match=r"^recipe\.options\.template\.profile: got a function"):
        network.save_pretrained(folder)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="network: got a ICNN that was put together by hand"):
        ICNN(features, head, 2, 6).save_pretrained(folder)
    network = make_interpretable("small-cnn", "icnn", num_classes=2, insert_conv=False)
    with pytest.raises(ValueError, match="class_names: got 3, want 2, one a class"):
        network.save_pretrained(folder, class_names=["a", "b", "c"])
    assert not folder.exists()
