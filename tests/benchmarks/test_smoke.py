"""The benchmark scripts run from end to end where there is no GPU, and write nothing then."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import bias, filter_loss, gpu, harness, masking, mutual_information


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
        "mutual_information, knn",
        "peak memory",
        "histogram_update",
        "soft_histogram, forward",
        "template_mask, forward",
        "filter_loss, forward",
        "| over direct |",
    ):
        assert title in printed
    assert not list(tmp_path.iterdir())


def test_the_bias_script_runs_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    bias.main(["--smoke"])
    assert "closed form" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    committed = json.loads((RESULTS / f"{bias.NAME}.json").read_text())
    bias.draw(committed, tmp_path / "bias.png")
    assert [path.name for path in tmp_path.iterdir()] == ["bias.png"]


def test_the_closed_form_agrees_with_known_values() -> None:
    def normals(*means: float, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
        centres = torch.tensor(means, dtype=torch.float64)
        return centres, torch.full_like(centres, deviation)

    # Two levels in Gaussian noise carry half a bit at sigma = 0.97869, the Shannon limit of
    # codes of rate 1/2.
    threshold = bias.closed_form(*normals(-1, 1, deviation=0.97869), "label")
    assert threshold == pytest.approx(0.5 * math.log(2), abs=1e-5)
    assert bias.closed_form(*normals(0, 0, 0, deviation=2), "label") == pytest.approx(0, abs=1e-12)
    apart = normals(0, 100, 200, 300, deviation=1)
    assert bias.closed_form(*apart, "label") == pytest.approx(math.log(4), abs=1e-9)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert bias.closed_form(*apart, "class") == pytest.approx(entropy, abs=1e-9)


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


RESULTS = harness.RESULTS
README = (RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", [masking, mutual_information, filter_loss])
def test_the_readme_shows_the_committed_measurements(family: ModuleType) -> None:
    paths = sorted(RESULTS.glob(f"{family.__name__.rpartition('.')[2]}-*.json"))
    assert paths
    for path in paths:
        content = json.loads(path.read_text())
        assert family.report(content) in README
        assert content["command"] in README


def test_the_readme_shows_the_committed_bias() -> None:
    content = json.loads((RESULTS / f"{bias.NAME}.json").read_text())
    assert bias.report(content) in README
    assert f"benchmarks/results/{bias.NAME}.png" in README


def test_the_readme_shows_the_committed_demo() -> None:
    shown = json.loads((RESULTS / "demo" / "metrics.json").read_text())
    seeds = json.loads((RESULTS / "demo" / "seeds.json").read_text())
    assert {run["seed"] for run in seeds["runs"]} == {0, 1, 2}
    assert seeds["command"] in README
    names = ("acc1", "acc2", "acc3", "mis")
    rows = []
    for method, values in shown.items():
        rows.append([method.upper(), *(f"{values[name]:.3f}" for name in names)])
        every = [values, *(run[method] for run in seeds["runs"])]
        ends = (
            (min(run[name] for run in every), max(run[name] for run in every)) for name in names
        )
        rows.append(["least to greatest", *(f"{low:.3f} to {high:.3f}" for low, high in ends)])
    assert harness.table(["", "ACC1", "ACC2", "ACC3", "MIS"], rows) in README
    first = [shown, *(run for run in seeds["runs"] if run["seed"] == 0)]
    one, two, three = (f"{run['picnn']['acc3']:.3f}" for run in first)
    assert f"seed 0 alone ends at an ACC3 of {one}, {two} or {three}." in README
