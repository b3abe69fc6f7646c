"""Two machines as network namespaces of this one, and a training over both that loses one.

    python -m tests.training.machines FOLDER cut|kill

wants root and iproute2. No part of a test's file, for it forks the processes from one that has
never trained, as ``together.py`` does; ``test_machines.py`` runs it.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from picnn_fast import cli
from picnn_fast.training.checkpoint import read_checkpoint
from tests.processes import as_torchrun
from tests.training.kill import alive, options_of, write_images
from tests.training.together import as_rank, fork

ADDRESSES = ("10.213.0.1", "10.213.0.2")
DEVICE = "veth"
TIMEOUT = 6  # seconds
NO_END = 10_000  # epochs


def missing() -> str | None:
    """Why there can be no namespaces here."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "wants root"
    if shutil.which("ip") is None:
        return "wants iproute2"
    name = f"pf-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if tried.returncode != 0:
        return f"no network namespaces: {tried.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """The names of two namespaces that a cable joins, each with its own address."""
    names = (f"pf-{os.getpid()}-a", f"pf-{os.getpid()}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
        own = f"-n {names[0]} link add {DEVICE} type veth peer name {DEVICE} netns {names[1]}"
        _ip(*own.split())
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def pull_the_cable(name: str) -> None:
    _ip("-n", name, "link", "set", DEVICE, "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def move_to(name: str) -> None:
    """This process and those it starts are on that machine from now on."""
    # os.setns is of Python 3.12.
    with open(f"/run/netns/{name}", "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def arguments(folder: Path, epochs: int, timeout: int = TIMEOUT, **given: object) -> list[str]:
    """Of a training of some length on images of the folder."""
    options = options_of("std", folder / "images", folder / "run")
    told = {
        "method": "std",
        "data": "folder",
        "data.root": folder / "images",
        "data.image_size": 12,
        "data.num_workers": 0,
        "data.validation": 0.25,
        "output": options.output,
        "epochs": epochs,
        "num_filters": 8,
        "batch_size": 4,
        "accelerator": "cpu",
        "schedule": "constant",
        "timeout": timeout,
        **given,
    }
    return ["train", *(f"--{name}={value}" for name, value in told.items())]


def torchrun_on(name: str, arguments: list[str]) -> None:
    """``torchrun`` on that machine."""
    move_to(name)
    as_torchrun(arguments)


def on_machine(place: int, name: str, folder: Path, how: str) -> int:
    """One process of two, each alone on its machine, as torchrun would start it."""
    move_to(name)
    as_rank(place, 29400)
    os.environ.update(
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR=ADDRESSES[0],
        GLOO_SOCKET_IFNAME=DEVICE,
    )
    # Shards are written by both, one file by the first alone.
    strategy = "fsdp" if how == "cut" else "auto"
    return cli.main(arguments(folder, epochs=NO_END, strategy=strategy))


def lose(how: str, folder: Path) -> dict[str, Any]:
    """Train on two machines and lose the second once there is a checkpoint: what came of it."""
    with two_machines() as names:
        processes = [
            fork(
                lambda n=n, name=name: exit_with(on_machine(n, name, folder, how)),
                folder / f"{n}.log",
            )
            for n, name in enumerate(names)
        ]
        last = folder / ".run.partial" / "last.ckpt"
        while not last.exists() and all(map(alive, processes)):
            time.sleep(0.02)
        time.sleep(0.5)
        if how == "cut":
            pull_the_cable(names[1])
        else:
            os.kill(processes[1], signal.SIGKILL)
        start = time.monotonic()
        statuses = [os.waitpid(process, 0)[1] for process in processes]
        return {
            "seconds": time.monotonic() - start,
            "statuses": [os.waitstatus_to_exitcode(status) for status in statuses],
        }


def exit_with(status: int) -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def saved_epoch(folder: Path, *, whole: bool = True) -> int:
    """Of the last checkpoint, which is read whole where nothing writes it meanwhile."""
    epoch: int = read_checkpoint(folder / ".run.partial" / "last.ckpt", whole=whole)["epoch"]
    return epoch


def main(folder: Path, how: str) -> int:
    torch.set_num_threads(1)
    write_images(folder / "images")
    result = lose(how, folder)
    result["saved"] = saved_epoch(folder)
    # The machine that is left goes on by itself, without a network.
    alone = fork(
        lambda: exit_with(cli.main(arguments(folder, epochs=NO_END))), folder / "alone.log"
    )
    end = time.monotonic() + 60
    while alive(alone) and time.monotonic() < end:
        if saved_epoch(folder, whole=False) >= result["saved"] + 2:
            break
        time.sleep(0.1)
    os.kill(alone, signal.SIGTERM)
    os.waitpid(alone, 0)
    result["then"] = saved_epoch(folder)
    result["files"] = sorted(path.name for path in (folder / ".run.partial").iterdir())
    (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
