"""The command ``picnn-fast``: demo, train, evaluate, doctor.

Only torch and numpy are imported until a command needs more, so that ``doctor`` and ``--help``
answer on any installation.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picnn_fast._extras import extra, install_command
from picnn_fast._version import __version__
from picnn_fast.training.config import (
    ConfigError,
    DivergenceError,
    TrainConfig,
    option_type,
    options,
    read_yaml,
    refuse_unused,
)

# What a shell reports of a process ended by Ctrl-C and by SIGTERM.
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: in place of ``sys.argv[1:]``.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        with _terminable(args.command):
            status: int = args.run(args)
        return status
    except _expected_errors() as error:
        print(f"picnn-fast {args.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if isinstance(stop, SystemExit) and stop.code not in (1, _TERMINATED):
            raise
        # One of several processes speaks for all.
        if args.command in ("demo", "train") and os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"\npicnn-fast {args.command}: interrupted; the same command goes on from the"
                " last complete epoch",
                file=sys.stderr,
            )
        terminated = isinstance(stop, SystemExit) and stop.code == _TERMINATED
        return _TERMINATED if terminated else _INTERRUPTED


@contextmanager
def _terminable(command: str) -> Iterator[None]:
    """SIGTERM ends a training like Ctrl-C: at once, and tidily.

    Lightning's own handler would wait for the next batch, and then end with status 0; it calls
    the handler it finds.
    """
    if command not in ("demo", "train") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says all a user needs, without a traceback."""
    from picnn_fast.training.run_folder import RunFolderError

    return ConfigError, RunFolderError, DivergenceError, OSError, ImportError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="picnn-fast", description="Interpretable convolutional networks."
    )
    parser.add_argument("--version", action="version", version=f"picnn-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train an ordinary network and a PICNN on handwritten digits, and compare them",
        description="Train an ordinary network (STD) and a PICNN on scikit-learn's handwritten"
        " digits, and show accuracy through all filters (ACC1), through those drawn for a"
        " pseudo-label, itself drawn from the softmax (ACC2), without those of the true class"
        " (ACC3), and the mutual information score (MIS). An interrupted demo goes on"
        " when started again.",
    )
    demo.add_argument(
        "--output", default="runs/demo", help=_default("folder of the results", "runs/demo")
    )
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, help=_default("of everything random", 0)
    )
    demo.add_argument(
        "--epochs", type=_at_least(1), default=30, help=_default("of each network", 30)
    )
    _add_overwrite(demo)
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train and evaluate one network",
        description="Train and evaluate one network. Options come from --config, and flags"
        " override it. An interrupted run goes on when started again with the same options.",
    )
    train.add_argument("--config", metavar="FILE", help="YAML file, one 'option: value' a line")
    for field in options():
        _add_option(train, field)
    _add_overwrite(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a trained network on a test split",
        description="Measure ACC1, ACC2, ACC3 and MIS of trained networks on the test split; of"
        " data with part annotations also location instability and part interpretability.",
    )
    evaluate.add_argument(
        "path", metavar="RUN_OR_CHECKPOINT", help="folder of a run or of a demo, or a .ckpt file"
    )
    evaluate.add_argument(
        "--data", help="whatever train takes, of the same classes (default: that of the training)"
    )
    evaluate.add_argument(
        "--batch-size", type=_at_least(1), help="images a step (default: that of the training)"
    )
    evaluate.add_argument(
        "--seed", type=_at_least(0), help="of the masks drawn (default: that of the training)"
    )
    evaluate.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu", "mps"),
        default="auto",
        help=_default("device type", "auto"),
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON in place of a table")
    evaluate.set_defaults(run=_evaluate)

    doctor = commands.add_parser(
        "doctor",
        help="show what is installed, and what serves each operator",
        description="Show versions, devices, which backend serves which operator, and why any"
        " is missing.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _default(text: str, value: Any) -> str:
    return f"{text} (default: {value})"


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, want an integer >= {least}")
        return value

    return number


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew; what is in the output folder is replaced once the new run is complete",
    )


def _add_option(parser: argparse.ArgumentParser, field: Any) -> None:
    kind, optional = option_type(field)
    flag = "--" + field.name.replace("_", "-")
    default = field.default
    shown = "none" if default is None else default
    if kind is bool:
        shown = "yes" if default else "no"
    text = _default(field.metadata["help"].replace("%", "%%"), shown)
    if kind is bool:
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return

    def convert(value: str) -> Any:
        if optional and value == "none":
            return None
        try:
            return kind(value)
        except ValueError as error:
            wanted = {int: "an integer", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"got {value!r}, want {wanted}") from error

    parser.add_argument(
        flag,
        type=convert,
        choices=field.metadata["choices"],
        default=argparse.SUPPRESS,
        metavar=None if field.metadata["choices"] else field.name.rsplit("_", 1)[-1].upper(),
        help=text,
    )


def _print_table(metrics: dict[str, dict[str, float]], title: str) -> None:
    with extra("train"):
        from rich.console import Console
        from rich.table import Table
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name, meaning in (
        ("ACC1", "all filters"),
        ("ACC2", "filters of the\ndrawn pseudo-label"),
        ("ACC3", "without those of\nthe true class"),
        ("MIS", "nats"),
    ):
        table.add_column(f"{name}\n{meaning}", justify="right")
    keys = ["acc1", "acc2", "acc3", "mis"]
    for key, heading in (
        ("location_instability", "location\ninstab."),
        ("part_interpretability", "part\ninterpr."),
    ):
        if any(key in values for values in metrics.values()):
            keys.append(key)
            table.add_column(heading, justify="right")
    for name, values in metrics.items():
        figures = (f"{values[key]:.3f}" if key in values else "-" for key in keys)
        table.add_row(name.upper() if name in ("std", "picnn", "icnn") else name, *figures)
    Console().print(table)


def _demo(args: argparse.Namespace) -> int:
    from picnn_fast.training.demo import demo_folder, run_demo

    folder = demo_folder(args.output, seed=args.seed, epochs=args.epochs)
    complete = not args.overwrite and folder.complete()
    metrics = run_demo(args.output, seed=args.seed, epochs=args.epochs, overwrite=args.overwrite)
    _print_table(metrics, "Test split, 360 handwritten digits")
    for name, meaning in (
        ("correspondence.png", "which filters belong to which class"),
        ("curves.png", "losses and accuracies over training"),
        ("gradcam.png", "what all, class and complementary filters see"),
        ("metrics.json", "the figures above"),
    ):
        print(f"  {Path(args.output) / name}: {meaning}")
    if complete:
        _say_complete()
    return 0


def _say_complete() -> None:
    print("This run was complete already. Redo it with --overwrite.")


def _train(args: argparse.Namespace) -> int:
    file = {} if args.config is None else read_yaml(args.config)
    flags = {f.name: getattr(args, f.name) for f in options() if hasattr(args, f.name)}
    config = TrainConfig(**(file | flags))
    # A file may spell out the defaults of other methods too, as the record of a finished run does.
    defaults = TrainConfig().as_dict()
    refuse_unused({k: v for k, v in file.items() if v != defaults[k]} | flags)
    from picnn_fast.training.run import train, train_folder

    complete = not args.overwrite and train_folder(config).complete()
    metrics = train(config, overwrite=args.overwrite)
    if not metrics:  # a process beside the first one
        return 0
    _print_table({config.method: metrics}, f"Test split of {config.data}")
    print(f"  {config.output}: metrics.json, last.ckpt, csv/ and tensorboard/")
    if complete:
        _say_complete()
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import dataclasses

    from picnn_fast.training.run import build_data, evaluate, find_checkpoints, load_checkpoint

    path = Path(args.path)
    overrides = {
        key: getattr(args, key)
        for key in ("data", "batch_size", "seed")
        if getattr(args, key) is not None
    }
    metrics = {}
    for checkpoint in find_checkpoints(path):
        network, config, class_names = load_checkpoint(checkpoint)
        config = dataclasses.replace(config, **overrides)
        data = build_data(dataclasses.replace(config, task="softmax", category=None))
        if config.category is not None and config.category in data.class_names:
            data.single_out(config.category)
        if list(data.class_names) != class_names:
            raise ConfigError(
                f"data: {config.data} has other classes ({_few(data.class_names)}) than"
                f" {checkpoint} was trained on ({_few(class_names)})"
            )
        name = str(checkpoint.parent.relative_to(path)) if path.is_dir() else config.method
        metrics[config.method if name == "." else name] = evaluate(
            network, data, seed=config.seed, accelerator=args.accelerator
        )
    if args.json:
        print(json.dumps(metrics, indent=2))
    else:
        _print_table(metrics, f"Test split of {config.data}")
    return 0


def _few(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _doctor(args: argparse.Namespace) -> int:
    import torch

    import picnn_fast

    print(f"picnn_fast    {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package, part in (
        ("torch", None),
        ("numpy", None),
        ("triton", None),
        ("torchvision", "train"),
        ("lightning", "train"),
        ("torchmetrics", "train"),
        ("scikit-learn", "train"),
        ("matplotlib", "report"),
        ("captum", "report"),
    ):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (f": {install_command(part)}" if part else "")
        print(f"{package:<14}{version}")

    print("\ndevices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu         {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        print(f"  cuda:{i}      {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"  cuda        none (torch is built with {built})")

    info = picnn_fast.build_info()
    print("\ncompiled extension")
    for key, value in (info["extension"] or {"": "none"}).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"  {key:<20}{shown}")

    print("\nbackends")
    for backend, reason in info["backends"].items():
        print(f"  {backend:<12}{'available' if reason is None else f'missing: {reason}'}")

    print("\noperators")
    for operator, devices in info["operators"].items():
        served = ", ".join(f"{device}: {backend}" for device, backend in devices.items())
        print(f"  {operator:<32}{served}")
    return 0
