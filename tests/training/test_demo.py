import dataclasses
import json
from pathlib import Path

import pytest

from picnn_fast import cli
from picnn_fast.evaluation import FIGURES
from picnn_fast.training import compare, demo
from picnn_fast.training.demo import run_demo


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = {**demo.COMMON, "num_filters": 10, "batch_size": 512, "accelerator": "cpu"}
    monkeypatch.setattr(demo, "COMMON", small)


def test_interrupted_demo_goes_on_with_the_network_that_was_missing(monkeypatch, tmp_path):
    output, lines = tmp_path / "demo", []
    with monkeypatch.context() as patch:
        fit = compare.fit

        def power_cut(run, *, progress):
            if run.options.method["name"] == "picnn":
                raise KeyboardInterrupt
            return fit(run, progress=progress)

        patch.setattr(compare, "fit", power_cut)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, epochs=1, progress=False, say=lines.append)
    assert not output.exists()
    std = json.loads((tmp_path / ".demo.partial" / "std" / "metrics.json").read_text())["std"]

    lines.clear()
    metrics = run_demo(output, epochs=1, progress=False, say=lines.append)
    assert metrics["std"] == std
    assert "STD, an ordinary network: trained before" in lines
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert (output / "gradcam.png").stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_both_networks_are_trained_alike(tmp_path):
    std, picnn = demo.demo_options(tmp_path, seed=3, epochs=2).values()
    assert dataclasses.replace(std, method=picnn.method, output=picnn.output) == picnn
    assert (std.method["name"], picnn.method["name"]) == ("std", "picnn")
    assert (std.seed, std.epochs) == (3, 2)


def test_the_demo_tells_how_far_apart_seeds_lie(capsys, monkeypatch, tmp_path):
    figures = {name: dict.fromkeys(FIGURES, 0.5) for name in demo.METHODS}
    monkeypatch.setattr(demo, "run_demo", lambda *arguments, **options: figures)
    told = []
    for epochs in (demo.EPOCHS, 1):
        assert cli.main(["demo", "--output", str(tmp_path / "x"), "--epochs", str(epochs)]) == 0
        told.append(
            f"thereabouts; three seeds lay this far apart: ACC1 {demo.SPREAD['acc1']}, "
            in capsys.readouterr().out
        )
    assert told == [True, False]


def test_what_the_demo_tells_of_seeds_is_what_was_measured():
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "seeds.json"
    runs = json.loads(results.read_text())["runs"]
    for name, told in demo.SPREAD.items():
        values = [[run[method][name] for run in runs] for method in demo.METHODS]
        measured = max(max(of_one) - min(of_one) for of_one in values)
        assert measured <= told < 2.5 * measured, name
