"""The filter loss in plain PyTorch: the definition the kernels are held to.

Notation of ICNN, eq. 1-4: P = h·w positions; the templates are T_mu at each of them and T⁻, which
is -tau everywhere; s[b, T] = sum_ij x_b[i, j]·T[i, j]. With alpha = n²/(1 + n²) every one of the
P + 1 templates has the same prior, 1/(P + 1).
"""

import math

import torch
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.reference.templates import spread_about, template_matrix


def _templates(x: Tensor, offsets: Tensor, tau: float) -> Tensor:
    """All templates as rows ``[P + 1, P]``, the negative one last."""
    height, width = x.shape[2:]
    positive = template_matrix(offsets.to(accumulate_dtype(x.dtype)), height, width)
    negative = positive.new_full((1, height * width), -1)
    return torch.cat([positive, negative]) * tau


def _responses(x: Tensor, templates: Tensor) -> Tensor:
    """s ``[B, N, P + 1]``."""
    # Autocast would lower the product.
    with torch.autocast(x.device.type, enabled=False):
        return x.flatten(2).to(templates.dtype) @ templates.T


def batch_terms(responses: Tensor) -> tuple[Tensor, Tensor]:
    """p(x_b|T) and L = log(p(x_b|T) / p(x_b)), each ``[B, N, P + 1]``, over the batch."""
    log_given = responses - responses.logsumexp(0)
    log_marginal = log_given.logsumexp(-1, keepdim=True) - math.log(responses.shape[-1])
    return log_given.exp(), log_given - log_marginal


def definition(x: Tensor, offsets: Tensor, tau: float) -> Tensor:
    """-MI(X; T) over the batch ``[N]`` (ICNN, eq. 1): what autograd differentiates in the tests."""
    responses = _responses(x, _templates(x, offsets, tau))
    given, log_ratio = batch_terms(responses)
    return -(given * log_ratio).sum((0, 2)) / responses.shape[-1]


def _gradient(x: Tensor, weights: Tensor, templates: Tensor, with_grad: bool) -> Tensor:
    """dx = sum_T ds[., T]·T in the accumulation type, laid out like ``x``; empty if not asked."""
    if not with_grad:
        return weights.new_empty(0)
    grad = torch.empty_like(x, dtype=weights.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return grad.copy_((weights @ templates).view(x.shape))


def filter_loss(x: Tensor, offsets: Tensor, tau: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """``definition`` and its exact gradient with respect to ``x`` (spec of "batch").

    Args:
        x: maps ``[B, N, h, w]``.
        offsets: the template, ``[2h - 1, 2w - 1]``, see ``reference.templates``.
        tau: what its values are in units of.
        with_grad: whether the gradient is wanted.

    Returns:
        loss ``[N]`` and grad, of the shape and layout of ``x`` (no element unless ``with_grad``),
        both float64 for float64, else float32.
    """
    templates = _templates(x, offsets, tau)
    responses = _responses(x, templates)
    given, log_ratio = batch_terms(responses)
    information = (given * log_ratio).sum(0)  # [N, P + 1]
    prior = 1 / responses.shape[-1]
    weights = -prior * given * (log_ratio - information)
    return -prior * information.sum(-1), _gradient(x, weights, templates, with_grad)


def moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """log of (1 - momentum)·exp(old) + momentum·exp(new); ``new`` where there is no old, -inf."""
    if momentum == 1:
        return new
    mixed = torch.logaddexp(old + math.log1p(-momentum), new + math.log(momentum))
    return torch.where(old == -math.inf, new, mixed)


def filter_loss_running(
    x: Tensor,
    log_mean: Tensor,
    log_ratio: Tensor,
    momentum: float,
    assigned: Tensor | None,
    offsets: Tensor,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss with Z_T and p(x) kept as running estimates (ICNN, eq. 4 and footnote 2).

    The estimates take in this batch first, so that no exponential exceeds B / momentum. Z_T =
    B·exp(log_mean[T]) and p(x) = exp(log_ratio) / B: log_mean is of the mean of exp(s) over
    samples, log_ratio of the mean over samples and templates of exp(s) / exp(log_mean).

    Args:
        log_mean: ``[N, P + 1]``, -inf before the first batch.
        log_ratio: ``[N]``, likewise.
        momentum: share of the new batch, in (0, 1].
        assigned: None sums over all templates (eq. 4, first line); ``[B, N]`` int64 takes the one
            template of each map (second line): its peak, or P for T⁻.
        offsets, tau, with_grad: see ``filter_loss``.

    Returns:
        loss, grad (see ``filter_loss``), and the new log_mean and log_ratio. An empty batch
        leaves both as they are, and its loss is 0.
    """
    templates = _templates(x, offsets, tau)
    responses = _responses(x, templates)
    batch, count = len(x), responses.shape[-1]
    if batch == 0:
        loss = log_ratio.new_zeros(log_ratio.shape)
        old = [t.clone(memory_format=torch.contiguous_format) for t in (log_mean, log_ratio)]
        return loss, _gradient(x, responses, templates, with_grad), old[0], old[1]
    log_mean = moving_average(log_mean, responses.logsumexp(0) - math.log(batch), momentum)
    relative = responses - log_mean
    in_batch = relative.logsumexp((0, 2)) - math.log(batch * count)
    log_ratio = moving_average(log_ratio, in_batch, momentum)
    # p(T)·p(x_b|T)·log(p(x_b|T) / p(x_b)): minus the loss, and by eq. 4 minus ds too.
    terms = relative.exp() * (relative - log_ratio[:, None]) / (batch * count)
    if assigned is not None:
        one = torch.zeros_like(terms).scatter_(2, assigned[..., None], 1.0)
        terms = torch.where(one == 1, terms, 0.0)
    loss = -terms.sum((0, 2))
    grad = _gradient(x, -terms, templates, with_grad)
    return loss, grad, log_mean.contiguous(), log_ratio.contiguous()


# Of the published gradient: what responses are divided by in exponents.
ALPHA = 0.5


def published_strength(x: Tensor, templates: Tensor, positive: Tensor) -> Tensor:
    """How much each map counts in the gradient of the authors' code (not that of any loss).

    With T the template about the map's centre of mass in units of tau, and means over positions,
    s = mean(x·T) for an image of the filter's category and s = mean(-x), the response to T⁻, for
    any other. Either way the strength is e^(s/alpha) (s - alpha·log Z + alpha), divided by its mean
    over the images of the batch that are alike in this; Z is the mean over the batch of
    e^(s'/alpha), where s' takes the template of another image and filter in place of the map's own:
    the last for the first, images and filters both. T⁻ is the same for all.

    Args:
        x: maps ``[B, N, h, w]``, of the dtype of ``templates``.
        templates: T, ``[B, N, h, w]``.
        positive: ``[B, N]`` bool: the image is of the filter's category.

    Returns:
        ``[B, N]``.
    """
    others = (x * templates.flip(0, 1)).mean((2, 3))
    negative = -x.mean((2, 3))
    return torch.where(
        positive,
        _strength((x * templates).mean((2, 3)), others, positive),
        _strength(negative, negative, ~positive),
    )


def _strength(responses: Tensor, others: Tensor, counted: Tensor) -> Tensor:
    """``[B, N]``; 1 on average over those of a filter that are counted, 0 elsewhere."""
    log_z = (others / ALPHA).logsumexp(0) - math.log(max(len(others), 1))
    exponents = (responses / ALPHA).where(counted, -math.inf)
    # A factor common to all of a filter cancels: no exponential exceeds 1.
    strength = (exponents - exponents.logsumexp(0)).exp() * (responses - ALPHA * log_z + ALPHA)
    strength = strength.where(counted, 0.0)
    mean = strength.sum(0) / counted.sum(0)
    return (strength / mean).where(counted, 0.0)


def published_filter_loss(
    x: Tensor, templates: Tensor, positive: Tensor, density: Tensor
) -> Tensor:
    """``[N]``: what has the published gradient, strengths and templates being constants.

    -T·strength·.5/density for an image of the filter's category, strength·.5/(1 - density) at every
    position for any other, divided by the batch.

    Args:
        x, templates, positive: see ``published_strength``.
        density: ``[N]``, the share of images of the filter's category.
    """
    with torch.no_grad():
        strength = published_strength(x, templates, positive)
        weight = torch.where(positive, -0.5 * strength / density, 0.5 * strength / (1 - density))
        toward = weight[..., None, None] * torch.where(positive[..., None, None], templates, 1.0)
    return (x * toward).sum((0, 2, 3)) / max(len(x), 1)


def published_beta(x: Tensor, templates: Tensor, positive: Tensor, centre: Tensor) -> Tensor:
    """``[N]``: clip(3 / spread, 1.5, 3), on coordinates in [-1, 1], the goal of a filter's beta.

    The spread, in positions, is the mean of ``spread_about`` over the images of the filter's
    category, by ``published_strength``. NaN where there is none, or none with activations.

    Args:
        x, templates, positive: see ``published_strength``.
        centre: of the maps.
    """
    spread = spread_about(x, centre)
    counted = positive & spread.isfinite()
    weight = published_strength(x, templates, positive).where(counted, 0.0)
    mean = (weight * spread.where(counted, 0.0)).sum(0) / weight.sum(0)
    return (3 / mean).clamp(1.5, 3)
