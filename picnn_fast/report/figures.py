"""The pictures of a run: correspondence matrices, training curves, Grad-CAM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.explain import PathwayGradCam

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_DPI = 150
_Image = npt.NDArray[np.float32]
_PROBABILITY_COLOURS = "magma"
_HEAT_COLOURS = "inferno"
_PATHWAYS = {
    "acc1": ("ACC1, all filters", "#1b6ca8"),
    "acc2": ("ACC2, filters drawn for the pseudo-label", "#2e9e5b"),
    "acc3": ("ACC3, without the true class's filters", "#d1495b"),
}


def sort_filters(correspondence: Tensor) -> Tensor:
    """Order of the filters by their most probable class, the surest first within a class.

    Args:
        correspondence: ``[K, N]`` probabilities.

    Returns:
        ``[N]`` filter indices.
    """
    best, owner = correspondence.detach().cpu().max(0)
    return Tensor(np.lexsort((-best.numpy(), owner.numpy()))).long()


def plot_correspondence(
    matrices: Mapping[str, Tensor], class_names: Sequence[str], path: str | Path
) -> None:
    """Correspondence matrices as heat maps, one below the other, filters sorted by class.

    Args:
        matrices: title to probabilities ``[K, N]``.
        class_names: K names.
        path: PNG file to write.

    Raises:
        ValueError: a matrix that does not have a row for each name.

    Example:
        >>> import torch
        >>> from picnn_fast.report import plot_correspondence
        >>> plot_correspondence({"PICNN": torch.eye(3)}, "abc", "matrix.png")  # doctest: +SKIP
    """
    for title, matrix in matrices.items():
        if matrix.ndim != 2 or len(matrix) != len(class_names):
            raise ValueError(
                f"matrices[{title!r}]: got shape {tuple(matrix.shape)}, want [classes, filters]"
                f" with {len(class_names)} classes, the number of class_names"
            )
    rows = len(class_names)
    height = 1.1 + len(matrices) * (0.75 + max(1.4, min(0.2 * rows, 6)))
    figure = Figure(figsize=(10, height), layout="constrained", dpi=_DPI)
    axes = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        order = sort_filters(matrix)
        sorted_matrix = matrix.detach().cpu().float()[:, order].numpy()
        axis.imshow(
            sorted_matrix,
            aspect="auto",
            cmap=_PROBABILITY_COLOURS,
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel("class")
        # Beyond 40 classes the names would overlap.
        step = -(-rows // 40)
        axis.set_yticks(range(0, rows, step), [class_names[i] for i in range(0, rows, step)])
        axis.tick_params(length=0)
        _without_frame(axis)
    axes[-1].set_xlabel("filter, sorted by its most probable class")
    colours = ScalarMappable(Normalize(0, 1), _PROBABILITY_COLOURS)
    bar = figure.colorbar(colours, ax=list(axes), shrink=0.9, aspect=30, pad=0.015)
    bar.set_label("probability that the class keeps the filter")
    bar.outline.set_visible(False)
    figure.savefig(path)


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Training loss, and accuracy of the three pathways, over epochs; a column for each run.

    Args:
        histories: title to one mapping an epoch, with ``epoch`` (from 0), ``train/<term>`` losses
            and ``val/acc1`` … ``val/acc3``, as ``training.run.read_history`` returns.
        path: PNG file to write.

    Raises:
        ValueError: a history without epochs.
    """
    for title, history in histories.items():
        if not history:
            raise ValueError(f"histories[{title!r}]: got no epochs, want at least 1")
    logged = [item for history in histories.values() for row in history for item in row.items()]
    # Minus the mutual information is below 0.
    below = any(key.startswith("train/") and value < 0 for key, value in logged)
    loss_scale = "linear" if below else "log"
    figure = Figure(figsize=(5.2 * len(histories), 6.4), layout="constrained", dpi=_DPI)
    grid = figure.subplots(2, len(histories), squeeze=False, sharex="col", sharey="row")
    for column, (title, history) in enumerate(histories.items()):
        accuracy, loss = grid[0, column], grid[1, column]
        accuracy.set_title(title, loc="left", fontweight="bold")
        for key, (label, colour) in _PATHWAYS.items():
            _line(accuracy, history, f"val/{key}", label, colour)
        accuracy.set_ylim(0, 1.02)
        terms = sorted(
            {key for row in history for key in row if key.startswith("train/")} - {"train/loss"}
        )
        for term, colour in zip(terms, ("#5b4b8a", "#e08e45", "#4a7c59", "#888888"), strict=False):
            _line(loss, history, term, term.removeprefix("train/").replace("_", " "), colour)
        loss.set_yscale(loss_scale)
        loss.set_xlabel("epoch")
        for axis in (accuracy, loss):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        loss.legend(frameon=False, fontsize=9)
    grid[0, 0].set_ylabel("accuracy on validation images")
    grid[1, 0].set_ylabel("loss (weighted terms)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def plot_grad_cam(
    images: Tensor,
    rows: Mapping[str, PathwayGradCam],
    labels: Sequence[str],
    path: str | Path,
) -> None:
    """Panels image | all filters | class filters | complementary filters, a block for each network.

    The colours of the three panels of one image share one scale, from 0 to their common maximum:
    dark means that these filters say nothing for the class.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        rows: title (the network) to its Grad-CAM maps of these images.
        labels: B names, of the true classes.
        path: PNG file to write.
    """
    batch = len(images)
    titles = ("image", "all filters", "class filters", "complement")
    figure = Figure(
        figsize=(4.7 * len(rows) + 0.9, 1.1 * batch + 0.9), layout="constrained", dpi=_DPI
    )
    widths = [4.7] * len(rows) + [0.9]
    *blocks, margin = figure.subfigures(
        1, len(widths), squeeze=False, width_ratios=widths, wspace=0.02
    )[0]
    pixels = images.detach().cpu().float().clamp(0, 1).movedim(1, -1).squeeze(-1).numpy()
    for block, (title, cam) in zip(blocks, rows.items(), strict=True):
        block.suptitle(title, fontweight="bold")
        axes = block.subplots(batch, 4, squeeze=False)
        heats = [maps.detach().cpu().float().numpy() for maps in cam]
        for i in range(batch):
            peak = max(float(heat[i].max()) for heat in heats) or 1.0
            axes[i, 0].imshow(pixels[i], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, 0].set_ylabel(labels[i], rotation=0, ha="right", va="center", fontsize=11)
            for axis, heat in zip(axes[i, 1:], heats, strict=True):
                _overlay(axis, pixels[i], heat[i] / peak)
        for axis, name in zip(axes[0], titles, strict=True):
            axis.set_title(name, fontsize=9)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            _without_frame(axis)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _HEAT_COLOURS), cax=margin.add_axes((0.1, 0.15, 0.2, 0.7))
    )
    bar.set_label("Grad-CAM, share of the image's maximum", fontsize=9)
    bar.outline.set_visible(False)
    figure.savefig(path)


def _overlay(axis: Axes, pixels: _Image, heat: _Image) -> None:
    axis.imshow(heat, cmap=_HEAT_COLOURS, vmin=0, vmax=1, interpolation="bilinear")
    # The image on top as a faint light, so that strokes stay visible where the heat is dark.
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", alpha=0.25)


def _line(
    axis: Axes, history: Sequence[Mapping[str, float]], key: str, label: str, colour: str
) -> None:
    points = [(row["epoch"] + 1, row[key]) for row in history if key in row]
    if points:
        epochs, values = zip(*points, strict=True)
        axis.plot(epochs, values, label=label, color=colour, linewidth=1.8, marker="o", ms=2.5)


def _without_frame(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
