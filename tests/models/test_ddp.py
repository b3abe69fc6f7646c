"""PICNN under DistributedDataParallel: two processes on gloo."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from picnn_fast.models import PICNN

RANKS, BATCH, CLASSES, FILTERS = 2, 8, 3, 6

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def build() -> PICNN:
    torch.manual_seed(0)
    # No batch norm: its statistics are per rank, so gradients would rightly differ.
    features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, CLASSES))
    options = {"interpretation_loss_on": "all", "correspondence_lr": 0.1}
    return PICNN(features, head, CLASSES, FILTERS, in_channels=5, **options).double()


def joined_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = RANKS * BATCH
    return {
        "images": torch.randn(size, 3, 6, 6, generator=generator).double(),
        "labels": torch.randint(CLASSES, (size,), generator=generator),
        "drawn": torch.randint(CLASSES, (size,), generator=generator),
        "mask": torch.randint(2, (size, FILTERS), generator=generator).double(),
    }


class GivenMasks(nn.Module):
    """Both pathways by masks and pseudo-labels that are given, gradients straight through."""

    def __init__(self, model: PICNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, drawn: Tensor, mask: Tensor) -> Any:
        maps = self.model.filter_maps(images)
        p = self.model.correspondence()[drawn]
        z = mask + p - p.detach()
        return self.model.head_logits(maps), self.model.head_logits(maps, z)


def given_masks_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits, masked_logits = network(batch["images"], batch["drawn"], batch["mask"])
    entropy = nn.functional.cross_entropy
    return entropy(logits, batch["labels"]) + 2 * entropy(masked_logits, batch["labels"])


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        result: dict[str, Any] = {}
        joined = joined_batch()
        share = {name: value.chunk(RANKS)[rank] for name, value in joined.items()}
        network = DistributedDataParallel(GivenMasks(build()))
        given_masks_loss(network, share).backward()
        result["gradients"] = {
            name: p.grad.clone() for name, p in network.module.model.named_parameters()
        }

        # Training steps on the same images with the same seed; in the second, one rank has no
        # right pseudo-label at all and must still take part in the reduction.
        model = build()
        model.interpretation_loss_on = "correct"
        network = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
        torch.manual_seed(7)
        images = joined["images"]
        for step in range(3):
            output = network(images)
            labels = joined["labels"]
            if step == 1 and rank == 1:
                labels = (output.pseudo_label + 1) % CLASSES
                assert model.loss_terms(output, labels)["interpretation"].item() == 0
            optimizer.zero_grad()
            model.loss(output, labels).backward()
            optimizer.step()
            if step == 0:
                result["mask"] = output.mask.detach()
                result["pseudo_label"] = output.pseudo_label
        result["state"] = {name: value.clone() for name, value in model.state_dict().items()}
        torch.save(result, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_gradients_agree_with_one_process_on_the_joined_batch(
    results: list[dict[str, Any]],
) -> None:
    alone = GivenMasks(build())
    given_masks_loss(alone, joined_batch()).backward()
    for name, parameter in alone.model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        for result in results:
            torch.testing.assert_close(result["gradients"][name], parameter.grad)


def test_ranks_seeded_alike_draw_different_masks(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert (first["mask"] != second["mask"]).any()
    assert (first["pseudo_label"] != second["pseudo_label"]).any()


def test_ranks_hold_the_same_weights_after_training_steps(results: list[dict[str, Any]]) -> None:
    first, second = results
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    start = copy.deepcopy(build().state_dict())
    assert all((first["state"][name] != start[name]).any() for name in start)
