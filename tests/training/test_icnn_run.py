"""Training runs of ICNN: every template, drawn animals, one category, categories that resume."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from picnn_fast.backbones import BACKBONES, Row
from picnn_fast.evaluation import default_figures, evaluate
from picnn_fast.models import ICNN
from picnn_fast.training import checkpoint
from picnn_fast.training.checkpoint import load_checkpoint
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run import assemble, build_data, read_history, train


@pytest.fixture
def config(tmp_path):
    return Options(
        method="icnn",
        backbone="small-cnn",
        data={
            "name": "part-animals",
            "image_size": 32,
            "train_images": 24,
            "test_images": 12,
            "validation": 0,
        },
        batch_size=8,
        epochs=2,
        accelerator="cpu",
        output=str(tmp_path / "run"),
    )


def _with(options, group, **values):
    return dataclasses.replace(options, **{group: {**getattr(options, group), **values}})


def build_network(options, data):
    return checkpoint.build_network(options, data.num_classes, data.in_channels)


def test_a_run_on_drawn_animals_measures_parts_too(config, tmp_path):
    metrics = train(config, progress=False)
    assert metrics.keys() >= set(default_figures())
    assert 0 < metrics["location_instability"] < 0.5
    assert 0 <= metrics["part_interpretability"] <= 1
    network, saved, names = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert type(network) is ICNN
    assert names == ["bird", "cat", "cow", "dog", "horse", "sheep"]
    assert evaluate(network, build_data(saved), seed=0) == metrics
    history = read_history(tmp_path / "run")
    assert all({"train/discrimination", "train/filter_loss"} <= row.keys() for row in history)


@pytest.mark.parametrize("estimator", ["running", "target"])
def test_running_estimates_and_categories_resume(config, tmp_path, monkeypatch, estimator):
    config = _with(config, "method", estimator=estimator)
    whole = train(config, progress=False)
    second = dataclasses.replace(config, output=str(tmp_path / "second"))
    original = InterpretableModule.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(InterpretableModule, "on_train_epoch_start", interrupt)
        with pytest.raises(RuntimeError, match="power cut"):
            train(second, progress=False)
    assert train(second, progress=False) == whole
    one, two = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "second")
    )
    assert any("log_mean" in name for name in one)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_the_weight_of_the_filter_loss_falls_with_the_epoch(config, monkeypatch):
    epochs = []
    original = ICNN.loss_terms

    def note(self, *arguments):
        epochs.append(self.epoch.item())
        return original(self, *arguments)

    monkeypatch.setattr(ICNN, "loss_terms", note)
    train(config, progress=False)
    assert epochs == [1] * 3 + [2] * 3


@pytest.mark.parametrize("profile", ["gradient", "uniform"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_template_has_the_shape_its_options_say(config, norm, profile):
    config = _with(config, "method", template={"norm": norm, "profile": profile})
    network = build_network(config, build_data(config))
    for template in (network.features.mask.template, network.filter_losses[0].template):
        assert (template.norm, template.profile) == (norm, profile)


def test_one_category_is_told_from_the_rest(config):
    config = dataclasses.replace(_with(config, "method", task="single"), category="cow")
    data = build_data(config)
    assert data.class_names == ["not cow", "cow"]
    network = build_network(config, data)
    assert network.num_classes == 2
    assert network.filter_category.eq(1).all()
    metrics = train(config, progress=False)
    # Two test images of twelve show a cow.
    assert metrics["acc1"] * 12 == pytest.approx(round(metrics["acc1"] * 12))
    assert metrics["location_instability"] > 0


def test_an_ordinary_network_is_trained_on_one_category_too(config):
    config = dataclasses.replace(config, method="std", category="cow")
    data = build_data(config)
    assert build_network(config, data).num_classes == 2
    assert train(config, progress=False)["location_instability"] > 0


def test_drawn_animals_are_read_by_as_many_workers_as_asked(config):
    assert build_data(config).num_workers == 0
    assert build_data(_with(config, "data", num_workers=2)).num_workers == 2


def test_the_default_icnn_fits_a_batch_of_digits():
    config = Options(method="icnn", accelerator="cpu")
    torch.manual_seed(0)
    data = build_data(config)
    network = build_network(config, data).train()
    images, labels = (part[:32] for part in next(iter(data.train_dataloader())))
    optimizer = torch.optim.AdamW(network.parameter_groups(1e-3))
    losses = []
    for _ in range(40):
        terms = network.loss_terms(network(images), labels)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(terms["discrimination"].item())
    # From log 10 = 2.3 to 0.1 to 0.3 in this many steps on one batch, whatever the seed.
    assert losses[-1] < losses[0] / 2


def test_labels_of_one_category_are_0_and_1(config):
    data = build_data(dataclasses.replace(config, category="cat"))
    images, labels = next(iter(data.test_dataloader()))
    _, told = data.on_before_batch_transfer((images, labels), 0)
    assert told.tolist() == [int(label == 1) for label in labels.tolist()]


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (
            "method",
            {"task": "single"},
            "^method.task: got 'single' with 6 classes, want --category",
        ),
        ("data", {"image_size": 8}, r"^data\.image_size: got 8"),
        ("data", {"train_images": -1}, r"^data\.train_images: got -1"),
        ("method", {"filter_loss_weight": -1.0}, r"^method\.filter_loss_weight: got -1\.0"),
        ("method", {"template": {"tau": -1.0}}, r"^method\.template\.tau: got -1\.0"),
    ],
)
def test_options_out_of_range_are_refused(config, group, options, message):
    with pytest.raises(ConfigError, match=message):
        train(_with(config, group, **options), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"category": "whale"}, "category: got 'whale', want one of 'bird'"),
        ({"backbone": "vgg-m"}, "backbone: vgg-m cannot take images of 32 x 32"),
        ({"data": {"name": "voc-part", "root": "nowhere"}}, "nowhere"),
        ({"data": {"name": "cub", "root": "nowhere"}}, "nowhere"),
        ({"data": {"name": "animal-part", "root": "nowhere"}}, "nowhere"),
    ],
)
def test_options_that_do_not_go_together_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **options), progress=False)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (nn.AdaptiveAvgPool2d(5), "want sizes that divide"),
        (nn.Upsample(scale_factor=2), "(Upsample), want convolutions, pooling"),
    ],
    ids=["AdaptiveAvgPool2d", "Upsample"],
)
def test_a_run_whose_receptive_fields_nothing_can_tell_starts_and_its_figures_say_so(
    config, monkeypatch, last, reason
):
    def network(image_channels=3):
        features = nn.Sequential(nn.Conv2d(image_channels, 6, 4, stride=4), nn.ReLU(), last)
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

    monkeypatch.setitem(BACKBONES, "odd", Row(network, layer="0"))
    run = assemble(
        dataclasses.replace(config, method="std", backbone="odd"),
        Path(config.output),
        progress=False,
    )
    figures = evaluate(run.network, run.data, draws=1)
    for name in ("location_instability", "part_interpretability"):
        assert figures[name].startswith("n/a: ")
        assert reason in figures[name]
    assert 0 <= figures["acc1"] <= 1


def test_a_logistic_loss_is_icnns_alone():
    with pytest.raises(
        ConfigError, match=r"method\.task: method std has no such option, want.*icnn"
    ):
        Options(method={"name": "std", "task": "logistic"})


@pytest.mark.parametrize(("backbone", "warned"), [("small-resnet", True), ("small-cnn", False)])
def test_maps_on_which_a_filter_loss_takes_long_are_told(backbone, warned, tmp_path):
    options = Options(
        method="icnn",
        data={"name": "part-animals", "train_images": 64, "test_images": 16},
        backbone=backbone,
        accelerator="cpu",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assemble(options, tmp_path, progress=False)
    messages = [str(one.message) for one in caught]
    told = [text for text in messages if text.startswith("features: yield maps 64 x 64; filter")]
    assert len(told) == warned
