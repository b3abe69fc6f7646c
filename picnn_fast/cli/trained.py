"""Trained networks that a command is given the folders of, each with its data."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Trained(NamedTuple):
    name: str
    checkpoint: Path
    network: Any
    options: Any
    data: Any
    seed: int  # of the training
    class_names: list[str]
    preprocessing: Any  # of images, None where the checkpoint tells none

    @property
    def plain(self) -> bool:
        """Whether it is the ordinary network, which others are compared with."""
        return bool(self.options.method["name"] == "std")


def add_path(parser: Any, nargs: str | None = None) -> None:
    parser.add_argument(
        "path",
        metavar="RUN_OR_CHECKPOINT",
        nargs=nargs,
        help="folder of a run, a demo or a comparison, or a .ckpt",
    )


def add_accelerator(parser: Any, what: str) -> None:
    parser.add_argument(
        "--accelerator",
        type=Literal["auto", "cpu", "gpu", "mps"],
        default="auto",
        help=what,
    )


def of_trained(
    arguments: Sequence[str], *, without: bool = False, **described: Any
) -> tuple[dict[str, Any], Iterator[Trained]]:
    """The arguments of a command on trained networks, and these, each with its data.

    The data is that of the training, but for what the arguments say of it. ``without`` does without
    it, so that it need not be there, where they say nothing and the checkpoint tells how images are
    preprocessed.
    """
    from picnn_fast.training.options import parse

    described["common"] = False
    if any(token in ("-h", "--help") for token in arguments):
        parse(arguments, groups=("data",), **described)
    # What can be said of the data hangs on the checkpoint, which has to be found first.
    rest, of_data = without_data(arguments)
    args = parse(rest, groups=("data",), **described)
    del args["data"]
    return args, _with_data(args, arguments if of_data else None, described, without)


def _with_data(
    args: dict[str, Any],
    of_data: Sequence[str] | None,
    described: Mapping[str, Any],
    without: bool,
) -> Iterator[Trained]:
    import dataclasses

    from picnn_fast.training.checkpoint import load_checkpoint, read_preprocessing
    from picnn_fast.training.options import ConfigError, few, parse
    from picnn_fast.training.run import build_data

    paths = args["path"] if isinstance(args["path"], list) else [args["path"]]
    for name, checkpoint in _named(paths).items():
        network, options, class_names = load_checkpoint(checkpoint)
        seed, preprocessing = options.seed, read_preprocessing(checkpoint)
        if without and of_data is None and preprocessing is not None:
            name = options.method["name"] if name == "." else name
            yield Trained(
                name, checkpoint, network, options, None, seed, class_names, preprocessing
            )
            continue
        if of_data is not None:
            # What is not given is as in the training.
            defaults = {"data": options.data}
            args = parse(of_data, groups=("data",), defaults=defaults, **described)
        overrides = {
            key: args[key] for key in ("data", "batch_size", "seed") if args.get(key) is not None
        }
        options = dataclasses.replace(options, **overrides)
        try:
            data = build_data(dataclasses.replace(options, category=None))
        except ConfigError as error:
            if of_data is not None:
                raise
            raise ConfigError(
                f"{error}; --data.root, or another option of --data, says where else"
            ) from error
        if options.category is not None and options.category in data.class_names:
            data.single_out(options.category)
        if list(data.class_names) != class_names:
            raise ConfigError(
                f"data: {options.data['name']} has other classes ({few(data.class_names)}) than"
                f" {checkpoint} was trained on ({few(class_names)})"
            )
        name = options.method["name"] if name == "." else name
        yield Trained(
            name, checkpoint, network, options, data, seed, class_names, data.preprocessing
        )


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """The checkpoints of runs by name: of one path within it, of several from where they part."""
    from picnn_fast.training.checkpoint import find_checkpoints

    found = {p.resolve(): p for path in paths for p in find_checkpoints(path)}
    if len(paths) == 1:
        path = Path(paths[0])
        return {
            str(p.parent.relative_to(path)) if path.is_dir() else ".": p for p in found.values()
        }
    folders = [checkpoint.parent for checkpoint in found]
    if len(set(folders)) < len(folders):  # files of one folder
        folders = [checkpoint.with_suffix("") for checkpoint in found]
    top = os.path.commonpath(folders) if len(folders) > 1 else str(folders[0].parent)
    return {
        os.path.relpath(folder, top): p for folder, p in zip(folders, found.values(), strict=True)
    }


def without_data(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments but ``--data`` and its options, and whether there were any."""
    rest: list[str] = []
    walk = iter(arguments)
    for token in walk:
        if token.partition("=")[0] == "--data" or token.startswith("--data."):
            if "=" not in token:
                next(walk, None)
        else:
            rest.append(token)
    return rest, len(rest) < len(arguments)
