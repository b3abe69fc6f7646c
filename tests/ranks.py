"""Runs a test file as the processes of a distributed group; not in conftest, as they import it."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

# Processes are forked off one that has imported what takes seconds, and has run nothing.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["lightning", "picnn_fast.evaluation", "torch.distributed.fsdp"])


def _run(script: str, rank: int, folder: Path) -> None:
    os.dup2(os.open(_errors(folder, rank), os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    sys.argv = [script, str(rank), str(folder)]
    runpy.run_path(script, run_name="__main__")


def _errors(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.err"


def run_ranks(script: str, folder: Path, ranks: int) -> list[Any]:
    """``python script <rank> <folder>`` for every rank at once: what each saved in its file."""
    processes = [
        _processes.Process(target=_run, args=(script, rank, folder)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(timeout=120)
            assert process.exitcode == 0, _errors(folder, rank).read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
