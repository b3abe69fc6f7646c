"""``picnn-fast train``."""

import shlex
from collections.abc import Sequence

from picnn_fast._terminal import printable
from picnn_fast.cli.output import add_overwrite, say_complete, telling_how_to_go_on
from picnn_fast.cli.tables import print_table


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.training.launch import launch_of
    from picnn_fast.training.options import BY_IMAGE_SIZE, Options, parse
    from picnn_fast.training.run import train, train_folder

    args = parse(
        arguments,
        prog="picnn-fast train",
        description="Train and evaluate one network. Options come from --config, and flags"
        " override it. An interrupted run goes on when started again with the same options.",
        add=add_overwrite,
    )
    del args["config"]
    overwrite = args.pop("overwrite")
    options = Options(**args)
    folder = train_folder(options)
    complete = not overwrite and folder.complete()
    name = options.backbone["name"]
    by_size = args["backbone"]["name"] == BY_IMAGE_SIZE != name
    if by_size and not complete and launch_of(options).first:
        print(f"backbone: {name}, by the size of the images; --backbone NAME takes another")
    with telling_how_to_go_on(folder, lambda: launch_of(options).first):
        figures = train(options, overwrite=overwrite)
    if not figures:  # a process beside the first one
        return 0
    print_table({options.method["name"]: [figures]}, f"Test split of {options.data['name']}")
    logs = [f"{name}/" for name in ("csv", "tensorboard") if (folder.path / name).is_dir()]
    shown, output = ", ".join(["metrics.json", "last.ckpt", *logs]), shlex.quote(options.output)
    print(printable(f"  {options.output}: {shown}"))
    print(printable(f"  picnn-fast evaluate {output}   measures it again, or on other images"))
    if "tensorboard/" in logs:
        print(printable(f"  tensorboard --logdir {output}   draws its losses and figures"))
    if complete:
        say_complete()
    return 0
