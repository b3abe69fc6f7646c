"""Operators of class-conditional histograms: streaming counts, soft counts, and what they tell of
the classes, both with a gradient."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.reference import histogram as reference

# Soft counts place a sample in single precision, which tells no more bin centres apart.
MOST_BINS = 2**24


def update(
    counts: Tensor, minimum: Tensor, maximum: Tensor, activations: Tensor, labels: Tensor
) -> None:
    """Add samples to class-conditional histograms in place, widening their range without loss.

    Args:
        counts: ``[N, bins, K]`` int64, contiguous, bins in [2, 2**24]; zeros before the first
            sample.
        minimum, maximum: ``[N]`` float64, the range so far; +inf, -inf before the first sample.
        activations: ``[M, N]`` of any floating dtype and any strides.
        labels: ``[M]`` integers in [0, K).

    Raises:
        TypeError: not tensors, or of the wrong dtype.
        ValueError: of another shape or device, labels out of range, or activations that are not
            finite; the message names the first such column, and nothing was written. On a GPU and
            under torch.compile, values are checked on the device without a host sync and fail as a
            device-side assert (RuntimeError).

    Example:
        >>> import torch
        >>> counts = torch.zeros(1, 4, 2, dtype=torch.int64)
        >>> minimum = torch.full((1,), torch.inf, dtype=torch.float64)
        >>> maximum = -minimum
        >>> update(counts, minimum, maximum, torch.tensor([[0.5], [3.5]]), torch.tensor([0, 1]))
        >>> counts[0].T.tolist()  # bins of width 1 from 0
        [[1, 0, 0, 0], [0, 0, 0, 1]]
    """
    checks.tensor("counts", counts)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got dtype {counts.dtype}, want torch.int64")
    if counts.ndim != 3 or not 2 <= counts.shape[1] <= MOST_BINS or counts.shape[2] < 1:
        raise ValueError(
            f"counts: got shape {tuple(counts.shape)}, want [filters, bins, classes] with 2 to"
            f" {MOST_BINS} bins and at least a class"
        )
    if not counts.is_contiguous():
        raise ValueError(f"counts: got strides {counts.stride()}, want a contiguous tensor")
    filters, _, num_classes = counts.shape
    for name, bound in (("minimum", minimum), ("maximum", maximum)):
        checks.tensor(name, bound)
        if bound.dtype != torch.float64:
            raise TypeError(f"{name}: got dtype {bound.dtype}, want torch.float64")
        if tuple(bound.shape) != (filters,) or not bound.is_contiguous():
            raise ValueError(
                f"{name}: got shape {tuple(bound.shape)}, want ({filters},), contiguous, as the"
                " filters of counts"
            )
        checks.same_device(name, bound, "counts", counts)
    checks.pooled("activations", activations)
    checks.labels("labels", labels, len(activations), num_classes, by_kernel=True)
    checks.same_device("labels", labels, "activations", activations)
    checks.same_device("activations", activations, "counts", counts)
    if activations.shape[1] != filters:
        raise ValueError(
            f"activations: got {activations.shape[1]} filters, want {filters} as in counts"
        )
    try:
        column: Tensor = torch.ops.picnn_fast.histogram_update(
            counts, minimum, maximum, activations.detach(), labels.to(torch.int64)
        )
    except RuntimeError:
        checks.labels("labels", labels, len(activations), num_classes)
        raise
    checks.holds(
        "activations",
        column < 0,
        lambda: f"NaN or infinity in column {column.item()}",
        "finite activations",
    )


def _fake_histogram_update(
    counts: Tensor, minimum: Tensor, maximum: Tensor, activations: Tensor, labels: Tensor
) -> Tensor:
    return labels.new_empty((), dtype=torch.int64)


def _fake_soft_histogram(
    activations: Tensor,
    labels: Tensor,
    low: Tensor,
    width: Tensor,
    bins: int,
    num_classes: int,
) -> Tensor:
    return low.new_empty((activations.shape[1], bins, num_classes))


def _fake_soft_histogram_backward(
    grad_counts: Tensor, activations: Tensor, labels: Tensor, low: Tensor, width: Tensor
) -> Tensor:
    return torch.empty_like(activations)


define(
    "histogram",
    "histogram_update(Tensor(a!) counts, Tensor(b!) minimum, Tensor(c!) maximum,"
    " Tensor activations, Tensor labels) -> Tensor",
    reference=reference.histogram_update,
    fake=_fake_histogram_update,
)
define(
    "histogram",
    "soft_histogram_backward(Tensor grad_counts, Tensor activations, Tensor labels, Tensor low,"
    " Tensor width) -> Tensor",
    reference=reference.soft_histogram_backward,
    fake=_fake_soft_histogram_backward,
)


def _setup_soft_histogram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _soft_histogram_gradient(
    ctx: Any, saved: tuple[Tensor, ...], grad_counts: Tensor
) -> tuple[Tensor | None]:
    """In the activations; ``low`` and ``width`` are constants."""
    if not ctx.needs_input_grad[0]:
        return (None,)
    # With create_graph the gradient is to have one itself, which the definition's has.
    backward = (
        reference.soft_histogram_backward
        if torch.is_grad_enabled()
        else torch.ops.picnn_fast.soft_histogram_backward.default
    )
    activations, labels, low, width = saved
    return (backward(grad_counts, activations, labels, low.detach(), width.detach()),)


define(
    "histogram",
    "soft_histogram(Tensor activations, Tensor labels, Tensor low, Tensor width, SymInt bins,"
    " SymInt num_classes) -> Tensor",
    reference=reference.soft_histogram,
    fake=_fake_soft_histogram,
    setup_context=_setup_soft_histogram,
    backward=_soft_histogram_gradient,
)


def _fake_histogram_information(counts: Tensor, by_label: bool, corrected: bool) -> Tensor:
    dtype = counts.dtype if counts.is_floating_point() else torch.float64
    return counts.new_empty(counts.shape[:1] if by_label else counts.shape[::2], dtype=dtype)


def _fake_histogram_information_backward(
    grad: Tensor, counts: Tensor, information: Tensor, by_label: bool
) -> Tensor:
    return torch.empty_like(counts)


define(
    "histogram",
    "histogram_information_backward(Tensor grad, Tensor counts, Tensor information, bool by_label)"
    " -> Tensor",
    reference=reference.histogram_information_backward,
    fake=_fake_histogram_information_backward,
)


def _setup_histogram_information(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    counts, ctx.by_label, ctx.corrected = inputs
    ctx.save_for_backward(counts, output)


def _histogram_information_gradient(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor]:
    counts, information = saved
    # With create_graph the gradient is to have one itself, which the definition's has.
    recorded = torch.is_grad_enabled()
    if ctx.corrected or recorded:
        information = torch.ops.picnn_fast.histogram_information.default(
            counts, ctx.by_label, False
        )
    backward = (
        reference.histogram_information_backward
        if recorded
        else torch.ops.picnn_fast.histogram_information_backward.default
    )
    return (backward(grad, counts, information, ctx.by_label),)


information = define(
    "histogram",
    "histogram_information(Tensor counts, bool by_label, bool corrected) -> Tensor",
    reference=reference.histogram_information,
    fake=_fake_histogram_information,
    setup_context=_setup_histogram_information,
    backward=_histogram_information_gradient,
)
