"""One self-contained HTML file about some runs: what ``picnn-fast report`` writes.

The page is a record, ``Report``, of plain data. Where something cannot be had, the record holds
the reason in its place, a text, and the page says so.
"""

import base64
import dataclasses
import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from picnn_fast._extras import extra
from picnn_fast.explain import PathwayGradCam
from picnn_fast.report.interactive import curves_chart, matrix_chart, shortened
from picnn_fast.report.style import HEAT_COLOURS, displayed, overlaid

with extra("report"):
    import jinja2
    from markupsafe import Markup
    from matplotlib import colormaps
    from PIL import Image
    from plotly.offline import get_plotlyjs

# Of all matrices together, before they are written as text, which takes a third more.
_MATRIX_BYTES = 1_800_000
_MOST_EPOCHS_IN_A_TABLE = 30
_TILE = 160  # pixels of a picture's longer side, at most
_History = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one row of the summary.

    Attributes:
        text: the value, or "n/a".
        detail: its interval or spread, or why there is none.
        best: whether it is the best of its figure.
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
class Picture:
    """An image of a gallery.

    Attributes:
        pixels: ``[H, W]`` grey or ``[H, W, 3]``, in [0, 1].
        alt: what it shows, in words.
        caption: below it.
        box: left, top, right, bottom of a field to draw, as shares of the image's sides.
    """

    pixels: npt.NDArray[np.float32]
    alt: str
    caption: str = ""
    box: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """Pictures that belong together, with what is said of them."""

    heading: str
    pictures: Sequence[Picture]
    said: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of pictures.

    Attributes:
        rows: each with as many pictures as there are columns, where these have headings.
        columns: a heading each; none where pictures have captions.
        scale: what the colours of heat mean; empty where there is none.
    """

    rows: Sequence[GalleryRow]
    columns: Sequence[str] = ()
    scale: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """One trained network, ingredient by ingredient; a text says why there is none.

    Attributes:
        name: as in the summary.
        class_names: K names.
        ownership: ``[K, N]`` in [0, 1], which filter stands for which class.
        ownership_meaning: what that matrix is.
        grad_cam: what all filters, those of the class, the others and a control see.
    """

    name: str
    class_names: Sequence[str]
    ownership: Tensor | str
    ownership_meaning: str
    grad_cam: Gallery | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that the page says.

    Attributes:
        title: of the page.
        summary: sentences in plain words: what was trained, on what, what was measured.
        names: of the networks, the columns of the summary; several seeds of one are one.
        figures: the rows of the summary.
        missing: heading of a figure that no network has to the reason.
        histories: name to the values of each epoch of each of its seeds, see ``plot_curves``.
        headings: key of a figure in the histories to its name.
        networks: one a name, that of its first seed.
        provenance: name of a run to what it was made with.
    """

    title: str
    summary: Sequence[str]
    names: Sequence[str]
    figures: Sequence[FigureRow]
    missing: Mapping[str, str]
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
    page = template.render(
        report=report,
        curves=_figure_curves(report),
        losses=_loss_curves(report),
        matrices=_matrices(report),
        plotly=Markup(get_plotlyjs()),
        heat_scale=_heat_scale(),
    )
    return page.lstrip()


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
    environment.tests["said"] = lambda value: isinstance(value, str)
    return environment


def _matrices(report: Report) -> dict[str, Any]:
    shown = {n.name: n for n in report.networks if isinstance(n.ownership, Tensor)}
    return {
        name: matrix_chart(network.ownership, network.class_names, _MATRIX_BYTES // len(shown))
        for name, network in shown.items()
        if isinstance(network.ownership, Tensor)
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


def grad_cam_gallery(
    images: Tensor, cam: PathwayGradCam, labels: Sequence[str], predicted: Sequence[str]
) -> Gallery:
    """Image, all filters, class filters, the others and the control, a row each image.

    The colours of one image share one scale, from 0 to the highest value of its four maps.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        cam: of these images.
        labels, predicted: B names of classes.

    Raises:
        TypeError, ValueError: see ``displayed``.
    """
    rows = []
    names = ("all filters", "the class's filters", "all the others", "as many at random")
    for i, image in enumerate(displayed(images)):
        heats = [maps[i].detach().cpu().float() for maps in cam]
        peak = max(float(heat.max()) for heat in heats)
        pictures = [Picture(pixels=_enlarged(image), alt=f"Test image of class {labels[i]}")]
        for name, heat in zip(names, heats, strict=True):
            share = float(heat.max()) / peak if peak > 0 else 0.0
            pictures.append(
                Picture(
                    pixels=_on_image(image, heat / (peak or 1.0)),
                    alt=f"Grad-CAM of class {labels[i]} through {name}: at most {share:.0%} of the"
                    " row's highest value",
                )
            )
        right = predicted[i] == labels[i]
        said = "" if right else f"taken for {predicted[i]}"
        rows.append(GalleryRow(heading=labels[i], pictures=pictures, said=said))
    return Gallery(
        rows=rows,
        columns=("image", *names),
        scale="Grad-CAM, share of the row's highest value",
    )


def _enlarged(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Small images are shown with the pixels they have, larger."""
    times = max(1, _TILE // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def _on_image(image: npt.NDArray[np.float32], heat: Tensor) -> npt.NDArray[np.float32]:
    large = _enlarged(image)
    smooth = F.interpolate(
        heat[None, None], size=large.shape[:2], mode="bilinear", align_corners=False
    )
    return overlaid(large, smooth[0, 0].numpy())


def data_uri(picture: Picture) -> str:
    """A picture as the source of an ``<img>``: a JPEG in text."""
    values = np.rint(255 * np.clip(picture.pixels, 0, 1)).astype(np.uint8)
    image = Image.fromarray(values)
    image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return _jpeg(image)


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _heat_scale() -> str:
    """The colours of heat from 0 to 1, as a picture."""
    colours = colormaps[HEAT_COLOURS](np.linspace(0, 1, 256))[None, :, :3].repeat(12, 0)
    return _jpeg(Image.fromarray(np.rint(255 * colours).astype(np.uint8)))
