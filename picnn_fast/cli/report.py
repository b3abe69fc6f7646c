"""``picnn-fast report``."""

import sys
from collections.abc import Sequence
from typing import Any

from picnn_fast._terminal import printable
from picnn_fast.cli.trained import add_accelerator


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.launch import device_of
    from picnn_fast.training.options import check_range, parse
    from picnn_fast.training.summary import FILTERS, IMAGES, REPORT, write_report

    def add(parser: Any) -> None:
        parser.add_argument(
            "paths",
            metavar="RUN_OR_CHECKPOINT",
            nargs="+",
            help="folders of runs, demos or comparisons, or .ckpt files",
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help=f"file to write; null: {REPORT} in the first of these folders",
        )
        parser.add_argument(
            "--images", type=int, default=IMAGES, help="test images that Grad-CAM shows"
        )
        parser.add_argument(
            "--filters",
            type=int,
            default=FILTERS,
            help="filters of each network whose images are shown; 0: none, and no pass over the"
            " test images to find them",
        )
        add_accelerator(parser, "device type that this pass runs on")

    args = parse(
        arguments,
        prog="picnn-fast report",
        description="Write one HTML file about some runs, which holds all it needs: their figures,"
        " which filter stands for which class, curves of the training, what filters see, and what"
        " it was made with.",
        groups=(),
        common=False,
        add=add,
    )
    check_range("images", args["images"], 1)
    check_range("filters", args["filters"], 0)
    path = write_report(
        args["paths"],
        args["output"],
        images=args["images"],
        filters=args["filters"],
        device=device_of(args["accelerator"]),
        progress=sys.stdout.isatty(),
    )
    print(printable(f"  {path}: open it in a browser"))
    return 0
