"""How the operators want tensors to lie in memory, and of which type."""

import torch
from torch import Tensor


def readable(maps: Tensor) -> Tensor:
    """``maps``, copied where its spatial axes do not lie in memory as one axis would."""
    if (
        maps.is_contiguous()
        or maps.ndim <= 3
        or (maps.ndim == 4 and maps.is_contiguous(memory_format=torch.channels_last))
    ):
        return maps
    expected = None
    for size, stride in zip(reversed(maps.shape[2:]), reversed(maps.stride()[2:]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return maps.contiguous()
        expected = stride * size
    return maps


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, without the dispatch where that changes nothing."""
    return value if value.dtype == dtype else value.to(dtype)


def whole(value: Tensor) -> Tensor:
    """A tensor that ``fully_shard`` dealt out, gathered by all ranks; any other as it is."""
    # Of the class: a proxy that torch.fx traces with would claim to have any attribute.
    gather = getattr(type(value), "full_tensor", None)
    return value if gather is None else gather(value)
