"""The groups of an ICCNN over two processes on gloo: those of one that sees all images."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from picnn_fast.models import ICCNN
from tests.ranks import run_ranks

SHARES = ((0, 2), (1,))  # batches of each rank

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)


def model() -> ICCNN:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return ICCNN(features, head, 3, 8, groups=3).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 4, 2)
    return [
        (torch.rand(size, 3, 6, 7, generator=generator).double(), torch.arange(size) % 3)
        for size in sizes
    ]


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the test compares."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=len(SHARES)
    )
    network, loader = model(), batches()
    network.begin_epoch(1, images=[loader[i] for i in SHARES[rank]])
    torch.save(network.state_dict(), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_that_share_the_images_find_the_groups_of_one_process(tmp_path: Path) -> None:
    alone = model()
    alone.begin_epoch(1, images=batches())
    part = model()
    part.begin_epoch(1, images=[batches()[i] for i in SHARES[0]])
    assert not torch.allclose(part.response, alone.response)
    for state in run_ranks(__file__, tmp_path, len(SHARES)):
        assert torch.equal(state["groups"], alone.groups)
        torch.testing.assert_close(state["response"], alone.response)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
