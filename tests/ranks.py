"""Runs a test file as the processes of a distributed group; not in conftest, as they import it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_ranks(script: str, folder: Path, ranks: int) -> list[Any]:
    """``python script <rank> <folder>`` for every rank at once: what each saved in its file."""
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
