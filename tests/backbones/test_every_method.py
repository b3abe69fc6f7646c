"""Every backbone of BACKBONES under every method of METHODS: a step of training, real networks.

The images are the smallest that leave a map more than one position. The weights of a backbone are
drawn once, and each method goes on training them.
"""

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


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a row that builds one network again and again."""
    name: str = request.param
    row = BACKBONES[name]
    torch.manual_seed(0)
    network = drawn(name)
    BACKBONES[name] = row._replace(build=lambda: network)
    yield name
    BACKBONES[name] = row


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_changes_every_backbone(backbone: str, method: str) -> None:
    options = METHODS[method].__init__.__annotations__
    build = partial(make_interpretable, backbone, method, num_classes=CLASSES)
    if backbone == "vit_b_16":
        if "channel_dim" not in options:
            with pytest.raises(ValueError, match=r"^backbone: got one whose maps of .* as tokens"):
                build(insert_conv=False)
            return
        model = build(insert_conv=False)
    elif "in_channels" in options:
        model = build(num_filters=FILTERS)
    else:
        model = build(insert_conv=False)
    side = PIXELS.get(backbone, 32 if backbone.startswith("vgg") else 64)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    model.begin_epoch(1, 1)
    optimizers = [torch.optim.SGD(groups, lr=1e-2) for groups in model.optimizers(1e-2).values()]
    before = first.weight.detach().clone(), [*model.head.parameters()][-1].detach().clone()

    output = model(torch.randn(2, first.in_channels, side, side), LABELS)
    loss = model.loss(output, LABELS)
    loss.backward()
    optimizers[0].step()
    model.after_step()

    assert loss.isfinite()
    assert output.logits.shape == (2, CLASSES)
    after = first.weight, [*model.head.parameters()][-1]
    for old, new in zip(before, after, strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
