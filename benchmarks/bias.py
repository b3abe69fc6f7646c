"""Bias of the mutual information estimators, where the truth is known in closed form.

    python -m benchmarks.bias [--smoke]

A filter's activation given class c is normal, N(mu_c, sigma_c), ten classes of equal size: class 0
stands apart from the others by a separation d, which spread a little in mean and width. With the
density a mixture of normals, mutual information is an integral in one dimension, done by
quadrature to about 1e-12. Every estimate is repeated on independent draws.

Writes ``benchmarks/results/mutual-information-bias.json`` and draws the ``.png`` beside it.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness
from picnn_fast import functional

CLASSES = 10
SEPARATIONS = (0.0, 1.5, 4.0)
SAMPLES = (100, 300, 1_000, 3_000, 10_000, 50_000)
BINS = (8, 16, 32, 64, 128, 256)
REPEATS = 50
N_NEIGHBORS = 3
DEFAULT_BINS = 64
# What the estimates over the number of bins are drawn at, and the table is printed for.
TABLE_SAMPLES = 1_000
TABLE_BINS = (16, 64)
TARGETS: dict[Literal["class", "label"], str] = {
    "class": "class 0 against the rest",
    "label": "which of ten classes",
}
NAME = "mutual-information-bias"


def mixture(separation: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each class; without separation all are N(0, 1)."""
    means = torch.linspace(-0.2, 0.2, CLASSES, dtype=torch.float64) * separation
    means[0] = separation
    deviations = 1 + separation * 0.1 * (torch.arange(CLASSES, dtype=torch.float64) % 3)
    return means, deviations


def closed_form(means: Tensor, deviations: Tensor, target: str) -> float:
    """Mutual information in nats of a mixture of equally likely normals and its label.

    Args:
        means, deviations: ``[K]`` float64.
        target: "label", which of the K; "class", whether it is the first.
    """
    edge = 12 * deviations
    x = torch.linspace(
        (means - edge).min().item(), (means + edge).max().item(), 100_001, dtype=torch.float64
    )
    log_density = torch.distributions.Normal(means, deviations).log_prob(x[:, None])
    log_marginal = log_density.logsumexp(1) - math.log(len(means))
    sizes = [1, len(means) - 1] if target == "class" else [1] * len(means)
    information = torch.zeros_like(x)
    for part in log_density.split(sizes, dim=1):
        count = part.shape[1]
        log_conditional = part.logsumexp(1) - math.log(count)
        divergence = log_conditional.exp() * (log_conditional - log_marginal)
        information += count / len(means) * divergence
    return max(0.0, torch.trapezoid(information, x).item())


def estimators() -> list[dict[str, Any]]:
    """Keyword arguments of ``functional.mutual_information``, one entry an estimator."""
    return [
        {"estimator": "knn", "n_neighbors": N_NEIGHBORS},
        *(
            {"estimator": "histogram", "bins": bins, "bias_correction": correction}
            for bins in BINS
            for correction in (None, "miller_madow")
        ),
    ]


def measure(samples: tuple[int, ...], repeats: int, save: Callable[..., Any]) -> dict[str, Any]:
    """Mean and standard deviation of every estimate, beside the closed form; ``save`` is given
    what there is after each separation and number of samples."""
    generator = torch.Generator().manual_seed(0)
    entries: list[dict[str, Any]] = []
    mixtures = [
        {"separation": d, "means": mixture(d)[0].tolist(), "deviations": mixture(d)[1].tolist()}
        for d in SEPARATIONS
    ]
    results = {"classes": CLASSES, "repeats": repeats, "mixtures": mixtures, "estimates": entries}
    for separation in SEPARATIONS:
        means, deviations = mixture(separation)
        truth = {target: closed_form(means, deviations, target) for target in TARGETS}
        for count in samples:
            if sys.stderr.isatty():
                print(f"\r\x1b[K  d = {separation}, M = {count} ", end="", file=sys.stderr)
            labels = torch.arange(count) % CLASSES
            # A filter a repetition.
            noise = torch.randn(count, repeats, generator=generator, dtype=torch.float64)
            activations = means[labels, None] + deviations[labels, None] * noise
            for arguments in estimators():
                for target in TARGETS:
                    estimate = functional.mutual_information(
                        activations, labels, CLASSES, target=target, **arguments
                    )
                    of_interest = estimate[0] if target == "class" else estimate
                    entries.append(
                        {
                            "separation": separation,
                            "samples": count,
                            "target": target,
                            **arguments,
                            "closed_form": truth[target],
                            "mean": of_interest.mean().item(),
                            "standard_deviation": of_interest.std().item(),
                        }
                    )
            save(results)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return results


def select(results: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The estimates whose entries are as ``wanted``, in the order they were made."""
    return [
        entry
        for entry in results["estimates"]
        if all(entry.get(key) == value for key, value in wanted.items())
    ]


# Label, colour and marker.
KNN = ("nearest neighbours, k = 3", "#1b6ca8", "o")
PLAIN = ("histogram", "#d1495b", "s")
CORRECTED = ("histogram, Miller-Madow correction", "#2e9e5b", "^")
OTHERS_COLOUR = "#888888"


def _densities(axis: Any, separation: float) -> None:
    means, deviations = mixture(separation)
    x = torch.linspace(-6, 8, 400, dtype=torch.float64)
    densities = torch.distributions.Normal(means, deviations).log_prob(x[:, None]).exp().numpy()
    axis.fill_between(x, densities[:, 0], color="#e08e45", alpha=0.45, linewidth=0)
    axis.plot(x, densities[:, 0], color="#e08e45", linewidth=1.8, label="class 0", zorder=3)
    axis.plot(x, densities[:, 1:], color=OTHERS_COLOUR, linewidth=0.9)
    axis.plot([], color=OTHERS_COLOUR, linewidth=0.9, label="the nine others")
    axis.set_yticks([])
    axis.set_ylim(0, 0.47)
    axis.set_xlabel("activation")
    distance = f"{separation:g} standard deviations apart" if separation else "all classes alike"
    axis.set_title(distance, loc="left", fontweight="bold")


def _estimates(
    axis: Any, entries: list[dict[str, Any]], over: str, style: tuple[str, str, str | None]
) -> None:
    """Mean over repetitions, and a band of one standard deviation."""
    label, colour, marker = style
    x = [entry[over] for entry in entries]
    mean = [entry["mean"] for entry in entries]
    low = [entry["mean"] - entry["standard_deviation"] for entry in entries]
    high = [entry["mean"] + entry["standard_deviation"] for entry in entries]
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, mean, color=colour, marker=marker, ms=4, linewidth=1.6, label=label)


def _over_samples(axis: Any, results: dict[str, Any], **here: Any) -> None:
    knn = select(results, **here, estimator="knn")
    _estimates(axis, knn, "samples", KNN)
    for correction, style in ((None, PLAIN), ("miller_madow", CORRECTED)):
        chosen = select(results, **here, bins=DEFAULT_BINS, bias_correction=correction)
        _estimates(axis, chosen, "samples", style)
    axis.axhline(knn[0]["closed_form"], color="black", linewidth=1.2, label="closed form")
    axis.set_xscale("log")
    axis.set_xticks([100, 1_000, 10_000], ["100", "1,000", "10,000"])
    axis.set_xlabel("samples M")


def _over_bins(axis: Any, results: dict[str, Any], **here: Any) -> None:
    (knn,) = select(results, **here, estimator="knn")
    _estimates(
        axis, [{**knn, "bins": edge} for edge in (BINS[0], BINS[-1])], "bins", (*KNN[:2], None)
    )
    for correction, style in ((None, PLAIN), ("miller_madow", CORRECTED)):
        chosen = select(results, **here, estimator="histogram", bias_correction=correction)
        _estimates(axis, chosen, "bins", style)
    axis.axhline(knn["closed_form"], color="black", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BINS, [str(bins) for bins in BINS])
    axis.set_xlabel("bins")


def draw(results: dict[str, Any], path: Path) -> None:
    """The mixtures, estimates over the number of samples for both targets, and over the bins."""
    figure = Figure(figsize=(11, 11.5), layout="constrained", dpi=130)
    figure.suptitle(
        "Mutual information (MI) of an activation and its class: estimates beside the truth\n"
        f"line: mean of {results['repeats']} repetitions; band: ± one standard deviation"
    )
    grid = figure.subplots(4, len(SEPARATIONS), squeeze=False, height_ratios=(0.6, 1, 1, 1))
    for column, separation in enumerate(SEPARATIONS):
        _densities(grid[0, column], separation)
        for row, target in enumerate(TARGETS, 1):
            _over_samples(grid[row, column], results, separation=separation, target=target)
        _over_bins(
            grid[3, column], results, separation=separation, target="class", samples=TABLE_SAMPLES
        )
    grid[0, 0].set_ylabel("density")
    grid[1, 0].set_ylabel(f"class 0 against the rest\n{DEFAULT_BINS} bins\nMI in nats")
    grid[2, 0].set_ylabel(f"which of ten classes\n{DEFAULT_BINS} bins\nMI in nats")
    grid[3, 0].set_ylabel(f"class 0 against the rest\nM = {TABLE_SAMPLES:,}\nMI in nats")
    for axis in grid.flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=9)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def report(results: dict[str, Any]) -> str:
    """Mean ± standard deviation at one number of samples, as a Markdown table."""
    rows = []
    for separation in SEPARATIONS:
        for target, title in TARGETS.items():
            here = {"separation": separation, "target": target, "samples": TABLE_SAMPLES}
            (knn,) = select(results, **here, estimator="knn")
            cells = [knn]
            for correction in (None, "miller_madow"):
                for bins in TABLE_BINS:
                    cells += select(results, **here, bins=bins, bias_correction=correction)
            rows.append(
                [
                    f"{separation:g} apart, {title}",
                    f"{knn['closed_form']:.3f}",
                    *(f"{cell['mean']:.3f} ± {cell['standard_deviation']:.3f}" for cell in cells),
                ]
            )
    header = [
        f"M = {TABLE_SAMPLES}",
        "closed form",
        "knn",
        *(f"{bins} bins" for bins in TABLE_BINS),
        *(f"{bins} bins, corrected" for bins in TABLE_BINS),
    ]
    return harness.table(header, rows)


SECTION = """
## What the estimates are worth

Activations drawn from mixtures of normals have a known mutual information with their class. Of one
class against the rest, nearest neighbours are within 0.01 nats of it on average from 300 samples
on. A histogram finds information where there is none when many bins share few samples, of which
the Miller-Madow correction takes a part off, and misses some when its bins are few.

![Estimates of mutual information over samples and bins, beside the closed form](results/mutual-information-bias.png)

<results: mutual-information-bias.json>
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bias", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--smoke", action="store_true", help="few samples, written only where --results says"
    )
    harness.add_results_option(parser)
    options = parser.parse_args(arguments)
    record = harness.Record(
        harness.results_folder(options), NAME, command="python -m benchmarks.bias"
    )
    sizes = ((100, TABLE_SAMPLES), 2) if options.smoke else (SAMPLES, REPEATS)
    results = measure(*sizes, record.save)
    path = record.save(results, complete=True)
    print(report(results))
    if path is not None:
        draw(results, path.with_suffix(".png"))
        print(f"\nwritten to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
