"""Compiles CUDA files for the CPU (see cuda_on_cpu.h) and loads their operators."""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import picnn_fast  # noqa: F401  (defines the operators' schemas)

HERE = Path(__file__).parent
# Elsewhere where a test is asked whether it notices that something was taken out: barriers.py.
CSRC = Path(os.environ.get("PICNN_FAST_FIBRE_SOURCES") or HERE.parent.parent / "csrc")
HEADER = HERE / "cuda_on_cpu.h"
LIBRARY = "picnn_fast_fibres"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g0",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-extern-tls-init",  # shared memory needs no constructors
    "-fno-gnu-unique",  # an executor for each library, which poisons that library's shared memory
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)

_library: torch.library.Library | None = None


def compiler() -> list[str] | None:
    """The words of the C++ compiler's command, None where there is none."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    return words if shutil.which(words[0]) else None


def included(source: Path) -> list[Path]:
    """A file and all of ours that it includes, each once."""
    files, waiting = [], [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file in files:
            continue
        files.append(file)
        for name in re.findall(r'^#include "(.+)"', file.read_text(), flags=re.MULTILINE):
            found = [folder / name for folder in (file.parent, CSRC / "cuda")]
            waiting += [path.resolve() for path in found if path.exists()][:1]
    return sorted(files)


def build(source: Path, extra_flags: Sequence[str] = (), *, wait: bool = True) -> Path | None:
    """Compile one CUDA file to a shared library, once for each state of the sources.

    Returns:
        The library; None where another process is at it, unless ``wait``.

    Raises:
        RuntimeError: no compiler, or it fails; the message holds its output.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler: g++ is not on PATH")
    torch_folder = Path(torch.__file__).parent
    command = [*found, *FLAGS, *extra_flags, "-include", str(HEADER)]
    command += ["-isystem", str(torch_folder / "include"), "-I", str(CSRC / "cuda")]
    command += ["-x", "c++", str(source), "-L", str(torch_folder / "lib"), "-ltorch_cpu"]
    flags = (found, FLAGS, tuple(extra_flags), torch.__version__)
    digest = hashlib.sha256(repr(flags).encode())
    for file in (HEADER, *included(source)):
        digest.update(file.read_bytes())
    # In the source tree: what is loaded here nobody else may have put there.
    cache = HERE.parent.parent / "build" / "cuda_on_cpu"
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{source.stem}_{digest.hexdigest()[:20]}.so"
    with target.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if not target.exists():
            # Renamed when it is whole: a process that is killed leaves none.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                partial = Path(scratch) / target.name
                done = subprocess.run(
                    [*command, "-o", str(partial)], capture_output=True, text=True, check=False
                )
                if done.returncode != 0:
                    raise RuntimeError(
                        f"{source.name} does not compile for the CPU:\n{done.stderr}"
                    )
                partial.replace(target)
    return target


def launches(family: str) -> int:
    """Of kernels of ``csrc/cuda/<family>.cu``, since its library was loaded."""
    library = ctypes.CDLL(str(build(CSRC / "cuda" / f"{family}.cu")))
    count: int = library.cuda_on_cpu_launches()
    return count


@functools.cache
def load() -> dict[str, Callable[..., Any]]:
    """Every operator that a file in csrc/cuda implements, run by fibres on CPU tensors.

    Returns:
        Operator name to callable, for ``picnn_fast.backends.override_kernels``.
    """
    global _library
    _library = torch.library.Library(LIBRARY, "DEF")
    from picnn_fast import backends

    for name in backends.operators():
        schema = getattr(torch.ops.picnn_fast, name).default._schema
        _library.define(str(schema).removeprefix("picnn_fast::"))
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    # Processes that begin at once share the work: each passes over what another is at.
    for source in sources:
        build(source, wait=False)
    for source in sources:
        torch.ops.load_library(str(build(source)))
    return {
        name: getattr(torch.ops.picnn_fast_fibres, name)
        for name in backends.operators()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY}::{name}", "CPU")
    }
