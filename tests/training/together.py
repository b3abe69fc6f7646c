"""Trainings of several processes, and what one process comes to; ``test_sharding.py`` runs it.

    python -m tests.training.together FOLDER

No part of a test's file, for it forks the processes from one that has never trained, which costs no
start of Python each. What each training leaves is in a folder of its own.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn

from picnn_fast import checks
from picnn_fast.backbones.registry import BACKBONES, Row
from picnn_fast.data.loading import derive_seed
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.training import module, run
from picnn_fast.training.options import Options
from picnn_fast.training.run import assemble, train
from picnn_fast.training.run_folder import RunFolderError
from tests.training.kill import METHODS, options_of, write_images

RANKS, BATCH, EPOCHS = 2, 3, 2
LINEAR = ("std", "csg")  # whose loss of a batch is the mean of its images'
IN_PARTS = [(method, strategy) for method in LINEAR for strategy in ("ddp", "fsdp")]
CUT = "picnn"
WHERE: dict[str, Any] = {"insert_conv": False, "num_filters": None}  # of a performer


def plain(image_channels: int = 3, num_classes: int = 1000) -> nn.Sequential:
    """Without batch norm, whose statistics are of a process's own batch."""
    features = nn.Sequential(
        nn.Conv2d(image_channels, 12, 3, 4), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU()
    )
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(num_classes))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


def options_for(method: str, folder: Path, output: str, **given: Any) -> Options:
    """Three steps an epoch, by SGD: Adam would make much of rounding where a gradient is 0."""
    told: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "schedule": "constant",
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "checkpoint_every": None,
        "strategy": "fsdp",
        "backbone": "plain" if method in LINEAR else "small-cnn",
        "timeout": 60.0,
    }
    data = {**options_of("std", folder / "images", folder).data, "image_size": 32}
    told["data"] = data
    chosen: Any = {"name": "csg", "start": 0, "period": 1} if method == "csg" else method
    if method == "explainer":
        told |= {**WHERE, "backbone": "auto"}
        chosen = {"name": method, "performer": str(folder / "performer")}
    return options_of(chosen, folder / "images", folder / output, **{**told, **given})


def performer_options(folder: Path) -> Options:
    return options_for(
        "std", folder, "performer", backbone="small-vgg", epochs=1, strategy="auto", **WHERE
    )


OF_LAUNCHERS = re.compile(
    r"(SLURM|TORCHELASTIC)_.*|(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)


def as_rank(rank: int, port: int, launcher: str = "torchrun") -> None:
    """What torchrun tells a process, or srun one of two machines, or a user the same."""
    for name in filter(OF_LAUNCHERS.fullmatch, [*os.environ]):
        del os.environ[name]
    told = {
        "torchrun": {
            "TORCHELASTIC_RUN_ID": "together",
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": RANKS,
            "LOCAL_WORLD_SIZE": RANKS,
            "MASTER_ADDR": "127.0.0.1",
        },
        "srun": {
            "SLURM_NTASKS": RANKS,
            "SLURM_NTASKS_PER_NODE": f"1(x{RANKS})",
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": 0,
            "SLURM_NODEID": rank,
            "SLURM_STEP_NODELIST": "localhost,gpu[02-07]",
            "SLURM_JOB_ID": 17,
        },
        "user": {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1"},
    }[launcher]
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_PORT=str(port))


def fit(options: Options, folder: Path) -> None:
    """Training without the evaluation after it; the last checkpoint stays in shards.

    It tells its progress, for which the first process looks at figures that all make together.
    """
    made = assemble(options, folder, introduce=False)
    last = folder / "last.ckpt"
    made.trainer.fit(made.module, made.data, ckpt_path=last if last.exists() else None)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def fit_until(options: Options, folder: Path, step: int) -> None:
    """Training that breaks off before this step, from 0."""
    original = module.InterpretableModule.training_step

    def broken(self: Any, *batch: Any) -> Any:
        if self.trainer.global_step == step:
            raise RuntimeError("power cut")
        return original(self, *batch)

    with (
        mock.patch.object(module.InterpretableModule, "training_step", broken),
        contextlib.suppress(RuntimeError),
    ):
        fit(options, folder)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def resumed(options: Options, folder: Path) -> None:
    """Training that goes on, and first saves in one file what it goes on with."""
    made = assemble(options, folder, progress=False)
    hook = made.module.on_train_start

    def seen() -> None:
        made.trainer.save_checkpoint(folder / "seen.ckpt")
        hook()

    made.module.on_train_start = seen  # type: ignore[method-assign]
    made.trainer.fit(made.module, made.data, ckpt_path=folder / "last.ckpt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


def one_process(options: Options, folder: Path) -> None:
    """Both ranks' shares of every batch, one after the other: the mean of their gradients.

    Buffers are those of the first share, drawing is as the ranks draw.
    """
    made = assemble(options, folder, progress=False)
    networks = [made.network, copy.deepcopy(made.network)]
    optimizers = [
        {name: made.module.make_optimizer(groups) for name, groups in net.optimizers(0.02).items()}
        for net in networks
    ]
    loader = made.data.train_dataloader()
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        states = []
        for rank, network in enumerate(networks):
            images = [made.data.as_taken(*batch) for batch in made.data.train_images()]
            network.begin_epoch(epoch + 1, len(loader), EPOCHS, images=images)
            torch.manual_seed(derive_seed(options.seed, 0, epoch, rank))
            states.append(torch.get_rng_state())
        for batch in loader:
            for mine, first in zip(networks[1].buffers(), networks[0].buffers(), strict=True):
                mine.copy_(first)
            step_of_shares(made.data.as_taken(*batch), networks, states)
            turn = networks[0].optimizer_of(epoch + 1, EPOCHS)
            for network, own in zip(networks, optimizers, strict=True):
                own[turn].step()
                network.after_step()
    torch.save(networks[0].state_dict(), folder / "state.pt")


def step_of_shares(
    batch: tuple[torch.Tensor, torch.Tensor],
    networks: list[InterpretableNetwork],
    states: list[torch.Tensor],
) -> None:
    """Leave the mean of the shares' gradients in all networks."""
    images, labels = batch
    for rank, network in enumerate(networks):
        network.train()
        network.zero_grad()
        torch.set_rng_state(states[rank])
        with mock.patch.object(checks, "rank", lambda value, rank=rank: rank):
            share = labels[rank::RANKS]
            network.loss(network(images[rank::RANKS], share), share).backward()
        states[rank] = torch.get_rng_state()
    for parameters in zip(*(network.parameters() for network in networks), strict=True):
        if parameters[0].grad is not None:
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for parameter in parameters:
                parameter.grad.copy_(mean)


def of_rank(rank: int, ports: Iterator[int], folder: Path) -> None:
    """All that two processes train."""
    for method in (*METHODS, "explainer"):
        as_rank(rank, next(ports))
        fit(options_for(method, folder, method), folder / method)
    for method, strategy in IN_PARTS:
        as_rank(rank, next(ports))
        output = f"{method}-{strategy}-in-parts"
        parts = {"batch_size": 1, "accumulate_grad_batches": BATCH, "strategy": strategy}
        fit(options_for(method, folder, output, **parts), folder / output)
    adam: dict[str, Any] = {"optimizer": "adamw", "checkpoint_every": 1}
    coarse = {"precision": "bf16-mixed", "checkpoint_every": None}
    for output, given in (("whole", {}), ("half", coarse)):
        as_rank(rank, next(ports))
        fit(options_for(CUT, folder, output, **{**adam, **given}), folder / output)
    as_rank(rank, next(ports))
    fit_until(options_for(CUT, folder, "cut", **adam), folder / "cut", 4)
    as_rank(rank, next(ports))
    if rank == 0:
        for name in ("on-2", "on-1"):
            shutil.copytree(folder / "cut", folder / name)
        (folder / "copied").touch()
    resumed(options_for(CUT, folder, "on-2", **adam), wait_for(folder / "on-2", folder / "copied"))
    as_rank(rank, next(ports))
    resumed(options_for(CUT, folder, "1-on-2", **adam), wait_for(folder / "1-on-2", folder / "1"))
    # The whole command, and once more where it is complete.
    best = options_for("icnn", folder, "complete", report_epoch="best_on_validation")
    as_rank(rank, next(ports), "srun")
    figures: list[Any] = [train(best, progress=False)]
    as_rank(rank, next(ports), "user")
    figures.append(train(dataclasses.replace(best, num_nodes=RANKS), progress=False))
    as_rank(rank, next(ports), "srun")
    try:
        train(dataclasses.replace(best, epochs=1), progress=False)
    except RunFolderError as error:
        figures.append({"refused": str(error)})
    (folder / f"figures{rank}.json").write_text(json.dumps(figures))


def wait_for(folder: Path, sign: Path) -> Path:
    while not sign.exists():
        time.sleep(0.05)
    return folder


def of_one(folder: Path) -> None:
    """All that one process trains meanwhile."""
    adam: dict[str, Any] = {"optimizer": "adamw", "checkpoint_every": 1, "strategy": "auto"}
    fit_until(options_for(CUT, folder, "1-on-2", **adam), folder / "1-on-2", 4)
    shutil.copy(folder / "1-on-2" / "last.ckpt", folder / "1-on-2" / "before.ckpt")
    (folder / "1").touch()
    for method in (*METHODS, "explainer"):
        together = folder / f"{method}-of-shares"
        together.mkdir()
        options = options_for(method, folder, together.name, batch_size=RANKS * BATCH)
        one_process(options, together)
        if method in LINEAR:
            alone = options_for(method, folder, "alone", batch_size=RANKS * BATCH, strategy="auto")
            fit(alone, folder / f"{method}-alone")
    wait_for(folder, folder / "copied")
    resumed(options_for(CUT, folder, "on-1", **adam), folder / "on-1")


def fork(main: Callable[[], object], log: Path) -> int:
    """A process that does this; its number."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 1
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                main()
                status = 0
            except BaseException:
                traceback.print_exc(file=file)
            file.flush()
        os._exit(status)
    return process


def free_ports(count: int) -> list[int]:
    """Below those that the system gives out itself, to whoever asks before they are used."""
    ports: list[int] = []
    for port in random.Random(os.getpid()).sample(range(10_000, 32_768), k=20 * count):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"found {len(ports)} free ports, want {count}")


def all_end_well(processes: list[int]) -> bool:
    """Whether they do; when one fails, the others, which may wait for it, are killed."""
    left = set(processes)
    while left:
        process, status = os.wait()
        left.discard(process)
        if status != 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
            return False
    return True


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    run.TensorBoardLogger = mock.Mock(side_effect=ModuleNotFoundError)  # type: ignore[misc]
    BACKBONES["plain"] = Row(plain, "features")
    write_images(folder / "images", side=32)
    performer = fork(
        lambda: fit(performer_options(folder), folder / "performer"), folder / "performer.log"
    )
    if not all_end_well([performer]):
        return 1
    ports = free_ports(24)
    processes = [
        fork(lambda rank=rank: of_rank(rank, iter(ports), folder), folder / f"rank{rank}.log")
        for rank in range(RANKS)
    ]
    processes.append(fork(lambda: of_one(folder), folder / "one.log"))
    return int(not all_end_well(processes))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
