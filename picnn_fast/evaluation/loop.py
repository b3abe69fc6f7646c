"""The loop that walks the figures over a test split, once."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule, derive_seed
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.evaluation.figures import FIGURES, NOT_AVAILABLE, as_numbers
from picnn_fast.evaluation.observation import Observation
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops import checks

with extra("train"):
    from rich.progress import track

# Figure to its value, ``<figure>_standard_error`` to that of one that rests on draws; a text
# "n/a: …" says why a figure cannot be had.
Figures = dict[str, float | str]
DRAWS = 8


@torch.no_grad()
def evaluate(
    network: InterpretableNetwork,
    data: SeededDataModule,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Figures:
    """Every figure of ``FIGURES`` of a network, on the test split of ``data``.

    Args:
        network: left on ``device``, in eval mode.
        data: set up.
        seed: of the masks and pseudo-labels that are drawn.
        draws: S, masks drawn for each image; figures are means over them.
        device: to compute on.
        progress: show a progress bar.

    Returns:
        Each figure by its name; ``<figure>_standard_error`` beside one that rests on draws; text
        that begins with "n/a" in place of a figure that cannot be had, and says why.

    Raises:
        TypeError, ValueError: seed or draws that are no integers, or out of range.
    """
    checks.integer("seed", seed, 0)
    checks.integer("draws", draws, 1)
    network = network.to(device).eval()
    reasons = {name: figure.needs(network, data) for name, figure in FIGURES.items()}
    metrics = {
        name: FIGURES[name].metric(network, data, draws).to(device)
        for name, reason in reasons.items()
        if reason is None
    }
    parts = isinstance(data, PartDataModule)
    batches = data.part_loader("test") if parts else data.test_dataloader()  # type: ignore[attr-defined]
    for number, batch in enumerate(
        track(batches, "evaluating", transient=True, disable=not progress)
    ):
        images, labels, annotated = _on_device(batch, data, device)
        seen = Observation(
            network, images, labels, seed=derive_seed(seed, number), draws=draws, parts=annotated
        )
        for name, metric in metrics.items():
            FIGURES[name].update(metric, seen)
    values: Figures = {}
    for name, reason in reasons.items():
        if reason is not None:
            values[name] = NOT_AVAILABLE + reason
        elif not metrics[name].update_called:
            values[name] = f"{NOT_AVAILABLE}the test split has no image of it"
        else:
            values |= as_numbers(name, metrics[name].compute())
    return values


def _on_device(
    batch: PartSample | list[Tensor], data: SeededDataModule, device: torch.device | str
) -> tuple[Tensor, Tensor, PartSample | None]:
    """Images and labels as the network takes them, and the annotations that came with them."""
    annotated: Any = None
    pair: Any = batch
    if isinstance(batch, PartSample):
        fields: Any = batch
        annotated = PartSample(*(values.to(device) for values in fields))
        pair = [annotated.image, annotated.label]
    # What Lightning does around the transfer.
    pair = data.on_before_batch_transfer(pair, 0)
    images, labels = data.on_after_batch_transfer([values.to(device) for values in pair], 0)
    return images, labels, annotated
