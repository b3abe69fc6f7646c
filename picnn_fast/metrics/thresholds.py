"""Thresholds of filters: an order statistic of a filter's activations over images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that are looked at together.
_BLOCK = 2**22


def kth_greatest(
    batches: Sequence[Tensor],
    k: int,
    *,
    images: Sequence[Tensor] | None = None,
    filters: Tensor | None = None,
) -> Tensor:
    """The k-th greatest activation of each filter over all positions of all images.

    Args:
        batches: maps ``[b, N, h, w]`` of all batches, at least one image.
        k: from 1, the greatest, to the number of positions.
        images: of each batch the indices of those that count; None: all.
        filters: ``[n]`` indices of those that are wanted; None: all.

    Returns:
        ``[n]`` in the dtype of the maps.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics.thresholds import kth_greatest
        >>> kth_greatest([torch.arange(8.0).reshape(1, 2, 2, 2)], 2)
        tensor([2., 6.])
    """
    first = batches[0]
    if filters is None:
        filters = torch.arange(first.shape[1], device=first.device)
    if images is None:
        images = [torch.arange(len(maps), device=maps.device) for maps in batches]
    total = math.prod(first.shape[2:]) * sum(map(len, images))
    found = [first.new_empty(0)]
    for some in filters.split(max(1, _BLOCK // total)):
        values = [
            maps[rows[:, None], some].movedim(1, 0).flatten(1)
            for maps, rows in zip(batches, images, strict=True)
        ]
        found.append(torch.cat(values, 1).kthvalue(total - k + 1, 1).values)
    return torch.cat(found)
