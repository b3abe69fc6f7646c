"""The demonstration: an ordinary network and a PICNN on scikit-learn's digits, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from picnn_fast.evaluation import FIGURES, Figures
from picnn_fast.explain import pathway_grad_cam
from picnn_fast.report import plot_correspondence, plot_curves, plot_grad_cam
from picnn_fast.training.checkpoint import CHECKPOINT, load_checkpoint
from picnn_fast.training.compare import RECIPES, methods_on, train_part
from picnn_fast.training.options import Options
from picnn_fast.training.run import METRICS, build_data, read_history, read_metrics
from picnn_fast.training.run_folder import RunFolder, write_json
from picnn_fast.training.summary import REPORT, write_report

TITLES = {"std": "STD, an ordinary network", "picnn": "PICNN"}
_MATRIX_TITLES = {"std": "STD: random, not trained", "picnn": "PICNN: learned"}
COMMON: dict[str, Any] = RECIPES["digits"].common
METHODS: dict[str, dict[str, Any]] = methods_on("digits", list(TITLES))
_DIGITS_SHOWN = 6
EPOCHS = 30
# How far apart figures of different seeds lie after as many epochs, of either network: what was
# measured over a few seeds (benchmarks/results/demo/seeds.json), rounded up.
SPREAD = {"acc1": 0.01, "acc2": 0.01, "acc3": 0.09, "mis": 0.02}


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

    The folder then holds ``report.html``, ``metrics.json``, ``correspondence.png``, ``curves.png``,
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
        if not (folder.path / REPORT).is_file():
            write_report([output])
        return read_metrics(folder.path, TITLES)
    with folder.writing(overwrite=overwrite) as work:
        metrics = {
            method: train_part(options[method], work / method, title, progress=progress, say=say)
            for method, title in TITLES.items()
        }
        say("drawing the pictures")
        _draw(work, seed)
        write_json(work / METRICS, metrics)
    say("writing the report")
    write_report([output])
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
    """The folder of the demonstration with these options.

    Raises:
        ConfigError: seed or epochs out of range, which is told before what the folder holds.
    """
    demo_options(output, seed=seed, epochs=epochs)
    return RunFolder(output, "demo", {"seed": seed, "epochs": epochs})


def _draw(folder: Path, seed: int) -> None:
    """The three pictures of the demonstration in ``folder``, of the networks there."""
    matrices: dict[str, torch.Tensor] = {}
    cams = {}
    for method, title in TITLES.items():
        network, options, _ = load_checkpoint(folder / method / CHECKPOINT)
        data = build_data(options)
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
