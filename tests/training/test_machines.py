"""Two machines that train together, and what is left when one of them is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from picnn_fast.training.run import read_history
from tests.training import machines
from tests.training.kill import write_images

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _possible():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    reason = machines.missing()
    if reason is not None:
        pytest.skip(reason)


def test_torchrun_trains_one_run_on_two_machines(tmp_path):
    write_images(tmp_path / "images")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": machines.DEVICE}
    with machines.two_machines() as names:
        started = []
        for place, name in enumerate(names):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            torchrun += [f"--node-rank={place}", f"--master-addr={machines.ADDRESSES[0]}"]
            torchrun += ["--master-port=29400", "--nproc-per-node=1", "-m", "picnn_fast"]
            command = ["ip", "netns", "exec", name, *torchrun]
            command += machines.arguments(tmp_path, epochs=1, timeout=60)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        try:
            told = [process.communicate(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    assert "2 x cpu" in told[0][0]
    assert "2 x cpu" not in told[1][0]  # one of them speaks
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["std"]["acc1"] >= 0
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == [0]


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_run_that_loses_a_machine_ends_in_time_and_goes_on_with_the_other(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.machines", str(tmp_path), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    logs = {log.stem: log.read_text() for log in tmp_path.glob("*.log")}
    assert done.returncode == 0, done.stderr[-2000:] + str(logs)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["statuses"] == [1, 1 if how == "cut" else -9], logs
    # Both wait as long as they were told to, where nothing says that the other is gone.
    assert result["seconds"] < 5 * machines.TIMEOUT
    for log in ("0", "1") if how == "cut" else ("0",):
        (line,) = [line for line in logs[log].splitlines() if "error:" in line]
        assert line.startswith("picnn-fast train: error: a process of this run is gone, or did not")
        assert line.endswith("the same command goes on from the last checkpoint, on any machines")
        assert ".cc:" not in line
    assert f"goes on with epoch {result['saved'] + 2}" in logs["alone"]
    assert result["then"] >= result["saved"] + 2
    assert not [name for name in result["files"] if name.endswith((".tmp", ".shards"))]
