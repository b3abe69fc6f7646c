import dataclasses
import json

import pytest

from picnn_fast.training import demo
from picnn_fast.training.demo import run_demo


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = dataclasses.replace(
        demo.CONFIG, num_filters=10, batch_size=512, epochs=1, accelerator="cpu"
    )
    monkeypatch.setattr(demo, "CONFIG", small)


def test_interrupted_demo_goes_on_with_the_network_that_was_missing(monkeypatch, tmp_path):
    output, lines = tmp_path / "demo", []
    with monkeypatch.context() as patch:
        fit = demo.fit

        def power_cut(config, folder, *, progress):
            if config.method == "picnn":
                raise KeyboardInterrupt
            return fit(config, folder, progress=progress)

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


def test_both_networks_are_trained_alike(monkeypatch, tmp_path):
    configs = []

    monkeypatch.setattr(demo, "fit", lambda config, folder, progress: configs.append(config) or {})
    monkeypatch.setattr(demo, "write_json", lambda path, content: None)  # no folder of a network
    monkeypatch.setattr(demo, "draw", lambda run, output, seed: None)
    run_demo(tmp_path / "demo", seed=3, epochs=2, say=lambda line: None)
    std, picnn = configs
    assert dataclasses.replace(std, method="picnn", output=picnn.output) == picnn
    assert (std.method, picnn.method, std.seed, std.epochs) == ("std", "picnn", 3, 2)
