"""The experiment on part semantics measures what it names, goes on after errors, and draws."""

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import parts

METRICS = {
    "location_instability_middle": 0.05,
    "location_instability_random": 0.15,
    "acc1": 0.5,
    "mis": 0.25,
    "location_instability": 0.1,
    "part_interpretability": 0.2,
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
    assert "| *a filter that always peaks in the middle* " in table
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
    methods = {name: options.method for name, options in parts.networks().items()}
    assert methods["std"]["name"] == "std"
    assert methods["mask uniform-l1"]["filter_loss_weight"] == 0
    assert methods["mask uniform-l1"]["template"]["profile"] == "uniform"
    one = methods["l2 running 0.0003"]
    assert (one["estimator"], one["filter_loss_weight"]) == ("running", 0.0003)
    assert (one["template"]["norm"], one["template"]["tau"]) == ("l2", 0.1)
    assert {name for name, method in methods.items() if method.get("center") == "mass"} == {
        "mask l1 mass",
        "l1 batch 0.003 mass",
    }


def test_a_short_run_trains_measures_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_threads: None
) -> None:
    small = {"image_size": 32, "train_images": 12, "test_images": 12}
    short = {"data": {**parts.OPTIONS.data, **small}, "epochs": 1, "num_filters": 8}
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
