"""The filter loss in plain PyTorch: the definition the kernels are held to.

Notation of ICNN, eq. 1-4: P = h·w positions; the templates are T_mu at each of them and T⁻, which
is -tau everywhere; s[b, T] = sum_ij x_b[i, j]·T[i, j]. With alpha = n²/(1 + n²) every one of the
P + 1 templates has the same prior, 1/(P + 1).
"""

import math

import torch
from torch import Tensor

from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.reference.templates import offset_table, template_matrix


def _templates(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    tau: float,
) -> Tensor:
    """All templates as rows ``[P + 1, P]``, the negative one last."""
    height, width = x.shape[2:]
    dtype = accumulate_dtype(x.dtype)
    values = offset_table(table, profile, norm, slope, limit, height, width, dtype, x.device)
    positive = template_matrix(values, height, width)
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


def definition(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    tau: float,
) -> Tensor:
    """-MI(X; T) over the batch ``[N]`` (ICNN, eq. 1): what autograd differentiates in the tests."""
    responses = _responses(x, _templates(x, table, profile, norm, slope, limit, tau))
    given, log_ratio = batch_terms(responses)
    return -(given * log_ratio).sum((0, 2)) / responses.shape[-1]


def _gradient(x: Tensor, weights: Tensor, templates: Tensor, with_grad: bool) -> Tensor:
    """dx = sum_T ds[., T]·T in the accumulation type, laid out like ``x``; empty if not asked."""
    if not with_grad:
        return weights.new_empty(0)
    grad = torch.empty_like(x, dtype=weights.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return grad.copy_((weights @ templates).view(x.shape))


def filter_loss(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    tau: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``definition`` and its exact gradient with respect to ``x`` (spec of "batch").

    Returns:
        loss ``[N]`` and grad, of the shape and layout of ``x`` (no element unless ``with_grad``),
        both float64 for float64, else float32.
    """
    templates = _templates(x, table, profile, norm, slope, limit, tau)
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
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
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

    Returns:
        loss, grad (see ``filter_loss``), and the new log_mean and log_ratio. An empty batch
        leaves both as they are, and its loss is 0.
    """
    templates = _templates(x, table, profile, norm, slope, limit, tau)
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
