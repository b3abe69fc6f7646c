"""``picnn-fast convert``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picnn_fast._terminal import printable


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.checkpoint import convert
    from picnn_fast.training.options import parse

    def add(parser: Any) -> None:
        parser.add_argument("source", metavar="SOURCE", help="file that the authors' code wrote")
        parser.add_argument(
            "target", metavar="TARGET", help="checkpoint to write, a new .ckpt file"
        )
        parser.add_argument(
            "--root",
            type=Path,
            required=True,
            help="folder of the images it was trained on, train/<class>/… and test/<class>/…",
        )

    args = parse(
        arguments,
        prog="picnn-fast convert",
        description="Turn a checkpoint of the authors' PICNN (spdj2271/PICNN, on ResNet-18) into"
        " one of ours, with the same logits.",
        groups=(),
        common=False,
        add=add,
    )
    convert(args["source"], args["target"], args["root"])
    print(printable(f"  {args['target']}: picnn-fast evaluate measures it"))
    return 0
