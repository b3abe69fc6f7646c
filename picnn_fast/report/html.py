"""One self-contained HTML file about some runs: what ``picnn-fast report`` writes.

The page is a record, ``Report``, of plain data. Where something cannot be had, the record holds
the reason in its place, a text, and the page says so.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.report.galleries import Gallery, data_uri, heat_scale
from picnn_fast.report.interactive import confusion_chart, curves_chart, matrix_chart, shortened

with extra("report"):
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

# Of all matrices together, before they are written as text, which takes a third more.
_MATRIX_BYTES = 1_800_000
# Pictures get smaller until the page is no larger than that.
_MOST_BYTES = 9_500_000
_SIDES = (160, 112, 80, 56)
_MOST_EPOCHS_IN_A_TABLE = 30
_History = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one row of the summary.

    Attributes:
        text: the value, or "n/a".
        detail: its interval or spread, or why there is none.
        best: whether it is the best of its figure, by more than its interval.
    """

    text: str
    detail: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureRow:
    """One figure of evaluation, of every network in turn.

    Attributes:
        heading, meaning, better: as of the figure.
        reading: a sentence: how to take a value.
        cells: one a network.
    """

    heading: str
    meaning: str
    better: str
    reading: str
    cells: Sequence[Cell]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """Confusion matrices with all filters, and without those of one class.

    Attributes:
        complete: ``[K, K]`` images by their class, a row each, and by the class they are given.
        without: class to the same without its filters.
        removed: class to the number of these.
        said: which filters count as a class's, in a sentence.
    """

    complete: Tensor
    without: Mapping[int, Tensor]
    removed: Mapping[int, int]
    said: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """One trained network, ingredient by ingredient; a text says why there is none.

    Attributes:
        name: as in the summary.
        class_names: K names.
        ownership: ``[K, N]`` in [0, 1], which filter stands for which class.
        ownership_meaning: what that matrix is.
        grad_cam: what all filters, those of the class, the others and a control see.
        confusion: what is taken for what, without a class's filters too.
        filters: images that single filters fire on most, and those they add most to.
        peaks: where the filters' peaks fall on images.
        localisation: what is seen of the class beside where the object is.
    """

    name: str
    class_names: Sequence[str]
    ownership: Tensor | str
    ownership_meaning: str
    grad_cam: Gallery | str
    confusion: Confusion | str
    filters: Gallery | str
    peaks: Gallery | str
    localisation: Gallery | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page says.

    Attributes:
        title: of the page.
        summary: sentences in plain words: what was trained, on what, what was measured.
        names: of the networks, the columns of the summary; several seeds of one are one.
        figures: the rows of the summary.
        missing: why no network has some figures to their headings.
        histories: name to the values of each epoch of each of its seeds, see ``plot_curves``.
        headings: key of a figure in the histories to its name.
        networks: one a name, that of its first seed.
        provenance: name of a run to what it was made with.
    """

    title: str
    summary: Sequence[str]
    names: Sequence[str]
    figures: Sequence[FigureRow]
    missing: Mapping[str, Sequence[str]]
    histories: Mapping[str, Sequence[_History]]
    headings: Mapping[str, str]
    networks: Sequence[Network]
    provenance: Mapping[str, Mapping[str, str]]


def render(report: Report) -> str:
    """The page: one HTML file that fetches nothing.

    Args:
        report: what it says.

    Example:
        >>> from picnn_fast.report.html import Cell, FigureRow, Report, render
        >>> row = FigureRow(
        ...     heading="ACC1",
        ...     meaning="accuracy",
        ...     better="higher",
        ...     reading="Chance is a tenth.",
        ...     cells=[Cell(text="0.994")],
        ... )
        >>> page = render(
        ...     Report(
        ...         title="Digits",
        ...         summary=["One network."],
        ...         names=["PICNN"],
        ...         figures=[row],
        ...         missing={},
        ...         histories={},
        ...         headings={},
        ...         networks=[],
        ...         provenance={},
        ...     )
        ... )
        >>> page.startswith("<!doctype html>"), "0.994" in page
        (True, True)
    """
    template = _environment().get_template("report.html.jinja")
    content = {
        "report": report,
        "curves": _figure_curves(report),
        "losses": _loss_curves(report),
        "matrices": _matrices(report),
        "confusions": _confusions(report),
        "plotly": Markup(get_plotlyjs()),
        "heat_scale": heat_scale(),
    }
    for side in _SIDES:
        page = template.render(content, side=side).lstrip()
        if len(page.encode()) < _MOST_BYTES:
            break
    return page


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("picnn_fast.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["picture"] = data_uri
    environment.filters["counted"] = counted
    environment.tests["said"] = lambda value: isinstance(value, str)
    return environment


def _matrices(report: Report) -> dict[str, Any]:
    shown = {n.name: n for n in report.networks if isinstance(n.ownership, Tensor)}
    return {
        name: matrix_chart(network.ownership, network.class_names, _MATRIX_BYTES // len(shown))
        for name, network in shown.items()
        if isinstance(network.ownership, Tensor)
    }


def _confusions(report: Report) -> dict[str, Any]:
    return {
        network.name: confusion_chart(
            network.confusion.complete,
            network.confusion.without,
            network.confusion.removed,
            network.class_names,
        )
        for network in report.networks
        if isinstance(network.confusion, Confusion)
    }


def _figure_curves(report: Report) -> list[dict[str, Any]]:
    """A chart for each figure that is taken of the validation images every epoch."""
    epochs = [row for runs in report.histories.values() for run in runs for row in run]
    logged = {key for row in epochs for key in row}
    keys = [key for key in report.headings if key in logged]
    keys += sorted(key for key in logged if key.startswith("val/") and key not in report.headings)
    charts = []
    for key in keys:
        title = report.headings.get(key, key.partition("/")[2])
        charts.append((title, _lines(report.histories, key), False))
    charts.append(("training loss", _lines(report.histories, "train/loss"), True))
    return [_curves(title, lines, logarithmic=log) for title, lines, log in charts if lines]


def _loss_curves(report: Report) -> dict[str, dict[str, Any]]:
    """The terms of each network's loss, of its first seed."""
    charts = {}
    for name, runs in report.histories.items():
        terms = sorted(
            {key for row in runs[0] for key in row if key.startswith("train/")} - {"train/loss"}
        )
        lines = {
            term.removeprefix("train/").replace("_", " "): values
            for term in terms
            for values in _lines({"": runs[:1]}, term).values()
        }
        if lines:
            charts[name] = _curves("weighted term", lines, logarithmic=True)
    return charts


def _lines(
    histories: Mapping[str, Sequence[_History]], key: str
) -> dict[str, list[dict[int, float]]]:
    """Name to the values of each seed by epoch, from 1."""
    lines = {
        name: [
            {
                int(row["epoch"]) + 1: row[key]
                for row in run
                if key in row and math.isfinite(row[key])
            }
            for run in runs
        ]
        for name, runs in histories.items()
    }
    return {name: runs for name, runs in lines.items() if any(runs)}


def _curves(
    title: str, lines: Mapping[str, Sequence[Mapping[int, float]]], *, logarithmic: bool = False
) -> dict[str, Any]:
    """A chart, and the same as a table: the mean over seeds of some epochs."""
    epochs = sorted({epoch for runs in lines.values() for run in runs for epoch in run})
    rows = []
    for epoch in shortened(epochs, _MOST_EPOCHS_IN_A_TABLE):
        cells = []
        for runs in lines.values():
            values = [run[epoch] for run in runs if epoch in run]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "")
        rows.append((epoch, cells))
    return {
        "title": title,
        "names": list(lines),
        "rows": rows,
        "seeds": max(len(runs) for runs in lines.values()),
        "chart": curves_chart(lines, title, logarithmic=logarithmic),
    }
