"""ICNN: its layers, its loss term by term, its categories, and what it keeps in a checkpoint."""

import math
import warnings

import pytest
import torch
from torch import nn

from picnn_fast import PartTemplate, functional
from picnn_fast.backbones.receptive_field import receptive_field
from picnn_fast.layers import TemplateMask
from picnn_fast.models import ICNN, make_interpretable
from picnn_fast.models.icnn import ESTIMATORS, FilterCategories
from tests.ops.test_filter_loss_published import Published

LABELS = torch.tensor([0, 2, 1, 2])


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def build(insert: bool = True, classes: int = 3, **options) -> ICNN:
    options.setdefault("filter_loss_weight", 1.0)
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 36, classes))
    return ICNN(features, head, classes, 6, in_channels=6 if insert else None, **options)


def test_two_layers_are_masked_and_both_have_a_filter_loss():
    model = build()
    output = model(images())
    kinds = [type(layer).__name__ for layer in model.features.children()]
    assert kinds == ["Sequential", "TemplateMask", "Conv2d", "ReLU", "TemplateMask"]
    top, second = output.activations
    torch.testing.assert_close(top, model.features[0](images()))
    masked = functional.template_mask(top, PartTemplate())[0]
    torch.testing.assert_close(second, model.features[2](masked).relu())
    torch.testing.assert_close(output.maps, functional.template_mask(second, PartTemplate())[0])
    torch.testing.assert_close(output.maps, model.filter_maps(images()))
    torch.testing.assert_close(output.logits, model.head(output.maps))
    torch.testing.assert_close(output.logits, model.discriminator()(images()))


def test_without_an_inserted_convolution_the_top_layer_alone_is_interpretable():
    model = build(insert=False)
    output = model(images())
    assert len(output.activations) == len(model.filter_losses) == 1
    torch.testing.assert_close(
        output.maps, functional.template_mask(output.activations[0], PartTemplate())[0]
    )


@pytest.mark.parametrize("epoch", [1, 4])
def test_lambda_is_the_mean_peak_over_the_epoch(epoch):
    model = build(filter_loss_weight=3.0)
    model.begin_epoch(epoch)
    output = model(images())
    terms = model.loss_terms(output, LABELS)
    expected = 0.0
    for maps in output.activations:
        for f in range(6):
            peak = sum(maps[b, f].max().item() for b in range(4)) / 4
            loss = functional.filter_loss(maps[:, f : f + 1], PartTemplate()).item()
            expected += 3.0 / epoch * peak * loss
    assert terms["filter_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert list(terms) == ["discrimination", "filter_loss"]
    torch.testing.assert_close(model.loss(output, LABELS), sum(terms.values()))


def test_the_weight_is_a_constant_of_the_gradient():
    model = build()
    output = model(images())
    maps = output.activations[1]
    (got,) = torch.autograd.grad(model.loss_terms(output, LABELS)["filter_loss"], maps)
    own = maps.detach().requires_grad_()
    weights = own.detach().amax((2, 3)).mean(0)
    (functional.filter_loss(own, PartTemplate()) * weights).sum().backward()
    torch.testing.assert_close(got, own.grad)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_gives_every_layer_a_gradient(estimator):
    model = build(estimator=estimator)
    model.loss_terms(model(images()), LABELS)["filter_loss"].backward()
    for name in ("top.0", "conv"):
        gradient = model.features.get_submodule(name).weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_target_assigns_by_the_categories():
    model = build(estimator="target")
    output = model(images())
    (loss,) = (model.loss_terms(output, LABELS)["filter_loss"],)
    expected = 0.0
    for maps, categories in zip(output.activations, model.categories, strict=True):
        state = functional.FilterLossState.empty(6, 12, 12)
        each = functional.filter_loss(
            maps,
            PartTemplate(),
            estimator="target",
            labels=LABELS,
            filter_category=categories(),
            state=state,
        )
        expected += (each * maps.amax((2, 3)).mean(0)).sum()
    torch.testing.assert_close(loss, expected)


def test_losses_of_the_three_tasks():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, -4.0], [0.0, 0.0, 2.0]])
    output = build()(images())._replace(logits=logits)
    softmax = build(task="softmax").loss_terms(output, LABELS)["discrimination"]
    torch.testing.assert_close(softmax, nn.functional.cross_entropy(logits, LABELS))
    logistic = build(task="logistic").loss_terms(output, LABELS)["discrimination"]
    expected = sum(
        math.log1p(math.exp(-z if label == c else z))
        for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)
        for c, z in enumerate(row)
    )
    assert logistic.item() == pytest.approx(expected / 4, rel=1e-5)
    single = build(task="single", classes=2)
    labels = torch.tensor([0, 1, 1, 0])
    term = single.loss_terms(output._replace(logits=logits[:, :2]), labels)["discrimination"]
    y = (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)
    torch.testing.assert_close(term, torch.log1p(torch.exp(-y)).mean())
    assert single.filter_category.tolist() == [1] * 6


def test_categories_are_the_classes_with_the_largest_mean_activation():
    categories = FilterCategories(3, 2, momentum=0.5)
    maps = torch.zeros(4, 2, 2, 2)
    maps[0, 0], maps[1, 1], maps[3, 1] = 1.0, 3.0, 1.0
    categories.update(maps, LABELS)  # classes 0, 2, 1, 2
    torch.testing.assert_close(categories.means, torch.tensor([[4.0, 0], [0, 0], [0, 8.0]]))
    assert categories().tolist() == [0, 2]
    categories.update(torch.full((1, 2, 2, 2), 5.0), torch.tensor([1]))
    # Class 1 moves half of the way to 20, classes that do not occur stay.
    torch.testing.assert_close(categories.means, torch.tensor([[4.0, 0], [10, 10], [0, 8.0]]))
    assert categories().tolist() == [1, 1]


def test_the_first_batch_of_a_class_counts_in_full():
    categories = FilterCategories(2, 1, momentum=0.1)
    for label, value in ((0, 2.0), (1, 3.0)):
        categories.update(torch.full((1, 1, 1, 1), value), torch.tensor([label]))
    torch.testing.assert_close(categories.means, torch.tensor([[2.0], [3.0]]))


def test_class_masks_keep_the_filters_of_the_class():
    model = build()
    model.loss_terms(model(images()), LABELS)
    mask = model.class_mask(LABELS)
    torch.testing.assert_close(mask, (model.filter_category == LABELS[:, None]).float())
    torch.testing.assert_close(model.ownership().sum(0), torch.ones(6))
    assert not [name for name in model.state_dict() if "correspondence" in name]
    (group,) = model.parameter_groups(1e-3)
    assert len(group["params"]) == len(list(model.parameters()))


def test_evaluation_mode_changes_nothing_that_is_remembered():
    model = build(estimator="running")
    model.loss_terms(model(images()), LABELS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    model.loss_terms(model(images() + 1), LABELS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["running", "target"])
def test_a_checkpoint_carries_the_running_estimates(estimator):
    model = build(estimator=estimator)
    model.loss_terms(model(images()), LABELS)
    other = build(estimator=estimator)
    other.load_state_dict(model.state_dict())
    assert other.filter_losses[0].log_mean.shape == (6, 145)
    losses = [m.loss(m(images() + 1), LABELS) for m in (model, other)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_half_model_keeps_sums_and_estimates_in_single_precision(estimator):
    model = build(estimator=estimator)
    model.loss(model(images()), LABELS)
    model.half()
    output = model(images().half())
    large = tuple(400 + maps for maps in output.activations)
    for _ in range(2):
        loss = model.loss(output._replace(activations=large), LABELS)
    assert loss.isfinite()
    assert model.categories[0].means.isfinite().all()
    assert model.categories[0].means.dtype == torch.float32


@pytest.mark.parametrize("epoch", [0, 1.5])
def test_epochs_count_from_one(epoch):
    with pytest.raises((TypeError, ValueError), match="epoch: got"):
        build().begin_epoch(epoch)


def test_maps_on_which_filter_losses_take_long_are_warned_of_once():
    model = build()
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for small in ((32, 32), (8, 128)):
            model(torch.zeros(1, 3, *small))
    with pytest.warns(UserWarning, match=r"^features: yield maps 33 x 32; filter .* 1024 pos"):
        model(torch.zeros(1, 3, 33, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize("estimator", ["running", "target"])
def test_images_of_another_size_than_remembered_are_refused(estimator):
    model = build(insert=False, estimator=estimator)
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model.loss(model(images()), LABELS)
    with pytest.raises(ValueError, match=r"^x: got maps 9 x 16, want 12 x 12 .* of one size"):
        model.loss(model(torch.randn(4, 3, 9, 16)), LABELS)


@pytest.mark.parametrize("name", ["WeightAveraging", "StochasticWeightAveraging"])
def test_lightnings_averages_can_be_begun_before_the_first_batch(name, tmp_path):
    L = pytest.importorskip("lightning")
    kind = getattr(L.pytorch.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    from picnn_fast.training.module import InterpretableModule

    module = InterpretableModule(build(estimator="running"), lr=0.01)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images(), LABELS), batch_size=2
    )
    options = {"swa_lrs": 0.01, "swa_epoch_start": 1} if name.startswith("St") else {}
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[kind(**options)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data, data)
    assert module.network.filter_losses[0].log_mean.isfinite().all()


@pytest.mark.parametrize(
    ("name", "pixels", "shape"),
    [
        ("small-cnn", 64, (96, 8, 8)),
        ("alexnet", 64, (256, 3, 3)),
        ("vgg16", 32, (512, 2, 2)),
        ("vgg-m", 224, (512, 13, 13)),
        ("vgg-s", 224, (512, 18, 18)),
    ],
)
def test_networks_of_the_papers_take_a_second_convolution_as_wide(name, pixels, shape):
    model = make_interpretable(name, "icnn", num_classes=5).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, pixels, pixels))
    assert output.maps.shape == (1, *shape)
    assert [tuple(maps.shape) for maps in output.activations] == [(1, *shape)] * 2
    assert output.logits.shape == (1, 5)


def test_trained_convolutions_of_a_given_vgg_are_used_and_its_classifier_is_new():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.vgg11(num_classes=7)
    model = make_interpretable(network, "icnn", num_classes=4)
    assert model.features.top[0] is network.features[0]
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    old = [layer for layer in network.classifier if isinstance(layer, nn.Linear)]
    sizes = [(512 * 49, 4096), (4096, 4096), (4096, 4)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == sizes
    assert all(layer not in old for layer in linear)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "exact"}, ValueError, "estimator: got 'exact'"),
        ({"task": "regression"}, ValueError, "task: got 'regression'"),
        ({"task": "single"}, ValueError, "num_classes: got 3 with task='single', want 2"),
        ({"filter_loss_weight": -1.0}, ValueError, "filter_loss_weight: got -1.0"),
        ({"momentum": 0.0}, ValueError, "momentum: got 0.0"),
        ({"template": "l1"}, TypeError, "template: got str"),
        ({"mask_scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"center": "middle"}, ValueError, "center: got 'middle'"),
        ({"category_by": "mean"}, ValueError, "category_by: got 'mean', want one of 'sum', 'max'"),
        ({"initial": "zeros"}, ValueError, "initial: got 'zeros'"),
        ({"learn_beta": True, "template": PartTemplate("l1", "uniform")}, ValueError, "template:"),
        ({"insert": False, "initial": "published"}, ValueError, "initial: .* no convolution is"),
        ({"insert": False, "mask_after_pool": True}, ValueError, "mask_after_pool: .* no conv"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_an_output_of_another_model_is_refused():
    with pytest.raises(ValueError, match="output: got 1 layers of activations, want 2"):
        build().loss_terms(build(insert=False)(images()), LABELS)


def test_the_mask_layer_takes_the_papers_scale():
    maps = torch.rand(1, 2, 4, 4)
    by_tau = TemplateMask(PartTemplate(), scale="tau")(maps)
    torch.testing.assert_close(by_tau, TemplateMask(PartTemplate())(maps) * 0.5 / 16)


class Plainly:
    """ICNN as the paper and the published code have it, by loops over filters and positions."""

    def __init__(self, template: PartTemplate, center: str, scale: object, learnt: bool):
        self.template, self.center, self.scale, self.learnt = template, center, scale, learnt

    def values(self, n: int, mu: tuple[int, int]) -> torch.Tensor:
        """T_mu in units of tau: section 3, and the study of templates, 4.2."""
        out = torch.empty(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                di, dj = abs(i - mu[0]), abs(j - mu[1])
                d = di + dj if self.template.norm == "l1" else math.hypot(di, dj)
                # Learnt betas start at 2, on coordinates from -1 to 1.
                beta = self.template.beta or 4
                share = 2 * d * 2 / (n - 1) if self.learnt else beta * d / n
                if self.template.profile == "gradient":
                    out[i, j] = max(1 - share, -1)
                else:
                    out[i, j] = 1 if share < self.template.gamma else -1
        return out

    def centre(self, x: torch.Tensor) -> tuple[int, int]:
        n = len(x)
        if self.center == "argmax":
            return divmod(int(x.flatten().argmax()), n)
        places = torch.arange(n).double()
        total = x.sum().clamp_min(1e-30)  # nothing is masked of a map that is all zero
        down, across = (x.sum(1) @ places / total), (x.sum(0) @ places / total)
        return math.floor(down.item() + 0.5), math.floor(across.item() + 0.5)

    def masked(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        scale = 0.5 / n**2 if self.scale == "tau" else self.scale
        masks = [
            [self.values(n, self.centre(one.detach())).clamp_min(0) * scale for one in image]
            for image in x
        ]
        return x * torch.stack([torch.stack(image) for image in masks])

    def filter_loss(self, x: torch.Tensor) -> torch.Tensor:
        """Equations 1 to 3 of one filter's maps ``[B, n, n]``, p(x|T) over the batch."""
        n = x.shape[-1]
        tau = 0.5 / n**2
        positive = [tau * self.values(n, (i, j)) for i in range(n) for j in range(n)]
        alpha = n**2 / (1 + n**2)
        prior = [alpha / n**2] * n**2 + [1 - alpha]
        scores = [(x * t).sum((1, 2)) for t in [*positive, torch.full((n, n), -tau).double()]]
        given = [s.exp() / s.exp().sum() for s in scores]
        overall = sum(p * g for p, g in zip(prior, given, strict=True))
        information = sum(
            p * (g * (g / overall).log()).sum() for p, g in zip(prior, given, strict=True)
        )
        return -information

    def loss(self, model: ICNN, x: torch.Tensor, labels: torch.Tensor, epoch: int) -> torch.Tensor:
        conv, second, linear = model.features.top[0], model.features.conv, model.head[-1]
        first = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).relu()
        h = nn.functional.conv2d(self.masked(first), second.weight, second.bias, padding=1).relu()
        pooled = len(model.head) == 2
        h = nn.functional.max_pool2d(h, 2) if pooled else h
        maps = self.masked(h)
        maps = maps if pooled else nn.functional.max_pool2d(maps, 2)
        logits = maps.flatten(1) @ linear.weight.T + linear.bias
        return self.discrimination(logits, labels, model.task) + self.pushed(
            [first, h], model, labels, epoch
        )

    def discrimination(self, logits: torch.Tensor, labels: torch.Tensor, task: str) -> torch.Tensor:
        if task == "logistic":
            sign = 2 * nn.functional.one_hot(labels, logits.shape[1]) - 1
            return (1 + (-sign * logits).exp()).log().sum(1).mean()
        if task == "single":
            sign = 2 * labels - 1
            return (1 + (-sign * (logits[:, 1] - logits[:, 0])).exp()).log().mean()
        return (logits.exp().sum(1).log() - logits[range(len(labels)), labels]).mean()

    def pushed(
        self, layers: list[torch.Tensor], model: ICNN, labels: torch.Tensor, epoch: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for maps in layers:
            for f in range(maps.shape[1]):
                x = maps[:, f]
                peaks = sum(x[b].max().item() for b in range(len(x))) / len(x)
                total = total + model.filter_loss_weight / epoch * peaks * self.filter_loss(x)
        return total


class PublishedPlainly(Plainly):
    """With the filter gradient of the published code, whose words another file holds."""

    def pushed(
        self, layers: list[torch.Tensor], model: ICNN, labels: torch.Tensor, epoch: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for maps in layers:
            peaks = maps.detach().amax((2, 3))
            means = torch.stack([peaks[labels == c].mean(0) for c in range(model.num_classes)])
            category = means.clamp_min(0.1).argmax(0)
            share = [(labels == c).double().mean().item() for c in category.tolist()]
            betas = [2.0] * maps.shape[1]
            published = Published(
                maps.detach(), labels.tolist(), category.tolist(), betas, self.template.norm
            )
            gradient = published.gradient(share)
            total = total + model.filter_loss_weight / epoch * (maps * gradient).sum()
        return total


def assert_equal_to(plain: Plainly, model: ICNN, labels: torch.Tensor) -> None:
    """Loss and gradients in epoch 2, of small maps."""
    x = images().double()[:, :, :6, :6]
    model.begin_epoch(2)
    loss = model.loss(model(x), labels)
    expected = plain.loss(model, x, labels, 2)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def tiny(classes: int = 3, **options) -> ICNN:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, classes))
    model = ICNN(features, head, classes, 4, in_channels=4, **options).double()
    model.features.conv.bias.data.fill_(0.1)  # so that no filter is dead
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_scale": "tau"},
        {"template": PartTemplate("l2", beta=3.0)},
        {"template": PartTemplate("l2", "uniform", beta=2.0, gamma=1.5)},
        {"center": "mass", "mask_after_pool": True},
        {"task": "logistic"},
        {"task": "single", "classes": 2},
    ],
    ids=lambda options: " ".join(map(str, options)) or "paper",
)
def test_loss_and_gradients_are_those_of_the_paper(options):
    model = tiny(filter_loss_weight=10.0, **options)
    plain = Plainly(
        options.get("template", PartTemplate()),
        options.get("center", "argmax"),
        options.get("mask_scale", 1.0),
        False,
    )
    labels = LABELS.clamp_max(1) if "classes" in options else LABELS
    assert_equal_to(plain, model, labels)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradients_of_the_published_variant_are_those_of_its_words(norm):
    template = PartTemplate(norm)
    model = tiny(filter_loss_weight=0.1, template=template, **PUBLISHED)
    model.features.conv.weight.data *= 30  # far from the published start, near which maps are 0
    assert_equal_to(PublishedPlainly(template, "mass", 1.0, True), model, LABELS)


PUBLISHED = {
    "center": "mass",
    "learn_beta": True,
    "mask_after_pool": True,
    "category_by": "max",
    "estimator": "published",
    "initial": "published",
}


def test_masks_lie_about_the_centre_of_mass_where_it_is_asked_for():
    model = build(center="mass")
    output = model(images())
    top, second = output.activations
    masked = functional.template_mask(top, PartTemplate(), center="mass")[0]
    assert not torch.equal(masked, functional.template_mask(top, PartTemplate())[0])
    torch.testing.assert_close(second, model.features[2](masked).relu())
    torch.testing.assert_close(
        output.maps, functional.template_mask(second, PartTemplate(), center="mass")[0]
    )


def test_the_second_mask_goes_behind_the_pooling_of_the_head():
    plain, model = build(), build(mask_after_pool=True)
    kinds = [type(layer).__name__ for layer in model.features.children()]
    assert kinds == ["Sequential", "TemplateMask", "Conv2d", "ReLU", "Sequential", "TemplateMask"]
    assert [type(layer).__name__ for layer in model.head] == ["Flatten", "Linear"]
    output, other = model(images()), plain(images())
    torch.testing.assert_close(output.activations[0], other.activations[0])
    pooled = nn.functional.max_pool2d(other.activations[1], 2)
    torch.testing.assert_close(output.activations[1], pooled)
    assert output.maps.shape == (4, 6, 6, 6)
    torch.testing.assert_close(output.maps, functional.template_mask(pooled, PartTemplate())[0])
    torch.testing.assert_close(output.logits, plain.head[2](output.maps.flatten(1)))
    torch.testing.assert_close(output.logits, model.head_logits(model.filter_maps(images())))
    expected = sum(
        (functional.filter_loss(maps, PartTemplate()) * maps.amax((2, 3)).mean(0)).sum()
        for maps in output.activations
    )
    torch.testing.assert_close(model.loss_terms(output, LABELS)["filter_loss"], expected)


@pytest.mark.parametrize(
    ("name", "pixels", "side"),
    [("vgg16", 224, 7), ("alexnet", 224, 6), ("small-cnn", 64, 4), ("vgg-m", 224, 6)],
)
def test_networks_of_the_papers_have_their_second_mask_behind_the_pooling(name, pixels, side):
    model = make_interpretable(name, "icnn", num_classes=5, num_filters=8, mask_after_pool=True)
    field = receptive_field(model.features, pixels)
    assert field.map_size == (side, side)
    assert not [layer for layer in model.head if isinstance(layer, nn.MaxPool2d)]
    with torch.no_grad():
        model = model.eval()
        maps = torch.rand(1, 8, side, side)
        assert model.head_logits(maps).shape == (1, 5)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 144, 3)),
    ],
    ids=["to one position", "no pooling"],
)
def test_a_head_without_a_pooling_window_cannot_give_it_up(head):
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    with pytest.raises(ValueError, match="mask_after_pool: got True with a head that starts with"):
        ICNN(features, head, 3, 6, in_channels=6, mask_after_pool=True)


def test_categories_by_the_maximum_average_it_and_start_at_a_tenth():
    categories = FilterCategories(3, 2, momentum=0.1, by="max")
    maps = torch.zeros(4, 2, 2, 2)
    maps[0, 0], maps[1, 1, 0, 0], maps[3, 1, 1, 1] = 1.0, 3.0, 1.0
    categories.update(maps, LABELS)  # classes 0, 2, 1, 2
    want = torch.tensor([[1.0, 0.1], [0.1, 0.1], [0.1, 2.0]])
    torch.testing.assert_close(categories.means, want)
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, 1, 0] = 5.0
    categories.update(maps, torch.tensor([1]))
    want[1] = torch.tensor([0.9 * 0.1 + 0.1 * 5.0, 0.9 * 0.1])
    torch.testing.assert_close(categories.means, want)
    assert categories().tolist() == [0, 2]
    model = build(category_by="max")
    output = model(images())
    model.loss_terms(output, LABELS)
    peaks = output.activations[1].amax((2, 3))
    by_class = torch.stack([peaks[c == LABELS].mean(0) for c in range(3)]).clamp_min(0.1)
    assert torch.equal(model.filter_category, by_class.argmax(0))


def test_the_published_start_is_normal_and_without_bias():
    model = build(initial="published")
    conv = model.features.conv
    assert (conv.bias == 0).all()
    assert 0.008 < conv.weight.std().item() < 0.012
    assert abs(conv.weight.mean().item()) < 0.002
    assert (build().features.conv.bias != 0).any()


@pytest.mark.parametrize("epoch", [1, 4])
def test_the_published_loss_has_a_weight_of_its_own_and_no_peaks(epoch):
    model = build(estimator="published", filter_loss_weight=None)
    assert model.filter_loss_weight == 1e-6
    assert build(filter_loss_weight=None).filter_loss_weight == 0.003
    model.begin_epoch(epoch)
    output = model(images())
    term = model.loss_terms(output, LABELS)["filter_loss"]
    share = torch.bincount(LABELS, minlength=3) / 4
    expected = 0.0
    for maps, categories in zip(output.activations, model.categories, strict=True):
        expected += functional.published_filter_loss(
            maps,
            PartTemplate(),
            labels=LABELS,
            filter_category=categories(),
            density=share[categories()],
        ).sum()
    torch.testing.assert_close(term, 1e-6 / epoch * expected)
    (grad,) = torch.autograd.grad(term, output.activations[0])
    assert grad.abs().max() > 0


def test_learnt_betas_are_those_of_masks_and_published_losses_and_move_after_the_step():
    model = build(**PUBLISHED)
    betas = [model.features.top_mask.beta, model.features.mask.beta]
    assert all(beta.value.tolist() == [2.0] * 6 for beta in betas)
    for _ in range(2):
        output = model(images())
        before = [beta.value.clone() for beta in betas]
        own = beta_of(output.activations[1], model, before[1])
        torch.testing.assert_close(
            output.maps,
            functional.template_mask(
                output.activations[1], PartTemplate(), center="mass", beta=own
            )[0],
        )
        model.loss(output, LABELS).backward()
        assert all(torch.equal(beta.value, old) for beta, old in zip(betas, before, strict=True))
        model.after_step()
        assert all((beta.value != old).any() for beta, old in zip(betas, before, strict=True))
    before = [beta.value.clone() for beta in betas]
    model.eval()
    model.loss(model(images()), LABELS)
    model.after_step()
    assert all(torch.equal(beta.value, old) for beta, old in zip(betas, before, strict=True))
    other = build(**PUBLISHED)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.features.mask.beta.value, before[1])
    assert [name for name in model.state_dict() if "beta" in name] == [
        "features.top_mask.beta.value",
        "features.mask.beta.value",
    ]


def beta_of(maps: torch.Tensor, model: ICNN, value: torch.Tensor) -> torch.Tensor:
    """In the units of a template on these maps."""
    n = max(maps.shape[2:])
    return value * 2 * n / (n - 1)


def test_a_loaded_beta_is_not_undone_by_what_was_seen_before():
    model, other = build(**PUBLISHED), build(**PUBLISHED)
    model.features.mask.beta.value.fill_(2.7)
    other.load_state_dict(model.state_dict())
    other.after_step()
    assert (other.features.mask.beta.value == 2.7).all()


MASKS = {
    "l1": {},
    "uniform": {"template": PartTemplate("l2", "uniform")},
    "function": {"template": PartTemplate(profile=lambda distance: 1 - distance / 4)},
    "table": {"template": PartTemplate(profile=torch.linspace(-1, 1, 23 * 23).view(23, 23))},
    "mass": {"center": "mass"},
    "learnt": {"learn_beta": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_layers_are_whole_in_a_trace_and_their_maps_can_be_extracted(name):
    network = build(**MASKS[name]).eval().discriminator()
    traced = torch.fx.symbolic_trace(network)
    masks = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
    assert {"features.top_mask", "features.mask"} <= masks
    for batch in (images(), images()[:1]):
        torch.testing.assert_close(traced(batch), network(batch))
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    nodes = {"features.top_mask": "top", "features.mask": "last"}
    maps = extraction.create_feature_extractor(network, nodes)(images())
    top = network.features[:2](images())
    torch.testing.assert_close(maps, {"top": top, "last": network.features(images())})


@pytest.mark.parametrize("name", MASKS)
def test_it_is_exported_to_onnx(name):
    pytest.importorskip("onnxscript")
    network = build(**MASKS[name]).eval().discriminator()
    batch = torch.export.Dim("batch", min=2)
    program = torch.onnx.export(
        network, (images(),), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
    )
    reference = pytest.importorskip("onnx.reference").ReferenceEvaluator(program.model_proto)
    for x in (images(), images()[:3]):
        (logits,) = reference.run(None, {reference.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network(x))
