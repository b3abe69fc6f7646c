"""``picnn-fast demo``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picnn_fast._terminal import printable
from picnn_fast.cli.output import add_overwrite, say_complete, telling_how_to_go_on
from picnn_fast.cli.tables import print_table


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.evaluation import FIGURES
    from picnn_fast.training.demo import EPOCHS, SPREAD, demo_folder, run_demo
    from picnn_fast.training.options import parse
    from picnn_fast.training.summary import REPORT

    def add(parser: Any) -> None:
        parser.add_argument("--output", type=str, default="runs/demo", help="folder of the results")
        parser.add_argument("--seed", type=int, default=0, help="of everything random")
        parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each network")
        add_overwrite(parser)

    args = parse(
        arguments,
        prog="picnn-fast demo",
        description="Train an ordinary network (STD) and a PICNN on scikit-learn's handwritten"
        " digits, and show accuracy through all filters (ACC1), through those drawn for a"
        " pseudo-label, itself drawn from the softmax (ACC2), without those of the true class"
        " (ACC3), and the mutual information score (MIS). An interrupted demo goes on"
        " when started again.",
        groups=(),
        common=False,
        add=add,
    )
    output, same = args["output"], {"seed": args["seed"], "epochs": args["epochs"]}
    folder = demo_folder(output, **same)
    complete = not args["overwrite"] and folder.complete()
    with telling_how_to_go_on(folder):
        figures = run_demo(output, overwrite=args["overwrite"], **same)
    rows = {name: [values] for name, values in figures.items()}
    print_table(rows, "Test split, 360 handwritten digits")
    if args["epochs"] == EPOCHS:
        spread = ", ".join(f"{FIGURES[key].heading} {value}" for key, value in SPREAD.items())
        print(
            f"  Another seed or machine ends thereabouts; three seeds lay this far apart: {spread}"
        )
    for name, meaning in (
        ("correspondence.png", "which filters belong to which class"),
        ("curves.png", "losses and accuracies over training"),
        ("gradcam.png", "what all, class, complementary and random filters see"),
        ("metrics.json", "the figures above"),
        (REPORT, "all of it on one page: open it in a browser"),
    ):
        print(printable(f"  {Path(output) / name}: {meaning}"))
    if complete:
        say_complete()
    return 0
