import dataclasses
import itertools
import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from picnn_fast.evaluation import FIGURES
from picnn_fast.losses import MutualInformationLoss
from picnn_fast.models import STD, make_interpretable
from picnn_fast.training.module import DivergenceError, InterpretableModule
from picnn_fast.training.run_folder import RunFolderError


def _network(method="picnn", **options):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return make_interpretable(
        (features, head), method, num_classes=3, num_filters=6, insert_conv=False, **options
    )


def _loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 3), batch_size=4)


def _trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_each_group_has_its_learning_rate_and_both_fall_to_zero():
    module = InterpretableModule(
        _network(correspondence_lr=0.1, correspondence_weight_decay=0.0),
        lr=1e-3,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.05),
    )
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            groups = trainer.optimizers[0].param_groups
            seen.append([(group["lr"], group["weight_decay"]) for group in groups])

    trainer = _trainer(max_epochs=2, callbacks=[Watch()])
    trainer.fit(module, _loader(), _loader())
    assert seen[0] == [(1e-3, 0.05), (0.1, 0.0)]
    assert all(now < before for (now, _), (before, _) in zip(seen[-1], seen[0], strict=True))
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == pytest.approx([0, 0], abs=1e-9)


def test_constant_schedule_keeps_the_rates():
    module = InterpretableModule(_network(correspondence_lr=0.1), schedule="constant")
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader())
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [1e-3, 0.1]


def test_correspondence_matrix_of_picnn_moves_and_that_of_std_does_not():
    moved = {}
    for method in ("picnn", "std"):
        network = _network(method)
        network.interpretation_loss_on = "all"  # whatever pseudo-labels are drawn
        before = network.ownership().clone()
        _trainer(max_epochs=1).fit(InterpretableModule(network), _loader(), _loader())
        moved[method] = not torch.equal(before, network.ownership())
    assert moved == {"picnn": True, "std": False}


def test_terms_and_metrics_are_logged():
    module = InterpretableModule(_network())
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/acc1", "val/acc2", "val/acc3", "train/loss"} <= logged.keys()
    terms = [v for k, v in logged.items() if k.startswith("train/") and k != "train/loss"]
    assert len(terms) == 2
    assert sum(terms) == pytest.approx(logged["train/loss"], rel=1e-5)


def test_validation_repeats_whatever_was_drawn_before():
    network = _network()
    results = []
    for noise in (3, 4):
        torch.manual_seed(noise)
        module = InterpretableModule(network, seed=5)
        results.append(_trainer().validate(module, _loader(), verbose=False)[0])
    assert results[0] == results[1]
    assert results[0].keys() == {"val/acc1", "val/acc2", "val/acc3"}


@pytest.mark.parametrize("interval", [1.0, 0.5, 1])
def test_validation_leaves_what_training_draws_as_it_was(interval):
    """However often it comes, each step has draws of its own, those of a run without it."""

    def drawn(interval):
        module, draws = InterpretableModule(_network()), []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                draws.append(tuple(torch.get_rng_state().tolist()))

        torch.manual_seed(0)
        trainer = _trainer(max_epochs=2, val_check_interval=interval, callbacks=[Watch()])
        images = _loader().dataset
        ordered = DataLoader(images, batch_size=3, generator=torch.Generator())
        trainer.fit(module, ordered, ordered if interval else None)
        return draws

    states = drawn(interval)
    assert len(set(states)) == len(states) == 8
    assert states == drawn(None)


def test_a_run_without_validation_images_is_trained_all_the_same():
    trainer = _trainer(max_epochs=2)
    trainer.fit(InterpretableModule(_network()), _loader())
    assert "train/loss" in trainer.callback_metrics
    assert not any(name.startswith("val/") for name in trainer.callback_metrics)


def test_the_cosine_ends_at_its_floor_after_the_rise():
    module = InterpretableModule(
        _network("std"), lr=1.0, schedule_floor=0.2, warmup_epochs=1, optimizer=torch.optim.SGD
    )
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    with torch.no_grad():
        module.network.head[2].weight.zero_()  # a step of 1 is no matter to the rates
    trainer = _trainer(max_epochs=5, callbacks=[Watch()])
    trainer.fit(module, _loader())
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert seen == pytest.approx([0.5, *(0.2 + 0.8 * share for share in cosine)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)


def test_steps_of_the_schedule_are_those_of_multi_step_lr_after_the_rise():
    module = InterpretableModule(
        _network("std"), lr=0.1, schedule="step", schedule_steps=[2, 3], schedule_factor=0.5
    )
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    published = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5)
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        published.step()
    assert _rates(module, max_epochs=5)[::3] == pytest.approx(expected)
    endless = InterpretableModule(_network("std"), lr=0.1, schedule="step", schedule_steps=[1])
    assert _rates(endless, max_steps=6)[::3] == pytest.approx([0.1, 0.01])
    late = InterpretableModule(
        _network("std"), lr=0.1, schedule="step", schedule_steps=[2], warmup_epochs=1
    )
    assert _rates(late, max_epochs=3)[::3] == pytest.approx([0.05, 0.1, 0.01])


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("picnn", r"lower lr \(0.001\) or correspondence_lr \(0.001\)"),
        ("std", r"lower lr \(0.001\),"),
    ],
)
def test_divergence_stops_with_advice_on_rates_that_are_used(method, advice):
    network = _network(method)
    with torch.no_grad():
        network.head[2].bias.fill_(float("inf"))
    with pytest.raises(DivergenceError, match=f"train/loss is nan in epoch 1.*{advice}"):
        _trainer(max_epochs=1).fit(InterpretableModule(network), _loader(), _loader())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 0}, "lr"),
        ({"schedule_floor": 2}, "schedule_floor"),
        ({"schedule": "linear"}, "schedule"),
        ({"schedule_steps": [3, 3]}, "schedule_steps"),
        ({"schedule_steps": [0]}, "schedule_steps"),
        ({"schedule_factor": 0.0}, "schedule_factor"),
        ({"mutual_information_weight": -1}, "mutual_information_weight"),
    ],
)
def test_bad_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        InterpretableModule(_network(), **options)


def _fit_with_mutual_information(weight, network):
    module = InterpretableModule(network, lr=0.02, mutual_information_weight=weight)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader())
    return module, {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("method", ["std", "picnn"])
def test_mutual_information_is_a_term_of_the_loss(method):
    calls = []
    network = _network(method)
    network.features.register_forward_hook(lambda *arguments: calls.append(network.training))
    _, logged = _fit_with_mutual_information(0.5, network)
    terms = {k: v for k, v in logged.items() if k.startswith("train/") and k != "train/loss"}
    assert -0.5 * math.log(3) < terms["train/mutual_information"] < 0
    assert sum(terms.values()) == pytest.approx(logged["train/loss"], rel=1e-5)
    assert calls.count(True) == 3  # once a batch: no second pass


def test_without_weight_there_is_no_such_term_and_nothing_else_changes():
    module, logged = _fit_with_mutual_information(0.0, _network())
    assert "train/mutual_information" not in logged
    plain = InterpretableModule(_network(), lr=0.02)
    _trainer(max_epochs=1).fit(plain, _loader(), _loader())
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, module.network.state_dict()[name])


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_the_term_is_the_loss_of_the_pooled_maps(channel_dim):
    network = _network("std")
    if channel_dim == -1:
        features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), Last())
        head = nn.Sequential(nn.Flatten(), nn.Linear(24, 3))
        network = STD(features, head, 3, 6, channel_dim=-1)
    module = InterpretableModule(network, mutual_information_weight=0.5)
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: value})
    images, labels = next(iter(_loader()))
    module.training_step((images, labels), 0)
    maps = network.filter_maps(images).movedim(channel_dim, 1)
    expected = 0.5 * MutualInformationLoss(3)(maps.flatten(2), labels)
    torch.testing.assert_close(logged["train/mutual_information"], expected)


class Last(nn.Module):
    """Maps with the filters last, as a transformer's tokens have them."""

    def forward(self, maps):
        return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("method", ["std", "picnn"])
def test_weight_on_mutual_information_adds_its_gradient_to_the_step(method):
    images, labels = next(iter(_loader()))
    images = images.double()
    network = _network(method).double()
    gradients = []
    for weight in (0, 5):
        module = InterpretableModule(network, mutual_information_weight=weight)
        module.log = module.log_dict = lambda *arguments, **options: None
        network.zero_grad()
        torch.manual_seed(2)  # the same masks
        module.training_step((images, labels), 0).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    network.zero_grad()
    information = -MutualInformationLoss(3)(network.filter_maps(images), labels)
    information.backward()
    plain, weighted = gradients
    for name, parameter in network.named_parameters():
        # Descent goes down this gradient, so that information grows.
        expected = plain[name]
        if name.startswith("features"):
            assert parameter.grad.any()
            expected = expected - 5 * parameter.grad
        torch.testing.assert_close(weighted[name], expected, rtol=1e-9, atol=1e-9)


def _rates(module, *, loader=None, **options):
    """Of the network in each step."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    _trainer(callbacks=[Watch()], **options).fit(module, loader or _loader())
    return seen


def test_without_epochs_the_cosine_falls_over_the_steps():
    seen = _rates(InterpretableModule(_network(), lr=1.0), max_steps=4)
    assert seen == pytest.approx([(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def test_without_epochs_and_steps_the_cosine_falls_over_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: now[0])

    class Loader(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 2.5
                yield batch

    loader = Loader(_loader().dataset, batch_size=4)
    seen = _rates(InterpretableModule(_network(), lr=1.0), loader=loader, max_time={"seconds": 10})
    assert seen[0] == 1
    assert all(later < earlier for earlier, later in itertools.pairwise(seen))


def test_a_run_without_an_end_has_no_cosine():
    trainer = _trainer(max_epochs=-1, max_steps=-1)
    with pytest.raises(ValueError, match=r"^schedule: got 'cosine' in a run without an end"):
        trainer.fit(InterpretableModule(_network()), _loader())
    with pytest.raises(ValueError, match=r"^warmup_epochs: got 2 without max_epochs"):
        _trainer(max_steps=2).fit(InterpretableModule(_network(), warmup_epochs=2), _loader())


def test_images_with_labels_and_without_are_predicted_alike():
    module = InterpretableModule(_network())
    loader = _loader()
    images = DataLoader(loader.dataset.tensors[0], batch_size=4)
    (pairs, alone) = (torch.cat(_trainer().predict(module, part)) for part in (loader, images))
    assert pairs.shape == (12, 3)
    torch.testing.assert_close(pairs, alone)


def test_a_figure_that_is_a_plain_number_is_logged_every_epoch(monkeypatch):
    record = dataclasses.replace(
        FIGURES["acc1"],
        metric=lambda network, data, draws: MeanMetric(),
        update=lambda metric, seen: metric.update(seen.pooled.mean()),
    )
    monkeypatch.setitem(FIGURES, "brightness", record)
    trainer = _trainer(max_epochs=1)
    trainer.fit(InterpretableModule(_network()), _loader(), _loader())
    assert trainer.callback_metrics["val/brightness"].ndim == 0


def test_a_bare_trainer_trains():
    module = InterpretableModule(_network())
    before = module.network.head[2].weight.clone()
    L.Trainer(accelerator="cpu", max_epochs=1, barebones=True).fit(module, _loader(), _loader())
    assert not torch.equal(before, module.network.head[2].weight)


def test_hyperparameters_are_kept_and_a_checkpoint_loads_into_a_network(tmp_path):
    module = InterpretableModule(_network(), lr=0.02, schedule="constant", seed=4)
    assert module.hparams["lr"] == 0.02
    assert module.hparams["schedule"] == "constant"
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    loaded = InterpretableModule.load_from_checkpoint(tmp_path / "own.ckpt", network=_network())
    assert (loaded.lr, loaded.schedule, loaded.seed) == (0.02, "constant", 4)
    for mine, theirs in zip(loaded.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(RunFolderError, match="is not one of picnn-fast train"):
        InterpretableModule.load_from_checkpoint(tmp_path / "own.ckpt")


def _csg(**options):
    return _network("csg", start=1, period=2, csg_lr=0.05, bound=6.0, penalty_weight=0.5, **options)


def test_epochs_that_take_turns_have_an_optimiser_and_a_schedule_each():
    module = InterpretableModule(_csg(), lr=0.01)
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
            steps = [
                max((int(state["step"]) for state in optimizer.state.values()), default=0)
                for optimizer in trainer.optimizers
            ]
            seen.append((rates, steps))

    trainer = _trainer(max_epochs=5, callbacks=[Watch()])
    trainer.fit(module, _loader(), _loader())
    # Epochs 2 and 4 are of the gate, three batches each; the last is not.
    assert [steps for _, steps in seen] == [[0, 0], [3, 0], [3, 3], [6, 3], [6, 6]]
    std, csg = zip(*(rates for rates, _ in seen), strict=True)
    assert std == pytest.approx([0.01, 0.0075, 0.0075, 0.0025, 0.0025])
    assert csg == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0], abs=1e-12)
    assert "method/density" in trainer.callback_metrics
    assert module.network.ownership().amax(0).tolist() == [1.0] * 6


def test_optimisers_that_take_turns_count_the_steps_of_the_schedule_in_their_own_epochs():
    module = InterpretableModule(_csg(), lr=0.01, schedule="step", schedule_steps=[2])
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    _trainer(max_epochs=7, callbacks=[Watch()]).fit(module, _loader())
    # Epochs 2, 4 and 6 are of the gate.
    std, csg = zip(*seen, strict=True)
    assert std == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001])
    assert csg == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.005, 0.005, 0.005])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_resumed_within_a_period_ends_with_the_same_weights(tmp_path, epochs):
    whole = InterpretableModule(_csg(), lr=0.01, schedule="constant")
    _trainer(max_epochs=5).fit(whole, _loader())
    begun = InterpretableModule(_csg(), lr=0.01, schedule="constant")

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == epochs:
                trainer.should_stop = True

    trainer = _trainer(max_epochs=5, callbacks=[Stop()])
    trainer.fit(begun, _loader())
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    resumed = InterpretableModule(_csg(), lr=0.01, schedule="constant")
    _trainer(max_epochs=5).fit(resumed, _loader(), ckpt_path=tmp_path / "begun.ckpt")
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", ["std", "csg"])
def test_batches_that_make_a_step_together_are_as_one_large_batch(method):
    torch.manual_seed(1)
    images = TensorDataset(torch.rand(16, 1, 4, 4).double(), torch.arange(16) % 3)

    def trained(batch, parts):
        network = _csg() if method == "csg" else _network("std")
        options = {} if method == "std" else {"accumulate_grad_batches": parts}
        sgd = partial(torch.optim.SGD, momentum=0.9)
        module = InterpretableModule(network.double(), lr=0.1, optimizer=sgd, **options)
        given = {"accumulate_grad_batches": parts} if method == "std" else {}
        trainer = _trainer(max_epochs=4, precision="64-true", **given)
        trainer.fit(module, DataLoader(images, batch_size=batch))
        return module.network.state_dict(), trainer.global_step

    whole, steps = trained(8, 1)
    parts, as_many = trained(4, 2)
    assert steps == as_many == 8
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_batches_left_over_at_the_end_of_an_epoch_are_a_step():
    module = InterpretableModule(_csg(), accumulate_grad_batches=2)
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader())  # three batches
    assert trainer.global_step == 2
    with pytest.raises(ValueError, match=r"^accumulate_grad_batches: got 0"):
        InterpretableModule(_csg(), accumulate_grad_batches=0)


def test_epochs_that_take_turns_want_a_number_of_epochs():
    with pytest.raises(ValueError, match="epochs that take turns, want max_epochs"):
        _trainer(max_steps=2).fit(InterpretableModule(_csg()), _loader())
