"""What several processes change: figures, steps a second, and what they send one another.

    python -m benchmarks.scaling [--table cost|steps|equal] [--images FOLDER] [--smoke]

*equal*: the same training, of images in ``FOLDER/train/<class>`` and ``FOLDER/test/<class>``, by
one process and by ``torchrun --nproc-per-node=2`` with half of the batch each. *steps*: steps a
second and memory of 1, 2 and 4 processes on gloo, of one thread and one batch each. *cost*: bytes
and floating point operations of networks at the size of ImageNet, counted on tensors without
values, and what ring all-reduce makes of them at bandwidths that are assumed.
"""

import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import picnn_fast
from benchmarks import harness
from picnn_fast.backbones import BACKBONES, Row
from picnn_fast.losses import cross_entropy

TABLES = ("cost", "steps", "equal")
METHODS = ("std", "picnn", "csg", "icnn", "iccnn")
# Backbones, and whether a target layer is inserted, as it is by default but in tokens.
NETWORKS = (("resnet50", True), ("resnet50", False), ("vgg16", True), ("vit_b_16", False))
CLASSES, PIXELS = 1000, 224
# Assumed: bytes a second that a GPU sends and receives, within a machine of eight and between
# machines; operations a second that it sustains, and images a step.
BANDWIDTHS = {8: 300e9, 64: 50e9, 1024: 50e9}
SUSTAINED, BATCH = 200e12, 32

PROCESSES = (1, 2, 4)
# Filters and the side of their maps, images a process.
STEP_FILTERS, STEP_SIDE, STEP_BATCH = 512, 14, 32

GLOBAL_BATCH, EPOCHS = 64, 4
PER_CLASS = {"train": 100, "test": 50}
# Nothing but the order in which gradients are added up tells processes apart, or else what does.
RUNS = {
    ("std", "plain"): "",
    ("csg", "plain"): "",
    ("picnn", "plain"): "masks are drawn by each process for its own images",
    ("std", "resnet20"): "batch normalisation is over the images of a process",
}


class _Traffic(TorchDispatchMode):
    """Bytes of all that operators of ours are given and give."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "picnn_fast":
            parts = [*args, *(kwargs or {}).values(), *(out if isinstance(out, tuple) else (out,))]
            self.total += sum(part.nbytes for part in parts if isinstance(part, Tensor))
        return out


def _network(backbone: str, method: str, inserted: bool) -> Any:
    with torch.device("meta"):
        if method == "plain":
            return getattr(__import__("torchvision").models, backbone)(num_classes=CLASSES)
        return picnn_fast.make_interpretable(
            backbone, method, num_classes=CLASSES, image_channels=3, insert_conv=inserted
        )


def _step(network: Any, method: str, batch: int) -> tuple[float, float, float]:
    """Of one training step: operations, bytes through our operators, bytes kept for backward."""
    images = torch.randn(batch, 3, PIXELS, PIXELS, device="meta")
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    held = {x.untyped_storage()._cdata for x in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if method == "plain":
                loss = cross_entropy(network(images), labels).mean()
            else:
                loss = network.loss(network(images, labels), labels)
        loss.backward()
    return counter.get_total_flops(), traffic.total, sum(kept.values())


def counted(backbone: str, inserted: bool, method: str) -> dict[str, Any]:
    """Bytes and operations of a network of a method, by one image where they are of images."""
    name = backbone if inserted or method == "plain" else f"{backbone}, its own filters"
    try:
        network = _network(backbone, method, inserted)
    except ValueError as error:
        return {"backbone": name, "method": method, "not_available": str(error)}
    if method != "plain":
        network.begin_epoch(1, 1)
    parameters = {name: x.nbytes for name, x in network.named_parameters()}
    buffers = {name: x.nbytes for name, x in network.named_buffers()}
    found = {
        "backbone": name,
        "method": method,
        "filters": getattr(network, "num_filters", None),
        "parameters": sum(parameters.values()),
        "buffers": sum(buffers.values()),
        "own": {
            name: size
            for name, size in (parameters | buffers).items()
            if method != "plain" and not name.startswith(("features.", "head.")) and size >= 2**16
        },
    }
    if method != "iccnn":  # whose groups are found by values
        few, more = (_step(network, method, batch) for batch in (2, 4))
        each = [(b - a) / 2 for a, b in zip(few, more, strict=True)]
        found |= dict(zip(("operations", "traffic", "kept"), each, strict=True))
    return found


def cost(smoke: bool) -> list[dict[str, Any]]:
    """Of all networks."""
    networks, methods = (NETWORKS[2:3], METHODS[:2]) if smoke else (NETWORKS, METHODS)
    entries = [
        counted(backbone, inserted, method)
        for backbone, inserted in networks
        for method in ("plain", *methods)
    ]
    # A plain network has no target layer.
    return [x for place, x in enumerate(entries) if x not in entries[:place]]


def ring_seconds(size: float, processes: int, bandwidth: float) -> float:
    """All-reduce of so many bytes on a ring, but for its latency: each process sends and receives
    2 (n - 1) / n of them."""
    return 2 * (processes - 1) / processes * size / bandwidth


class _Wide(nn.Module):
    """A network that is little beside its target layer: a convolution to many maps."""

    def __init__(self, method: str, filters: int) -> None:
        super().__init__()
        features = nn.Sequential(nn.Conv2d(3, filters, 3, padding=1), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 100))
        self.network = picnn_fast.make_interpretable(
            (features, head), method, num_classes=100, num_filters=filters, insert_conv=False
        )
        self.network.begin_epoch(1, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.network.loss(self.network(images, labels), labels)  # type: ignore[no-any-return]


def _steps_of_rank(
    rank: int, folder: str, counts: tuple[int, ...], rounds: int, filters: int, side: int
) -> None:
    """One process of the most there are: by turns it takes steps with fewer, and with all."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=counts[-1]
    )
    found: dict[str, Any] = {}
    device = torch.device("cpu")
    for method in ("std", "picnn", "icnn"):
        steps: dict[int, Callable[[], None]] = {}
        for count in counts:
            group = distributed.new_group(list(range(count)))
            if rank < count:
                steps[count] = _stepping(method, filters, side, group)
        times: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(rounds + 1):
            for count in counts:
                distributed.barrier()
                if count in steps:
                    start = time.perf_counter()
                    steps[count]()
                    times[count].append(time.perf_counter() - start)
        memory = {}
        for count in counts:
            distributed.barrier()
            if count in steps:
                memory[count] = _extra_bytes(steps[count], device)
        distributed.barrier()
        found[method] = {
            str(count): {"seconds": statistics.median(times[count][1:]), "bytes": memory[count]}
            for count in steps
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _extra_bytes(call: Callable[[], None], device: torch.device) -> int | None:
    """``harness.extra_bytes``, after what was freed before is given back to the system."""
    if not harness.tells_memory(device):
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return harness.extra_bytes(call, device)


def _stepping(method: str, filters: int, side: int, group: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(_Wide(method, filters), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images = torch.randn(STEP_BATCH, 3, side, side)
    labels = torch.arange(STEP_BATCH) % 100

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(images, labels).backward()
        optimizer.step()

    return step


def steps(smoke: bool) -> dict[str, Any]:
    """Seconds a step of the first process, and memory beyond what it held, by their number."""
    sizes = (1, 16, 7) if smoke else (25, STEP_FILTERS, STEP_SIDE)
    counts = PROCESSES[:2] if smoke else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_steps_of_rank, (folder, counts, *sizes), nprocs=counts[-1])
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def plain(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """A backbone without batch normalisation or dropout, for images of 32 pixels."""
    layers: list[nn.Module] = []
    for before, after, stride in ((image_channels, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    return nn.Sequential(nn.Sequential(*layers), *head)


def some_images(source: Path, root: Path, per_class: dict[str, int]) -> None:
    """Copies of the first images of each class."""
    for split, count in per_class.items():
        for folder in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / split / folder.name)


def train(root: Path, output: Path, method: str, backbone: str, processes: int) -> dict[str, Any]:
    """The figures of a run of ``picnn-fast train``, by so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = {
        "method": method,
        "backbone": backbone,
        "data": "folder",
        "data.root": root,
        "data.image_size": 32,
        "data.validation": 0,
        "data.num_workers": 0,
        "batch_size": GLOBAL_BATCH // processes,
        "epochs": EPOCHS,
        "num_filters": 60,
        # Adam divides by a gradient's size, and makes as much of one that is rounding alone.
        "optimizer": "sgd",
        "optimizer.lr": 0.05,
        "optimizer.momentum": 0.9,
        "accelerator": "cpu",
        "output": output,
    }
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "benchmarks.scaling",
        "train",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + [f"--{name}={value}" for name, value in options.items()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    figures: dict[str, Any] = json.loads((output / "metrics.json").read_text())[method]
    return figures


def equal(images: Path, smoke: bool) -> list[dict[str, Any]]:
    """Each run by one process and by two, and how far apart their weights are."""
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        some_images(images, root / "images", {"train": 8, "test": 4} if smoke else PER_CLASS)
        for (method, backbone), why in [*RUNS.items()][: 1 if smoke else None]:
            figures, weights = [], []
            for processes in (1, 2):
                output = root / f"{method}-{backbone}-{processes}"
                figures.append(train(root / "images", output, method, backbone, processes))
                saved = torch.load(output / "last.ckpt", weights_only=True)["state_dict"]
                weights.append(torch.cat([x.double().flatten() for x in saved.values()]))
            apart = (weights[0] - weights[1]).abs().max() / weights[0].abs().max()
            entries.append(
                {
                    "method": method,
                    "backbone": backbone,
                    "differs": why,
                    "weights_apart": apart.item(),
                    "figures": figures,
                }
            )
    return entries


def run(
    device: torch.device,
    *,
    smoke: bool,
    measure: Callable[..., AbstractContextManager[None]],
    tables: tuple[str, ...] = ("cost", "steps"),
    images: Path | None = None,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if "cost" in tables:
        with measure(results, "bytes and operations"):
            results["cost"] = cost(smoke)
    if "steps" in tables:
        with measure(results, "steps of several processes"):
            results["steps"] = steps(smoke)
    if "equal" in tables:
        with measure(results, "training by one process and by two"):
            if images is None:
                raise ValueError("images: got none, want --images FOLDER")
            results["equal"] = equal(images, smoke)
    return results


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size else "0"


def _milliseconds(size: float, processes: int) -> str:
    return f"{1e3 * ring_seconds(size, processes, BANDWIDTHS[processes]):.2f} ms"


def cost_tables(entries: list[dict[str, Any]]) -> list[str]:
    """What networks hold and compute, and how long gradients take to add up."""
    rows, sent, own = [], [], []
    for entry in entries:
        name = f"{entry['backbone']} {entry['method'].upper()}"
        if "not_available" in entry:
            continue
        step = ["", "", ""]
        if "operations" in entry:
            step = [
                f"{entry['operations'] / 1e9:.1f} GFLOP",
                _megabytes(entry["traffic"]),
                _megabytes(entry["kept"]),
            ]
        filters = "" if entry["filters"] is None else str(entry["filters"])
        sizes = (_megabytes(entry[kind]) for kind in ("parameters", "buffers"))
        rows.append([name, filters, *sizes, *step])
        times = [_milliseconds(entry["parameters"], count) for count in BANDWIDTHS]
        work = ""
        if "operations" in entry:
            work = f"{1e3 * BATCH * entry['operations'] / SUSTAINED:.2f} ms"
        sent.append([name, *times, work])
        own += [[name, f"`{tensor}`", _megabytes(size)] for tensor, size in entry["own"].items()]
    of = "an image, forward and backward"
    header = [f"{CLASSES} classes, {PIXELS} pixels, float32", "filters", "parameters", "buffers"]
    header += [f"operations {of}", "through our operators", "kept for backward"]
    speeds = [f"{n} GPUs, {b / 1e9:g} GB/s" for n, b in BANDWIDTHS.items()]
    sent_header = ["all-reduce of the gradients", *speeds]
    sent_header += [f"{BATCH} images at {SUSTAINED / 1e12:g} TFLOP/s"]
    tables = [harness.table(header, rows), harness.table(sent_header, sent)]
    if own:
        tables.append(harness.table(["what the method adds", "tensor", "size"], own))
    return tables


def _steps_table(found: dict[str, Any]) -> str:
    rows = []
    for method, of in found.items():
        alone = of[str(PROCESSES[0])]["seconds"]
        for count, entry in of.items():
            rate = 1 / entry["seconds"]
            memory = "" if entry["bytes"] is None else f"{entry['bytes'] / 2**20:.0f} MiB"
            speed = f"{entry['seconds'] / alone:.2f}x"
            processes = "process" if count == "1" else "processes"
            rows.append([f"{method.upper()}, {count} {processes}", f"{rate:.2f}", speed, memory])
    header = [f"{STEP_BATCH} images a process, {STEP_FILTERS} maps of {STEP_SIDE} x {STEP_SIDE}"]
    header += ["steps a second", "time of a step over one process's", "memory a process"]
    return harness.table(header, rows)


def _equal_table(entries: list[dict[str, Any]]) -> str:
    names = ("acc1", "acc2", "negative_log_likelihood", "mis")

    def value(figures: dict[str, Any], name: str) -> str:
        found = figures[name]
        return f"{found:.6f}" if isinstance(found, float) else "n/a"

    rows = [
        [
            f"{entry['method'].upper()} over {entry['backbone']}, {count}",
            *(value(figures, name) for name in names),
            f"{entry['weights_apart']:.0e}" if count == "two" else "",
            "alike: " + entry["differs"] if entry["differs"] else "equal but for rounding",
        ]
        for entry in entries
        for count, figures in zip(("one process", "two"), entry["figures"], strict=True)
    ]
    header = [
        "trained and measured by",
        "ACC1",
        "ACC2",
        "NLL",
        "MIS",
        "weights apart",
        "want to be",
    ]
    return harness.table(header, rows)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    tables = cost_tables(results["cost"]) if results.get("cost") else []
    if results.get("steps"):
        tables.append(_steps_table(results["steps"]))
    if results.get("equal"):
        tables.append(_equal_table(results["equal"]))
    return "\n\n".join(tables)


SECTION = """
## What several processes change

Trained by one process, and by `torchrun --nproc-per-node=2` with half of the batch each, and
measured by as many: 1,000 training and 500 test images of CIFAR-10 (JPEG), four epochs of 64 images
a step by SGD, a network of three convolutions without batch normalisation, and ResNet-20 with it.
*Weights apart*: the greatest difference of a weight over the greatest weight. Gradients of two
processes are added up in another order; what is counted, such as the images that are right, changes
where that tips a balance, and most of all MIS, which counts neighbours. Figures of one checkpoint
are the same by one process and by two: a test holds that.

<results: scaling-equal-*.json>

Steps of several processes on gloo, of one thread and as many images each (weak scaling), by turns;
the target layer, 512 maps that one convolution makes of images of 14 pixels, is nearly all there
is. Four processes share two cores, so that a step of theirs takes twice as long at best.

<results: scaling-steps-*.json>

What is sent, kept and computed at the size of ImageNet, counted and not timed; the times of
all-reduce follow from the bytes at bandwidths that are assumed, as `docs/cost.md` derives them.
*Its own filters*: without the target layer that is inserted by default.

<results: scaling-cost-*.json>
"""


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["train"]:  # one process of ``train``
        from picnn_fast.cli import main as command

        BACKBONES["plain"] = Row(plain, layer="0")
        sys.exit(command(given))
    description = __doc__.splitlines()[0]
    harness.command_line("scaling", description, run, report, given, TABLES, images=True)


if __name__ == "__main__":
    main()
