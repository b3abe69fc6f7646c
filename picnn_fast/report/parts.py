"""Pictures of part filters: their templates, where their peaks fall, the images they fire on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.backbones import ReceptiveField
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
    from matplotlib.patches import Ellipse, Rectangle

_SIGNED_COLOURS = "RdBu_r"
_FIELD_COLOUR = "#39d0c8"


def plot_template_gallery(
    templates: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Part templates side by side, at most six a row, on one scale of colours about 0.

    Args:
        templates: title to ``[h, w]``.
        path: PNG file to write; None: none.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        ValueError: no template, or one that is not ``[h, w]``.

    Example:
        >>> import torch
        >>> from picnn_fast.report import plot_template_gallery
        >>> figure = plot_template_gallery({"flat": torch.ones(5, 5)})
    """
    if not templates:
        raise ValueError("templates: got none, want at least 1")
    for title, template in templates.items():
        if template.ndim != 2 or template.numel() == 0:
            raise ValueError(
                f"templates[{title!r}]: got shape {tuple(template.shape)}, want [h, w]"
            )
    values = [template.detach().cpu().float().numpy() for template in templates.values()]
    most = max(float(np.abs(value).max()) for value in values) or 1.0
    columns = min(len(values), 6)
    rows = -(-len(values) // columns)
    figure = canvas(ax, path, (2.0 * columns + 1.2, 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, title, value in zip(axes.flat, templates, values, strict=False):
        axis.imshow(value, cmap=_SIGNED_COLOURS, vmin=-most, vmax=most, interpolation="nearest")
        axis.set_title(title, fontsize=9, **AS_IT_IS)
    for axis in axes.flat:
        _bare(axis)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-most, most), _SIGNED_COLOURS), ax=list(axes[:, -1]), shrink=0.8
    )
    bar.outline.set_visible(False)
    return saved(figure, path)


def plot_peak_heat_map(
    images: Tensor,
    peaks: Tensor,
    path: str | Path | None = None,
    *,
    radius: float | None = None,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """Where the peaks of all filters of a layer fall on each object (ICNN, figure 6).

    Every image above its heat map: a normal distribution about the peak of each filter, added up
    over filters; colours from 0 to the highest value of that image.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        peaks: ``[B, N, 2]`` (x, y) in pixels, as ``ReceptiveField.peaks`` gives; NaN for a filter
            to leave out, such as one that does not fire.
        path: PNG file to write; None: none.
        radius: standard deviation of the distributions in pixels; None takes a 24th of the
            image's diagonal.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        TypeError: not floating tensors, or a radius that is no number.
        ValueError: no images, shapes that disagree, or a radius that is not positive.

    Example:
        >>> import torch
        >>> from picnn_fast.report import plot_peak_heat_map
        >>> figure = plot_peak_heat_map(torch.rand(2, 3, 16, 16), 16 * torch.rand(2, 8, 2))
    """
    pixels = displayed(images)
    checks.floating("peaks", peaks)
    if peaks.ndim != 3 or (len(peaks), peaks.shape[2]) != (len(images), 2):
        raise ValueError(
            f"peaks: got shape {tuple(peaks.shape)}, want [{len(images)}, filters, 2]: (x, y) for"
            " each of images"
        )
    height, width = images.shape[2:]
    sigma = math.hypot(height, width) / 24 if radius is None else checks.positive("radius", radius)
    figure = canvas(ax, path, (1.5 * len(pixels) + 1.0, 3.3))
    axes = figure.subplots(2, len(pixels), squeeze=False)
    for above, below, image, places in zip(
        *axes, pixels, peaks.detach().cpu().float(), strict=True
    ):
        heat = peak_density(places, height, width, sigma)
        above.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        overlay(below, image, (heat / (float(heat.max()) or 1.0)).numpy())
        _bare(above)
        _bare(below)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), HEAT_COLOURS), ax=list(axes[:, -1]), shrink=0.8
    )
    bar.set_label("density of peaks, share of the image's maximum", fontsize=8)
    bar.outline.set_visible(False)
    return saved(figure, path)


def peak_density(peaks: Tensor, height: int, width: int, radius: float) -> Tensor:
    """A normal distribution about each peak, added up: ``[height, width]``.

    Args:
        peaks: ``[N, 2]`` (x, y) in pixels; NaN for one to leave out.
        height, width: of the image.
        radius: standard deviation in pixels.
    """
    peaks = peaks[~peaks.isnan().any(-1)]
    down, across = (
        (-((place[:, None] - torch.arange(size) - 0.5) ** 2) / (2 * radius**2)).exp()
        for size, place in ((height, peaks[:, 1]), (width, peaks[:, 0]))
    )
    return down.T @ across


def plot_filter_images(
    images: Tensor,
    maps: Tensor,
    receptive_field: ReceptiveField,
    filters: Sequence[int],
    path: str | Path | None = None,
    *,
    columns: int = 6,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """The images each filter fires on most, with its map and the field of its peak.

    A row for each filter, the image of the highest peak first. Over the image lies the map, where
    its positions look, in colours from 0 to the highest activation of the row; about the peak the
    effective field (round, ``ReceptiveField.diameters``) and the whole one (dashed, clipped to
    the image).

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        maps: ``[B, N, h, w]`` of these images.
        receptive_field: of the maps.
        filters: indices in [0, N).
        path: PNG file to write; None: none.
        columns: images a filter, fewer where there are not as many.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no images or filters, shapes that disagree, or indices out of range.

    Example:
        >>> import torch
        >>> from picnn_fast.backbones import receptive_field
        >>> from picnn_fast.report import plot_filter_images
        >>> layer = torch.nn.Conv2d(3, 4, 5, stride=4, padding=2)
        >>> images = torch.rand(3, 3, 32, 32)
        >>> field = receptive_field(layer, 32)
        >>> figure = plot_filter_images(images, layer(images).relu(), field, [0, 3])
    """
    pixels = displayed(images)
    peaks, centres = (x.cpu() for x in receptive_field.peaks(maps))
    if tuple(images.shape[2:]) != tuple(receptive_field.image_size) or len(images) != len(maps):
        wanted = (len(maps), images.shape[1], *receptive_field.image_size)
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, want {wanted}: the batch of maps and"
            " image_size of the receptive field"
        )
    if not filters:
        raise ValueError("filters: got none, want at least 1")
    for index in filters:
        checks.integer("filters", index, 0, maps.shape[1])
    columns = min(checks.integer("columns", columns, 1), len(images))
    figure = canvas(ax, path, (1.5 * columns + 0.8, 1.5 * len(filters) + 0.1))
    axes = figure.subplots(len(filters), columns, squeeze=False)
    activations = maps.detach().cpu().float().clamp_min(0)
    first, stride = receptive_field.first_centre, receptive_field.stride
    (top, bottom), (left, right) = (
        (first[i] - stride[i] / 2, first[i] + (receptive_field.map_size[i] - 0.5) * stride[i])
        for i in (0, 1)
    )
    # imshow puts the centre of the first pixel at 0, not at a half.
    extent = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
    height, width = receptive_field.image_size
    for row, index in zip(axes, filters, strict=True):
        order = peaks[:, index].sort(descending=True, stable=True).indices[:columns]
        most = float(peaks[order[0], index]) or 1.0
        for axis, image in zip(row, order.tolist(), strict=True):
            axis.imshow(
                activations[image, index].numpy() / most,
                cmap=HEAT_COLOURS,
                vmin=0,
                vmax=1,
                interpolation="bilinear",
                extent=extent,
            )
            axis.imshow(
                pixels[image], cmap="gray", vmin=0, vmax=1, interpolation="nearest", alpha=0.55
            )
            axis.set_facecolor("black")  # where no position of the map looks
            _draw_field(axis, receptive_field, centres[image, index].tolist())
            axis.set_xlim(-0.5, width - 0.5)
            axis.set_ylim(height - 0.5, -0.5)
            _bare(axis)
        row[0].set_ylabel(f"filter {index}", fontsize=9)
    return saved(figure, path)


def _draw_field(axis: Axes, field: ReceptiveField, centre: Sequence[float]) -> None:
    x, y = centre[0] - 0.5, centre[1] - 0.5
    tall, wide = field.diameters()
    style: dict[str, Any] = {"fill": False, "edgecolor": _FIELD_COLOUR}
    axis.add_patch(Ellipse((x, y), wide, tall, linewidth=1.6, **style))
    height, width = field.image_size
    x0, x1 = max(x - field.size[1] / 2, -0.5), min(x + field.size[1] / 2, width - 0.5)
    y0, y1 = max(y - field.size[0] / 2, -0.5), min(y + field.size[0] / 2, height - 0.5)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, linewidth=0.9, linestyle="--", **style))


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    without_frame(axis)
