"""The options of a training run: one dataclass, from which the flags and the YAML keys are made."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """An option that cannot be used; the message names it, what it got and what it wants."""


class DivergenceError(RuntimeError):
    """Training diverged: the loss is no finite number; the message says what may help."""


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    methods: tuple[str, ...] = (),
    identity: bool = True,
) -> Any:
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "least": least,
            "most": most,
            "above": above,
            "methods": methods,
            "identity": identity,
        },
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; each is a flag of ``picnn-fast train`` and a key of its YAML file.

    Raises:
        ConfigError: a value of the wrong type or out of range.

    Example:
        >>> from picnn_fast.training.config import TrainConfig
        >>> TrainConfig(method="std", epochs=5).epochs
        5
    """

    output: str = _option(
        "runs/train", "folder the finished run appears in; must not hold another", identity=False
    )
    method: str = _option(
        "picnn", "how filters are made interpretable", choices=("picnn", "icnn", "std")
    )
    backbone: str = _option(
        "small-resnet",
        "network; small-resnet is for images of 8 to 32 pixels, small-cnn of 64 to 128",
        choices=(
            "small-resnet",
            "small-cnn",
            "resnet18",
            "resnet50",
            "alexnet",
            "vgg16",
            "vgg-m",
            "vgg-s",
        ),
    )
    num_filters: int | None = _option(
        None,
        "filters of the target layer; none: as many as the backbone yields (icnn, or without"
        " insert-conv), else 12.8 times the number of classes",
        least=1,
    )
    insert_conv: bool = _option(True, "put a new 3x3 convolution of num_filters after the backbone")
    sampling: str = _option(
        "bernoulli",
        "how the mask is drawn in training (picnn)",
        choices=("bernoulli", "gumbel"),
        methods=("picnn",),
    )
    normalization: str = _option(
        "class_softmax",
        "how the matrix becomes probabilities (picnn, std)",
        choices=("class_softmax", "sigmoid"),
        methods=("picnn", "std"),
    )
    interpretation_loss_on: str = _option(
        "correct",
        "samples of the interpretation loss (picnn): those whose pseudo-label is correct, or all",
        choices=("correct", "all"),
        methods=("picnn",),
    )
    interpretation_weight: float = _option(
        2.0, "weight of the interpretation loss (picnn)", least=0, methods=("picnn",)
    )
    template: str = _option(
        "l1",
        "part template of mask layers and filter losses (icnn)",
        choices=("l1", "l2", "uniform-l1", "uniform-l2"),
        methods=("icnn",),
    )
    estimator: str = _option(
        "batch",
        "of the filter loss's gradient (icnn)",
        choices=("batch", "running", "target"),
        methods=("icnn",),
    )
    tau: float | None = _option(
        None,
        "scale of the template in the filter loss (icnn); none: 0.5 / n² on n x n maps",
        above=0,
        methods=("icnn",),
    )
    filter_loss_weight: float = _option(
        0.003,
        "weight of the filter losses (icnn); too large a weight drowns the discrimination",
        least=0,
        methods=("icnn",),
    )
    task: str = _option(
        "softmax",
        "loss over all classes, of each class alone (icnn), or of one category against the rest",
        choices=("softmax", "logistic", "single"),
    )
    category: str | None = _option(
        None, "class that is told from all others, which then count as one (task single)"
    )
    mutual_information_weight: float = _option(
        0.0, "weight of the mutual information between filters and classes as a loss", least=0
    )
    mask_at: str = _option(
        "auto",
        "where the mask is applied (picnn, std)",
        choices=("auto", "maps", "late"),
        methods=("picnn", "std"),
    )
    data: str = _option(
        "digits",
        "digits; part-animals: drawn animals; voc-part:FOLDER, cub:FOLDER or animal-part:FOLDER:"
        " annotated photographs; or a folder with train/<class>/<image> and test/<class>/<image>",
    )
    image_size: int | None = _option(
        None,
        "side of the square images, pixels; none: 128 for part-animals, else 224; digits are 8",
        least=1,
    )
    augment: bool = _option(
        True,
        "random crops and flips of a folder's images, flips of annotated ones, shifts by up to 1"
        " pixel of digits",
    )
    num_workers: int | None = _option(
        None,
        "processes that read images; none: 0 for digits and part-animals, up to 8 for a folder",
        least=0,
    )
    epochs: int = _option(30, "passes over the training images", least=1)
    batch_size: int = _option(
        64,
        "images a step, on each device; a single image left over in an epoch is not trained on",
        least=1,
    )
    lr: float = _option(1e-3, "learning rate of the network", above=0)
    correspondence_lr: float | None = _option(
        None,
        "learning rate of the correspondence matrix (picnn); none: that of the network",
        above=0,
        methods=("picnn",),
    )
    correspondence_weight_decay: float | None = _option(
        None, "of the matrix (picnn); none: that of the network", least=0, methods=("picnn",)
    )
    initial: str = _option(
        "uniform",
        "start of the matrix (picnn): uniform, or flatter, as in the published code",
        choices=("uniform", "published"),
        methods=("picnn",),
    )
    inserted_activation: str = _option(
        "relu",
        "after the inserted convolution (picnn, std); none: as in PICNN's published code",
        choices=("relu", "none"),
        methods=("picnn", "std"),
    )
    weight_decay: float = _option(0.01, "AdamW's", least=0)
    schedule: str = _option("cosine", "learning rates over the run", choices=("cosine", "constant"))
    warmup_epochs: int = _option(
        0, "epochs over which the learning rates rise to their full value", least=0
    )
    seed: int = _option(
        0, "of initial weights, order, augmentation and masks", least=0, most=2**32 - 1
    )
    precision: str = _option(
        "32-true", "of the arithmetic", choices=("32-true", "bf16-mixed", "16-mixed", "64-true")
    )
    accelerator: str = _option("auto", "device type", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = _option(1, "how many of them", least=1, most=1024)
    strategy: str = _option(
        "auto", "across devices, as Lightning names it", choices=("auto", "ddp")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    def identity(self) -> dict[str, Any]:
        """The options that make two runs the same run: all but the output folder."""
        return {f.name: getattr(self, f.name) for f in options() if f.metadata["identity"]}

    def as_dict(self) -> dict[str, Any]:
        """All options."""
        return dataclasses.asdict(self)


def options() -> tuple[dataclasses.Field[Any], ...]:
    """The options in order; ``metadata`` holds help, choices and range."""
    return dataclasses.fields(TrainConfig)


def option_type(field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """Type of an option, and whether None is allowed."""
    hint = typing.get_type_hints(TrainConfig)[field.name]
    if isinstance(hint, types.UnionType):
        (kind,) = (k for k in typing.get_args(hint) if k is not types.NoneType)
        return kind, True
    return hint, False


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    kind, optional = option_type(field)
    if value is None and optional:
        return
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        want = names[kind] + (" or none" if optional else "")
        raise ConfigError(f"{field.name}: got {value!r}, want {want}")
    limits = field.metadata
    if limits["choices"] is not None and value not in limits["choices"]:
        raise ConfigError(
            f"{field.name}: got {value!r}, want one of {', '.join(map(str, limits['choices']))}"
        )
    if limits["least"] is not None and not limits["least"] <= value < math.inf:
        raise ConfigError(f"{field.name}: got {value!r}, want {names[kind]} >= {limits['least']}")
    if limits["most"] is not None and value > limits["most"]:
        raise ConfigError(f"{field.name}: got {value!r}, want {names[kind]} <= {limits['most']}")
    if limits["above"] is not None and not limits["above"] < value < math.inf:
        raise ConfigError(f"{field.name}: got {value!r}, want {names[kind]} > {limits['above']}")


def refuse_unused(given: Mapping[str, Any]) -> None:
    """Refuse options that a user gave and the method, or the data, never uses.

    None counts as not given. ``TrainConfig`` itself takes them, so that one set of options may
    serve several methods.

    Args:
        given: options by name, without the defaults.

    Raises:
        ConfigError: an option of another method, or the image size of data that has its own.

    Example:
        >>> from picnn_fast.training.config import refuse_unused
        >>> refuse_unused({"method": "std", "template": "l1"})
        Traceback (most recent call last):
        picnn_fast.training.config.ConfigError: template: got 'l1' with method std, want method icnn
    """
    config = TrainConfig(**given)
    for field in options():
        value, methods = given.get(field.name), field.metadata["methods"]
        if value is not None and methods and config.method not in methods:
            raise ConfigError(
                f"{field.name}: got {value!r} with method {config.method}, want method"
                f" {' or '.join(methods)}"
            )
    if config.image_size is not None and config.data == "digits":
        raise ConfigError(
            f"image_size: got {config.image_size} with data digits, which are of 8 x 8 pixels;"
            " want images as data"
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key that is no option.
    """
    from picnn_fast._extras import extra

    with extra("train"):
        import yaml
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"config: {path} is not YAML: {text}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {path} holds a {type(content).__name__}, want option: value")
    fields = {field.name: field for field in options()}
    values = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(fields)}"
            raise ConfigError(f"config: {path} has the unknown option {key!r}; {hint}")
        values[key] = _from_yaml(fields[key], value)
    return values


def _from_yaml(field: dataclasses.Field[Any], value: Any) -> Any:
    kind, optional = option_type(field)
    if optional and value == "none":
        return None
    # YAML 1.1 reads 1e-3 as text: it wants 1.0e-3.
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
