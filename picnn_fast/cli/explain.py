"""``picnn-fast explain``: pictures of images, and pages of filters."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from picnn_fast._extras import extra
from picnn_fast._terminal import counted, printable
from picnn_fast.cli.output import check_writable
from picnn_fast.cli.trained import Trained, add_accelerator, add_path, of_trained


def run(arguments: Sequence[str]) -> int:
    from picnn_fast.data.splits import read_image
    from picnn_fast.explain import explain_image
    from picnn_fast.report import plot_explanation
    from picnn_fast.training.options import ConfigError, check_range
    from picnn_fast.training.run import reading_images, try_image

    of_filters = any(token.partition("=")[0] == "--filter" for token in arguments)

    def add(parser: Any) -> None:
        add_path(parser)
        parser.add_argument(
            "images",
            metavar="IMAGE",
            type=Path,
            nargs="*" if of_filters else "+",
            help="image files; none with --filter",
        )
        parser.add_argument(
            "--output", type=Path, default=Path("explanations"), help="folder of the pictures"
        )
        parser.add_argument(
            "--target", type=str | None, default=None, help="class to explain; null: the predicted"
        )
        parser.add_argument("--filters", type=int, default=6, help="filters to show of each image")
        parser.add_argument(
            "--filter",
            type=int,
            nargs="+",
            default=None,
            help="in place of images: draw a page of each of these filters, with the images it"
            " fires on most and those it adds most to, out of an index that is made once",
        )
        parser.add_argument(
            "--split",
            type=Literal["test", "train"],
            default="test",
            help="images that the index of --filter is made of",
        )
        add_accelerator(parser, "device type on which the index of --filter is made")
        parser.add_argument("--json", action="store_true", help="print JSON in place of tables")

    args, trained = of_trained(
        arguments,
        prog="picnn-fast explain",
        description="Show which filters carried a prediction, by the class they stand for, with"
        " their share of its logit, and what the prediction is without them; a picture of each"
        " image. Images are resized and normalised as the test images of the training's data."
        " Or, with --filter, show what filters stand for.",
        add=add,
        without=not of_filters,
    )
    check_writable(args["output"])
    if of_filters:
        return _explain_filters(args, trained)
    check_range("filters", args["filters"], 1)
    told: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for one in trained:
        name, network, names = one.name, one.network, one.class_names
        if args["target"] is not None and args["target"] not in names:
            raise ConfigError(f"target: got {args['target']!r}, want one of {', '.join(names)}")
        target = None if args["target"] is None else names.index(args["target"])
        # All are read before the first picture is written.
        read = one.preprocessing.read if one.data is None else partial(read_image, one.data)
        images = {path: read(path) for path in args["images"]}
        tried = next(iter(images.values()))[0][None] if one.data is None else one.data
        with reading_images():
            try_image(network, tried, f"the network in {one.checkpoint}")
        for path, (taken, shown) in images.items():
            seen = explain_image(network.eval(), taken, target=target)
            args["output"].mkdir(parents=True, exist_ok=True)
            picture = args["output"] / _distinct(
                f"{path.stem}-{name.replace(os.sep, '-')}.png", written
            )
            plot_explanation(
                shown,
                seen,
                names,
                picture,
                filters=args["filters"],
                channel_dim=network.channel_dim,
            )
            told.setdefault(str(path), {})[name] = {
                **_explained(seen, names, args["filters"]),
                "picture": str(picture),
            }
    if args["json"]:
        print(json.dumps(told, indent=2))
    else:
        _print_explanations(told)
        first = next(iter(next(iter(told.values())).values()))
        numbers = " ".join(str(each["filter"]) for each in first["filters"][:_FILTERS_NAMED])
        run = shlex.quote(args["path"])
        print(printable(f"  picnn-fast explain {run} --filter {numbers}   shows what they fire on"))
    return 0


def _explain_filters(args: Mapping[str, Any], trained: Iterator[Trained]) -> int:
    """Pages of single filters, from the index beside each checkpoint."""
    from picnn_fast.data import Batches, shown_image
    from picnn_fast.report import plot_filter_page
    from picnn_fast.training.filter_index import kept_filter_index
    from picnn_fast.training.launch import device_of
    from picnn_fast.training.options import ConfigError
    from picnn_fast.training.run import reading_images, try_image

    if args["images"]:
        raise ConfigError(f"images: got {len(args['images'])} beside --filter, want none")
    if args["target"] is not None:
        raise ConfigError("target: got one beside --filter, want it with images")
    numbers = list(dict.fromkeys(args["filter"]))
    device = device_of(args["accelerator"])
    told: dict[str, dict[str, Any]] = {}
    for name, checkpoint, network, options, data, *_ in trained:
        for number in numbers:
            if not 0 <= number < network.num_filters:
                raise ConfigError(
                    f"filter: got {number}, want one of the {network.num_filters} of {checkpoint},"
                    f" from 0 to {network.num_filters - 1}"
                )
        split, names = args["split"], list(data.class_names)
        with reading_images():
            try_image(network, data, f"the network in {checkpoint}")
            index = kept_filter_index(
                checkpoint,
                network,
                options,
                data,
                split=split,
                device=device,
                progress=sys.stdout.isatty() and not args["json"],
            )
            shown = {i: shown_image(data, split, i) for i in index.images_of(numbers)}
        args["output"].mkdir(parents=True, exist_ok=True)
        part_names = Batches(data, split).part_names if index.by_activation.parts.shape[2] else []
        for number in numbers:
            picture = args["output"] / f"filter-{number}-{name.replace(os.sep, '-')}.png"
            plot_filter_page(index, number, shown, names, picture, part_names=part_names)
            told.setdefault(str(number), {})[name] = {
                **_told_of_filter(index, number, names, part_names),
                "split": split,
                "picture": str(picture),
            }
    if args["json"]:
        print(json.dumps(told, indent=2))
    else:
        _print_filters(told)
    return 0


def _told_of_filter(
    index: Any, number: int, names: Sequence[str], part_names: Sequence[str]
) -> dict[str, Any]:
    """What an index says of a filter, as JSON takes it."""
    owner, most = int(index.owner[number]), int(index.mutual_information[:, number].argmax())
    images = {}
    for key in ("by_activation", "by_contribution"):
        ranking = getattr(index, key)
        fields = (ranking.images, ranking.labels, ranking.predicted, ranking.values)
        columns = (column[number].tolist() for column in (*fields, ranking.boxes))
        images[key] = [
            {
                "image": image,
                "class": names[label],
                "predicted": names[predicted],
                "value": value,
                "box": box,
            }
            for image, label, predicted, value, box in zip(*columns, strict=True)
        ]
    on_parts = index.by_activation.parts[number].float().mean(0).tolist()
    columns = (column[number].tolist() for column in (index.neighbours, index.correlations))
    near = [{"filter": i, "correlation": value} for i, value in zip(*columns, strict=True)]
    return {
        "class": None if owner < 0 else names[owner],
        "ownership": float(index.owned[number]),
        "mutual_information": {
            "class": names[most],
            "nats": float(index.mutual_information[most, number]),
            "estimator": index.estimator,
        },
        "parts": dict(zip(part_names, on_parts, strict=True)),
        "neighbours": near,
        "exact": index.exact,
        "images": index.num_images,
        **images,
    }


_IMAGES_TOLD = 3


def _print_filters(told: Mapping[str, Mapping[str, Any]]) -> None:
    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    console = Console(soft_wrap=True, markup=False, emoji=False)
    names = list(dict.fromkeys(name for by_network in told.values() for name in by_network))
    for name in names:
        said = {number: by_network[name] for number, by_network in told.items()}
        first = next(iter(said.values()))
        table = Table(
            title=printable(
                f"{name}, {counted(first['images'], 'image')} of the {first['split']} split"
            ),
            title_justify="left",
            title_style="bold",
        )
        for heading in (
            "filter",
            "stands for",
            "tells most about",
            "fires most on",
            "adds most to",
        ):
            table.add_column(heading, overflow="fold")
        for number, one in said.items():
            owner, tells = one["class"], one["mutual_information"]
            kinds = [
                ", ".join(
                    f"{seen['class']} #{seen['image']}" for seen in one[ranking][:_IMAGES_TOLD]
                )
                for ranking in ("by_activation", "by_contribution")
            ]
            table.add_row(
                number,
                printable("no class" if owner is None else f"{owner} ({one['ownership']:.2f})"),
                printable(f"{tells['class']} ({tells['nats']:.3f} nats)"),
                *map(printable, kinds),
            )
        console.print(table)
        console.print("  #: the image's place in the split, from 0")
        for number, one in said.items():
            console.print(printable(f"  {one['picture']}: filter {number} on a page"))


def _distinct(name: str, taken: set[str]) -> str:
    """A file name of this command's own, numbered where another image or network took it.

    Upper and lower case are alike, as on some file systems.
    """
    stem, suffix = os.path.splitext(name)
    number = 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(name.lower())
    return name


def _explained(seen: Any, names: Sequence[str], filters: int) -> dict[str, Any]:
    """An explanation as JSON takes it: numbers of the logit, and names of classes."""
    probabilities = seen.logits.softmax(0)
    owners = {i: g.owner for g in seen.groups for i in g.filters.tolist()}

    def named(owner: int | None) -> str | None:
        return None if owner is None else names[owner]

    groups = []
    for group in seen.groups:
        without = group.logits_without.softmax(0)
        groups.append(
            {
                "class": named(group.owner),
                "filters": len(group.filters),
                "contribution": group.contribution,
                "without": {
                    "predicted": names[int(without.argmax())],
                    "probability": float(without.max()),
                },
            }
        )
    return {
        "predicted": names[int(seen.logits.argmax())],
        "probability": float(probabilities.max()),
        "explained": names[seen.target],
        "logit": float(seen.logits[seen.target]),
        "offset": seen.offset,
        "exact": seen.exact,
        "groups": groups,
        "filters": [
            {
                "filter": i,
                "class": named(owners[i]),
                "contribution": float(seen.contributions[i]),
            }
            for i in seen.contributions.argsort(descending=True)[:filters].tolist()
        ],
    }


_GROUPS_SHOWN = 5
_FILTERS_NAMED = 3


def _print_explanations(told: Mapping[str, Mapping[str, Any]]) -> None:
    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    console = Console(soft_wrap=True, markup=False, emoji=False)
    for path, by_network in told.items():
        for name, said in by_network.items():
            table = Table(
                title=printable(f"{path}, {name}: {said['predicted']} ({said['probability']:.3f})"),
                title_justify="left",
                title_style="bold",
            )
            table.add_column("filters of")
            for heading in ("number", "add to the logit", "without them"):
                table.add_column(heading, justify="right")
            for group in said["groups"][:_GROUPS_SHOWN]:
                without = group["without"]
                table.add_row(
                    printable("no class" if group["class"] is None else group["class"]),
                    str(group["filters"]),
                    f"{group['contribution']:+.3f}",
                    printable(f"{without['predicted']} ({without['probability']:.3f})"),
                )
            console.print(table)
            left = len(said["groups"]) - _GROUPS_SHOWN
            if left > 0:
                console.print(f"  and {counted(left, 'group')} that add{'s' * (left == 1)} less")
            kind = "is" if said["exact"] else "is, to first order,"
            console.print(
                printable(
                    f"  the logit of {said['explained']}, {said['logit']:.3f}, {kind} what filters"
                    f" add to the {said['offset']:.3f} it has without any"
                )
            )
            most = ", ".join(f"{f['filter']} ({f['contribution']:+.3f})" for f in said["filters"])
            console.print(f"  most by filter {most}")
            console.print(printable(f"  {said['picture']}: these filters' maps"))
