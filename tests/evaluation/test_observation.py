"""What figures see of a batch: the pathways, pooled maps, and draws of their own."""

import pytest
import torch
from torch import nn

from picnn_fast.evaluation import Observation, pool
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.models.masked_head import MaskedHead


def _network(method="picnn"):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return make_interpretable(
        (features, head), method, num_classes=3, num_filters=6, insert_conv=False
    ).eval()


@torch.no_grad()
def test_pathways_use_the_filters_their_names_say():
    network = _network()
    labels = torch.tensor([0, 1, 2])
    # Each class owns two filters for certain, and the classifier is certain of the label.
    own = torch.eye(3).repeat_interleave(2, 1)
    with torch.no_grad():
        network.correspondence.weight.copy_(200 * own)
        network.head[2].weight.copy_(50 * own)
        network.head[2].bias.zero_()
    network.features = nn.Identity()
    maps = own[labels][:, :, None, None].expand(3, 6, 4, 4)
    seen = Observation(network, maps, labels, seed=0, draws=2)
    expected = 100 * torch.eye(3)
    torch.testing.assert_close(seen.logits, expected)
    torch.testing.assert_close(seen.masked_logits, expected.expand(2, 3, 3))
    torch.testing.assert_close(seen.complement_logits, torch.zeros(2, 3, 3))


@torch.no_grad()
def test_draws_follow_from_the_seed_and_differ_from_one_another():
    network = _network()
    images, labels = torch.rand(16, 1, 4, 4), torch.arange(16) % 3
    before = torch.get_rng_state()
    first, again, other = (
        Observation(network, images, labels, seed=seed, draws=2) for seed in (1, 1, 2)
    )
    for name in ("masked_logits", "complement_logits"):
        a, b, c = (getattr(seen, name) for seen in (first, again, other))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not torch.equal(a[0], a[1])
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_features_run_once_however_many_figures_look():
    network, calls = _network(), []
    network.features.register_forward_hook(lambda *arguments: calls.append(1))
    seen = Observation(network, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), seed=0)
    owned = ("masked_logits", "complement_logits") if network.ownership() is not None else ()
    for name in ("logits", "pooled", "maps", *owned):
        getattr(seen, name)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_a_half_type_are_averaged_in_single_precision(dtype):
    maps = torch.rand(4, 5, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(pool(maps, 1), maps.float().mean((2, 3)))
    torch.testing.assert_close(pool(maps.movedim(1, -1), -1), maps.float().mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.SiLU, nn.Hardswish, nn.ELU])
def test_pathways_of_a_head_that_writes_in_place_are_those_of_one_that_does_not(method, kind):
    images, labels = torch.rand(6, 1, 4, 4) - 0.5, torch.arange(6) % 3
    seen = []
    for inplace in (True, False):
        network = _network(method)
        if network.encode(images)[1] is not None:
            pytest.skip("its head is one of its own")
        network.features = network.features[:-1]  # maps of both signs
        network.head = nn.Sequential(kind(inplace=inplace), *network.head)
        network.masked_head = MaskedHead(network.head, 3, 6)
        seen.append(Observation(network, images, labels, seed=0, draws=2))
    for name in ("logits", "masked_logits", "complement_logits", "pooled", "maps"):
        torch.testing.assert_close(*(getattr(each, name) for each in seen))
