"""The loop that walks the figures over a test split: once, or twice where one prepares itself."""

import dataclasses
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule, derive_seed
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.evaluation.figures import FIGURES, default_figures, sharing
from picnn_fast.evaluation.observation import Observation
from picnn_fast.evaluation.values import INTERVAL, NOT_AVAILABLE, Figures, as_numbers
from picnn_fast.metrics import draw_counts, percentile_interval
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from rich.progress import track

DRAWS = 8
RESAMPLES = 1000
# Of ``Measurement.seconds``: the images that are read, and the forward pass that figures share.
IMAGES, FORWARD = "images", "forward"


class NotFiniteError(ValueError):
    """What a network makes of a test image is no finite numbers; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Figures of a network, and what they were made of.

    Attributes:
        figures: as ``evaluate`` returns them.
        replicates: by figure, its value in each resample of the images, ``[R]`` float64 on the CPU,
            of which the interval is.
        seconds: wall time by figure, of reading images, ``"images"``, and of the forward pass,
            ``"forward"``; what several figures are parts of, or need of a batch, is counted with
            the first of them.
        images: how many the test split has.
        split: a number that tells these test images, as they were read, and their labels from
            others.
    """

    figures: Figures
    replicates: dict[str, Tensor]
    seconds: dict[str, float]
    images: int
    split: int


def evaluate(
    network: InterpretableNetwork,
    data: SeededDataModule,
    *,
    figures: Iterable[str] | None = None,
    intervals: bool = True,
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
        intervals: resample the images for intervals of 95 %, of each figure that is of images.
        seed: of the masks and pseudo-labels that are drawn; the resamples are always the same.
        draws: S, masks drawn for each image; figures are means over them.
        device: to compute on.
        progress: show a progress bar.

    Returns:
        Each figure by its name; ``<figure>_standard_error`` beside one that rests on draws;
        ``<figure>_interval``, its low and high end, beside one that is of images; text that begins
        with "n/a" in place of a figure that cannot be had, and says why.

    Raises:
        TypeError, ValueError: seed or draws that are no integers, or out of range; a name that is
            no figure's.
        NotFiniteError: a network whose maps or logits of a test image are not finite.
    """
    return measure(
        network,
        data,
        figures=figures,
        resamples=RESAMPLES if intervals else 0,
        seed=seed,
        draws=draws,
        device=device,
        progress=progress,
    ).figures


@torch.no_grad()
def measure(
    network: InterpretableNetwork,
    data: SeededDataModule,
    *,
    figures: Iterable[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    draws: int = DRAWS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Measurement:
    """As ``evaluate``, with what is wanted to compare networks, and the time that figures take.

    A figure's interval is that of 95 % of its values in resamples of the images: percentiles of
    the bootstrap, but where resamples lie to one side of the figure, see ``PerImageMetric``. It is
    of the images alone: networks that other seeds train differ besides.

    Args:
        network, data, figures, seed, draws, device, progress: as of ``evaluate``.
        resamples: of the images; fewer of a figure that costs much, 0: no intervals.

    Raises:
        TypeError, ValueError, NotFiniteError: as ``evaluate``.
    """
    checks.integer("seed", seed, 0)
    checks.integer("draws", draws, 1)
    checks.integer("resamples", resamples, 0)
    names = default_figures() if figures is None else list(dict.fromkeys(figures))
    for name in names:
        checks.one_of("figures", name, tuple(FIGURES))
    network = network.to(device).eval()
    clock = _Clock(torch.device(device))
    reasons = {name: FIGURES[name].needs(network, data) for name in names}
    groups = sharing(name for name in names if reasons[name] is None)
    metrics = {first: FIGURES[first].metric(network, data, draws).to(device) for first in groups}
    for metric in metrics.values():
        # Of several processes each sees the whole split: joined, images would count several times.
        metric.distributed_available_fn = lambda: False
    parts = isinstance(data, PartDataModule)
    samples: Any = data.part_sets["test"] if parts else data.test_set  # type: ignore[attr-defined]
    chosen = {first: _spread(len(samples), FIGURES[first].images) for first in groups}
    read = [0, 0]  # checksums of images and labels

    def observe(title: str) -> Iterator[tuple[slice, Observation]]:
        """The batches, and which images of the split they hold."""
        read[:] = 0, 0
        count = 0
        loader = data.part_loader("test") if parts else data.test_dataloader()  # type: ignore[attr-defined]
        shown = track(loader, title, transient=True, disable=not progress)
        for number, batch in enumerate(clock.each(IMAGES, shown)):
            for i, values in enumerate(batch[:2]):
                read[i] = zlib.crc32(values.contiguous().numpy(), read[i])
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
        if title == "preparing" and not any(tell.values()):
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
                    with clock(FORWARD):
                        _check_finite(selected[most], rows, place.start, groups[first][0])
                with clock(first):
                    add(metrics[first], selected[most])
    values: dict[str, Figures] = {
        name: {name: NOT_AVAILABLE + reason} for name, reason in reasons.items() if reason
    }
    replicates: dict[str, Tensor] = {}
    for first, group in track(
        groups.items(), "computing", transient=True, disable=not progress, total=len(groups)
    ):
        metric = metrics[first]
        if not metric.update_called:
            for name in group:
                values[name] = {name: f"{NOT_AVAILABLE}the test split has no image of it"}
            continue
        with clock(first):
            computed = metric.compute()
            for name in group:
                values[name] = as_numbers(name, FIGURES[name].of(computed))
            had = {n: v for n in group if isinstance(v := values[n][n], float)}
            if resamples and had:
                replicates |= _replicates(metric, had, int(chosen[first].sum()), resamples)
    for name, each in replicates.items():
        interval = percentile_interval(each)
        if interval is not None:
            values[name][name + INTERVAL] = list(interval)
    return Measurement(
        figures={key: value for name in names for key, value in values[name].items()},
        replicates={name: replicates[name] for name in names if name in replicates},
        seconds=dict(clock.seconds),
        images=len(samples),
        split=read[0] << 32 | read[1],
    )


def differences(first: Sequence[Measurement], second: Sequence[Measurement]) -> Figures:
    """What figures differ by, of networks measured on the same images.

    The resamples are the same images for all, so that what is hard in them is so for both sides:
    the interval of the difference is of the images alone, and may leave out 0 where those of the
    two figures overlap.

    Args:
        first: of one network, or several of which the means are compared.
        second: of those to take off.

    Returns:
        Mean of the first less that of the second, by figure that all have as a number, with
        ``<figure>_interval`` where all have resamples.

    Raises:
        ValueError: no measurement on a side, or they are not of the same test images.

    Example:
        >>> import picnn_fast
        >>> from picnn_fast.data import DATA
        >>> from picnn_fast.evaluation import differences, measure
        >>> data = DATA["digits"]()
        >>> one, other = (
        ...     measure(
        ...         picnn_fast.make_interpretable(
        ...             "small-resnet", method, num_classes=10, num_filters=10
        ...         ),
        ...         data,
        ...         figures=["acc1"],
        ...     )
        ...     for method in ("std", "picnn")
        ... )
        >>> sorted(differences([one], [other]))
        ['acc1', 'acc1_interval']
    """
    every = [*first, *second]
    if not first or not second or len({(run.images, run.split) for run in every}) > 1:
        raise ValueError(
            f"first, second: got {len(first)} and {len(second)} measurements of"
            f" {len({run.split for run in every})} sets of test images, want at least one of each,"
            " and the same test images"
        )
    found: Figures = {}
    for name in first[0].figures:
        values = [[run.figures.get(name) for run in runs] for runs in (first, second)]
        numbers = [[v for v in side if isinstance(v, float)] for side in values]
        if name not in FIGURES or list(map(len, numbers)) != list(map(len, values)):
            continue
        found[name] = statistics.fmean(numbers[0]) - statistics.fmean(numbers[1])
        if all(name in run.replicates for run in every):
            # The first are the same where there are fewer, of a figure that costs much.
            count = min(len(run.replicates[name]) for run in every)
            sides = [
                torch.stack([run.replicates[name][:count] for run in runs]).mean(0)
                for runs in (first, second)
            ]
            interval = percentile_interval(sides[0] - sides[1])
            if interval is not None:
                found[name + INTERVAL] = list(interval)
    return found


_NONE_LEFT = object()


class _Clock:
    """Wall time by what took it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with the time until each is there."""
        walk = iter(items)
        while True:
            with self(name):
                item = next(walk, _NONE_LEFT)
            if item is _NONE_LEFT:
                return
            yield item

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _check_finite(seen: Observation, rows: Tensor, start: int, figure: str) -> None:
    """
    Args:
        seen: of the images that ``rows`` ``[B]`` bool choose of a batch.
        start: the first image of that batch.
        figure: one that is of them.

    Raises:
        NotFiniteError: maps or logits of an image are NaN or infinity.
    """
    finite = seen.logits.isfinite().all(1) & seen.maps.flatten(1).isfinite().all(1)
    if finite.all():
        return
    image = start + int(rows.nonzero()[int((~finite).int().argmax())])
    pixels = seen.images[~finite].isfinite().all()
    cause = "its training diverged, or its weights are damaged; want another checkpoint of it"
    if not pixels:
        cause = "so is the image itself; want the data without it"
    raise NotFiniteError(
        f"{figure}: maps or logits of test image {image} are NaN or infinity, want finite ones of"
        f" the network: {cause}"
    )


def _replicates(
    metric: Any, figures: Mapping[str, float], images: int, count: int
) -> dict[str, Tensor]:
    """Values ``[R]`` in resamples of figures, where the metric that they are parts of has them."""
    images = getattr(metric, "seen", images)  # of one category, say
    if not hasattr(metric, "replicate") or images == 0:
        return {}
    count = min(count, getattr(metric, "most_resamples", None) or count)
    # Whatever the seed of what is drawn, for figures of several networks to be paired.
    blocks = [metric.replicate(counts) for counts in draw_counts(images, count)]
    values = {}
    for name, value in figures.items():
        each = torch.cat([FIGURES[name].of(block).cpu().double() for block in blocks])
        if getattr(metric, "resamples_lie_aside", False):
            each += value - each.nanmean()
        elif getattr(metric, "resamples_lie_above", False):
            each = (2 * value - each).clamp_min(0)
        values[name] = each
    return values


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
    if not isinstance(batch, PartSample):
        images, labels = batch
        return *data.as_taken(images, labels, device), None
    fields: Any = batch
    annotated: Any = PartSample(*(values.to(device) for values in fields))
    return *data.as_taken(annotated.image, annotated.label, device), annotated
