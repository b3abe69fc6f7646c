"""The benchmark of explainers: what it trains, and the tables it makes of the results."""

import json

import pytest

from benchmarks import explainer


def test_the_script_runs_from_end_to_end(tmp_path, capsys):
    explainer.main(["--smoke", "--output", str(tmp_path / "runs"), "--results", str(tmp_path)])
    content = json.loads((tmp_path / "explainer.json").read_text())
    runs = {run["network"]: run for run in content["runs"]}
    assert list(runs) == ["performer", "reconstruction", "classification"]
    table = explainer.report(content)
    assert table in capsys.readouterr().out
    for name in ("reconstruction", "classification"):
        assert f"{runs[name]['p']:.3f}" in table
        assert f"{runs[name]['location_instability']:.4f}" in table
        assert runs[name]["more_errors"] == pytest.approx(
            runs["performer"]["acc1"] - runs[name]["acc1"], abs=1e-6
        )
    assert runs["reconstruction"]["location_instability_top"] == pytest.approx(
        runs["performer"]["location_instability"]
    )


def test_explainers_are_alike_but_for_their_objective():
    performer = explainer.PERFORMER
    options = [explainer.explainer(performer, objective) for objective in explainer.OBJECTIVES]
    methods = [dict(each.method) for each in options]
    assert [method.pop("objective") for method in methods] == list(explainer.OBJECTIVES)
    assert methods[0] == methods[1]
    assert methods[0]["performer"].endswith(performer.output)
    assert options[0].data == performer.data
