"""How much of a training step is spent waiting for images.

    python -m benchmarks.loading [--device cpu|cuda] [--table training|alone] [--smoke]

Photographs (drawn noise, as large as photographs in JPEG) in class folders, cropped at random to
224 pixels and flipped, are read by two processes: by torchvision's ``ImageFolder`` in PyTorch's
loader, which sends normalised float32; by ``--data folder`` as it decodes them anew each epoch; and
as it takes them from memory once they were decoded. Epochs take turns; the first of each is not
timed. An image is waited for from when a batch is asked for until it is normalised on the device.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import picnn_fast
from benchmarks import harness
from picnn_fast.data import ImageFolderDataModule
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD

WORKERS = 2
BATCHES = {"resnet18": 16, "small-cnn": 32}  # images a step on a CPU, on a GPU eight times as many
SIZES = {(500, 375): 256, (2000, 1500): 64}  # pixels of photographs, and how many of them
BEFORE, DECODING, KEPT = "torchvision", "picnn_fast, decoding", "picnn_fast, from memory"
TABLES = ("training", "alone")

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def write_photographs(root: Path, size: tuple[int, int], count: int) -> None:
    """``root/train/<class>/*.jpg`` and a few to test on, of two classes."""
    random = np.random.default_rng(0)
    width, height = size
    for split, images in (("train", count), ("test", 4)):
        for index in range(images):
            layers = []
            for scale in (4, 16, 64, 256):  # as bright on every scale, as photographs are
                small = random.normal(128, 40, (height // scale + 2, width // scale + 2, 3))
                layer = Image.fromarray(small.clip(0, 255).astype(np.uint8))
                layers.append(np.asarray(layer.resize(size, Image.Resampling.BICUBIC), np.float32))
            pixels = 128 + sum(layer - 128 for layer in layers)
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shown = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            shown.save(folder / f"{index}.jpg", quality=90)


def candidates(root: Path, batch: int, pixels: int, device: torch.device) -> dict[str, Batches]:
    """An epoch of each loader, with images as a network takes them."""
    changes = [
        v2.RandomResizedCrop(pixels, scale=(0.5, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    plain = DataLoader(
        ImageFolder(root / "train", v2.Compose(changes)),
        batch,
        shuffle=True,
        num_workers=WORKERS,
        pin_memory=device.type == "cuda",
    )

    def torchvision_epoch() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in plain:
            yield images.to(device, non_blocking=True), labels.to(device)

    def own_epoch(cache: float | None) -> Batches:
        data = ImageFolderDataModule(
            root, batch, image_size=pixels, validation=0, num_workers=WORKERS, cache=cache
        )
        loader = data.train_dataloader()
        epochs = iter(range(2**31))

        def epoch() -> Iterator[tuple[Tensor, Tensor]]:
            loader.sampler.set_epoch(next(epochs))  # type: ignore[attr-defined]
            for images, labels in loader:
                yield data.as_taken(images, labels, device)

        return epoch

    return {BEFORE: torchvision_epoch, DECODING: own_epoch(0.0), KEPT: own_epoch(None)}


def timed(batches: Batches, step: Callable[[Tensor, Tensor], None], device: torch.device) -> Any:
    """Images a second of an epoch, and the share of it that was spent waiting for them."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    waited, count, iterator = 0.0, 0, None
    while True:
        asked = now()
        iterator = batches() if iterator is None else iterator
        pair = next(iterator, None)
        waited += now() - asked
        if pair is None:
            break
        step(*pair)
        count += len(pair[1])
    whole = now() - start
    return count / whole, waited / whole


def in_turn(
    epochs: dict[str, Batches],
    step: Callable[[Tensor, Tensor], None],
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Medians over rounds of what ``timed`` tells of each candidate."""
    harness.keep_freed_memory()
    seen: dict[str, list[Any]] = {name: [] for name in epochs}
    for index in range(rounds + 1):
        for name, batches in epochs.items():
            measured = timed(batches, step, device)
            if index > 0:  # the first one fills the memory
                seen[name].append(measured)
    return {
        name: {
            "images_per_second": statistics.median(rate for rate, _ in values),
            "waiting": statistics.median(share for _, share in values),
        }
        for name, values in seen.items()
    }


def train_step(name: str, pixels: int, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A step of PICNN over a backbone."""
    torch.manual_seed(0)
    model = picnn_fast.make_interpretable(name, "picnn", num_classes=2, image_channels=3)
    model(torch.zeros(2, 3, pixels, pixels))  # the small network's last layer goes by it
    model.to(memory_format=torch.channels_last).to(device)
    model.begin_epoch(1, 1)
    optimizer = torch.optim.SGD(model.parameter_groups(1e-3))

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(model(images, labels), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # labels are of noise
        optimizer.step()

    return step


def run(
    device: torch.device,
    *,
    smoke: bool,
    measure: Callable[..., AbstractContextManager[None]],
    tables: tuple[str, ...] = TABLES,
) -> dict[str, Any]:
    """All measurements of these tables, each within ``measure(results, title)``."""
    results: dict[str, Any] = {table: [] for table in tables}
    pixels, rounds = (64, 1) if smoke else (224, 5)
    for size, count in ({(80, 70): 8} if smoke else SIZES).items():
        with tempfile.TemporaryDirectory() as folder:
            root, shown = Path(folder), f"{size[0]} x {size[1]}"
            write_photographs(root, size, count)
            if "alone" in tables:
                with measure(results, f"loader alone, {shown}"):
                    epochs = candidates(root, 16, pixels, device)
                    loaders = in_turn(epochs, lambda images, labels: None, rounds, device)
                    results["alone"].append({"photographs": shown, "loaders": loaders})
            for name, batch in ({"small-cnn": 4} if smoke else BATCHES).items():
                if "training" not in tables or size == (2000, 1500):
                    continue
                with measure(results, f"training {name}"):
                    batch *= 8 if device.type == "cuda" else 1
                    epochs = candidates(root, batch, pixels, device)
                    loaders = in_turn(epochs, train_step(name, pixels, device), rounds, device)
                    entry = {"backbone": name, "batch": batch, "photographs": shown}
                    results["training"].append({**entry, "loaders": loaders})
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    tables = []
    if results.get("training"):
        rows = [
            [
                f"{entry['backbone']}, {entry['batch']} images",
                loader,
                f"{of['images_per_second']:.1f}",
                f"{of['waiting']:.1%}",
            ]
            for entry in results["training"]
            for loader, of in entry["loaders"].items()
        ]
        header = ["training step", "images by", "images a second", "spent waiting"]
        tables.append(harness.table(header, rows))
    if results.get("alone"):
        rows = [
            [entry["photographs"], *(f"{of['images_per_second']:.0f}" for of in loaders.values())]
            for entry in results["alone"]
            for loaders in (entry["loaders"],)
        ]
        header = ["loader alone, images a second", BEFORE, DECODING, KEPT]
        tables.append(harness.table(header, rows))
    return "\n\n".join(tables)


SECTION = """
## What a step waits for images

PICNN over ResNet-18 and over a small network, on JPEG photographs of 500 x 375 in class folders,
cropped at random to 224 pixels and flipped, which two processes read. *torchvision*: its
`ImageFolder` in PyTorch's loader, which sends normalised float32; *picnn_fast, decoding*: `--data
folder` with `--data.cache 0`, which sends bytes, by processes that live on from epoch to epoch;
*from memory*: as it is by default, from the second epoch on. On a CPU the processes that read take
their share of the cores from the step, also from one that waits for nothing: images a second tell.

<results: loading-*.json>

Photographs with twice the pixels that are needed or more are decoded at a half of their size, or
less. What does not fit a quarter of the memory that is free is decoded each epoch.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("loading", __doc__.splitlines()[0], run, report, arguments, TABLES)


if __name__ == "__main__":
    main()
