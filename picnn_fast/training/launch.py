"""Who runs: the device, the processes that were started, and which of them owns the run folder."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from picnn_fast._extras import extra
from picnn_fast.training.options import ConfigError
from picnn_fast.training.run_folder import RunFolder

with extra("train"):
    import lightning as L
    from lightning.fabric.accelerators.cuda import CUDAAccelerator
    from lightning.fabric.accelerators.mps import MPSAccelerator
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch.utilities import rank_zero_only

T = TypeVar("T")
# Launchers, and the variable in which each tells how many processes it started on a machine.
_LOCAL_PROCESSES: dict[type[ClusterEnvironment], str] = {
    TorchElasticEnvironment: "LOCAL_WORLD_SIZE",
    SLURMEnvironment: "SLURM_NTASKS_PER_NODE",
}
# What Lightning gives the processes that it starts itself beside the first.
_CHILD = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes of one run.

    Attributes:
        rank: of this process among all.
        devices: processes on each machine.
        nodes: machines.
        outside: whether torchrun or SLURM started them all, before any knew of the run.
        child: whether Lightning started this one, once the first had begun.
    """

    rank: int
    devices: int
    nodes: int
    outside: bool
    child: bool

    @property
    def first(self) -> bool:
        return self.rank == 0

    def decide(self, compute: Callable[[], T]) -> T:
        """What the first process computes, or the error it raises, in every process."""
        if not self.outside:
            return compute()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = compute()
            except Exception as error:
                outcome[1] = error
        _connect()
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def owning(self, folder: RunFolder, *, overwrite: bool) -> Iterator[Path]:
        """``folder.writing`` of the first process, which alone looks after the folder.

        The others wait until it is prepared, and get its path.
        """
        with contextlib.ExitStack() as stack:
            if self.child:
                yield folder.work
            else:
                yield self.decide(lambda: stack.enter_context(folder.writing(overwrite=overwrite)))


def launch(devices: int | None) -> Launch:
    """How this process was started.

    Args:
        devices: wanted on each machine; None takes what a launcher started, else 1.

    Raises:
        ConfigError: another number of devices than a launcher started processes.
    """
    outside = _launcher()
    if outside is not None:
        local = _LOCAL_PROCESSES[type(outside)]
        processes = int(os.environ.get(local, outside.world_size()))
        if devices not in (None, processes):
            raise ConfigError(
                f"devices: got {devices} with {processes} processes started on each machine, want"
                f" {processes}, or none"
            )
        started = Launch(
            outside.global_rank(), processes, outside.world_size() // processes, True, False
        )
    else:
        child = all(name in os.environ for name in _CHILD) and int(os.environ["WORLD_SIZE"]) > 1
        rank = int(os.environ["LOCAL_RANK"]) if child else 0
        started = Launch(rank, devices or 1, 1, False, child)
    # Lightning goes by RANK and its like, which may be left over from something else.
    rank_zero_only.rank = started.rank  # type: ignore[attr-defined]
    return started


def _launcher() -> ClusterEnvironment | None:
    """What started several processes from outside, if anything did."""
    for kind in _LOCAL_PROCESSES:
        if kind.detect() and kind().world_size() > 1:
            return kind()
    return None


def _connect() -> None:
    outside = _launcher()
    if outside is None or distributed.is_initialized():
        return
    os.environ["MASTER_ADDR"] = outside.main_address
    os.environ["MASTER_PORT"] = str(outside.main_port)
    os.environ["RANK"] = str(outside.global_rank())
    os.environ["WORLD_SIZE"] = str(outside.world_size())
    # Lightning takes the group it finds, so it has to serve training as well.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


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
