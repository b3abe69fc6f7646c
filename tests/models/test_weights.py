"""filter_weights: the convolution that makes a network's maps."""

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.models import METHODS, STD, filter_weights


def _network(features, filters, **options):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 3))
    return STD(features, head, 3, filters, **options).eval()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"explainer"}))
def test_an_inserted_convolution_is_found_behind_whatever_a_method_adds(method):
    network = make_interpretable("small-cnn", method, num_classes=3, num_filters=7).eval()
    found = filter_weights(network, torch.zeros(1, 3, 16, 16))
    assert found.ndim == 2
    assert len(found) == 7
    convolution = [x for x in network.features.modules() if isinstance(x, nn.Conv2d)][-1]
    assert torch.equal(found, convolution.weight.detach().flatten(1))
    assert not found.requires_grad


def test_an_explainers_filters_are_those_of_its_interpretable_track():
    network = make_interpretable("small-vgg", "explainer", num_classes=3, num_filters=7).eval()
    found = filter_weights(network, torch.zeros(1, 3, 32, 32))
    owners = [x for x in network.track.values() if isinstance(x, nn.Conv2d)]
    assert any(torch.equal(found, x.weight.detach().flatten(1)) for x in owners)


def test_it_is_the_layer_that_runs_last_whatever_the_order_in_which_layers_were_made():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(4, 5, 1), nn.Conv2d(3, 4, 1)
            self.unused = nn.Conv2d(3, 5, 1)

        def forward(self, images):
            return self.second(self.first(images)).relu()

    features = Crossed()
    found = filter_weights(_network(features, 5), torch.zeros(1, 3, 8, 8))
    assert torch.equal(found, features.second.weight.detach().flatten(1))
    assert not features.second._forward_hooks


def test_a_linear_layer_makes_maps_of_tokens():
    features = nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    network = STD(features, head, 3, 6, channel_dim=-1).eval()
    assert filter_weights(network, torch.zeros(1, 3, 8, 8)).shape == (6, 64)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (nn.Identity(), "no convolution or linear layer makes the maps"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1), nn.PixelUnshuffle(2)), "6 filters"),
        (nn.Conv2d(3, 24, 1, groups=3), "the last convolution has 3 groups, want 1"),
    ],
)
def test_maps_that_no_convolution_makes_are_refused_with_the_reason(features, message):
    filters = features(torch.zeros(1, 3, 8, 8)).shape[1]
    with pytest.raises(ValueError, match=f"^features: .*{message}"):
        filter_weights(_network(features, filters), torch.zeros(1, 3, 8, 8))
