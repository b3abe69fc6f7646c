"""Figures of localisation of whole networks, against one image, filter and class at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from picnn_fast.data import DATA, SeededDataModule
from picnn_fast.evaluation import FIGURES, default_figures, evaluate
from picnn_fast.evaluation.figures import localisation
from picnn_fast.explain import grad_cam
from picnn_fast.metrics.localisation import region_ious, saliency_maps
from picnn_fast.models import make_interpretable

MASKED = [f"{name}_{part}" for name in ("activmap", "cam") for part in ("iou", "ap30")]
ASKED = [f"{name}_{part}" for name in ("gradmap", "gradmap_class") for part in ("iou", "ap20")]


def _network(classes, head=None, filters=4, channels=3, **options):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(channels, filters, 5, stride=4, padding=2), nn.ReLU())
    head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes))
    return make_interpretable(
        (features, head),
        "std",
        num_classes=classes,
        num_filters=filters,
        insert_conv=False,
        **options,
    ).eval()


@pytest.fixture(scope="module")
def animals():
    data = DATA["part-animals"](batch_size=5, seed=0, image_size=32, train_images=6, test_images=12)
    data.setup()
    return data


def _samples(data):
    samples = [data.part_sets["test"][i] for i in range(12)]
    images = data.normalise(torch.stack([sample.image for sample in samples]))
    return images, torch.stack([s.object_mask for s in samples]), [s.label for s in samples]


def _gradient(value, image):
    (gradient,) = torch.autograd.grad(value, image)
    return gradient.square().sum(1).sqrt()


def test_cam_is_the_classifiers_row_of_the_true_label(animals):
    network = _network(6)
    images, masks, labels = _samples(animals)
    ious = []
    for image, mask, label in zip(images, masks, labels, strict=True):
        maps = network.filter_maps(image[None])[0]
        heat = sum(w * x for w, x in zip(network.head[2].weight[label], maps, strict=True))
        heat = F.interpolate(heat[None, None], size=(32, 32), mode="bilinear")[0, 0]
        region = heat >= heat.flatten().sort(descending=True).values[int(0.3 * 32 * 32) - 1]
        ious.append(((region & mask).sum() / (region | mask).sum()).item())
    values = evaluate(network, animals, figures=["cam_iou", "cam_ap30"])
    assert values["cam_iou"] == pytest.approx(sum(ious) / 12)
    assert values["cam_ap30"] == pytest.approx(sum(iou > 0.3 for iou in ious) / 12)


def test_gradmap_is_of_the_filters_that_a_class_activates_most(animals, monkeypatch):
    monkeypatch.setattr(localisation, "_GradMap", _with(localisation._GradMap, filters=2))
    network = _network(6)
    images, masks, labels = _samples(animals)
    with torch.no_grad():
        sums = network.filter_maps(images).sum((2, 3))
    ious, of_class = [], []
    for image, mask, label in zip(images, masks, labels, strict=True):
        means = sums[[other == label for other in labels]].mean(0).tolist()
        found = []
        for f in sorted(range(4), key=means.__getitem__)[2:]:
            one = image[None].clone().requires_grad_()
            saliency = _gradient(network.filter_maps(one)[0, f].mean(), one)
            found.append(region_ious(saliency_maps(saliency) > 1, mask).item())
        ious.append(sum(found) / 2)
        one = image[None].clone().requires_grad_()
        saliency = _gradient(network(one).logits.softmax(1)[0, label], one)
        of_class.append(region_ious(saliency_maps(saliency) > 1, mask).item())
    # Of batches of 5, 5 and 2: 3 at a time, of two batches at times, and 5, of which 2 are left.
    for together in (3, 20):
        monkeypatch.setattr(localisation, "_MOST_SALIENCY", together * 2 * 32 * 32)
        values = evaluate(network, animals, figures=ASKED)
        for name, each in (("gradmap", ious), ("gradmap_class", of_class)):
            assert values[f"{name}_iou"] == pytest.approx(sum(each) / 12)
            assert values[f"{name}_ap20"] == pytest.approx(sum(iou >= 0.2 for iou in each) / 12)
    assert 0 < values["gradmap_iou"] != values["gradmap_class_iou"]


def _with(kind, **more):
    return lambda *arguments: kind(*arguments, **more)


def test_activmap_takes_thresholds_of_all_images_before_any_is_looked_at(animals):
    network = _network(6)
    images, masks, labels = _samples(animals)
    with torch.no_grad():
        maps = network.filter_maps(images)
    shares, ious = [], []
    for f in range(4):
        ordered = maps[:, f].flatten().sort(descending=True).values
        threshold = ordered[int(0.3 * len(ordered)) - 1]
        regions = F.interpolate(maps[:, f : f + 1], size=(32, 32), mode="bilinear")[:, 0]
        each = region_ious(regions >= threshold, masks)
        of_class = [each[[label == c for label in labels]] for c in range(6)]
        best = max(((e > 0.3).double().mean().item(), e.mean().item()) for e in of_class)
        shares.append(best[0])
        ious.append(best[1])
    values = evaluate(network, animals, figures=["activmap_iou", "activmap_ap30"])
    assert values["activmap_iou"] == pytest.approx(sum(ious) / 4)
    assert values["activmap_ap30"] == pytest.approx(sum(shares) / 4)


def test_each_has_an_interval_about_it(animals):
    values = evaluate(_network(6), animals, figures=[*MASKED, *ASKED])
    assert list(values) == [n for name in (*MASKED, *ASKED) for n in (name, f"{name}_interval")]
    for name in (*MASKED, *ASKED):
        low, high = values[f"{name}_interval"]
        assert 0 <= low < high <= 1
        assert low <= values[name] <= high


def test_gradients_of_filters_are_taken_only_where_they_are_asked_for(animals):
    names = default_figures()
    assert set(names).isdisjoint(ASKED)
    assert set(names) > {*MASKED, "pointing_game"}
    assert {name: FIGURES[name].images for name in ASKED} == {
        "gradmap_iou": 200,
        "gradmap_ap20": 200,
        "gradmap_class_iou": 500,
        "gradmap_class_ap20": 500,
    }
    assert FIGURES["gradmap_iou"].said.endswith("mean over them; of 200 test images at most")
    assert FIGURES["cam_iou"].said == FIGURES["cam_iou"].meaning


class Colours(SeededDataModule):
    """As many classes as colours: a square of one of them somewhere in noise."""

    def __init__(self, classes, count=40, side=16):
        super().__init__(batch_size=7, num_workers=0, seed=0)
        self.num_classes = self.in_channels = classes
        self.class_names = [str(c) for c in range(classes)]
        generator = torch.Generator().manual_seed(classes)
        labels = torch.arange(count) % classes
        images = 0.4 * torch.rand(count, classes, side, side, generator=generator)
        for image, label in zip(images, labels, strict=True):
            y, x = torch.randint(2, side - 8, (2,), generator=generator).tolist()
            image[label, y : y + 6, x : x + 6] += 1
        self.train_set = self.test_set = TensorDataset(images, labels)


def _of_colours(classes):
    """Each filter sees its class's colour, well above the noise."""
    network = _network(classes, filters=classes, channels=classes)
    with torch.no_grad():
        network.features[0].weight.copy_(
            torch.eye(classes)[:, :, None, None].expand_as(network.features[0].weight)
        )
        network.features[0].bias.fill_(-6.0)
        network.head[2].weight.copy_(torch.eye(classes) - 0.1)
        network.head[2].bias.zero_()
    return network


@pytest.mark.parametrize(("classes", "size"), [(10, 3), (9, 3), (6, 2)])
def test_the_pointing_game_is_played_with_grad_cam_on_confident_images(classes, size):
    data, network = Colours(classes), _of_colours(classes)
    images, labels = data.test_set.tensors
    probabilities = network(images).logits.softmax(1)
    cells, shares = size * size, []
    ranked = [
        sorted(
            (i for i in range(40) if labels[i] == c == probabilities[i].argmax()),
            key=lambda i, c=c: -probabilities[i, c].item(),
        )
        for c in range(classes)
    ]
    for rank in range(-(-40 // classes)):
        left = [c for c in range(classes) if len(ranked[c]) > rank]
        turn = rank % max(len(left), 1)
        left = left[turn:] + left[:turn]
        for first in range(0, len(left) - cells + 1, cells):
            chosen = left[first : first + cells]
            rows = [
                torch.cat([images[ranked[c][rank]] for c in chosen[r * size :][:size]], 2)
                for r in range(size)
            ]
            grid = torch.cat(rows, 1)[None]
            for cell, c in enumerate(chosen):
                heat = grad_cam(network, grid, torch.tensor([c]))[0]
                y, x = cell // size * 16, cell % size * 16
                shares.append((heat[y : y + 16, x : x + 16].sum() / heat.sum()).item())
    value = evaluate(network, data, figures=["pointing_game"])["pointing_game"]
    assert value == pytest.approx(sum(shares) / len(shares))
    assert 0.8 < value < 1


def test_without_images_classified_right_there_is_no_pointing_game():
    network = _network(10, filters=10, channels=10)
    with torch.no_grad():
        network.head[2].weight.zero_()
        network.head[2].bias.copy_(torch.eye(10)[0])
    value = evaluate(network, Colours(10), figures=["pointing_game"])["pointing_game"]
    assert value == "n/a: too few images of it to tell"


def test_what_is_missing_is_said(animals):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 6))
    values = evaluate(_network(6, flat), animals, figures=[*MASKED, "pointing_game"])
    reason = "n/a: the network takes no images of 2 times the size: "
    assert values["pointing_game"].startswith(reason)
    assert all(isinstance(values[name], float) for name in MASKED)
    values = evaluate(
        _network(3, channels=3), Colours(3), figures=[*MASKED, *ASKED, "pointing_game"]
    )
    assert {values[name] for name in (*MASKED, *ASKED)} == {"n/a: the data has no object masks"}
    assert values["pointing_game"] == "n/a: 3 classes: too few for a grid of different ones"


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, images):
        return self.conv(images).flatten(2).mT


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, tokens):
        return self.fc(tokens.mean(1))


def test_tokens_have_gradients_and_no_maps(animals):
    torch.manual_seed(0)
    network = make_interpretable(
        (Tokens(), Mean()),
        "std",
        num_classes=6,
        num_filters=4,
        insert_conv=False,
        channel_dim=-1,
    )
    values = evaluate(network, animals, figures=[*MASKED, *ASKED, "pointing_game"])
    for name in (*MASKED, "pointing_game"):
        assert values[name] == "n/a: the maps are not [B, N, h, w]"
    assert all(isinstance(values[name], float) for name in ASKED)
