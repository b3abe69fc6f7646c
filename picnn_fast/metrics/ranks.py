"""What processes of a distributed group know together: rows, sums and errors of all of them.

A metric of ours has ``join(to, group)``, which all ranks call: on rank ``to``, or on every rank, it
is afterwards as if it had seen the images of all, rank by rank. Where ranks hold the images of one
process in its order, what it computes is then that of one process, bit for bit.
"""

import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric

# Bytes of one message.
_MESSAGE = 2**28


def world(group: Any = None) -> tuple[int, int]:
    """This process's rank in a group, and how many ranks that has; 0 and 1 without any group.

    Args:
        group: of ``torch.distributed``; None: of all processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(group), distributed.get_world_size(group)


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """What each rank gives, on every rank; small, and what can be pickled.

    Raises:
        ConnectionError: another process has ended, or does not answer in time.
    """
    _, ranks = world(group)
    values = [value] * ranks
    if ranks > 1:
        try:
            distributed.all_gather_object(values, value, group=group)
        except RuntimeError as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConnectionError(
                f"another process has ended or does not answer: {text}"
            ) from error
    return values


def gather_rows(own: Tensor | None, to: int | None = None, group: Any = None) -> Tensor | None:
    """The rows of all ranks, in the order of ranks.

    Beside its own rows a process holds what it is given, once, and no other.

    Args:
        own: ``[m, …]`` of any dtype; None where a rank has none and knows no shape.
        to: the rank in the group that gets them; None: every rank.
        group: of ``torch.distributed``; None: of all processes.

    Returns:
        ``[M, …]`` on the device of ``own``; None on a rank that gets nothing, or where none has
        any.

    Raises:
        ValueError: on every rank, rows of several shapes or dtypes.
    """
    rank, ranks = world(group)
    if ranks == 1:
        return own
    facts = gather_objects(None if own is None else (len(own), own.shape[1:], own.dtype), group)
    kinds = {fact[1:] for fact in facts if fact is not None}
    if len(kinds) > 1:
        raise ValueError(f"rows: got {sorted(map(str, kinds))} on different ranks, want one kind")
    if not kinds:
        return None
    shape, dtype = kinds.pop()
    device = torch.device("cpu") if own is None else own.device
    wire = _wire(device, group)
    sizes = [0 if fact is None else fact[0] for fact in facts]
    joined = None
    if to is None or to == rank:
        joined = torch.empty(sum(sizes), *shape, dtype=dtype, device=wire)
    first = 0
    for source, size in enumerate(sizes):
        place = None if joined is None else joined[first : first + size]
        if source == rank and own is not None and place is not None:
            place.copy_(own)
        if source == rank and place is None and own is not None:
            place = own.to(wire).contiguous()
        if place is not None and place.numel() > 0:
            _pass_on(place, source, to, rank, group)
        first += size
    return None if joined is None else joined.to(device)


def _wire(device: torch.device, group: Any) -> torch.device:
    """Where tensors are to lie to be sent: gloo knows the host's memory, NCCL that of GPUs."""
    backend = distributed.get_backend(group)
    if backend == "gloo":
        return torch.device("cpu")
    if backend == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _pass_on(rows: Tensor, source: int, to: int | None, rank: int, group: Any) -> None:
    """Rows of one rank, which others have room for, as bytes: no backend knows all types."""
    if source == to:
        return
    for part in rows.view(-1).view(torch.uint8).split(_MESSAGE):
        if to is None:
            distributed.broadcast(part, group_src=source, group=group)
        elif rank == source:
            distributed.send(part, group_dst=to, group=group)
        elif rank == to:
            distributed.recv(part, group_src=source, group=group)


def all_reduce(own: Tensor, operation: str = "SUM", group: Any = None) -> Tensor:
    """Sum, "MIN" or "MAX" of a tensor over ranks: the same on every rank, to the last bit.

    Args:
        own: of one shape and dtype on all ranks; it is left as it is.
        operation: of ``torch.distributed.ReduceOp``.
        group: of ``torch.distributed``; None: of all processes.
    """
    if world(group)[1] == 1:
        return own
    wire = _wire(own.device, group)
    total = own.to(wire, copy=True)
    distributed.all_reduce(total, getattr(distributed.ReduceOp, operation), group=group)
    # Ranks may have added up in another order.
    distributed.broadcast(total, group_src=0, group=group)
    return total.to(own.device)


def take_first(tensors: Iterable[Tensor], group: Any = None) -> None:
    """Overwrite tensors of every rank, of the same shapes and dtypes, by those of the first.

    Args:
        tensors: in the same order on all ranks.
        group: of ``torch.distributed``; None: of all processes.
    """
    if world(group)[1] == 1:
        return
    for own in tensors:
        wire = _wire(own.device, group)
        values = own.detach().to(wire, copy=True).contiguous()
        if values.numel() > 0:
            _pass_on(values, 0, None, world(group)[0], group)
            own.detach().copy_(values)


def by_filters(
    maps: Tensor | None, filters: int, compute: Callable[[Tensor, slice], Tensor], group: Any = None
) -> Tensor:
    """A value of each filter over the maps of all ranks, each rank computing that of some filters.

    A process holds as much of the others' maps as it gives away of its own.

    Args:
        maps: ``[m, N, …]`` of a rank's images; None where it has none and knows no shape.
        filters: N.
        compute: maps ``[M, n, …]`` of all images and the filters that they are of to values
            ``[n]``.
        group: of ``torch.distributed``; None: of all processes.

    Returns:
        ``[N]``, on every rank.
    """
    rank, ranks = world(group)
    ends = [filters * place // ranks for place in range(ranks + 1)]
    found = None
    for owner in range(ranks):
        some = slice(ends[owner], ends[owner + 1])
        if some.start == some.stop:
            continue
        joined = gather_rows(None if maps is None else maps[:, some], owner, group)
        if owner == rank:
            assert joined is not None
            found = compute(joined, some)
    values = gather_rows(found, None, group)
    assert values is not None
    return values


@contextmanager
def agreeing(group: Any = None) -> Iterator[None]:
    """What a rank raises within is raised on all at the end: its own error, else the first one's.

    Within it ranks may not wait for one another.

    Args:
        group: of ``torch.distributed``; None: of all processes.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if world(group)[1] == 1:
        if own is not None:
            raise own
        return
    told = None if own is None else _sent(own)
    try:
        every = gather_objects(told, group)
    except ConnectionError as error:
        raise own or error from None  # what was raised here says more
    if own is not None:
        raise own
    for source, other in enumerate(every):
        if other is not None:
            raised, trace = other
            raised.add_note(f"raised on rank {source}:\n{trace}")
            raise raised


def _sent(error: Exception) -> tuple[Exception, str]:
    """An error as other ranks can read it, and where it was raised."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), trace
    return error, trace


class JoinedMetric(Metric):
    """A metric that has ``join``, by which torchmetrics synchronises it too.

    ``dist_sync_fn`` of ``torchmetrics.Metric`` is not asked: ranks join as ``join`` says.

    Args:
        **kwargs: of ``torchmetrics.Metric``.
    """

    def join(self, to: int | None = None, group: Any = None) -> None:
        """Take in what the other ranks have seen; all ranks call it.

        Args:
            to: the rank in the group that is to compute, and alone gets what there is; None: every
                rank.
            group: of ``torch.distributed``; None: of all processes.
        """
        raise NotImplementedError

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        self.join(None, process_group or self.process_group)
