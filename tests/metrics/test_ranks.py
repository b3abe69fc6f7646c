"""Every metric over two processes on gloo: what one process computes of all their images."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from picnn_fast import metrics
from picnn_fast.backbones import ReceptiveField
from picnn_fast.metrics import draw_counts
from picnn_fast.metrics.ranks import agreeing, by_filters, gather_rows
from tests.ranks import run_ranks

RANKS, CLASSES, FILTERS, LANDMARKS, PARTS, SIDE, DRAWS = 2, 4, 6, 2, 2, 16, 2
FIELD = ReceptiveField((8, 8), (8, 8), (4.0, 4.0), (2, 2), (SIDE, SIDE))
SIZES = [4, 3, 4]
# Batches of each rank: of 7 and 4 images; one may have none.
SHARES = {"uneven": (2, 1), "first has none": (0, 3), "last has none": (3, 0)}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch without gloo",
)


class Case(NamedTuple):
    """How a metric is made, and what it is given of a batch.

    Attributes:
        make: a new one.
        takes: what of a batch, by name, ``update`` is given.
        prepare: the same of ``prepare``; None where there is none.
        more: what it tells beside its value, a method without arguments.
    """

    make: Callable[[], Any]
    takes: str
    prepare: str | None = None
    more: str | None = None


def brightness(grids: Tensor, classes: Tensor) -> Tensor:
    return grids.mean(1, keepdim=True).expand(-1, classes.shape[1], -1, -1)


def score(**options: Any) -> Callable[[], Any]:
    return lambda: metrics.MutualInformationScore(CLASSES, **options)


ORDINARY = metrics.filter_cosines(torch.eye(FILTERS) + 0.1)
OWNERSHIP = torch.eye(CLASSES, FILTERS)
INFORMATION = "activations labels"
CASES = {
    "mean": Case(metrics.MeanOverImages, "values"),
    "accuracy": Case(lambda: metrics.PathwayAccuracy(CLASSES), "logits labels"),
    "calibration": Case(lambda: metrics.CalibrationError(CLASSES, bins=3), "logits labels"),
    "leakage": Case(lambda: metrics.MaskLeakage(CLASSES, DRAWS), "maps labels masks classify"),
    "neighbours": Case(score(), INFORMATION, more="matrix"),
    "neighbours, mixed": Case(score(), "mixed labels", more="matrix"),
    "histogram": Case(score(estimator="histogram", bins=4), INFORMATION, more="matrix"),
    "estimates": Case(lambda: metrics.MutualInformationEstimates(CLASSES, bins=4), INFORMATION),
    "instability": Case(
        lambda: metrics.LocationInstability(
            FILTERS, LANDMARKS, FIELD, num_classes=CLASSES, images=2
        ),
        "maps landmarks labels",
        more="per_filter",
    ),
    "interpretability": Case(
        lambda: metrics.PartInterpretability(FILTERS, PARTS, FIELD, num_classes=CLASSES, top=0.3),
        "maps part_masks labels",
        more="per_filter",
    ),
    "class means": Case(lambda: metrics.ClassMeans(CLASSES, FILTERS), INFORMATION),
    "correlation": Case(lambda: metrics.InterClassCorrelation(ORDINARY, CLASSES), INFORMATION),
    "gate": Case(lambda: metrics.GateSimilarity(OWNERSHIP), "activations logits labels"),
    "removal": Case(
        lambda: metrics.FilterRemoval(CLASSES, FILTERS), "maps labels classify", INFORMATION
    ),
    "owned": Case(
        lambda: metrics.FilterRemoval(CLASSES, FILTERS, ownership=OWNERSHIP),
        "maps labels classify",
        INFORMATION,
    ),
    "saliency": Case(metrics.SaliencyLocalisation, "saliency object_masks"),
    "gradmap": Case(
        lambda: metrics.GradMapLocalisation(FILTERS, CLASSES, filters=2),
        "saliency object_masks",
        "pooled labels",
    ),
    "activmap": Case(
        lambda: metrics.ActivMapLocalisation(FILTERS, CLASSES, iou=0.1),
        "maps object_masks labels",
        "maps",
    ),
    # Room for the maps of three images.
    "activmap, thinned out": Case(
        lambda: metrics.ActivMapLocalisation(
            FILTERS, CLASSES, iou=0.1, memory_limit=3 * 4 * FILTERS * 4
        ),
        "maps object_masks labels",
        "maps",
    ),
    "cam": Case(metrics.CAMLocalisation, "heat object_masks"),
    "pointing game": Case(
        lambda: metrics.PointingGame(CLASSES, brightness, size=2, grids=2),
        "images logits labels",
    ),
    "detection": Case(
        lambda: metrics.DetectionError([4], seeds=1, all_attacked=True),
        "normal adversarial logits adversarial_logits labels",
    ),
}
# A rank's throughput is its own, and the base of metrics has no value.
WITHOUT = {metrics.Throughput, metrics.PerImageMetric}


def batches() -> list[dict[str, Any]]:
    """Of one process, in its order."""
    generator = torch.Generator().manual_seed(0)
    found, first = [], 0
    for size in SIZES:
        labels = torch.arange(first, first + size) % CLASSES
        first += size
        maps = torch.rand(size, FILTERS, 2, 2, generator=generator) + labels[:, None, None, None]
        logits = torch.rand(size, CLASSES, generator=generator) + 0.8 * torch.eye(CLASSES)[labels]
        pixels = torch.rand(size, 3, SIDE, SIDE, generator=generator)
        # Each batch has a range of its own, so that grids of histograms differ.
        activations = maps.mean((2, 3)) * first
        found.append(
            {
                "labels": labels,
                "maps": maps,
                "pooled": maps.mean((2, 3)),
                "activations": activations,
                "mixed": activations.to(torch.bfloat16 if first < 8 else torch.float16),
                "values": torch.rand(size, dtype=torch.float64, generator=generator),
                "logits": logits,
                "adversarial_logits": logits.flip(1),
                "normal": pixels.mean((2, 3)),
                "adversarial": pixels.amax((2, 3)) / 2,
                "masks": torch.randint(2, (DRAWS, size, FILTERS), generator=generator).float(),
                "classify": lambda maps, mask: (maps.mean((2, 3)) * mask)[:, :CLASSES],
                "images": pixels,
                "saliency": pixels,
                "heat": pixels[:, 0, ::4, ::4],
                "object_masks": pixels[:, 0] > 0.6,
                "landmarks": SIDE * torch.rand(size, LANDMARKS, 2, generator=generator),
                "part_masks": torch.rand(size, PARTS, SIDE, SIDE, generator=generator) > 0.5,
            }
        )
    return found


def feed(metric: Any, case: Case, first: int, last: int, *, over_ranks: bool = False) -> None:
    """Show a metric some of the batches, as an evaluation does."""
    every = batches()
    names = {"mixed": "activations"}

    def told(batch: dict[str, Any], takes: str) -> dict[str, Any]:
        return {names.get(name, name): batch[name] for name in takes.split()}

    wanted = metric.skip(SIZES[:first]) if hasattr(metric, "skip") and first else []
    if wanted:
        maps, labels = (torch.cat([x[name] for x in every])[wanted] for name in ("maps", "labels"))
        metric.keep(maps, labels)
    if case.prepare is not None:
        for batch in every[first:last]:
            metric.prepare(*told(batch, case.prepare).values())
        if over_ranks:
            metric.join_prepared()
    for batch in every[first:last]:
        if isinstance(metric, metrics.GradMapLocalisation):
            metric.top_filters(batch["labels"])  # which its gradients are of
        metric.update(**told(batch, case.takes))


def numbers(metric: Any, case: Case) -> list[Tensor]:
    """What a metric says, as tensors."""

    def flat(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [x for part in value for x in flat(part)]

    found = flat(metric.compute())
    if case.more is not None:
        found += flat(getattr(metric, case.more)())
    if isinstance(metric, metrics.GradMapLocalisation):
        found.append(metric.top_filters(torch.arange(CLASSES)))
    return found


def resampled(metric: Any) -> list[Tensor]:
    if not hasattr(metric, "replicate"):
        return []
    (counts,) = draw_counts(sum(SIZES), 5)
    values = metric.replicate(counts)
    return [values] if isinstance(values, Tensor) else list(values)


def work(rank: int, folder: Path) -> None:
    """What one process does; it saves what the tests compare."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS
    )
    results: dict[Any, Any] = {}
    for share, counts in SHARES.items():
        first = sum(counts[:rank])
        for name, case in CASES.items():
            metric = case.make()
            feed(metric, case, first, first + counts[rank], over_ranks=True)
            metric._update_count = max(1, metric._update_count)  # no warning of an idle rank
            results[share, name] = numbers(metric, case)
            if name != "leakage" and case.prepare is None and hasattr(metric, "seen"):
                # Synchronising leaves a rank with its own images: it may go on.
                assert metric.seen == sum(SIZES[first : first + counts[rank]])
            # On one rank alone, whose intervals are of all images too.
            alone = case.make()
            feed(alone, case, first, first + counts[rank], over_ranks=True)
            alone._update_count = max(1, alone._update_count)
            alone.join(1)
            if rank == 1:
                alone.distributed_available_fn = lambda: False
                results[share, name, "alone"] = numbers(alone, case) + resampled(alone)
    results["errors"] = errors(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def errors(rank: int) -> list[str]:
    """What each rank is told of what one of them cannot do."""
    told = []

    def raised(call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=r"^\w+: got ") as found:
            call()
        told.append(str(found.value))

    metric = metrics.MutualInformationScore(CLASSES)
    metric.update(torch.ones(5, FILTERS + rank), torch.arange(5) % CLASSES)
    raised(metric.compute)
    raised(lambda: gather_rows(torch.ones(1, 2 + rank)))

    def fail() -> None:
        with agreeing():
            if rank == 1:
                raise ValueError("images: got none, want some")

    raised(fail)
    return told


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.fixture(scope="module", params=CASES)
def expected(request: pytest.FixtureRequest) -> tuple[str, list[Tensor], list[Tensor]]:
    """The name of a case, and what one process says of all images."""
    case = CASES[request.param]
    metric = case.make()
    feed(metric, case, 0, len(SIZES))
    return request.param, numbers(metric, case), resampled(metric)


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_every_metric_is_held_to_it():
    ours = {getattr(metrics, name) for name in metrics.__all__}
    ours = {kind for kind in ours if isinstance(kind, type) and issubclass(kind, Metric)}
    assert {type(case.make()) for case in CASES.values()} == ours - WITHOUT


@pytest.mark.parametrize("share", SHARES)
def test_ranks_together_say_what_one_process_says_of_all_images(results, expected, share):
    name, values, replicates = expected
    assert any((value.double().nan_to_num() != 0).any() for value in values)
    for result in results:
        check_same(result[share, name], values)
    check_same(results[1][share, name, "alone"], values + replicates)


def test_what_one_rank_cannot_do_every_rank_is_told(results):
    told = results[0]["errors"]
    assert told[0] == "activations: got 6 and 7 filters on different ranks, want as many on each"
    assert told[1].startswith("rows: got ['(torch.Size([2])")
    assert told[2] == "images: got none, want some"
    assert results[1]["errors"] == told


def test_one_process_alone_has_all_that_there_is():
    rows = torch.rand(3, 4)
    assert gather_rows(rows) is rows
    assert gather_rows(None) is None
    values = by_filters(rows, 4, lambda maps, filters: maps[:, filters].amax(0))
    assert torch.equal(values, rows.amax(0))
    with pytest.raises(ValueError, match="mine"), agreeing():
        raise ValueError("mine")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
