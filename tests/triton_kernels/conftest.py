"""What the compiler makes of every family's kernels, for all their tests."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
Compiled = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def compiled() -> Compiled:
    """Family to its kernels as compiled for a Hopper, in the records of compile_for_gpu.py."""
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
    families = defaultdict(list)
    for record in map(json.loads, done.stdout.splitlines()):
        families[record["family"]].append(record)
    return families


def types(records: list[dict[str, Any]], kernel: str, argument: str) -> set[str]:
    """The types in which ``kernel`` was compiled of an argument."""
    return {r["types"][argument] for r in records if r["kernel"] == kernel}
