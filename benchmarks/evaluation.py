"""What does each figure of an evaluation cost beside the forward pass?

    python -m benchmarks.evaluation [--device cuda] [--table attacks] [--smoke]

PICNN over ResNet-18 with 512 filters, trained for one short epoch, so that some images are right,
measured on drawn animals of 64 pixels, which have classes, landmarks, masks of parts and of the
object: every figure of an evaluation, with intervals, then each of those to be asked for in an
evaluation of its own, with the passes over the data that it needs. Wall time by figure, and the
memory that an evaluation takes at its peak beyond network and images. Attacks, which take longer
than all else together, are a table to be asked for.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

import picnn_fast
from benchmarks import harness
from picnn_fast.data import DATA
from picnn_fast.evaluation import FIGURES, Measurement, default_figures, sharing
from picnn_fast.evaluation import measure as measure_figures
from picnn_fast.evaluation.loop import FORWARD, IMAGES

IMAGES_MEASURED, TRAINED_ON, SIZE, FILTERS, BATCH = 10_000, 1_800, 64, 512, 100


def train(network: Any, data: Any, device: torch.device) -> None:
    """One epoch, as it comes: no method's best."""
    optimizer = torch.optim.Adam(network.parameter_groups(1e-3))
    for batch in data.train_dataloader():
        images, labels = data.on_after_batch_transfer([part.to(device) for part in batch], 0)
        loss = network.loss(network(images, labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.after_step()


def measured(network: Any, data: Any, names: list[str], device: torch.device) -> dict[str, Any]:
    """One evaluation: seconds in all and by what took them, and memory beyond what was held."""
    found: list[Measurement] = []

    def call() -> None:
        found.append(measure_figures(network, data, figures=names, device=device))

    start = time.perf_counter()
    extra = harness.extra_bytes(call, device) if harness.tells_memory(device) else call()
    total = time.perf_counter() - start
    figures = found[0].figures
    return {
        "total": total,
        "seconds": found[0].seconds,
        "bytes": extra,
        "not_available": {n: v for n, v in figures.items() if isinstance(v, str)},
        "resamples": {n: len(values) for n, values in found[0].replicates.items()},
    }


def run(
    device: torch.device,
    *,
    smoke: bool,
    measure: Callable[[dict[str, Any], str], AbstractContextManager[None]],
    tables: tuple[str, ...] = ("run", "asked"),
) -> dict[str, Any]:
    images, trained_on, filters = (60, 12, 12) if smoke else (IMAGES_MEASURED, TRAINED_ON, FILTERS)
    data = DATA["part-animals"](
        batch_size=BATCH, image_size=SIZE, train_images=trained_on, test_images=images
    )
    data.setup()
    torch.manual_seed(0)
    network = picnn_fast.make_interpretable(
        "resnet18", "picnn", num_classes=data.num_classes, num_filters=filters
    )
    train(network.to(device), data, device)
    results: dict[str, Any] = {"images": images, "size": SIZE, "filters": filters, "asked": []}
    if "run" in tables:
        with measure(results, "figures of every evaluation"):
            results["run"] = measured(network, data, default_figures(), device)
    asked = [
        name
        for name, figure in FIGURES.items()
        if figure.when == "asked" and _table(name) in tables
    ]
    for first, names in sharing(asked).items():
        reason = FIGURES[first].needs(network, data)
        if reason is not None:
            results["asked"].append({"figures": names, "not_available": reason})
            continue
        with measure(results, first):
            entry = measured(network, data, names, device)
            results["asked"].append({"figures": names, "images": FIGURES[first].images, **entry})
    return results


def _table(name: str) -> str:
    return "attacks" if name.startswith(("attack_", "detection_")) else "asked"


def _heading(names: list[str]) -> str:
    return ", ".join(FIGURES[name].heading if name in FIGURES else name for name in names)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.95 else f"{1000 * value:.0f} ms"


def report(results: dict[str, Any]) -> str:
    """Markdown tables: figures of every evaluation, and those to be asked for."""
    run = results.get("run")
    tables = []
    if run is not None:
        forward = run["seconds"][FORWARD]
        groups = sharing(name for name in default_figures() if name not in run["not_available"])
        rows = [
            ["reading images", _seconds(run["seconds"][IMAGES]), "", ""],
            ["forward pass", _seconds(forward), "1.00", ""],
        ]
        for first, names in groups.items():
            seconds = run["seconds"].get(first, 0.0)
            count = run["resamples"].get(first)
            rows.append(
                [
                    _heading(names),
                    _seconds(seconds),
                    f"{seconds / forward:.2f}",
                    "" if count is None else str(count),
                ]
            )
        rows.append(["*all*", _seconds(run["total"]), f"{run['total'] / forward:.2f}", ""])
        shape = f"{results['images']} images of {results['size']} pixels"
        header = [f"{shape}, {results['filters']} filters", "time", "of the forward pass"]
        tables.append(harness.table([*header, "resamples"], rows))
        if run["bytes"] is not None:
            tables.append(f"At its peak it took {run['bytes'] / 2**20:.0f} MiB.")
    rows = [
        [
            _heading(entry["figures"]),
            str(min(entry["images"] or results["images"], results["images"])),
            _seconds(entry["seconds"].get(entry["figures"][0], 0.0)),
            _seconds(entry["total"]),
            "" if entry["bytes"] is None else f"{entry['bytes'] / 2**20:.0f} MiB",
        ]
        for entry in results["asked"]
        if "seconds" in entry
    ]
    if rows:
        header = ["to be asked for", "images", "time", "with reading and forward passes", "peak"]
        tables.append(harness.table(header, rows))
    for entry in results["asked"]:
        reasons = entry.get("not_available", {})
        if isinstance(reasons, str):
            reasons = {_heading(entry["figures"]): reasons}
        told = {_heading([name]): why.removeprefix("n/a: ") for name, why in reasons.items()}
        tables += [f"Not measured: {name} ({why})." for name, why in told.items()]
    return "\n\n".join(tables)


SECTION = """
## What figures cost

PICNN over ResNet-18, hardly trained, on drawn animals, each figure with its update of every
batch, what it computes at the end and its resamples; what several figures need of a batch counts
with the first of them. Figures that stand together share what they keep. Those to be asked for are
measured each in an evaluation of its own.

<results: evaluation-*.json>
"""


def main(arguments: list[str] | None = None) -> None:
    description = __doc__.splitlines()[0]
    tables = ("run", "asked", "attacks")
    harness.command_line("evaluation", description, run, report, arguments, tables)


if __name__ == "__main__":
    main()
