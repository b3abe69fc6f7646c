"""The experiment on part semantics measures what it names, goes on after errors, and draws."""

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import harness, parts
from picnn_fast.training import run

METRICS = {
    "acc1": 0.5,
    "mis": 0.25,
    "location_instability": 0.1,
    "part_interpretability": 0.2,
    "epochs": 3.0,
}


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads in place of processes, which would not see what a test puts in place."""
    monkeypatch.setattr(
        parts, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1)
    )
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_network_is_trained_with_every_seed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_threads: None
) -> None:
    configs = []

    def train(config):
        configs.append(config)
        return {**METRICS, "location_instability": 0.1 + config.seed / 100}

    drawn = []
    monkeypatch.setattr(parts, "_run", train)
    monkeypatch.setattr(parts, "draw", lambda output, folder: drawn.append(folder))
    parts.main(["--output", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert drawn == [tmp_path / parts.NAME]
    content = json.loads((tmp_path / f"{parts.NAME}.json").read_text())
    assert len(content["runs"]) == len(configs) == 3 * len(parts.networks())
    assert len({config.output for config in configs}) == len(configs)
    table = parts.report(content)
    assert "| CNN " in table
    assert "| ICNN, l2, *target*, 0.003 " in table
    assert "| 0.1100               | 0.1000 to 0.1200 | 0.200 " in table


def test_an_error_ends_the_experiment_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_threads: None
) -> None:
    started = []

    def train(config):
        started.append(config)
        if len(started) > 1:
            time.sleep(0.2)  # while the first error is seen to
        raise ValueError("no luck")

    saved: list[object] = []
    monkeypatch.setattr(parts, "_run", train)
    with pytest.raises(ValueError, match="no luck"):
        parts.measure(parts.networks(), parts.SEEDS, tmp_path, 1, saved.append)
    assert len(started) < 3 * len(parts.networks())
    assert not saved


def test_the_networks_are_those_the_names_say() -> None:
    networks = parts.networks()
    assert networks["std"].method == "std"
    assert networks["mask uniform-l1"].filter_loss_weight == 0
    one = networks["l2 running 0.0003"]
    assert (one.template, one.estimator, one.filter_loss_weight) == ("l2", "running", 0.0003)


def test_a_short_run_trains_measures_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_threads: None
) -> None:
    monkeypatch.setattr(run, "TRAIN_ANIMALS", 12)
    monkeypatch.setattr(run, "TEST_ANIMALS", 12)
    short = {"image_size": 32, "epochs": 1, "num_filters": 8}
    pair = {
        name: dataclasses.replace(parts.networks()[name], **short)
        for name in ("std", "l1 batch 0.003")
    }
    saved = []
    results = parts.measure(
        pair, (0,), tmp_path / "runs", 1, lambda partial: saved.append(len(partial["runs"]))
    )
    assert saved == [1, 2]
    assert [entry["network"] for entry in results["runs"]] == list(pair)
    assert all(set(parts.FIGURES) <= entry.keys() for entry in results["runs"])
    parts.draw(tmp_path / "runs", tmp_path / "pictures")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "templates.png",
        "peaks-std.png",
        "peaks-icnn.png",
        "filters-std.png",
        "filters-icnn.png",
    }


def test_the_readme_shows_the_committed_experiment() -> None:
    content = json.loads((harness.RESULTS / f"{parts.NAME}.json").read_text())
    readme = (harness.RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")
    assert parts.report(content) in readme
    assert content["command"] in readme
