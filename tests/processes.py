"""Processes forked off one that has imported what takes seconds, and has run nothing.

Where what is tested is what a process does, not that its Python starts: one of its own that imports
Lightning takes 5 s of a core. Modules that run so are no test files and import none.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "lightning",
        "tensorboard.summary",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "picnn_fast.cli",
        "picnn_fast.evaluation",
        "picnn_fast.training.compare",
    ]
)


def start(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    folder: Path,
    name: str,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """A process that calls ``target``, a function of a module, and has begun, in this folder.

    Args:
        target, arguments: what is called.
        folder, name: what it prints goes to ``name.out`` and ``name.err`` there.
        environment: its variables, by default those of this process.
    """
    environment = dict(os.environ if environment is None else environment)
    output = (str(folder / f"{name}.out"), str(folder / f"{name}.err"))
    place = (os.getcwd(), environment)
    process = context.Process(target=_run, args=(target, arguments, output, place))
    process.start()
    return process


def _run(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    output: tuple[str, str],
    place: tuple[str, dict[str, str]],
) -> None:
    for descriptor, path in enumerate(output, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    folder, environment = place
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def as_module(arguments: list[str]) -> None:
    """``python -m module argument …``."""
    module, *_ = sys.argv = [*arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def as_torchrun(arguments: list[str]) -> None:
    """``torchrun option … -m module argument …``, whose workers are forked in their turn."""
    from torch.distributed import run  # which torch may have been built without
    from torch.distributed.launcher.api import elastic_launch

    def forking(config: Any, entrypoint: object) -> elastic_launch:
        return elastic_launch(config, _worker)

    with mock.patch.object(run, "elastic_launch", forking):
        run.main(["--start-method=fork", *arguments])


def _worker(*words: str) -> None:
    unbuffered, flag, module, *arguments = words
    assert (unbuffered, flag) == ("-u", "-m")
    try:
        as_module([module, *arguments])
    except SystemExit as stop:
        if stop.code:
            raise


def finished(
    target: Callable[[list[str]], object],
    arguments: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``: the status of ``target(arguments)``, and what it printed.

    Args:
        target, arguments, environment: as of ``start``.
        timeout: seconds after which it is killed, which is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = start(target, (arguments,), Path(folder), target.__name__, environment)
        return ended(process, Path(folder), target.__name__, timeout)


def ended(
    process: BaseProcess, folder: Path, name: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The status of a process that was started with ``folder`` and ``name``, and what it printed.

    Args:
        timeout: seconds after which it is killed, which is an error.
    """
    try:
        process.join(timeout)
        status = process.exitcode
    finally:
        process.kill()
        process.join()
    out, err = ((folder / f"{name}.{end}").read_text() for end in ("out", "err"))
    assert status is not None, f"{name} did not end in {timeout} s\n{out}\n{err}"
    return subprocess.CompletedProcess([name], status, out, err)
