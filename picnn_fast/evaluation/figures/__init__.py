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

__all__ = ["FIGURES", "TOPICS", "Figure", "default_figures", "full_headings", "sharing"]

#: Figures by the title of what they are about, in the order of the tables.
TOPICS: dict[str, dict[str, Figure]] = {
    "classes": classes.FIGURES,
    "information": information.FIGURES,
    "calibration": calibration.FIGURES,
    "filters": filters.FIGURES,
    "filters removed": removal.FIGURES,
    "parts": parts.FIGURES,
    "localisation": localisation.FIGURES,
    "explainer": explainer.FIGURES,
    "speed": speed.FIGURES,
    "attacks": attacks.FIGURES,
}
#: All of them by name.
FIGURES: dict[str, Figure] = {
    name: figure for figures in TOPICS.values() for name, figure in figures.items()
}


def default_figures() -> list[str]:
    """The figures of every evaluation: all but those to be asked for."""
    return [name for name, figure in FIGURES.items() if figure.when != "asked"]


def full_headings() -> dict[str, str]:
    """Headings that stand by themselves: where one goes on with that before it, "…" is that one.

    Example:
        >>> from picnn_fast.evaluation.figures import full_headings
        >>> full_headings()["pseudo_label_leakage"]
        'leakage pseudo'
    """
    headings, whole = {}, ""
    for name, figure in FIGURES.items():
        headings[name] = figure.heading.replace("…", whole, 1)
        if headings[name] == figure.heading:
            whole = figure.heading
    return headings


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
