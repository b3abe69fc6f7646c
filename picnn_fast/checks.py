"""Argument checks shared by the operator families: the argument, what it got, what it wants.

Shapes, dtypes and devices are known to the host, so they raise at once. Values are not: on the CPU
they are read and raise ``ValueError``; on a GPU (and wherever a call is traced) they become
``torch._assert_async``, a check that runs on the device in stream order, before the operator's
own kernel, without waiting for it. Like PyTorch's own ``bernoulli`` and ``nll_loss``, a failed
check then surfaces as a device-side assert at the next synchronisation. What a kernel refuses
itself (``by_kernel``) costs nothing beforehand; what it raises on the CPU is said again in these
words.
"""

import difflib
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def integer(name: str, value: int, least: int, below: int | None = None) -> int:
    """An int >= ``least``, less than ``below`` where that is given; NumPy's become Python's."""
    value = _integer(name, value)
    if value < least or (below is not None and value >= below):
        limit = "" if below is None else f" and below {below}"
        raise ValueError(f"{name}: got {value}, want an int >= {least}{limit}")
    return value


def _integer(name: str, value: object, want: str = "an int") -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{name}: got {type(value).__name__}, want {want}")


def boolean(name: str, value: bool) -> bool:
    """True or False; NumPy's become Python's."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name}: got {value!r}, want True or False")


def non_negative(name: str, value: float) -> float:
    _number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, want a finite number >= 0")
    return float(value)


def positive(name: str, value: float) -> float:
    _number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, want a number > 0")
    return float(value)


def share(name: str, value: float) -> float:
    """A number in (0, 1)."""
    if positive(name, value) >= 1:
        raise ValueError(f"{name}: got {value}, want a number above 0 and below 1")
    return float(value)


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number")


def left_out(what: str, **given: tuple[object, object]) -> None:
    """Arguments that mean nothing beside something: each one's value and its default.

    Raises:
        ValueError: one is not its default.
    """
    for name, (value, default) in given.items():
        if value != default:
            raise ValueError(f"{name}: got {value!r} with {what}, want {default!r}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        near = did_you_mean(value, choices)
        raise ValueError(
            f"{name}: got {value!r}, want one of {', '.join(map(repr, choices))}"
            + (f";{near}" if near else "")
        )
    return value


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """For the error about a name that is none of these: " did you mean 'x'?", or nothing.

    Upper and lower case are alike.
    """
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), lower, 1)
    return f" did you mean {lower[near[0]]!r}?" if near else ""


def tensor(name: str, value: object) -> None:
    """No nested one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
    if value.is_nested:
        raise TypeError(f"{name}: got a nested tensor, want a torch.Tensor of one shape")


def module(name: str, value: object) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.nn.Module")


def floating(name: str, value: Tensor) -> None:
    """A tensor of one of ``FLOATING``, neither sparse nor nested."""
    if (
        isinstance(value, Tensor)
        and value.dtype in FLOATING
        and value.layout == torch.strided
        and not value.is_nested
    ):
        return
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: got dtype {value.dtype}, want one of "
            + ", ".join(str(dtype) for dtype in FLOATING)
        )
    raise TypeError(f"{name}: got layout {value.layout}, want torch.strided")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: got device {value.device}, want {other.device} like {other_name}"
        )


def pooled(name: str, value: Tensor) -> None:
    """Activations ``[samples, filters]`` of at least one filter."""
    floating(name, value)
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, want [samples, filters], at least one"
            " filter: maps averaged over their positions"
        )


def asynchronous(value: Tensor) -> bool:
    """Whether the host is not to read values: on a GPU it would wait, and a trace has none."""
    return (
        torch.compiler.is_compiling()
        or value.is_cuda
        or value.is_meta
        or isinstance(value, FakeTensor)
        # The stack first: it is asked for in a tenth of the time.
        or (torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None)
    )


def unwrapped(value: Tensor) -> Tensor:
    """The tensor that transforms of ``torch.func`` have wrapped: of a vmap, all samples at once."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
    return value


def holds(name: str, condition: Tensor, got: Callable[[], str], want: str) -> None:
    """A condition on values, 0-dim bool; ``got`` is asked where it can be and does not hold."""
    condition = unwrapped(condition)
    if condition.ndim:
        condition = condition.all()
    if asynchronous(condition):
        torch._assert_async(condition, f"{name}: want {want}")
    elif not condition:
        raise ValueError(f"{name}: got {got()}, want {want}")


def _within(name: str, value: Tensor, high: int, want: str, by_kernel: bool = False) -> None:
    """Every element in [0, high]. NaN fails: ``aminmax`` passes it on, and no comparison holds."""
    if by_kernel or value.numel() == 0:
        return
    held = unwrapped(value).detach()
    if asynchronous(value):
        if held.dtype == torch.bool:
            held = held.to(torch.uint8)
        if not held.is_floating_point():
            high = min(high, torch.iinfo(held.dtype).max)
        torch._assert_async((held.clamp(0, high) == held).all(), f"{name}: want {want}")
        return
    least, most = held.aminmax()
    if not (least.item() >= 0 and most.item() <= high):
        raise ValueError(f"{name}: got values in [{least.item()}, {most.item()}], want {want}")


def probabilities(name: str, value: Tensor) -> None:
    """Every element in [0, 1]."""
    _within(name, value, 1, "probabilities: finite, in [0, 1]")


def labels(
    name: str, value: Tensor, batch: int, num_classes: int, *, by_kernel: bool = False
) -> None:
    """Integers ``[batch]`` in [0, num_classes).

    Args:
        by_kernel: the operator's kernels refuse others themselves; only type and shape are checked.
    """
    indices(name, value, batch, num_classes, of="sample", kind="class indices", by_kernel=by_kernel)


def indices(
    name: str,
    value: Tensor,
    count: int,
    below: int,
    *,
    of: str,
    kind: str,
    by_kernel: bool = False,
) -> None:
    """Integers ``[count]`` in [0, below), one for each ``of``; ``by_kernel`` as of ``labels``."""
    tensor(name, value)
    if value.dtype not in INTEGER:
        raise TypeError(f"{name}: got dtype {value.dtype}, want integers, such as torch.int64")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want ({count},), one a {of}")
    _within(name, value, below - 1, f"{kind} in [0, {below})", by_kernel)


_OUTSIDE = [None]


def not_recomputed(name: str) -> None:
    """
    Raises:
        RuntimeError: called in a backward pass, where ``torch.utils.checkpoint`` computes again
            what it did not keep: what ``name`` remembers is of another batch by then.
    """
    if torch.compiler.is_compiling():
        # A compiled graph has no moment at which to ask; unseen, it would compute again from what
        # was renewed meanwhile. It refuses to write to what lies outside a checkpointed part.
        _OUTSIDE[0] = None
    elif torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name}: got computed again in the backward pass, as torch.utils.checkpoint does, want"
            " it outside the checkpointed part: what it remembers would be renewed twice, and its"
            " gradient be another"
        )


def accumulable(value: Tensor) -> Tensor:
    """Half types widened to float32, exactly."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def rank(value: int | None) -> int:
    """The given rank, or the process's own in an initialised process group, or 0."""
    if value is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank()
        return 0
    value = _integer("rank", value)
    if not 0 <= value < 2**32:
        raise ValueError(f"rank: got {value}, want an int in [0, 2**32)")
    return value


def seed(value: int | Tensor | None, device: torch.device) -> Tensor:
    """A 64-bit seed as an int64 tensor on ``device``, without a host sync.

    None draws one from torch's default generator for the device, so ``torch.manual_seed``
    reproduces it and a captured CUDA graph draws afresh on every replay.
    """
    if value is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed: got a tensor of dtype {value.dtype}, want torch.int64")
        if value.numel() != 1:
            raise ValueError(f"seed: got a tensor of shape {tuple(value.shape)}, want one element")
        if value.device != device:
            raise ValueError(
                f"seed: got device {value.device}, want {device} like the other tensors"
            )
        return value.reshape(1)
    value = _integer("seed", value, "an int, an int64 tensor or None")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed: got {value}, want 64 bits: an int in [-2**63, 2**64)")
    signed = value - 2**64 if value >= 2**63 else value
    return torch.full((1,), signed, dtype=torch.int64, device=device)
