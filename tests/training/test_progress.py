"""What a run says at its start and while it runs, on a terminal and in a log file."""

import io

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from picnn_fast.models import STD, make_interpretable
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.options import Options
from picnn_fast.training.progress import ProgressBar, ProgressLines, native_bfloat16, work
from picnn_fast.training.run import assemble, fit, train

SHORT = {"num_filters": 8, "epochs": 2, "batch_size": 256, "accelerator": "cpu"}


def _fit(*callbacks, epochs=2):
    torch.manual_seed(0)
    network = make_interpretable("small-resnet", "std", num_classes=3, num_filters=4)
    loader = DataLoader(TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3), batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        callbacks=list(callbacks),
    )
    trainer.fit(InterpretableModule(network), loader, loader)


def test_a_run_says_at_once_what_it_does(tmp_path, capsys):
    output = str(tmp_path / "run")
    run = assemble(Options(**SHORT, output=output), tmp_path)
    fit(run)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    parameters = sum(parameter.numel() for parameter in run.network.parameters())
    assert said["device"] == "cpu, precision 32-true"
    assert said["images"] == "digits: 1295 to train on, 360 to test on, 1 x 8 x 8, 10 classes"
    assert said["validation"].startswith("142 of the 1437 training images")
    assert said["network"].startswith("PICNN over small-resnet: 8 filters")
    assert f"{parameters:,} parameters" in said["network"]
    assert said["output"] == output
    assert said["training"] == "2 epochs"


def test_a_run_that_goes_on_says_from_where(tmp_path, capsys):
    output = str(tmp_path / "run")
    train(Options(**{**SHORT, "epochs": 1}, output=output), progress=False)
    train(Options(**SHORT, output=output))
    assert "training    goes on with epoch 2 of 2\n" in capsys.readouterr().out


def test_a_log_file_has_a_line_every_half_minute_and_every_epoch():
    now, lines = [0.0], []

    class Slow(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] += 20

    _fit(Slow(), ProgressLines(clock=lambda: now[0], say=lines.append))
    starts = [line.split("  loss ")[0] for line in lines]
    assert starts == ["epoch 1/2  step 2/3", "epoch 1/2", "epoch 2/2  step 2/3", "epoch 2/2"]
    assert lines[0].endswith("  0:01:20 left")
    assert "acc1" in lines[1]
    assert lines[-1].endswith("  0:00:00 left")


class Reads(STD):
    """A method that reads the training images before each epoch, 20 seconds a batch."""

    def __init__(self, now, *arguments):
        super().__init__(*arguments)
        self.now, self.read = now, []

    def begin_epoch(self, epoch, batches=None, epochs=None, *, images=None):
        self.read.append([])
        for batch, labels in images:
            assert batch.shape[1:] == (1, 8, 8)
            self.read[-1] += labels.tolist()
            self.now[0] += 20


def _fit_a_reader(now, *callbacks, **options):
    features, head = nn.Conv2d(1, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    network = Reads(now, features, head, 3, 4)
    images = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    loader = DataLoader(images, batch_size=4, shuffle=True, **options)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        callbacks=list(callbacks),
    )
    trainer.fit(InterpretableModule(network), loader)
    assert trainer.global_step == 6
    return network.read


def test_a_method_that_reads_the_images_for_long_says_so_in_a_log_file():
    now, lines = [0.0], []
    _fit_a_reader(now, ProgressLines(clock=lambda: now[0], say=lines.append))
    assert lines[0] == "epoch 1/2  reads the training images first: 2/3 batches"
    assert [line.split("  loss ")[0] for line in lines[1:]] == [
        "epoch 1/2",
        "epoch 2/2  reads the training images first: 2/3 batches",
        "epoch 2/2",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_once_an_epoch_and_a_loader_that_is_trained_on_is_left_alone(workers):
    read = _fit_a_reader([0.0], num_workers=workers, persistent_workers=workers > 0)
    assert read == [[0, 1, 2] * 4] * 2


def test_a_bar_says_that_images_are_read():
    written = io.StringIO()
    _fit_a_reader([0.0], ProgressBar(Console(file=written, force_terminal=True, width=160)))
    assert "epoch 1/2  reads the training images first: 1/3" in written.getvalue()


def test_a_terminal_has_a_bar_over_all_steps_with_loss_and_time_left():
    written = io.StringIO()
    _fit(ProgressBar(Console(file=written, force_terminal=True, width=120)))
    text = written.getvalue()
    assert "epoch 2/2" in text
    assert "6/6" in text
    assert "loss " in text
    assert "left" in text


@pytest.mark.parametrize(
    ("has", "native"), [({"amx_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)]
)
def test_units_for_bfloat16_are_those_that_torch_tells_of(monkeypatch, has, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert native_bfloat16(torch.device("cpu")) is native


def test_a_version_of_torch_that_tells_nothing_is_taken_to_have_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not native_bfloat16(torch.device("cpu"))


def test_the_share_of_the_target_layer_is_counted_in_multiplications():
    features = nn.Conv2d(3, 5, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2))
    network = make_interpretable(
        (features, head), "std", num_classes=2, num_filters=7, in_channels=5, insert_kernel=1
    )
    cost = work(network.eval(), torch.rand(1, 3, 4, 4), inserted=True)
    backbone, added = 16 * 3 * 5, 16 * 5 * 7 + 7 * 2
    assert cost.share == pytest.approx(added / (backbone + added))
    assert cost.parameters == 3 * 5 + 5 + 5 * 7 + 7 + 7 * 2 + 2
    assert cost.image_shape == (3, 4, 4)
