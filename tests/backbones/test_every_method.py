"""Every backbone of BACKBONES under the methods of METHODS: a step of training, real networks.

Each is under every method but for those that are only deeper or wider than a row before them. The
images are the smallest that leave a map more than one position. The weights of a backbone are
drawn once, and each method goes on training them.
"""

import functools
import inspect
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.backbones import BACKBONES
from picnn_fast.models import METHODS

torchvision = pytest.importorskip("torchvision")

CLASSES, FILTERS = 3, 12
LABELS = torch.tensor([0, 2])
PIXELS = {
    "small-resnet": 8,
    "resnet20": 8,
    "resnet56": 8,
    "small-cnn": 32,
    "vgg-m": 96,
    "vgg-s": 96,
}


# Built by the same code as a row that every method trains: two methods in turn.
KIN = (
    *("vgg-s", "vgg13", "vgg16", "vgg19", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *("resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnet56", "densenet161"),
)
PAIRS = [
    (name, method)
    for i, name in enumerate(BACKBONES)
    for j, method in enumerate(METHODS)
    if name not in KIN or (j - i) % len(METHODS) < 2
]


def drawn(name: str) -> nn.Module:
    """The network of a row, in fewer seconds where that makes no difference."""
    if name == "vit_b_16":  # for smaller images it has fewer position embeddings, no other blocks
        return torchvision.models.get_model(name, image_size=64)
    if name.startswith("vgg1"):  # drawing what a new classifier replaces would take most of them
        with (
            mock.patch.object(nn.Linear, "reset_parameters"),
            mock.patch.object(nn.init, "normal_"),
        ):
            return BACKBONES[name].build()
    return BACKBONES[name].build()


@functools.lru_cache(maxsize=1)
def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return drawn(name)


@pytest.fixture(scope="module", autouse=True)
def _no_network_is_kept() -> Iterator[None]:
    yield
    network_of.cache_clear()


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_a_step_of_every_method_changes_every_backbone(
    backbone: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(backbone)
    monkeypatch.setitem(BACKBONES, backbone, BACKBONES[backbone]._replace(build=lambda: network))
    options = inspect.signature(METHODS[method]).parameters
    build = partial(make_interpretable, backbone, method, num_classes=CLASSES)
    tokens = backbone == "vit_b_16"
    if tokens and "channel_dim" not in options:
        with pytest.raises(
            ValueError, match=r"^(backbone: got one whose maps .* as token|layer: )"
        ):
            build(insert_conv=False)
        return
    insert = not tokens and "in_channels" in options
    model = build(insert_conv=insert, num_filters=FILTERS if insert else None)
    side = PIXELS.get(backbone, 32 if backbone.startswith("vgg") else 64)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    images = torch.randn(2, first.in_channels, side, side)
    model.begin_epoch(1, 1, images=[(images, LABELS)])
    optimizer = torch.optim.SGD(model.optimizers(1e-2)[model.optimizer_of(1)], lr=1e-2)
    # The first and the last of the network that the method trains: an Explainer leaves the backbone
    # as it is, and a gate or matrix may have no gradient in a first step.
    trained = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in (trained[0], trained[-1])]

    output = model(images, LABELS)
    loss = model.loss(output, LABELS)
    loss.backward()
    optimizer.step()
    model.after_step()

    assert loss.isfinite()
    assert output.logits.shape == (2, CLASSES)
    assert torch.stack([p.detach().sum() for p in trained]).isfinite().all()
    for old, new in zip(before, (trained[0], trained[-1]), strict=True):
        assert not torch.equal(old, new)
