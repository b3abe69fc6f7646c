import ast
import dataclasses
import errno
import functools
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from picnn_fast.backbones import cut
from picnn_fast.data import DATA
from picnn_fast.data.images import PictureFiles
from picnn_fast.evaluation import FIGURES, default_figures, evaluate
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.training import checkpoint, launch, run
from picnn_fast.training.checkpoint import find_checkpoints, load_checkpoint
from picnn_fast.training.module import DivergenceError, InterpretableModule
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run import assemble, build_data, fit, read_history, train, try_image
from picnn_fast.training.run_folder import RunFolderError


@pytest.fixture
def folder_of_images(tmp_path):
    """Two classes of 16-pixel noise, dark and bright."""
    root = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("bright", 120), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (16, 16, 3), generator=generator) + level
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def config(folder_of_images, tmp_path):
    return Options(
        output=str(tmp_path / "runs" / "one"),
        data={
            "name": "folder",
            "root": str(folder_of_images),
            "image_size": 8,
            "num_workers": 0,
            "validation": 0.25,
        },
        num_filters=8,
        batch_size=8,
        epochs=3,
        accelerator="cpu",
    )


def _with(options, group, **values):
    return dataclasses.replace(options, **{group: {**getattr(options, group), **values}})


def _fit(options, folder):
    return fit(assemble(options, folder, progress=False), progress=False)


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _stop_after(epochs, monkeypatch):
    """Training that breaks off once ``epochs`` have been written down."""
    original = InterpretableModule.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == epochs:
            raise RuntimeError("power cut")
        original(self)

    monkeypatch.setattr(InterpretableModule, "on_train_epoch_start", interrupt)


def test_train_writes_a_complete_folder(config, tmp_path):
    metrics = train(config, progress=False)
    output = tmp_path / "runs" / "one"
    assert json.loads((output / "metrics.json").read_text()) == {"picnn": metrics}
    assert metrics.keys() >= set(default_figures())
    assert {p.name for p in output.iterdir()} == {
        "metrics.json",
        "last.ckpt",
        "run.json",
        "csv",
        "tensorboard",
    }
    assert any((output / "tensorboard").iterdir())
    history = read_history(output)
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert all({"train/loss", "val/acc1", "val/acc3"} <= row.keys() for row in history)
    assert [p.name for p in output.parent.iterdir()] == ["one"]


def test_without_tensorboard_logs_are_csv_alone_and_that_is_said(config, monkeypatch, tmp_path):
    def missing(*arguments, **options):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr(run, "TensorBoardLogger", missing)
    with pytest.warns(UserWarning, match="tensorboard is not installed.*pip install"):
        train(dataclasses.replace(config, epochs=1), progress=False)
    output = tmp_path / "runs" / "one"
    assert len(read_history(output)) == 1
    assert not (output / "tensorboard").exists()


def test_everything_is_built_once(config, monkeypatch):
    built = []
    for module, name in (
        (run, "build_data"),
        (run, "build_network"),
        (run, "InterpretableModule"),
        (run.L, "Trainer"),
    ):
        original = getattr(module, name)

        def counted(*arguments, name=name, original=original, **options):
            built.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    read = []
    monkeypatch.setattr(checkpoint.torch, "load", lambda *a, **o: read.append(a))
    train(dataclasses.replace(config, epochs=1), progress=False)
    assert sorted(built) == ["InterpretableModule", "Trainer", "build_data", "build_network"]
    assert not read


def test_mutual_information_weight_reaches_the_loss(config, tmp_path):
    terms = []
    for weight in (0.0, 2.0):
        folder = tmp_path / str(weight)
        _fit(dataclasses.replace(config, epochs=1, mutual_information_weight=weight), folder)
        terms.append(read_history(folder)[0].get("train/mutual_information"))
    assert terms[0] is None
    assert -2 * math.log(2) < terms[1] < 0


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_ends_like_an_uninterrupted_one(config, tmp_path, monkeypatch, workers):
    _assert_resumes(_with(config, "data", num_workers=workers), tmp_path, monkeypatch)


@pytest.mark.gpu
def test_resumed_run_on_a_gpu_ends_like_an_uninterrupted_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    _assert_resumes(dataclasses.replace(config, accelerator="gpu"), tmp_path, monkeypatch)


def _assert_resumes(config, tmp_path, monkeypatch):
    whole = train(config, progress=False)
    second = dataclasses.replace(config, output=str(tmp_path / "runs" / "two"))
    with monkeypatch.context() as patch:
        _stop_after(2, patch)
        with pytest.raises(RuntimeError, match="power cut"):
            train(second, progress=False)
    assert not (tmp_path / "runs" / "two").exists()
    resumed = train(second, progress=False)
    assert resumed == whole
    one, two = (_weights(tmp_path / "runs" / name / "last.ckpt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_history(tmp_path / "runs" / "two") == read_history(tmp_path / "runs" / "one")


def test_a_run_begins_with_the_weights_of_a_file_that_it_never_needs_again(
    config, tmp_path, monkeypatch
):
    features = cut("small-resnet", image_channels=3).features.eval()
    file = tmp_path / "weights.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, file)
    config = _with(config, "backbone", name="small-resnet", weights=str(file))
    begun = assemble(config, tmp_path, progress=False).network.features[0]
    torch.testing.assert_close(begun.state_dict(), features.state_dict(), rtol=0, atol=0)

    with monkeypatch.context() as patch:
        _stop_after(2, patch)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, progress=False)
    file.unlink()
    figures = train(config, progress=False)
    assert train(dataclasses.replace(config, epochs=4), progress=False).keys() == figures.keys()
    output = Path(config.output)
    network, options, _ = load_checkpoint(output / "last.ckpt")
    assert options.backbone["weights"] == str(file)
    saved = _weights(output / "last.ckpt")
    assert all(torch.equal(saved[f"network.{k}"], v) for k, v in network.state_dict().items())
    with pytest.raises(ConfigError, match=r"^backbone\.weights: got '.*pth', want a file that is"):
        train(config, overwrite=True, progress=False)


def test_a_checkpoint_is_loaded_without_downloading_trained_weights(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models.resnet.ResNet18_Weights, "get_state_dict", asked.append)
    options = _with(config, "backbone", name="resnet18", weights="DEFAULT")
    network = checkpoint.build_network(options, 2, 3, weights=False)
    saved = {"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}
    saved["picnn_fast"] = checkpoint.SaveOptions(options, build_data(options)).saved
    checkpoint.WholeCheckpoints().save_checkpoint(saved, tmp_path / "x.ckpt")
    loaded, options, _ = load_checkpoint(tmp_path / "x.ckpt")
    assert options.backbone["weights"] == "DEFAULT"
    assert torch.equal(loaded.features[0].conv1.weight, network.features[0].conv1.weight)
    assert not asked


def test_a_network_of_timm_is_trained_by_its_name(config):
    pytest.importorskip("timm")
    config = _with(config, "data", image_size=64)
    config = _with(dataclasses.replace(config, epochs=1), "backbone", name="timm:test_convnext")
    assert train(config, progress=False)["acc1"] >= 0
    assert load_checkpoint(Path(config.output) / "last.ckpt")[1] == config
    config = _with(config, "backbone", name="timm:vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"^insert_conv: got True, want False"):
        train(config, overwrite=True, progress=False)
    config = dataclasses.replace(config, insert_conv=False, num_filters=None)
    with pytest.raises(
        ConfigError, match=r"^backbone: timm:vit_tiny_patch16_224 cannot take images of 64"
    ):
        train(config, overwrite=True, progress=False)


def test_seed_decides_the_weights(config, tmp_path):
    paths = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        torch.manual_seed(len(paths))
        _fit(dataclasses.replace(config, epochs=1, seed=seed), folder)
        paths.append(_weights(folder / "last.ckpt"))
    same = [all(torch.equal(paths[0][k], other[k]) for k in other) for other in paths[1:]]
    assert same == [True, False]


def _epoch(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["epoch"]


def test_complete_run_is_read_back_and_another_is_refused(config, monkeypatch):
    first = train(dataclasses.replace(config, epochs=1), progress=False)
    monkeypatch.setattr(run, "assemble", None)
    assert train(dataclasses.replace(config, epochs=1), progress=False) == first
    with pytest.raises(RunFolderError, match="seed 0, now 1"):
        train(dataclasses.replace(config, epochs=1, seed=1), progress=False)


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_more_epochs_go_on_from_the_last_one(config, tmp_path, capsys, schedule):
    config = dataclasses.replace(config, schedule=schedule, schedule_steps=[2])
    whole = train(config, progress=False)
    shorter = dataclasses.replace(config, output=str(tmp_path / "runs" / "two"), epochs=1)
    train(shorter, progress=False)
    capsys.readouterr()
    assert train(dataclasses.replace(shorter, epochs=3)) == whole
    assert "goes on with a run of 1 epoch\n" in capsys.readouterr().out
    one, two = (_weights(tmp_path / "runs" / name / "last.ckpt") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_history(tmp_path / "runs" / "two") == read_history(tmp_path / "runs" / "one")
    with pytest.raises(RunFolderError, match="epochs 3, now 2"):
        train(dataclasses.replace(shorter, epochs=2), progress=False)


def test_a_cosine_that_goes_on_follows_its_new_length_and_says_so(config, monkeypatch, capsys):
    rates = []
    original = InterpretableModule.training_step

    def noted(self, batch, batch_idx):
        if batch_idx == 0:
            rates.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(InterpretableModule, "training_step", noted)
    config = dataclasses.replace(config, epochs=2)
    train(config, progress=False)
    capsys.readouterr()
    train(dataclasses.replace(config, epochs=4))
    line = "its cosine was of that length, so this is not the run that 4 epochs from the start"
    assert line in capsys.readouterr().out
    shares = [(1 + math.cos(math.pi * t)) / 2 for t in (0, 1 / 2, 2 / 4, 3 / 4)]
    assert rates == pytest.approx([1e-3 * share for share in shares])


def test_the_same_run_is_known_by_another_path_and_number_of_workers(config, tmp_path, monkeypatch):
    first = train(dataclasses.replace(config, epochs=1), progress=False)
    monkeypatch.setattr(run, "assemble", None)
    monkeypatch.chdir(tmp_path)
    for root in ("images", "images/", "./images", str(tmp_path / "images" / "..") + "/images"):
        same = _with(dataclasses.replace(config, epochs=1), "data", root=root, num_workers=2)
        assert train(same, progress=False) == first


def _noted(options, monkeypatch, change):
    """A complete run, whose record was changed."""
    monkeypatch.setattr(run, "fit", lambda *arguments, **given: dict.fromkeys(FIGURES, 0.5))
    train(options, progress=False)
    path = Path(options.output) / "run.json"
    record = json.loads(path.read_text())
    change(record["config"])
    path.write_text(json.dumps(record))
    monkeypatch.setattr(run, "assemble", None)


def test_a_record_without_options_that_are_new_is_of_their_defaults(config, monkeypatch):
    def without(noted):
        del noted["channels_last"], noted["insert_kernel"], noted["method"]["mask_at"]
        del noted["data"]["flip"]

    _noted(config, monkeypatch, without)
    assert train(config, progress=False) == dict.fromkeys(FIGURES, 0.5)
    with pytest.raises(RunFolderError, match=r"options: insert_kernel 3, now 1\. Replace"):
        train(dataclasses.replace(config, insert_kernel=1), progress=False)


FLAT = {"method": "picnn", "lr": 0.001, "sampling": "bernoulli", "data": "folder", "crop": "none"}


@pytest.mark.parametrize(
    "earlier",
    [FLAT, {"kernel": 3}, {"method": {"name": "picnn", "sharpness": 2.0}}, {"method": "pathway"}],
)
def test_a_run_of_an_earlier_version_is_told_in_a_line(config, monkeypatch, earlier):
    _noted(config, monkeypatch, lambda noted: noted.update(earlier))
    with pytest.raises(
        RunFolderError, match="other options: it was made by an earlier picnn_fast"
    ) as e:
        train(config, progress=False)
    assert len(str(e.value)) < 300 + len(config.output)


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_a_run_does_not_go_on_with_other_classes(config, tmp_path, monkeypatch, change):
    for split in ("train", "test"):
        folder = tmp_path / "images" / split
        shutil.copytree(folder / "dark", folder / "black")
    with monkeypatch.context() as patch:
        _stop_after(1, patch)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, progress=False)
    for split in ("train", "test"):
        folder = tmp_path / "images" / split
        if change == "added":
            shutil.copytree(folder / "dark", folder / "grey")
        elif change == "removed":
            shutil.rmtree(folder / "dark")
        else:
            (folder / "dark").rename(folder / "a")
    message = (
        r"is of other classes \(3: black, bright, dark\) than the data \(\d: .*; remove .*partial"
    )
    with pytest.raises(RunFolderError, match=message) as caught:
        train(config, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_weights_that_the_last_step_breaks_are_not_saved(config, validation):
    # All images in one step: no other loss tells.
    one = dataclasses.replace(
        _with(config, "data", validation=validation), epochs=1, batch_size=100
    )
    broken = _with(one, "optimizer", lr=1e25)
    for _ in range(2):
        with pytest.raises(
            DivergenceError, match=r"the largest logit after .* in epoch 1: .*lower"
        ):
            train(broken, progress=False)
    assert train(one, progress=False)["acc1"] >= 0


def test_a_look_at_the_last_step_changes_nothing(config, tmp_path, monkeypatch):
    _fit(config, tmp_path / "looked")
    monkeypatch.delattr(InterpretableModule, "on_train_batch_end")
    _fit(config, tmp_path / "blind")
    looked, blind = (_weights(tmp_path / name / "last.ckpt") for name in ("looked", "blind"))
    assert all(torch.equal(looked[name], blind[name]) for name in blind)


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_half_precision_on_a_cpu_is_refused(config, monkeypatch, accelerator):
    monkeypatch.setattr(launch.CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(launch.MPSAccelerator, "is_available", lambda: False)
    config = dataclasses.replace(config, precision="16-mixed", accelerator=accelerator)
    with pytest.raises(ConfigError, match=r"^precision: got '16-mixed' on a CPU, want bf16-mixed"):
        train(config, progress=False)


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_with_more_space(
    config, tmp_path, monkeypatch
):
    save, saved = torch.save, []

    def filling(content, file):
        saved.append(None)
        if len(saved) < 3:
            return save(content, file)
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:  # as torch tells it
            raise RuntimeError("[enforce fail] . unexpected pos 704 vs 598")  # noqa: B904

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", filling)
        message = (
            r"no space left in .*one.partial \(No space.*\); the last checkpoint is .*last.ckpt"
        )
        with pytest.raises(RunFolderError, match=message) as caught:
            train(config, progress=False)
    assert "\n" not in str(caught.value)
    assert _epoch(tmp_path / "runs" / ".one.partial") == 1
    train(config, progress=False)
    assert _epoch(tmp_path / "runs" / "one") == 2


def test_a_limit_on_the_size_of_files_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    content = {"weights": torch.ones(100)}
    checkpoint.WholeCheckpoints().save_checkpoint(content, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.WholeCheckpoints().save_checkpoint({"weights": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(torch.load(path, weights_only=True)["weights"], content["weights"])
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_reading_process_that_is_killed_is_told_in_a_line(config, monkeypatch):
    original = PictureFiles.open

    def killed(self, *place):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *place)

    monkeypatch.setattr(PictureFiles, "open", killed)
    # How long torch waits for an answer, and for its processes to end, seconds.
    reader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(reader._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(ConfigError, match=r"^data.num_workers: a process .* killed \(") as caught:
        train(_with(config, "data", num_workers=1), progress=False)
    assert "\n" not in str(caught.value)


def test_checkpoint_gives_back_the_network_and_its_figures(config, tmp_path):
    metrics = train(dataclasses.replace(config, epochs=1), progress=False)
    (path,) = find_checkpoints(config.output)
    network, saved, names = load_checkpoint(path)
    assert (saved.epochs, names) == (1, ["bright", "dark"])
    assert not network.training
    assert evaluate(network, build_data(saved), seed=saved.seed) == metrics


def test_metrics_that_cannot_be_read_back_are_named(config, tmp_path):
    config = dataclasses.replace(config, epochs=1)
    train(config, progress=False)
    path = tmp_path / "runs" / "one" / "metrics.json"
    figures = json.loads(path.read_text())["picnn"]
    for text in (
        "{",
        "[]",
        "null",
        json.dumps({"std": figures}),
        json.dumps({"picnn": 0.5}),
        json.dumps({"picnn": {}}),
        json.dumps({"picnn": {**figures, "acc1": "high"}}),
        None,
    ):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(RunFolderError, match=r"metrics.json cannot be read: .*--overwrite"):
            train(config, progress=False)


def test_metrics_of_an_earlier_version_are_read_with_what_they_lack(config, monkeypatch, capsys):
    _noted(config, monkeypatch, lambda noted: None)
    path = Path(config.output) / "metrics.json"
    path.write_text(json.dumps({"picnn": {"acc1": 0.75, "purity": 0.5}}))
    figures = train(config, progress=False)
    assert (figures["acc1"], figures["purity"], figures["mis"][:5]) == (0.75, 0.5, "n/a: ")
    assert figures.keys() > set(default_figures())


def test_a_damaged_checkpoint_is_not_gone_on_from(config, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "last.ckpt").write_text("hello")
    with pytest.raises(RunFolderError, match=f"is not one of picnn-fast train; remove {work}"):
        _fit(config, work)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("state_dict"),
        lambda content: content["state_dict"].popitem(),
        lambda content: content.update(state_dict=None),
        lambda content: content.update(state_dict=[1.0]),
        lambda content: content.update(state_dict={0: torch.zeros(1)}),
        lambda content: content["picnn_fast"].update(class_names=None),
        lambda content: content["picnn_fast"].update(num_classes="two"),
        lambda content: content["picnn_fast"].pop("class_names"),
        lambda content: content["picnn_fast"].update(num_classes=5),
        lambda content: content["picnn_fast"]["config"].update(epochs=0),
        lambda content: content["picnn_fast"]["config"].update(colour="red"),
    ],
)
def test_damaged_checkpoints_are_told_in_one_line(config, tmp_path, damage):
    made = assemble(config, tmp_path, progress=False)
    content = {"state_dict": made.module.state_dict()}
    saving = checkpoint.SaveOptions(config, made.data)
    saving.on_save_checkpoint(made.trainer, made.module, content)
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    load_checkpoint(path)
    damage(content)
    torch.save(content, path)
    with pytest.raises(RunFolderError, match=f"^checkpoint: {path} is damaged, or of an") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_one_wrong_bit_or_an_empty_block_is_damage(config, tmp_path):
    made = assemble(config, tmp_path, progress=False)
    content = {"state_dict": made.module.state_dict()}
    saving = checkpoint.SaveOptions(config, made.data)
    saving.on_save_checkpoint(made.trainer, made.module, content)
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [0, 1, 2, len(whole) - 22] + [draw.randrange(len(whole)) for _ in range(60)]
    told = []
    for i, place in enumerate(places):
        damaged = bytearray(whole)
        if i % 4:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            start = min(place, len(whole) - 4096)
            damaged[start : start + 4096] = bytes(4096)
        path.write_bytes(damaged)
        try:
            state = checkpoint.read_checkpoint(path)["state_dict"]
        except RunFolderError as error:
            told.append(str(error))
        else:  # a field of the archive that nothing depends on
            assert all(torch.equal(state[key], content["state_dict"][key]) for key in state)
    assert len(told) > 50
    message = rf"checkpoint: {path} is damaged: .* is not as it was saved"
    assert [text for text in told if not re.fullmatch(message, text)] == []


def test_a_checkpoint_has_its_checksums_whatever_the_process_is_set_to(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        content = {"picnn_fast": {"config": {}}, "weights": torch.ones(5)}
        checkpoint.WholeCheckpoints().save_checkpoint(content, tmp_path / "x.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read_checkpoint(tmp_path / "x.ckpt")["weights"].sum() == 5


def test_a_checkpoint_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def denied(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.ckpt").touch()
    monkeypatch.setattr(checkpoint.torch, "load", denied)
    with pytest.raises(RunFolderError, match=r"cannot read .*x\.ckpt: Permission denied"):
        load_checkpoint(tmp_path / "x.ckpt")


def _encoded(kind):
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(1))
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, kind)
    return file.getvalue()


def _half(kind):
    content = _encoded(kind)
    return content[: len(content) // 2]


def _bad_data():
    content = bytearray(_encoded("PNG"))
    content[2000] ^= 255
    return bytes(content)


def _oversized():
    content = _encoded("PNG")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize(
    ("name", "content", "problem", "split", "workers"),
    [
        ("x.png", _half("PNG"), "truncated", "test", 0),
        ("x.jpg", _half("JPEG"), "truncated", "train", 0),
        ("x.png", _bad_data(), "broken", "test", 0),
        ("x.png", b"no image", "cannot identify", "test", 0),
        ("x.png", _oversized(), "exceeds limit", "test", 0),
        # Once: torch takes 5 s to end a worker that has raised.
        ("x.png", _oversized(), "exceeds limit", "train", 1),
    ],
    ids=["half a PNG", "half a JPEG", "bad data", "no image", "oversized header", "worker"],
)
def test_an_image_that_cannot_be_read_is_told_in_one_line(
    config, tmp_path, name, content, problem, split, workers
):
    path = tmp_path / "images" / split / "dark" / name
    path.write_bytes(content)
    config = dataclasses.replace(_with(config, "data", num_workers=workers), epochs=1)
    message = rf"^data: {path} cannot be read as an image \(.*{problem}.*\)$"
    with pytest.raises(ConfigError, match=message) as caught:
        train(config, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError("quota exceeded"), FileNotFoundError(2, "No such file")])
def test_an_error_of_a_log_is_not_one_of_the_data(config, tmp_path, monkeypatch, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(run.CSVLogger, "save", refuse)
    with pytest.raises(OSError, match=r"quota|No such") as caught:
        _fit(config, tmp_path / "work")
    assert caught.value is error


def test_half_written_checkpoint_is_never_seen(config, tmp_path, monkeypatch):
    _fit(dataclasses.replace(config, epochs=1), tmp_path / "work")
    before = (tmp_path / "work" / "last.ckpt").read_bytes()

    def disk_full(checkpoint, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.WholeCheckpoints().save_checkpoint({}, tmp_path / "work" / "last.ckpt")
    assert (tmp_path / "work" / "last.ckpt").read_bytes() == before
    assert not list((tmp_path / "work").glob(".last*"))


def test_foreign_files_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no last\.ckpt"):
        find_checkpoints(tmp_path)
    path = tmp_path / "x.ckpt"
    path.write_text("hello")
    with pytest.raises(RunFolderError, match="not one of picnn-fast"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits", "backbone": "vgg-m"}, "backbone: vgg-m cannot take images of 8 x 8"),
        ({"optimizer": {"weight_decay": -1.0}}, "^optimizer: Invalid weight_decay value: -1.0"),
        ({"method": {"interpretation_weight": -1.0}}, r"^method\.interpretation_weight: got -1\.0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: got 0, want an integer >= 1"),
        ({"category": "grey"}, "^category: got 'grey', want one of 'bright', 'dark'"),
        ({"insert_conv": False, "num_filters": 5}, "num_filters: got 5 with insert_conv=False"),
        ({"backbone": "resnet18", "batch_size": 1}, "batch_size: got 1, want at least 2: Expected"),
    ],
)
def test_options_that_do_not_go_together_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **options), progress=False)


def test_a_network_is_trained_as_the_compiler_makes_it(config, tmp_path, monkeypatch):
    made = []

    def compiler(graph, inputs):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    states = []
    for compiled in (True, False):
        options = dataclasses.replace(config, compile=compiled, epochs=1)
        run = assemble(options, tmp_path, progress=False)
        run.trainer.fit(run.module, run.data)
        states.append(run.network.state_dict())
        assert made
    torch.testing.assert_close(*states)


def test_what_the_compiler_cannot_do_is_told_in_a_line(config, monkeypatch):
    def compiler(graph, inputs):
        raise RuntimeError("no compiler of C++")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    with pytest.raises(ConfigError, match=r"^compile: .* no compiler of C\+\+"):
        train(dataclasses.replace(config, compile=True), progress=False)


@pytest.mark.parametrize(("method", "by_trainer"), [("std", 3), ("csg", 1)])
def test_batches_of_a_step_are_counted_by_the_trainer_or_where_optimisers_take_turns_here(
    config, method, by_trainer
):
    options = dataclasses.replace(config, method=method, accumulate_grad_batches=3)
    run = assemble(options, Path(config.output))
    assert run.trainer.accumulate_grad_batches == by_trainer
    assert run.module.accumulate_grad_batches == 3


def test_a_run_that_cannot_start_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(launch.MPSAccelerator, "is_available", lambda: False)
    for accelerator in ("gpu", "mps"):
        with pytest.raises(ConfigError, match=f"^accelerator: got '{accelerator}', but"):
            train(dataclasses.replace(config, accelerator=accelerator), progress=False)
    with pytest.raises(ConfigError, match=r"^data\.root: .*birds.*"):
        train(_with(config, "data", root=str(tmp_path / "birds")), progress=False)
    (tmp_path / "images" / "test" / "dark").rename(tmp_path / "dark")
    (tmp_path / "images" / "test" / "dark").mkdir()
    with pytest.raises(ConfigError, match=r"^data.*dark"):
        train(config, progress=False)
    (tmp_path / "images" / "test" / "dark").rmdir()
    (tmp_path / "images" / "train" / "dark").rename(tmp_path / "train-dark")
    for i in range(2, 6):
        (tmp_path / "images" / "test" / "bright" / f"{i}.png").unlink()
    with pytest.raises(ConfigError, match=r"^data: got 2 test images, want at least 3"):
        train(config, progress=False)
    assert not (tmp_path / "runs").exists()


def test_double_precision_is_evaluated_like_its_checkpoint(config):
    config = dataclasses.replace(config, epochs=1, precision="64-true")
    metrics = train(config, progress=False)
    (path,) = find_checkpoints(config.output)
    network, saved, _ = load_checkpoint(path)
    assert next(network.parameters()).dtype is torch.float32
    assert evaluate(network, build_data(saved)) == metrics


def test_a_checkpoint_of_the_first_version_says_that_it_is_one(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"picnn_fast": {"config": {"method": "picnn", "lr": 0.001}}}, path)
    with pytest.raises(RunFolderError, match=r"of an earlier picnn_fast.*train it again"):
        load_checkpoint(path)


def test_hidden_folders_hold_no_results(tmp_path):
    for name in (".std.partial", "std"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.ckpt").touch()
    assert find_checkpoints(tmp_path) == [tmp_path / "std" / "last.ckpt"]


def test_a_row_that_a_full_disk_cut_short_is_no_row_of_the_history(tmp_path):
    log = tmp_path / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    for part in ("", "1", "1,0", "1,0.2"):
        log.write_text("epoch,train/loss\r\n0,0.5\r\n" + part)
        assert read_history(tmp_path) == [{"epoch": 0.0, "train/loss": 0.5}]


def test_no_warnings_of_lightning_reach_the_user(config, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(dataclasses.replace(config, epochs=1), tmp_path / "work")
    assert [str(w.message) for w in caught if "lightning" in w.filename] == []


def test_whatever_torch_loads_is_loaded_as_data_and_never_runs():
    root = Path(__file__).parents[2]
    calls = [
        (path, call)
        for folder in ("picnn_fast", "benchmarks", "tests")
        for path in (root / folder).rglob("*.py")
        if "torch.load" in path.read_text()
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("torch.load")
    ]
    assert len(calls) > 5
    for path, call in calls:
        assert "weights_only=True" in ast.unparse(call), path


def test_the_module_of_a_run_is_loaded_from_its_checkpoint_alone(config):
    options = dataclasses.replace(config, optimizer="sgd")
    train(options, progress=False)
    path = Path(options.output) / "last.ckpt"
    module = InterpretableModule.load_from_checkpoint(path)
    network, _, _ = load_checkpoint(path)
    for mine, theirs in zip(module.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert isinstance(module.make_optimizer(module.network.parameter_groups(1.0)), torch.optim.SGD)
    assert module.hparams["lr"] == options.optimizer["lr"]


@pytest.mark.parametrize("choice", ["best_on_validation", "best_on_test"])
def test_the_epoch_reported_is_the_best_where_that_is_asked_for(config, monkeypatch, choice):
    figures = iter([0.2, 0.9, 0.1])
    monkeypatch.setattr(
        InterpretableModule,
        "on_validation_epoch_end",
        lambda self: self.log("val/acc1", next(figures)),
    )
    validation = 0.0 if choice == "best_on_test" else 0.25
    options = dataclasses.replace(
        _with(config, "data", validation=validation), epochs=3, report_epoch=choice
    )
    run = assemble(options, Path(options.output))
    tests_on_itself = run.data.validation_set is run.data.test_set
    assert tests_on_itself == (choice == "best_on_test")
    reported = fit(run, progress=False)
    (chosen,) = find_checkpoints(options.output)
    assert chosen.name == "best.ckpt"
    assert checkpoint.read_checkpoint(chosen)["epoch"] == 1
    network, saved, _ = load_checkpoint(chosen)
    assert evaluate(network, build_data(saved), seed=saved.seed) == reported


def test_an_epoch_cannot_be_chosen_on_images_that_there_are_none_of(config, tmp_path):
    for choice, validation, wanted in (
        ("best_on_validation", 0.0, "want data.validation above 0"),
        ("best_on_test", 0.25, "or data.validation 0"),
    ):
        options = dataclasses.replace(
            _with(config, "data", validation=validation), report_epoch=choice
        )
        with pytest.raises(ConfigError, match=wanted):
            assemble(options, tmp_path)


def test_a_figure_that_wants_saying_is_said_when_training_is_over(config, monkeypatch):
    figure = dataclasses.replace(FIGURES["acc1"], remark=lambda value: f"said of {value:.3f}")
    monkeypatch.setitem(FIGURES, "acc1", figure)
    with pytest.warns(UserWarning, match="said of") as caught:
        figures = train(config, progress=False)
    assert f"said of {figures['acc1']:.3f}" in {str(warning.message) for warning in caught}


def test_what_a_method_does_wrong_is_not_laid_on_the_backbone(config, monkeypatch, tmp_path):
    def broken(self, images, labels=None):
        raise RuntimeError("selected index k out of range")

    monkeypatch.setattr(METHODS[config.method["name"]], "forward", broken)
    with pytest.raises(ConfigError, match=r"^PICNN cannot take images .*index k out of range"):
        assemble(config, tmp_path)


def test_a_network_that_makes_no_finite_numbers_is_told_by_its_first_test_image():
    data = DATA["digits"]()
    network = make_interpretable("small-resnet", "std", num_classes=10, image_channels=1)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    with pytest.raises(ConfigError, match="the network makes NaN or infinity of the first"):
        try_image(network, data, "the network")
