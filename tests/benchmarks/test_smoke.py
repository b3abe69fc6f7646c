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
    for title in (
        "parity: exit 0",
        "bernoulli_mask, forward",
        "class_gate, forward",
        "late masking",
        "training step",
    ):
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


README = (harness.RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_committed_measurements() -> None:
    paths = sorted(harness.RESULTS.glob("masking-*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        assert masking.report(content) in README
        assert content["command"] in README


def test_the_readme_shows_the_committed_demo() -> None:
    metrics = json.loads((harness.RESULTS / "demo" / "metrics.json").read_text())
    rows = [
        [method.upper(), *(f"{values[name]:.3f}" for name in ("acc1", "acc2", "acc3", "mis"))]
        for method, values in metrics.items()
    ]
    assert harness.table(["", "ACC1", "ACC2", "ACC3", "MIS"], rows) in README
