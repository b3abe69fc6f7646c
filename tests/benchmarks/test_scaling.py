"""What several processes change: what is counted, what a page says of it, and that it runs."""

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_jpeg

from benchmarks import harness, scaling
from tests.processes import as_module, as_torchrun, finished

ROOT = harness.RESULTS.parent.parent
COST = json.loads((harness.RESULTS / "scaling-cost-amd-epyc-2-cores.json").read_text())["cost"]


def test_a_network_is_counted_as_its_layers_have_it() -> None:
    plain, picnn = (scaling.counted("vgg16", False, method) for method in ("plain", "picnn"))
    classes, filters = scaling.CLASSES, picnn["filters"]
    assert (plain["parameters"], filters) == (4 * 138_357_544, 512)
    assert picnn["own"] == {"correspondence.weight": 4 * classes * filters}
    assert picnn["parameters"] - plain["parameters"] == 4 * classes * filters
    # Two operations a multiplication; no gradient of the images.
    forward = 2 * 15_470_264_320
    assert plain["operations"] == 3 * forward - 2 * 64 * 27 * 224**2
    # Maps of 7 x 7, read and written forward and backward.
    assert 4 * 4 * filters * 7**2 <= picnn["traffic"] < 6 * 4 * filters * 7**2


def test_the_committed_counts_are_those_of_the_networks() -> None:
    for backbone, inserted, method in (("vgg16", True, "icnn"), ("vit_b_16", False, "csg")):
        assert scaling.counted(backbone, inserted, method) in COST


def test_a_ring_sends_twice_the_bytes_less_one_share() -> None:
    assert scaling.ring_seconds(8e9, 2, 1e9) == 8
    assert scaling.ring_seconds(8e9, 4, 1e9) == 12


def test_the_page_tells_what_is_counted() -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    told = set(re.findall(r"\d+\.\d+ (?:MB|ms|GFLOP)", page))
    shown = set(re.findall(r"\d+\.\d+ (?:MB|ms|GFLOP)", "\n".join(scaling.cost_tables(COST))))
    assert len(told) > 15
    assert told <= shown, told - shown


def forked(command: list[str], *, env: dict[str, str], **given: object) -> object:
    """What ``subprocess.run`` would run, without starting Python and PyTorch anew."""
    flag, module, *arguments = command[1:]
    assert flag == "-m"
    if module == "torch.distributed.run":
        return finished(as_torchrun, arguments, environment=env)
    return finished(as_module, [module, *arguments], environment=env)


def test_every_table_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=forked))
    start = functools.partial(scaling.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(scaling.multiprocessing, "spawn", start)
    images = tmp_path / "images"
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            folder = images / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
                write_jpeg(pixels, str(folder / f"{number}.jpg"))
    for table in scaling.TABLES:
        flags = ["--smoke", "--table", table, "--images", str(images)]
        scaling.main([*flags, "--results", str(tmp_path / table)])
        (path,) = (tmp_path / table).iterdir()
        content = json.loads(path.read_text())
        assert content["command"].endswith("--images FOLDER --table " + table)
        assert scaling.report(content) in capsys.readouterr().out
    (entry,) = content["equal"]
    one, two = entry["figures"]
    assert entry["weights_apart"] < 1e-4
    assert two["negative_log_likelihood"] == pytest.approx(one["negative_log_likelihood"], rel=1e-4)
    steps = json.loads(next((tmp_path / "steps").iterdir()).read_text())["steps"]
    assert {*steps} == {"std", "picnn", "icnn"}
    assert all(of[str(n)]["seconds"] > 0 for of in steps.values() for n in (1, 2))
