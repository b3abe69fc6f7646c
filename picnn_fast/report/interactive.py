"""The interactive charts of the HTML report, as Plotly's JSON: heat maps and curves.

The page's own script draws them, in the colours of its light or dark theme.
"""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.report.figures import sort_filters

with extra("report"):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

# Perceptually uniform, and the same to the colour-blind and in greyscale but for hue.
_COLOURS = "Cividis"
# With more classes than this a matrix is read in windows of so many, below an overview in blocks.
MOST_ROWS, _WINDOW = 60, 40
_MOST_BLOCKS = (120, 240)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
# Tones of the style sheet, which has them for light and dark.
_TONES = 6
_LEAST_KEPT = 4
_BYTES = 4  # of a share kept: the class and the share, 16 bits each

Json = dict[str, Any]


def matrix_chart(shares: Tensor, class_names: Sequence[str], budget: int) -> Json:
    """A matrix ``[K, N]`` in [0, 1] for the page: what is kept of it, and how it is laid out.

    Of each filter the largest shares are kept, all K of them where they fit, each to 16 bits.

    Args:
        shares: of ``ownership()``.
        class_names: K names, each as it is to be read.
        budget: bytes that the shares may take, before they are written as text.

    Raises:
        ValueError: a matrix that does not have a row for each name, or has no filter.
    """
    if shares.ndim != 2 or len(shares) != len(class_names) or not shares.numel():
        raise ValueError(
            f"shares: got shape {tuple(shares.shape)}, want [classes, filters] with"
            f" {len(class_names)} classes, the number of class_names, and at least one filter"
        )
    values = shares.detach().cpu().float().numpy()
    classes, filters = values.shape
    kept = min(classes, max(_LEAST_KEPT, budget // (filters * _BYTES)))
    index = np.argsort(-values, axis=0, kind="stable")[:kept]
    strongest = np.take_along_axis(values, index, 0)
    highest = float(values.max(initial=0))
    # As in plot_correspondence: of many classes each may have little.
    scale = highest if 0 < highest < 0.5 else 1.0
    most, owner = strongest[0], np.where(strongest[0] > 0, index[0], -1)
    order = sort_filters(shares).numpy()
    half = np.bincount(owner[most > 0.5], minlength=classes)
    return {
        "classes": _unique(class_names),
        "order": order.tolist(),
        "owner": owner.tolist(),
        "most": np.bincount(owner[owner >= 0], minlength=classes).tolist(),
        "half": half.tolist(),
        "kept": kept,
        "index": _base64(index.T.astype("<u2")),
        "share": _base64(np.rint(strongest.T / scale * 65535).astype("<u2")),
        "scale": scale,
        "window": _WINDOW if classes > MOST_ROWS else classes,
        "overview": _overview(values[:, order], scale) if classes > MOST_ROWS else None,
        "figure": _matrix_layout(scale),
    }


def _matrix_layout(scale: float) -> Json:
    """The heat map without its cells, and beside it the bars of filters per class."""
    figure = make_subplots(
        cols=2, shared_yaxes=True, column_widths=[0.8, 0.2], horizontal_spacing=0.02
    )
    figure.add_trace(
        go.Heatmap(
            colorscale=_COLOURS,
            zmin=0,
            zmax=scale,
            hovertemplate="filter %{x}<br>class %{y}<br>share %{z:.3f}<extra></extra>",
            colorbar=_bar("share of the filter that the class keeps"),
        ),
        row=1,
        col=1,
    )
    for name, tone, pattern in (
        ("more than half", 0, ""),
        ("most of it, but no more than half", 1, "/"),
    ):
        figure.add_trace(
            go.Bar(
                orientation="h",
                name=name,
                meta={"tone": tone},
                marker={"pattern": {"shape": pattern, "fillmode": "replace", "size": 5}},
                hovertemplate="class %{y}<br>%{x} filters: " + name + "<extra></extra>",
            ),
            row=1,
            col=2,
        )
    category = {"type": "category", "showgrid": False, "zeroline": False}
    figure.update_layout(
        barmode="stack",
        bargap=0.15,
        showlegend=False,
        margin={"l": 8, "r": 8, "t": 16, "b": 44},
        xaxis={**category, "title": {"text": "filter"}, "nticks": 16, "automargin": True},
        xaxis2={"title": {"text": "filters"}, "nticks": 4, "rangemode": "tozero"},
        yaxis={**category, "autorange": "reversed", "automargin": True},
        yaxis2={**category, "autorange": "reversed"},
    )
    return _as_json(figure)


def _overview(values: npt.NDArray[np.float32], scale: float) -> Json:
    """All of a matrix whose filters are sorted: the highest share in each block of cells."""
    edges = [
        np.linspace(0, size, min(size, most) + 1).astype(int)
        for size, most in zip(values.shape, _MOST_BLOCKS, strict=True)
    ]
    blocks = values
    for axis, edge in enumerate(edges):
        blocks = np.maximum.reduceat(blocks, edge[:-1], axis=axis)
    centres = [(edge[:-1] + edge[1:] - 1) / 2 for edge in edges]
    figure = go.Figure(
        go.Heatmap(
            z=blocks.astype(np.float32),
            x=centres[1],
            y=centres[0],
            colorscale=_COLOURS,
            zmin=0,
            zmax=scale,
            showscale=False,
            hovertemplate="class number %{y:.0f}, filter %{x:.0f} of the order<br>at most %{z:.3f}"
            "<extra></extra>",
        )
    )
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 8, "b": 44},
        xaxis={"title": {"text": "filters in order"}, "showgrid": False, "zeroline": False},
        yaxis={
            "title": {"text": "class number"},
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
    )
    return _as_json(figure)


def confusion_chart(
    complete: Tensor,
    without: Mapping[int, Tensor],
    removed: Mapping[int, int],
    class_names: Sequence[str],
) -> Json:
    """Confusion matrices with all filters and without those of a class, to be chosen on the page.

    Of many classes a choice shows the one whose filters are removed and those that change most.

    Args:
        complete: ``[K, K]`` images by their class, a row each, and by the class they are given.
        without: class to the same without its filters.
        removed: class to the number of these.
        class_names: K names.

    Raises:
        ValueError: matrices of another shape, or no class.
    """
    wanted = (len(class_names), len(class_names))
    for name, matrix in (("complete", complete), *(("without", x) for x in without.values())):
        if tuple(matrix.shape) != wanted:
            raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want {wanted}")
    if not without:
        raise ValueError("without: got no class, want at least 1")
    names = _unique(class_names)
    choices = []
    for label, matrix in without.items():
        kept = _most_changed(complete, matrix, label)
        columns = [names[i] for i in kept]
        rest = len(names) - len(kept)
        before, after = (_chosen(each, kept) for each in (complete, matrix))
        choices.append(
            {
                "name": names[label],
                "said": _told_of_removal(complete, matrix, label, removed[label], names),
                "rows": columns,
                "columns": [*columns, counted(rest, "other")] if rest else columns,
                "complete": before if rest else None,
                "without": after,
            }
        )
    # Of few classes it is the same for all choices, and in the page once.
    shared = None if len(names) > MOST_ROWS else complete.tolist()
    return {"choices": choices, "complete": shared, "figure": _confusion_layout()}


def _most_changed(complete: Tensor, without: Tensor, label: int) -> list[int]:
    """The classes to show, ascending: all of few."""
    if len(complete) <= MOST_ROWS:
        return list(range(len(complete)))
    change = (complete - without).abs().sum(1)
    change[label] = change.max() + 1
    return sorted(change.argsort(descending=True, stable=True)[:_WINDOW].tolist())


def _chosen(matrix: Tensor, kept: Sequence[int]) -> list[list[int]]:
    rows = matrix[list(kept)]
    columns = rows[:, list(kept)]
    rest = rows.sum(1, keepdim=True) - columns.sum(1, keepdim=True)
    whole = len(kept) == len(matrix)
    shown: list[list[int]] = (columns if whole else np.hstack([columns, rest])).tolist()
    return shown


def _told_of_removal(
    complete: Tensor, without: Tensor, label: int, removed: int, names: Sequence[str]
) -> str:
    """What the removal does to the class and to the others, in a sentence."""
    own = [float(m[label, label]) / max(float(m[label].sum()), 1) for m in (complete, without)]
    others = []
    for matrix in (complete, without):
        right = float(matrix.diagonal().sum() - matrix[label, label])
        others.append(right / max(float(matrix.sum() - matrix[label].sum()), 1))
    if removed == 0:
        return f"No filter is class {names[label]}'s own: nothing is removed."
    return (
        f"Without {counted(removed, 'filter')} of class {names[label]},"
        f" {own[1]:.0%} of its images are told right ({own[0]:.0%} with all filters), and"
        f" {others[1]:.0%} of all others ({others[0]:.0%})."
    )


def _confusion_layout() -> Json:
    figure = go.Figure(
        go.Heatmap(
            colorscale=_COLOURS,
            zmin=0,
            zmax=1,
            colorbar=_bar("share of the images of the class"),
            hovertemplate="of class %{y}, taken for %{x}<br>images: %{customdata}, %{z:.0%} of the"
            " class<extra></extra>",
        )
    )
    category = {"type": "category", "showgrid": False, "zeroline": False, "automargin": True}
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 16, "b": 44},
        xaxis={**category, "title": {"text": "taken for"}},
        yaxis={**category, "title": {"text": "class"}, "autorange": "reversed"},
    )
    return _as_json(figure)


def _bar(title: str) -> dict[str, Any]:
    """The scale of colours above a heat map, where a narrow screen has room for it."""
    return {
        "orientation": "h",
        "thickness": 10,
        "len": 0.6,
        "x": 0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "title": {"text": title, "side": "top"},
        "outlinewidth": 0,
    }


def curves_chart(
    lines: Mapping[str, Sequence[Mapping[int, float]]], title: str, *, logarithmic: bool = False
) -> Json:
    """Lines over epochs, told apart by dashes and markers as well as by tones.

    Args:
        lines: name to one mapping from epoch, from 1, to value a seed; seeds look alike.
        title: of the vertical axis.
        logarithmic: where every value is above 0.

    Raises:
        ValueError: no line, or none with a value.
    """
    values = [value for runs in lines.values() for run in runs for value in run.values()]
    if not values:
        raise ValueError("lines: got no value, want at least 1")
    figure = go.Figure()
    for number, (name, runs) in enumerate(lines.items()):
        shown = plotly_text(name)
        for seed, run in enumerate(runs):
            figure.add_trace(
                go.Scatter(
                    x=list(run),
                    y=list(run.values()),
                    mode="lines+markers",
                    name=shown,
                    legendgroup=str(number),
                    showlegend=seed == 0,
                    opacity=1.0 if seed == 0 else 0.6,
                    line={"dash": _DASHES[number % len(_DASHES)], "width": 2},
                    marker={
                        "symbol": _SYMBOLS[number % len(_SYMBOLS)],
                        "size": 7,
                        "maxdisplayed": 12,
                    },
                    meta={"tone": number % _TONES},
                    hovertemplate="%{y:.3f}",
                )
            )
    log = logarithmic and min(values) > 0
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0, "xanchor": "left"},
        xaxis={"title": {"text": "epoch"}, "zeroline": False, "nticks": 8, "automargin": True},
        yaxis={
            "title": {"text": plotly_text(title)},
            "type": "log" if log else "linear",
            "zeroline": False,
            "automargin": True,
        },
    )
    if all(0 <= value <= 1 for value in values) and not log:
        figure.update_yaxes(range=[0, 1.03])
    if max(len(run) for runs in lines.values() for run in runs) <= 10:
        figure.update_xaxes(dtick=1)
    return _as_json(figure)


def plotly_text(text: str) -> str:
    """Text that Plotly shows as it is: a name's brackets are no tags."""
    return html.escape(text, quote=False)


def shortened(values: Sequence[int], most: int) -> list[int]:
    """At most so many of them, spread evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[math.floor(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _as_json(figure: go.Figure) -> Json:
    """Without the template's colours, in whose place come those of the page."""
    figure.update_layout(template="none")
    content: Json = json.loads(figure.to_json())
    del content["layout"]["template"]
    return content


def _unique(names: Sequence[str]) -> list[str]:
    """Names of an axis, on which one that comes twice would be one place."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
