import pytest
import torch
from torch import nn

from picnn_fast.explain import grad_cam, pathway_grad_cam
from picnn_fast.explain.grad_cam import filter_attributions
from picnn_fast.models import make_interpretable


@pytest.fixture
def network():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    return make_interpretable(
        (features, head), "picnn", num_classes=3, num_filters=6, insert_conv=False
    ).eval()


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 0, 1])


def test_agrees_with_the_definition(network, images):
    maps = network.filter_maps(images).detach().requires_grad_()
    score = network.head_logits(maps).gather(1, LABELS[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, maps)
    expected = (gradient.mean((2, 3), keepdim=True) * maps).detach()
    torch.testing.assert_close(filter_attributions(network, images, LABELS), expected)
    small = expected.sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(small, size=(8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(grad_cam(network, images, LABELS), heat)


def test_filters_and_their_complement_split_the_attribution(network, images):
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1]).expand(5, 6)
    terms = filter_attributions(network, images, LABELS)
    expected = terms[:, [0, 2, 5]].sum(1, keepdim=True).relu()
    expected = nn.functional.interpolate(expected, size=(8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(grad_cam(network, images, LABELS, mask), expected)
    zeros = grad_cam(network, images, LABELS, torch.zeros(5, 6))
    assert torch.equal(zeros, torch.zeros(5, 8, 8))


def test_pathways_follow_the_correspondence_matrix(network, images):
    own = torch.eye(3).repeat_interleave(2, 1)
    with torch.no_grad():
        network.correspondence.weight.copy_(200 * own)
    cam = pathway_grad_cam(network, images, LABELS)
    assert torch.equal(cam.all_filters, grad_cam(network, images, LABELS))
    assert torch.equal(cam.class_filters, grad_cam(network, images, LABELS, own[LABELS]))
    assert torch.equal(cam.complement, grad_cam(network, images, LABELS, 1 - own[LABELS]))


def test_draw_repeats_with_the_seed(network, images):
    first, again, other = (
        pathway_grad_cam(network, images, LABELS, seed=seed).class_filters for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shapes_that_disagree_are_refused(network, images):
    with pytest.raises(ValueError, match=r"^labels: got shape"):
        grad_cam(network, images, LABELS[:2])
    with pytest.raises(ValueError, match=r"^images: got shape"):
        grad_cam(network, images[0], LABELS)
    with pytest.raises(ValueError, match=r"^filters: got shape"):
        grad_cam(network, images, LABELS, torch.ones(5, 7))
