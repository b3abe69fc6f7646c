"""What logs figures through Lightning, from modules that are not ours.

Weights & Biases and MLflow are not installed here: what Lightning's loggers have in common,
``log_metrics``, is all that is called, and a logger that records stands in for theirs.
"""

import copy
import csv
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from picnn_fast.data import PartAnimals, PartDataModule
from picnn_fast.evaluation import (
    FiguresCallback,
    MutualInformationCallback,
    evaluate,
    log_figures,
)
from picnn_fast.metrics import MutualInformationScore
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.training.module import InterpretableModule
from tests.ranks import run_ranks

CLASSES = 3
FIGURES = {
    "acc1": 0.75,
    "acc2": 0.5,
    "acc2_standard_error": 0.125,
    "acc1_interval": [0.5, 0.875],
    "density": "n/a: PICNN has no gate",
}
LOGGED = {
    "acc1": 0.75,
    "acc2": 0.5,
    "acc2_standard_error": 0.125,
    "acc1_interval_low": 0.5,
    "acc1_interval_high": 0.875,
}


class Recorder(Logger):
    """What every logger of Lightning's offers, and no more."""

    def __init__(self):
        super().__init__()
        self.seen = []

    name, version = "recorder", 0

    def log_metrics(self, metrics, step=None):
        self.seen.append((dict(metrics), step))

    def log_hyperparams(self, params, *args, **kwargs):
        """Nothing of them is looked at."""


class Plain(L.LightningModule):
    """A module that knows nothing of this library."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(5, CLASSES)
        self.unused = nn.Conv2d(1, 5, 1)

    def forward(self, images):
        return self.fc(self.model(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch["images"] if isinstance(batch, dict) else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own(L.LightningModule):
    """Holds a network of ours, under a name of its own, and trains it."""

    def __init__(self, network):
        super().__init__()
        self.net = network

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.net.loss(self.net(images, labels), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def _images(count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return torch.rand(count, 1, 6, 6, generator=generator) + labels[:, None, None, None], labels


def _loader(seed=1, batch_size=10):
    return DataLoader(TensorDataset(*_images(seed=seed)), batch_size=batch_size)


def _animals():
    sets = [PartAnimals(split, 18, image_size=24) for split in ("train", "test")]
    return PartDataModule(*sets, batch_size=6, flip=True)


def _network(method="picnn"):
    torch.manual_seed(0)
    return make_interpretable("small-cnn", method, num_classes=6)


def _trainer(**options):
    plain = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", **{**plain, **quiet, **options})


def test_figures_are_logged_without_those_that_are_not_available():
    logger = Recorder()
    values = log_figures(logger, FIGURES, step=7)
    assert values == {f"test/{name}": value for name, value in LOGGED.items()}
    assert logger.seen == [(values, 7)]


def test_no_key_lies_below_another():
    """MLflow keeps each in a file, which cannot be a folder too."""
    keys = log_figures([], FIGURES).keys()
    assert not any(key.startswith(f"{other}/") for key in keys for other in keys)


def test_several_loggers_and_no_prefix():
    loggers = [Recorder(), Recorder()]
    log_figures(loggers, FIGURES, prefix="")
    assert [logger.seen for logger in loggers] == [[(LOGGED, None)]] * 2


def test_nothing_is_logged_where_no_figure_could_be_had():
    logger = Recorder()
    assert log_figures(logger, {"density": "n/a: no gate"}) == {}
    assert logger.seen == []


def test_what_is_no_logger_is_refused_before_anything_is_logged():
    logger = Recorder()
    with pytest.raises(TypeError, match=r"^loggers: got int, want loggers of Lightning$"):
        log_figures([logger, 3], FIGURES)
    assert logger.seen == []


def test_figures_are_read_back_from_csv_and_tensorboard(tmp_path):
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "board", "")]
    values = log_figures(loggers, FIGURES, step=3)
    for logger in loggers:
        logger.save()
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {name: float(value) for name, value in row.items()} == {**values, "step": 3}
    loggers[1].experiment.flush()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    read = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {tag: [(e.step, e.value) for e in found] for tag, found in read.items()} == {
        name: [(3, value)] for name, value in values.items()
    }


def _fit(callback, network=None, **options):
    module = Own(_network() if network is None else network)
    torch.manual_seed(2)
    trainer = _trainer(callbacks=[callback], **options)
    trainer.fit(module, _animals())
    return module


def test_figures_of_the_test_split_are_logged_when_training_ends():
    logger, callback = Recorder(), FiguresCallback(network="net", draws=2)
    module = _fit(callback, logger=logger, max_epochs=2)
    # Not augmented, as the data module would have it while training.
    assert callback.figures == evaluate(module.net, _animals(), draws=2)
    logged = [(v, s) for v, s in logger.seen if any(key.startswith("test/") for key in v)]
    assert logged == [(log_figures([], callback.figures), 6)]
    assert {"test/acc1", "test/mis", "test/location_instability"} <= logged[0][0].keys()
    assert callback.figures["density"].startswith("n/a")


def test_figures_are_logged_every_so_many_epochs_and_the_last_not_twice():
    for every, steps in ((1, [3, 6, 9, 12]), (2, [6, 12]), (3, [9, 12])):
        logger = Recorder()
        callback = FiguresCallback(
            _animals(), network=lambda m: m.net, every_n_epochs=every, prefix="x", draws=1
        )
        _fit(callback, logger=logger, max_epochs=4)
        assert [step for values, step in logger.seen if "x/acc1" in values] == steps


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].network_from is None])
def test_training_goes_on_as_if_nothing_had_been_measured(method):
    """Of whatever method: its mode, its draws, its weights and buffers."""
    weights = []
    for every in (None, 1):
        network = _network(method)
        network.features[0].eval()  # as one who freezes batch norm has it
        callback = FiguresCallback(network="net", every_n_epochs=every, draws=1)
        module = _fit(callback, network, max_epochs=2)
        assert module.net.training
        assert not module.net.features[0].training
        weights.append(module.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_network_trained_in_double_precision_is_measured_in_single():
    callback = FiguresCallback(network="net", draws=1)
    module = _fit(callback, precision="64-true")
    assert next(module.net.parameters()).dtype == torch.float64
    expected = evaluate(copy.deepcopy(module.net).float(), _animals(), draws=1)
    assert callback.figures == expected


def test_what_cannot_be_measured_is_known_before_training():
    with pytest.raises(TypeError, match="drawz"):
        FiguresCallback(drawz=3)
    with pytest.raises(TypeError, match=r"^data: got DataLoader, want a data module of"):
        FiguresCallback(_loader())
    with pytest.raises(ValueError, match=r"^every_n_epochs: got 0, want an int >= 1"):
        FiguresCallback(every_n_epochs=0)
    with pytest.raises(ValueError, match=r"^figures: got 'acc9', want one of"):
        FiguresCallback(figures=["acc9"])
    module = Own(_network())
    for callback, error, says in (
        (FiguresCallback(network="nett"), ValueError, r"^network: got 'nett', did you mean 'net'"),
        (FiguresCallback(network=lambda m: m), TypeError, r"^network: got Own, want an Interpret"),
        (FiguresCallback(network="net"), TypeError, r"^data: got NoneType, want a data module"),
    ):
        with pytest.raises(error, match=says):
            _trainer(callbacks=[callback]).fit(module, _loader())


def _expected(module, layer=1, seed=1, order=None):
    """MIS of what the layer yields, all images at once."""
    images, labels = _images(seed=seed)
    if order is not None:
        images, labels = images[order], labels[order]
    with torch.no_grad():
        pooled = module.model[: layer + 1](images).mean((2, 3))
    metric = MutualInformationScore(CLASSES)
    metric.update(pooled, labels)
    return metric


def test_a_layers_score_is_that_of_all_validation_images():
    module, callback = Plain(), MutualInformationCallback("model.1", CLASSES)
    trainer = _trainer(callbacks=[callback])
    (logged,) = trainer.validate(module, _loader(), verbose=False)
    metric = _expected(module)
    assert logged == {"val/mis/model.1": pytest.approx(metric.compute().item(), abs=1e-6)}
    assert logged["val/mis/model.1"] > 0.1
    assert torch.allclose(callback.matrix, metric.matrix(), atol=1e-6)


def test_the_score_is_logged_every_so_many_epochs_and_may_choose_the_checkpoint(tmp_path):
    logger = Recorder()
    module, callback = Plain(), MutualInformationCallback("model.1", CLASSES, every_n_epochs=2)
    best = ModelCheckpoint(tmp_path, monitor="val/mis/model.1", mode="max", every_n_epochs=2)
    trainer = _trainer(
        callbacks=[callback, best],
        logger=logger,
        max_epochs=4,
        num_sanity_val_steps=2,
        enable_checkpointing=True,
    )
    trainer.fit(module, _loader(), _loader(seed=5))
    seen = [(v["val/mis/model.1"], step) for v, step in logger.seen if "val/mis/model.1" in v]
    assert [step for _, step in seen] == [5, 11]  # the last steps of epochs 2 and 4, from 0
    assert seen[-1][0] == pytest.approx(_expected(module, seed=5).compute().item(), abs=1e-6)
    assert best.best_model_score == max(value for value, _ in seen)
    assert not module.model[1]._forward_hooks


def test_a_layer_of_our_own_module_is_measured_too():
    network = make_interpretable("small-resnet", "picnn", num_classes=CLASSES, num_filters=7)
    module = InterpretableModule(network)
    callback = MutualInformationCallback("network.features", CLASSES, name="val/mis")
    (logged,) = _trainer(callbacks=[callback]).validate(module, _loader(), verbose=False)
    images, labels = _images()
    metric = MutualInformationScore(CLASSES)
    with torch.no_grad():
        metric.update(network.eval().filter_maps(images).mean((2, 3)), labels)
    assert logged["val/mis"] == pytest.approx(metric.compute().item(), abs=1e-6)
    assert {"val/acc1", "val/acc2", "val/acc3"} < logged.keys()


def test_two_layers_and_their_options_are_measured_side_by_side():
    module = Plain()
    callbacks = [
        MutualInformationCallback("model.0", CLASSES, n_neighbors=5, name="first"),
        MutualInformationCallback("model.1", CLASSES, estimator="histogram", bins=8),
    ]
    (logged,) = _trainer(callbacks=callbacks).validate(module, _loader(), verbose=False)
    images, labels = _images()
    for layer, name, options in (
        (0, "first", {"n_neighbors": 5}),
        (1, "val/mis/model.1", {"estimator": "histogram", "bins": 8}),
    ):
        metric = MutualInformationScore(CLASSES, **options)
        metric.update(module.model[: layer + 1](images).mean((2, 3)), labels)
        assert logged[name] == pytest.approx(metric.compute().item(), abs=1e-6)


def test_labels_are_found_wherever_the_batch_has_them():
    images, labels = _images()
    batches = [
        {"images": x, "target": y} for x, y in zip(images.split(10), labels.split(10), strict=True)
    ]
    expected = _expected(Plain()).compute().item()
    for found in ("target", lambda batch: batch["target"]):
        callback = MutualInformationCallback("model.1", CLASSES, labels=found, name="mis")
        loader = DataLoader(batches, batch_size=None)
        (logged,) = _trainer(callbacks=[callback]).validate(Plain(), loader, verbose=False)
        assert logged["mis"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"^labels: got 1, which a dict of a batch does not hold"):
        _trainer(callbacks=[MutualInformationCallback("model.1", CLASSES)]).validate(
            Plain(), DataLoader(batches, batch_size=None), verbose=False
        )


def test_of_several_validation_loaders_one_is_measured():
    module = Plain()
    callback = MutualInformationCallback("model.1", CLASSES, dataloader_idx=1, name="mis")
    logged = _trainer(callbacks=[callback]).validate(
        module, [_loader(seed=1), _loader(seed=5)], verbose=False
    )
    expected = _expected(module, seed=5).compute().item()
    assert logged[0]["mis"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected - _expected(module, seed=1).compute().item()) > 1e-3


class Tokens(Plain):
    """Yields tokens ``[B, T, N]``, or several things at once."""

    def __init__(self, several):
        super().__init__()
        self.tokens = _Tokens(several)

    def validation_step(self, batch, batch_idx):
        self.tokens(self.model[1](self.model[0](batch[0])))


class _Tokens(nn.Module):
    def __init__(self, several):
        super().__init__()
        self.several = several

    def forward(self, maps):
        tokens = maps.flatten(2).mT
        return (tokens, None) if self.several else tokens


def test_tokens_have_their_filters_last():
    callback = MutualInformationCallback("tokens", CLASSES, channel_dim=-1, name="mis")
    (logged,) = _trainer(callbacks=[callback]).validate(Tokens(False), _loader(), verbose=False)
    assert logged["mis"] == pytest.approx(_expected(Plain()).compute().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "module", "error", "says"),
    [
        ("mode.1", Plain(), ValueError, r"^layer: got 'mode\.1', did you mean 'model\.1'\? want"),
        ("", Plain(), ValueError, r"^layer: got '', want the name of a layer of Plain"),
        (
            "unused",
            Plain(),
            ValueError,
            r"^layer: got 'unused', want one that validation_step",
        ),
        (
            "fc",
            Plain(),
            ValueError,
            r"^layer: got 'fc', which yields torch\.float32 \[10, 3\]",
        ),
        (
            "tokens",
            Tokens(True),
            TypeError,
            r"^layer: got 'tokens', which yields a tuple, want",
        ),
    ],
)
def test_a_layer_without_maps_is_refused_and_left_as_it_was(layer, module, error, says):
    callback = MutualInformationCallback(layer, CLASSES)
    with pytest.raises(error, match=says):
        _trainer(callbacks=[callback]).validate(module, _loader(), verbose=False)
    assert not any(part._forward_hooks for part in module.modules())


class Failing(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        raise RuntimeError("failed")


def test_a_layer_that_is_not_there_is_known_before_any_step():
    callback = MutualInformationCallback("mode.1", CLASSES)
    with pytest.raises(ValueError, match=r"^layer: got 'mode\.1', did you mean 'model\.1'"):
        _trainer(callbacks=[callback]).fit(Failing(), _loader(), _loader())
    with pytest.raises(ValueError, match=r"^n_neighbors: got 0"):
        MutualInformationCallback("model.1", CLASSES, n_neighbors=0)


def test_the_layer_is_left_as_it_was_where_validation_fails():
    module, callback = Failing(), MutualInformationCallback("model.1", CLASSES)
    with pytest.raises(RuntimeError, match="failed"):
        _trainer(callbacks=[callback]).validate(module, _loader(), verbose=False)
    assert not any(part._forward_hooks for part in module.modules())


RANKS = 2


def work(rank: int, folder: Path) -> None:
    """What one of two processes does; it saves what the test compares."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    data = TensorDataset(*_images())
    shares = DistributedSampler(data, RANKS, rank, shuffle=False)
    loader = DataLoader(data, batch_size=5, sampler=shares)
    callback = MutualInformationCallback("model.1", CLASSES, name="mis")
    trainer = _trainer(callbacks=[callback], use_distributed_sampler=False)
    (logged,) = trainer.validate(Plain(), loader, verbose=False)
    figures = FiguresCallback(network="net", figures=["acc1", "mis"])
    _fit(figures, _network("std"))  # which draws nothing, as ranks would apart
    torch.save({"mis": logged["mis"], "figures": figures.figures}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)
def test_a_layers_score_is_of_all_ranks_and_figures_are_of_the_split_once(tmp_path):
    callback = FiguresCallback(network="net", figures=["acc1", "mis"])
    _fit(callback, _network("std"))
    order = [place for rank in range(RANKS) for place in range(rank, 24, RANKS)]
    expected = _expected(Plain(), order=order).compute().item()
    for content in run_ranks(__file__, tmp_path, RANKS):
        assert content["mis"] == pytest.approx(expected, abs=1e-6)
        assert content["figures"] == callback.figures


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
