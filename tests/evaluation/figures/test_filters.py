"""Figures of what filters do: cosines, similarity to the gate, removal, attacks."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from picnn_fast.data import DATA, Batches, SeededDataModule
from picnn_fast.evaluation import adversarial_detection, confusion_without, evaluate
from picnn_fast.metrics import (
    GateSimilarity,
    InterClassCorrelation,
    filter_cosines,
    filter_redundancy,
)
from picnn_fast.models import STD, InterpretableNetwork, filter_weights, make_interpretable

NAMES = [
    "filter_redundancy",
    "inter_class_correlation",
    "s_tp",
    "s_fn",
    "removed_class",
    "removed_others",
]
DETECTION = ["detection_fgsm", "attack_fgsm"]


@pytest.fixture(scope="module")
def digits():
    return DATA["digits"](batch_size=100)


def _network(method, **options):
    torch.manual_seed(0)
    network = make_interpretable(
        "small-resnet", method, num_classes=10, num_filters=30, image_channels=1, **options
    )
    if method == "csg":
        with torch.no_grad():
            network.gate.copy_(torch.rand(10, 30))
    return network.eval()


@torch.no_grad()
def _seen(network, data):
    images, labels = data.test_set.tensors
    maps = network.filter_maps(images)
    return images, labels, maps.mean((2, 3)), network.head_logits(maps)


def test_cosines_are_of_the_target_layers_weights_and_groups_of_the_test_images(digits):
    network = _network("csg")
    values = evaluate(network, digits, figures=NAMES)
    images, labels, pooled, logits = _seen(network, digits)
    cosines = filter_cosines(filter_weights(network, images[:1]))
    assert values["filter_redundancy"] == pytest.approx(filter_redundancy(cosines).item())
    correlation = InterClassCorrelation(cosines, 10, 3)
    correlation.update(pooled, labels)
    expected = correlation.compute().item()
    assert values["inter_class_correlation"] == pytest.approx(expected, abs=1e-6)
    similarity = GateSimilarity(network.gate / network.gate.amax(0))
    similarity.update(pooled, logits, labels)
    expected = [value.item() for value in similarity.compute()]
    assert [values["s_tp"], values["s_fn"]] == pytest.approx(expected, abs=1e-5)


def test_a_fixed_gate_says_how_many_filters_are_a_classs_own(digits):
    network = _network("csg", fixed=(2, 10))
    images, labels, pooled, _ = _seen(network, digits)
    correlation = InterClassCorrelation(filter_cosines(filter_weights(network, images[:1])), 10, 2)
    correlation.update(pooled, labels)
    values = evaluate(network, digits, figures=["inter_class_correlation"])
    expected = correlation.compute().item()
    assert values["inter_class_correlation"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["csg", "std"])
def test_removal_is_read_off_the_confusion_matrices_of_one_class_after_another(method, digits):
    network = _network(method).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for images, labels in digits.train_dataloader():  # so that classes activate different filters
        network.loss(network(images, labels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    found = confusion_without(network, Batches(digits), [[c] for c in range(10)])
    own = [(m[c, c] / m[c].sum()).item() for c, m in enumerate(found.without)]
    others = []
    for c, matrix in enumerate(found.without):
        rest = [k for k in range(10) if k != c]
        others.append((matrix.diagonal()[rest].sum() / matrix[rest].sum()).item())
    values = evaluate(network, digits, figures=["removed_class", "removed_others"])
    assert values["removed_class"] == pytest.approx(sum(own) / 10, abs=1e-6)
    assert values["removed_others"] == pytest.approx(sum(others) / 10, abs=1e-6)
    assert len({tuple(m.flatten().tolist()) for m in found.without}) > 1


def test_only_filters_that_are_no_classs_take_a_pass_of_their_own(digits, monkeypatch):
    passes = []
    loader = digits.test_dataloader
    monkeypatch.setattr(digits, "test_dataloader", lambda: passes.append(0) or loader())
    for method, wanted in (("csg", 1), ("std", 2)):
        passes.clear()
        evaluate(_network(method), digits, figures=["removed_class"])
        assert len(passes) == wanted


def test_what_a_network_lacks_is_not_available_with_the_reason(digits, monkeypatch):
    features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelUnshuffle(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    values = evaluate(STD(features, head, 10, 16), digits, figures=[*NAMES, *DETECTION])
    reason = "n/a: the last convolution has 4 filters, want 16, as the maps"
    assert [values[name] for name in NAMES[:2]] == [reason] * 2
    assert values["detection_fgsm"] == "n/a: the test split has 360 images, want at least 500"
    network = _network("picnn")
    monkeypatch.setattr(type(network), "ownership", InterpretableNetwork.ownership)
    values = evaluate(network, digits, figures=["s_tp", "removed_class"])
    assert values["s_tp"] == "n/a: PICNN gives no filter to a class"
    assert isinstance(values["removed_class"], float)  # without the filters it activates most


class _Noise(SeededDataModule):
    """Images of noise, and labels that a network gives them."""

    num_classes, in_channels, class_names = 3, 3, ["a", "b", "c"]

    def __init__(self, network):
        super().__init__(200, 0, 0)
        self.mean, self.std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
        draw = torch.Generator().manual_seed(0)
        images = (torch.rand(800, 3, 16, 16, generator=draw) - self.mean) / self.std
        with torch.no_grad():
            labels = network.head_logits(network.filter_maps(images)).argmax(1)
        self.train_set = self.test_set = TensorDataset(images, labels)


def test_detection_is_that_of_the_library_over_the_test_images():
    pytest.importorskip("art")
    torch.manual_seed(0)
    # All but linear in many pixels: small steps along the gradient reach any class.
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    network = STD(nn.Conv2d(3, 5, 15), head, 3, 5).eval()
    data = _Noise(network)
    values = evaluate(network, data, figures=DETECTION)
    found = adversarial_detection(
        network,
        *data.test_set.tensors,
        attack="fgsm",
        mean=data.mean,
        std=data.std,
        batch_size=data.batch_size,
    )
    assert found.used >= 500
    assert found.accuracy == 1
    assert values["detection_fgsm"] == pytest.approx(found.errors[0].mean().item())
    error = (found.errors[0].std() / 5**0.5).item()
    assert values["detection_fgsm_standard_error"] == pytest.approx(error)
    assert values["attack_fgsm"] == found.success.item() > 0.6
