"""Functions on tensors: the operators of picnn_fast as plain PyTorch calls."""

from typing import Literal

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops import filter_loss as _filter_loss
from picnn_fast.ops import masking as _masking
from picnn_fast.ops import templates as _templates
from picnn_fast.ops.correlation import group_class_loss, group_correlation_loss
from picnn_fast.ops.filter_loss import FilterLossState
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


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    seed: int | Tensor | None = None,
    rank: int | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask feature maps by the filters drawn for a pseudo-label (PICNN, eq. 4-10).

    A pseudo-label is drawn for each sample from softmax(logits); filter i of that sample is kept
    with probability ``correspondence[pseudo_label, i]``. Gradients are straight-through: those of
    ``mask = ỹ @ correspondence`` with ỹ the one-hot pseudo-label carrying the gradient of
    softmax(logits). The same seed gives the same mask on every backend and device, bit for bit.

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16. Contiguous and
            channels_last inputs are read in place and keep their layout.
        logits: ``[B, K]`` of the discrimination pathway, any of these dtypes (float16 and
            bfloat16 are widened to float32). A row with NaN or +inf draws the last class.
        correspondence: ``[K, N]`` probabilities in [0, 1], any of these dtypes.
        seed: 64-bit int, or int64 tensor of one element on the device of ``features``; None draws
            one from torch's generator, so ``torch.manual_seed`` reproduces the call.
        rank: separates the draws of processes that share a seed; None takes the rank in the
            default process group, 0 alone.
        channel_dim: the filter axis of ``features``, e.g. -1 for ``[B, T, N]`` tokens.

    Returns:
        masked, like ``features`` (exactly 0 where a filter is dropped, whatever its map holds);
        mask ``[B, N]`` of 0 and 1 in the dtype of ``features``; pseudo_label ``[B]`` int64, not
        differentiable.

    Raises:
        TypeError: unsupported dtype, or a seed or rank that is no int.
        ValueError: shapes or devices that disagree; probabilities outside [0, 1] or not finite.
            On a GPU, and under torch.compile, this last check runs on the device without a host
            sync and fails as a device-side assert (RuntimeError), as in ``torch.bernoulli``.

    Note:
        The gradient of the mask is the sum over positions of features times gradient, for dropped
        filters too (that is how they learn to come back), so a NaN in a dropped map makes the
        gradient of that one probability NaN.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import bernoulli_mask
        >>> masked, mask, pseudo_label = bernoulli_mask(
        ...     torch.ones(2, 3, 4, 4), torch.tensor([[9., 0.], [0., 9.]]),
        ...     torch.tensor([[1., 0., 1.], [0., 1., 0.]]), seed=0)
        >>> pseudo_label.tolist(), mask.tolist()
        ([0, 1], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    """
    return _masking.bernoulli_mask(
        features, logits, correspondence, seed=seed, rank=rank, channel_dim=channel_dim
    )


def mask_channels(features: Tensor, mask: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Scale each channel of each sample's feature maps.

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16.
        mask: ``[B, N]`` any of these dtypes; used in float32 (float64 for float64 features).
        channel_dim: the filter axis of ``features``.

    Returns:
        ``features[b, i] * mask[b, i]``, like ``features``; exactly 0 where the mask is 0, whatever
        the features hold there.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes or devices that disagree.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import mask_channels
        >>> mask_channels(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, 0.0]])).flatten()
        tensor([0.5000, 0.0000])
    """
    return _masking.mask_channels(features, mask, channel_dim=channel_dim)


def class_gate(features: Tensor, gate: Tensor, labels: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Scale feature maps by the gate row of each sample's label (Class-Specific Gate, section 3.1).

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16.
        gate: ``[K, N]`` any of these dtypes; used in float32 (float64 for float64 features).
        labels: ``[B]`` integers in [0, K).
        channel_dim: the filter axis of ``features``.

    Returns:
        ``mask_channels(features, gate[labels])``: exactly 0 where the gate is 0.

    Raises:
        TypeError: unsupported dtype, labels that are not integers.
        ValueError: shapes or devices that disagree, labels out of range (on a GPU and under
            torch.compile a device-side assert, see ``bernoulli_mask``).

    Example:
        >>> import torch
        >>> from picnn_fast.functional import class_gate
        >>> gate, labels = torch.tensor([[.5, 0.]]), torch.tensor([0])
        >>> class_gate(torch.ones(1, 2, 1, 1), gate, labels).flatten()
        tensor([0.5000, 0.0000])
    """
    return _masking.class_gate(features, gate, labels, channel_dim=channel_dim)


def project_gate(gate: Tensor) -> Tensor:
    """A gate back among those allowed: in [0, 1], and 1 for some class of every filter.

    Each filter's column is divided by its greatest element, the sign included, and clipped to
    [0, 1], as in the authors' code. A column without a positive element, which yields NaN or all
    ones there, becomes 1 at its greatest element and 0 elsewhere. Composed of PyTorch's operators:
    a gate is small beside the maps it is for.

    Args:
        gate: ``[K, N]`` float32, float64, bfloat16 or float16.

    Returns:
        Of the same shape and dtype; what is allowed already is returned as it is. A column with
        NaN keeps it.

    Raises:
        TypeError: unsupported dtype.
        ValueError: no gate ``[K, N]`` of at least one class.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 3.4.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import project_gate
        >>> project_gate(torch.tensor([[0.2, -3.0], [0.4, -1.0]]))
        tensor([[0.5000, 0.0000],
                [1.0000, 1.0000]])
    """
    return _masking.project_gate(gate)


def gate_penalty(
    gate: Tensor, bound: float, *, norm: Literal["l1", "l2", "smooth_l1"] = "l1"
) -> Tensor:
    """What is to be paid for a gate above its bound: ψ(max(‖gate‖₁ - bound, 0)) (CSG, eq. 3).

    Args:
        gate: ``[K, N]`` float32, float64, bfloat16 or float16.
        bound: g, a number >= 0.
        norm: ψ(r): "l1" is r, "l2" is r², "smooth_l1" r²/2 up to 1 and r - 1/2 beyond.

    Returns:
        A scalar, float64 for a float64 gate, else float32.

    Raises:
        TypeError: unsupported dtype, a bound that is no number.
        ValueError: no gate ``[K, N]``, a bound below 0, an unknown norm.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import gate_penalty
        >>> gate_penalty(torch.ones(2, 3), 4.0), gate_penalty(torch.ones(2, 3), 7.0)
        (tensor(2.), tensor(0.))
    """
    return _masking.gate_penalty(gate, bound, norm=norm)


def gumbel_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    temperature: float = 0.01,
    seed: int | Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gumbel-softmax in place of the Bernoulli draw: the ablation of PICNN, table 4.

    In plain PyTorch, but for the masking itself.

    One assignment of filters to classes is drawn per call, a Gumbel-softmax of ``correspondence``
    over the class axis with noise from torch's generator, and each sample is masked by the row of
    its pseudo-label. The pseudo-label is drawn, and differentiated, as in ``bernoulli_mask``.

    Args:
        temperature: of the Gumbel-softmax; > 0.
        features, logits, correspondence, seed, channel_dim: see ``bernoulli_mask``; ``seed`` rules
            the pseudo-label alone.

    Returns:
        masked, mask (in [0, 1], near 0 or 1 at low temperature) and pseudo_label, as
        ``bernoulli_mask``.

    Raises:
        TypeError, ValueError: a temperature that is not a positive number; and as
            ``bernoulli_mask``.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import gumbel_mask
        >>> _, mask, _ = gumbel_mask(
        ...     torch.ones(1, 2, 3, 3), torch.tensor([[9., 0.]]), torch.eye(2), seed=0)
        >>> mask.round().tolist()
        [[1.0, 0.0]]
    """
    checks.positive("temperature", temperature)
    # The pseudo-label and the checks of bernoulli_mask, on maps of no size.
    maps = _masking.channels_second(features, channel_dim)
    _masking.check_table("correspondence", correspondence, maps.shape[1], features, channel_dim)
    empty = maps.new_empty((*maps.shape[:2], 0))
    _, _, pseudo_label = bernoulli_mask(empty, logits, correspondence, seed=seed)
    assignment = torch.nn.functional.gumbel_softmax(
        checks.accumulable(correspondence).clamp_min(torch.finfo(torch.float32).tiny).log(),
        tau=temperature,
        dim=0,
    )
    y1 = checks.accumulable(logits).softmax(-1)
    one_hot = torch.nn.functional.one_hot(pseudo_label, logits.shape[-1])
    with torch.autocast(features.device.type, enabled=False):
        mask = (one_hot + y1 - y1.detach()).to(assignment.dtype) @ assignment
    masked = mask_channels(features, mask, channel_dim=channel_dim)
    return masked, mask.to(features.dtype), pseudo_label


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
