"""Operators of the masking family: masks of channels, drawn (PICNN) or by a gate's rows (CSG)."""

import math
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import readable
from picnn_fast.reference import masking as reference


def _fake_bernoulli_mask(
    features: Tensor, logits: Tensor, correspondence: Tensor, seed: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    mask_dtype = reference.accumulate_dtype(features.dtype)
    return (
        torch.empty_like(features),
        features.new_empty(features.shape[:2], dtype=mask_dtype),
        logits.new_empty(logits.shape[:1], dtype=torch.int64),
    )


def _fake_parameters_backward(
    grad_mask: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), correspondence.new_empty(correspondence.shape)


def _fake_mask_channels(features: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(features)


def _fake_masking_backward(
    grad_masked: Tensor, features: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), mask.new_empty(mask.shape)


def _maps_gradient(grad_masked: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the maps and of the mask.

    Gradients are recorded in a backward pass with ``create_graph`` alone: these then have gradients
    themselves.
    """
    if torch.is_grad_enabled():
        grad_features = torch.ops.picnn_fast.mask_channels.default(readable(grad_masked), mask)
        products = features.to(mask.dtype) * grad_masked.to(mask.dtype)
        return grad_features, products.reshape(*mask.shape, math.prod(features.shape[2:])).sum(-1)
    grads: tuple[Tensor, Tensor] = torch.ops.picnn_fast.masking_backward.default(
        readable(grad_masked), features, mask
    )
    return grads


def _parameters_gradient(
    grad_z: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the correspondence, as ``_maps_gradient``."""
    if not torch.is_grad_enabled():
        grads: tuple[Tensor, Tensor] = torch.ops.picnn_fast.bernoulli_parameters_backward.default(
            grad_z, logits, correspondence, pseudo_label
        )
        return grads
    y1 = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(pseudo_label, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        grad_y1 = grad_z @ correspondence.T
        # Straight through: the one-hot label carries the gradient of the softmax here too.
        grad_correspondence = (one_hot + y1 - y1.detach()).T @ grad_z
    return y1 * (grad_y1 - (y1 * grad_y1).sum(-1, keepdim=True)), grad_correspondence


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, without the dispatch where that changes nothing."""
    return value if value.dtype == dtype else value.to(dtype)


def _setup_bernoulli_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, logits, correspondence, _, _ = inputs
    _, mask, pseudo_label = output
    ctx.save_for_backward(features, logits, correspondence, mask, pseudo_label)
    ctx.mark_non_differentiable(pseudo_label)


def _bernoulli_mask_gradient(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_masked: Tensor | None,
    grad_mask: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    """Straight-through gradients of the Bernoulli mask (PICNN eq. 5, 8)."""
    features, logits, correspondence, mask, pseudo_label = saved
    grad_features, grad_z = None, grad_mask
    if grad_masked is not None:
        grad_features, grad_z = _maps_gradient(grad_masked, features, mask)
        if grad_mask is not None:
            grad_z = grad_z + grad_mask
    grad_logits = grad_correspondence = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        assert grad_z is not None
        dtype = torch.promote_types(logits.dtype, correspondence.dtype)
        grad_logits, grad_correspondence = _parameters_gradient(
            _as(grad_z, dtype), _as(logits, dtype), _as(correspondence, dtype), pseudo_label
        )
        grad_logits = _as(grad_logits, logits.dtype)
        grad_correspondence = _as(grad_correspondence, correspondence.dtype)
    return grad_features, grad_logits, grad_correspondence


def _setup_mask_channels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mask_channels_gradient(
    ctx: Any, saved: tuple[Tensor, ...], grad_masked: Tensor
) -> tuple[Tensor, Tensor]:
    features, mask = saved
    return _maps_gradient(grad_masked, features, mask)


define(
    "masking",
    "bernoulli_mask(Tensor features, Tensor logits, Tensor correspondence, Tensor seed,"
    " SymInt rank) -> (Tensor masked, Tensor mask, Tensor pseudo_label)",
    reference=reference.bernoulli_mask,
    fake=_fake_bernoulli_mask,
    setup_context=_setup_bernoulli_mask,
    backward=_bernoulli_mask_gradient,
)
define(
    "masking",
    "mask_channels(Tensor features, Tensor mask) -> Tensor",
    reference=reference.mask_channels,
    fake=_fake_mask_channels,
    setup_context=_setup_mask_channels,
    backward=_mask_channels_gradient,
)
define(
    "masking",
    "bernoulli_parameters_backward(Tensor grad_mask, Tensor logits, Tensor correspondence,"
    " Tensor pseudo_label) -> (Tensor grad_logits, Tensor grad_correspondence)",
    reference=reference.bernoulli_parameters_backward,
    fake=_fake_parameters_backward,
    triton=False,  # small matrix algebra: the library's product serves
)
define(
    "masking",
    "masking_backward(Tensor grad_masked, Tensor features, Tensor mask)"
    " -> (Tensor grad_features, Tensor grad_mask)",
    reference=reference.masking_backward,
    fake=_fake_masking_backward,
)


def channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """A view ``[B, N, *spatial]``, after checking both arguments."""
    checks.floating("features", features)
    if features.ndim < 2:
        raise ValueError(
            f"features: got shape {tuple(features.shape)}, want at least 2 axes: batch, channels"
        )
    if type(channel_dim) is int and channel_dim == 1:
        return features
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim: got {type(channel_dim).__name__}, want an int")
    if not -features.ndim <= channel_dim < features.ndim or channel_dim % features.ndim == 0:
        raise ValueError(
            f"channel_dim: got {channel_dim}, want an axis of features other than the batch axis 0"
            f" (features has shape {tuple(features.shape)})"
        )
    return features.movedim(channel_dim, 1)


def check_table(
    name: str, table: Tensor, num_filters: int, features: Tensor, channel_dim: int
) -> None:
    checks.floating(name, table)
    if table.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(table.shape)}, want [classes, filters]")
    if table.shape[1] != num_filters:
        raise ValueError(
            f"{name}: got {table.shape[1]} filters (shape {tuple(table.shape)}), want"
            f" {num_filters}, the size of axis {channel_dim} of features {tuple(features.shape)}"
        )
    checks.same_device(name, table, "features", features)


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    seed: int | Tensor | None,
    rank: int | None,
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``functional.bernoulli_mask``."""
    maps = channels_second(features, channel_dim)
    check_table("correspondence", correspondence, maps.shape[1], features, channel_dim)
    if correspondence.shape[0] < 1:
        raise ValueError("correspondence: got no class, want at least one row")
    checks.floating("logits", logits)
    expected = (maps.shape[0], correspondence.shape[0])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, want {expected}:"
            " the batch of features and the classes of correspondence"
        )
    checks.same_device("logits", logits, "features", features)
    rank = checks.rank(rank)
    seed = checks.seed(seed, features.device)
    checks.probabilities("correspondence", correspondence)
    masked, mask, pseudo_label = torch.ops.picnn_fast.bernoulli_mask.default(
        readable(maps), checks.accumulable(logits), checks.accumulable(correspondence), seed, rank
    )
    if channel_dim != 1:
        masked = masked.movedim(1, channel_dim)
    return masked, _as(mask, features.dtype), pseudo_label


def mask_channels(features: Tensor, mask: Tensor, *, channel_dim: int) -> Tensor:
    """See ``functional.mask_channels``."""
    maps = channels_second(features, channel_dim)
    checks.floating("mask", mask)
    if mask.shape != maps.shape[:2]:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, want {tuple(maps.shape[:2])}: the batch and the"
            f" channels, axis {channel_dim}, of features {tuple(features.shape)}"
        )
    checks.same_device("mask", mask, "features", features)
    return _masked(maps, _as(mask, reference.accumulate_dtype(features.dtype)), channel_dim)


def class_gate(features: Tensor, gate: Tensor, labels: Tensor, *, channel_dim: int) -> Tensor:
    """See ``functional.class_gate``."""
    maps = channels_second(features, channel_dim)
    check_table("gate", gate, maps.shape[1], features, channel_dim)
    checks.labels("labels", labels, maps.shape[0], gate.shape[0])
    checks.same_device("labels", labels, "features", features)
    # Widened before a row is taken: the gradients of its samples are summed in the wider type.
    rows = _as(gate, reference.accumulate_dtype(features.dtype)).index_select(
        0, _as(labels, torch.int64)
    )
    return _masked(maps, rows, channel_dim)


def _masked(maps: Tensor, mask: Tensor, channel_dim: int) -> Tensor:
    masked: Tensor = torch.ops.picnn_fast.mask_channels.default(readable(maps), mask)
    return masked if channel_dim == 1 else masked.movedim(1, channel_dim)


def _gate(value: Tensor) -> Tensor:
    checks.floating("gate", value)
    if value.ndim != 2 or len(value) == 0:
        raise ValueError(
            f"gate: got shape {tuple(value.shape)}, want [classes, filters], at least one class"
        )
    return value


def project_gate(gate: Tensor) -> Tensor:
    """See ``functional.project_gate``."""
    return reference.project_gate(_gate(gate))


def gate_penalty(gate: Tensor, bound: float, *, norm: str) -> Tensor:
    """See ``functional.gate_penalty``."""
    checks.non_negative("bound", bound)
    checks.one_of("norm", norm, ("l1", "l2", "smooth_l1"))
    return reference.gate_penalty(checks.accumulable(_gate(gate)), bound, norm)
