"""Two machines that train together, and what is left when one of them is lost."""

import json
import os

import pytest
from torch import distributed

from picnn_fast.training.run import read_history
from tests.processes import as_module, ended, start
from tests.training import machines
from tests.training.kill import write_images


@pytest.fixture(autouse=True, scope="module")
def _possible():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    reason = machines.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def losing(_possible, tmp_path_factory):
    """Both ways to lose a machine, begun at once: they wait most of the time. By way, process and
    folder."""
    begun = {}
    for how in ("cut", "kill"):
        folder = tmp_path_factory.mktemp(how)
        command = ["tests.training.machines", str(folder), how]
        begun[how] = start(as_module, (command,), folder, "command"), folder
    yield begun
    for process, _ in begun.values():
        process.kill()
        process.join()


def test_torchrun_trains_one_run_on_two_machines(tmp_path):
    write_images(tmp_path / "images")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": machines.DEVICE}
    with machines.two_machines() as names:
        started = []
        for place, name in enumerate(names):
            torchrun = ["--nnodes=2", f"--node-rank={place}", "--nproc-per-node=1"]
            torchrun += [f"--master-addr={machines.ADDRESSES[0]}", "--master-port=29400"]
            torchrun += ["-m", "picnn_fast", *machines.arguments(tmp_path, epochs=1, timeout=60)]
            arguments = (name, torchrun)
            started.append(start(machines.torchrun_on, arguments, tmp_path, name, environment))
        done = [ended(process, tmp_path, n) for process, n in zip(started, names, strict=True)]
    assert [one.returncode for one in done] == [0, 0], done
    assert "2 x cpu" in done[0].stdout
    assert "2 x cpu" not in done[1].stdout  # one of them speaks
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["std"]["acc1"] >= 0
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [0]


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_run_that_loses_a_machine_ends_in_time_and_goes_on_with_the_other(losing, how):
    process, folder = losing[how]
    done = ended(process, folder, "command")
    logs = {log.stem: log.read_text() for log in folder.glob("*.log")}
    assert done.returncode == 0, done.stderr[-2000:] + str(logs)
    result = json.loads((folder / "result.json").read_text())
    assert result["statuses"] == [1, 1 if how == "cut" else -9], logs
    # Both wait as long as they were told to, where nothing says that the other is gone.
    assert result["seconds"] < 5 * machines.TIMEOUT
    for log in ("0", "1") if how == "cut" else ("0",):
        lines = [line for line in logs[log].splitlines() if "error:" in line]
        assert len(lines) == 1, logs[log]
        (line,) = lines
        assert line.startswith("picnn-fast train: error: a process of this run is gone, or did not")
        assert line.endswith("the same command goes on from the last checkpoint, on any machines")
        assert ".cc:" not in line
    assert f"goes on with epoch {result['saved'] + 2}" in logs["alone"]
    assert result["then"] >= result["saved"] + 2
    assert not [name for name in result["files"] if name.endswith((".tmp", ".shards"))]
