"""``picnn-fast compare``."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from picnn_fast._terminal import printable
from picnn_fast.cli.output import add_overwrite, say_complete, telling_how_to_go_on
from picnn_fast.cli.tables import print_table


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.compare import (
        DEFAULT_METHODS,
        DEFAULT_SEEDS,
        RECIPES,
        VARIANTS,
        compare,
        compare_folder,
        methods_on,
    )
    from picnn_fast.training.options import GROUPS, Options, parse

    def add(parser: Any) -> None:
        parser.set_defaults({"output": "runs/compare"})
        parser.add_argument(
            "--methods",
            nargs="+",
            type=Literal[(*GROUPS["method"].rows, *VARIANTS)],
            default=list(DEFAULT_METHODS),
            help="rows of the table",
        )
        parser.add_argument(
            "--seeds",
            nargs="+",
            type=int,
            default=list(DEFAULT_SEEDS),
            help="of everything random but the split: as many networks of each method",
        )
        add_overwrite(parser)

    def recipe(names: Mapping[str, str]) -> Mapping[str, Any]:
        return RECIPES[names["data"]].common if names["data"] in RECIPES else {}

    args = parse(
        arguments,
        prog="picnn-fast compare",
        description="Train several methods alike, several seeds of each, and show mean and standard"
        " deviation of their figures on the test split. Options are those of train; on digits the"
        " methods' own are what suits them there. An interrupted comparison goes on when started"
        " again, and more methods or seeds go on with a complete one.",
        groups=("backbone", "data", "optimizer"),
        without=("seed", "devices", "num_nodes", "timeout", "strategy"),
        recipe=recipe,
        add=add,
    )
    data = args["data"]["name"]
    del args["config"]
    overwrite, seeds = args.pop("overwrite"), args.pop("seeds")
    methods = methods_on(data, args.pop("methods"))
    options = Options(**args)
    folder = compare_folder(options, methods, seeds)
    complete = not overwrite and folder.complete()
    with telling_how_to_go_on(folder):
        say = functools.partial(print, flush=True)  # a log file tells at once, too
        figures = compare(options, methods, seeds, overwrite=overwrite, say=say)
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    print_table(figures, f"Test split of {data}, {count}")
    print(printable(f"  {options.output}: metrics.json, metrics.csv, a folder of each network"))
    if complete:
        say_complete()
    return 0
