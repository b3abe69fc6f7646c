"""Operators of the filter loss of Interpretable CNNs, with its gradient in three estimators."""

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define, may_be_differentiated
from picnn_fast.ops.layout import readable
from picnn_fast.ops.templates import (
    PartTemplate,
    assigned_templates,
    check_beta,
    check_maps,
    check_template,
    filter_tables,
    map_peaks,
)
from picnn_fast.reference import filter_loss as reference
from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.reference.templates import centre_of_mass, templates_at


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
        num_filters = checks.integer("num_filters", num_filters, 0)
        height = checks.integer("height", height, 1)
        width = checks.integer("width", width, 1)
        log_mean = torch.full(
            (num_filters, height * width + 1), -math.inf, dtype=dtype, device=device
        )
        return cls(log_mean, log_mean[:, 0].clone(), momentum)


def filter_loss(
    x: Tensor,
    template: PartTemplate,
    *,
    estimator: Literal["batch", "running", "target"] = "batch",
    labels: Tensor | None = None,
    filter_category: Tensor | None = None,
    state: FilterLossState | None = None,
    renew: bool = True,
) -> Tensor:
    """The filter loss of Interpretable CNNs: minus the mutual information of maps and templates.

    Loss = -MI(X; T) for each filter, in nats, with p(x|T) = exp(s) / Z_T, s = sum_ij x_ij·T_ij, and
    as templates T_mu for each of the h·w positions and T⁻, which is -tau everywhere, all equally
    likely. It is least where each map fits one template alone.

    - "batch": X is the batch. Loss and gradient are exact, gradcheck agrees.
    - "running": Z_T and p(x) are running estimates in ``state``, renewed by this batch first, and
      constants in the backward pass. The gradient is that of eq. 4, first line, with the sign that
      minus MI has; it is not the derivative of the value returned.
    - "target": likewise, by the one template each map is assigned to (eq. 4, second line): the one
      at its peak where the image is of the filter's category, T⁻ where it is not.

    Args:
        x: maps ``[B, N, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU.
            Contiguous and channels_last maps are read in place.
        template: see ``PartTemplate``.
        estimator: of the loss and its gradient.
        labels: ``[B]`` integers, the images' categories; of "target". None, with
            ``filter_category`` None: every image is of every filter's category.
        filter_category: ``[N]`` integers, each filter's category; of "target".
        state: of "running" and "target", which want one: ``FilterLossState.empty(N, h, w)``.
            Renewed in place.
        renew: of "running" and "target": False takes the estimates as this batch would make them
            and leaves ``state`` as it is, as in evaluation.

    Returns:
        ``[N]``, float64 for float64 maps, else float32. 0 for an empty batch; NaN for a filter with
        a value that is not finite, or values whose sum over a map overflows float32.

    Raises:
        TypeError: unsupported dtype; a template or state that is none.
        ValueError: no maps ``[B, N, h, w]``, maps without a position, shapes or devices that
            disagree, an option of another estimator.
        RuntimeError: the gradient is differentiated: there are no second derivatives; a state that
            ``torch.utils.checkpoint`` would renew again in the backward pass.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, eq. 1-4.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.functional import filter_loss
        >>> peaks = 500 * torch.eye(16).view(16, 1, 4, 4)  # each map has its own
        >>> blurred = peaks.mean(0).expand_as(peaks)
        >>> template = PartTemplate("l2")
        >>> bool(filter_loss(peaks, template) < filter_loss(blurred, template))
        True
    """
    check_maps(x)
    checks.one_of("estimator", estimator, ESTIMATORS)
    given = {"labels": labels, "filter_category": filter_category, "state": state}
    for name, owners in _OPTIONS.items():
        if given[name] is not None and estimator not in owners:
            raise ValueError(
                f"{name}: got one with estimator={estimator!r}, want None: it is an option of"
                f" {' and '.join(map(repr, owners))}"
            )
    if estimator == "batch":
        return batch_filter_loss(x, template)
    if not isinstance(state, FilterLossState):
        raise TypeError(
            f"state: got {type(state).__name__} with estimator={estimator!r}, want a"
            " FilterLossState, such as FilterLossState.empty(N, h, w)"
        )
    if estimator == "running":
        return running_filter_loss(x, template, state, renew=renew)
    return target_filter_loss(x, template, state, labels, filter_category, renew=renew)


ESTIMATORS = ("batch", "running", "target")
_OPTIONS = {
    "labels": ("target",),
    "filter_category": ("target",),
    "state": ("running", "target"),
}


def batch_filter_loss(x: Tensor, template: PartTemplate) -> Tensor:
    """``filter_loss`` with X the batch: exact, and so is its gradient."""
    maps, *options = _operands(x, template)
    loss: Tensor = _filter_loss_operator(maps, *options)[0]
    return loss


def running_filter_loss(
    x: Tensor, template: PartTemplate, state: FilterLossState, *, renew: bool = True
) -> Tensor:
    """``filter_loss`` by estimates of Z_T and p(x), summed over the templates (eq. 4)."""
    operands = _operands(x, template)
    _check_state(x, state)
    return _by_estimates(operands, None, state, renew)


def target_filter_loss(
    x: Tensor,
    template: PartTemplate,
    state: FilterLossState,
    labels: Tensor | None = None,
    filter_category: Tensor | None = None,
    *,
    renew: bool = True,
) -> Tensor:
    """``filter_loss`` by estimates, of the one template each map is assigned to (eq. 4)."""
    operands = _operands(x, template)
    _check_state(x, state)
    if labels is None and filter_category is None:
        return _by_estimates(operands, map_peaks(x), state, renew)
    if labels is None or filter_category is None:
        missing = "labels" if labels is None else "filter_category"
        raise ValueError(f"{missing}: got None, want both labels and filter_category, or neither")
    _check_categories(x, labels, filter_category)
    return _by_estimates(operands, assigned_templates(x, labels, filter_category), state, renew)


def _operands(x: Tensor, template: PartTemplate) -> tuple[Tensor, Tensor, float, bool]:
    """What every operator takes: maps, offsets, tau, and whether the gradient is wanted."""
    height, width = check_maps(x)
    offsets = check_template(template).offsets_for(height, width, x)
    with_grad = may_be_differentiated(x)
    return readable(x), offsets, template.tau_for(height, width), with_grad


def _by_estimates(
    operands: tuple[Tensor, Tensor, float, bool],
    assigned: Tensor | None,
    state: FilterLossState,
    renew: bool,
) -> Tensor:
    if checks.boolean("renew", renew):
        checks.not_recomputed("filter_loss")
    maps, *options = operands
    loss: Tensor
    loss, _, log_mean, log_ratio = _filter_loss_running_operator(
        maps, state.log_mean, state.log_ratio, state.momentum, assigned, *options
    )
    if renew:
        with torch.no_grad():
            torch._foreach_copy_([state.log_mean, state.log_ratio], [log_mean, log_ratio])
    return loss


def published_filter_loss(
    x: Tensor,
    template: PartTemplate,
    *,
    labels: Tensor,
    filter_category: Tensor,
    density: Tensor,
    beta: Tensor | None = None,
) -> Tensor:
    """The filter loss by the gradient that the authors' published code of ICNN has.

    That code knows no loss, only a gradient, which is not that of minus the mutual information
    (``filter_loss``). Here strengths and templates are constants, of a loss that is linear in the
    maps, so that its gradient is the published one, divided by the batch as the authors' is in the
    end. Their weight 1e-6/t in epoch t is left to the caller (``models.ICNN``).

    T is the template, in units of tau, about the map's centre of mass. An image of the filter's
    category gets the gradient -T·strength·.5/density; any other strength·.5/(1 - density) at every
    position, which pushes the map down. With alpha = .5 the strength is
    e^(s/alpha) (s - alpha·log Z + alpha) over its mean, over the batch's images of the category or
    over the others; s is the mean over positions of x·T, or of -x for the others. Z is the mean
    over the batch of e^(s'/alpha), s' with the template of another image and filter (images and
    filters in reverse); for the others s' = s. All composed of PyTorch's operators.

    Args:
        x: maps ``[B, N, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU.
        template: see ``PartTemplate``; its tau does not matter.
        labels: ``[B]`` integers, the images' categories.
        filter_category: ``[N]`` integers, each filter's category.
        density: ``[N]`` floating in (0, 1): the share of images that are of the filter's category;
            1/K with more than ten classes, in the published code.
        beta: see ``template_mask``.

    Returns:
        ``[N]``, float64 for float64 maps, else float32; 0 for an empty batch.

    Raises:
        TypeError: unsupported dtype, a template that is none.
        ValueError: no maps ``[B, N, h, w]``, maps without a position, shapes or devices that
            disagree; a beta as in ``template_mask``.

    Source:
        The code that Zhang, Wu, Zhu published with "Interpretable Convolutional Neural Networks",
        CVPR 2018, as described; none of it is used here.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.functional import published_filter_loss
        >>> x = torch.ones(2, 1, 3, 3, requires_grad=True)
        >>> loss = published_filter_loss(
        ...     x, PartTemplate(), labels=torch.tensor([0, 1]), filter_category=torch.tensor([0]),
        ...     density=torch.tensor([0.5]))
        >>> torch.autograd.grad(loss.sum(), x)[0][:, 0, 1]  # the category's image, and another
        tensor([[ 0.1667, -0.5000,  0.1667],
                [ 0.5000,  0.5000,  0.5000]])
    """
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


def _check_state(x: Tensor, state: FilterLossState) -> None:
    """Estimates of maps of that size, in the type of their sums."""
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


def _fake_filter_loss(
    x: Tensor, offsets: Tensor, tau: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    grad = torch.empty_like(x, dtype=dtype) if with_grad else x.new_empty(0, dtype=dtype)
    return x.new_empty(x.shape[1], dtype=dtype), grad


def _fake_filter_loss_running(
    x: Tensor,
    log_mean: Tensor,
    log_ratio: Tensor,
    momentum: float,
    assigned: Tensor | None,
    offsets: Tensor,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, grad = _fake_filter_loss(x, offsets, tau, with_grad)
    return loss, grad, log_mean.new_empty(log_mean.shape), log_ratio.new_empty(log_ratio.shape)


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
    scale = grad_loss[:, None, None]
    if grad.dtype == ctx.dtype:
        return (grad * scale,)
    if not (grad.is_cuda or grad.is_contiguous()):
        # On the CPU an ``out`` of another type is gone through one number at a time there.
        return ((grad * scale).to(ctx.dtype),)
    # Rounded once, as by ``to``, and in the same pass over the maps.
    return (torch.mul(grad, scale, out=torch.empty_like(grad, dtype=ctx.dtype)),)


_filter_loss_operator = define(
    "filter_loss",
    "filter_loss(Tensor x, Tensor offsets, float tau, bool with_grad)"
    " -> (Tensor loss, Tensor grad)",
    reference=reference.filter_loss,
    fake=_fake_filter_loss,
    setup_context=_setup_filter_loss,
    backward=_filter_loss_gradient,
    constants=[1],
)
_filter_loss_running_operator = define(
    "filter_loss",
    "filter_loss_running(Tensor x, Tensor log_mean, Tensor log_ratio, float momentum,"
    " Tensor? assigned, Tensor offsets, float tau, bool with_grad)"
    " -> (Tensor loss, Tensor grad, Tensor log_mean_, Tensor log_ratio_)",
    reference=reference.filter_loss_running,
    fake=_fake_filter_loss_running,
    setup_context=_setup_filter_loss,
    backward=_filter_loss_gradient,
    constants=[1],
)
