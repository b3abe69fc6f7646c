"""``picnn-fast figures``."""

import argparse
import shutil
from collections.abc import Sequence

from picnn_fast.cli.tables import ARROWS, explained_figure, print_note


def run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="picnn-fast figures",
        description="List the figures that evaluate measures: their names, headings in tables,"
        " which way is better, what they say and how they are read.",
        allow_abbrev=False,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="some of them; none: all")
    chosen = figures_named(parser.parse_args(arguments).names or ["all"])
    from picnn_fast.evaluation import TOPICS, full_headings

    headings, width = full_headings(), shutil.get_terminal_size().columns
    for topic, figures in TOPICS.items():
        names = [name for name in figures if name in (chosen or ())]
        if names:
            print(topic)
        for name in names:
            figure = figures[name]
            asked = "   where it is named alone" if figure.when == "asked" else ""
            print(f"  {name}   {headings[name]} {ARROWS[figure.better]}{asked}")
            print_note(explained_figure(name), width, *["      "] * 2)
    return 0


def figures_named(names: Sequence[str] | None) -> list[str] | None:
    """Names of figures; None: those of every evaluation.

    Raises:
        ConfigError: a name that there is not.
    """
    from picnn_fast.checks import did_you_mean
    from picnn_fast.evaluation import FIGURES, full_headings
    from picnn_fast.training.options import ConfigError

    by_heading = {heading.lower(): name for name, heading in full_headings().items()}
    for name in names or ():
        if name not in FIGURES and name != "all":
            meant = by_heading.get(name.lower(), name)
            raise ConfigError(
                f"figures: got {name!r},{did_you_mean(meant, FIGURES)} want all, or names that"
                " picnn-fast figures lists, with spaces between them"
            )
    if names is None:
        return None
    return list(FIGURES) if "all" in names else list(names)
