"""Functions on tensors: the operators of picnn_fast as plain PyTorch calls."""

from typing import Literal

from torch import Tensor

from picnn_fast.ops import filter_loss as _filter_loss
from picnn_fast.ops import templates as _templates
from picnn_fast.ops.correlation import group_class_loss, group_correlation_loss
from picnn_fast.ops.filter_loss import FilterLossState
from picnn_fast.ops.masking import (
    bernoulli_mask,
    class_gate,
    draw_mask,
    gate_penalty,
    gumbel_mask,
    mask_channels,
    project_gate,
)
from picnn_fast.ops.mutual_information import (
    histogram_mutual_information,
    knn_mutual_information,
    mutual_information,
    mutual_information_score,
    soft_histogram_mutual_information,
)
from picnn_fast.ops.templates import PartTemplate

__all__ = [
    "FilterLossState",
    "bernoulli_mask",
    "class_gate",
    "draw_mask",
    "filter_loss",
    "gate_penalty",
    "group_class_loss",
    "group_correlation_loss",
    "gumbel_mask",
    "histogram_mutual_information",
    "knn_mutual_information",
    "mask_channels",
    "mutual_information",
    "mutual_information_score",
    "project_gate",
    "published_filter_loss",
    "soft_histogram_mutual_information",
    "template_mask",
]


def template_mask(
    x: Tensor,
    template: PartTemplate,
    *,
    scale: float | Literal["tau"] = 1.0,
    center: Literal["argmax", "mass"] = "argmax",
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep of each map what lies around its peak: the mask layer of Interpretable CNNs.

    With mu the peak of a map, its first maximum in row-major order, the map is multiplied by
    scale·max(T_mu / tau, 0). The mask counts as a constant in the backward pass. With
    ``center="mass"``, as in the authors' published code, mu is the map's centre of mass
    Σ pos·x / Σ x, rounded to the nearest position, halves up; (0, 0) where Σ x is 0 or not finite.
    Where activations have both signs it may lie outside: the nearest position of the map counts.

    The usual call is a kernel of its own; ``center="mass"`` and ``beta`` are composed of PyTorch's
    operators, with sums in float32 at least.

    Args:
        x: maps ``[B, N, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU;
            sides of 1 to 32768. Contiguous and channels_last maps are read in place and keep their
            layout.
        template: its tau does not matter unless ``scale="tau"``.
        scale: what the peak is multiplied by: 1 as in the published code; "tau" is the paper's
            text, max(T_mu, 0) with tau left in.
        center: "argmax" or "mass": what mu is.
        beta: ``[N]`` floating, for each filter in place of the template's own, in the same units;
            of gradient templates. A constant in the backward pass.

    Returns:
        masked, like ``x``; peak ``[B, N]`` int64, mu as row · w + column. A map of zeros stays one.
        NaN counts as the maximum and, like infinity, makes NaN where the mask is 0.

    Raises:
        TypeError: unsupported dtype, a template that is no ``PartTemplate``.
        ValueError: no maps ``[B, N, h, w]``, maps without a position, a template's table too small
            for them, a scale that is no number > 0, betas of another shape or of a template that is
            no gradient.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 3.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.functional import template_mask
        >>> x = torch.tensor([[[[1.0, 2.0, 1.0, 2.0]]]])
        >>> masked, peak = template_mask(x, PartTemplate("l1", beta=2.0))
        >>> peak.item(), masked.flatten().tolist()
        (1, [0.5, 2.0, 0.5, 0.0])
        >>> template_mask(x, PartTemplate("l1", beta=2.0), center="mass")[1].item()  # 10 / 6
        2
    """
    return _templates.template_mask(x, template, scale=scale, center=center, beta=beta)


def filter_loss(
    x: Tensor,
    template: PartTemplate,
    *,
    estimator: Literal["batch", "running", "target"] = "batch",
    labels: Tensor | None = None,
    filter_category: Tensor | None = None,
    state: FilterLossState | None = None,
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
    return _filter_loss.filter_loss(
        x,
        template,
        estimator=estimator,
        labels=labels,
        filter_category=filter_category,
        state=state,
    )


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
    return _filter_loss.published_filter_loss(
        x,
        template,
        labels=labels,
        filter_category=filter_category,
        density=density,
        beta=beta,
    )
