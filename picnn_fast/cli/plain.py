"""A plain classifier that a command is given the name of, with its data."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from picnn_fast.cli.trained import Trained, without_data


def add_model(parser: Any) -> None:
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="in place of a run: a plain classifier, trained anywhere. timm:NAME; a network of"
        " torchvision's, as resnet50; or module:function, which makes one. Images are made as the"
        " two libraries say, unless options of --data say otherwise",
    )
    parser.add_argument(
        "--layer",
        type=str | None,
        default=None,
        help="of --model: the module whose maps are measured; null: its last convolutional maps",
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="of --model; null: the library's trained ones, or the function's own. Or other ones by"
        " the library's name for them; a state dict (.pth, .pt, .safetensors); random",
    )


def check_no_model(args: Mapping[str, Any]) -> None:
    from picnn_fast.training.options import ConfigError

    for name in ("layer", "weights"):
        if args[name] is not None:
            raise ConfigError(f"{name}: got {args[name]!r} with a run, want it with --model alone")


def of_model(
    arguments: Sequence[str], **described: Any
) -> tuple[dict[str, Any], Iterator[Trained]]:
    """The arguments of a command on a plain classifier, and this, with its data."""
    from picnn_fast.training.options import GROUPS, ConfigError, Options, parse
    from picnn_fast.training.plain import data_defaults, plain_network
    from picnn_fast.training.run import build_data, reading_images

    described |= {"common": False, "groups": ("data",)}
    rest, _ = without_data(arguments)
    args = parse(rest, **described)
    model, flags = args["model"], [token.partition("=")[0] for token in arguments]
    if args["path"]:
        raise ConfigError(f"model: got {model!r} beside {args['path'][0]}, want one of the two")
    if model is not None and not {"--data", "--data.name"} & {*flags}:
        raise ConfigError(
            "data: got nothing with --model, want --data NAME, the images to measure it on; one of"
            f" {', '.join(GROUPS['data'].rows)}"
        )
    if model is None:
        raise ConfigError("model: got null, want the name of a network, or module:function")

    def as_trained(names: Mapping[str, str]) -> dict[str, Any]:
        told = data_defaults(model, args["weights"], names["data"])
        sized = {"__data.image_size", "__data.test_crop"}
        if sized & {flag.replace("-", "_") for flag in flags}:
            told.pop("resize", None)  # it goes with the library's size
        return {"data": {"name": names["data"], **told}}

    args = parse(arguments, recipe=as_trained, **described)
    given = {name: args[name] for name in ("batch_size", "seed") if args[name] is not None}
    options = Options(method="std", data=args["data"], **given)
    data = build_data(options)
    with reading_images():
        network = plain_network(
            model, data, weights=args["weights"], layer=args["layer"], seed=options.seed
        )
    names = list(data.class_names)
    path, seed, way = Path(model), options.seed, data.preprocessing
    return args, iter([Trained(model, path, network, options, data, seed, names, way)])
