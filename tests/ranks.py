"""Runs a test file as the processes of a distributed group; not in conftest, as they import it."""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from tests.processes import start


def _run(script: str, rank: int, folder: Path) -> None:
    sys.argv = [script, str(rank), str(folder)]
    runpy.run_path(script, run_name="__main__")


def run_ranks(script: str, folder: Path, ranks: int) -> list[Any]:
    """``python script <rank> <folder>`` for every rank at once: what each saved in its file."""
    processes = [
        start(_run, (script, rank, folder), folder, f"rank{rank}") for rank in range(ranks)
    ]
    try:
        for rank, process in enumerate(processes):
            process.join(timeout=120)
            assert process.exitcode == 0, (folder / f"rank{rank}.err").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
