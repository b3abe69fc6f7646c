"""Two processes on gloo: ranks draw apart, and gradients are those of the joined batch."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast.functional import bernoulli_mask, class_gate
from tests.ranks import run_ranks

RANKS, BATCH, FILTERS, CLASSES = 2, 6, 16, 4


class Masked(torch.nn.Module):
    """A convolution and a discrimination head, and the masked pathway between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, FILTERS, 3)
        self.head = torch.nn.Linear(FILTERS, CLASSES)
        self.correspondence = torch.nn.Parameter(torch.rand(CLASSES, FILTERS).round())
        self.gate = torch.nn.Parameter(torch.rand(CLASSES, FILTERS))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.convolution(images)
        # So sure of the label, and of each filter, that the draws are given.
        logits = 100.0 * torch.nn.functional.one_hot(labels, CLASSES) + self.head(
            features.mean((2, 3))
        )
        masked, _, pseudo_label = bernoulli_mask(features, logits, self.correspondence)
        assert torch.equal(pseudo_label, labels)
        gated = class_gate(features, self.gate, labels)
        return (masked.square() + gated.sin()).mean((1, 2, 3)).mean() + logits.square().mean()


def joined_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(RANKS * BATCH, 3, 5, 5, generator=generator)
    return images, torch.arange(RANKS * BATCH) % CLASSES


def uncertain_draws(**options: Any) -> tuple[Tensor, Tensor]:
    """Mask and pseudo-label where every class and filter is as likely as any other."""
    features, logits = torch.ones(BATCH, 64), torch.zeros(BATCH, 50)
    return bernoulli_mask(features, logits, torch.full((50, 64), 0.5), **options)[1:]


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the test compares."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    torch.manual_seed(5)  # the same on every rank
    drawn = uncertain_draws()
    after_forced = uncertain_draws(seed=3, rank=0)
    seeded = uncertain_draws(seed=3)
    model = torch.nn.parallel.DistributedDataParallel(Masked())
    images, labels = (t[rank * BATCH : (rank + 1) * BATCH] for t in joined_batch())
    model(images, labels).backward()
    torch.save(
        {
            "drawn": drawn,
            "seeded": seeded,
            "forced": after_forced,
            "gradients": {name: p.grad for name, p in model.module.named_parameters()},
        },
        folder / f"rank{rank}.pt",
    )
    # Both done, and nothing left that holds the group: its threads end with it, not with Python.
    torch.distributed.barrier()
    del model
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    return run_ranks(__file__, tmp_path_factory.mktemp("ddp"), RANKS)


def test_ranks_seeded_alike_draw_different_masks_and_labels(results):
    for key in ("drawn", "seeded"):
        masks, labels = zip(*(result[key] for result in results), strict=True)
        agreement = (masks[0] == masks[1]).double().mean().item()
        assert 0.3 < agreement < 0.7
        assert not torch.equal(labels[0], labels[1])


def test_a_process_draws_what_its_rank_says_wherever_it_runs(results):
    for rank, result in enumerate(results):
        mask, label = uncertain_draws(seed=3, rank=rank)
        assert torch.equal(result["seeded"][0], mask)
        assert torch.equal(result["seeded"][1], label)
        alone = uncertain_draws(seed=3)  # no process group: rank 0
        assert torch.equal(result["forced"][0], alone[0])
        assert torch.equal(result["forced"][1], alone[1])


def test_gradients_for_given_masks_are_those_of_the_joined_batch(results):
    model = Masked()
    model(*joined_batch()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0
        for result in results:
            torch.testing.assert_close(result["gradients"][name], parameter.grad)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
