"""What a training step of a whole network costs with a method, and in another layout or precision.

    python -m benchmarks.overhead [--device cpu|cuda] [--smoke]

PICNN over ResNet-18 beside the plain network, and beside STD, which is the plain network with the
same target layer inserted, for 10, 100 and 1000 classes with the default number of filters; and a
step of PICNN as it is and with channels innermost, in bfloat16, and with both.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torchvision
from torch import nn

import picnn_fast
from benchmarks import harness

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
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            value = loss(model(images), labels)
        value.backward()
        optimizer.step()

    return step


def _ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """Median and quartiles over rounds of one candidate's time over another's."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


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


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements, each within ``measure(results, title)``."""
    batch, size, rounds = (2, 32, 2) if smoke else (8, 224, 20)
    results: dict[str, Any] = {"classes": [], "forms": None}
    for classes in CLASSES[:1] if smoke else CLASSES:
        with measure(results, f"{classes} classes"):
            results["classes"].append(bench_classes(classes, batch, size, rounds, device))
    with measure(results, "layout and precision"):
        results["forms"] = bench_forms(2 if smoke else 128, 32, 2 if smoke else 15, device)
    return results


def _shown(of: dict[str, float], digits: int, unit: str) -> str:
    return f"{of['median']:.{digits}f}{unit} ({of['q1']:.{digits}f} to {of['q3']:.{digits}f})"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
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
    tables = [harness.table(header, rows)]
    forms = results["forms"]
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

PICNN over ResNet-18 at 8 images of 224 pixels, in channels_last. *Plain*: torchvision's network;
*STD*: the same with the target layer that PICNN inserts, and nothing else. Below it a step of PICNN
over the small residual network at 128 images of 32 pixels, as its weights lie and as it computes
(`--channels_last`, `--precision bf16-mixed`). In brackets the quartiles of the rounds.

<results: overhead-*.json>

The target layer costs what its filters do, which by default are 12.8 a class and at most four times
the backbone's channels; `--insert_kernel 1` or fewer `--num_filters` take it down. What PICNN adds
to it lies within the spread of the rounds.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("overhead", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
