"""MutualInformationScore over two processes on gloo: the score of all their samples."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import MutualInformationScore
from tests.ranks import run_ranks

RANKS, CLASSES, FILTERS = 2, 3, 4
ESTIMATORS = ("knn", "histogram")
# Samples of each rank; one may have none, or another dtype.
SHARES = {"even": (30, 30), "uneven": (7, 50), "one empty": (0, 40), "mixed": (20, 30)}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)


def samples(share: str, rank: int) -> tuple[Tensor, Tensor]:
    """What one rank sees: its own range of activations, so that the histograms' grids differ."""
    generator = torch.Generator().manual_seed(rank)
    count = SHARES[share][rank]
    labels = torch.randint(CLASSES, (count,), generator=generator)
    activations = torch.randn(count, FILTERS, generator=generator) + labels[:, None]
    dtype = torch.float16 if share == "mixed" and rank else torch.bfloat16
    return (activations * 5**rank).relu().to(dtype), labels


def metric(estimator: Any) -> MutualInformationScore:
    return MutualInformationScore(CLASSES, estimator=estimator)


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the test compares."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    results = {}
    for estimator in ESTIMATORS:
        for share in SHARES:
            score = metric(estimator)
            activations, labels = samples(share, rank)
            for x, y in zip(activations.split(11), labels.split(11), strict=True):
                if len(y):
                    score.update(x, y)
            score._update_count = max(1, score._update_count)  # no warning of an idle rank
            results[estimator, share] = score.matrix()
            # Synchronising leaves a rank with its own samples: it may go on.
            assert sum(map(len, score.labels)) == len(labels) if estimator == "knn" else True
            score.update(activations[:0], labels[:0])
            results[estimator, share, "again"] = score.matrix()
        score = metric(estimator)
        score.update(torch.ones(5, FILTERS + rank), torch.arange(5) % CLASSES)
        with pytest.raises(ValueError, match=r"^activations: got 4 and 5 filters on different"):
            score.compute()
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Tensor]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranks_together_score_all_samples(results, estimator, share):
    joined = metric(estimator)
    parts = [samples(share, rank) for rank in range(RANKS)]
    joined.update(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    expected = joined.matrix()
    assert expected.max() > 0.1
    for result in results:
        assert torch.equal(result[estimator, share], expected)
        assert torch.equal(result[estimator, share, "again"], expected)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
