"""Operators of the filter loss of Interpretable CNNs, with its gradient in three estimators."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define, may_be_differentiated
from picnn_fast.ops.layout import readable
from picnn_fast.ops.templates import (
    ARGUMENTS,
    PartTemplate,
    check_beta,
    check_maps,
    check_template,
    filter_tables,
)
from picnn_fast.reference import filter_loss as reference
from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.reference.templates import centre_of_mass, templates_at

ESTIMATORS = ("batch", "running", "target")


@dataclasses.dataclass
class FilterLossState:
    """Running estimates of Z_T and p(x), which ``functional.filter_loss`` renews at each call.

    Make one with ``FilterLossState.empty``; a module keeps the two tensors as buffers. A map that
    is not finite spoils its filter's estimates for good, as in batch norm.

    Args:
        log_mean: ``[N, h·w + 1]``: log of the mean of exp(s) over samples, for each template; -inf
            before the first batch. float32, or float64 for float64 maps.
        log_ratio: ``[N]``: log of the mean over samples and templates of exp(s) / exp(log_mean).
        momentum: share of a new batch, in (0, 1].

    Raises:
        TypeError, ValueError: tensors that are no such pair, momentum out of range.
    """

    log_mean: Tensor
    log_ratio: Tensor
    momentum: float = 0.1

    def __post_init__(self) -> None:
        for name in ("log_mean", "log_ratio"):
            value = getattr(self, name)
            checks.floating(name, value)
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name}: got dtype {value.dtype}, want float32 or float64")
        if self.log_mean.ndim != 2 or self.log_ratio.shape != self.log_mean.shape[:1]:
            raise ValueError(
                f"log_mean, log_ratio: got shapes {tuple(self.log_mean.shape)} and"
                f" {tuple(self.log_ratio.shape)}, want [filters, templates] and [filters]"
            )
        checks.positive("momentum", self.momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum: got {self.momentum}, want a number in (0, 1]")

    @classmethod
    def empty(
        cls,
        num_filters: int,
        height: int,
        width: int,
        *,
        momentum: float = 0.1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "FilterLossState":
        """Before the first batch, for maps ``[B, num_filters, height, width]``."""
        checks.integer("num_filters", num_filters, 0)
        checks.integer("height", height, 1)
        checks.integer("width", width, 1)
        log_mean = torch.full(
            (num_filters, height * width + 1), -math.inf, dtype=dtype, device=device
        )
        return cls(log_mean, log_mean[:, 0].clone(), momentum)


def _setup_filter_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *_, ctx.with_grad = inputs
    _, grad, *state = output
    # Differentiable, so that whoever differentiates the gradient comes to backward again.
    ctx.save_for_backward(grad)
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(*state)


def _filter_loss_gradient(
    ctx: Any,
    saved: tuple[Tensor],
    grad_loss: Tensor | None,
    grad_grad: Tensor | None,
    *_: None,
) -> tuple[Tensor]:
    """The operator yields the loss and its gradient."""
    if grad_grad is not None:
        raise RuntimeError(
            "filter_loss: got its gradient to differentiate, want first derivatives alone:"
            " double backward is not offered"
        )
    assert grad_loss is not None
    if not ctx.with_grad:
        raise ValueError("with_grad: got False, want True for maps that are differentiated")
    (grad,) = saved
    return ((grad * grad_loss[:, None, None]).to(ctx.dtype),)


def _fake_loss(x: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    grad = torch.empty_like(x, dtype=dtype) if with_grad else x.new_empty(0, dtype=dtype)
    return x.new_empty(x.shape[1], dtype=dtype), grad


def _fake_filter_loss(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(x, with_grad)


def _fake_filter_loss_running(
    x: Tensor,
    log_mean: Tensor,
    log_ratio: Tensor,
    momentum: float,
    assigned: Tensor | None,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad = _fake_loss(x, with_grad)
    return loss, grad, log_mean.new_empty(log_mean.shape), log_ratio.new_empty(log_ratio.shape)


define(
    "filter_loss",
    f"filter_loss(Tensor x, {ARGUMENTS}, float tau, bool with_grad) -> (Tensor loss, Tensor grad)",
    reference=reference.filter_loss,
    fake=_fake_filter_loss,
    setup_context=_setup_filter_loss,
    backward=_filter_loss_gradient,
    constants=[1],
)
define(
    "filter_loss",
    "filter_loss_running(Tensor x, Tensor log_mean, Tensor log_ratio, float momentum,"
    f" Tensor? assigned, {ARGUMENTS}, float tau, bool with_grad)"
    " -> (Tensor loss, Tensor grad, Tensor log_mean_, Tensor log_ratio_)",
    reference=reference.filter_loss_running,
    fake=_fake_filter_loss_running,
    setup_context=_setup_filter_loss,
    backward=_filter_loss_gradient,
    constants=[1],
)


def _check_categories(x: Tensor, labels: Tensor, filter_category: Tensor) -> None:
    for name, value, size, axis in (
        ("labels", labels, len(x), "sample"),
        ("filter_category", filter_category, x.shape[1], "filter"),
    ):
        checks.tensor(name, value)
        if value.dtype not in checks.INTEGER:
            raise TypeError(f"{name}: got dtype {value.dtype}, want integers, such as torch.int64")
        if tuple(value.shape) != (size,):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, want ({size},), one a {axis}"
            )
        checks.same_device(name, value, "x", x)


def _check_options(
    x: Tensor,
    estimator: str,
    labels: Tensor | None,
    filter_category: Tensor | None,
    state: FilterLossState | None,
) -> None:
    checks.one_of("estimator", estimator, ESTIMATORS)
    categories = {"labels": labels, "filter_category": filter_category}
    if estimator != "target":
        for name, value in categories.items():
            if value is not None:
                raise ValueError(
                    f"{name}: got a tensor with estimator={estimator!r}, want None: it is an"
                    " option of 'target'"
                )
    elif (labels is None) != (filter_category is None):
        missing = "labels" if labels is None else "filter_category"
        raise ValueError(f"{missing}: got None, want both labels and filter_category, or neither")
    if labels is not None and filter_category is not None:
        _check_categories(x, labels, filter_category)
    if estimator == "batch":
        if state is not None:
            raise ValueError(
                "state: got one with estimator='batch', want None: it is of 'running' and 'target'"
            )
        return
    if not isinstance(state, FilterLossState):
        raise TypeError(
            f"state: got {type(state).__name__} with estimator={estimator!r}, want a"
            " FilterLossState, such as FilterLossState.empty(N, h, w)"
        )
    want = (x.shape[1], x.shape[2] * x.shape[3] + 1)
    if tuple(state.log_mean.shape) != want:
        raise ValueError(
            f"state: got log_mean of shape {tuple(state.log_mean.shape)}, want {want} for maps of"
            f" shape {tuple(x.shape)}"
        )
    dtype = accumulate_dtype(x.dtype)
    for name in ("log_mean", "log_ratio"):
        value = getattr(state, name)
        checks.same_device(f"state.{name}", value, "x", x)
        if value.dtype != dtype:
            raise TypeError(
                f"state.{name}: got dtype {value.dtype}, want {dtype} for {x.dtype} maps"
            )


def filter_loss(
    x: Tensor,
    template: PartTemplate,
    *,
    estimator: str,
    labels: Tensor | None,
    filter_category: Tensor | None,
    state: FilterLossState | None,
    renew: bool = True,
) -> Tensor:
    """See ``functional.filter_loss``; ``renew``: whether the state takes in the batch."""
    check_maps(x)
    height, width = x.shape[2:]
    arguments = check_template(template).arguments(height, width, x)
    _check_options(x, estimator, labels, filter_category, state)
    maps = readable(x)
    with_grad = may_be_differentiated(x)
    options = (*arguments, template.tau_for(height, width), with_grad)
    if state is None:
        loss: Tensor = torch.ops.picnn_fast.filter_loss.default(maps, *options)[0]
        return loss
    if renew:
        checks.not_recomputed("filter_loss")
    assigned = None
    if estimator == "target":
        peak = torch.ops.picnn_fast.template_mask.default(maps.detach(), *arguments, 1.0)[1]
        assigned = peak
        if labels is not None and filter_category is not None:
            mine = labels[:, None] == filter_category
            assigned = torch.where(mine, peak, height * width)
    loss, _, log_mean, log_ratio = torch.ops.picnn_fast.filter_loss_running.default(
        maps, state.log_mean, state.log_ratio, state.momentum, assigned, *options
    )
    if renew:
        with torch.no_grad():
            state.log_mean.copy_(log_mean)
            state.log_ratio.copy_(log_ratio)
    return loss


def published_filter_loss(
    x: Tensor,
    template: PartTemplate,
    *,
    labels: Tensor,
    filter_category: Tensor,
    density: Tensor,
    beta: Tensor | None,
) -> Tensor:
    """See ``functional.published_filter_loss``."""
    maps, _, templates, positive = _about_the_mass(x, template, labels, filter_category, beta)
    checks.floating("density", density)
    if tuple(density.shape) != (x.shape[1],):
        raise ValueError(
            f"density: got shape {tuple(density.shape)}, want ({x.shape[1]},), one a filter"
        )
    checks.same_device("density", density, "x", x)
    return reference.published_filter_loss(maps, templates, positive, density.to(maps.dtype))


@torch.no_grad()
def published_beta(
    x: Tensor, template: PartTemplate, *, labels: Tensor, filter_category: Tensor, beta: Tensor
) -> Tensor:
    """The beta that the authors' code moves each filter towards, see ``layers.LearnedBeta``."""
    maps, centre, templates, positive = _about_the_mass(x, template, labels, filter_category, beta)
    return reference.published_beta(maps, templates, positive, centre)


def _about_the_mass(
    x: Tensor,
    template: PartTemplate,
    labels: Tensor,
    filter_category: Tensor,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps to accumulate in; their centres of mass; the templates there; which are positive."""
    check_maps(x)
    _check_categories(x, labels, filter_category)
    if beta is not None:
        check_beta(beta, template, x)
    with torch.no_grad():
        centre = centre_of_mass(x)
        tables = filter_tables(check_template(template), x, beta)
        templates = templates_at(centre, tables, *x.shape[2:])
    positive = labels[:, None] == filter_category
    return x.to(templates.dtype), centre, templates, positive
