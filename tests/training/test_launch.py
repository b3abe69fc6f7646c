"""Several processes and one run folder: torchrun, SLURM, and variables that are left over."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from picnn_fast.evaluation import default_figures, evaluate
from picnn_fast.training.checkpoint import load_checkpoint
from picnn_fast.training.launch import launch
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run import build_data, read_history, train

FLAGS = {"num_filters": 8, "epochs": 2, "batch_size": 256, "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    launch(None)  # this process is the first again


def _torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port", str(_free_port()), "-m", "picnn_fast", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_torchrun_trains_one_run_whose_figures_are_those_of_its_checkpoint(tmp_path):
    output = tmp_path / "run"
    flags = [f"--{name}={value}" for name, value in FLAGS.items()] + [f"--output={output}"]
    done = _torchrun("train", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((output / "metrics.json").read_text())["picnn"]
    assert figures.keys() >= set(default_figures())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [row["epoch"] for row in read_history(output)] == [0, 1]
    network, options, _ = load_checkpoint(output / "last.ckpt")
    assert evaluate(network, build_data(options), seed=0) == figures
    # Measured again by two processes, of which the first alone counts the images and speaks.
    measured = _torchrun("evaluate", str(output), "--accelerator=cpu", "--json")
    assert measured.returncode == 0, measured.stderr[-2000:]
    assert json.loads(measured.stdout) == {"picnn": figures}
    # What the first process refuses, every process does.
    other = _torchrun("train", *flags, "--epochs=1")
    assert other.returncode != 0
    assert "holds a complete run with other options: epochs 2, now 1" in other.stderr


def test_torchrun_and_slurm_tell_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    found = launch(None)
    assert (found.rank, found.devices, found.nodes, found.outside) == (3, 2, 2, True)
    assert not found.first
    assert launch(2) == found
    with pytest.raises(ConfigError, match=r"^devices: got 3 with 2 processes started"):
        launch(3)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_PROCID": 0,
        "SLURM_LOCALID": 0,
        "SLURM_NODEID": 0,
        "SLURM_JOB_NAME": "training",
        "SLURM_JOB_ID": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    found = launch(None)
    assert (found.rank, found.devices, found.nodes, found.outside) == (0, 2, 1, True)


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}, {"JSM_NAMESPACE_RANK": "1"}]
)
def test_variables_left_over_leave_a_single_process_the_first(monkeypatch, tmp_path, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    output = tmp_path / "run"
    train(Options(**{**FLAGS, "epochs": 1}, output=str(output)), progress=False)
    assert (output / "metrics.json").exists()


def test_processes_that_lightning_starts_itself_are_one_run(tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "picnn_fast", "train", "--devices=2", "--output", str(output)]
    command += [f"--{name}={value}" for name, value in FLAGS.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "metrics.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
