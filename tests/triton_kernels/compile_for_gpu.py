"""Compiles Triton kernels for a GPU that need not be there; prints a line of JSON for each.

    python -m tests.triton_kernels.compile_for_gpu [--capability 90] [--one_shape] [FAMILY ...]

What is compiled is what would be launched: every operator runs on tensors without data ("meta"), in
each type of its case in ``tests/ops/cases.py`` and float32 in several layouts, and in place of its
launches kernels are compiled for the types, constants and options that they are given.
TRITON_INTERPRET must be unset: the interpreter replaces the compiler when a kernel is decorated.
"""

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.ops.cases import CASES, OperatorCase

# As large as is usual, where tiles depend on it; elsewhere the size of the case that threads share.
SHAPES = {
    "filter_loss": [(64, 8, 14, 14)],
    "templates": [(2, 64, 14, 14), (2, 64, 56, 56)],
    "correlation": [(2, 40, 70, 70), (9, 300, 7, 7)],
    "histogram": [(4096, 64, 16, 10), (1000, 8, 64, 200), (8192, 528, 64, 250)],
}
LAYOUTS = ("contiguous", "channels_last", "transposed")
FAR = 2**31  # from sample to sample: strides then have 64 bits


class Device:
    """Stands in for the driver of a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def without_data(value: Any, far: bool) -> Any:
    """A tensor's shape and strides alone; ``far``: with samples very far from each other."""
    if not isinstance(value, Tensor):
        return value
    strides = (FAR, *value.stride()[1:]) if far else value.stride()
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device="meta")


def calls(case: OperatorCase, shapes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Arguments of each call of the case's operator."""
    for shape in shapes:
        for dtype in case.dtypes:
            layouts = [name for name in LAYOUTS if name in case.layouts]
            for layout in layouts if dtype == case.dtypes[0] else layouts[:1]:
                arguments = case.arguments(shape, layout, dtype)
                yield tuple(without_data(value, False) for value in arguments)
    arguments = case.arguments(shapes[0])
    yield tuple(without_data(v, i in case.maps) for i, v in enumerate(arguments))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of those that did not fit and lie in memory instead."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dumped(what: str) -> str:
            command = [str(tool), f"--dump-{what}", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        found = dict(re.findall(r"(REG|STACK):(\d+)", dumped("resource-usage")))
        spilled = int(found["STACK"])
        # What a thread has on its stack is not spilled where nothing is ever stored there.
        if spilled and not re.search(r"\bSTL\b", dumped("sass")):
            spilled = 0
    return {"registers": int(found["REG"]), "spilled": spilled}


def compiled_instead(run: Callable[..., Any], family: str) -> Callable[..., Any]:
    """What takes the place of ``JITFunction.run``: compiles, and prints what came of it."""
    seen: set[str] = set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = inspect.signature(kernel.fn).bind_partial(
            *args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names}
        )
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        types = {k: str(v.dtype)[6:] for k, v in given.arguments.items() if isinstance(v, Tensor)}
        constants = {p.name: given.arguments[p.name] for p in kernel.params if p.is_constexpr}
        record = {
            "family": family,
            "kernel": kernel.fn.__name__,
            "types": types,
            "constants": constants,
            "warps": compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
            "fused": compiled.asm["ptx"].count("fma."),
            **resources(compiled.asm["cubin"]),
        }
        print(json.dumps(record), flush=True)

    return compile_only


def main(families: Sequence[str], capability: int, most_shapes: int | None) -> None:
    driver.set_active(Device(capability))
    run = triton.JITFunction.run
    for case in CASES:
        if families and case.family not in families:
            continue
        module = importlib.import_module(f"picnn_fast.triton_kernels.{case.family}")
        operator = getattr(module, case.name, None)
        if operator is None:  # PyTorch's own operators serve it
            continue
        triton.JITFunction.run = compiled_instead(run, case.family)
        for arguments in calls(case, SHAPES.get(case.family, [case.many])[:most_shapes]):
            operator(*arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--capability", type=int, default=90, help="80 is an A100, 90 an H100")
    parser.add_argument("--one_shape", action="store_true", help="maps of one size a family")
    options = parser.parse_args()
    main(options.families, options.capability, 1 if options.one_shape else None)
    sys.exit(0)
