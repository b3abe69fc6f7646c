"""Cost of the mutual information estimators: nearest neighbours, histograms, soft histograms.

    python -m benchmarks.mutual_information [--device cpu|cuda] [--smoke]

The activations imitate global average pooling over a ReLU: the mean of a few positions, each the
positive part of a normal number whose mean depends on filter and class, a little for every class
and by two standard deviations for the one class a filter stands for. About a quarter are exactly 0.

Nearest neighbours: "whole", the public function, all K rows; "operator", the estimate without
preparing the activations (on a GPU the noise of "whole" is drawn there); "scikit-learn",
``mutual_info_classif(..., n_jobs=2)`` on the CPU, one class a call on some of the filters, scaled
to all pairs of class and filter. Peak memory is that of a process of its own.

``histogram_update``: "steady", a state whose range no longer widens; "fresh", the state made anew
with each call; "plain", ``torch.bincount`` with a range known beforehand. Reading the activations
once at copy bandwidth is half of what copying them into tensors made beforehand takes; "sum" is
what PyTorch's own sum, which only reads, takes. As many sets of activations take turns as exceed
the caches.

``soft_histogram``, forward and backward: "reference", the reference backend; "einsum", triangular
weights times one-hot labels; "scatter", ``index_add`` of the two weights of a sample.

``histogram_information``, forward and backward, of such counts: "reference", the reference backend;
"plain", what defines it, under autograd.
"""

import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Effort
from picnn_fast import functional
from picnn_fast.ops import mutual_information as family
from picnn_fast.reference import histogram as definition

JOBS = 2
N_NEIGHBORS = 3
POSITIONS = 4
BINS = 64
Estimator = Literal["knn", "histogram"]


class KnnShape(NamedTuple):
    """One size for several numbers of classes, and how many filters scikit-learn is given."""

    samples: int
    filters: int
    classes: tuple[int, ...]
    sampled_filters: int
    rounds: int


class HistogramShape(NamedTuple):
    samples: int
    filters: int
    classes: int
    bins: int = BINS
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"[{self.samples}, {self.filters}] K={self.classes} {self.bins} bins {dtype}"


KNN_SHAPES = (
    KnnShape(10_000, 128, (10, 100), 64, 7),
    KnnShape(50_000, 512, (10, 1000), 16, 3),
)
HISTOGRAM_SHAPES = (
    HistogramShape(10_000, 128, 10),
    HistogramShape(200_000, 128, 10),
    HistogramShape(50_000, 512, 10),
    HistogramShape(10_000, 128, 1000),
    HistogramShape(200_000, 128, 1000),
)
CUDA_HISTOGRAM_SHAPES = (
    HistogramShape(200_000, 128, 10),
    HistogramShape(200_000, 2048, 10),
    HistogramShape(200_000, 2048, 10, dtype=torch.bfloat16),
    HistogramShape(200_000, 512, 1000),
)
# Batches of training.
SOFT_SHAPES = (HistogramShape(128, 128, 10, 16), HistogramShape(1024, 512, 100, 16))
CUDA_SOFT_SHAPES = (HistogramShape(1024, 512, 100, 16), HistogramShape(4096, 2048, 1000, 16))
SMOKE_KNN_SHAPES = (KnnShape(30, 2, (2, 3), 1, 2),)
SMOKE_HISTOGRAM_SHAPES = (HistogramShape(60, 4, 3, 8),)


def pooled_maps(
    samples: int, filters: int, classes: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Activations ``[M, N]`` float32 as the module describes them, and balanced labels ``[M]``."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    means = 0.5 * normal(classes, filters) - 0.5
    columns = torch.arange(filters, device=device)
    means[columns % classes, columns] += 2
    order = torch.randperm(samples, device=device, generator=generator)
    labels = order % classes
    activations = torch.empty(samples, filters, device=device)
    # Little at a time: the peak of memory is measured in the process that makes them.
    for chunk, rows in zip(labels.split(1024), activations.split(1024), strict=True):
        maps = normal(POSITIONS, len(chunk), filters) + means[chunk]
        rows.copy_(maps.relu_().mean(0))
    return activations, labels


def knn_candidates(shape: KnnShape, classes: int, device: torch.device) -> dict[str, Any]:
    """What is timed for one number of classes, and the largest difference from scikit-learn."""
    activations, labels = pooled_maps(shape.samples, shape.filters, classes, device)
    values = torch.cat(list(family.prepare(activations, 0))).to(device)
    some = activations[:, : shape.sampled_filters].contiguous()
    some_host, labels_host = some.cpu().double().numpy(), labels.cpu().numpy()
    turn = itertools.cycle(range(classes))

    def scikit_learn(label: int) -> Tensor:
        # A borrowed machine may lack it: then all but this is measured.
        from sklearn.feature_selection import mutual_info_classif

        return torch.from_numpy(
            mutual_info_classif(
                some_host,
                labels_host == label,
                discrete_features=False,
                n_neighbors=N_NEIGHBORS,
                random_state=0,
                n_jobs=JOBS,
            )
        )

    def whole() -> None:
        noise = torch.Generator(device).manual_seed(0) if device.type == "cuda" else 0
        functional.mutual_information(activations, labels, classes, random_state=noise).cpu()

    def operator() -> None:
        per_class, _ = torch.ops.picnn_fast.knn_mutual_information(
            values, labels, classes, N_NEIGHBORS
        )
        per_class.cpu()

    alike = functional.mutual_information(some, labels, classes)[0].cpu()
    try:
        difference = (alike - scikit_learn(0)).abs().max().item()
    except ImportError:
        difference = math.nan
    return {
        "largest_difference": difference,
        "calls": {
            "whole": whole,
            "operator": operator,
            "scikit-learn": lambda: scikit_learn(next(turn)),
        },
    }


def bench_knn(shape: KnnShape, device: torch.device) -> list[dict[str, Any]]:
    """The public function beside scikit-learn, all numbers of classes in turn."""
    cases = {classes: knn_candidates(shape, classes, device) for classes in shape.classes}
    calls = {
        f"{name} {classes}": call
        for classes, case in cases.items()
        for name, call in case["calls"].items()
    }
    candidates, backends = harness.beside_triton(
        calls, tuple(f"operator {classes}" for classes in cases), device
    )
    # Every call ends on the host, a GPU's too.
    times = harness.interleaved(
        candidates, shape.rounds, device, warmup=1, backends=backends, wall=True
    )
    entries = []
    for classes, case in cases.items():
        scale = shape.filters * classes / shape.sampled_filters
        scaled = [seconds * scale for seconds in times[f"scikit-learn {classes}"]]
        whole = times[f"whole {classes}"]
        names = {"operator": f"operator {classes}"}
        names |= {name + harness.TRITON: other + harness.TRITON for name, other in names.items()}
        operator = {name: times[other] for name, other in names.items() if other in times}
        entries.append(
            {
                "shape": [shape.samples, shape.filters],
                "classes": classes,
                "sampled_filters": shape.sampled_filters,
                "milliseconds": {
                    "whole": harness.summary(whole),
                    **{name: harness.summary(values) for name, values in operator.items()},
                    "scikit-learn, scaled": harness.summary(scaled),
                },
                "speedup": statistics.median(a / b for a, b in zip(scaled, whole, strict=True)),
                "over_fewest_classes": harness.ratio(
                    times, f"whole {classes}", f"whole {shape.classes[0]}"
                ),
                "largest_difference": case["largest_difference"],
                **harness.triton_ratios(operator),
            }
        )
    return entries


def peak_memory(
    estimator: Estimator, samples: int, filters: int, classes: int, device: torch.device
) -> float:
    """Peak memory of one call over the size of the activations, these included.

    For a process of its own, in which nothing larger has run before.
    """
    few = pooled_maps(100, 2, 2, device)
    functional.mutual_information(*few, 2, estimator=estimator)  # loads what is loaded once
    activations, labels = pooled_maps(samples, filters, classes, device)
    extra = harness.extra_bytes(
        lambda: functional.mutual_information(activations, labels, classes, estimator=estimator),
        device,
    )
    return extra / activations.nbytes + 1


def bench_memory(
    estimators: tuple[Estimator, ...], shape: KnnShape, device: torch.device
) -> list[dict[str, Any]]:
    """Peak memory of each estimator with the most classes; on the CPU where Linux tells it."""
    if not harness.tells_memory(device):
        return []
    size = (shape.samples, shape.filters, shape.classes[-1])
    spawn = multiprocessing.get_context("spawn")
    entries = []
    for estimator in estimators:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            multiple = process.submit(peak_memory, estimator, *size, device).result()
        entries.append(
            {
                "shape": list(size[:2]),
                "classes": size[2],
                "estimator": estimator,
                "multiple_of_activations": multiple,
            }
        )
    return entries


# Together the activations of a case are larger than any cache they might be found in.
BYTES_OF_ALL_SETS = 256 * 2**20
MOST_SETS = 64


class HistogramState:
    """Counts and range of ``histogram_update``, empty."""

    def __init__(self, shape: HistogramShape, device: torch.device) -> None:
        self.counts = torch.zeros(
            shape.filters, shape.bins, shape.classes, dtype=torch.int64, device=device
        )
        infinity = torch.full((shape.filters,), torch.inf, dtype=torch.float64, device=device)
        self.minimum, self.maximum = infinity, -infinity

    def update(self, activations: Tensor, labels: Tensor) -> None:
        torch.ops.picnn_fast.histogram_update(
            self.counts, self.minimum, self.maximum, activations, labels
        )


def least_bytes(shape: HistogramShape, activations: Tensor, labels: Tensor) -> float:
    """What an update cannot do without, over the size of the activations: these are read once, and
    once each line of the counts is read and written that a sample falls into."""
    device = activations.device
    state = HistogramState(shape, device)
    state.update(activations.to(shape.dtype), labels)
    line = 32 if device.type == "cuda" else 64
    used = state.counts.flatten().nonzero().flatten() * state.counts.element_size() // line
    return 1 + 2 * line * len(used.unique_consecutive()) / (
        activations.numel() * shape.dtype.itemsize
    )


def bench_histogram(shape: HistogramShape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Streaming counts beside reading the activations once at copy bandwidth."""
    one = shape.samples * shape.filters * shape.dtype.itemsize
    drawn = [
        pooled_maps(shape.samples, shape.filters, shape.classes, device, seed)
        for seed in range(min(MOST_SETS, max(2, -(-BYTES_OF_ALL_SETS // one))))
    ]
    batches = itertools.cycle([(x.to(shape.dtype), labels) for x, labels in drawn])
    state = HistogramState(shape, device)
    for activations, labels in drawn:
        state.update(activations.to(shape.dtype), labels)
    low, high = state.minimum.to(shape.dtype), state.maximum.to(shape.dtype)
    per_bin = (shape.bins / (high - low)).to(shape.dtype)
    first = torch.arange(shape.filters, device=device) * shape.bins

    def plain(activations: Tensor, labels: Tensor) -> None:
        cells = ((activations - low) * per_bin).long().clamp_(0, shape.bins - 1)
        index = (cells + first) * shape.classes + labels[:, None]
        state.counts += torch.bincount(index.flatten(), minlength=state.counts.numel()).view_as(
            state.counts
        )

    copies = itertools.cycle([torch.empty_like(x, dtype=shape.dtype) for x, _ in drawn])
    candidates: dict[str, Callable[[], Any]] = {
        "steady": lambda: state.update(*next(batches)),
        "fresh": lambda: HistogramState(shape, device).update(*next(batches)),
        "plain": lambda: plain(*next(batches)),
        "copy": lambda: next(copies).copy_(next(batches)[0]),
        "sum": lambda: next(batches)[0].sum(),
    }
    candidates, backends = harness.beside_triton(candidates, ("steady", "fresh"), device)
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    over = {
        name: statistics.median(
            2 * ours / copy for ours, copy in zip(times[name], times["copy"], strict=True)
        )
        for name in ("steady", "fresh", "sum")
    }
    return {
        "shape": str(shape),
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "over_reading_once": over,
        "least_bytes_over_activations": least_bytes(shape, *drawn[0]),
        "speedup": {"plain": harness.ratio(times, "plain", "steady")},
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("steady", "fresh"), effort, device, backends),
    }


def einsum(
    activations: Tensor, labels: Tensor, low: Tensor, width: Tensor, bins: int, classes: int
) -> Tensor:
    """Soft counts as triangular weights [M, N, bins] times one-hot labels."""
    t = ((activations - low) / width).clamp(0, bins - 1)
    centres = torch.arange(bins, device=t.device, dtype=t.dtype)
    weights = (1 - (t[..., None] - centres).abs()).relu()
    one_hot = torch.nn.functional.one_hot(labels, classes).to(t.dtype)
    return torch.einsum("mnb,mk->nbk", weights, one_hot)


def scatter(
    activations: Tensor, labels: Tensor, low: Tensor, width: Tensor, bins: int, classes: int
) -> Tensor:
    """Soft counts as two additions a sample and filter."""
    filters = activations.shape[1]
    t = ((activations - low) / width).clamp(0, bins - 1)
    cell = t.detach().floor().clamp_max(bins - 2)
    upper = t - cell
    first = torch.arange(filters, device=t.device) * bins
    index = (first + cell.long()) * classes + labels[:, None]
    counts = t.new_zeros(filters * bins * classes)
    counts = counts.index_add(0, index.flatten(), (1 - upper).flatten())
    counts = counts.index_add(0, (index + classes).flatten(), upper.flatten())
    return counts.view(filters, bins, classes)


def bench_soft(shape: HistogramShape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Soft counts, forward and backward, beside two ways to write them in PyTorch."""
    activations, labels = pooled_maps(shape.samples, shape.filters, shape.classes, device)
    activations.requires_grad_()
    low, high = activations.detach().aminmax(dim=0)
    width = (high - low) / (shape.bins - 1)
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(shape.filters, shape.bins, shape.classes, device=device, generator=generator)

    def step(count: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            activations.grad = None
            counts = count(activations, labels, low, width, shape.bins, shape.classes)
            counts.backward(grad)

        return call

    torch._dynamo.reset()
    candidates = {
        "fused": step(torch.ops.picnn_fast.soft_histogram),
        "reference": step(torch.ops.picnn_fast.soft_histogram),
        "einsum": step(einsum),
        "einsum, compiled": step(torch.compile(einsum, backend=effort.compiler)),
        "scatter": step(scatter),
        "scatter, compiled": step(torch.compile(scatter, backend=effort.compiler)),
    }
    return {"shape": str(shape), **_beside_fused(candidates, device, effort)}


def bench_information(
    shape: HistogramShape, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """What soft counts tell of each class, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (shape.filters, shape.bins, shape.classes)
    share = shape.samples / (shape.bins * shape.classes)
    counts = torch.rand(sizes, device=device, generator=generator).mul_(2 * share).requires_grad_()
    grad = torch.randn(shape.filters, shape.classes, device=device, generator=generator)

    def step(inform: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            counts.grad = None
            inform(counts, False, False).backward(grad)

        return call

    torch._dynamo.reset()
    plain = definition.histogram_information
    candidates = {
        "fused": step(torch.ops.picnn_fast.histogram_information),
        "reference": step(torch.ops.picnn_fast.histogram_information),
        "plain": step(plain),
        "plain, compiled": step(torch.compile(plain, backend=effort.compiler)),
    }
    return {"shape": str(shape), **_beside_fused(candidates, device, effort)}


def _beside_fused(
    candidates: dict[str, Callable[[], None]], device: torch.device, effort: Effort
) -> dict[str, Any]:
    """Times of the candidates, and those of all others over that of "fused"."""
    candidates, backends = harness.beside_triton(candidates, ("fused",), device)
    backends["reference"] = "reference"
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    return {
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "speedup": {
            name: harness.ratio(times, name, "fused")
            for name in times
            if name != "fused" and not name.endswith(harness.TRITON)
        },
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("fused",), effort, device, backends),
    }


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements of both families, each within ``measure(results, title)``."""
    cuda = device.type == "cuda"
    knn_shapes = SMOKE_KNN_SHAPES if smoke else KNN_SHAPES
    histogram_shapes = (
        SMOKE_HISTOGRAM_SHAPES if smoke else CUDA_HISTOGRAM_SHAPES if cuda else HISTOGRAM_SHAPES
    )
    soft_shapes = SMOKE_HISTOGRAM_SHAPES if smoke else CUDA_SOFT_SHAPES if cuda else SOFT_SHAPES
    effort = Effort.of(30, device, smoke=smoke)
    names = ("knn", "memory", "histogram", "soft", "information")
    results: dict[str, Any] = {name: [] for name in names}
    estimators: tuple[Estimator, ...] = ("histogram",) if smoke else ("knn", "histogram")
    with measure(results, "peak memory"):
        results["memory"] = bench_memory(estimators, knn_shapes[-1], device)
    for shape in knn_shapes:
        with measure(results, f"knn [{shape.samples}, {shape.filters}] K={shape.classes}"):
            results["knn"] += bench_knn(shape, device)
    for size in histogram_shapes:
        with measure(results, f"histogram_update {size}"):
            results["histogram"].append(bench_histogram(size, device, effort))
    for size in soft_shapes:
        with measure(results, f"soft_histogram {size}"):
            results["soft"].append(bench_soft(size, device, effort))
        with measure(results, f"histogram_information {size}"):
            results["information"].append(bench_information(size, device, effort))
    return results


def duration(milliseconds: float) -> str:
    """Three digits with the unit that suits, e.g. "2.31 ms", "34.2 s", "11.9 min", "4.77 h"."""
    if milliseconds < 1e3:
        value, unit = milliseconds, "ms"
    elif milliseconds < 100e3:
        value, unit = milliseconds / 1e3, "s"
    elif milliseconds < 3600e3:
        value, unit = milliseconds / 60e3, "min"
    else:
        value, unit = milliseconds / 3600e3, "h"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    rows = [
        [
            f"{entry['shape']} K={entry['classes']}",
            duration(entry["milliseconds"]["whole"]["median"]),
            duration(entry["milliseconds"]["operator"]["median"]),
            f"{entry['over_fewest_classes']:.2f}x",
            duration(entry["milliseconds"]["scikit-learn, scaled"]["median"]),
            f"{entry['speedup']:,.0f}x",
            f"{entry['largest_difference']:.0e}",
        ]
        for entry in results["knn"]
    ]
    header = [
        "mutual_information, knn",
        "whole",
        "operator",
        "over fewest K",
        "scikit-learn",
        "speed-up",
        "difference",
    ]
    parts = [harness.table(header, rows)]
    parts += harness.triton_tables("knn", results["knn"])
    if results["memory"]:
        rows = [
            [
                f"{entry['shape']} K={entry['classes']} {entry['estimator']}",
                f"{entry['multiple_of_activations']:.2f}x",
            ]
            for entry in results["memory"]
        ]
        parts.append(harness.table(["peak memory", "of the activations"], rows))
    bytes_of = [
        name
        for name in ("least_bytes_over_activations",)
        if all(name in entry for entry in results["histogram"])
    ]
    rows = [
        [
            entry["shape"],
            duration(entry["milliseconds"]["steady"]["median"]),
            duration(entry["milliseconds"]["fresh"]["median"]),
            f"{entry['over_reading_once']['steady']:.2f}x",
            f"{entry['over_reading_once']['fresh']:.2f}x",
            f"{entry['over_reading_once']['sum']:.2f}x",
            *(f"{entry[name]:.2f}x" for name in bytes_of),
            f"{entry['speedup']['plain']:.1f}x",
        ]
        for entry in results["histogram"]
    ]
    header = [
        "histogram_update",
        "steady",
        "fresh",
        "steady of reading once",
        "fresh of reading once",
        "sum of reading once",
        *("least bytes" for _ in bytes_of),
        "steady over plain",
    ]
    parts.append(harness.table(header, rows))
    parts += harness.triton_tables("histogram_update", results["histogram"])
    parts += _soft_tables("soft_histogram", results["soft"])
    if "information" in results:
        parts += _soft_tables("histogram_information", results["information"])
    return "\n\n".join(parts)


def _soft_tables(operator: str, entries: list[dict[str, Any]]) -> list[str]:
    names = list(entries[0]["speedup"]) if entries else []
    rows = [
        [
            entry["shape"],
            duration(entry["milliseconds"]["fused"]["median"]),
            *(f"{entry['speedup'][name]:.1f}x" for name in names),
        ]
        for entry in entries
    ]
    header = [f"{operator}, forward + backward", "fused", *(f"over {name}" for name in names)]
    return [harness.table(header, rows), *harness.triton_tables(operator, entries)]


SECTION = """
## Mutual information

Activations `[samples, filters]` imitate pooled ReLU maps with class structure.

<results: mutual_information-*.json>

- *whole*: `functional.mutual_information`, all K rows; *operator*: without preparing the
  activations; *over fewest K*: what more classes cost; *scikit-learn*: `mutual_info_classif` with
  `n_jobs=2`, measured on a sample of filters and classes and scaled to all; *difference*: the
  largest from scikit-learn's own figures, in nats.
- *peak memory*: of a process, above what it held before; the activations count as 1.
- *steady*: further samples within the known range; *fresh*: into new counts, made with the call;
  *of reading once*: over half the time of a copy, that is, reading the activations once at copy
  bandwidth; *sum*: what PyTorch's own sum takes, which only reads; *least bytes*: of the same unit,
  what moves at least: the activations, and twice every line of the counts that a sample falls into.
  Processors with VPOPCNTDQ, BITALG and GFNI count samples by bit planes and population counts: a
  class at a time from 128 samples a class on; where the classes are more than 64, four at a time,
  sixteen samples of each, from eight a class on, or two where the counts are more than 32 MB; all
  else is an increment of a counter a sample. At K = 1000 the 65 MB of counts leave the caches: each
  line of them is added to once for all samples, on its way while the next ones are counted. At
  [10000, 128] the 235,000 lines that a batch falls into are 30 MB to be read and written beside
  5 MB of activations: six readings allow for nothing else. Lines and counting take about as long,
  of which only a part is at the same time; the rest is the first look at the samples, for their
  range. At [10000, 128], K = 10, about a third of the time goes to the call, the labels and adding
  to 0.7 MB of counts; *plain*: `torch.bincount` with a range known beforehand.
- *einsum*, *scatter*: soft counts as a product with one-hot labels, and by `index_add`.
- `histogram_information`: what soft counts tell of each class; *plain*: what defines it, under
  autograd.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("mutual_information", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
