"""Two processes that measure together: the figures of one process, and its errors."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from picnn_fast.cli import main
from picnn_fast.data import DATA, SeededDataModule
from picnn_fast.evaluation import FIGURES, Figure, Measurement, NotFiniteError, measure
from picnn_fast.evaluation.shares import Share
from picnn_fast.metrics import MeanOverImages
from picnn_fast.models import make_interpretable
from tests.ranks import run_ranks

RANKS = 2
# By the clock, and attacks, which want more images than are quick.
LEFT_OUT = {name for name, figure in FIGURES.items() if name.startswith(("attack", "detection"))}
LEFT_OUT |= {"throughput", "throughput_plain", "overhead"}
COUNTED = {
    "acc1",
    "acc2",
    "acc3",
    "leakage",
    "pseudo_label_leakage",
    "removed_class",
    "more_errors",
}
# The size of batches: of all images in one, the second process has none.
CASES = {"picnn": 7, "csg": 60, "explainer": 25}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)


class Centred(MeanOverImages):
    """A metric that prepares itself, and does not say how ranks are to join what it then saw."""

    total, images = 0.0, 0

    def prepare(self, values: torch.Tensor) -> None:
        self.total, self.images = self.total + values.sum(), self.images + len(values)

    def update(self, values: torch.Tensor) -> None:
        super().update(values - self.total / self.images)


def _mean(seen: Any) -> torch.Tensor:
    return seen.pooled.double().mean(1)


def register() -> None:
    """Figures of metrics that are not ours."""
    shared: Any = {"heading": "foreign", "meaning": "…", "better": "lower", "reading": "…"}
    FIGURES["foreign_mean"] = Figure(
        metric=lambda network, data, draws: MeanMetric(),
        update=lambda metric, seen: metric.update(seen.labels.float()),
        **shared,
    )
    FIGURES["foreign_prepared"] = Figure(
        metric=lambda network, data, draws: Centred(),
        prepare=lambda metric, seen: metric.prepare(_mean(seen)),
        update=lambda metric, seen: metric.update(_mean(seen)[:-1]),
        images=17,
        **shared,
    )


def data_of(method: str) -> SeededDataModule:
    data = DATA["part-animals"](
        batch_size=CASES[method], image_size=32, train_images=6, test_images=60
    )
    data.setup()
    return data


def network_of(method: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if method == "explainer":
        layers = [nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()]
        performer = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6))
        return make_interpretable(performer, method, num_classes=6)
    network = make_interpretable("small-cnn", method, num_classes=6, num_filters=8)
    if method == "csg":
        return network
    # Some images are right, so that there are grids of the pointing game.
    data = data_of(method)
    optimizer = torch.optim.Adam(network.parameter_groups(lr=1e-2))
    batch = next(iter(data.part_loader("test")))
    images = data.normalise(batch.image)
    for _ in range(20):
        optimizer.zero_grad()
        network.loss(network(images, batch.label), batch.label).backward()
        optimizer.step()
    return network


def measured(method: str, **options: Any) -> Measurement:
    names = [name for name in FIGURES if name not in LEFT_OUT]
    if method == "explainer":
        names = ["p", "more_errors", "location_instability_performer", "acc1"]
    return measure(
        network_of(method, options.pop("network", 0)),
        data_of(method),
        figures=names,
        resamples=30,
        draws=2,
        **options,
    )


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the tests compare."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    register()
    results: dict[str, Any] = {}
    for method in CASES:
        # Ranks begin with networks of their own: that of the first counts.
        found = measured(method, network=rank, progress=True)
        results[method] = found.figures, found.replicates, found.split, found.images
    results["alone"] = measured("csg", over_ranks=False).figures
    results["times"] = measure(
        network_of("csg"), data_of("csg"), figures=["throughput", "acc1"], resamples=0
    ).figures
    FIGURES["failing"] = Figure(
        **{**FIGURES["acc1"].__dict__, "update": lambda metric, seen: _fail_on(rank)}
    )
    with pytest.raises(NotFiniteError, match=r"^image 3: ") as raised:
        measure(network_of("csg"), data_of("picnn"), figures=["failing"], resamples=0)
    results["error"] = str(raised.value), getattr(raised.value, "__notes__", [])
    results["command"] = _command(rank)
    torch.save(results, folder / f"rank{rank}.pt")


def _fail_on(rank: int) -> None:
    if rank == 1:
        raise NotFiniteError("image 3: got none")


def plain() -> nn.Module:
    """A network for ``--model``."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 10))


def _command(rank: int) -> tuple[int, str, str]:
    """Status, output and errors of the command, whose second process fails; it ends the group."""
    for name, value in {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "RANK": rank}.items():
        os.environ[name] = str(value)
    os.environ |= {"LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    flags = ["--data", "digits", "--figures", "failing", "--accelerator", "cpu"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["evaluate", "--model", f"{plain.__module__}:plain", *flags])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.fixture
def _foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(FIGURES)
    register()
    for name in FIGURES.keys() - before.keys():
        figure = FIGURES.pop(name)
        monkeypatch.setitem(FIGURES, name, figure)


@pytest.mark.usefixtures("_foreign")
@pytest.mark.parametrize("method", CASES)
def test_processes_together_measure_what_one_does(results, method):
    expected = measured(method)
    numbers = [v for name, v in expected.figures.items() if isinstance(v, float)]
    assert len(numbers) > (20 if method == "picnn" else 3)
    for result in results:
        figures, replicates, split, images = result[method]
        assert (split, images) == (expected.split, expected.images)
        assert figures.keys() == expected.figures.keys()
        for name, value in expected.figures.items():
            if isinstance(value, str):
                assert figures[name] == value
            else:
                assert figures[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        assert replicates.keys() == expected.replicates.keys()
        for name, values in expected.replicates.items():
            torch.testing.assert_close(
                replicates[name], values, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
            )
        for name in COUNTED & figures.keys():
            assert figures[name] == expected.figures[name]  # counted


def test_a_process_may_measure_alone(results):
    for result in results:
        assert result["alone"] == results[0]["csg"][0]


def test_time_is_measured_on_the_first_alone(results):
    one, other = (result["times"] for result in results)
    assert one == other
    assert one["throughput"] > 0


def test_an_error_of_one_process_ends_all(results):
    (first, notes), (second, own) = (result["error"] for result in results)
    assert first == second == "image 3: got none"
    assert "raised on rank 1:" in notes[0]
    assert "in _fail_on" in notes[0]
    assert own == []


def test_the_command_says_what_one_process_fails_at_in_one_line(results):
    line = "picnn-fast evaluate: error: image 3: got none"
    status, out, err = results[0]["command"]
    assert (status, out, err.strip()) == (2, "", line)
    assert results[1]["command"] == (0, "", "")


@pytest.mark.parametrize("images", [0, 1, 10, 11, 95])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_whole_batches_of_every_image_once(images, ranks):
    shares = [Share(None, rank, ranks, images, 10) for rank in range(ranks)]
    assert [place for share in shares for place in share.places] == list(range(images))
    assert all(share.places.start % 10 == 0 for share in shares if share.places)
    counts = [len(share.batches) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)
    chosen = torch.arange(images) % 20 < 10
    for share in shares:
        assert sum(share.earlier(chosen)) == int(chosen[: share.places.start].sum())


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
