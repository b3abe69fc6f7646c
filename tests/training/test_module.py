import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from picnn_fast.models import make_interpretable
from picnn_fast.training.config import DivergenceError
from picnn_fast.training.module import InterpretableModule, pathway_logits


def _network(method="picnn"):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return make_interpretable(
        (features, head), method, num_classes=3, num_filters=6, insert_conv=False
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
    module = InterpretableModule(_network(), lr=1e-3, correspondence_lr=0.1, weight_decay=0.05)
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
    module = InterpretableModule(_network(), schedule="constant")
    trainer = _trainer(max_epochs=1)
    trainer.fit(module, _loader(), _loader())
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [1e-3, 0.1]


def test_correspondence_matrix_of_picnn_moves_and_that_of_std_does_not():
    moved = {}
    for method in ("picnn", "std"):
        network = _network(method)
        before = network.correspondence.detach().clone()
        _trainer(max_epochs=1).fit(InterpretableModule(network), _loader(), _loader())
        moved[method] = not torch.equal(before, network.correspondence)
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
    (tested,) = trainer.test(module, _loader(), verbose=False)
    assert tested.keys() == {"test/acc1", "test/acc2", "test/acc3", "test/mis"}


def test_evaluation_repeats_whatever_was_drawn_before():
    network = _network()
    results = []
    for noise in (3, 4):
        torch.manual_seed(noise)
        module = InterpretableModule(network, seed=5)
        results.append(_trainer().test(module, _loader(), verbose=False)[0])
    assert results[0] == results[1]


def test_divergence_stops_with_advice():
    network = _network()
    with torch.no_grad():
        network.head[2].bias.fill_(float("inf"))
    with pytest.raises(DivergenceError, match=r"train/loss is nan in epoch 1.*lower lr"):
        _trainer(max_epochs=1).fit(InterpretableModule(network), _loader(), _loader())


def test_pathways_use_the_filters_their_names_say():
    network = _network()
    labels = torch.tensor([0, 1, 2])
    # Each class owns two filters for certain, and the classifier is certain of the label.
    own = torch.eye(3).repeat_interleave(2, 1)
    with torch.no_grad():
        network.correspondence_weight.copy_(200 * own)
        network.head[2].weight.copy_(50 * own)
        network.head[2].bias.zero_()
    maps = own[labels][:, :, None, None].expand(3, 6, 4, 4)
    logits, masked, complement = pathway_logits(network, maps, labels)
    torch.testing.assert_close(logits, 100 * torch.eye(3))
    torch.testing.assert_close(masked, logits)
    torch.testing.assert_close(complement, torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 0}, "lr"),
        ({"correspondence_lr": float("nan")}, "correspondence_lr"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_bad_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        InterpretableModule(_network(), **options)
