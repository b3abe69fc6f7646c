"""Explainer: its loss term by term, what it starts from, and the performer that it leaves alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picnn_fast import PartTemplate
from picnn_fast.models import STD, Explainer, make_interpretable

N, K = 5, 3
# With the paper's, 0.5 / n², maps of sum 1 make a loss whose gradient float64 knows to 1e-9 alone.
TAU = 2.0


def images(batch: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 6) -> Tensor:
    return torch.arange(batch) % K


def fully_connected(classes: int = K) -> nn.Sequential:
    """A performer with batch norm, fc6 and fc7; it is explained at layer "1"."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, N, 3, padding=1, bias=False),
        nn.BatchNorm2d(N),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(N * 36, 8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Linear(7, classes),
    )
    norm = network[3]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 1.5)
    return network.eval()


def pooled(classes: int = K) -> nn.Sequential:
    """A performer with a global pool; it is explained at layer "1"."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, N, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(N, classes),
    ).eval()


PERFORMERS = (fully_connected, pooled)


def build(performer=fully_connected, classes: int = K, **options) -> Explainer:
    network = performer(classes)
    model = make_interpretable(network, "explainer", num_classes=classes, **options)
    assert isinstance(model, Explainer)
    return model


# The paper in plain PyTorch, filter by filter.


def plain_templates(n: int) -> Tensor:
    """``[n² + 1, n, n]``: one a position, and the negative one last."""
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    rows = []
    for i in range(n):
        for j in range(n):
            distance = (row - i).abs() + (column - j).abs()
            rows.append(TAU * (1 - 4 * distance.double() / n).clamp_min(-1))
    return torch.stack([*rows, torch.full((n, n), -TAU, dtype=torch.float64)])


def plain_mask(x: Tensor) -> Tensor:
    n = x.shape[-1]
    templates = plain_templates(n).clamp_min(0) / TAU
    masks = [[templates[x[b, f].argmax()] for f in range(x.shape[1])] for b in range(len(x))]
    return x * torch.stack([torch.stack(row) for row in masks])


def plain_filter_loss(x: Tensor) -> Tensor:
    """Eq. 2 of each filter: minus the mutual information of its maps and the templates."""
    templates = plain_templates(x.shape[-1])
    losses = []
    for f in range(x.shape[1]):
        fits = (x[:, f, None] * templates).sum((2, 3)).exp()  # [B, T]
        given = fits / fits.sum(0)
        prior = 1 / len(templates)
        anyhow = (prior * given).sum(1, keepdim=True)
        losses.append(-(prior * given * (given / anyhow).log()).sum())
    return torch.stack(losses)


def norm_of(x: Tensor) -> Tensor:
    return (x**2).sum(tuple(range(1, x.ndim))).sqrt()


class Plain:
    """Section 3, on the parameters of a model; running means are its own."""

    def __init__(self, model: Explainer, performer: nn.Sequential, eta: float) -> None:
        self.w = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.w = {
            name: self.w[name].requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        self.performer, self.eta = performer, eta
        self.hidden = len([x for x in performer if isinstance(x, nn.Linear)]) > 1
        self.alpha: list[Tensor] | None = None
        self.seen = 0

    def conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], padding=1).relu()

    def fc(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"head.{name}.weight"], self.w[f"head.{name}.bias"])

    def terms(self, x: Tensor, y: Tensor, objective: str, epoch: int, positive=None):
        target = self.performer[:2](x)
        top = self.performer[2:5](target) if self.hidden else self.performer[2:4](target)
        if self.hidden:
            top = F.max_pool2d(top, 2)
            wanted = [self.performer[7:9](top.flatten(1))]
            wanted.append(self.performer[10:12](wanted[0]))
        else:
            wanted = [top.mean((2, 3))]
            wanted.append(self.performer[6](wanted[0]))
        wanted = [value.detach() for value in wanted]

        first = self.conv(target, "features.conv1")
        second = self.conv(plain_mask(first), "features.conv2")
        ordinary = self.conv(target, "ordinary.conv")
        if self.hidden:
            second, ordinary = F.max_pool2d(second, 2), F.max_pool2d(ordinary, 2)
        maps = plain_mask(second)

        positive = torch.ones(len(x), dtype=torch.bool) if positive is None else positive
        with torch.no_grad():
            new = [z[positive].clamp_min(0).sum((2, 3)).mean(0) for z in (maps, ordinary)]
            own = top.clamp_min(0).sum((2, 3)).mean(0)
            size = torch.stack([norm_of(value).mean() for value in wanted])
            if self.alpha is None:
                self.alpha, self.scale, self.size = new, own, size
            else:
                share = len(x) / (self.seen + len(x))
                both = zip(self.alpha, new, strict=True)
                self.alpha = [(1 - share) * a + share * b for a, b in both]
                self.scale = (1 - share) * self.scale + share * own
                self.size = (1 - share) * self.size + share * size
            self.seen += len(x)

        p = 1 / (1 + (-self.w["head.w_p"].squeeze()).exp())
        over = [torch.where(a > 0, 1 / a, 0)[:, None, None] for a in self.alpha]
        encoded = p * maps * over[0] + (1 - p) * ordinary * over[1]
        flat = encoded * self.scale[:, None, None]
        flat = flat.flatten(1) if self.hidden else flat.mean((2, 3))
        got = [self.fc(flat, "fc1").relu()]
        got.append(self.fc(got[0], "fc2"))
        if self.hidden:
            got[1] = got[1].relu()
        logits = self.performer[12](got[1]) if self.hidden else got[1]
        if objective == "classification":
            chosen = logits.log_softmax(1).gather(1, y[:, None])
            upper = -chosen.mean()
        else:
            upper = sum(
                ((a - b) ** 2).sum(1).mean() / s
                for a, b, s in zip(got, wanted, self.size, strict=True)
            )
        mixed = p * second * over[0] + (1 - p) * (ordinary * over[1]).detach()
        total = torch.zeros((), dtype=x.dtype)
        for maps_f, seen in ((first, first), (second, mixed)):
            loss = plain_filter_loss(seen)
            (up,) = torch.autograd.grad(upper, maps_f, retain_graph=True)
            (down,) = torch.autograd.grad(loss.sum(), maps_f, retain_graph=True)
            for f in range(N):
                above, own_f = norm_of(up[:, f]).mean(), norm_of(down[:, f]).mean()
                weight = above / own_f / (300 * epoch) if own_f > 0 else 0.0
                total = total + weight * loss[f]
        return {objective: upper, "interpretable": -self.eta * p.log(), "filter_loss": total}


@pytest.mark.parametrize("objective", ["reconstruction", "classification"])
@pytest.mark.parametrize("performer", PERFORMERS)
def test_loss_and_gradients_are_those_of_the_paper(performer, objective):
    template = PartTemplate(tau=TAU)
    model = build(performer, objective=objective, eta=0.7, template=template).double()
    with torch.no_grad():
        model.head.w_p.fill_(0.3)
    plain = Plain(model, performer().double(), 0.7)
    for epoch, seed in ((1, 1), (3, 2)):  # the second batch finds running means
        model.begin_epoch(epoch)
        x, y = images(seed=seed).double(), labels()
        model.zero_grad()
        output = model(x, y)
        terms = model.loss_terms(output, y)
        expected = plain.terms(x, y, objective, epoch)
        assert list(terms) == list(expected)
        for name in terms:
            torch.testing.assert_close(terms[name], expected[name], rtol=1e-10, atol=1e-12)
        assert all(expected[name].abs() > 1e-9 for name in expected)
        for name in terms:  # one by one: the filter losses' gradient is the smallest
            learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
            options = {"retain_graph": True, "allow_unused": True}
            got = torch.autograd.grad(terms[name], list(learnt.values()), **options)
            want = torch.autograd.grad(expected[name], [plain.w[n] for n in learnt], **options)
            for parameter, a, b in zip(learnt, got, want, strict=True):
                assert (a is None) == (b is None), (name, parameter)
                if a is not None:
                    torch.testing.assert_close(
                        a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item() + 1e-15
                    )


def test_the_filter_loss_reaches_p_and_not_the_ordinary_track():
    model = build()
    output = model(images(), labels())
    model.loss_terms(output, labels())["filter_loss"].backward()
    assert model.head.w_p.grad.abs() > 0
    assert model.features.conv1.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.ordinary.parameters())


@pytest.mark.parametrize("performer", PERFORMERS)
def test_training_leaves_the_performer_as_it_is(performer):
    network = performer()
    network.train()
    before, alone = copy.deepcopy(network.state_dict()), performer()
    model = make_interpretable(network, "explainer", num_classes=K)
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    start = model.features.conv1.weight.detach().clone()
    for _ in range(3):
        loss = model.train().loss(model(images(), labels()), labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(model.features.conv1.weight, start)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules() if not list(module.children()))
    assert model.training
    told = model.performer()
    rest = told.rest(told.top(told.target(images())))
    torch.testing.assert_close(rest, alone(images()))
    held = {id(p) for group in model.parameter_groups(1.0) for p in group["params"]}
    assert held.isdisjoint(id(p) for p in network.parameters())


def test_it_starts_from_the_top_convolution_and_fully_connected_layers():
    network, model = fully_connected(), build()
    target = network[:2](images())
    torch.testing.assert_close(
        model.features.conv1(target), network[3](network[2](target)), rtol=1e-4, atol=1e-5
    )
    for name, layer in (("fc1", network[7]), ("fc2", network[10])):
        own = model.get_submodule(f"head.{name}")
        assert torch.equal(own.weight, layer.weight)
        assert torch.equal(own.bias, layer.bias)
        assert own.weight is not layer.weight
    assert model.head.p() == 0.5
    # Behind the scale, channels of sum 1 are as large as the performer's own.
    output = model(images())
    sums = F.max_pool2d(network[2:5](target), 2).sum((2, 3)).mean(0)
    torch.testing.assert_close(model.head.scale.mean, sums)
    assert output.maps.shape == (6, N, 6, 6)


def test_a_global_pool_is_passed_on_at_first():
    network, model = pooled(), build(pooled)
    assert torch.equal(model.head.fc1.weight, torch.eye(N))
    assert torch.equal(model.head.fc2.weight, network[-1].weight)
    assert [tuple(x.shape) for x in model(images()).targets] == [(6, N), (6, K)]


def test_another_number_of_filters_starts_from_what_fits():
    model = build(num_filters=4)
    output = model(images(), labels())
    assert output.maps.shape[1] == 4
    assert torch.equal(model.head.fc2.weight, fully_connected()[10].weight)
    assert model.head.fc1.in_features == 4 * 36
    model.loss(output, labels()).backward()


def test_of_one_category_alpha_is_of_positive_images_alone():
    y = torch.tensor([0, 1, 0, 0, 1, 0])
    model, all_images = build(classes=2, task="single"), build(classes=2)
    for each in (model, all_images):
        each.load_state_dict(build(classes=2).state_dict())
    output = model(images(), y)
    all_images(images(), y)
    expected = output.maps[y == 1].sum((2, 3)).mean(0)
    torch.testing.assert_close(model.head.norm.mean, expected.detach())
    assert not torch.allclose(all_images.head.norm.mean, expected)
    before = model.head.norm.mean.clone()
    model(images(), torch.zeros_like(y))  # without an image of it
    assert torch.equal(model.head.norm.mean, before)
    with pytest.raises(ValueError, match=r"^num_classes: got 3 with task='single', want 2"):
        build(task="single")


def test_norm_layers_are_constant_in_evaluation_and_in_the_backward_pass():
    model = build()
    model(images(), labels())
    saved = copy.deepcopy(model.state_dict())
    model.eval()
    model(images(seed=5), labels())
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    maps = torch.rand(2, N, 6, 6, requires_grad=True)
    model.head.norm(maps).sum().backward()
    expected = (1 / model.head.norm.mean)[:, None, None].expand_as(maps)
    torch.testing.assert_close(maps.grad, expected)


def test_a_channel_that_is_never_active_stays_silent():
    model = build()
    with torch.no_grad():
        model.features.conv2.bias[0] = -1e6
    output = model(images(), labels())
    assert output.maps[:, 0].abs().max() == 0
    model.loss(output, labels()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_logits_are_the_performers_classifier_on_the_reconstruction():
    model, network = build(), fully_connected()
    output = model(images(), labels())
    torch.testing.assert_close(output.logits, network[12](output.reconstructed[1]))
    torch.testing.assert_close(output.targets[0], network[:9](images()))
    torch.testing.assert_close(output.targets[1], network[:12](images()))
    model.eval()
    maps, ordinary = model.encode(images())
    with pytest.raises(ValueError, match=r"^bypass: got None, want what encode\(images\) yields"):
        model.head_logits(maps)
    torch.testing.assert_close(
        model.head_logits(maps, bypass=ordinary), model.discriminator()(images())
    )


@pytest.mark.parametrize(
    ("backbone", "layer", "channels", "filters"),
    [
        ("small-cnn", "features.features.9", 96, 96),
        ("small-vgg", "features.features.9", 64, 64),
        ("alexnet", "features.9", 256, 256),
        ("small-resnet", "features", 128, 128),
    ],
)
def test_the_target_layer_is_what_the_top_convolution_takes(backbone, layer, channels, filters):
    if backbone == "alexnet":
        pytest.importorskip("torchvision")
    model = make_interpretable(backbone, "explainer", num_classes=K, image_channels=3)
    told = model.performer()
    assert (told.target_channels, model.num_filters) == (channels, filters)
    assert (told.top is None) == (backbone == "small-resnet")
    if told.top is not None:
        assert isinstance(told.top[0], nn.Conv2d)


def test_an_interpretable_network_is_explained_at_any_layer():
    torch.manual_seed(0)
    std = make_interpretable("small-cnn", "std", num_classes=K, num_filters=7).eval()
    assert isinstance(std, STD)
    model = make_interpretable(std, "explainer", num_classes=K)
    assert model.num_filters == 7  # of the inserted convolution, the last
    told = model.performer()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(told.rest(told.top(told.target(x))), std(x).logits)
    model = make_interpretable(std, "explainer", num_classes=K, layer="features.0.6")
    assert model.performer().target_channels == 48
    torch.testing.assert_close(model.performer().target(x), std.features[0][:7](x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "both"}, "objective: got 'both', want one of"),
        ({"eta": -1.0}, "eta: got -1.0, want a finite number >= 0"),
        ({"p_lr": 0.0}, "p_lr: got 0.0, want a number > 0"),
        ({"task": "logistic"}, "task: got 'logistic', want one of"),
        ({"layer": "nowhere"}, "layer: got 'nowhere'"),
        ({"weights": "DEFAULT"}, "weights: got 'DEFAULT' with a performer that is built"),
        ({"image_channels": 3}, "image_channels: got 3 with a performer that is built"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(given, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        build(**given)
    assert "\n" not in str(caught.value)


def test_performers_that_cannot_be_explained_are_refused_in_a_line():
    std = make_interpretable("small-cnn", "std", num_classes=2)
    with pytest.raises(ValueError, match=r"^num_classes: got 3, want 2, the performer's$"):
        make_interpretable(std, "explainer", num_classes=3)
    convolutional = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, K, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(ValueError, match=r"^head: got no nn\.Linear among its layers \(Conv2d"):
        make_interpretable(convolutional, "explainer", num_classes=K)
    odd = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(7, K)
    )
    with pytest.raises(ValueError, match=r"^head: got a fully connected layer of 7 features behi"):
        make_interpretable(odd, "explainer", num_classes=K)


def test_the_template_is_that_of_masks_and_losses():
    model, other = build(), build(template=PartTemplate("l2", tau=0.5))
    assert not torch.equal(model(images()).maps, other(images()).maps)
    losses = [each.loss_terms(each(images()), labels())["filter_loss"] for each in (model, other)]
    assert losses[0] != losses[1]


def test_weights_of_the_filter_losses_in_evaluation_are_those_of_the_last_step():
    model = build()
    with torch.no_grad():
        assert model.eval().loss_terms(model(images()), labels())["filter_loss"] == 0
    model.train()
    model.loss(model(images(), labels()), labels())
    saved = model.filter_weights.clone()
    assert saved.min() >= 0
    assert saved.max() > 0
    with torch.no_grad():
        assert model.eval().loss_terms(model(images()), labels())["filter_loss"] < 0
    assert torch.equal(model.filter_weights, saved)
