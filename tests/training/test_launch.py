"""Several processes and one run folder: torchrun, SLURM, and variables that are left over."""

import json
import os

import pytest

from picnn_fast.evaluation import default_figures, evaluate
from picnn_fast.training.checkpoint import load_checkpoint
from picnn_fast.training.launch import Launch, LostProcessError, launch, telling_of_lost
from picnn_fast.training.options import ConfigError
from picnn_fast.training.run import build_data, read_history, train
from picnn_fast.training.run_folder import RunFolder, RunFolderError
from tests.processes import as_module, as_torchrun, finished
from tests.training.kill import options_of, write_images
from tests.training.together import OF_LAUNCHERS, free_ports

FLAGS = {"num_filters": 8, "epochs": 2, "batch_size": 256, "accelerator": "cpu"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in filter(OF_LAUNCHERS.fullmatch, [*os.environ]):
        monkeypatch.delenv(name)
    yield
    monkeypatch.undo()
    launch(None)  # this process is the first again


def _torchrun(*arguments):
    torchrun = ["--nproc-per-node=2", "--master-port", str(free_ports(1)[0]), "-m", "picnn_fast"]
    return finished(as_torchrun, [*torchrun, *arguments])


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


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
}
SRUN = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NAME": "training",
    "SLURM_JOB_ID": "123456",
}
BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


def found(**variables):
    """What ``launch`` makes of nothing else asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return launch(None)


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_torchrun_and_srun_tell_how_many_processes_there_are(monkeypatch, launcher):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    started = launch(None)
    assert (started.rank, started.devices, started.nodes) == (3, 2, 2)
    assert started.outside
    assert not started.first
    assert started.environment.local_rank() == 1
    assert launch(2, 2) == started
    with pytest.raises(ConfigError, match=r"^devices: got 3 with 2 processes started on each"):
        launch(3)
    with pytest.raises(ConfigError, match=r"^num_nodes: got 1 with 2 machines by (torch|s)run"):
        launch(None, 1)


@pytest.mark.parametrize(
    ("changed", "rank", "devices", "nodes"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2(x2)"}, 3, 2, 2),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "2(x2)"}, 3, 2, 2),
        ({"SLURM_NTASKS_PER_NODE": "", "SLURM_NNODES": "2"}, 3, 2, 2),
        # What was asked of the job is not what srun made of a step within it.
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 3, 2, 2),
        ({"SLURM_NTASKS": "32", "SLURM_STEP_NUM_TASKS": "4"}, 3, 2, 2),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}, 3, 4, 1),
        # Dealt out in turn: the second process of all is the first of the second machine.
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, 1, 2, 2),
        ({"SLURM_NTASKS": "1"}, 0, 1, 1),
        ({"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NODELIST": ""}, 0, 1, 1),
        # One torchrun on each machine.
        (TORCHRUN | {"SLURM_NTASKS": "2"}, 3, 2, 2),
    ],
)
def test_variables_of_slurm_are_read_in_all_their_forms(changed, rank, devices, nodes):
    started = found(**SRUN | changed)
    assert (started.rank, started.devices, started.nodes) == (rank, devices, nodes)


@pytest.mark.parametrize(
    ("nodes", "address"),
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu[3,5-9],big1", "gpu3"),
        ("a1,b[1-2]", "a1"),
        ("n[2],m[3-4]", "n2"),
        ("rack[0-1]node[4-5].site", "rack0node4.site"),
        ("one two", "one"),
    ],
)
def test_the_first_machine_of_a_step_is_where_processes_meet(monkeypatch, nodes, address):
    environment = found(**SRUN | {"SLURM_STEP_NODELIST": nodes}).environment
    assert (environment.main_address, environment.main_port) == (address, 15000 + 3456)
    assert found(**SRUN, SLURM_STEP_ID="2").environment.main_port == 15000 + 3456 + 202
    given = found(**SRUN, MASTER_ADDR="10.0.0.7", MASTER_PORT="4000").environment
    assert (given.main_address, given.main_port) == ("10.0.0.7", 4000)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID: is not set with 4 tasks, want srun before"),
        (SRUN | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS: got 'many', want an integer >= 1"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID: got 4, want less than 4, the tasks"),
        (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID: got 2, want less than 2, the tasks on"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "3"}, "SLURM_NTASKS_PER_NODE: got 3 with 4 tasks, want"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "3,1"}, "SLURM_NTASKS_PER_NODE: got '3,1', want as"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "2x"}, r"SLURM_NTASKS_PER_NODE: got '2x', want a num"),
        (SRUN | {"SLURM_NNODES": "4"}, r"SLURM_NTASKS_PER_NODE: got 2 with 4 tasks on 4 machines"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: is not set with 2 machines"),
        (SRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000, want a port"),
        (
            SRUN | {"ENVIRONMENT": "BATCH", "SLURM_STEP_NODELIST": ""},
            "SLURM_NTASKS: got 4, but the batch script started one process alone, want srun",
        ),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE: is not set though TORCHELASTIC"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE: got 3 of WORLD_SIZE 4, want"),
        (TORCHRUN | {"RANK": "-1"}, "RANK: got '-1', want an integer >= 0"),
    ],
)
def test_variables_of_launchers_that_are_wrong_are_told_in_one_line(variables, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        found(**variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/a/gloo/transport/tcp/pair.cc:5] Reset. Please look"), "Reset"),
        (RuntimeError("Joined: [/a/gloo/transport/tcp/pair.cc:5] Reset\nmore"), "Joined: Reset"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_a_lost_process_is_told_without_where_in_gloo_it_was_seen(
    monkeypatch, tmp_path, error, said
):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(LostProcessError, match=rf"\(--timeout\): {said}; the same command starts"),
        telling_of_lost(launch(None), RunFolder(tmp_path / "run", "train", {})),
    ):
        raise error


def test_a_lost_process_is_told_where_tidying_up_after_it_fails(monkeypatch, tmp_path):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path / "run", "train", {})

    def tidied_up():
        try:
            raise RuntimeError("Connection reset by peer")
        finally:
            raise AttributeError("nothing to tear down")

    with pytest.raises(LostProcessError, match="reset"), telling_of_lost(launch(None), folder):
        tidied_up()
    with pytest.raises(AttributeError), telling_of_lost(launch(None), folder):
        raise AttributeError("of nothing lost")


def test_machines_without_a_launcher_are_told_apart_by_hand(monkeypatch):
    with pytest.raises(ConfigError, match=r"^NODE_RANK: is not set with num_nodes 2, want it on"):
        launch(2, 2)
    for name, value in BY_HAND.items():
        with pytest.raises(ConfigError, match=f"^{name}: is not set with num_nodes 2"):
            launch(2, 2)
        monkeypatch.setenv(name, value)
    started = launch(2, 2)
    assert (started.rank, started.devices, started.nodes) == (2, 2, 2)
    assert not started.outside
    assert started.environment.main_port == 29500
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(ConfigError, match=r"^NODE_RANK: got 2, want less than 2, the machines"):
        launch(2, 2)
    monkeypatch.setenv("NODE_RANK", "1")
    # As Lightning starts the others of a machine.
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    started = launch(2, 2)
    assert (started.rank, started.child) == (3, True)


def test_machines_that_do_not_share_the_folder_are_told_so(monkeypatch, tmp_path):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    started = launch(None)
    monkeypatch.setattr(Launch, "decide", lambda self, compute: tmp_path / "elsewhere")
    seconds = iter([0.0, 1.0, 31.0])
    monkeypatch.setattr("picnn_fast.training.launch.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr("picnn_fast.training.launch.time.sleep", lambda seconds: None)
    folder = RunFolder(tmp_path / "run", "train", {})
    with (
        pytest.raises(RunFolderError, match="is not the same folder on all machines"),
        started.owning(folder, overwrite=False),
    ):
        raise AssertionError("the folder is not there")


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}, {"JSM_NAMESPACE_RANK": "1"}]
)
def test_variables_left_over_leave_a_single_process_the_first(monkeypatch, tmp_path, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    write_images(tmp_path / "images")
    options = options_of("std", tmp_path / "images", tmp_path / "run", epochs=1)
    assert train(options, progress=False)["acc1"] >= 0
    assert (tmp_path / "run" / "metrics.json").exists()


def test_processes_that_lightning_starts_itself_are_one_run(tmp_path):
    output = tmp_path / "run"
    command = ["picnn_fast", "train", "--devices=2", "--output", str(output)]
    command += [f"--{name}={value}" for name, value in FLAGS.items()]
    done = finished(as_module, command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (output / "metrics.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
