"""What the compiler makes of every family's kernels, for all their tests."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / "triton_kernels"


@pytest.fixture(scope="session")
def compiled() -> dict[str, list[list[str]]]:
    """Family to one line a kernel compiled for a GPU: its name, argument types, size, fused
    multiply-adds."""
    done = subprocess.run(
        [sys.executable, HERE / "compile_for_gpu.py", *sorted(FOLDER.glob("[!_]*.py"))],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    families = defaultdict(list)
    for line in done.stdout.splitlines():
        family, *kernel = line.split()
        families[family].append(kernel)
    return families
