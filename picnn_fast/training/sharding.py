"""Training with weights, gradients and optimiser dealt out to all processes: FSDP2."""

import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from picnn_fast._extras import extra
from picnn_fast.training import shards
from picnn_fast.training.checkpoint import CHECKPOINT, WholeCheckpoints
from picnn_fast.training.options import ConfigError, Options

with extra("train"):
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import ModelParallelStrategy

# Layers whose weights are most of a network's, and which are always called as modules.
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


def check_sharding(options: Options, network: nn.Module) -> None:
    """Refuse what cannot be dealt out.

    Raises:
        ConfigError: an arithmetic, a device or a parameter that FSDP2 does not take.
    """
    if options.precision not in ("32-true", "bf16-mixed"):
        # Lightning refuses the one, and the scale of the other would differ from rank to rank.
        raise ConfigError(
            f"precision: got {options.precision!r} with strategy fsdp, want bf16-mixed or 32-true"
        )
    if options.accelerator == "mps":
        raise ConfigError("accelerator: got 'mps' with strategy fsdp, want cpu or gpu")
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"strategy: got 'fsdp' with a network whose parameter {name} is a single number,"
                " want ddp: there is nothing to deal out"
            )


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Deal a network's parameters out, those of each large layer apart, all others together.

    Args:
        network: in place; made anew are its parameters, so optimisers come after.
        mesh: of one dimension, all processes.
    """
    network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
    uses = Counter(map(id, dict(network.named_parameters(remove_duplicate=False)).values()))
    inside: set[nn.Module] = set()
    for layer in network.modules():
        if not isinstance(layer, _LAYERS) or layer in inside:
            continue
        # Attention takes the weights of its own last layer, which it never calls.
        inside.update(layer.modules())
        # What layers share stays with the rest.
        if all(uses[id(p)] == 1 for p in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)


@contextlib.contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Every parameter that no layer gathers by itself is there: for other calls than ``forward``.

    All processes must enter, and call the same layers.
    """
    if not isinstance(network, FSDPModule):
        yield
        return
    network.unshard()
    try:
        yield
    finally:
        network.reshard()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for a module whose ``network`` it deals out, and checkpoints of shards.

    Not Lightning's FSDPStrategy, which is FSDP1: it makes all parameters of a group one flat
    tensor, in which CSG's gate has no columns to project and W of PICNN no rate of its own.
    Buffers, which hold what methods remember of the batches, are the first process's on all, as
    under DistributedDataParallel: a run is that of DDP. bf16 is by autocast, as without FSDP, so
    that losses are computed in the types they were tested in.

    Args:
        processes: of the run.
        timeout: how long processes wait for one another.
        channels_last: give images so that maps have their channels innermost; FSDP2 gathers
            weights in the order of their axes, whatever that was before.
    """

    def __init__(self, processes: int, timeout: timedelta, *, channels_last: bool) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, timeout=timeout)
        self._channels_last = channels_last

    def batch_to_device(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        batch = super().batch_to_device(batch, *arguments, **options)
        if not self._channels_last:
            return batch
        images, *others = batch
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return [images, *others]

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        self.share_buffers()
        return super().training_step(*arguments, **options)

    def validation_step(self, *arguments: Any, **options: Any) -> Any:
        assert self.lightning_module is not None
        with whole(self.lightning_module.network):  # type: ignore[arg-type]
            return super().validation_step(*arguments, **options)

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Those of the first process on all: one message a type, for they are many and small."""
        assert self.lightning_module is not None
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.lightning_module.network.buffers():  # type: ignore[union-attr]
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for buffers in kinds.values():
            joined = torch.cat([buffer.flatten() for buffer in buffers])
            distributed.broadcast(joined, 0)
            if self.global_rank > 0:
                parts = joined.split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # Not by torch.distributed's helper, which steps an optimiser that has no state yet: one of
        # two that take turns would begin with a step too many.
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """The last one in shards, each written by its process; any other in one file."""
        path = Path(self.broadcast(filepath))
        rest, sharded = shards.take_apart(checkpoint)
        if path.name == CHECKPOINT:
            token = self.broadcast(secrets.token_hex(4))
            rest[shards.KEY] = shards.write(path, token, sharded)
        else:
            found = shards.gathered(sharded)
            rest = shards.put_together(rest, found)
        if self.global_rank == 0:
            self.checkpoint_io.save_checkpoint(rest, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Of shards, or of one file, whatever number of processes wrote it."""
        path = Path(self.broadcast(checkpoint_path))
        io, module = self.checkpoint_io, self.lightning_module
        assert isinstance(io, WholeCheckpoints)
        assert module is not None
        content = io.load_rest(path)
        said = content.get(shards.KEY)
        if said is None:
            content = self._dealt_out(content)
        else:
            own = module.state_dict()

            def room(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
                kind, *where = name.split("/")
                like = own[where[0]] if kind == "state_dict" else self._parameter(*where[:2])
                return torch.empty_like(like, dtype=dtype)

            content = shards.put_together(content, io.load_shards(path, said, room))
        module.load_state_dict(content["state_dict"])
        for optimizer, state in zip(
            self.optimizers, content.get("optimizer_states", ()), strict=False
        ):
            optimizer.load_state_dict(state)
        return content

    def _parameter(self, optimizer: str | int, place: str | int) -> Tensor:
        """What an optimiser steps, by the number that its state has it under."""
        groups = self.optimizers[int(optimizer)].param_groups
        parameter: Tensor = [p for group in groups for p in group["params"]][int(place)]
        return parameter

    def _dealt_out(self, content: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of whole tensors as one of what this process has of them."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {k: _like(own.get(k), value) for k, value in content["state_dict"].items()}
        states = [
            {
                **saved,
                "state": {
                    place: {k: _like(self._parameter(number, place), v) for k, v in values.items()}
                    for place, values in saved["state"].items()
                },
            }
            for number, saved in enumerate(content.get("optimizer_states", ()))
        ]
        return {**content, "state_dict": state, "optimizer_states": states}


def _like(own: Any, value: Any) -> Any:
    """A whole tensor, which every process has, dealt out as its own is, where that is."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
