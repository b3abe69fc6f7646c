"""The comparison of methods trains what it names and reports mean and spread."""

import json
from pathlib import Path

import pytest

from benchmarks import compare
from picnn_fast.evaluation import FIGURES
from picnn_fast.training.compare import DEFAULT_METHODS


def test_every_method_is_trained_from_every_seed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(options, methods, seeds):
        assert (options.epochs, options.num_filters) == (30, 128)
        runs = {
            name: [{**dict.fromkeys(FIGURES, "n/a: none"), "acc1": seed / 10} for seed in seeds]
            for name in methods
        }
        runs["csg"] = [{**run, "density": 0.25} for run in runs["csg"]]
        return runs

    monkeypatch.setattr(compare, "compare", trained)
    compare.main(["--output", str(tmp_path / "runs"), "--results", str(tmp_path)])
    content = json.loads((tmp_path / f"{compare.NAME}.json").read_text())
    assert len(content["runs"]) == 3 * len(DEFAULT_METHODS)
    assert "complete" not in content
    table = compare.report(content).splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == ["", "ACC1", "L1-density"]
    assert len(table) == 2 + len(DEFAULT_METHODS)
    (csg,) = [line for line in table if line.startswith("| CSG ")]
    assert "| 0.100 ± 0.100 | 0.250 ± 0.000 |" in csg
    assert "| n/a " in next(line for line in table if line.startswith("| STD "))
    assert "L1-density" not in compare.report(content, ["acc1"])


def test_a_smoke_run_writes_nothing_where_it_is_told_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {*compare.harness.RESULTS.iterdir()}
    with pytest.warns(UserWarning, match="did not become sparse"):
        compare.main(["--smoke", "--output", str(tmp_path / "runs")])
    assert "| CSG " in capsys.readouterr().out
    assert {*compare.harness.RESULTS.iterdir()} == before
