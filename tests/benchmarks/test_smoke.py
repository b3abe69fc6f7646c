"""The benchmark scripts run from end to end where there is no GPU, and write nothing then."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, harness, masking


def test_the_gpu_script_goes_through_all_its_steps_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert gpu.main(["--smoke"]) == 0
    printed = capfd.readouterr().out
    for title in ("parity: exit 0", "forward + backward", "late masking", "training step"):
        assert title in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_script_refuses_a_machine_without_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capfd.readouterr().err


def test_candidates_are_timed_in_turn() -> None:
    order: list[str] = []
    times = harness.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        device=torch.device("cpu"),
        warmup=1,
    )
    assert "".join(order) == "ab" * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_medians_over_rounds() -> None:
    times = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 3.0, 2.0]}
    assert harness.ratio(times, "slow", "fast") == 2.0


def test_results_name_the_command_and_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write("masking", torch.device("cpu"), "a command", {"late": []})
    content = json.loads(path.read_text())
    assert content["command"] == "a command"
    assert content["machine"]["torch"] == torch.__version__
    assert [path] == list(tmp_path.iterdir())


def test_every_committed_result_can_be_tabulated() -> None:
    for path in harness.RESULTS.glob("masking-*.json"):
        text = masking.report(json.loads(path.read_text()))
        assert "of the limit" in text
