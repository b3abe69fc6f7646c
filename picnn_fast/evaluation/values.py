"""Values of figures: as they are computed, written down, read back and printed."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from picnn_fast.evaluation.figures import FIGURES, default_figures

# Figure to its value; ``<figure>_standard_error`` to that of one that rests on draws;
# ``<figure>_interval`` to the two ends of its interval; a text "n/a: …" says why there is none.
Value = float | str | list[float]
Figures = dict[str, Value]

NOT_AVAILABLE = "n/a: "
STANDARD_ERROR = "_standard_error"
INTERVAL = "_interval"


def as_numbers(name: str, value: Tensor | Iterable[Tensor]) -> Figures:
    """What a metric computed, by name: the value, its standard error, or why there is none."""
    mean, *spread = [value] if isinstance(value, Tensor) else value
    if mean.isnan():
        return {name: f"{NOT_AVAILABLE}too few images of it to tell"}
    values: Figures = {name: mean.item()}
    if spread and not spread[0].isnan():
        values[name + STANDARD_ERROR] = spread[0].item()
    return values


def read_figures(values: object) -> Figures:
    """Figures that were written down; one that is new since then is "n/a", if every run has it.

    Raises:
        ValueError: values that are not those ``evaluate`` returns.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"got {type(values).__name__}, want a mapping of figures")
    if FIGURES.keys().isdisjoint(values):
        raise ValueError(f"got no figure, want a mapping of {', '.join(FIGURES)}")
    for name in FIGURES.keys() & values.keys():
        value = values[name]
        if not _number(value) and not (isinstance(value, str) and value.startswith(NOT_AVAILABLE)):
            raise ValueError(f"{name} is {value!r}, want a number, or text {NOT_AVAILABLE!r}…")
        ends = values.get(name + INTERVAL)
        if ends is not None and not (
            isinstance(ends, list) and len(ends) == 2 and all(map(_number, ends))
        ):
            raise ValueError(f"{name + INTERVAL} is {ends!r}, want two numbers")
    return {**dict.fromkeys(default_figures(), f"{NOT_AVAILABLE}not measured then"), **values}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_figure(values: Mapping[str, Value], name: str) -> str:
    """One figure for a table: three decimals, its standard error, or "n/a"."""
    value = values.get(name, NOT_AVAILABLE)
    if not isinstance(value, int | float):
        return NOT_AVAILABLE.rstrip(": ")
    error = values.get(name + STANDARD_ERROR)
    return f"{value:z.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")


def format_interval(values: Mapping[str, Value], name: str, *, sign: bool = False) -> str:
    """The interval of one figure for a table, in brackets; empty where it has none.

    Args:
        values: of the figures.
        name: of one.
        sign: write that of positive numbers, too.

    Example:
        >>> from picnn_fast.evaluation import format_interval
        >>> format_interval({"acc1": 0.5, "acc1_interval": [0.4, 0.6]}, "acc1")
        '[0.400, 0.600]'
    """
    ends = values.get(name + INTERVAL)
    if not isinstance(ends, list):
        return ""
    form = "+.3f" if sign else "z.3f"
    return "[" + ", ".join(format(end, form) for end in ends) + "]"


def format_figures(runs: Sequence[Mapping[str, Value]], name: str) -> str:
    """One figure of several runs for a table: their mean ± the standard deviation, or "n/a".

    Of a single run as ``format_figure``.
    """
    if len(runs) == 1:
        return format_figure(runs[0], name)
    values = [run.get(name, NOT_AVAILABLE) for run in runs]
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(runs):
        return NOT_AVAILABLE.rstrip(": ")
    return f"{statistics.fmean(numbers):z.3f} ± {statistics.stdev(numbers):.3f}"


def as_csv(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> str:
    """Figures of several runs as CSV, in the order of the tables.

    An interval takes two columns, ``<figure>_low`` and ``<figure>_high``, behind its figure and
    the standard error.

    Args:
        rows: the figures of each run, with what else is to be told of it.
        first: keys of what else there is, the first columns.
    """
    columns, flat = list(first), [_flat(row) for row in rows]
    had = {key for row in flat for key in row}
    for name in FIGURES:
        columns += [name + end for end in _ENDS if name + end in had]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


_LOW, _HIGH = "_low", "_high"
_ENDS = ("", STANDARD_ERROR, _LOW, _HIGH)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith(INTERVAL) and isinstance(value, list):
            name = key.removesuffix(INTERVAL)
            flat[name + _LOW], flat[name + _HIGH] = value
        else:
            flat[key] = value
    return flat
