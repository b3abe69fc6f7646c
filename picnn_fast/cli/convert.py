"""``picnn-fast convert``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picnn_fast._terminal import printable


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.checkpoint import convert
    from picnn_fast.training.options import parse

    def add(parser: Any) -> None:
        parser.add_argument(
            "source",
            metavar="SOURCE",
            help="run, or its checkpoint; folder that this wrote; or file of the authors' code",
        )
        parser.add_argument(
            "target",
            metavar="TARGET",
            help="a new folder: model.safetensors and config.json; or a new .ckpt file",
        )
        parser.add_argument(
            "--root",
            type=Path | None,
            default=None,
            help="of a file of the authors': folder of the images it was trained on,"
            " train/<class>/… and test/<class>/…",
        )

    args = parse(
        arguments,
        prog="picnn-fast convert",
        description="Turn a run into a folder that InterpretableNetwork.from_pretrained loads, such"
        " a folder into a checkpoint, or a checkpoint of the authors' PICNN (spdj2271/PICNN, on"
        " ResNet-18) into either, with the same logits.",
        groups=(),
        common=False,
        add=add,
    )
    convert(args["source"], args["target"], args["root"])
    target = Path(args["target"])
    how = (
        "picnn-fast evaluate measures it"
        if target.is_file()
        else "picnn_fast.models.InterpretableNetwork.from_pretrained loads it"
    )
    print(printable(f"  {target}: {how}"))
    return 0
