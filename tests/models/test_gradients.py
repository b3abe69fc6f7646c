"""Gradients of logits and filters against one backward pass an image, filter and class."""

import pytest
import torch
from torch import nn

from picnn_fast.explain import grad_cam
from picnn_fast.explain.grad_cam import filter_attributions
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.models.gradients import (
    class_activation,
    class_saliency,
    filter_saliency,
    logit_gradients,
)


def _network(method="picnn", head=None):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return make_interpretable(
        (features, head), method, num_classes=3, num_filters=6, insert_conv=False
    ).eval()


IMAGES = torch.rand(4, 3, 9, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]])
LINEAR = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 20, 3))


@pytest.mark.parametrize("head", [None, LINEAR])
def test_gradients_of_logits_are_those_of_one_image_and_class_at_a_time(head):
    network = _network(head=head)
    maps = network.filter_maps(IMAGES)
    got = logit_gradients(network, maps, TARGETS)
    for image in range(4):
        for t in range(2):
            one = maps[image : image + 1].detach().requires_grad_()
            network.head_logits(one)[0, TARGETS[image, t]].backward()
            torch.testing.assert_close(got[image, t], one.grad[0])


@pytest.mark.parametrize("pooling", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
def test_class_activation_is_the_classifiers_row_behind_global_pooling(pooling):
    network = _network(head=nn.Sequential(pooling(1), nn.Flatten(), nn.Linear(6, 3)))
    maps = network.filter_maps(IMAGES).detach()
    got = class_activation(network, maps, TARGETS)
    for image in range(4):
        for t in range(2):
            row = network.head[2].weight[TARGETS[image, t]]
            cam = sum(weight * x for weight, x in zip(row, maps[image], strict=True))
            torch.testing.assert_close(20 * got[image, t], cam.detach())


@pytest.mark.parametrize("head", [None, LINEAR])
def test_class_activation_is_captums_grad_cam_before_the_relu(head):
    network = _network(head=head)
    labels = TARGETS[:, 0]
    got = class_activation(network, network.filter_maps(IMAGES), labels[:, None])
    terms = filter_attributions(network, IMAGES, labels).sum(1, keepdim=True)
    torch.testing.assert_close(got, terms)
    resized = nn.functional.interpolate(got.relu(), size=(9, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(resized, grad_cam(network, IMAGES, labels))


def test_saliency_is_the_norm_over_colours_of_one_gradient_at_a_time():
    network = _network()
    filters, labels = torch.tensor([[0, 5, 3], [1, 1, 2], [4, 0, 5], [2, 3, 1]]), TARGETS[:, 0]
    got, of_class = (
        filter_saliency(network, IMAGES, filters),
        class_saliency(network, IMAGES, labels),
    )
    assert got.shape == (4, 3, 9, 8)
    for image in range(4):
        one = IMAGES[image : image + 1].clone().requires_grad_()
        for f in range(3):
            mean = network.filter_maps(one)[0, filters[image, f]].mean()
            (gradient,) = torch.autograd.grad(mean, one)
            torch.testing.assert_close(got[image, f], gradient[0].square().sum(0).sqrt())
        score = network(one).logits.softmax(1)[0, labels[image]]
        (gradient,) = torch.autograd.grad(score, one)
        torch.testing.assert_close(of_class[image], gradient[0].square().sum(0).sqrt())


def test_tokens_have_their_filters_last():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)

        def forward(self, images):
            return self.conv(images).tanh().flatten(2).mT

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, tokens):
            return self.fc(tokens.mean(1))

    torch.manual_seed(0)
    network = make_interpretable(
        (Tokens(), Mean()),
        "picnn",
        num_classes=3,
        num_filters=6,
        insert_conv=False,
        channel_dim=-1,
    ).eval()
    one = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network.filter_maps(one)[:, :, 4].mean(1).sum(), one)
    got = filter_saliency(network, IMAGES, torch.full((4, 1), 4))
    torch.testing.assert_close(got[:, 0], gradient.norm(dim=1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_mode_and_the_gradients_of_parameters_are_left_alone(mode):
    network = _network()
    labels = TARGETS[:, 0]
    want = class_saliency(network, IMAGES, labels)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    with mode():
        maps = network.filter_maps(IMAGES)
        assert torch.equal(class_saliency(network, IMAGES.clone(), labels.clone()), want)
        assert filter_saliency(network, IMAGES, labels[:, None]).shape == (4, 1, 9, 8)
        heat = class_activation(network, maps, TARGETS)
    for made in (heat, want):
        assert not made.requires_grad
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].network_from is None])
def test_every_method_has_them(method):
    torch.manual_seed(0)
    network = make_interpretable("small-cnn", method, num_classes=6, image_channels=3).eval()
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 4])
    maps, bypass = network.encode(images)
    assert class_activation(network, maps, labels[:, None], bypass).abs().sum() > 0
    assert filter_saliency(network, images, labels[:, None]).isfinite().all()
    assert class_saliency(network, images, labels).sum() > 0
