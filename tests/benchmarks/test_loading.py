"""The benchmark of loaders: every loader yields all images, and waiting is told from working."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import loading

CPU = torch.device("cpu")


def test_waiting_is_the_time_between_asking_for_a_batch_and_having_it() -> None:
    def batches():
        for _ in range(3):
            time.sleep(0.03)
            yield torch.zeros(4), torch.zeros(4)

    rate, share = loading.timed(batches, lambda images, labels: time.sleep(0.01), CPU)
    assert rate <= 12 / (3 * 0.04)
    assert 0.3 < share < 1


def test_every_loader_is_measured_alone_and_beneath_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loading.main(["--smoke", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    names = {loading.BEFORE, loading.DECODING, loading.KEPT}
    for table in loading.TABLES:
        (entry,) = content[table]
        assert entry["loaders"].keys() == names
        for of in entry["loaders"].values():
            assert of["images_per_second"] > 0
            assert 0 < of["waiting"] <= 1
    shown = capsys.readouterr().out
    assert "spent waiting" in shown
    assert "loader alone" in shown
