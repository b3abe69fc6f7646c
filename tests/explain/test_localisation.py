"""Localisation of single images is what the figures say of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from picnn_fast.explain import localisation_examples
from picnn_fast.metrics import CAMLocalisation, SaliencyLocalisation
from picnn_fast.models import make_interpretable
from picnn_fast.models.gradients import class_saliency

IMAGES = torch.rand(5, 3, 12, 11, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture
def network():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return make_interpretable(
        (features, head), "std", num_classes=3, num_filters=6, insert_conv=False
    ).eval()


@pytest.fixture
def masks():
    masks = torch.zeros(5, 12, 11, dtype=torch.bool)
    masks[:4, 3:9, 2:8] = True  # of the last one nothing is shown
    return masks


def test_examples_are_those_of_the_figures(network, masks):
    seen = localisation_examples(network, IMAGES, LABELS, masks)
    maps = network.filter_maps(IMAGES).detach()
    heat = torch.einsum("bn,bnhw->bhw", network.head[2].weight[LABELS], maps).detach()
    cam, gradmap = CAMLocalisation(), SaliencyLocalisation()
    cam.update(heat, masks)
    gradmap.update(class_saliency(network, IMAGES, LABELS)[:, None], masks)
    for ious, metric in ((seen.cam_ious, cam), (seen.gradmap_ious, gradmap)):
        torch.testing.assert_close(ious, metric.per_image(), equal_nan=True)
        assert ious.isnan().tolist() == [False] * 4 + [True]
    resized = F.interpolate(heat[:, None], size=(12, 11), mode="bilinear")[:, 0]
    torch.testing.assert_close(seen.cam * maps[0, 0].numel(), resized)
    assert seen.cam_regions.sum((1, 2)).tolist() == [int(0.3 * 12 * 11)] * 5
    assert torch.equal(seen.gradmap_regions, seen.gradmap > 1)


def test_what_does_not_fit_is_refused_by_name(network, masks):
    for arguments, message in (
        ((IMAGES[0], LABELS, masks), "images: got shape"),
        ((IMAGES, LABELS + 1, masks), "labels: got values"),
        ((IMAGES, LABELS, masks.float()), r"object_masks: got torch\.float32"),
        ((IMAGES, LABELS, masks[:, 1:]), r"object_masks: got torch\.bool \(5, 11, 11\)"),
    ):
        with pytest.raises(ValueError, match=message):
            localisation_examples(network, *arguments)
