"""The options of a training run, read from flags, YAML or Python by jsonargparse.

What a method, a backbone, a data set or an optimiser can be told is the signature of its class, and
its help that class's docstring: no list is kept here.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.backbones import BACKBONES, TIMM, cut, is_weights_file
from picnn_fast.data import DATA
from picnn_fast.models.factory import METHODS

with extra("train"):
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

# Options of data by which it is read, and becomes no other.
HOW_READ = ("cache", "download", "index", "keep", "num_workers")


class ConfigError(ValueError):
    """An option that cannot be used; the message names it, what it got and what it wants."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that hang on a name: ``--method picnn --method.sampling gumbel``.

    Attributes:
        rows: name to the class or function whose signature tells the options.
        taken: parameters that are no options, for the run gives them itself.
        note: what else the help says of the names.
        prefix: begins names that are not listed, whose options are those of the first row.
    """

    rows: Mapping[str, Any]
    taken: frozenset[str]
    note: str = ""
    prefix: str | None = None

    def row(self, name: object) -> Any:
        """What ``name`` names, or None."""
        if self.prefix is not None and isinstance(name, str) and name.startswith(self.prefix):
            return next(iter(self.rows.values()))
        return self.rows.get(name) if isinstance(name, str) else None

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The options of what ``name`` names."""
        parameters = inspect.signature(self.row(name)).parameters
        return {
            key: parameter
            for key, parameter in parameters.items()
            if key not in self.taken and parameter.kind is not parameter.VAR_KEYWORD
        }


class _Backbones(Mapping[str, Any]):
    """``BACKBONES``, and the name that leaves the choice to the size of the images."""

    def __getitem__(self, name: str) -> Any:
        if name != BY_IMAGE_SIZE and name not in BACKBONES:
            raise KeyError(name)
        return cut

    def __iter__(self) -> Iterator[str]:
        return iter((BY_IMAGE_SIZE, *BACKBONES))

    def __len__(self) -> int:
        return 1 + len(BACKBONES)


# The backbone of a run that names none, by the side of its images: a network made for small ones
# keeps large maps, on which a step takes many times as long.
BY_IMAGE_SIZE = "auto"
_SMALL, _LARGE, _LARGEST_SMALL_IMAGE = "small-resnet", "resnet18", 64

GROUPS: dict[str, Group] = {
    "method": Group(
        METHODS,
        frozenset(
            {
                "features",
                "head",
                "num_classes",
                "num_filters",
                "in_channels",
                "insert_kernel",
                "channel_dim",
            }
        ),
    ),
    "backbone": Group(
        _Backbones(),
        frozenset({"backbone", "image_channels"}),
        f"; {BY_IMAGE_SIZE}: {_SMALL} for images of up to {_LARGEST_SMALL_IMAGE} pixels, else"
        f" {_LARGE}; {TIMM}NAME: any network of timm's",
        TIMM,
    ),
    "data": Group(DATA, frozenset({"batch_size", "seed"})),
    # Its rate is an option by itself: torch's own may be a tensor.
    "optimizer": Group(
        OPTIMIZERS,
        frozenset({"params", "lr", "foreach", "maximize", "capturable", "differentiable", "fused"}),
    ),
}


# Another value makes no other run.
FREE = (
    *(f"data.{name}" for name in HOW_READ),
    "checkpoint_every",
    "devices",
    "num_nodes",
    "strategy",
    "timeout",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a training run, checked, with every default filled in.

    ``method``, ``backbone``, ``data`` and ``optimizer`` are given as a name, or as a mapping of
    "name" and of the options of what it names; they are mappings once here.

    Args:
        method: how filters are made interpretable.
        backbone: network below the target layer; "auto" becomes small-resnet for images of up to
            64 pixels, else resnet18; "timm:NAME" is any network of timm's; or is that of the run
            whose network is explained.
        data: images to train and test on.
        optimizer: of torch, with its learning rate ``lr``.
        output: folder the finished run appears in; must not hold another.
        num_filters: filters of the target layer; null: as the method says, 12.8 times the number of
            classes, but at most four times the channels that the backbone yields; or as many as it
            yields (icnn, iccnn, or without insert_conv).
        insert_conv: put a new convolution of num_filters after the backbone; false for one that
            yields tokens, as vit_b_16.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        category: class that is told from all others, which then count as one.
        mutual_information_weight: weight of the mutual information between filters and classes as
            a loss.
        epochs: passes over the training images.
        batch_size: images a step, on each device; a single image left over in an epoch is not
            trained on.
        accumulate_grad_batches: such batches a step, whose gradients are averaged.
        schedule: learning rates over the run, changed by the epoch: cosine to schedule_floor times
            the rate; step, down to schedule_factor of it after each of schedule_steps; or constant.
        schedule_floor: share of the learning rate that the cosine ends at.
        schedule_steps: epochs done before each fall of the schedule step; of optimisers that take
            turns, as csg's, each counts its own epochs.
        schedule_factor: what such a fall leaves of the learning rate.
        warmup_epochs: epochs over which the learning rates rise to their full value.
        report_epoch: the epoch whose figures are reported: the last; the one with the best ACC1 on
            the validation images; or best_on_test, on the test split that is reported on, as in
            PICNN's published code, which flatters: it wants data.validation 0.
        checkpoint_every: steps after which a checkpoint is written within an epoch, to go on from
            after an interruption; null: at the end of each epoch alone.
        seed: of initial weights, order, augmentation and masks.
        precision: of the arithmetic.
        accelerator: device type.
        devices: how many of them on each machine; null: 1, or as many as torchrun or srun started
            processes.
        num_nodes: machines; null: 1, or as many as torchrun or srun started processes on. Without
            these NODE_RANK and MASTER_ADDR are wanted on each.
        timeout: seconds that processes wait for one another before a run ends, as where a machine
            is lost.
        strategy: across devices: ddp keeps the whole network on each; fsdp deals weights, gradients
            and optimiser out to them; auto: ddp where there are several.
        channels_last: keep weights and maps with their channels innermost, which convolutions run
            faster on; results differ in rounding.
        compile: train the network as torch.compile makes it, which takes a while at the start;
            results differ in rounding.

    Raises:
        ConfigError: an option that there is not, of the wrong type, or out of range.

    Example:
        >>> from picnn_fast.training.options import Options
        >>> options = Options(method={"name": "picnn", "sampling": "gumbel"}, epochs=5)
        >>> options.method["sampling"], options.method["initial"], options.optimizer["name"]
        ('gumbel', 'uniform', 'adamw')
    """

    method: Any = "picnn"
    backbone: Any = BY_IMAGE_SIZE
    data: Any = "digits"
    optimizer: Any = "adamw"
    output: str = "runs/train"
    num_filters: int | None = None
    insert_conv: bool = True
    insert_kernel: int = 3
    category: str | None = None
    mutual_information_weight: float = 0.0
    epochs: int = 30
    batch_size: int = 64
    accumulate_grad_batches: int = 1
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    schedule_floor: float = 0.0
    schedule_steps: Sequence[int] = (60, 90, 120)
    schedule_factor: float = 0.1
    warmup_epochs: int = 0
    report_epoch: Literal["last", "best_on_validation", "best_on_test"] = "last"
    checkpoint_every: int | None = None
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | None = None
    num_nodes: int | None = None
    timeout: float = 600.0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names, content = _with_names(given)
        parser = _kept_parser(names, tuple(GROUPS))
        try:
            parsed = parser.parse_object(content).as_dict()
        except ArgumentError as error:
            _refuse(error, parser, names)
        for name in given:
            # As they are read back from a file.
            object.__setattr__(self, name, json.loads(json.dumps(parsed[name])))
        if self.backbone["name"] == BY_IMAGE_SIZE and not self.source():
            # A name of its own, so that a record and a checkpoint say what ran.
            small = self.data.get("image_size", 0) <= _LARGEST_SMALL_IMAGE
            name = _SMALL if small else _LARGE
            object.__setattr__(self, "backbone", {**self.backbone, "name": name})
        for name, (least, most) in _RANGES.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least, most)
        check_steps(self.schedule_steps, self.schedule_factor)
        for group in GROUPS:
            chosen = getattr(self, group)
            for name, parameter in GROUPS[group].options(chosen["name"]).items():
                if _is_path(parameter.annotation) and "://" not in (chosen[name] or "://"):
                    # The same folder wherever the options are read again.
                    chosen[name] = os.path.abspath(os.path.expanduser(chosen[name]))
                for kind in _dataclasses_in(parameter.annotation):
                    if chosen[name] is not None:
                        try:
                            kind(**chosen[name])
                        except (TypeError, ValueError) as error:
                            raise ConfigError(f"{group}.{name}.{error}") from error
        weights = self.backbone["weights"]
        if is_weights_file(weights):
            self.backbone["weights"] = os.path.abspath(os.path.expanduser(weights))
        if not 0 < self.optimizer["lr"] < math.inf:
            raise ConfigError(f"optimizer.lr: got {self.optimizer['lr']}, want a number > 0")

    def source(self) -> str | None:
        """The run, or its checkpoint, whose network the method is put on in place of a backbone."""
        option = METHODS[self.method["name"]].network_from
        source: str | None = None if option is None else self.method[option]
        return source

    def identity(self) -> dict[str, Any]:
        """What a run notes about itself: all options but the output folder, where it is noted."""
        return {name: value for name, value in self.as_dict().items() if name != "output"}

    def data_identity(self) -> dict[str, Any]:
        """Options of the data but those of how it is read, which make it no other data."""
        return {name: value for name, value in self.data.items() if name not in HOW_READ}

    def as_dict(self) -> dict[str, Any]:
        """All options, nested as in a YAML file."""
        return dataclasses.asdict(self)

    def arguments(self, group: str) -> dict[str, Any]:
        """Keyword arguments for what ``group`` ("method", "data" …) names."""
        names = {group: getattr(self, group)["name"]}
        parser = _kept_parser(names, (group,))
        built = parser.instantiate(parser.parse_object({group: getattr(self, group)}))
        values = built[group].as_dict()
        del values["name"]
        return dict(values)

    def optimizer_class(self) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
        """What makes the optimiser of groups of parameters, each of which has its own rate."""
        arguments = self.arguments("optimizer")
        del arguments["lr"]
        return functools.partial(OPTIMIZERS[self.optimizer["name"]], **arguments)


_RANGES: dict[str, tuple[float, float]] = {
    "num_filters": (1, math.inf),
    "mutual_information_weight": (0.0, sys.float_info.max),
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "accumulate_grad_batches": (1, math.inf),
    "schedule_floor": (0.0, 1.0),
    "warmup_epochs": (0, math.inf),
    "checkpoint_every": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "devices": (1, 1024),
    "num_nodes": (1, 2**16),
    "timeout": (1.0, 1e6),
}


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """
    Raises:
        ConfigError: a number below ``least`` or above ``most``.
    """
    if not least <= value <= most:
        kind = "an integer" if isinstance(least, int) else "a number"
        limit = f" and <= {most}" if most < math.inf else ""
        raise ConfigError(f"{name}: got {value}, want {kind} >= {least}{limit}")


def check_steps(steps: Sequence[int], factor: float) -> None:
    """
    Raises:
        ConfigError: steps of a schedule that do not rise from 1, or a factor outside (0, 1].
    """
    if list(steps) != sorted(set(steps)) or min(steps, default=1) < 1:
        raise ConfigError(
            f"schedule_steps: got {list(steps)}, want numbers of epochs >= 1, each greater than the"
            " one before"
        )
    if not 0 < factor <= 1:
        raise ConfigError(f"schedule_factor: got {factor}, want a number > 0 and <= 1")


def build_parser(
    names: Mapping[str, str],
    *,
    prog: str = "picnn-fast train",
    description: str | None = None,
    groups: Sequence[str] = tuple(GROUPS),
    common: bool = True,
    without: Collection[str] = (),
) -> ArgumentParser:
    """The parser of a run whose method, backbone, data and optimiser have these names.

    Args:
        names: group to name.
        prog, description: for the help.
        groups: those whose options are taken in.
        common: whether the options outside groups are.
        without: options outside groups that are left out.
    """
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    if common:
        parser.add_argument(
            "--config",
            action="config",
            help="YAML file, or the run.json of a run. Flags override it; one that names another"
            " method, backbone, data or optimizer leaves out what the file says of that one",
        )
        parser.add_class_arguments(Options, skip={*GROUPS, *without})
    for key in groups:
        name = names[key]
        row = GROUPS[key].row(name)
        parser.add_argument(
            f"--{key}.name",
            type=Literal[tuple(dict.fromkeys([*GROUPS[key].rows, name]))],
            default=name,
            help=f"also --{key} NAME; --{key}.help NAME tells the options of each"
            + GROUPS[key].note,
        )
        if key == "optimizer":
            parser.add_argument("--optimizer.lr", type=float, default=1e-3, help="learning rate")
        parameters = inspect.signature(row).parameters.keys()
        skip: set[str | int] = set(parameters - GROUPS[key].options(name).keys())
        if inspect.isclass(row):
            parser.add_class_arguments(row, key, skip=skip, instantiate=False, fail_untyped=False)
        else:
            parser.add_function_arguments(row, key, skip=skip, fail_untyped=False)
    for action in parser._actions:
        action.help = action.help and action.help.replace("``", "")
        # A file for one group alone: ``--method NAME`` means something else here.
        if action.option_strings and action.option_strings[0][2:] in groups:
            action.help = argparse.SUPPRESS
    return parser


def _kept_parser(names: Mapping[str, str], groups: tuple[str, ...]) -> ArgumentParser:
    """The parser of these groups, with the options outside them where they are all; made once.

    It is for objects alone, and stays as it is made.
    """
    rows = tuple((GROUPS[key].row(names[key]), tuple(GROUPS[key].rows)) for key in groups)
    return _parser_of(groups, tuple(names[key] for key in groups), rows)


@functools.lru_cache(maxsize=64)
def _parser_of(
    groups: tuple[str, ...], names: tuple[str, ...], rows: tuple[tuple[Any, ...], ...]
) -> ArgumentParser:
    # Rows are what the names stand for now: another of the same name has a parser of its own.
    chosen = dict(zip(groups, names, strict=True))
    return build_parser(chosen, groups=groups, common=groups == tuple(GROUPS))


def parse(
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    groups: Sequence[str] = tuple(GROUPS),
    common: bool = True,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    recipe: Callable[[Mapping[str, str]], Mapping[str, Any]] = lambda names: {},
    add: Callable[[ArgumentParser], None] = lambda parser: None,
) -> dict[str, Any]:
    """Read a command line.

    Args:
        arguments: flags and their values.
        prog, description, groups, common, without: see ``build_parser``.
        defaults: of the groups, as in ``Options``, where they are not those of a run.
        recipe: the names of the groups to defaults of options, nested as in a YAML file; those of a
            group count for what they name.
        add: adds the command's own arguments.

    Returns:
        Every argument, the groups' nested as in a YAML file.

    Raises:
        ConfigError: an argument that there is not, of the wrong type, or a file that cannot be
            read.
        SystemExit: help or the configuration was asked for, and has been printed.
    """
    tokens = [_spelled(token) for token in arguments]
    content, tokens, source = _without_configs(tokens) if common else ({}, tokens, "")
    start: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Options)}
    start = {key: start[key] for key in groups} | dict(defaults or {})
    names, start = _with_names(start)
    given, content = _with_names(content, source)
    names |= given
    for key in groups:
        for i, token in enumerate(tokens):
            flag, equals, value = token.partition("=")
            if flag == f"--{key}.name" and (equals or i + 1 < len(tokens)):
                value = value if equals else tokens[i + 1]
                if value != names[key]:
                    content.pop(key, None)
                names[key] = value
        _check_name(key, names[key])
        _answer_help(key, tokens, names)
    parser = build_parser(
        names,
        prog=prog,
        description=description,
        groups=groups,
        common=common,
        without=without,
    )
    add(parser)
    for key, values in [*start.items(), *recipe(names).items()]:
        if key not in groups:
            parser.set_defaults({key: values})
        elif values["name"] == names[key]:
            parser.set_defaults({f"{key}.{option}": value for option, value in values.items()})
    for action in parser._actions:
        if action.nargs == "+" and not isinstance(content.get(action.dest, []), list):
            raise ConfigError(f"{action.dest}: got {content[action.dest]!r}, want a list")
    try:
        if content:
            parser.parse_object(content)
    except ArgumentError as error:
        if "required" not in str(error):  # a flag may say what the file does not
            _refuse(error, parser, names, source)
    if "_ARGCOMPLETE" in os.environ:
        _offer_values(parser)
    try:
        file = ["--config", json.dumps(content)] if content else []
        return dict(parser.parse_args([*file, *tokens]).as_dict())
    except ArgumentError as error:
        _refuse(error, parser, names)


def _offer_values(parser: ArgumentParser) -> None:
    """Have argcomplete offer the values that an option lists, of which jsonargparse tells none."""
    kinds = _kinds(parser)
    for action in parser._actions:
        values = [str(value) for value in _literals(kinds.get(action.dest))]
        action.completer = lambda values=values, **context: values  # type: ignore[attr-defined]


def _spelled(token: str) -> str:
    """``--num-filters`` as ``--num_filters``, and ``--method`` as ``--method.name``."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    flag = "--" + flag[2:].replace("-", "_")
    return (f"{flag}.name" if flag[2:] in GROUPS else flag) + equals + value


def _answer_help(key: str, tokens: Sequence[str], names: Mapping[str, str]) -> None:
    """``--method.help NAME`` prints the options of that method alone, and ends."""
    for i, token in enumerate(tokens):
        flag, _, name = token.partition("=")
        if flag == f"--{key}.help":
            following = tokens[i + 1] if i + 1 < len(tokens) else "--"
            name = name or (names[key] if following.startswith("--") else following)
            _check_name(key, name)
            print(build_parser({key: name}, groups=[key], common=False).format_help(), end="")
            raise SystemExit(0)


def _without_configs(tokens: Sequence[str]) -> tuple[dict[str, Any], list[str], str]:
    """What the files after ``--config`` say, a later one over an earlier; the other tokens."""
    content: dict[str, Any] = {}
    rest, sources = [], []
    walk = iter(tokens)
    for token in walk:
        flag, equals, path = token.partition("=")
        if flag != "--config":
            rest.append(token)
            continue
        if not equals:
            path = next(walk, "")
        content |= read_yaml(path)
        sources.append(path)
    return content, rest, ", ".join(sources)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, or from the record ``run.json`` of a run.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"config: cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {path} holds a {type(content).__name__}, want option: value")
    if content.get("program") == "picnn_fast" and isinstance(content.get("config"), Mapping):
        content = content["config"]
        unknown = content.keys() - {field.name for field in dataclasses.fields(Options)}
        if unknown or isinstance(content.get("method"), str):
            raise ConfigError(
                f"config: {path} was made by an earlier picnn_fast, whose options were others; see"
                " --help for those of today"
            )
    return {str(key): value for key, value in content.items()}


def _with_names(
    values: Mapping[str, Any], source: str = ""
) -> tuple[dict[str, str], dict[str, Any]]:
    """The names of the groups among ``values``, and the values with groups as mappings."""
    names, content = {}, dict(values)
    for key in (key for key in GROUPS if key in values):
        group = values[key]
        if isinstance(group, Mapping):
            default = next(f.default for f in dataclasses.fields(Options) if f.name == key)
            content[key] = group = {"name": default, **group}
        elif isinstance(group, str):
            content[key] = group = {"name": group}
        else:
            raise ConfigError(
                f"{_of(source)}{key}: got {group!r}, want a name, or a mapping with 'name' and"
                " options"
            )
        names[key] = group["name"]
        _check_name(key, names[key], source)
    return names, content


def _check_name(key: str, name: object, source: str = "") -> None:
    group = GROUPS[key]
    if group.row(name) is None:
        more = f", or {group.prefix}NAME" if group.prefix else ""
        raise ConfigError(
            f"{_of(source)}{key}: got {name!r}, want one of {', '.join(group.rows)}{more}"
            f"{_hint(name, group.rows)}"
        )


def qualified(error: Exception, key: str, name: str) -> str:
    """An error of what ``name`` names, whose argument is said as the option it is."""
    argument = str(error).partition(":")[0]
    return f"{key}.{error}" if argument in GROUPS[key].options(name) else str(error)


def _refuse(
    error: ArgumentError, parser: ArgumentParser, names: Mapping[str, str], source: str = ""
) -> NoReturn:
    """What jsonargparse says over several lines, as one: option, what it got, what it wants."""
    raise ConfigError(_of(source) + _told(str(error), _kinds(parser), names)) from error


def _told(text: str, kinds: Mapping[str, Any], names: Mapping[str, str]) -> str:
    if text.startswith("Parser key"):
        # An option within an option is told within what is told of the outer one.
        keys = re.findall(r'Parser key "([\w.]+)"(?: element \d+)?:', text)
        key, rest = ".".join(keys), text.rpartition("Parser key")[2].partition(":")[2]
        got = re.search(r"(?:Got|Given) value: (.*?)(?=\n +(?:- |Given value)|\Z)", rest, re.S)
        value = got[1].strip() if got else "nothing"
        unknown = re.search(r"Option '([\w.]+)' is not accepted", rest)
        unknown = unknown or re.match(r"NestedArg\(key='([\w.]+)'", value)
        if unknown:
            return _unknown(f"{key}.{unknown[1]}", kinds, names)
        if key not in kinds:
            return f"{key}: {one_line(rest)}"
        near = _hint(value, [str(c) for c in _literals(kinds[key])])
        return f"{key}: got {value!r}, want {_described(kinds[key])}{near}"
    found = re.match(r"the following arguments are required: ([\w.]+)", text)
    found = found or re.match(r"Option '([\w.]+)' is required", text)
    found = found or re.match(r"argument --([\w.]+): expected (?:at least )?one argument", text)
    if found:
        return f"{found[1]}: got nothing, want {_described(kinds[found[1]])}"
    found = re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    found = found or re.match(r"Option '([\w.-]+)' is not accepted", text)
    found = found or re.match(r"unrecognized arguments: (?:.*? )?--([\w.]+)", text)
    if found:
        return _unknown(".".join(found.groups()), kinds, names)
    return one_line(text).removeprefix("argument --")


def _unknown(option: str, kinds: Mapping[str, Any], names: Mapping[str, str]) -> str:
    key, _, name = option.partition(".")
    if key in names and name:
        group = GROUPS[key]
        owners = [row for row in group.rows if name.partition(".")[0] in group.options(row)]
        if owners and names[key] not in owners:
            wanted = " or ".join(owners)
            return f"{option}: {key} {names[key]} has no such option, want {key} {wanted}"
    known = list(kinds)
    for other in names:
        for row in GROUPS[other].rows:
            for end, parameter in GROUPS[other].options(row).items():
                known += _and_within(f"{other}.{end}", parameter.annotation)
    whole = [repr(name) for name in dict.fromkeys(known) if name.endswith(f".{option}")]
    near = f"; did you mean {' or '.join(whole)}?" if whole else _hint(option, kinds)
    return f"{option}: there is no such option{near or '; --help lists all there are'}"


def _kinds(parser: ArgumentParser) -> dict[str, Any]:
    """The type of every option, and of those within an option, by their whole names."""
    kinds: dict[str, Any] = {}
    for action in parser._actions:
        if not action.dest.endswith(".help"):
            untyped = str if action.option_strings else Path
            kinds |= _and_within(action.dest, getattr(action, "_typehint", untyped))
    return kinds


def _and_within(option: str, annotation: Any) -> dict[str, Any]:
    kinds = {option: annotation}
    for kind in _dataclasses_in(annotation):
        hints = typing.get_type_hints(kind)
        kinds |= {f"{option}.{name}": hint for name, hint in hints.items()}
    return kinds


def _dataclasses_in(annotation: Any) -> list[Any]:
    """Those whose fields are options: of ``PartTemplate | None``, PartTemplate."""
    kinds = [annotation, *typing.get_args(annotation)]
    return [kind for kind in kinds if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_is_path, typing.get_args(annotation)))


def _described(annotation: Any) -> str:
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    words |= {Path: "a path", Any: "text", types.NoneType: "null"}
    if annotation in words:
        return words[annotation]
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if kind is tuple:
        return f"[{', '.join(map(_described, parts))}]"
    if kind in (list, Sequence):
        return f"[{_described(parts[0])}, …]"
    if kind in (types.UnionType, typing.Union):
        # Functions and tensors are for Python alone.
        return " or ".join(filter(None, map(_described, parts)))
    if _dataclasses_in(annotation):
        return f"a mapping of {', '.join(field.name for field in dataclasses.fields(annotation))}"
    return ""


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for kind in typing.get_args(annotation) for value in _literals(kind)]


def _hint(got: object, known: Iterable[str]) -> str:
    near = checks.did_you_mean(got, list(known))
    return f";{near}" if near else ""


def _of(source: str) -> str:
    return f"config {source}: " if source else ""


def few(names: Sequence[str]) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def one_line(error: object) -> str:
    """A message of several lines as one."""
    return " ".join(str(error).split())
