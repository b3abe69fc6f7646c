"""Operators of the correlation family: the losses of ICCNN."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import readable
from picnn_fast.reference import correlation as reference
from picnn_fast.reference.masking import accumulate_dtype


def _setup_group_correlation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, mean, groups, _, positive = inputs
    _, norms, sums, moments = output
    ctx.save_for_backward(maps, mean, groups, positive, norms, sums, moments)
    ctx.mark_non_differentiable(norms, sums, moments)


def _group_correlation_gradient(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, *_: None
) -> tuple[Tensor]:
    """The mean map is a constant."""
    return (torch.ops.picnn_fast.group_correlation_backward.default(grad_loss, *saved),)


def _fake_group_correlation(
    maps: Tensor, mean: Tensor, groups: Tensor, num_groups: int, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, filters, height, width = maps.shape
    dtype = accumulate_dtype(maps.dtype)
    return (
        maps.new_empty((), dtype=dtype),
        maps.new_empty((batch, filters), dtype=dtype),
        maps.new_empty((batch, num_groups, height * width), dtype=dtype),
        maps.new_empty((2, num_groups), dtype=dtype),
    )


def _fake_group_correlation_backward(
    grad_loss: Tensor,
    maps: Tensor,
    mean: Tensor,
    groups: Tensor,
    positive: Tensor | None,
    norms: Tensor,
    sums: Tensor,
    moments: Tensor,
) -> Tensor:
    return torch.empty_like(maps)


define(
    "correlation",
    "group_correlation(Tensor maps, Tensor mean, Tensor groups, SymInt num_groups,"
    " Tensor? positive) -> (Tensor loss, Tensor norms, Tensor sums, Tensor moments)",
    reference=reference.group_correlation,
    fake=_fake_group_correlation,
    setup_context=_setup_group_correlation,
    backward=_group_correlation_gradient,
)
define(
    "correlation",
    "group_correlation_backward(Tensor grad_loss, Tensor maps, Tensor mean, Tensor groups,"
    " Tensor? positive, Tensor norms, Tensor sums, Tensor moments) -> Tensor",
    reference=reference.group_correlation_backward,
    fake=_fake_group_correlation_backward,
)


def _check_maps(maps: Tensor) -> None:
    checks.floating("maps", maps)
    if maps.ndim != 4 or 0 in maps.shape[1:]:
        raise ValueError(
            f"maps: got shape {tuple(maps.shape)}, want [B, C, h, w], at least one filter and one"
            " position"
        )


def _check_groups(maps: Tensor, groups: Tensor, num_groups: int | None) -> tuple[Tensor, int]:
    """The groups as the operators take them, and their number."""
    filters = maps.shape[1]
    checks.tensor("groups", groups)
    checks.same_device("groups", groups, "maps", maps)
    if num_groups is not None:
        checks.integer("num_groups", num_groups, 1)
    limit = filters if num_groups is None else num_groups
    checks.indices("groups", groups, filters, limit, of="filter", kind="group indices")
    if num_groups is None and not checks.asynchronous(groups):
        limit = int(checks.unwrapped(groups).max()) + 1
    return groups.to(torch.int64), limit


def group_correlation_loss(
    maps: Tensor,
    mean: Tensor,
    groups: Tensor,
    *,
    num_groups: int | None,
    positive: Tensor | None,
) -> Tensor:
    """See ``functional.group_correlation_loss``."""
    _check_maps(maps)
    checks.floating("mean", mean)
    if mean.shape != maps.shape[1:]:
        raise ValueError(
            f"mean: got shape {tuple(mean.shape)}, want {tuple(maps.shape[1:])}, a map for each"
            f" filter of maps of shape {tuple(maps.shape)}"
        )
    checks.same_device("mean", mean, "maps", maps)
    labels, count = _check_groups(maps, groups, num_groups)
    if positive is not None:
        checks.tensor("positive", positive)
        checks.same_device("positive", positive, "maps", maps)
        if positive.dtype != torch.bool:
            kind = "bool, or integers"
            checks.indices("positive", positive, len(maps), 2, of="sample", kind=kind)
            positive = positive.bool()
        elif positive.shape != maps.shape[:1]:
            raise ValueError(
                f"positive: got shape {tuple(positive.shape)}, want ({len(maps)},), one a sample"
            )
    constant = mean.detach().to(accumulate_dtype(maps.dtype)).contiguous()
    loss: Tensor = torch.ops.picnn_fast.group_correlation.default(
        readable(maps), constant, labels, count, positive
    )[0]
    return loss


def group_class_loss(
    maps: Tensor, groups: Tensor, labels: Tensor, num_classes: int, *, num_groups: int | None
) -> Tensor:
    """See ``functional.group_class_loss``."""
    _check_maps(maps)
    checks.integer("num_classes", num_classes, 1)
    indices, count = _check_groups(maps, groups, num_groups)
    checks.labels("labels", labels, len(maps), num_classes)
    checks.same_device("labels", labels, "maps", maps)
    return reference.group_class_loss(maps, indices, count, labels.to(torch.int64), num_classes)
