"""Part metrics over two processes on gloo: those of all their images."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import LocationInstability, PartInterpretability
from tests.metrics.test_parts import FIELD, FILTERS, LANDMARKS, PARTS, example
from tests.ranks import run_ranks

RANKS, CLASSES = 2, 2
# Images of each rank; one may have none.
SHARES = {"even": (8, 8), "uneven": (3, 11), "one empty": (0, 9)}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)


def metrics() -> dict[str, Any]:
    return {
        "instability": LocationInstability(
            FILTERS, LANDMARKS, FIELD, num_classes=CLASSES, images=4
        ),
        "interpretability": PartInterpretability(
            FILTERS, PARTS, FIELD, num_classes=CLASSES, top=0.1
        ),
    }


def images(share: str, rank: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    maps, landmarks, masks, labels = example(rank, SHARES[share][rank], CLASSES)
    return {
        "instability": (maps, landmarks, labels),
        "interpretability": (maps, masks, labels),
    }


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the test compares."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    results = {}
    for share in SHARES:
        for name, metric in metrics().items():
            data = images(share, rank)[name]
            if len(data[0]):
                metric.update(*data)
            metric._update_count = 1  # no warning of an idle rank
            results[share, name] = metric.per_filter()
            # Synchronising leaves a rank with its own images: it may go on.
            metric.update(*(x[:0] for x in data))
            results[share, name, "again"] = metric.per_filter()
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Tensor]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["instability", "interpretability"])
def test_ranks_together_measure_all_images(
    results: list[dict[Any, Tensor]], name: str, share: str
) -> None:
    joined = metrics()[name]
    for rank in range(RANKS):  # of equal peaks the lower rank's counts
        joined.update(*images(share, rank)[name])
    expected = joined.per_filter()
    assert expected.max() > 0
    for result in results:
        assert torch.equal(result[share, name], expected)
        assert torch.equal(result[share, name, "again"], expected)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
