"""Do filters of Interpretable CNNs stand for parts, by which template, and by which estimator?

    python -m benchmarks.parts [--output runs/parts] [--processes N] [--smoke]

An ordinary network, the mask layers alone (filter loss of weight 0), and ICNN with each template
and each estimator of the filter loss's gradient, three seeds each, trained alike on drawn animals
(``PartAnimals``) and measured on their test split. tau and the weight of the filter loss were
chosen by a few trials with seed 0 on the same split, there being no other. A training takes about a
minute on one core; an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import harness
from picnn_fast import PartTemplate
from picnn_fast.backbones import receptive_field
from picnn_fast.data import PartDataModule
from picnn_fast.metrics import LocationInstability
from picnn_fast.report import plot_filter_images, plot_peak_heat_map, plot_template_gallery
from picnn_fast.training.config import TrainConfig
from picnn_fast.training.run import (
    CHECKPOINT,
    build_data,
    load_checkpoint,
    read_history,
    train,
)

NAME = "parts"
SEEDS = (0, 1, 2)
TEMPLATES = ("l1", "l2", "uniform-l1", "uniform-l2")
# Estimator of the gradient, weight of the filter loss, templates.
LOSSES = (
    ("batch", 0.003, TEMPLATES),
    ("running", 0.0003, ("l1", "l2")),
    ("target", 0.003, ("l1", "l2")),
)
CONFIG = TrainConfig(
    data="part-animals",
    image_size=64,
    backbone="small-cnn",
    num_filters=96,
    epochs=12,
    batch_size=32,
    lr=2e-3,
    warmup_epochs=2,
    weight_decay=0.05,
    accelerator="cpu",
    # Activations after batch norm are about 1, not tens as in the paper's networks: with the
    # paper's tau, 0.008 here, every exp(s) is 1 and the loss does nothing.
    tau=0.1,
)
FIGURES = ("acc1", "location_instability", "part_interpretability", "mis", "epochs")


def networks() -> dict[str, TrainConfig]:
    """Name to options: "std", "mask l1" …, "l1 batch 0.003" …"""
    icnn = dataclasses.replace(CONFIG, method="icnn", filter_loss_weight=0.0)
    options = {"std": dataclasses.replace(CONFIG, method="std")}
    for template in TEMPLATES:
        options[f"mask {template}"] = dataclasses.replace(icnn, template=template)
    for estimator, weight, templates in LOSSES:
        for template in templates:
            options[f"{template} {estimator} {weight:g}"] = dataclasses.replace(
                icnn, template=template, estimator=estimator, filter_loss_weight=weight
            )
    return options


def _run(config: TrainConfig) -> dict[str, float]:
    """One training on one thread, in a process of its own."""
    torch.set_num_threads(1)
    metrics = train(config, progress=False)
    accuracy = [row["val/acc1"] for row in read_history(Path(config.output))]
    # How fast it converges: the first epoch with 90 % of the last one's accuracy.
    near = next(i for i, value in enumerate(accuracy, 1) if value >= 0.9 * accuracy[-1])
    return {**metrics, "epochs": float(near)}


def measure(
    configs: dict[str, TrainConfig],
    seeds: tuple[int, ...],
    output: Path,
    processes: int,
    save: Callable[..., Any],
) -> dict[str, Any]:
    """Test figures of every network and seed; ``save`` is given what there is after each."""
    runs: list[dict[str, Any]] = []
    # Fork would copy a process whose thread pool is gone.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = {}
        for seed in seeds:
            for name, config in configs.items():
                folder = output / f"{name.replace(' ', '-')}-{seed}"
                job = dataclasses.replace(config, seed=seed, output=str(folder))
                jobs[pool.submit(_run, job)] = (name, seed)
        for count, job in enumerate(as_completed(jobs), 1):
            name, seed = jobs[job]
            try:
                runs.append({"network": name, "seed": seed, **job.result()})
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            save({"runs": runs})
            print(f"  {count} of {len(jobs)}: {name}, seed {seed}", file=sys.stderr, flush=True)
    runs.sort(key=lambda run: (run["seed"], list(configs).index(run["network"])))
    return {"runs": runs}


def report(results: dict[str, Any]) -> str:
    """Means over seeds as a Markdown table, location instability with its least and greatest."""
    rows = []
    for name in dict.fromkeys(run["network"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["network"] == name]
        means = {key: statistics.fmean(run[key] for run in runs) for key in FIGURES}
        spread = [run["location_instability"] for run in runs]
        kind, *detail = name.split()
        title = "CNN" if kind == "std" else f"mask layers alone, {detail[0]}"
        if len(detail) == 2:
            title = f"ICNN, {kind}, *{detail[0]}*, {detail[1]}"
        rows.append(
            [
                title,
                f"{means['acc1']:.3f}",
                f"{means['location_instability']:.4f}",
                f"{min(spread):.4f} to {max(spread):.4f}",
                f"{means['part_interpretability']:.3f}",
                f"{means['mis']:.3f}",
                f"{means['epochs']:.1f}",
            ]
        )
    header = [
        "network, template, *estimator*, weight",
        "accuracy",
        "location instability",
        "by seed",
        "part interpretability",
        "MIS",
        "epochs to 90 %",
    ]
    return harness.table(header, rows)


def draw(output: Path, folder: Path) -> None:
    """The templates, and what filters of the first CNN and ICNN in ``output`` look at.

    Images are the first of each class in the test split; filters are those whose place wanders
    least.
    """
    folder.mkdir(parents=True, exist_ok=True)
    norms: tuple[Literal["l1", "l2"], ...] = ("l1", "l2")
    profiles: tuple[Literal["gradient", "uniform"], ...] = ("gradient", "uniform")
    gallery = {
        f"{norm.upper()} {profile}": PartTemplate(norm, profile).table(8, 8)
        for profile in profiles
        for norm in norms
    }
    plot_template_gallery(gallery, folder / "templates.png")
    for name in ("std", "l1 batch 0.003"):
        title = "icnn" if name != "std" else name
        network, config, _ = load_checkpoint(
            output / f"{name.replace(' ', '-')}-{SEEDS[0]}" / CHECKPOINT
        )
        data = build_data(config)
        assert isinstance(data, PartDataModule)
        field = receptive_field(network.features, data.part_sets["test"].image_size)
        metric = LocationInstability(
            network.num_filters,
            len(data.part_sets["test"].landmark_names),
            field,
            num_classes=data.num_classes,
        )
        images, maps = [], []
        with torch.no_grad():
            for batch in data.part_loader("test"):
                images.append(batch.image)
                maps.append(network.filter_maps(data.normalise(batch.image)))
                metric.update(maps[-1], batch.landmarks, batch.label)
        every, seen = torch.cat(images), torch.cat(maps)
        first = slice(0, data.num_classes)
        highest, peaks = field.peaks(seen[first])
        peaks = torch.where(highest[..., None] > 0, peaks, torch.nan)
        plot_peak_heat_map(every[first], peaks, folder / f"peaks-{title}.png")
        steady = metric.per_filter().nan_to_num(nan=torch.inf).argsort()[:5].tolist()
        plot_filter_images(every, seen, field, steady, folder / f"filters-{title}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", default="runs/parts", help="folder of the trainings")
    parser.add_argument(
        "--processes", type=int, default=torch.get_num_threads(), help="trainings side by side"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two short trainings, written where --results says"
    )
    harness.add_results_option(parser)
    options = parser.parse_args(arguments)
    output, folder = Path(options.output), harness.results_folder(options)
    record = harness.Record(
        folder,
        NAME,
        command="python -m benchmarks.parts",
        machine=harness.machine(torch.device("cpu")),
        options=CONFIG.as_dict(),
    )
    if options.smoke:
        short = {"image_size": 16, "epochs": 1, "num_filters": 8}
        pair = {
            name: dataclasses.replace(networks()[name], **short)
            for name in ("std", "l1 running 0.003")
        }
        results = measure(pair, (0,), output, 1, record.save)
    else:
        results = measure(networks(), SEEDS, output, options.processes, record.save)
    path = record.save(results, complete=True)
    print(report(results))
    if folder is not None and not options.smoke:
        draw(output, folder / NAME)
    if path is not None:
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
