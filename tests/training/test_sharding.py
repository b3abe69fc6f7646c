"""Training with --strategy fsdp: the weights of one process, and checkpoints of any number."""

import json
import shutil

import pytest
import torch
from torch import distributed, nn

from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.training import shards
from picnn_fast.training.checkpoint import find_checkpoints, load_checkpoint, read_checkpoint
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run_folder import RunFolderError
from picnn_fast.training.sharding import check_sharding
from tests.processes import as_module, finished
from tests.training.kill import differences
from tests.training.together import IN_PARTS, LINEAR

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="torch without gloo",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All trainings by one command: the folder of theirs."""
    folder = tmp_path_factory.mktemp("together")
    done = finished(as_module, ["tests.training.together", str(folder)])
    logs = "".join(f"{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    return folder


def state(path):
    content = read_checkpoint(path)["state_dict"]
    return {name.removeprefix("network."): value for name, value in content.items()}


def assert_close(got, expected, bound):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=bound, atol=bound, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_come_to_the_weights_of_one_with_their_batches(trained, method):
    last = trained / method / "last.ckpt"
    content = read_checkpoint(last, whole=False)
    assert content["state_dict"].keys() < read_checkpoint(last)["state_dict"].keys()
    expected = torch.load(trained / f"{method}-of-shares" / "state.pt", weights_only=True)
    assert_close(state(last), expected, 1e-5)
    if method in LINEAR:  # one process needs no dealing out: its batch is theirs together
        assert_close(state(last), state(trained / f"{method}-alone" / "last.ckpt"), 1e-5)


@pytest.mark.parametrize(("method", "strategy"), IN_PARTS)
def test_processes_that_make_a_step_of_many_batches_come_to_the_same(trained, method, strategy):
    parts = trained / f"{method}-{strategy}-in-parts" / "last.ckpt"
    assert_close(state(parts), state(trained / f"{method}-alone" / "last.ckpt"), 1e-5)


def test_bfloat16_is_near_and_other(trained):
    half, whole = (state(trained / name / "last.ckpt") for name in ("half", "whole"))
    names = [name for name, value in whole.items() if value.is_floating_point()]
    assert any(not torch.equal(half[name], whole[name]) for name in names)
    assert all(value.dtype == whole[name].dtype for name, value in half.items())
    assert_close(half, whole, 0.05)


def test_a_run_that_goes_on_with_as_many_processes_is_the_same_run(trained):
    assert differences(trained / "whole", trained / "on-2") == []


@pytest.mark.parametrize(
    ("written", "read"),
    [("cut/last.ckpt", "on-2"), ("cut/last.ckpt", "on-1"), ("1-on-2/before.ckpt", "1-on-2")],
)
def test_weights_and_optimiser_go_over_to_another_number_of_processes(trained, written, read):
    before, after = (
        read_checkpoint(trained / written),
        read_checkpoint(trained / read / "seen.ckpt"),
    )
    assert before["global_step"] == after["global_step"] == 4
    torch.testing.assert_close(after["state_dict"], before["state_dict"], rtol=0, atol=0)
    states = [content["optimizer_states"] for content in (after, before)]
    assert all(values for one in states[1] for values in one["state"].values())
    torch.testing.assert_close(*[[one["state"] for one in own] for own in states], rtol=0, atol=0)
    assert read_checkpoint(trained / read / "last.ckpt")["global_step"] > 4


def test_a_complete_run_holds_whole_files_that_are_read_as_any_other(trained):
    folder = trained / "complete"
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "last.ckpt",
        "best.ckpt",
        "run.json",
        "csv",
    }
    (best,) = find_checkpoints(folder)
    for path in (best, folder / "last.ckpt"):
        content = torch.load(path, weights_only=True)
        assert shards.KEY not in content
        network, options, _ = load_checkpoint(path)
        assert options.strategy == "fsdp"
        assert state(path).keys() == network.state_dict().keys()


def test_srun_and_machines_by_hand_are_one_run_whose_first_process_has_its_figures(trained):
    first, second = (json.loads((trained / f"figures{rank}.json").read_text()) for rank in (0, 1))
    written = json.loads((trained / "complete" / "metrics.json").read_text())["icnn"]
    assert first[:2] == [written, written]
    assert second[:2] == [{}, {}]
    # What the first process refuses, every process does.
    assert first[2] == second[2]
    assert "holds a complete run with other options: epochs 2, now 1" in first[2]["refused"]


def test_shards_that_are_damaged_or_gone_are_told_in_a_line(trained, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained / "cut", work)
    (folder,) = work.glob(".last.ckpt.*.shards")
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    for damaged in (whole[:-1], bytes(len(whole))):
        file.write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"last\.ckpt is damaged: .*shards") as caught:
            read_checkpoint(work / "last.ckpt")
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(RunFolderError, match=r"__0_0\.distcp is gone"):
        read_checkpoint(work / "last.ckpt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "64-true"}, "^precision: got '64-true' with strategy fsdp, want bf16-mixed"),
        ({"precision": "16-mixed"}, "^precision: got '16-mixed' with strategy fsdp"),
        ({"accelerator": "mps"}, "^accelerator: got 'mps' with strategy fsdp, want cpu or gpu"),
        ({}, "^strategy: got 'fsdp' with a network whose parameter features.scale is a single"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_by_name(given, message):
    class Scaled(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.scale = nn.Parameter(torch.tensor(1.0))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    network = make_interpretable(
        (Scaled(), head), "std", num_classes=2, num_filters=4, insert_conv=False
    )
    with pytest.raises(ConfigError, match=message):
        check_sharding(Options(strategy="fsdp", **given), network)
