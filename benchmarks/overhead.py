"""What a training step of a whole network costs with a method, and in another layout or precision.

    python -m benchmarks.overhead [--device cpu|cuda] [--table backbones|classes|forms] [--smoke]

Every method over four backbones beside the plain network, and beside STD, which is the plain
network with the same target layer inserted, in training and in inference; PICNN over ResNet-18 for
10, 100 and 1000 classes with the default number of filters; and a step of PICNN as it is and with
channels innermost, in bfloat16, and with both.
"""

import functools
import inspect
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torchvision
from torch import nn

import picnn_fast
from benchmarks import harness
from picnn_fast.backbones import BACKBONES
from picnn_fast.models import METHODS, InterpretableNetwork

# Images a step on a CPU, on a GPU eight times as many; and rounds.
SIZES = {"resnet18": (16, 12), "vgg16": (6, 6), "mobilenet_v2": (16, 12), "vit_b_16": (4, 8)}
BEHIND = 32  # images a step of what lies behind the backbone; the papers' steps have 128
TIMED = ("picnn", "csg", "icnn", "iccnn")
FILTERS = 128  # as many as PICNN takes for ten classes
CLASSES = (10, 100, 1000)
FORMS = {
    "contiguous": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "bfloat16": (torch.contiguous_format, True),
    "both": (torch.channels_last, True),
}


def _step(
    model: nn.Module,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    half: bool = False,
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # random weights, nothing to learn
    given = (images, labels) if isinstance(model, InterpretableNetwork) else (images,)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            value = loss(model(*given), labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # now: other candidates need the memory

    return step


def _ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """Median and quartiles over rounds of one candidate's time over another's."""
    return _quartiles([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


class _Given(nn.Module):
    """Stands in for a backbone: yields maps that were computed before."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.maps


def _behind(
    model: InterpretableNetwork, images: torch.Tensor, labels: torch.Tensor, *, inserted: bool
) -> Callable[[], None]:
    """A step of all that is not the backbone, whose maps are given; takes the backbone away."""
    backbone = model.features[0] if inserted else model.features
    with torch.no_grad():
        given = _Given(backbone(images))
    if inserted:
        model.features[0] = given
    else:
        model.features = given
    return _step(model, model.loss, images, labels)


def _added(times: dict[str, list[float]], name: str, whole: float) -> dict[str, float]:
    """Median and quartiles over rounds of what a method adds to STD, as a share of ``whole``."""
    return _quartiles([(a - b) / whole for a, b in zip(times[name], times["std"], strict=True)])


def bench_backbone(
    backbone: str, batch: int, behind: int, size: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Steps and inference of a backbone alone, with a target layer, and with methods on that.

    Inference is of the network that is deployed, ``discriminator()``. A transformer has no layer
    inserted: its target is its own last tokens, and methods that take maps alone are left out.
    What a method adds to a step of STD lies behind the backbone, which is the same: there it is
    timed alone, at ``behind`` images, by which it is told from the noise of a whole step.
    """
    inserted = backbone != "vit_b_16"
    layout = torch.channels_last

    def batch_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(count, 3, size, size, device=device).to(memory_format=layout)
        return images, torch.randint(0, 10, (count,), device=device)

    images, labels = batch_of(batch)
    plain = torchvision.models.get_model(backbone, num_classes=10)
    plain.to(device=device, memory_format=layout)
    steps = {"plain": _step(plain, nn.functional.cross_entropy, images, labels)}
    networks: dict[str, nn.Module] = {"plain": plain}
    models: dict[str, InterpretableNetwork] = {}
    for method in ("std", *TIMED):
        options = inspect.signature(METHODS[method]).parameters if method in METHODS else {}
        if ("in_channels" if inserted else "channel_dim") not in options:
            continue
        target = {"num_filters": FILTERS} if inserted else {"insert_conv": False}
        model = picnn_fast.make_interpretable(backbone, method, num_classes=10, **target)
        model.to(device=device, memory_format=layout)
        model.begin_epoch(1, 1)
        steps[method] = _step(model, model.loss, images, labels)
        networks[method] = model.discriminator()
        models[method] = model
    training = harness.interleaved(steps, rounds, device, warmup=2)
    for network in networks.values():
        network.eval()

    @torch.inference_mode()
    def infer(network: nn.Module) -> None:
        network(images)

    calls = {name: functools.partial(infer, network) for name, network in networks.items()}
    inference = harness.interleaved(calls, 2 * rounds, device, warmup=2)
    entry: dict[str, Any] = {"backbone": backbone, "images": [batch, 3, size, size]}
    for phase, times in (("training", training), ("inference", inference)):
        entry[phase] = {
            "milliseconds": {name: harness.summary(values) for name, values in times.items()},
            "over_plain": {name: _ratio(times, name, "plain") for name in times if name != "plain"},
            "over_std": {
                name: _ratio(times, name, "std") for name in times if name not in ("plain", "std")
            },
        }
    for model in models.values():
        model.train()
    many = batch_of(behind)
    step = {"std": _step(models["std"], models["std"].loss, *many)}
    whole = statistics.median(harness.interleaved(step, 3, device, warmup=1)["std"])
    tails = {name: _behind(model, *many, inserted=inserted) for name, model in models.items()}
    times = harness.interleaved(tails, 5 * rounds, device, warmup=2)
    entry["behind"] = {
        "images": [behind, 3, size, size],
        "std_step_milliseconds": 1e3 * whole,
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "added_to_std": {name: _added(times, name, whole) for name in times if name != "std"},
    }
    return entry


def bench_classes(
    classes: int, batch: int, size: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Steps of ResNet-18 alone, with a target layer, and with PICNN on it."""
    torch.manual_seed(0)
    layout = torch.channels_last
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(0, classes, (batch,), device=device)
    steps = {}
    plain = torchvision.models.resnet18(num_classes=classes).to(device, memory_format=layout)
    steps["plain"] = _step(plain, nn.functional.cross_entropy, images, labels)
    for method in ("std", "picnn"):
        model = picnn_fast.make_interpretable("resnet18", method, num_classes=classes)
        model.to(device=device, memory_format=layout)
        steps[method] = _step(model, model.loss, images, labels)
    times = harness.interleaved(steps, rounds, device)
    return {
        "classes": classes,
        "filters": model.num_filters,
        "images": [batch, 3, size, size],
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "std_over_plain": _ratio(times, "std", "plain"),
        "picnn_over_std": _ratio(times, "picnn", "std"),
        "picnn_over_plain": _ratio(times, "picnn", "plain"),
    }


def bench_forms(batch: int, size: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A step of PICNN over the small residual network by layout and precision."""
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    steps = {}
    for name, (layout, half) in FORMS.items():
        torch.manual_seed(0)
        model = picnn_fast.make_interpretable("small-resnet", num_classes=10, image_channels=3)
        model.to(device=device, memory_format=layout)
        steps[name] = _step(model, model.loss, images, labels, half=half)
    times = harness.interleaved(steps, rounds, device)
    return {
        "images": [batch, 3, size, size],
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "speedup": {name: _ratio(times, "contiguous", name) for name in FORMS},
    }


TABLES = ("backbones", "classes", "forms")


def run(
    device: torch.device,
    *,
    smoke: bool,
    measure: Callable[..., AbstractContextManager[None]],
    tables: tuple[str, ...] = TABLES,
) -> dict[str, Any]:
    """All measurements of these tables, each within ``measure(results, title)``."""
    batch, size, rounds = (2, 64, 2) if smoke else (8, 224, 20)
    results: dict[str, Any] = {}
    if "backbones" in tables:
        results["backbones"] = []
        for name in ("mobilenet_v2",) if smoke else [n for n in SIZES if n in BACKBONES]:
            with measure(results, name):
                torch.manual_seed(0)
                images, times = (2, 2) if smoke else SIZES[name]
                behind = 2 if smoke else BEHIND
                if device.type == "cuda":
                    images, behind = 8 * images, 8 * behind
                entry = bench_backbone(name, images, behind, size, times, device)
                results["backbones"].append(entry)
    if "classes" in tables:
        results["classes"] = []
        for classes in CLASSES[:1] if smoke else CLASSES:
            with measure(results, f"{classes} classes"):
                results["classes"].append(bench_classes(classes, batch, size, rounds, device))
    if "forms" in tables:
        with measure(results, "layout and precision"):
            results["forms"] = bench_forms(2 if smoke else 128, 32, 2 if smoke else 15, device)
    return results


def _shown(of: dict[str, float], digits: int, unit: str) -> str:
    return f"{of['median']:.{digits}f}{unit} ({of['q1']:.{digits}f} to {of['q3']:.{digits}f})"


def _backbones_table(entries: list[dict[str, Any]], phase: str) -> str:
    rows = []
    for entry in entries:
        of = entry[phase]
        for method, ratio in of["over_plain"].items():
            over_std = of["over_std"].get(method)
            added = entry["behind"]["added_to_std"].get(method)
            rows.append(
                [
                    f"{entry['backbone']}, {entry['images'][0]} images",
                    method.upper(),
                    _shown(of["milliseconds"][method], 0, " ms"),
                    _shown(ratio, 3, "x"),
                    "" if over_std is None else _shown(over_std, 3, "x"),
                    *([] if phase != "training" else [_added_shown(added)]),
                ]
            )
    header = [phase, "method", "time", "over plain", "over STD"]
    return harness.table(header + ["added to STD"] * (phase == "training"), rows)


def _added_shown(of: dict[str, float] | None) -> str:
    return "" if of is None else "{median:+.2%} ({q1:+.2%} to {q3:+.2%})".format(**of)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    tables = []
    if results.get("backbones"):
        phases = ("training", "inference")
        tables += [_backbones_table(results["backbones"], phase) for phase in phases]
    if results.get("classes"):
        ratios = ("std_over_plain", "picnn_over_std", "picnn_over_plain")
        rows = [
            [
                f"{entry['classes']} classes, {entry['filters']} filters",
                _shown(entry["milliseconds"]["plain"], 0, " ms"),
                *(_shown(entry[name], 3, "x") for name in ratios),
            ]
            for entry in results["classes"]
        ]
        header = ["training step", "plain", "STD over plain", "PICNN over STD", "PICNN over plain"]
        tables.append(harness.table(header, rows))
    forms = results.get("forms")
    if forms is not None:
        rows = [
            [
                name,
                _shown(forms["milliseconds"][name], 0, " ms"),
                _shown(forms["speedup"][name], 2, "x"),
            ]
            for name in FORMS
        ]
        tables.append(harness.table(["layout and precision", "step", "speed-up"], rows))
    return "\n\n".join(tables)


SECTION = """
## Training steps

*Plain*: torchvision's network, in channels_last, on images of 224 pixels; *STD*: the same with the
target layer that the methods insert, 128 filters, and nothing else. A transformer has none
inserted. Inference is of the network that is deployed. Table 3 of the PICNN paper has PICNN over
STD at up to 1.010x in training and 1.046x in inference. By classes: PICNN over ResNet-18 at 8
images, with as many filters as it takes by default. *Layout and precision*: a step of PICNN over
the small residual network at 128 images of 32 pixels, as its weights lie and as it computes
(`--channels_last`, `--precision bf16-mixed`). In brackets the quartiles of the rounds. *Added to
STD*: a step of all that lies behind the backbone, which is the same for both, minus that of STD, as
a share of STD's whole step, of 32 images: it tells apart what the noise of whole steps hides.

<results: overhead-*.json>

PICNN runs the head twice, which shows in steps of few images where the head is wide, as VGG-16's.
An ICNN's first mask layer, and its loss, are of the backbone's own channels, 1,280 of MobileNetV2.

What is deployed is the network of STD, but for an ICNN's mask layers. The target layer costs what
its filters do, which by default are 12.8 a class and at most four times the backbone's channels;
`--insert_kernel 1` or fewer `--num_filters` take it down.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("overhead", __doc__.splitlines()[0], run, report, arguments, TABLES)


if __name__ == "__main__":
    main()
