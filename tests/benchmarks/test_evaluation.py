"""The benchmark of evaluations: what it measures, and the tables it makes of it."""

import dataclasses
import json

import pytest

from benchmarks import evaluation, harness
from picnn_fast.evaluation import FIGURES, default_figures


@pytest.mark.skipif(
    not harness.tells_memory(harness.torch.device("cpu")), reason="no memory of a process to read"
)
def test_the_script_times_every_figure_there_is(tmp_path, capsys, monkeypatch):
    for name in FIGURES.keys() - set(default_figures()):
        monkeypatch.delitem(FIGURES, name)
    dear = dataclasses.replace(FIGURES["acc1"], heading="dear", when="asked", images=20)
    monkeypatch.setitem(FIGURES, "dear", dear)
    evaluation.main(["--smoke", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    run = content["run"]
    had = set(default_figures()) - run["not_available"].keys()
    assert {"acc1", "mis", "location_instability", "part_interpretability"} <= had
    assert run["seconds"].keys() - {"images", "forward"} <= set(default_figures())
    assert 0 < sum(run["seconds"].values()) <= run["total"]
    assert {"acc1", "mis"} <= run["resamples"].keys() <= had
    assert run["bytes"] > 0
    (asked,) = content["asked"]
    assert (asked["figures"], asked["images"]) == (["dear"], 20)
    table = evaluation.report(content)
    assert table in capsys.readouterr().out
    for name in had:
        assert FIGURES[name].heading in table
    assert "| dear " in table


@pytest.mark.parametrize(("table", "figure"), [("asked", "dear"), ("attacks", "attack_none")])
def test_a_table_can_be_measured_alone(tmp_path, monkeypatch, table, figure):
    for name in FIGURES.keys() - set(default_figures()):
        monkeypatch.delitem(FIGURES, name)
    for name in ("dear", "attack_none"):
        dear = dataclasses.replace(
            FIGURES["acc1"], heading=name, when="asked", needs=lambda network, data: "not today"
        )
        monkeypatch.setitem(FIGURES, name, dear)
    evaluation.main(["--smoke", "--table", table, "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name.startswith(f"evaluation-{table}-")
    assert "run" not in content
    assert content["asked"] == [{"figures": [figure], "not_available": "not today"}]
    assert evaluation.report(content) == f"Not measured: {figure} (not today)."
