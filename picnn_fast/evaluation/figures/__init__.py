"""FIGURES: every figure of evaluation by its name, a file a topic."""

from collections.abc import Iterable
from typing import Any

from picnn_fast.evaluation.figures import (
    attacks,
    calibration,
    classes,
    explainer,
    filters,
    information,
    localisation,
    parts,
    removal,
    speed,
)
from picnn_fast.evaluation.figures.record import Figure

__all__ = ["FIGURES", "Figure", "default_figures", "sharing"]

# In the order of the tables.
_TOPICS = (
    classes,
    information,
    calibration,
    filters,
    removal,
    parts,
    localisation,
    explainer,
    speed,
    attacks,
)
FIGURES: dict[str, Figure] = {
    name: figure for topic in _TOPICS for name, figure in topic.FIGURES.items()
}


def default_figures() -> list[str]:
    """The figures of every evaluation: all but those to be asked for."""
    return [name for name, figure in FIGURES.items() if figure.when != "asked"]


def sharing(names: Iterable[str]) -> dict[str, list[str]]:
    """Figures by the first of those that share one metric.

    Example:
        >>> from picnn_fast.evaluation.figures import sharing
        >>> sharing(["acc1", "mis"])
        {'acc1': ['acc1'], 'mis': ['mis']}
    """
    groups: dict[Any, list[str]] = {}
    for name in names:
        figure = FIGURES[name]
        key = (figure.metric, figure.update, figure.prepare, figure.images)
        groups.setdefault(key, []).append(name)
    return {group[0]: group for group in groups.values()}
