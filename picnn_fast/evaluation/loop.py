"""The loop that walks the figures over a test split: once, or twice where one prepares itself."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule, derive_seed
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.evaluation.figures import (
    FIGURES,
    NOT_AVAILABLE,
    as_numbers,
    default_figures,
    sharing,
)
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
    figures: Iterable[str] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Figures:
    """Figures of ``FIGURES`` of a network, on the test split of ``data``.

    Of several processes each measures the whole split by itself.

    Args:
        network: left on ``device``, in eval mode.
        data: set up.
        figures: names of ``FIGURES``; None: all but those to be asked for, which cost much.
        seed: of the masks and pseudo-labels that are drawn.
        draws: S, masks drawn for each image; figures are means over them.
        device: to compute on.
        progress: show a progress bar.

    Returns:
        Each figure by its name; ``<figure>_standard_error`` beside one that rests on draws; text
        that begins with "n/a" in place of a figure that cannot be had, and says why.

    Raises:
        TypeError, ValueError: seed or draws that are no integers, or out of range; a name that is
            no figure's.
    """
    checks.integer("seed", seed, 0)
    checks.integer("draws", draws, 1)
    names = default_figures() if figures is None else list(dict.fromkeys(figures))
    for name in names:
        checks.one_of("figures", name, tuple(FIGURES))
    network = network.to(device).eval()
    reasons = {name: FIGURES[name].needs(network, data) for name in names}
    groups = sharing(name for name in names if reasons[name] is None)
    metrics = {first: FIGURES[first].metric(network, data, draws).to(device) for first in groups}
    for metric in metrics.values():
        # Of several processes each sees the whole split: joined, images would count several times.
        metric.distributed_available_fn = lambda: False
    parts = isinstance(data, PartDataModule)
    samples: Any = data.part_sets["test"] if parts else data.test_set  # type: ignore[attr-defined]
    chosen = {first: _spread(len(samples), FIGURES[first].images) for first in groups}

    def observe(title: str) -> Iterator[tuple[slice, Observation]]:
        """The batches, and which images of the split they hold."""
        loader = data.part_loader("test") if parts else data.test_dataloader()  # type: ignore[attr-defined]
        count = 0
        for number, batch in enumerate(track(loader, title, transient=True, disable=not progress)):
            images, labels, annotated = _on_device(batch, data, device)
            drawn: Any = {"seed": derive_seed(seed, number), "draws": draws}
            seen = Observation(network, images, labels, parts=annotated, **drawn)
            yield slice(count, count + len(labels)), seen
            count += len(labels)

    prepared = {
        first: FIGURES[first].prepare if FIGURES[first].prepares(network) else None
        for first in groups
    }
    updates = {first: FIGURES[first].update for first in groups}
    for title, tell in (("preparing", prepared), ("evaluating", updates)):
        if not any(tell.values()):
            continue
        for place, seen in observe(title):
            selected: dict[int | None, Observation] = {}  # by how many images are looked at
            for first, add in tell.items():
                rows = chosen[first][place]
                if add is None or not rows.any():
                    continue
                most = FIGURES[first].images
                if most not in selected:
                    selected[most] = seen if rows.all() else seen.select(rows)
                add(metrics[first], selected[most])
    values: dict[str, Figures] = {
        name: {name: NOT_AVAILABLE + reason} for name, reason in reasons.items() if reason
    }
    for first, group in groups.items():
        metric = metrics[first]
        computed = metric.compute() if metric.update_called else None
        for name in group:
            if computed is None:
                values[name] = {name: f"{NOT_AVAILABLE}the test split has no image of it"}
            else:
                values[name] = as_numbers(name, FIGURES[name].of(computed))
    return {key: value for name in names for key, value in values[name].items()}


def _spread(images: int, most: int | None) -> Tensor:
    """Which of so many images are looked at, ``[images]`` bool: at most so many, spread evenly."""
    chosen = torch.ones(images, dtype=torch.bool)
    if most is not None and images > most:
        chosen[:] = False
        chosen[torch.arange(most) * images // most] = True
    return chosen


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
