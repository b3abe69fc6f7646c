"""Who runs: the device, the processes that were started, and which of them owns the run folder."""

import contextlib
import dataclasses
import itertools
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from picnn_fast._extras import extra
from picnn_fast.training.launchers import (
    ADDRESS,
    PORT,
    OwnLauncher,
    from_outside,
    is_child,
    own_node,
)
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run_folder import RunFolder, RunFolderError

with extra("train"):
    import lightning as L
    from lightning.fabric.accelerators.cuda import CUDAAccelerator
    from lightning.fabric.accelerators.mps import MPSAccelerator
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.pytorch.utilities import rank_zero_only

T = TypeVar("T")
# Of what the first processes of several machines tell one another before there is a group.
_decisions = itertools.count()


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes of one run.

    Attributes:
        rank: of this process among all.
        devices: processes on each machine.
        nodes: machines.
        outside: whether torchrun or SLURM started them all, before any knew of the run.
        child: whether Lightning started this one, once the first of its machine had begun.
        environment: Lightning's view of it.
        timeout: how long processes wait for one another.
    """

    rank: int
    devices: int
    nodes: int
    outside: bool
    child: bool
    environment: ClusterEnvironment = dataclasses.field(compare=False, repr=False)
    timeout: timedelta = dataclasses.field(compare=False, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.nodes

    def decide(self, compute: Callable[[], T]) -> T:
        """What the first process computes, or the error it raises, in every process.

        Where they are started by hand on each machine, in the first of each.
        """
        if not self.outside and self.nodes == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = error
        outcome = self._told_by_group(outcome) if self.outside else self._told_by_store(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def connect(self) -> None:
        """Make the group of processes that were started together; with others there is none."""
        if not self.outside or distributed.is_initialized():
            return
        os.environ[ADDRESS] = self.environment.main_address
        os.environ[PORT] = str(self.environment.main_port)
        os.environ["RANK"] = str(self.environment.global_rank())
        os.environ["WORLD_SIZE"] = str(self.environment.world_size())
        # Lightning takes the group it finds, so it has to serve training as well.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=self.timeout)

    def _told_by_group(self, outcome: list[Any]) -> list[Any]:
        self.connect()
        distributed.broadcast_object_list(outcome, src=0)
        return outcome

    def _told_by_store(self, outcome: list[Any]) -> list[Any]:
        """There can be no group yet, for the other processes of the machines come later."""
        # The group to come is at the same address: in one process a server serves both.
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            self.environment.main_address,
            self.environment.main_port,
            is_master=self.first,
            timeout=self.timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        key = f"picnn_fast/{next(_decisions)}"
        others = [f"{key}/{node}" for node in range(1, self.nodes)]
        if self.first:
            store.set(key, pickle.dumps(outcome))  # type: ignore[arg-type]
            store.wait(others)  # the server goes when this process does
            return outcome
        told: list[Any] = pickle.loads(store.get(key))
        store.set(f"{key}/{self.environment.node_rank()}", "read")
        return told

    @contextlib.contextmanager
    def owning(self, folder: RunFolder, *, overwrite: bool) -> Iterator[Path]:
        """``folder.writing`` of the first process, which alone looks after the folder.

        The others wait until it is prepared, and get its path.

        Raises:
            RunFolderError: see ``folder.writing``; the machines do not share the folder.
        """
        with contextlib.ExitStack() as stack:
            if self.child:
                yield folder.work
                return
            work = self.decide(lambda: stack.enter_context(folder.writing(overwrite=overwrite)))
            if self.nodes > 1 and not _appears(work):
                raise RunFolderError(
                    f"output: {folder.path} is not the same folder on all machines, want one on a"
                    " file system that they share"
                )
            yield work


class LostProcessError(RuntimeError):
    """A process of the run was lost, or did not answer in time; the message says what is left."""


@contextlib.contextmanager
def telling_of_lost(started: Launch, folder: RunFolder) -> Iterator[None]:
    """What a collective says of a process that is gone, as a line that says how to go on.

    Raises:
        LostProcessError: in place of what torch raises.
    """
    try:
        yield
    except Exception as error:
        lost = next(filter(_is_of_lost, _chain(error)), None)
        if started.processes == 1 or lost is None:
            raise
        # Without where in gloo's sources, and its advice.
        first = (str(lost) or type(lost).__name__).splitlines()[0]
        said = re.sub(r"\[[^\[\]]*\.cc:\d+\] ", "", first).split(". ")[0]
        kept = any(folder.work.glob("*.ckpt"))
        how = "goes on from the last checkpoint, on any machines" if kept else "starts anew"
        raise LostProcessError(
            "a process of this run is gone, or did not answer for"
            f" {started.timeout.total_seconds():g} s (--timeout): {said};"
            f" the same command {how}"
        ) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised in the handling of, as where a trainer tidies up."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _is_of_lost(error: BaseException) -> bool:
    # Gloo's are of no class of their own.
    return isinstance(error, distributed.DistError | ConnectionError) or bool(
        re.search(r"gloo/transport|[Cc]onnection (closed|reset)|[Tt]imed out", str(error))
    )


def launch_of(options: Options) -> Launch:
    """How the processes of a run with these options were started; see ``launch``."""
    return launch(options.devices, options.num_nodes, timeout=options.timeout)


def launch(devices: int | None, num_nodes: int | None = None, *, timeout: float = 600.0) -> Launch:
    """How this process was started.

    Args:
        devices: wanted on each machine; None takes what a launcher started, else 1.
        num_nodes: machines that are wanted; None likewise.
        timeout: seconds that processes wait for one another.

    Raises:
        ConfigError: another number than a launcher started, or variables of a launcher that are
            missing or contradict one another.
    """
    wait = timedelta(seconds=timeout)
    outside = from_outside()
    if outside is not None:
        for name, wanted, got, what in (
            ("devices", devices, outside.devices, "processes started on each machine"),
            ("num_nodes", num_nodes, outside.nodes, "machines"),
        ):
            if wanted not in (None, got):
                raise ConfigError(
                    f"{name}: got {wanted} with {got} {what} by {outside.name}, want {got}, or none"
                )
        environment = outside.environment
        several = environment.world_size() > 1
        started = Launch(
            environment.global_rank() if several else 0,
            outside.devices,
            outside.nodes,
            several,
            False,
            environment,
            wait,
        )
    else:
        nodes, each = num_nodes or 1, devices or 1
        node = own_node(nodes)
        own = OwnLauncher(node)
        rank = node * each + own.local_rank()
        started = Launch(rank, each, nodes, False, is_child(), own, wait)
    # Lightning goes by RANK and its like, which may be left over from something else.
    rank_zero_only.rank = started.rank  # type: ignore[attr-defined]
    return started


def _appears(folder: Path, seconds: float = 30.0) -> bool:
    """Whether a folder is there that another machine has just made: a network's may be late."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)  # which makes the network's look anew
    return True


def check_accelerator(accelerator: str, precision: str = "32-true") -> None:
    """
    Raises:
        ConfigError: there is no such device, or it has no such arithmetic.
    """
    there = {
        "gpu": CUDAAccelerator.is_available() or MPSAccelerator.is_available(),
        "mps": MPSAccelerator.is_available(),
    }
    if not there.get(accelerator, True):
        raise ConfigError(
            f"accelerator: got {accelerator!r}, but torch finds none here; want cpu or auto"
        )
    if precision == "16-mixed" and (
        accelerator == "cpu" or (accelerator == "auto" and not there["gpu"])
    ):
        raise ConfigError(f"precision: got {precision!r} on a CPU, want bf16-mixed or 32-true")


def device_of(accelerator: str) -> torch.device:
    """The one device to evaluate on.

    Raises:
        ConfigError: there is no such device.
    """
    check_accelerator(accelerator)
    return L.Fabric(accelerator=accelerator, devices=1).device
