"""Operators of the correlation family: the losses of ICCNN."""

from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import as_dtype, readable
from picnn_fast.reference import correlation as reference
from picnn_fast.reference.masking import accumulate_dtype


def group_correlation_loss(
    maps: Tensor,
    mean: Tensor,
    groups: Tensor,
    *,
    num_groups: int | None = None,
    positive: Tensor | None = None,
) -> Tensor:
    """The loss of ICCNN by which filters of a group correlate with each other and with no others.

    -Σ_A Num_A / (Den_A + 1e-5) over the groups A, its weight lambda being 1. Num_A is the sum of s
    over pairs of filters in A, i = j included; Den_A that over pairs of one in A and any other;
    both are means over images. In [-2, 0), whatever the number of groups: -1 where filters have
    nothing in common; -2 at best, where those of a group are alike and all of an image cancel.

    The similarity is that of two filters on one image, about the mean map: with u = x - mean and
    û = u / max(‖u‖, 1e-5) over positions, s[i, j] = ⟨û_i, û_j⟩ + 1. A map that is its mean has
    û = 0, so s = 1 with all others and with itself; the floor changes no other map. Time and memory
    grow with the maps: the operator never has a matrix of filters by filters.

    Args:
        maps: x, ``[B, C, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU.
            Contiguous and channels_last maps are read in place.
        mean: ``[C, h, w]`` any of these dtypes, a constant: no gradient goes there.
        groups: ``[C]`` integers in [0, ``num_groups``): each filter's group. A group without
            filters adds nothing.
        num_groups: None counts them, on the CPU; on a GPU and under torch.compile, where nothing
            can be counted without waiting, takes C, with memory of the maps' size.
        positive: ``[B]`` bool, or 0 and 1: the images that enter Num and Den, which are divided by
            B all the same. The others get no gradient, whatever they hold. None: all images.

    Returns:
        A scalar, float64 for float64 maps, else float32. 0 for no image; NaN if one that counts
        holds a value that is not finite.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes or devices that disagree, groups or ``positive`` out of range (on a GPU
            and under torch.compile a device-side assert, see ``bernoulli_mask``).
        RuntimeError: the gradient is differentiated: there are no second derivatives.

    Source:
        Shen, Wei, Huang, Zhang, Fan, Zhao, Zhang, "Interpretable Compositional Convolutional Neural
        Networks", IJCAI 2021, the first loss; by images, about a moving mean, as in their code. The
        floor is ours: where that code divides by 0, this does not.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import group_correlation_loss
        >>> parts = torch.eye(4).view(1, 4, 2, 2) - 0.25  # four filters, each at its own position
        >>> maps = parts[:, [0, 0, 1, 1]]
        >>> mean = torch.zeros(4, 2, 2)
        >>> own, mixed = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> for groups in (own, mixed):
        ...     print(f"{group_correlation_loss(maps, mean, groups):.3f}")
        -1.500
        -1.000
    """
    _check_maps(maps)
    checks.floating("mean", mean)
    if mean.shape != maps.shape[1:]:
        raise ValueError(
            f"mean: got shape {tuple(mean.shape)}, want {tuple(maps.shape[1:])}, a map for each"
            f" filter of maps of shape {tuple(maps.shape)}"
        )
    checks.same_device("mean", mean, "maps", maps)
    labels, count = _check_groups(maps, groups, num_groups, by_kernel=num_groups is not None)
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
    constant = as_dtype(mean.detach() if mean.requires_grad else mean, accumulate_dtype(maps.dtype))
    if not constant.is_contiguous():
        constant = constant.contiguous()
    arguments = constant, labels, count, positive
    try:
        loss: Tensor = _group_correlation_operator(readable(maps), *arguments)[0]
    except RuntimeError:
        _check_groups(maps, groups, num_groups)
        raise
    return loss


def group_class_loss(
    maps: Tensor,
    groups: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    num_groups: int | None = None,
) -> Tensor:
    """The loss of ICCNN by which images of a class use groups of filters alike.

    -Σ_c Num_c / (Den_c + 1e-5) over the classes c, its weight lambda being 1. With
    v[A] = |A|/(C·h·w)·Σ x over the maps and positions of group A, and v / (‖v‖ + 1e-5) for v, Num_c
    is the sum of ⟨v_a, v_b⟩ over pairs of images of c, a = b included; Den_c that over pairs of one
    of c and any other; both divided by B². A batch of one image yields the constant -1, within
    1e-4. Composed of PyTorch's operators, of which one reads the maps: their sums over positions,
    which half types accumulate in float32.

    Args:
        maps: x, ``[B, C, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU.
        groups: ``[C]`` integers in [0, ``num_groups``): each filter's group.
        labels: ``[B]`` integers in [0, ``num_classes``).
        num_classes: a class without images adds nothing.
        num_groups: see ``group_correlation_loss``.

    Returns:
        A scalar, float64 for float64 maps, else float32; 0 for an empty batch.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes or devices that disagree, groups or labels out of range (on a GPU and
            under torch.compile a device-side assert, see ``bernoulli_mask``).

    Source:
        As ``group_correlation_loss``; the second loss, of several categories.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import group_class_loss
        >>> maps = torch.eye(2)[[0, 0, 1, 1]].view(4, 2, 1, 1)  # images use one filter each
        >>> groups = torch.tensor([0, 1])
        >>> for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        ...     print(f"{group_class_loss(maps, groups, torch.tensor(labels), 2):.3f}")
        -2.000
        -1.000
    """
    _check_maps(maps)
    num_classes = checks.integer("num_classes", num_classes, 1)
    indices, count = _check_groups(maps, groups, num_groups)
    checks.labels("labels", labels, len(maps), num_classes)
    checks.same_device("labels", labels, "maps", maps)
    return reference.group_class_loss(maps, indices, count, labels.to(torch.int64), num_classes)


def _check_maps(maps: Tensor) -> None:
    checks.floating("maps", maps)
    if maps.ndim == 4:
        # Of a batch whose size no trace knows nothing is asked.
        _, filters, height, width = maps.shape
        if filters and height and width:
            return
    raise ValueError(
        f"maps: got shape {tuple(maps.shape)}, want [B, C, h, w], at least one filter and one"
        " position"
    )


def _check_groups(
    maps: Tensor, groups: Tensor, num_groups: int | None, *, by_kernel: bool = False
) -> tuple[Tensor, int]:
    """The groups as the operators take them, and their number; ``by_kernel`` as of ``labels``."""
    filters = maps.shape[1]
    checks.tensor("groups", groups)
    checks.same_device("groups", groups, "maps", maps)
    if num_groups is not None:
        num_groups = checks.integer("num_groups", num_groups, 1)
    limit = filters if num_groups is None else num_groups
    checks.indices(
        "groups", groups, filters, limit, of="filter", kind="group indices", by_kernel=by_kernel
    )
    if num_groups is None and not checks.asynchronous(groups):
        limit = int(checks.unwrapped(groups).max()) + 1
    return as_dtype(groups, torch.int64), limit


def _fake_group_correlation(
    maps: Tensor, mean: Tensor, groups: Tensor, num_groups: int, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference.check_has_positions(maps)
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
    reference.check_has_positions(maps)
    return torch.empty_like(maps)


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


_group_correlation_operator = define(
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
