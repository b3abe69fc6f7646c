"""confusion_without against a loop over images, filters zeroed by hand."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from picnn_fast import make_interpretable
from picnn_fast.evaluation import confusion_without, removal_ownership

CLASSES, FILTERS = 3, 12


def _batches(count=20):
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 16, 16, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def _network(method):
    torch.manual_seed(1)
    network = make_interpretable("small-cnn", method, num_classes=CLASSES, num_filters=FILTERS)
    return network.eval()


@torch.no_grad()
def _confusion(network, batches, removed):
    """Image by image, by the maps with the removed filters' set to 0."""
    matrix = [[0] * CLASSES for _ in range(CLASSES)]
    for images, labels in batches:
        for image, label in zip(images, labels.tolist(), strict=True):
            maps = network.features(image[None]).clone()
            maps[:, removed] = 0
            matrix[label][network.head(maps)[0].argmax().item()] += 1
    return matrix


def test_filters_that_a_gate_gives_to_the_classes_are_removed():
    network, batches = _network("csg"), _batches()
    with torch.no_grad():
        network.gate.copy_(torch.rand(CLASSES, FILTERS))
    found = confusion_without(network, batches, [[1], [0, 2]])
    gate = network.gate / network.gate.amax(0)
    removed = torch.stack([gate[1] > 0.5, (gate[0] > 0.5) | (gate[2] > 0.5)])
    assert torch.equal(found.removed, removed)
    assert found.complete.tolist() == _confusion(network, batches, torch.zeros(12).bool())
    for matrix, filters in zip(found.without.tolist(), removed, strict=True):
        assert matrix == _confusion(network, batches, filters)


def test_of_an_ordinary_network_the_filters_that_the_classes_activate_most_are():
    network, batches = _network("std"), _batches()
    assert removal_ownership(network) is None
    assert torch.equal(removal_ownership(_network("picnn")), _network("picnn").ownership())
    found = confusion_without(network, batches, [[2]])
    images, labels = batches.dataset.tensors
    with torch.no_grad():
        pooled = network.filter_maps(images).mean((2, 3))
    top = pooled[labels == 2].mean(0).argmax()
    assert found.removed.nonzero().tolist() == [[0, top.item()]]
    assert found.without[0].tolist() == _confusion(network, batches, found.removed[0])


def test_an_explainers_ordinary_track_stays():
    torch.manual_seed(0)
    network = make_interpretable("small-vgg", "explainer", num_classes=CLASSES).eval()
    images, labels = torch.rand(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])
    found = confusion_without(network, [(images, labels)], [[0]])
    with torch.no_grad():
        maps, ordinary = network.encode(images)
        maps[:, found.removed[0]] = 0
        predicted = network.head_logits(maps, bypass=ordinary).argmax(1)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for label, given in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[label, given] += 1
    assert torch.equal(found.without[0], expected)


def test_classes_out_of_range_are_refused():
    for method in ("csg", "std"):
        with pytest.raises(ValueError, match=r"^classes: got 3"):
            confusion_without(_network(method), _batches(), [[3]])
