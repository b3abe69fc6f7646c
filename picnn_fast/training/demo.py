"""The demonstration: an ordinary network and a PICNN on scikit-learn's digits, side by side."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from picnn_fast.data.loading import SeededDataModule
from picnn_fast.evaluation import FIGURES, Figures
from picnn_fast.explain import pathway_grad_cam
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.report import plot_correspondence, plot_curves, plot_grad_cam
from picnn_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from picnn_fast.training.options import Options
from picnn_fast.training.run import (
    METRICS,
    assemble,
    build_data,
    fit,
    read_history,
    read_metrics,
)
from picnn_fast.training.run_folder import RunFolder, write_json

TITLES = {"std": "STD, an ordinary network", "picnn": "PICNN"}
_MATRIX_TITLES = {"std": "STD: random, not trained", "picnn": "PICNN: learned"}
# Shifts would blur which filter tells which class of such small images apart, and lower MIS.
# The rate of the correspondence matrix is the digits' own, found by trials.
COMMON: dict[str, Any] = {
    "data": {"name": "digits", "max_shift": 0},
    "optimizer": {"name": "adamw", "weight_decay": 0.0},
    "num_filters": 128,
}
METHODS: dict[str, dict[str, Any]] = {
    "std": {"name": "std"},
    "picnn": {"name": "picnn", "correspondence_lr": 0.3},
}
_DIGITS_SHOWN = 6
EPOCHS = 30
# How far apart figures of different seeds lie after as many epochs, of either network: what was
# measured over a few seeds (benchmarks/results/demo/seeds.json), rounded up.
SPREAD = {"acc1": 0.02, "acc2": 0.01, "acc3": 0.13, "mis": 0.02}


def run_demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Figures]:
    """Train STD and PICNN alike, measure both on the test split, and draw the pictures.

    The folder then holds ``metrics.json``, ``correspondence.png``, ``curves.png``,
    ``gradcam.png``, and checkpoint and logs of each network in ``std/`` and ``picnn/``.

    Args:
        output: folder, complete or absent.
        seed: of everything random but the split, which is fixed.
        epochs: of each network.
        overwrite: replace what is in the folder.
        progress: show progress.
        say: takes the lines that tell what is being done.

    Returns:
        ``{"std": …, "picnn": …}``, each with acc1, acc2, acc3 in [0, 1] and mis in nats; those of
        a complete identical run are read back.

    Raises:
        ConfigError: seed or epochs out of range.
        RunFolderError: the folder holds another run.
    """
    options = demo_options(output, seed=seed, epochs=epochs)
    folder = demo_folder(output, seed=seed, epochs=epochs)
    if not overwrite and folder.complete():
        return read_metrics(folder.path, TITLES)
    metrics: dict[str, Figures] = {}
    trained: dict[str, tuple[InterpretableNetwork, SeededDataModule]] = {}
    with folder.writing(overwrite=overwrite) as work:
        for method, title in TITLES.items():
            part = work / method
            if (part / METRICS).exists():
                metrics[method] = read_metrics(part, [method])[method]
                say(f"{title}: trained before the interruption")
                network, saved, _ = load_checkpoint(part / CHECKPOINT)
                trained[method] = network, build_data(saved)
                continue
            resumed = " (goes on from its last checkpoint)" if (part / CHECKPOINT).exists() else ""
            run = assemble(options[method], part, progress=progress)
            images = len(run.data.train_set)  # type: ignore[arg-type]
            say(f"{title}: {epochs} epochs on {images} digits{resumed}")
            start = time.perf_counter()
            metrics[method] = fit(run, progress=progress)
            trained[method] = run.network.cpu(), run.data
            say(f"{title}: trained and measured in {time.perf_counter() - start:.0f} s")
            write_json(part / METRICS, {method: metrics[method]})
        say("drawing the pictures")
        _draw(trained, work, seed)
        write_json(work / METRICS, metrics)
    return metrics


def demo_options(output: str | Path, *, seed: int, epochs: int) -> dict[str, Options]:
    """The options of each network's training, alike but for the method.

    Raises:
        ConfigError: seed or epochs out of range.
    """
    return {
        name: Options(
            **COMMON, method=method, output=str(Path(output) / name), seed=seed, epochs=epochs
        )
        for name, method in METHODS.items()
    }


def demo_folder(output: str | Path, *, seed: int, epochs: int) -> RunFolder:
    """The folder of the demonstration with these options."""
    return RunFolder(output, "demo", {"seed": seed, "epochs": epochs})


def _draw(
    trained: dict[str, tuple[InterpretableNetwork, SeededDataModule]], folder: Path, seed: int
) -> None:
    """The three pictures of the demonstration in ``folder``, of its networks in eval mode."""
    matrices: dict[str, torch.Tensor] = {}
    cams = {}
    for method, title in TITLES.items():
        network, data = trained[method]
        ownership = network.ownership()
        assert ownership is not None
        matrices[_MATRIX_TITLES[method]] = ownership
        test = torch.utils.data.default_collate(list(data.test_set))  # type: ignore[call-overload]
        images, labels = _one_of_each(*test)
        cams[title] = pathway_grad_cam(network, images, labels, seed=seed)
    names = [data.class_names[label] for label in labels.tolist()]
    plot_correspondence(matrices, data.class_names, folder / "correspondence.png")
    plot_grad_cam(images, cams, names, folder / "gradcam.png")
    histories = {title: read_history(folder / method) for method, title in TITLES.items()}
    headings = {name: f"{figure.heading}, {figure.meaning}" for name, figure in FIGURES.items()}
    plot_curves(histories, folder / "curves.png", headings=headings)


def _one_of_each(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test image of each of the first few classes."""
    first = torch.stack([(labels == c).nonzero()[0, 0] for c in range(_DIGITS_SHOWN)])
    return images[first], labels[first]
