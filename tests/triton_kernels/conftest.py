"""What the compiler makes of every family's kernels, for all their tests."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import HAS_GPU
from tests.triton_kernels.interpreter import quicken

if not HAS_GPU:
    quicken()

ROOT = Path(__file__).parent.parent.parent
Compiled = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    """Family to its kernels as compiled for a Hopper, in the records of compile_for_gpu.py.

    Compiled once for each state of the sources: in the tests' other processes, and in later runs,
    the records are read.
    """
    triton = pytest.importorskip("triton")
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for folder in ("triton_kernels", "picnn_fast", "tests/ops", "tests/triton_kernels"):
        for source in sorted((ROOT / folder).rglob("*.py")):
            if not source.name.startswith("test_"):
                digest.update(source.read_bytes())
    records = ROOT / "build" / "triton_kernels" / f"{digest.hexdigest()[:20]}.jsonl"
    records.parent.mkdir(parents=True, exist_ok=True)
    with records.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not records.exists():
            partial = records.with_suffix(".partial")
            partial.write_text(compile_all())
            partial.replace(records)  # whole, or not there
    families = defaultdict(list)
    for record in map(json.loads, records.read_text().splitlines()):
        families[record["family"]].append(record)
    return families


def compile_all() -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.triton_kernels.compile_for_gpu"),
            "--one_shape",  # benchmarks.kernels compiles for all, in minutes
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def types(records: list[dict[str, Any]], kernel: str, argument: str) -> set[str]:
    """The types in which ``kernel`` was compiled of an argument."""
    return {r["types"][argument] for r in records if r["kernel"] == kernel}
