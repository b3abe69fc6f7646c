"""A checkpoint as the authors' PICNN code writes it, built by its name map, gives our logits."""

import pytest
import torch
import torchvision
from torch import nn

from picnn_fast.models import make_interpretable
from picnn_fast.models.convert import published_picnn


class Published(nn.Module):
    """The published network: torchvision's layers one after the other, a convolution, no ReLU."""

    def __init__(self, classes=4, filters=6):
        super().__init__()
        layers = list(torchvision.models.resnet18().children())[:-2]
        self.backbone = nn.Sequential(*layers, nn.Conv2d(512, filters, 3, padding=1))
        pooled = nn.Sequential(nn.Flatten(), nn.Linear(filters, classes))
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), pooled)
        self.correlation = nn.Parameter(torch.rand(classes, filters).softmax(0))

    def forward(self, images, mask=None):
        maps = self.backbone(images)
        return self.classifier(maps if mask is None else maps * mask[:, :, None, None])


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    network = Published().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return network


@pytest.fixture
def checkpoint(published):
    state = {f"module.{name}": value.clone() for name, value in published.state_dict().items()}
    return {"optimizer": {}, "model": state, "epoch": 3}


@torch.no_grad()
def test_logits_of_both_pathways_and_the_matrix_are_the_same(published, checkpoint):
    ours = make_interpretable(
        "resnet18", "picnn", num_classes=4, num_filters=6, inserted_activation="none"
    ).eval()
    ours.load_state_dict(published_picnn(checkpoint))
    images, mask = torch.randn(2, 3, 64, 64), (torch.rand(2, 6) < 0.5).float()
    maps = ours.filter_maps(images)
    assert torch.equal(ours.head_logits(maps), published(images))
    torch.testing.assert_close(ours.head_logits(maps, mask), published(images, mask))
    assert torch.equal(ours.ownership(), published.correlation.softmax(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "holds no tensors under 'model'"),
        (lambda c: c["model"].update(epoch=3), "holds no tensors under 'model'"),
        (lambda c: c["model"].pop("module.correlation"), "lacks correlation; want one of PICNN's"),
        (
            lambda c: c["model"].update({"module.gate": torch.ones(1)}),
            "holds module.gate, which no",
        ),
    ],
)
def test_what_is_no_such_checkpoint_is_told_in_a_line(checkpoint, change, message):
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        published_picnn(checkpoint)
