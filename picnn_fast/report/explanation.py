"""The picture of one explained image: the filters that carried its prediction."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.explain import ImageExplanation
from picnn_fast.report.style import AS_IT_IS, canvas, displayed, overlay, saved, without_frame

with extra("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_GROUPS = 8
_COLUMNS = 4
_FOR, _AGAINST = "#1b6ca8", "#d1495b"


def plot_explanation(
    image: Tensor,
    explanation: ImageExplanation,
    class_names: Sequence[str],
    path: str | Path | None = None,
    *,
    filters: int = 6,
    channel_dim: int = 1,
    ax: Axes | None = None,
) -> Figure | SubFigure:
    """The image, the maps of the filters that add most to its logit, and what each class's add.

    Each map has a scale of its own, from 0 to its maximum. Bars tell what the filters of each class
    add, and beside them what is predicted without these filters.

    Args:
        image: ``[C, H, W]`` in [0, 1], grey or RGB, before it is normalised.
        explanation: of ``explain_image``.
        class_names: K names.
        path: PNG file to write; None: none.
        filters: how many maps to show; fewer where there are fewer filters.
        channel_dim: the filter axis of the batch of maps. Maps that are not ``[N, h, w]`` are not
            shown.
        ax: axes of a grid, as of ``plt.subplots``, whose place the picture takes; None: a figure of
            its own.

    Returns:
        The figure, or that part of the figure of ``ax``.

    Raises:
        TypeError: an image that is no floating tensor.
        ValueError: an image of another shape, or not a name for each class.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import explain_image
        >>> from picnn_fast.models import make_interpretable
        >>> from picnn_fast.report import plot_explanation
        >>> network = make_interpretable("small-resnet", num_classes=3).eval()
        >>> image = torch.rand(1, 8, 8)
        >>> figure = plot_explanation(image, explain_image(network, image), "abc")
        >>> len(figure.axes)
        8
    """
    checks.integer("filters", filters, 1)
    if len(class_names) != len(explanation.logits):
        count = len(explanation.logits)
        raise ValueError(f"class_names: got {len(class_names)} names, want {count}, one a class")
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise ValueError(f"image: got {getattr(image, 'shape', image)}, want [C, H, W]")
    (pixels,) = displayed(image[None])
    owners = {i: group.owner for group in explanation.groups for i in group.filters.tolist()}
    shown: list[int] = []
    if channel_dim == 1 and explanation.maps.ndim == 3:
        shown = explanation.contributions.argsort(descending=True)[:filters].tolist()
    rows = -(-(len(shown) + 1) // _COLUMNS)
    groups = explanation.groups[:_GROUPS]
    below = 0.7 + 0.32 * len(groups)
    figure = canvas(ax, path, (10, 2.6 * rows + below))
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.6 * rows, below])
    above, bars = parts[:, 0]
    axes = above.subplots(rows, _COLUMNS, squeeze=False).flatten().tolist()
    probability = float(explanation.logits.softmax(0).max())
    predicted = class_names[int(explanation.logits.argmax())]
    axes[0].imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes[0].set_title(f"{predicted} ({probability:.2f})", fontsize=10, **AS_IT_IS)
    for axis, i in zip(axes[1:], shown, strict=False):
        heat = explanation.maps[i].clamp_min(0).cpu().float()
        heat = F.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
        overlay(axis, pixels, (heat / heat.max().clamp_min(torch.finfo().tiny)).numpy())
        owner = owners[i]
        of = "" if owner is None else f", class {class_names[owner]}"
        title = f"filter {i}{of}: {float(explanation.contributions[i]):+.2f}"
        axis.set_title(title, fontsize=9, **AS_IT_IS)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        without_frame(axis)
    for axis in axes[len(shown) + 1 :]:
        axis.remove()
    axis = bars.subplots()
    values = [group.contribution for group in groups]
    axis.barh(range(len(groups)), values, color=[_FOR if v >= 0 else _AGAINST for v in values])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    names = ["no class" if g.owner is None else f"class {class_names[g.owner]}" for g in groups]
    labels = [
        f"{n}, {counted(len(g.filters), 'filter')}" for g, n in zip(groups, names, strict=True)
    ]
    axis.set_yticks(range(len(groups)), labels, **AS_IT_IS)
    axis.set_xlabel(f"what they add to the logit of {class_names[explanation.target]}", **AS_IT_IS)
    reach = max(map(abs, values)) or 1.0
    axis.set_xlim(min(0.0, *values) - 0.03 * reach, max(0.0, *values) + 0.3 * reach)
    for row, group in enumerate(groups):
        without = group.logits_without.softmax(0)
        name = class_names[int(without.argmax())]
        axis.annotate(
            f"without: {name} ({float(without.max()):.2f})",
            (max(group.contribution, 0), row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            **AS_IT_IS,
        )
    axis.spines[["top", "right"]].set_visible(False)
    return saved(figure, path)
