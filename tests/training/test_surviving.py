"""Runs that are interrupted within an epoch go on as if nothing had happened."""

import dataclasses
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from picnn_fast.models import METHODS
from picnn_fast.training.checkpoint import WholeCheckpoints, load_checkpoint, read_checkpoint
from picnn_fast.training.module import DivergenceError, InterpretableModule
from picnn_fast.training.run import assemble, build_data, read_history, train
from picnn_fast.training.run_folder import RunFolderError
from tests.processes import as_module, finished
from tests.training.kill import differences, options_of, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, side=32)
    return root


def fit(options, folder, progress=False):
    run = assemble(options, folder, progress=progress)
    last = folder / "last.ckpt"
    run.trainer.fit(run.module, run.data, ckpt_path=last if last.exists() else None)
    return run


def with_a_power_cut(options, folder, monkeypatch, after):
    """Training that breaks off after so many steps."""
    original = InterpretableModule.training_step

    def step(self, batch, number):
        if self.trainer.global_step == after:
            raise RuntimeError("power cut")
        return original(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(InterpretableModule, "training_step", step)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(options, folder)


@pytest.fixture
def drawn(monkeypatch):
    """What each step that is made finds in the generators that a network may draw from."""
    original, numbers = InterpretableModule.training_step, []

    def step(self, batch, number):
        on_device = (torch.rand((), device=device).item() for device in ("cpu", self.device))
        numbers.append([*on_device, np.random.random(), random.random()])  # noqa: NPY002
        return original(self, batch, number)

    monkeypatch.setattr(InterpretableModule, "training_step", step)
    return numbers


def assert_goes_on(options, folder, monkeypatch, drawn):
    drawn.clear()
    fit(options, folder / "whole")
    for after in (1, 4, 10):
        with_a_power_cut(options, folder / "cut", monkeypatch, after)
    fit(options, folder / "cut")
    assert drawn[12:] == drawn[:12]
    assert differences(folder / "whole", folder / "cut") == []
    assert read_history(folder / "cut") == read_history(folder / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_within_an_epoch_ends_like_one_left_alone(
    images, tmp_path, monkeypatch, drawn, method
):
    options = options_of("std" if method == "explainer" else method, images, tmp_path / "run")
    if method == "explainer":
        data = {**options.data, "image_size": 32}
        told = {"data": data, "insert_conv": False, "num_filters": None}
        plain = options_of("std", images, tmp_path, backbone="small-vgg", epochs=1, **told)
        fit(plain, tmp_path / "performer")
        explained = {"name": method, "performer": str(tmp_path / "performer")}
        options = options_of(explained, images, tmp_path / "run", **told)
    assert_goes_on(options, tmp_path, monkeypatch, drawn)


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_goes_on_within_an_epoch_ends_like_one_left_alone(
    images, tmp_path, monkeypatch, drawn
):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = options_of("picnn", images, tmp_path / "run", accelerator="gpu")
    assert_goes_on(options, tmp_path, monkeypatch, drawn)


@pytest.mark.parametrize("method", ["picnn", "csg"])
def test_no_checkpoint_is_written_between_the_batches_of_a_step(
    images, tmp_path, monkeypatch, method
):
    saved = []
    save = L.Trainer.save_checkpoint

    def watched(trainer, *arguments, **options):
        saved.append((trainer.current_epoch, trainer.fit_loop.batch_idx))
        save(trainer, *arguments, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", watched)
    # Of an epoch's three batches the first two make a step, and the third.
    options = options_of(method, images, tmp_path, epochs=2, accumulate_grad_batches=2)
    fit(options, tmp_path / "run")
    assert [batch for _, batch in saved] == [1, 2, 1, 2]


def test_a_run_that_is_killed_goes_on_to_the_same_weights_and_figures():
    # Of each method once; by hand twenty times each.
    command = ["tests.training.kill", "--kills", "1", "--method", "picnn", "csg", "icnn"]
    done = finished(as_module, command)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("1/1 runs killed once end like one left alone") == 3


def batches_of(options, epoch=3, state=None, **data):
    module = build_data(dataclasses.replace(options, data={**options.data, **data}))
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    if state is not None:
        loader.load_state_dict(state)
    return loader, list(loader)


def test_images_are_changed_alike_whoever_reads_them_and_wherever_a_pass_begins(images, tmp_path):
    options = options_of("std", images, tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader, whole = batches_of(options)
    assert torch.equal(torch.get_rng_state(), before)
    state = loader.state_dict()
    assert state == {"batches": len(whole)} == {"batches": 3}
    torch.manual_seed(2)
    _, later = batches_of(options, state={"batches": 1}, num_workers=1)
    for one, two in zip(whole[1:], later, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    again = list(loader)
    assert len(again) == 3
    assert torch.equal(again[0][0], whole[0][0])
    assert not torch.equal(batches_of(options, epoch=4)[1][0][0], whole[0][0])


def test_a_run_goes_on_within_an_epoch_with_another_number_of_processes(
    images, tmp_path, monkeypatch, capsys
):
    options = options_of("picnn", images, tmp_path / "run", epochs=1, batch_size=4)
    with_a_power_cut(options, tmp_path, monkeypatch, 1)
    seeds = [options.seed, torch.initial_seed()]  # of the run, of the epoch
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    # As three processes write it after a step each.
    content["picnn_fast_epoch"]["ranks"] *= 3
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"batches": 3}]
    torch.save(content, path)
    run = fit(options, tmp_path, progress=True)
    assert run.trainer.global_step == 3  # of five batches two were left
    assert torch.initial_seed() not in seeds
    assert (
        "training    goes on with epoch 1 of 1, after 3 of its 5 steps" in capsys.readouterr().out
    )
    (row,) = read_history(tmp_path)
    assert 0 < row["train/loss"] < 5


def test_the_network_of_a_checkpoint_within_an_epoch_begins_a_run_of_its_own(
    images, tmp_path, monkeypatch
):
    options = options_of("icnn", images, tmp_path / "run", epochs=1)
    with_a_power_cut(options, tmp_path, monkeypatch, 1)
    module = InterpretableModule.load_from_checkpoint(tmp_path / "last.ckpt")
    begun = []
    monkeypatch.setattr(module.network, "begin_epoch", lambda *a, **given: begun.append(a))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(module, build_data(options))
    assert begun == [(1, 3, 1)]
    assert trainer.global_step == 3


def test_a_run_that_diverges_within_an_epoch_leaves_its_last_good_checkpoint(
    images, tmp_path, monkeypatch
):
    options = options_of("std", images, tmp_path / "run", epochs=1, batch_size=4)
    last = tmp_path / ".run.partial" / "last.ckpt"

    original = InterpretableModule.optimizer_step
    for value, told in ((torch.nan, "nan"), (3e38, "inf|nan")):

        def breaks(self, *arguments, value=value, **given):
            original(self, *arguments, **given)
            if self.trainer.global_step == 2:  # the third is about to be counted
                with torch.no_grad():
                    next(self.network.parameters()).fill_(value)

        with monkeypatch.context() as patch:
            patch.setattr(InterpretableModule, "optimizer_step", breaks)
            with pytest.raises(DivergenceError, match=f"after the last step is ({told}) in epoch"):
                train(options, progress=False)
        assert read_checkpoint(last)["global_step"] == 2
        network, _, _ = load_checkpoint(last)
        assert all(parameter.isfinite().all() for parameter in network.parameters())
    # How often a checkpoint is written makes no other run.
    assert train(dataclasses.replace(options, checkpoint_every=None), progress=False)["acc1"] >= 0


def test_a_checkpoint_that_is_cut_short_is_told_with_what_to_do(images, tmp_path, monkeypatch):
    options = options_of("std", images, tmp_path / "run", epochs=1, batch_size=4)
    with_a_power_cut(options, tmp_path, monkeypatch, 2)
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunFolderError, match=rf"last\.ckpt is .*; remove {tmp_path} to") as e:
            fit(options, tmp_path)
        assert "\n" not in str(e.value)


def test_the_best_epoch_is_kept_whichever_of_its_two_checkpoints_a_kill_comes_before(
    images, tmp_path, monkeypatch
):
    given = {"epochs": 3, "checkpoint_every": None, "report_epoch": "best_on_validation"}
    options = options_of("std", images, tmp_path / "run", **given)
    original = WholeCheckpoints.save_checkpoint
    monkeypatch.setattr(
        InterpretableModule,
        "on_validation_epoch_end",
        lambda self: self.log("val/acc1", [0.2, 0.9, 0.1][self.current_epoch]),
    )
    fit(options, tmp_path / "whole")
    for name in ("last.ckpt", "best.ckpt"):

        def save(self, content, path, storage_options=None, name=name):
            if content["epoch"] == 1 and Path(path).name == name:
                raise RuntimeError("power cut")
            original(self, content, path)

        with monkeypatch.context() as patch:
            patch.setattr(WholeCheckpoints, "save_checkpoint", save)
            with pytest.raises(RuntimeError, match="power cut"):
                fit(options, tmp_path / name)
        fit(options, tmp_path / name)
        for file in ("last.ckpt", "best.ckpt"):
            assert differences(tmp_path / "whole", tmp_path / name, file) == []
        assert read_checkpoint(tmp_path / name / "best.ckpt")["epoch"] == 1
