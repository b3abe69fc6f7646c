"""Shared by every benchmark: candidates timed in turn in one run, medians, one results file.

All figures are ratios of medians taken side by side: round by round every candidate runs once,
so that whatever else the machine does falls on all of them alike.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import picnn_fast
from picnn_fast.training.provenance import processor

RESULTS = Path(__file__).parent / "results"
VARIABLE = "PICNN_FAST_RESULTS"


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as caching allocators do.

    Else it returns large blocks to the system, and the page faults of getting them back fall on
    whichever candidate happens to allocate next: up to ten times the cost of what is measured.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1)):
            raise RuntimeError("mallopt refused to keep freed memory")


# A sleep on the device hides the launches of the call that is timed; longer ones hide nothing more.
LONGEST_SLEEP_SECONDS = 0.02


def sleep_cycles(host_seconds: float, cycles_per_second: float) -> int:
    """Cycles the device sleeps before a call whose launches took ``host_seconds``: 1.5 times that,
    but no longer than ``LONGEST_SLEEP_SECONDS``."""
    return int(min(1.5 * host_seconds, LONGEST_SLEEP_SECONDS) * cycles_per_second)


@functools.cache
def clock_rate(device: torch.device) -> float:
    """Cycles the device counts a second, as a sleep of known length measures it."""
    cycles = 20_000_000
    seconds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return cycles / statistics.median(seconds)


def _launched(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the host that one call takes: on a GPU, to launch it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wall(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until all that one call does is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _events(call: Callable[[], Any], cycles: int) -> float:
    """Seconds a GPU works for one call, its launches hidden behind a sleep of ``cycles``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class Effort(NamedTuple):
    """How thoroughly a family measures.

    ``wall``: compiled and Triton kernels by the host's clock as well; ``compiler``: the backend of
    torch.compile.
    """

    rounds: int
    wall: bool = False
    compiler: str = "inductor"

    @classmethod
    def of(cls, rounds: int, device: torch.device, *, smoke: bool) -> "Effort":
        """``rounds`` on ``device``; two, as Dynamo alone traces them, for ``smoke``."""
        return cls(2, True, "eager") if smoke else cls(rounds, device.type == "cuda")


def _error_line(error: Exception) -> str:
    """Type and first line of the message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# Candidates that failed since ``Record.measure`` began, and why.
_failed_candidates: dict[str, str] = {}


def interleaved(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    warmup: int | None = None,
    backends: dict[str, str] | None = None,
    wall: bool = False,
    shuffled: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` for each candidate, taken in turn; shows its progress.

    ``warmup``: rounds before these; default 3, or fewer than ``rounds`` where these are few.
    On a GPU those of the device, or with ``wall`` those of the host until the device is done.
    ``backends`` forces one for the candidates it names; switching is not timed. A candidate that
    fails is given up, all its times are NaN, and the record names it; the others go on.
    ``shuffled``: each round in another order, the same in every run, so that no candidate always
    finds in the caches the code that one like it has left there.
    """
    keep_freed_memory()
    order, generator = list(candidates), random.Random(0)
    warmup = min(3, rounds - 1) if warmup is None else warmup
    events = device.type == "cuda" and not wall
    host = dict.fromkeys(candidates, LONGEST_SLEEP_SECONDS)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    failed: dict[str, str] = {}
    for index in range(warmup + rounds):
        if shuffled:
            generator.shuffle(order)
        for name in order:
            call = candidates[name]
            if name in failed:
                continue
            backend = (backends or {}).get(name)
            try:
                with picnn_fast.use_backend(backend) if backend else contextlib.nullcontext():
                    if index < warmup:
                        host[name] = _launched(call, device)
                    elif events:
                        cycles = sleep_cycles(host[name], clock_rate(device))
                        times[name].append(_events(call, cycles))
                    else:
                        times[name].append(_wall(call, device))
            except Exception as error:
                traceback.print_exc()
                failed[name] = _error_line(error)
                times[name] = [math.nan] * rounds
        if sys.stderr.isatty():
            print(f"\r  round {index + 1}/{warmup + rounds} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    _failed_candidates.update(failed)
    return times


TRITON = ", triton"


def beside_triton(
    candidates: dict[str, Callable[[], Any]], names: tuple[str, ...], device: torch.device
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """``candidates`` with those of ``names`` on Triton's kernels too, and the backends to force.

    Nothing is added where Triton has no kernels for ``device``, a CPU that is not interpreting, nor
    where compiled kernels are missing: Triton's, or the reference, then serve all.
    """
    serves = device.type == "cuda" or not torch.cuda.is_available()
    both = {"triton", "cuda" if device.type == "cuda" else "cpp"}
    if not serves or not both <= set(picnn_fast.available_backends()):
        return candidates, {}
    added = {name + TRITON: candidates[name] for name in names}
    return candidates | added, dict.fromkeys(added, "triton")


def triton_ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """``{"triton_over_compiled": {name: ratio of times}}``, or empty."""
    names = [name for name in times if name + TRITON in times]
    ratios = {name: ratio(times, name + TRITON, name) for name in names}
    return {"triton_over_compiled": ratios} if ratios else {}


def wall_times(
    candidates: dict[str, Callable[[], Any]],
    names: tuple[str, ...],
    effort: Effort,
    device: torch.device,
    backends: dict[str, str],
) -> dict[str, Any]:
    """``{"wall": …}``: ``names``, and Triton beside them, by the host's clock until the device is
    done, of which the launches are part; empty where ``effort`` does without."""
    if not effort.wall:
        return {}
    timed = {n: call for n, call in candidates.items() if n.removesuffix(TRITON) in names}
    times = interleaved(timed, effort.rounds, device, backends=backends, wall=True)
    return {"wall": {"milliseconds": {name: summary(values) for name, values in times.items()}}}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {name: value * 1e3 for name, value in (("median", middle), ("q1", low), ("q3", high))}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of one candidate's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def copies(maps: Callable[[], Tensor], sets: int) -> Callable[[], Tensor]:
    """Copies the next maps into the next of ``sets`` others: what memory allows at this size.

    ``clone()`` is no measure of it: in some processes its destination is what another candidate has
    just freed, and still in the caches.
    """
    targets = itertools.cycle([torch.empty_like(maps()) for _ in range(sets)])
    return lambda: next(targets).copy_(maps())


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """What the operator's kernel returns; nothing is recorded."""
    key = torch._C.DispatchKey.AutogradFunctionality
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
    try:
        return operator(*arguments)
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)


def _resident(field: str) -> int:
    """Bytes of this process: "VmRSS", resident now; "VmHWM", the most there has been."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def tells_memory(device: torch.device) -> bool:
    """Whether ``extra_bytes`` can be had: on a GPU, and on the CPU under Linux."""
    return device.type == "cuda" or Path("/proc/self/clear_refs").exists()


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Memory that a call takes at its peak, beyond what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # The kernel's own mark of the peak starts afresh from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def training_step(
    method: str,
    backbone: str,
    num_filters: int,
    batch: int,
    size: int,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """A whole training step of a method over STD's, the same network without it."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), device=device)
    steps: dict[str, Callable[[], None]] = {}
    for name in ("std", method):
        torch.manual_seed(0)
        model = picnn_fast.make_interpretable(
            backbone, name, num_classes=10, num_filters=num_filters, image_channels=3
        )
        model.to(device=device, memory_format=layout)
        optimizer = torch.optim.SGD(model.parameter_groups(1e-3))

        def step(model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(model(images), labels)
            loss.backward()
            optimizer.step()

        steps[name] = step
    times = interleaved(steps, rounds, device)
    return {
        "method": method,
        "backbone": backbone,
        "images": [batch, 3, size, size],
        "precision": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "milliseconds": {name: summary(values) for name, values in times.items()},
        "overhead": ratio(times, method, "std") - 1,
    }


def missing_backends() -> dict[str, str]:
    """Backends that cannot serve here, and why."""
    return {name: why for name, why in picnn_fast.build_info()["backends"].items() if why}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "picnn_fast": picnn_fast.__version__,
        "extension": picnn_fast.build_info()["extension"],
        "missing": missing_backends(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    return facts


def machine_name(device: torch.device) -> str:
    """Short name of the machine for the results file, e.g. "amd-epyc-2-cores"."""
    facts = machine(device)
    name = facts["gpu"] if device.type == "cuda" else f"{facts['processor']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """``<folder>/<name>.json``, replaced in one step."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def add_results_option(parser: argparse.ArgumentParser) -> None:
    """``--results FOLDER``."""
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help=f"where results go; default: {VARIABLE}, else benchmarks/results",
    )


def results_folder(options: argparse.Namespace) -> Path | None:
    """Where results go; None, nowhere: a smoke run that names no folder."""
    if options.results is None and options.smoke:
        return None
    return options.results or Path(os.environ.get(VARIABLE) or RESULTS)


class Record:
    """A results file, written anew after every measurement, so that what ends early loses little.

    It says ``"complete": false`` until the last one. ``errors``: what failed, and why; figures
    that want for it are NaN.
    """

    def __init__(self, folder: Path | None, name: str, **head: Any) -> None:
        self.folder, self.name, self.head = folder, name, head
        self.errors: dict[str, str] = {}

    @contextlib.contextmanager
    def measure(self, results: dict[str, Any], title: str) -> Iterator[None]:
        """One measurement, which adds to ``results``: an error in it costs no other."""
        print(title, flush=True)
        _failed_candidates.clear()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors[title] = _error_line(error)
        self.errors |= {f"{title}, {name}": why for name, why in _failed_candidates.items()}
        self.save(results)

    def save(self, results: dict[str, Any], *, complete: bool = False) -> Path | None:
        """Write ``results``, those there are so far; without a folder, do nothing."""
        if self.folder is None:
            return None
        state: dict[str, Any] = {} if complete else {"complete": False}
        if self.errors:
            state["errors"] = self.errors
        return write_json(self.folder, self.name, {**self.head, **state, **results})


def command_line(
    family: str,
    description: str,
    run: Callable[..., dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    arguments: list[str] | None,
    tables: tuple[str, ...] = (),
    images: bool = False,
) -> None:
    """``python -m benchmarks.<family>``: ``run(device, smoke=…, measure=…)``, report, results file.

    ``measure(results, title)`` is ``Record.measure``. ``tables``: those that can be measured alone,
    which ``run`` takes as ``tables=(name,)``, into a file of their own. ``images``: whether there
    is an option of a folder of images, which ``run`` takes as ``images=path``. Exits with status 1
    if a measurement failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{family}", description=description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, written only where --results says"
    )
    if tables:
        parser.add_argument("--table", choices=tables, help="measure this one alone")
    if images:
        parser.add_argument("--images", type=Path, metavar="FOLDER", help="of train and test")
    add_results_option(parser)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    command = f"python -m benchmarks.{family} --device {options.device}"
    name = family
    which: dict[str, Any] = {}
    if images and options.images is not None:
        command += " --images FOLDER"  # wherever it lies
        which["images"] = options.images
    if tables and options.table is not None:
        command += f" --table {options.table}"
        name = f"{family}-{options.table}"
        which["tables"] = (options.table,)
    record = Record(
        results_folder(options),
        f"{name}-{machine_name(device)}",
        command=command,
        machine=machine(device),
    )
    results = run(device, smoke=options.smoke, measure=record.measure, **which)
    path = record.save(results, complete=True)
    print(report(results))
    if path is not None:
        print(f"\nwritten to {path}")
    if record.errors:
        sys.exit("\n".join(f"failed: {title}: {why}" for title, why in record.errors.items()))


def triton_tables(title: str, entries: list[dict[str, Any]]) -> list[str]:
    """Triton's time over the compiled kernels', and the wall times of both, as tables; none where
    they were not taken."""
    tables = []
    ratios = [entry for entry in entries if "triton_over_compiled" in entry]
    if ratios:
        names = list(ratios[0]["triton_over_compiled"])
        rows = [
            [_shape(entry), *(f"{entry['triton_over_compiled'][name]:.2f}x" for name in names)]
            for entry in ratios
        ]
        tables.append(table([f"{title}, Triton over compiled", *names], rows))
    walls = [entry for entry in entries if "wall" in entry]
    if walls:
        names = list(walls[0]["wall"]["milliseconds"])
        rows = [
            [
                _shape(entry),
                *(f"{entry['wall']['milliseconds'][name]['median']:.2f} ms" for name in names),
            ]
            for entry in walls
        ]
        tables.append(table([f"{title}, wall time", *names], rows))
    return tables


def _shape(entry: dict[str, Any]) -> str:
    return str(entry["shape"]) + (f" K={entry['classes']}" if "classes" in entry else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def floors(entry: dict[str, Any]) -> list[str]:
    """What no operator undercuts: clones in its place, of their own limit, and an empty call."""
    if "clones_of_limit" not in entry:
        return []  # of an older version
    call = entry["milliseconds"]["call"]["median"]
    return [f"{entry['clones_of_limit']:.0%}", f"{call:.2f} ms"]


def floor_names(entries: list[dict[str, Any]]) -> list[str]:
    """The heads of these columns, where there are any."""
    return ["clones", "a call"] if any(map(floors, entries)) else []


def step_table(step: dict[str, Any] | None) -> list[str]:
    """What ``training_step`` measured, a Markdown table; none where it failed."""
    if step is None:
        return []
    method = step["method"]

    def time(name: str) -> str:
        of = step["milliseconds"][name]
        return f"{of['median']:.1f} ms ({of['q1']:.1f} to {of['q3']:.1f})"

    row = [
        f"{step['backbone']} {step['images']} {step['precision']}",
        time("std"),
        time(method),
        f"{1 + step['overhead']:.3f}x",
    ]
    return [table(["training step", "STD", method.upper(), f"{method.upper()} over STD"], [row])]
