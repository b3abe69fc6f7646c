"""The pictures of a run: which filter stands for which class, training curves, Grad-CAM."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.explain import PathwayGradCam
from picnn_fast.report.style import (
    AS_IT_IS,
    HEAT_COLOURS,
    canvas,
    displayed,
    overlay,
    saved,
    without_frame,
)

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import MaxNLocator

_SHARE_COLOURS = "magma"
# Told apart without colours too, and each seen where it lies on another: the first is the widest.
_FIGURE_COLOURS = ("#1b6ca8", "#2e9e5b", "#d1495b", "#8a6d1f")
_FIGURE_DASHES = ("-", "--", ":")
_FIGURE_WIDTHS = (4.0, 2.2, 1.6)
_TERM_COLOURS = ("#5b4b8a", "#e08e45", "#4a7c59", "#888888")
_TERM_DASHES = ("-", "--", ":")  # three to four colours: twelve pairs before one comes again


def sort_filters(correspondence: Tensor) -> Tensor:
    """Order of the filters by the class that keeps most of each, the surest first within a class.

    Args:
        correspondence: ``[K, N]`` in [0, 1], of ``ownership()``.

    Returns:
        ``[N]`` filter indices.
    """
    best, owner = correspondence.detach().cpu().max(0)
    return Tensor(np.lexsort((-best.numpy(), owner.numpy()))).long()


def plot_correspondence(
    matrices: Mapping[str, Tensor],
    class_names: Sequence[str],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Which filter stands for which class, as heat maps one below the other, filters sorted.

    Colours go from 0 to 1, or to the highest share in a matrix where that is below a half: of many
    classes each may have little.

    Args:
        matrices: title to ``[K, N]`` in [0, 1], what the ``ownership()`` of a network gives: the
            probabilities of a PICNN, the categories of an ICNN, …
        class_names: K names.
        path: PNG file to write; None: none.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        ValueError: no matrix, or one that does not have a row for each name.

    Example:
        >>> import torch
        >>> from picnn_fast.report import plot_correspondence
        >>> figure = plot_correspondence({"PICNN": torch.eye(3)}, "abc")
        >>> figure.savefig("matrix.pdf")  # doctest: +SKIP
    """
    if not matrices:
        raise ValueError("matrices: got none, want at least 1")
    for title, matrix in matrices.items():
        if matrix.ndim != 2 or len(matrix) != len(class_names):
            raise ValueError(
                f"matrices[{title!r}]: got shape {tuple(matrix.shape)}, want [classes, filters]"
                f" with {len(class_names)} classes, the number of class_names"
            )
    rows = len(class_names)
    height = 1.1 + len(matrices) * (0.75 + max(1.4, min(0.2 * rows, 6)))
    figure = canvas(ax, path, (10, height))
    axes = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    scales = []
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        order = sort_filters(matrix)
        sorted_matrix = matrix.detach().cpu().float()[:, order].numpy()
        most = float(sorted_matrix.max(initial=0))
        scales.append(Normalize(0, most if 0 < most < 0.5 else 1))
        axis.imshow(
            sorted_matrix,
            aspect="auto",
            cmap=_SHARE_COLOURS,
            norm=scales[-1],
            interpolation="nearest",
        )
        axis.set_title(title, loc="left", fontweight="bold", **AS_IT_IS)
        axis.set_ylabel("class")
        # Beyond 40 classes the names would overlap.
        step = -(-rows // 40)
        shown = range(0, rows, step)
        axis.set_yticks(shown, [class_names[i] for i in shown], **AS_IT_IS)
        axis.tick_params(length=0)
        without_frame(axis)
    axes[-1].set_xlabel("filter, sorted by the class that keeps most of it")
    alike = len({scale.vmax for scale in scales}) == 1
    for scale, beside in [(scales[0], list(axes))] if alike else zip(scales, axes, strict=True):
        colours = ScalarMappable(scale, _SHARE_COLOURS)
        bar = figure.colorbar(colours, ax=beside, shrink=0.9, aspect=30, pad=0.015)
        bar.set_label("share of the filter that the class keeps" if alike else "share kept")
        bar.outline.set_visible(False)
    return saved(figure, path)


def plot_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | Path | None = None,
    *,
    headings: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Figures of the validation images, and training loss, over epochs; a column for each run.

    Args:
        histories: title to one mapping an epoch, with ``epoch`` (from 0), ``train/<term>`` losses
            and ``val/<figure>``, as ``training.run.read_history`` returns.
        path: PNG file to write; None: none.
        headings: figure to its name in the legend, in that order; others follow, in capitals.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        ValueError: no history, or one without epochs.

    Example:
        >>> from picnn_fast.report import plot_curves
        >>> figure = plot_curves({"PICNN": [{"epoch": 0, "train/entropy": 2.3, "val/acc1": 0.1}]})
        >>> figure.axes[0].get_title(loc="left")
        'PICNN'
    """
    if not histories:
        raise ValueError("histories: got none, want at least 1")
    for title, history in histories.items():
        if not history:
            raise ValueError(f"histories[{title!r}]: got no epochs, want at least 1")
    logged = [item for history in histories.values() for row in history for item in row.items()]
    # Minus the mutual information is below 0.
    below = any(key.startswith("train/") and value < 0 for key, value in logged)
    loss_scale = "linear" if below else "log"
    figures = [(key, value) for key, value in logged if key.startswith("val/")]
    names = {f"val/{name}": heading for name, heading in (headings or {}).items()}
    names |= {key: key[4:].upper() for key in sorted(dict(figures)) if key not in names}
    shares = all(0 <= value <= 1 for _, value in figures)
    figure = canvas(ax, path, (5.2 * len(histories), 6.4))
    grid = figure.subplots(2, len(histories), squeeze=False, sharex="col", sharey="row")
    for column, (title, history) in enumerate(histories.items()):
        above, loss = grid[0, column], grid[1, column]
        above.set_title(title, loc="left", fontweight="bold", **AS_IT_IS)
        looks = zip(
            itertools.cycle(_FIGURE_COLOURS),
            itertools.cycle(_FIGURE_DASHES),
            itertools.cycle(_FIGURE_WIDTHS),
            strict=False,
        )
        for (key, label), (colour, dashes, width) in zip(names.items(), looks, strict=False):
            style = {"color": colour, "linestyle": dashes, "linewidth": width}
            _line(above, history, key, label, zorder=3 - width / 10, **style)
        if shares:
            above.set_ylim(0, 1.02)
        terms = sorted(
            {key for row in history for key in row if key.startswith("train/")} - {"train/loss"}
        )
        styles = itertools.cycle(_TERM_COLOURS), itertools.cycle(_TERM_DASHES)
        for term, colour, dashes in zip(terms, *styles, strict=False):
            label = term.removeprefix("train/").replace("_", " ")
            _line(loss, history, term, label, color=colour, linestyle=dashes, linewidth=1.8)
        loss.set_yscale(loss_scale)
        loss.set_xlabel("epoch")
        loss.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (above, loss):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        if terms:
            loss.legend(frameon=False, fontsize=9, handlelength=3)
    grid[0, 0].set_ylabel("validation images")
    grid[1, 0].set_ylabel("loss (weighted terms)")
    known = {line.get_label(): line for axis in grid[0] for line in axis.get_lines()}
    labels = [label for label in names.values() if label in known]
    figure.legend(
        [known[label] for label in labels],
        labels,
        loc="outside upper center",
        # Wider than one column of the grid.
        ncols=1 if len(histories) == 1 else 3,
        frameon=False,
        fontsize=9,
        handlelength=3.5,
    )
    return saved(figure, path)


def plot_grad_cam(
    images: Tensor,
    rows: Mapping[str, PathwayGradCam],
    labels: Sequence[str],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Panels image | all filters | class filters | the others | random ones, by network.

    The colours of the four panels of one image share one scale, from 0 to their common maximum:
    dark means that these filters say nothing for the class. Few filters are dark by their number
    alone; the random ones are as many as the class's, and what those show beyond them counts.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB, before they are normalised; see
            ``displayed``.
        rows: title (the network) to its Grad-CAM maps of these images.
        labels: B names, of the true classes.
        path: PNG file to write; None: none.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        TypeError: images that are no floating tensor.
        ValueError: no images, or not as many names as images.
    """
    pixels = displayed(images)
    batch = len(pixels)
    if len(labels) != batch:
        raise ValueError(f"labels: got {len(labels)} names, want {batch}, one for each of images")
    titles = ("image", "all filters", "class filters", "the others", "as many random")
    figure = canvas(ax, path, (5.8 * len(rows) + 0.9, 1.1 * batch + 0.9))
    widths = [5.8] * len(rows) + [0.9]
    *blocks, margin = figure.subfigures(
        1, len(widths), squeeze=False, width_ratios=widths, wspace=0.02
    )[0]
    for block, (title, cam) in zip(blocks, rows.items(), strict=True):
        block.suptitle(title, fontweight="bold", **AS_IT_IS)
        axes = block.subplots(batch, 5, squeeze=False)
        heats = [maps.detach().cpu().float().numpy() for maps in cam]
        for i in range(batch):
            peak = max(float(heat[i].max()) for heat in heats) or 1.0
            axes[i, 0].imshow(pixels[i], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, 0].set_ylabel(
                labels[i], rotation=0, ha="right", va="center", fontsize=11, **AS_IT_IS
            )
            for axis, heat in zip(axes[i, 1:], heats, strict=True):
                overlay(axis, pixels[i], heat[i] / peak)
        for axis, name in zip(axes[0], titles, strict=True):
            axis.set_title(name, fontsize=9)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            without_frame(axis)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), HEAT_COLOURS), cax=margin.add_axes((0.1, 0.15, 0.2, 0.7))
    )
    bar.set_label("Grad-CAM, share of the image's maximum", fontsize=9)
    bar.outline.set_visible(False)
    return saved(figure, path)


def _line(
    axis: Axes, history: Sequence[Mapping[str, float]], key: str, label: str, **style: Any
) -> None:
    points = [(row["epoch"] + 1, row[key]) for row in history if key in row]
    if points:
        epochs, values = zip(*points, strict=True)
        axis.plot(epochs, values, label=label, marker="o", ms=2.5, **style)
