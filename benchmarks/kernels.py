"""What the compilers make of the GPU's kernels: registers, spills and shared memory.

    python -m benchmarks.kernels [--results FOLDER]

Needs no GPU: nvcc compiles ``csrc/cuda`` by the rules of ``setup.py``, and Triton what its
launchers launch (``tests/triton_kernels/compile_for_gpu.py``), both for sm_80 (A100) and sm_90
(H100).
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import harness

NAME = "kernels"
ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("80", "90")
TYPES = {"double": "float64", "float": "float32", "BFloat16": "bfloat16", "Half": "float16"}


def setup_module() -> Any:
    """``setup.py``, without setting anything up."""
    spec = importlib.util.spec_from_file_location("picnn_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    with mock.patch("setuptools.setup"), mock.patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
    return module


def plain_names(symbols: list[str]) -> list[str]:
    """Of mangled names, each function with its template arguments alone."""
    command = ["c++filt", "--no-params", *symbols]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    noise = r"picnn_fast::|\(anonymous namespace\)::|torch::headeronly::|c10::|^void "
    return [re.sub(noise, "", line) for line in done.stdout.splitlines()]


def cuda_records(source: Path, build: Any, nvcc: str) -> Iterator[dict[str, Any]]:
    """One for each kernel of a file, argument types and architecture."""
    flags = " ".join(build.compiler_flags()["nvcc"]).replace("'", "").split()
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, *flags, f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET_VERSION}"]
    command += ["-isystem", str(include), "--resource-usage", "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-2000:]}")
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores"
        r".*?Used (\d+) registers([^\n]*)",
        done.stdout + done.stderr,
        flags=re.DOTALL,
    )
    names = plain_names([symbol for symbol, *_ in found])
    for name, (_, architecture, spilled, registers, rest) in zip(names, found, strict=True):
        kernel, _, arguments = name.partition("<")
        given = re.match(r"\w+", arguments.replace("Multiply<", "").replace("Keep<", ""))
        shared = re.search(r"(\d+) bytes smem", rest)
        yield {
            "family": source.stem,
            "kernel": kernel,
            "type": TYPES.get(given[0], "any") if given else "any",
            "architecture": architecture,
            "registers": int(registers),
            "spilled": int(spilled),
            "shared": int(shared[1]) if shared else 0,
        }


def triton_records(architecture: str) -> Iterator[dict[str, Any]]:
    """The same of Triton's."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_kernels.compile_for_gpu"]
    command += ["--capability", architecture]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"Triton's kernels do not compile:\n{done.stderr[-2000:]}")
    for record in map(json.loads, done.stdout.splitlines()):
        floating = [t for t in record["types"].values() if t in TYPES.values()]
        keys = ("family", "kernel", "registers", "spilled", "shared")
        yield {key: record[key] for key in keys} | {
            "type": floating[0] if floating else "any",
            "architecture": architecture,
        }


def summed_up(records: Iterable[dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    """A row a kernel and architecture: its registers, the most it spills by type, shared bytes."""
    kernels = defaultdict(list)
    for record in records:
        kernels[record["family"], record["kernel"], record["architecture"]].append(record)
    rows = []
    for (family, kernel, architecture), of_kernel in sorted(kernels.items()):
        registers = [record["registers"] for record in of_kernel]
        spilled: dict[str, int] = {}
        for record in of_kernel:
            if record["spilled"]:
                most = max(record["spilled"], spilled.get(record["type"], 0))
                spilled[record["type"]] = most
        rows.append(
            {
                "backend": backend,
                "family": family,
                "kernel": kernel,
                "architecture": f"sm_{architecture}",
                "variants": len(of_kernel),
                "registers": [min(registers), max(registers)],
                "spilled": spilled,
                "shared": max(record["shared"] for record in of_kernel),
            }
        )
    return rows


def measure() -> dict[str, Any]:
    """Rows of all kernels, and the compilers' versions."""
    import triton

    build = setup_module()
    with mock.patch.dict(os.environ, {"PICNN_FAST_CUDA": "1"}):
        nvcc, _ = build.find_nvcc()
    cuda: list[dict[str, Any]] = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        print(source.name, flush=True)
        cuda += cuda_records(source, build, nvcc)
    rows = summed_up(cuda, "CUDA")
    for architecture in ARCHITECTURES:
        print(f"Triton for sm_{architecture}", flush=True)
        rows += summed_up(triton_records(architecture), "Triton")
    version = re.search(r"V([\d.]+)", build.version_line([nvcc]))
    assert version is not None
    return {"compilers": {"nvcc": version[1], "triton": triton.__version__}, "kernels": rows}


def report(results: dict[str, Any]) -> str:
    """A table: what differs between the two architectures is divided by a stroke."""
    pairs: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results["kernels"]:
        pairs[row["backend"], row["family"], row["kernel"]][row["architecture"]] = row

    def spills(row: dict[str, Any]) -> str:
        return ", ".join(f"{bytes_} ({kind})" for kind, bytes_ in row["spilled"].items()) or "0"

    def registers(row: dict[str, Any]) -> str:
        least, most = row["registers"]
        return f"{least} to {most}" if least < most else str(most)

    rows = []
    for (backend, family, kernel), by_architecture in pairs.items():
        both = list(by_architecture.values())
        cells = []
        for cell in (registers, spills, lambda row: str(row["shared"])):
            values = [cell(row) for row in both]
            cells.append(values[0] if len(set(values)) == 1 else " / ".join(values))
        rows.append([backend, family, f"`{kernel}`", str(both[-1]["variants"]), *cells])
    compilers = results["compilers"]
    header = ["backend", "family", "kernel", "variants", "registers", "bytes spilled", "shared"]
    return f"nvcc {compilers['nvcc']}, Triton {compilers['triton']}, sm_80 / sm_90:\n\n" + (
        harness.table(header, rows)
    )


SECTION = """
## What the compilers make of the GPU's kernels

No GPU has run them yet. Registers of a thread, the bytes of it that a kernel spills into memory by
the type of its maps, and the shared memory, in bytes, that the compiler gives a block: of CUDA what
its kernels declare, beside what they ask for at their launch. A kernel has as many variants as
there are types, vector widths and tiles of it.

<results: kernels.json>

### What to try first on a Hopper

Estimated from instructions counted in the machine code and from the device's data sheet (an H100:
132 multiprocessors, 3 TB/s, 1.7 GHz), by what it might be worth; `make gpu` says first what is so.

| what | why | estimate |
|------|-----|----------|
| `filter_loss` by `wgmma`, bfloat16 first: templates are the rows, in shared memory, samples the columns | 358 instructions for 48 of `mma.sync`: a warp issues, tensor cores wait at about half their rate; templates of 14 x 14 in two bfloat16 parts take 154 KB | bfloat16 7 to 11 times the two products now, 2 to 3 then; float32 by TF32 2 times now, 1.3 then |
| `filter_loss`, a loop for each number of tiles of columns, in place of one that may end at any | 310 instructions for the 48 of `mma.sync` (bfloat16 230 in place of 233), the sums the same; but sm_80 spills 128 bytes more, and there is 1.6 times the code | 13 % of the products on an H100, less on an A100 |
| `filter_loss`, low parts of templates in an array of their own | 296 of the 310: registers are filled in place, not moved; but what spills is loaded 77 times in place of 7 | 4 % of the products |
| `filter_loss`, responses of bfloat16 maps with templates in three bfloat16 parts (`m16n8k16`) | three products where four are made now, and half the sums outside; offsets are then looked up in pairs, and sums have other bits | 1.5 times the responses, half of the work |
| classes x bins of 11,000 to 55,000: samples sorted by their labels (`count_sorted`), as beyond that, against one block a multiprocessor that reads once | sorting costs a second reading and four launches, and leaves room for two blocks | 45 % of the bandwidth against 40 % |
| beyond that a cluster of 8 blocks that counts in each other's shared memory | 1.6 MB of counters in one reading; sorted samples are read twice, and every counter once: 250 µs for 50,000 x 512 of 1,000 classes in 64 bins, where an atomic an activation would take 600 | 150 µs |
| the gradient of soft counts from samples sorted by their labels (`soft_backward_sorted`) against one that looks its two slopes up in memory (`soft_backward`); and from how many samples on | an activation asks for two pieces of 32 bytes, of a table larger than the L2: 1.2 GB for 50,000 x 512 of 1,000 classes in 64 bins, where table, maps and gradient are 340 MB; 33 instructions a value and 50 a slope, four launches to sort | 150 µs in place of 400 |
| the same of activations whose samples lie side by side | sorted samples would take 32 bytes for each of their 4: they look slopes up still. Of each class a tile of samples brought in order in shared memory | 400 µs now, 200 then |
| Triton's counts beyond a cache's 32 MB (`CACHE`): sorted samples, half a tile a program, so that those that run at a time have few classes, against samples as they come | the same atomics, but a counter is in the L2 when it is added to: 0.7 GB from memory in place of 1.4; sorting int64 takes eight passes | hard counts 300 µs in place of 600, soft counts 500 in place of 1,200, their gradient 300 in place of 400 |
| Triton's counts of a class by comparing its samples with every bin, in registers, without atomics | 64 comparisons and additions an activation, 115 µs; but counters of one class lie 8 bytes in each piece of 32 | 250 µs, if a program takes four classes |
| `template_mask` of 7 x 7 maps by bulk copies (`cp.async.bulk`) of 16 maps into shared memory | 196 bytes a map are not aligned for vectors; 75 instructions for each value of a lane are left | 60 % of the bandwidth now, 80 % then |
| `count_tiles` with two blocks a multiprocessor against three | three spilled up to 216 bytes a thread, two none; which hides more of the memory's time only a device says | 55 to 65 % either way |
| CUDA graphs of a training step (`torch.compile(mode="reduce-overhead")`) | a launch takes 3 to 5 µs of the host, a PICNN's step at small batches some 20 of ours | 0.1 ms a step |
| TMA for the masking family | none: its reads are of whole lines already, and each element is touched once | 0 |
"""  # noqa: E501


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0]
    )
    harness.add_results_option(parser)
    options = parser.parse_args(arguments)
    options.smoke = False
    folder = harness.results_folder(options)
    record = harness.Record(folder, NAME, command="python -m benchmarks.kernels")
    results = measure()
    record.save(results, complete=True)
    print(report(results))


if __name__ == "__main__":
    main()
