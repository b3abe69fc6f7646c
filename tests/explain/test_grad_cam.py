import pytest
import torch
from torch import nn

from picnn_fast.explain import grad_cam, pathway_grad_cam
from picnn_fast.explain.grad_cam import filter_attributions
from picnn_fast.models import METHODS, make_interpretable


class Residual(nn.Module):
    """Branches, a layer that runs twice, and one that writes into the maps of another."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.act, self.unused = nn.ReLU(inplace=True), nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, images):
        maps = self.act(self.stem(images))
        return self.fc(self.act(maps + self.conv(maps)).mean((2, 3)))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Residual().eval()


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


def test_the_control_is_some_pair_of_filters_where_two_are_the_classs(network, images):
    own = torch.eye(3).repeat_interleave(2, 1)
    with torch.no_grad():
        network.correspondence.weight.copy_(200 * own)
    every = torch.combinations(torch.arange(6))  # the 15 pairs
    pairs = torch.zeros(15, 6).scatter(1, every, 1.0)
    heats = torch.stack([grad_cam(network, images, LABELS, pair.expand(5, 6)) for pair in pairs])
    drawn = set()
    for seed in range(12):
        control = pathway_grad_cam(network, images, LABELS, seed=seed).random_filters
        same = (heats - control).abs().amax((2, 3)) < 1e-6  # [pairs, images]
        assert same.any(0).all()
        drawn |= {tuple(every[pair].tolist()) for pair in same.all(1).nonzero()[:, 0]}
        drawn |= {tuple(every[pair].tolist()) for pair in same.int().argmax(0)}
    assert len(drawn) > 8  # and not the class's own every time


def test_draw_repeats_with_the_seed(network, images):
    first, again, other = (
        pathway_grad_cam(network, images, LABELS, seed=seed)[1:] for seed in (3, 3, 4)
    )
    for heat, repeated, different in zip(first, again, other, strict=True):
        assert torch.equal(heat, repeated)
        assert not torch.equal(heat, different)


def test_shapes_that_disagree_are_refused(network, images):
    with pytest.raises(ValueError, match=r"^targets: got shape"):
        grad_cam(network, images, LABELS[:2])
    with pytest.raises(ValueError, match=r"^labels: got shape"):
        pathway_grad_cam(network, images, LABELS[:2])
    with pytest.raises(ValueError, match=r"^images: got shape"):
        grad_cam(network, images[0], LABELS)
    with pytest.raises(ValueError, match=r"^filters: got shape"):
        grad_cam(network, images, LABELS, torch.ones(5, 7))


def by_definition(network, images, layer):
    """Of the layer's last run."""
    outputs = []

    def hook(module, inputs, output):
        outputs.append(output)
        return output.clone()

    handle = layer.register_forward_hook(hook)
    score = network(images).gather(1, LABELS[:, None]).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, outputs[-1])
    terms = gradient.mean((2, 3), keepdim=True) * outputs[-1]
    heat = terms.sum(1, keepdim=True).relu().detach()
    return nn.functional.interpolate(heat, size=images.shape[2:], mode="bilinear")[:, 0]


@pytest.mark.parametrize("layer", ["stem", "conv", "act"])
def test_any_network_is_explained_by_any_layer_that_yields_maps(plain, images, layer):
    expected = by_definition(plain, images, plain.get_submodule(layer))
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(plain, images, LABELS, layer=layer), expected)
    by_module = grad_cam(plain, images, LABELS, layer=plain.get_submodule(layer))
    torch.testing.assert_close(by_module, expected)
    shares = torch.rand(5, 6)
    half = grad_cam(plain, images, LABELS, shares / 2, layer=layer)
    torch.testing.assert_close(2 * half, grad_cam(plain, images, LABELS, shares, layer=layer))


@pytest.mark.parametrize("method", METHODS)
def test_the_discriminator_is_explained_as_its_network_is(method, images):
    model = make_interpretable("small-resnet", method, num_classes=3).eval()
    expected = grad_cam(model, images, LABELS)
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(model, images, LABELS, layer="features"), expected)
    # Where something reaches the head past the features, these do not run as one.
    layer = None if model.encode(images)[1] is None else model.features[-1]
    network = model.discriminator()
    torch.testing.assert_close(grad_cam(network, images, LABELS, layer=layer), expected)
    earlier = grad_cam(model, images, LABELS, layer=model.features[0])
    assert not torch.equal(earlier, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_had_in_every_mode_and_of_frozen_networks(network, plain, images, mode):
    for each, layer in ((network, None), (plain, "conv")):
        expected = grad_cam(each, images, LABELS, layer=layer)
        each.requires_grad_(False)
        with mode():
            shown = images.clone()
            torch.testing.assert_close(grad_cam(each, shown, LABELS, layer=layer), expected)
    with mode():
        cam = pathway_grad_cam(network, images, LABELS)
    torch.testing.assert_close(cam.all_filters, grad_cam(network, images, LABELS))
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": None}, ValueError, "layer: got None with a Residual, want one of its modules"),
        ({"layer": "cnv"}, ValueError, r"layer: got 'cnv', did you mean 'conv'\? want a module"),
        ({"layer": ""}, ValueError, "layer: got '', want a module"),
        ({"layer": 3}, TypeError, "layer: got int, want a module or its name"),
        ({"layer": nn.ReLU()}, ValueError, "layer: got a ReLU that is no module of the network"),
        ({"layer": "fc"}, ValueError, r"layer: yielded a tensor of shape \(5, 3\), want maps"),
        ({"layer": "unused"}, ValueError, "layer: got 'unused', which the network does not run"),
        ({"network": nn.Flatten(0)}, ValueError, "network: yielded a tensor of shape"),
        ({"network": len}, TypeError, "network: got builtin_function_or_method, want a torch.nn"),
        ({"targets": LABELS + 1}, ValueError, r"targets: got values in \[1, 3\], want class indic"),
        ({"targets": LABELS - 1}, ValueError, r"targets: got values in \[-1, 1\], want class ind"),
        ({"targets": LABELS.float()}, TypeError, "targets: got dtype torch.float32, want integers"),
        ({"targets": LABELS.tolist()}, TypeError, "targets: got list, want a torch.Tensor"),
        ({"images": torch.ones(5, 1, 8, 8).byte()}, TypeError, "images: got dtype torch.uint8"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_a_line(plain, images, change, error, message):
    given = {"network": plain, "images": images, "targets": LABELS, "layer": "conv"} | change
    if isinstance(given["network"], nn.Flatten):
        given |= {"network": nn.Sequential(given["network"]), "layer": "0"}
    with pytest.raises(error, match=f"^{message}") as caught:
        grad_cam(**given)
    assert "\n" not in str(caught.value)


def test_pathways_want_filters_that_belong_to_classes(plain, images):
    with pytest.raises(TypeError, match=r"^network: got Residual, want an InterpretableNetwork"):
        pathway_grad_cam(plain, images, LABELS)
