"""Tables of figures on a terminal."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from picnn_fast._extras import extra
from picnn_fast._terminal import printable

if TYPE_CHECKING:
    from picnn_fast.evaluation import Value


def print_table(
    rows: Mapping[str, Sequence[Mapping[str, "Value"]]], title: str, *, notes: bool = True
) -> None:
    """Figures one below the other by topic, beside them the run, or several whose mean is shown.

    Args:
        rows: name to the figures of its runs.
        title: over the table.
        notes: say below what the marks are and what is missing, and how figures are read, or, of
            more than a few, where that is said; else the values are differences.
    """
    from picnn_fast.evaluation import FIGURES, TOPICS, full_headings

    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    # Names are taken as they are: one may hold what rich would take for a style or an emoji.
    console = Console(soft_wrap=True, markup=False, emoji=False)
    missing: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    topics = {key: topic for topic, figures in TOPICS.items() for key in figures}
    headings = full_headings()
    shown: list[str] = []
    cells: list[tuple[str, dict[str, tuple[str, str]]]] = []
    for key, figure in FIGURES.items():
        values = [run[key] for runs in rows.values() for run in runs if key in run]
        if not values:  # not asked for
            continue
        reasons = tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
        none = all(isinstance(value, str) for value in values)
        if reasons:
            missing.setdefault((none, reasons), []).append(headings[key])
        if none:
            continue
        row = {name: _cell(runs, key, sign=not notes) for name, runs in rows.items()}
        cells.append((f"{figure.heading} {ARROWS[figure.better]}", row))
        shown.append(key)
    for names, between in _columns(cells, console.width):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for name in names:
            table.add_column(printable(name), justify="right", overflow="fold")
        topic = None
        for key, (heading, row) in zip(shown, cells, strict=True):
            if topic is not None and topics.get(key) != topic:
                table.add_section()
            topic = topics.get(key)
            table.add_row(heading, *(between.join(filter(None, row[name])) for name in names))
        console.print(table)
    if not notes:
        return
    every = [cell for _, row in cells for cell in row.values()]
    legend = ["↑: higher is better, ↓: lower"] * bool(every)
    if any(interval for _, interval in every):
        legend.append("[ ]: 95 % of resamples of the test images")
    if any("±" in text for text, _ in every):
        several = any(len(runs) > 1 for runs in rows.values())
        legend.append(f"±: standard {'deviation over seeds' if several else 'error over masks'}")
    said = ["; ".join(legend)] * bool(legend)
    for (none, reasons), without in missing.items():
        reason = "; ".join(reason.removeprefix("n/a: ") for reason in reasons)
        said.append(f"not {'here' if none else 'of all'}: {', '.join(without)} (n/a: {reason})")
    if len(shown) <= _FIGURES_EXPLAINED:
        said += [f"{FIGURES[key].heading}: {explained_figure(key)}" for key in shown]
    else:
        said.append("picnn-fast figures   what each of them says, and how it is read")
    for note in said:
        print_note(note, console.width)


ARROWS = {"higher": "↑", "lower": "↓"}
# So many at most are explained below their table.
_FIGURES_EXPLAINED = 4


def explained_figure(name: str) -> str:
    from picnn_fast.evaluation import FIGURES

    return f"{FIGURES[name].said}. {FIGURES[name].reading}"


def print_note(note: str, width: int, first: str = "  ", then: str = "    ") -> None:
    print(textwrap.fill(note, width, initial_indent=first, subsequent_indent=then))


def _cell(runs: Sequence[Mapping[str, "Value"]], key: str, *, sign: bool) -> tuple[str, str]:
    """A figure for a table, and its interval; of a difference with its sign."""
    from picnn_fast.evaluation import format_figures, format_interval

    text = format_figures(runs, key)
    if sign and not text.startswith(("-", "n/a")):
        text = f"+{text}"
    return text, format_interval(runs[0], key, sign=sign) if len(runs) == 1 else ""


def _columns(
    cells: Sequence[tuple[str, Mapping[str, tuple[str, str]]]], width: int
) -> Iterator[tuple[list[str], str]]:
    """Which columns go into one table, so that none is cut, and what joins figure and interval.

    An interval stands beside its figure where all columns then fit into the width, else below it.
    """
    of_column: dict[str, list[tuple[str, str]]] = {}
    for _, row in cells:
        for name, cell in row.items():
            of_column.setdefault(name, []).append(cell)
    edge = 3  # a line between columns, and a space on each side of it
    left = width - max((len(heading) for heading, _ in cells), default=0) - edge - 1

    def widths(between: str) -> dict[str, int]:
        return {
            name: edge
            + max(
                min(len(printable(name)), 12),
                *(max(map(len, between.join(filter(None, cell)).split("\n"))) for cell in column),
            )
            for name, column in of_column.items()
        }

    between = " " if sum(widths(" ").values()) <= left else "\n"
    names: list[str] = []
    taken = 0
    for name, wide in widths(between).items():
        if names and taken + wide > left:
            yield names, between
            names, taken = [], 0
        names.append(name)
        taken += wide
    if names:
        yield names, between
