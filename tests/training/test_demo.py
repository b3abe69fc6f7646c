import dataclasses
import json

import pytest

from picnn_fast.training import demo
from picnn_fast.training.demo import run_demo


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = {**demo.COMMON, "num_filters": 10, "batch_size": 512, "accelerator": "cpu"}
    monkeypatch.setattr(demo, "COMMON", small)


def test_interrupted_demo_goes_on_with_the_network_that_was_missing(monkeypatch, tmp_path):
    output, lines = tmp_path / "demo", []
    with monkeypatch.context() as patch:
        fit = demo.fit

        def power_cut(run, *, progress):
            if run.options.method["name"] == "picnn":
                raise KeyboardInterrupt
            return fit(run, progress=progress)

        patch.setattr(demo, "fit", power_cut)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, epochs=1, progress=False, say=lines.append)
    assert not output.exists()
    std = json.loads((tmp_path / ".demo.partial" / "std" / "metrics.json").read_text())["std"]

    lines.clear()
    metrics = run_demo(output, epochs=1, progress=False, say=lines.append)
    assert metrics["std"] == std
    assert any("STD" in line and "before the interruption" in line for line in lines)
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert (output / "gradcam.png").stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_both_networks_are_trained_alike(tmp_path):
    std, picnn = demo.demo_options(tmp_path, seed=3, epochs=2).values()
    assert dataclasses.replace(std, method=picnn.method, output=picnn.output) == picnn
    assert (std.method["name"], picnn.method["name"]) == ("std", "picnn")
    assert (std.seed, std.epochs) == (3, 2)
