"""A page of one filter: what it fires on, what it is used for, and what it tells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.explain import FilterIndex, TopImages
from picnn_fast.report.style import AS_IT_IS, canvas, displayed, saved, without_frame

with extra("report"):
    from matplotlib import patheffects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patches import Ellipse, Rectangle
    from matplotlib.ticker import MaxNLocator

_COLUMNS = 9
_BARS = 6
_LETTERS = 22  # of a name above an image
_SIDE = 1.4  # inches of an image
# Told apart in grey by how dark they are, and by their strokes.
_FIRED: dict[str, Any] = {"color": "#1b4f72"}
_USED: dict[str, Any] = {"facecolor": "#f0b45b", "hatch": "///", "edgecolor": "#5b3a00"}


def plot_filter_page(
    index: FilterIndex,
    number: int,
    images: Mapping[int, Tensor],
    class_names: Sequence[str],
    path: str | Path | None = None,
    *,
    part_names: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """The images a filter fires on most and those it adds most to, and what it tells of classes.

    Images keep their colours. A box is drawn where the receptive field of the peak ends within the
    image, and a dashed circle about where most of the field's weight lies
    (``ReceptiveField.diameters``). Below: the classes of these images, the parts that the peaks lie
    on, mutual information with the classes it tells most about, and the filters that go along.

    Args:
        index: of ``filter_index``.
        number: of the filter, in [0, N).
        images: those of ``index.images_of([number])`` by their index, ``[C, H, W]`` in [0, 1],
            grey or RGB, before they are normalised.
        class_names: K names.
        path: PNG file to write; None: none.
        part_names: P names, where the index was made with part masks.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        TypeError: images that are no floating tensors, or a number that is no int.
        ValueError: a number out of range, an image that is missing or of another size, or not a
            name for each class or part.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import filter_index
        >>> from picnn_fast.models import make_interpretable
        >>> from picnn_fast.report import plot_filter_page
        >>> network = make_interpretable("small-cnn", "icnn", num_classes=3, num_filters=8)
        >>> images = torch.rand(12, 3, 32, 32)
        >>> index = filter_index(network, [(images, torch.arange(12) % 3)], top=4)
        >>> figure = plot_filter_page(index, 5, dict(enumerate(images)), ["ant", "bee", "cat"])
        >>> len(figure.axes)
        11
    """
    checks.integer("number", number, 0, index.num_filters)
    parts = index.by_activation.parts.shape[2]
    for what, names, count in (
        ("class_names", class_names, index.num_classes),
        ("part_names", part_names, parts),
    ):
        if len(names) != count:
            raise ValueError(f"{what}: got {len(names)} names, want {count}")
    pixels = _pixels(index, number, images)
    adds = "adds" if index.exact else "adds, to first order,"
    rankings = (
        (index.by_activation, "fires most on: class → that predicted, highest activation"),
        (index.by_contribution, f"{adds} most to the logit predicted: class → that, what it adds"),
    )
    top = index.by_activation.images.shape[1]
    columns, rows = min(top, _COLUMNS), -(-top // _COLUMNS)
    panels = 3 + bool(parts)
    width = max(_SIDE * columns + 0.3, 3.1 * panels)
    heights = [(_SIDE + 0.45) * rows + 0.4] * 2 + [0.34 * _BARS + 0.9]
    figure = canvas(ax, path, (width, sum(heights) + 0.8))
    figure.suptitle(_heading(index, number, class_names), fontsize=11, **AS_IT_IS)
    blocks = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    for block, (ranking, title) in zip(blocks, rankings, strict=False):
        block.suptitle(title, fontsize=10, x=0.01, ha="left", **AS_IT_IS)
        axes = block.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axis, place in zip(axes, range(top), strict=False):
            _image(axis, index, ranking, number, place, pixels, class_names)
        for axis in axes[top:]:
            axis.remove()
    places = blocks[2].subplots(1, panels, squeeze=False)[0].tolist()
    _shares(places[0], index, number, class_names)
    if parts:
        _parts(places[1], index, number, part_names)
    _information(places[-2], index, number, class_names)
    _neighbours(places[-1], index, number)
    return saved(figure, path)


def _pixels(index: FilterIndex, number: int, images: Mapping[int, Tensor]) -> dict[int, Any]:
    wanted = index.images_of([number])
    for i in wanted:
        if i not in images:
            raise ValueError(f"images: got no image {i}, want all of index.images_of([number])")
        image = images[i]
        checks.floating(f"images[{i}]", image)
        if image.ndim != 3 or tuple(image.shape[1:]) != tuple(index.image_size):
            height, width = index.image_size
            raise ValueError(
                f"images[{i}]: got shape {tuple(image.shape)}, want [C, {height}, {width}]"
            )
    return dict(zip(wanted, displayed(torch.stack([images[i] for i in wanted])), strict=True))


def _heading(index: FilterIndex, number: int, class_names: Sequence[str]) -> str:
    owner, stands = int(index.owner[number]), "no class"
    if owner >= 0:
        stands = f"{class_names[owner]} ({float(index.owned[number]):.2f})"
    seen = [f"of {counted(index.num_images, 'image')}"]
    if index.constant[number]:
        seen.append("its mean is the same in all of them: it tells nothing of the classes")
    if index.field is None:
        seen.append("each position may depend on the whole image")
    else:
        seen.append("box: where the pixels end that its peak depends on, if within the image")
        seen.append("circle: most of their weight")
    return f"filter {number} stands for {stands}\n{'; '.join(seen)}"


def _image(
    axis: Axes,
    index: FilterIndex,
    ranking: TopImages,
    number: int,
    place: int,
    pixels: Mapping[int, Any],
    class_names: Sequence[str],
) -> None:
    image = pixels[int(ranking.images[number, place])]
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    label, predicted = (int(x[number, place]) for x in (ranking.labels, ranking.predicted))
    name = _short(class_names[label], _LETTERS)
    if predicted != label:
        half = _LETTERS // 2 - 1
        name = f"{_short(class_names[label], half)} → {_short(class_names[predicted], half)}"
    sign = "+" if ranking is index.by_contribution else ""
    value = f"{float(ranking.values[number, place]):{sign}.3g}"
    axis.set_title(f"{name}\n{value}", fontsize=8, **AS_IT_IS)
    axis.set_xticks([])
    axis.set_yticks([])
    without_frame(axis)
    if index.field is None:
        return
    height, width = index.image_size
    row, column = ranking.positions[number, place].tolist()
    # imshow puts the centre of the first pixel at 0, not at a half.
    x, y = (index.field.centres()[row, column] - 0.5).tolist()
    down, across = index.field.size
    tall, wide = index.field.diameters()
    style: dict[str, Any] = {"fill": False, "edgecolor": "white"}
    for patch, line in (
        (Rectangle((x - across / 2, y - down / 2), across, down, linewidth=1.4, **style), 3.0),
        (Ellipse((x, y), wide, tall, linewidth=1.0, linestyle=(0, (3, 2)), **style), 2.2),
    ):
        patch.set_path_effects([patheffects.withStroke(linewidth=line, foreground="black")])
        axis.add_patch(patch)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _pairs(axis: Axes, names: Sequence[str], fired: Tensor, used: Tensor) -> None:
    """Shares in [0, 1], two bars a name."""
    for bars, offset, style, label in (
        (fired, -0.2, _FIRED, "fires"),
        (used, 0.2, _USED, "adds"),
    ):
        rows = [row + offset for row in range(len(names))]
        axis.barh(rows, bars.tolist(), height=0.38, label=label, linewidth=0.6, **style)
    _finish(axis, names)
    axis.set_xlim(0, 1)
    axis.legend(fontsize=8, loc="lower right", framealpha=0.9)


def _finish(axis: Axes, names: Sequence[str]) -> None:
    shown = [_short(name, _LETTERS) for name in names]
    axis.set_yticks(range(len(names)), shown, fontsize=8, **AS_IT_IS)
    axis.set_ylim(max(len(names), 2) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.spines[["top", "right"]].set_visible(False)


def _shares(axis: Axes, index: FilterIndex, number: int, class_names: Sequence[str]) -> None:
    fired, used = (
        ranking.shares(index.num_classes)[number]
        for ranking in (index.by_activation, index.by_contribution)
    )
    most = (fired + used).sort(stable=True, descending=True)
    chosen = most.indices[: max(1, min(_BARS, int((most.values > 0).sum())))]
    names = [class_names[i] for i in chosen.tolist()]
    _pairs(axis, names, fired[chosen], used[chosen])
    axis.set_title("classes of these images, share", fontsize=9)


def _parts(axis: Axes, index: FilterIndex, number: int, part_names: Sequence[str]) -> None:
    fired, used = (
        ranking.parts[number].float().mean(0)
        for ranking in (index.by_activation, index.by_contribution)
    )
    chosen = (fired + used).sort(stable=True, descending=True).indices[:_BARS]
    names = [part_names[i] for i in chosen.tolist()]
    _pairs(axis, names, fired[chosen], used[chosen])
    axis.set_title("part under the peak, share of images", fontsize=9)


def _information(axis: Axes, index: FilterIndex, number: int, class_names: Sequence[str]) -> None:
    most = index.mutual_information[:, number].sort(stable=True, descending=True)
    values, chosen = most.values[:_BARS].tolist(), most.indices[:_BARS].tolist()
    axis.barh(range(len(values)), values, height=0.7, **_FIRED)
    _finish(axis, [class_names[i] for i in chosen])
    axis.set_xlim(0, max(*values, 0.01) * 1.05)
    axis.set_title("mutual information with a class, nats", fontsize=9)


def _neighbours(axis: Axes, index: FilterIndex, number: int) -> None:
    nearest, values = index.neighbours[number].tolist(), index.correlations[number].tolist()
    axis.barh(range(len(values)), values, height=0.7, **_FIRED)
    _finish(axis, [f"filter {i}" for i in nearest])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlim(min(0.0, *values, 0.0) - 0.02, 1)
    axis.set_title("filters that go along, correlation", fontsize=9)
