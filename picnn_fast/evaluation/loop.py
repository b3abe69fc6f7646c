"""The loop that walks the figures over a test split: once, or twice where one prepares itself."""

import dataclasses
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from picnn_fast.evaluation.shares import Share, processes, spread
from picnn_fast.evaluation.values import INTERVAL, NOT_AVAILABLE, Figures, as_numbers
from picnn_fast.metrics import Throughput, draw_counts, percentile_interval
from picnn_fast.metrics.ranks import gather_rows, take_first
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
            the first of them; of several processes each that of the one where it took longest.
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
    over_ranks: bool = True,
) -> Figures:
    """Figures of ``FIGURES`` of a network, on the test split of ``data``.

    Of several processes of ``torch.distributed`` each measures some batches, and all return the
    figures of the whole split, each image counted once: those of one process, but for the order in
    which numbers that are not whole are added up. The network is then that of the first: its
    parameters and buffers overwrite the others'. An error of one is raised on all.

    Args:
        network: left on ``device``, in eval mode.
        data: set up.
        figures: names of ``FIGURES``; None: all but those to be asked for, which cost much.
        intervals: resample the images for intervals of 95 %, of each figure that is of images.
        seed: of the masks and pseudo-labels that are drawn; the resamples are always the same.
        draws: S, masks drawn for each image; figures are means over them.
        device: to compute on.
        progress: show a progress bar, of several processes in the first.
        over_ranks: measure together with the other processes, all of which have to call; False:
            the whole split in this one, whatever others do.

    Returns:
        Each figure by its name; ``<figure>_standard_error`` beside one that rests on draws;
        ``<figure>_interval``, its low and high end, beside one that is of images; text that begins
        with "n/a" in place of a figure that cannot be had, and says why.

    Raises:
        TypeError, ValueError: seed or draws that are no integers, or out of range; a name that is
            no figure's.
        NotFiniteError: a network whose maps or logits of a test image are not finite.
        ConnectionError: another process has ended, or does not answer.
    """
    return measure(
        network,
        data,
        figures=figures,
        resamples=RESAMPLES if checks.boolean("intervals", intervals) else 0,
        seed=seed,
        draws=draws,
        device=device,
        progress=progress,
        over_ranks=over_ranks,
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
    over_ranks: bool = True,
) -> Measurement:
    """As ``evaluate``, with what is wanted to compare networks, and the time that figures take.

    A figure's interval is that of 95 % of its values in resamples of the images: percentiles of
    the bootstrap, but where resamples lie to one side of the figure, see ``PerImageMetric``. It is
    of the images alone: networks that other seeds train differ besides.

    Args:
        network, data, figures, seed, draws, device, progress, over_ranks: as of ``evaluate``.
        resamples: of the images; fewer of a figure that costs much, 0: no intervals.

    Raises:
        TypeError, ValueError, NotFiniteError: as ``evaluate``.
    """
    checks.integer("seed", seed, 0)
    checks.integer("draws", draws, 1)
    checks.integer("resamples", resamples, 0)
    checks.boolean("over_ranks", over_ranks)
    names = default_figures() if figures is None else list(dict.fromkeys(figures))
    for name in names:
        checks.one_of("figures", name, tuple(FIGURES))
    network = network.to(device).eval()
    with processes(over_ranks) as (group, rank, ranks):
        if ranks > 1:
            take_first([*network.parameters(), *network.buffers()], group)
        parts = isinstance(data, PartDataModule)
        samples: Any = data.part_sets["test"] if parts else data.test_set  # type: ignore[attr-defined]
        share = Share(group, rank, ranks, len(samples), data.batch_size)
        options: Any = {"seed": seed, "draws": draws, "progress": progress and rank == 0}
        with share.agreeing():
            evaluation = _Evaluation(network, data, names, samples, share, device, **options)
        evaluation.look()
        values, replicates, seconds = evaluation.compute(resamples)
        split = evaluation.split()
    for name, each in replicates.items():
        interval = percentile_interval(each)
        if interval is not None:
            values[name][name + INTERVAL] = list(interval)
    return Measurement(
        figures={key: value for name in names for key, value in values[name].items()},
        replicates={name: replicates[name] for name in names if name in replicates},
        seconds=seconds,
        images=len(samples),
        split=split,
    )


class _Evaluation:
    """The figures of one network, as they are taken."""

    def __init__(
        self,
        network: InterpretableNetwork,
        data: SeededDataModule,
        names: Sequence[str],
        samples: Any,
        share: Share,
        device: torch.device | str,
        *,
        seed: int,
        draws: int,
        progress: bool,
    ) -> None:
        self.network, self.data, self.samples, self.share = network, data, samples, share
        self.device, self.seed, self.draws, self.progress = device, seed, draws, progress
        self.clock = _Clock(torch.device(device))
        self.reasons = {name: FIGURES[name].needs(network, data) for name in names}
        self.groups = sharing(name for name in names if self.reasons[name] is None)
        self.metrics: dict[str, Any] = {
            first: FIGURES[first].metric(network, data, draws).to(device) for first in self.groups
        }
        for metric in self.metrics.values():
            metric.distributed_available_fn = lambda: False  # they are joined here
        self.chosen = {first: spread(share.images, FIGURES[first].images) for first in self.groups}
        self.read: list[tuple[int, int]] = []  # checksums of each image and its label

    def look(self) -> None:
        """Show the metrics the images, those that prepare themselves twice."""
        share = self.share
        prepared = {
            first: add
            for first in self.groups
            if (add := FIGURES[first].prepare) and FIGURES[first].prepares(self.network)
        }
        alone = {
            first: add
            for first, add in prepared.items()
            if share.ranks > 1 and not hasattr(self.metrics[first], "join_prepared")
        }
        with share.agreeing():
            self._catch_up()
            self._walk("preparing", {k: v for k, v in prepared.items() if k not in alone}, share)
            self._walk("preparing", alone, share.whole)
        if share.ranks > 1:
            for first in prepared:
                if first not in alone:
                    self.metrics[first].join_prepared(share.group)
        with share.agreeing():
            self._walk("evaluating", {k: FIGURES[k].update for k in self.groups}, share)

    def _catch_up(self) -> None:
        """Show metrics that look back on earlier images those that other processes have."""
        if self.share.places.start == 0:
            return
        seen: dict[tuple[int, ...], Observation] = {}
        for first, metric in self.metrics.items():
            if not hasattr(metric, "skip"):
                continue
            wanted = metric.skip(self.share.earlier(self.chosen[first]))
            if not wanted:
                continue
            places = tuple(self.chosen[first].nonzero()[:, 0][wanted].tolist())
            if places not in seen:
                (batch,) = self.data.in_order(self.samples, places)  # of one batch at most
                images, labels, parts = _on_device(batch, self.data, self.device)
                seen[places] = Observation(self.network, images, labels, seed=0, parts=parts)
            with self.clock(first):
                metric.keep(seen[places].maps, seen[places].labels)

    def _walk(
        self, title: str, tell: Mapping[str, Callable[[Any, Observation], None]], share: Share
    ) -> None:
        """Tell metrics of the batches of a share."""
        for place, seen in self._observe(title, share) if tell else ():
            selected: dict[int | None, Observation] = {}  # by how many images are looked at
            for first, add in tell.items():
                rows = self.chosen[first][place]
                if not rows.any():
                    continue
                most = FIGURES[first].images
                if most not in selected:
                    selected[most] = seen if rows.all() else seen.select(rows)
                    with self.clock(FORWARD):
                        _check_finite(selected[most], rows, place.start, self.groups[first][0])
                with self.clock(first):
                    add(self.metrics[first], selected[most])

    def _observe(self, title: str, share: Share) -> Iterator[tuple[slice, Observation]]:
        """The batches of a share, and which images of the split they hold."""
        self.read = []
        if share.ranks > 1:
            loader = self.data.in_order(self.samples, share.places)
        elif isinstance(self.data, PartDataModule):
            loader = self.data.part_loader("test")
        else:
            loader = self.data.test_dataloader()
        count = share.places.start
        shown = track(loader, title, transient=True, disable=not self.progress)
        for number, batch in enumerate(self.clock.each(IMAGES, shown), share.batches.start):
            self.read += zip(*map(_checksums, batch[:2]), strict=True)
            images, labels, annotated = _on_device(batch, self.data, self.device)
            drawn: Any = {"seed": derive_seed(self.seed, number), "draws": self.draws}
            seen = Observation(self.network, images, labels, parts=annotated, **drawn)
            yield slice(count, count + len(labels)), seen
            count += len(labels)

    def compute(
        self, resamples: int
    ) -> tuple[dict[str, Figures], dict[str, Tensor], dict[str, float]]:
        """Values and replicates of the figures, and seconds, on every rank.

        Of several processes each computes some figures, of what it then joins; those of time
        first, while the others wait.
        """
        share = self.share
        every = share.gather({first: m.update_called for first, m in self.metrics.items()})
        shown = {first: any(rank[first] for rank in every) for first in self.groups}
        timed = [k for k, metric in self.metrics.items() if isinstance(metric, Throughput)]
        found: dict[str, Any] = {}
        for firsts in (timed, [k for k in self.groups if k not in timed]):
            owned = {first: place % share.ranks for place, first in enumerate(firsts)}
            for first, owner in owned.items():
                if share.ranks > 1 and shown[first]:
                    self._join(first, owner)
            own = {}
            with share.agreeing():
                mine = [first for first in firsts if owned[first] == share.rank]
                for first in track(
                    mine, "computing", transient=True, disable=not self.progress, total=len(mine)
                ):
                    own[first] = self._figures(first, resamples, shown[first])
            for part in share.gather(own):
                found |= part
        values: dict[str, Figures] = {
            name: {name: NOT_AVAILABLE + why} for name, why in self.reasons.items() if why
        }
        replicates: dict[str, Tensor] = {}
        for first in self.groups:
            values |= found[first][0]
            replicates |= found[first][1]
        return values, replicates, self._seconds()

    def _join(self, first: str, owner: int) -> None:
        """Let a metric on one rank be as if it had seen the images of all."""
        metric = self.metrics[first]
        with self.clock(first):
            if hasattr(metric, "join"):
                metric.join(owner, self.share.group)
            else:
                metric.sync(process_group=self.share.group, distributed_available=lambda: True)
                metric._is_synced = False  # it is computed as one that saw them
        metric._update_count = max(1, metric._update_count)

    def _figures(
        self, first: str, resamples: int, shown: bool
    ) -> tuple[dict[str, Figures], dict[str, Tensor]]:
        """Values of the figures of one metric, and their replicates."""
        metric, group = self.metrics[first], self.groups[first]
        if not shown:
            reason = f"{NOT_AVAILABLE}the test split has no image of it"
            return {name: {name: reason} for name in group}, {}
        with self.clock(first):
            computed = metric.compute()
            values = {name: as_numbers(name, FIGURES[name].of(computed)) for name in group}
            had = {n: v for n in group if isinstance(v := values[n][n], float)}
            if not resamples or not had:
                return values, {}
            images = int(self.chosen[first].sum())
            return values, _replicates(metric, had, images, resamples)

    def _seconds(self) -> dict[str, float]:
        """By what took them, on the rank where it took longest."""
        longest: dict[str, float] = {}
        for seconds in self.share.gather(dict(self.clock.seconds)):
            for name, value in seconds.items():
                longest[name] = max(value, longest.get(name, 0.0))
        return longest

    def split(self) -> int:
        """A number that tells images and labels from others."""
        sums = torch.tensor(self.read, dtype=torch.int64).view(-1, 2)
        if self.share.ranks > 1:
            joined = gather_rows(sums, None, self.share.group)
            assert joined is not None
            sums = joined
        of_images, of_labels = (zlib.crc32(column.contiguous().numpy()) for column in sums.T)
        return of_images << 32 | of_labels


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


def _checksums(values: Tensor) -> list[int]:
    """Of each image, or label, of a batch."""
    return [zlib.crc32(each.numpy()) for each in values.contiguous()]


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
