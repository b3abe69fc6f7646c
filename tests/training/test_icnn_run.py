"""Training runs of ICNN: every template, drawn animals, one category, categories that resume."""

import dataclasses
import warnings

import pytest
import torch

from picnn_fast.models import ICNN
from picnn_fast.training import run
from picnn_fast.training.config import ConfigError, TrainConfig
from picnn_fast.training.run import (
    build_data,
    build_network,
    evaluate,
    evaluate_parts,
    load_checkpoint,
    read_history,
    train,
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TRAIN_ANIMALS", 24)
    monkeypatch.setattr(run, "TEST_ANIMALS", 12)
    return TrainConfig(
        method="icnn",
        backbone="small-cnn",
        data="part-animals",
        image_size=32,
        batch_size=8,
        epochs=2,
        accelerator="cpu",
        output=str(tmp_path / "run"),
    )


def test_a_run_on_drawn_animals_measures_parts_too(config, tmp_path):
    metrics = train(config, progress=False)
    assert metrics.keys() == {
        "acc1",
        "acc2",
        "acc3",
        "mis",
        "location_instability",
        "part_interpretability",
    }
    assert 0 < metrics["location_instability"] < 0.5
    assert 0 <= metrics["part_interpretability"] <= 1
    network, saved, names = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert type(network) is ICNN
    assert names == ["bird", "cat", "cow", "dog", "horse", "sheep"]
    assert evaluate(network, build_data(saved), seed=0, accelerator="cpu") == metrics
    history = read_history(tmp_path / "run")
    assert all({"train/discrimination", "train/filter_loss"} <= row.keys() for row in history)


@pytest.mark.parametrize("estimator", ["running", "target"])
def test_running_estimates_and_categories_resume(config, tmp_path, monkeypatch, estimator):
    config = dataclasses.replace(config, estimator=estimator)
    whole = train(config, progress=False)
    second = dataclasses.replace(config, output=str(tmp_path / "second"))
    original = run.InterpretableModule.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.InterpretableModule, "on_train_epoch_start", interrupt)
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


@pytest.mark.parametrize(
    ("name", "norm", "profile"),
    [
        ("l1", "l1", "gradient"),
        ("l2", "l2", "gradient"),
        ("uniform-l1", "l1", "uniform"),
        ("uniform-l2", "l2", "uniform"),
    ],
)
def test_the_template_has_the_shape_its_name_says(config, name, norm, profile):
    config = dataclasses.replace(config, template=name)
    network = build_network(config, build_data(config))
    for template in (network.features.mask.template, network.filter_losses[0].template):
        assert (template.norm, template.profile) == (norm, profile)


def test_one_category_is_told_from_the_rest(config):
    config = dataclasses.replace(config, task="single", category="cow")
    data = build_data(config)
    assert data.class_names == ["not cow", "cow"]
    network = build_network(config, data)
    assert network.num_classes == 2
    assert network.filter_category.eq(1).all()
    metrics = train(config, progress=False)
    # Two test images of twelve show a cow.
    assert metrics["acc1"] * 12 == pytest.approx(round(metrics["acc1"] * 12))
    assert metrics["location_instability"] > 0


def test_batches_without_the_category_are_not_run(config, monkeypatch):
    data = build_data(dataclasses.replace(config, task="single", category="cow", batch_size=4))
    network = build_network(config, data).eval()
    samples = data.part_sets["test"]
    field = run.receptive_field(network.features, samples.image_size)
    instability = run.LocationInstability(network.num_filters, len(samples.landmark_names), field)
    interpretability = run.PartInterpretability(network.num_filters, len(samples.part_names), field)
    with torch.no_grad():
        for batch in data.part_loader("test"):  # none left out
            cows = batch.label == 2
            maps = network.filter_maps(data.normalise(batch.image[cows]))
            instability.update(maps, batch.landmarks[cows])
            interpretability.update(maps, batch.part_masks[cows])
    seen, filter_maps = [], ICNN.filter_maps

    def note(self, images):
        seen.append(len(images))
        return filter_maps(self, images)

    monkeypatch.setattr(ICNN, "filter_maps", note)
    assert evaluate_parts(network, data) == {
        "location_instability": instability.compute().item(),
        "part_interpretability": interpretability.compute().item(),
    }
    assert seen == [1, 1]  # of three batches
    assert instability.compute() > 0


@pytest.mark.filterwarnings("error")
def test_a_category_without_test_images_has_no_part_metrics(config, monkeypatch):
    monkeypatch.setattr(run, "TEST_ANIMALS", 4)
    data = build_data(dataclasses.replace(config, task="single", category="sheep"))
    assert evaluate_parts(build_network(config, data), data) == {}


def test_an_ordinary_network_is_trained_on_one_category_too(config):
    config = dataclasses.replace(config, method="std", task="single", category="cow")
    data = build_data(config)
    assert build_network(config, data).num_classes == 2
    assert train(config, progress=False)["location_instability"] > 0


def test_drawn_animals_are_read_by_as_many_workers_as_asked(config):
    assert build_data(config).num_workers == 0
    assert build_data(dataclasses.replace(config, num_workers=2)).num_workers == 2


def test_what_too_few_images_cannot_tell_is_left_out(config, monkeypatch):
    monkeypatch.setattr(run, "TEST_ANIMALS", 6)  # one a class
    metrics = train(dataclasses.replace(config, epochs=1), progress=False)
    assert "location_instability" not in metrics
    assert "part_interpretability" in metrics


def test_maps_too_many_to_keep_are_left_out_with_a_warning(config, monkeypatch):
    monkeypatch.setattr(run, "MOST_MAP_BYTES", 1000)
    with pytest.warns(UserWarning, match="part_interpretability: left out"):
        metrics = train(dataclasses.replace(config, epochs=1), progress=False)
    assert "part_interpretability" not in metrics


def test_the_default_icnn_fits_a_batch_of_digits():
    config = TrainConfig(method="icnn", accelerator="cpu")
    torch.manual_seed(0)
    data = build_data(config)
    data.setup("fit")
    network = build_network(config, data).train()
    images, labels = (part[:32] for part in next(iter(data.train_dataloader())))
    optimizer = torch.optim.AdamW(network.parameter_groups(config.lr))
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
    data = build_data(dataclasses.replace(config, task="single", category="cat"))
    images, labels = next(iter(data.test_dataloader()))
    _, told = data.on_before_batch_transfer((images, labels), 0)
    assert told.tolist() == [int(label == 1) for label in labels.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"category": "cow"}, "category: got 'cow' with task softmax"),
        ({"task": "single"}, "category: got None with task single"),
        ({"task": "single", "category": "whale"}, "category: got 'whale', want one of 'bird'"),
        (
            {"method": "std", "task": "logistic"},
            "task: got logistic with method std, want softmax or single, or method icnn",
        ),
        ({"image_size": 8}, "^image_size: got 8"),
        ({"backbone": "vgg16", "image_size": 16}, "backbone: vgg16 cannot take images of 16 x 16"),
        ({"data": "voc-part"}, "data: got 'voc-part', want voc-part:FOLDER"),
        ({"data": "voc-part:nowhere"}, "nowhere"),
        ({"data": "cub:nowhere"}, "nowhere"),
        ({"data": "animal-part:nowhere"}, "nowhere"),
    ],
)
def test_options_that_do_not_go_together_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **options), progress=False)


@pytest.mark.parametrize(("backbone", "warned"), [("small-resnet", True), ("small-cnn", False)])
def test_maps_on_which_a_filter_loss_takes_long_are_told(backbone, warned, monkeypatch):
    # Their size counts, not how many there are.
    monkeypatch.setattr(run, "TRAIN_ANIMALS", 64)
    monkeypatch.setattr(run, "TEST_ANIMALS", 16)
    config = TrainConfig(method="icnn", data="part-animals", backbone=backbone, accelerator="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.check(config)
    assert any("makes maps of" in str(one.message) for one in caught) is warned
