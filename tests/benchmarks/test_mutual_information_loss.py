"""The experiment with mutual information as a loss runs, and reports what it measured."""

import json
from pathlib import Path

import pytest

from benchmarks import harness, mutual_information_loss


def test_the_script_runs_and_writes_nothing_when_it_only_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    mutual_information_loss.main(["--smoke"])
    assert "| 0, the demo | " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_it_measures_every_weight_and_seed_and_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, seen = [], []

    def fit(run, *, progress):
        config = run.options
        configs.append(config)
        seen.extend(json.loads(path.read_text()) for path in tmp_path.iterdir())
        mis = config.mutual_information_weight + config.seed / 100
        return {"acc1": 1.0, "acc2": 0.5, "acc3": 0.25, "mis": mis}

    monkeypatch.setattr(mutual_information_loss, "fit", fit)
    mutual_information_loss.main(["--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    asked = {(config.mutual_information_weight, config.seed) for config in configs}
    assert asked == {(run["weight"], run["seed"]) for run in content["runs"]}
    assert len(asked) == len(configs) == 9
    # After every training there is a file of those so far.
    assert [len(partial["runs"]) for partial in seen] == list(range(1, 9))
    assert {partial["complete"] for partial in seen} == {False}
    assert "complete" not in content
    assert "| 0.1         | 1.000 | 0.500 | 0.250 | 0.110 | 0.100 to 0.120 |" in (
        mutual_information_loss.report(content)
    )
    assert content["command"] == "python -m benchmarks.mutual_information_loss"
