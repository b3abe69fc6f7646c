"""Kills trainings at random moments: each must go on to what one left alone ends with, bit for bit.

    python -m tests.training.kill --kills 20 --method picnn

No part of a test's file, for it forks trainings from a process that has never trained, which costs
no start of Python each; ``test_surviving.py`` runs it with few kills.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from picnn_fast.training.checkpoint import read_checkpoint
from picnn_fast.training.options import Options
from picnn_fast.training.run import METRICS, train
from picnn_fast.training.run_folder import RunFolder

# What makes a schedule of each method turn within a few epochs.
METHODS: dict[str, dict[str, Any]] = {
    "std": {},
    "picnn": {"sampling": "bernoulli"},
    "csg": {"start": 1, "period": 2},
    "icnn": {"estimator": "running", "learn_beta": True},
    "iccnn": {"groups": 3},
}


def write_images(root: Path, side: int = 16) -> None:
    """Two classes of noise, dark and bright, to train and test on."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, level in (("bright", 120), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (side, side, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")


def options_of(method: Any, root: Path, output: Path, **given: Any) -> Options:
    """Of a run on these images, changed at random as they are read, of 3 steps an epoch.

    Args:
        method: name, or name and options.
        root, output: folders.
        given: other options.
    """
    if isinstance(method, str):
        method = {"name": method, **METHODS.get(method, {})}
    data = {"name": "folder", "root": str(root), "image_size": 12, "num_workers": 0}
    return Options(
        **{
            "method": method,
            "data": {**data, "validation": 0.25},
            "output": str(output),
            "num_filters": 8,
            "batch_size": 8,
            "epochs": 4,
            "accelerator": "cpu",
            "checkpoint_every": 1,
            **given,
        }
    )


def differences(one: Path, two: Path, file: str = "last.ckpt") -> list[str]:
    """In what the checkpoints and figures of two runs differ."""
    states = [read_checkpoint(path / file) for path in (one, two)]
    found = []
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        first, second = (_flat(state[part], part) for state in states)
        found += [key for key in first.keys() | second.keys() if not _same(first, second, key)]
    if all((path / METRICS).exists() for path in (one, two)):
        first, second = (json.loads((path / METRICS).read_text()) for path in (one, two))
        found += [METRICS] if first != second else []
    return sorted(found)


def _flat(content: Any, name: str) -> dict[str, Any]:
    """Nested values by name."""
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {k: v for key, value in pairs for k, v in _flat(value, f"{name}.{key}").items()}
    return {name: content}


def _same(one: dict[str, Any], two: dict[str, Any], key: str) -> bool:
    first, second = one.get(key), two.get(key)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def hold(folder: str) -> None:
    """Begin to write a run folder, and never end."""
    with RunFolder(folder, "train", {"seed": 0}).writing() as work:
        (work / "half.txt").write_text("half")
        time.sleep(600)


def _start(options: Options) -> int:
    """A process that trains; its number."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            train(options, progress=False)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def _saved(checkpoint: Path, process: int) -> None:
    """Wait for the first checkpoint of a training, or for its end."""
    while not checkpoint.exists() and alive(process):
        time.sleep(0.002)


def alive(process: int) -> bool:
    """Whether a child has not ended; its status stays to be asked for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _finish(process: int) -> None:
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"a training ended with status {status}")


def kill_and_compare(method: str, kills: int, folder: Path, workers: int = 0, seed: int = 0) -> int:
    """How many of so many runs, each killed once, end like one left alone; tells of each."""
    images = folder / "images"
    write_images(images)
    options = options_of(method, images, folder / "whole")
    options = dataclasses.replace(options, data={**options.data, "num_workers": workers})
    start = time.monotonic()
    process = _start(options)
    _saved(folder / ".whole.partial" / "last.ckpt", process)
    saved = time.monotonic()
    _finish(process)
    lasts, goes_on = time.monotonic() - start, time.monotonic() - saved
    draw = random.Random(f"{method} {seed}")
    equal = done = 0
    while done < kills:
        killed = folder / f"killed-{done}"
        run = dataclasses.replace(options, output=str(killed))
        work = killed.with_name(f".{killed.name}.partial")
        start = time.monotonic()
        process = _start(run)
        if done % 5 < 4:  # most have something to go on from
            _saved(work / "last.ckpt", process)
            time.sleep(draw.uniform(0, goes_on))
        else:
            time.sleep(draw.uniform(0, lasts))
        after = time.monotonic() - start
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            goes_on, lasts = 0.9 * goes_on, 0.9 * lasts  # it was done before
            shutil.rmtree(killed)
            continue
        had = "no checkpoint"
        with contextlib.suppress(FileNotFoundError):
            had = f"step {torch.load(work / 'last.ckpt', weights_only=True)['global_step']}"
        _finish(_start(run))
        found = differences(folder / "whole", killed)
        equal += not found
        done += 1
        told = "equal" if not found else f"differs in {', '.join(found[:5])}"
        print(f"{method}: killed after {after:.2f} s with {had}: {told}", flush=True)
    print(f"{method}: {equal}/{kills} runs killed once end like one left alone", flush=True)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", default=["picnn"], choices=METHODS)
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    equal = 0
    for method in args.method:
        with tempfile.TemporaryDirectory() as folder:
            equal += kill_and_compare(method, args.kills, Path(folder), args.workers)
    return int(equal < args.kills * len(args.method))


if __name__ == "__main__":
    raise SystemExit(main())
