"""Attacks against plain loops, and detection of them from the features of every convolution."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from picnn_fast import make_interpretable
from picnn_fast.evaluation import Attack, adversarial_detection, convolution_means
from picnn_fast.models import STD

pytest.importorskip("art")

CLASSES = 4
MEAN, SCALE = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4])
STD_ = SCALE.view(3, 1, 1)


def _network():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 6, 3), nn.Softplus())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES))
    return STD(features, head, CLASSES, 6).eval()


def _images(count=10):
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 8, 8, generator=draw)
    # Some at the ends of the range, beyond which no attack may go.
    images = ((images - 0.5) * 1.5 + 0.5).clamp(0, 1)
    return (images - MEAN) / STD_, torch.arange(count) % CLASSES


def _targets(count, seed):
    """Any class but the label, each as likely."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.arange(count) + torch.randint(1, CLASSES, (count,), generator=draw)) % CLASSES


def _steps(network, images, targets, size, steps):
    """Steps down the loss of the targets, by sign, within 8/255 of the pixels and [0, 1]."""
    start = images * STD_ + MEAN
    pixels = start.clone()
    for _ in range(steps):
        pixels.requires_grad_()
        logits = network.head(network.features((pixels - MEAN) / STD_))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets), pixels)
        pixels = (pixels.detach() - size * gradient.sign()).clamp(0, 1)
        pixels = start + (pixels - start).clamp(-8 / 255, 8 / 255)
    return (pixels - MEAN) / STD_


@pytest.mark.parametrize(("name", "size", "steps"), [("fgsm", 8 / 255, 1), ("pgd", 2 / 255, 40)])
def test_an_attack_by_sign_equals_a_plain_loop(name, size, steps):
    network, (images, labels) = _network(), _images()
    attacked = Attack(network, name, mean=MEAN, std=STD_)(images, labels, seed=3)
    expected = _steps(network, images, _targets(len(labels), 3) % CLASSES, size, steps)
    moved = (attacked - images) * STD_
    assert moved.abs().max() <= 8 / 255 + 1e-6
    # Near 0 the sign of a gradient hangs on rounding.
    close = (attacked - expected).abs() * STD_ < 1e-5
    assert close.double().mean() > 0.99
    assert (moved.abs() > 1e-3).double().mean() > 0.5


def test_the_attack_of_carlini_and_wagner_reaches_its_targets_by_little():
    network, (images, labels) = _network(), _images(6)
    with torch.no_grad():  # logits that tell the images apart by much
        network.head[2].weight *= 100
        maps = network.filter_maps(images)
        network.head[2].bias -= network.head(maps).mean(0)
    attack = Attack(network, "cw", mean=MEAN, std=STD_)
    attacked = attack(images, labels, seed=3)
    pixels = attacked * STD_ + MEAN
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    targets = _targets(6, 3)
    with torch.no_grad():
        after = network.head_logits(network.filter_maps(attacked)).argmax(1)
        before = network.head_logits(network.filter_maps(images)).argmax(1)
    assert (after == targets).sum() > (before == targets).sum()
    # What does not reach its target is left as it was.
    moved = (attacked - images).abs().flatten(1).amax(1) > 1e-4
    assert not (moved & (after != targets)).any()


def test_the_network_and_its_gradients_are_left_alone_also_where_none_are_recorded():
    network, (images, labels) = _network(), _images(4)
    network.train()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        Attack(network, "fgsm", mean=MEAN, std=STD_)(images, labels)
    assert network.training
    assert all((p.grad == 2).all() for p in network.parameters())
    assert all(p.requires_grad for p in network.features.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_features_are_the_means_of_the_maps_of_every_convolution():
    network, (images, _) = _network(), _images(3)
    found, logits = convolution_means(network, images)
    with torch.no_grad():
        first = network.features[0](images)
        second = network.features[2](network.features[1](first))
        expected = torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1)
        assert torch.equal(logits, network.head(network.features[3](second)))
    torch.testing.assert_close(found, expected)
    assert not network.features[0]._forward_hooks


@pytest.mark.parametrize("method", ["picnn", "icnn", "csg", "explainer"])
def test_every_method_can_be_attacked(method):
    torch.manual_seed(0)
    network = make_interpretable("small-vgg", method, num_classes=2)
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    found = adversarial_detection(
        network, images, labels, attack="fgsm", samples=[2], seeds=2, all_attacked=True
    )
    assert found.errors.shape == (1, 2)
    assert ((found.errors >= 0) & (found.errors <= 1)).all()
    assert found.used == found.attacked == 4


def test_detection_repeats_with_its_seed_and_batches_share_one_run():
    network, (images, labels) = _network(), _images(12)
    options = {"attack": "fgsm", "mean": MEAN, "std": STD_, "samples": [6], "all_attacked": True}
    first = adversarial_detection(network, images, labels, batch_size=5, **options)
    torch.manual_seed(9)
    again = adversarial_detection(network, images, labels, batch_size=5, **options)
    assert torch.equal(first.errors, again.errors)
    assert first.attacked == 12


def test_what_cannot_be_attacked_is_refused_with_the_reason():
    network, (images, labels) = _network(), _images(4)
    with pytest.raises(ValueError, match=r"^attack: got 'pgm', want one of .*did you mean 'pgd'"):
        Attack(network, "pgm")
    with pytest.raises(ValueError, match=r"^images: got pixels in \[-"):
        Attack(network, "fgsm")(images, labels)
    with pytest.raises(ValueError, match=r"^labels: got values"):
        Attack(network, "fgsm", mean=MEAN, std=STD_)(images, labels + 1)
    linear = STD(nn.Flatten(2), nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 2, 3).eval()
    with pytest.raises(ValueError, match=r"^network: got no convolution"):
        convolution_means(linear, images)


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "art.attacks.evasion", None)
    network, (images, labels) = _network(), _images(4)
    with pytest.raises(ImportError, match=r"it comes with: pip install 'picnn_fast\[attacks\]'"):
        Attack(network, "fgsm", mean=MEAN, std=STD_)(images, labels)
