"""The reference's filter loss against eq. 1-4 of Interpretable CNNs in plain Python.

In the paper's notation: X the maps of one filter, T its templates, p(x|T) = exp(tr(x·T)) / Z_T.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.ops.filter_loss import FilterLossState
from picnn_fast.reference import filter_loss as reference

Rows = list[list[float]]


def all_templates(template: PartTemplate, height: int, width: int) -> Rows:
    """Every template as a row of positions, the negative one last."""
    table = template.offsets_for(height, width, torch.empty(0, dtype=torch.float64))
    tau = template.tau_for(height, width)
    rows = []
    for mu in range(height * width):
        row = []
        for position in range(height * width):
            di = position // width - mu // width
            dj = position % width - mu % width
            row.append(tau * table[di + height - 1, dj + width - 1].item())
        rows.append(row)
    return [*rows, [-tau] * (height * width)]


def responses(maps: Rows, templates: Rows) -> Rows:
    """tr(x·T) of every map and template."""
    return [[sum(a * b for a, b in zip(x, t, strict=True)) for t in templates] for x in maps]


def batch_loss(maps: Rows, templates: Rows) -> float:
    """-MI(X; T) with X the batch: eq. 1, from its sums."""
    s = responses(maps, templates)
    prior = 1 / len(templates)
    z = [sum(math.exp(row[t]) for row in s) for t in range(len(templates))]
    given = [[math.exp(value) / z[t] for t, value in enumerate(row)] for row in s]
    marginal = [sum(prior * p for p in row) for row in given]
    return -sum(prior * p * math.log(p / marginal[b]) for b, row in enumerate(given) for p in row)


def running_loss(
    maps: Rows,
    templates: Rows,
    log_mean: list[float],
    log_ratio: float,
    momentum: float,
    assigned: list[int] | None,
) -> tuple[float, Rows, list[float], float]:
    """Loss, gradient and new state by running estimates: eq. 4 with the sign of minus MI."""

    def mix(old: float, new: float) -> float:
        if old == -math.inf:
            return new
        return math.log((1 - momentum) * math.exp(old) + momentum * math.exp(new))

    s = responses(maps, templates)
    batch, count = len(s), len(templates)
    means = [
        mix(log_mean[t], math.log(sum(math.exp(row[t]) for row in s) / batch)) for t in range(count)
    ]
    in_batch = sum(math.exp(row[t] - means[t]) for row in s for t in range(count))
    ratio = mix(log_ratio, math.log(in_batch / (batch * count)))
    loss, grads = 0.0, []
    for b, row in enumerate(s):
        grad = [0.0] * len(maps[b])
        for t in range(count):
            if assigned is not None and assigned[b] != t:
                continue
            given = math.exp(row[t]) / (batch * math.exp(means[t]))
            term = given / count * math.log(given / (math.exp(ratio) / batch))
            loss -= term
            for position, value in enumerate(templates[t]):
                grad[position] -= term * value
        grads.append(grad)
    return loss, grads, means, ratio


TEMPLATES = {
    "l1": PartTemplate("l1"),
    "l2": PartTemplate("l2", beta=2.0),
    "uniform": PartTemplate("l1", "uniform", beta=4.0),
    "no symmetry": PartTemplate(
        profile=torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
    ),
}
cases = given(
    st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(sorted(TEMPLATES)),
    st.integers(0, 100),
    st.sampled_from([1.0, 20.0]),
)


def random_maps(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).relu()


def of_filter(x: Tensor, filter_: int) -> Rows:
    rows: Rows = x[:, filter_].flatten(1).tolist()
    return rows


@cases
def test_the_batch_loss_is_minus_the_mutual_information(shape, name, seed, scale):
    x = random_maps(shape, seed, scale)
    height, width = shape[2:]
    template = TEMPLATES[name]
    arguments = (template.offsets_for(height, width, x), template.tau_for(height, width))
    loss, grad = reference.filter_loss(x, *arguments, True)
    rows = all_templates(template, height, width)
    for i in range(shape[1]):
        assert loss[i].item() == pytest.approx(batch_loss(of_filter(x, i), rows), abs=1e-12)
    torch.testing.assert_close(reference.definition(x, *arguments), loss, rtol=0, atol=1e-12)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.definition(leaf, *arguments).sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)
    without, nothing = reference.filter_loss(x, *arguments, False)
    assert torch.equal(without, loss)
    assert nothing.numel() == 0


@cases
def test_running_estimates_follow_their_formula(shape, name, seed, scale):
    x = random_maps(shape, seed, scale)
    height, width = shape[2:]
    template = TEMPLATES[name]
    arguments = (template.offsets_for(height, width, x), template.tau_for(height, width))
    count = height * width + 1
    generator = torch.Generator().manual_seed(seed)
    log_mean = torch.randn(shape[1], count, generator=generator, dtype=torch.float64)
    log_ratio = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    log_mean[0] = log_ratio[0] = -math.inf  # before the first batch
    chosen = torch.randint(0, count, shape[:2], generator=generator)
    rows = all_templates(template, height, width)
    for assigned, momentum in ((None, 0.25), (chosen, 0.25), (None, 1.0)):
        loss, grad, means, ratios = reference.filter_loss_running(
            x, log_mean, log_ratio, momentum, assigned, *arguments, True
        )
        for i in range(shape[1]):
            want = running_loss(
                of_filter(x, i),
                rows,
                log_mean[i].tolist(),
                log_ratio[i].item(),
                momentum,
                None if assigned is None else assigned[:, i].tolist(),
            )
            got = (loss[i], grad[:, i].flatten(1), means[i], ratios[i])
            for one, two in zip(got, want, strict=True):
                expected = torch.tensor(two, dtype=torch.float64).view_as(one)
                torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-11)


def test_the_mutual_information_is_between_nothing_and_the_entropy_of_the_maps():
    """Maps that fit one template each tell which; maps alike tell nothing."""
    template = PartTemplate("l1", beta=8.0)
    apart = 1e5 * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    alike = torch.ones(16, 1, 4, 4, dtype=torch.float64)
    for x, least, most in ((apart, 0.9, 1.0), (alike, 0.0, 1e-9)):
        arguments = (template.offsets_for(4, 4, x), template.tau_for(4, 4))
        share = -reference.filter_loss(x, *arguments, False)[0].item() / math.log(16)
        assert least - 1e-9 <= share <= most


def test_the_first_batch_alone_is_its_own_estimate():
    """With nothing before it, the running loss is the loss over the batch."""
    x = random_maps((5, 3, 4, 3), 0, 20.0)
    template = PartTemplate()
    arguments = (template.offsets_for(4, 3, x), template.tau_for(4, 3))
    state = FilterLossState.empty(3, 4, 3, dtype=torch.float64)
    running = reference.filter_loss_running(
        x, state.log_mean, state.log_ratio, 0.1, None, *arguments, False
    )
    # p(x) is one number for all maps here, so only the conditional part agrees.
    s = reference._responses(x, reference._templates(x, *arguments))
    torch.testing.assert_close(running[2], s.logsumexp(0) - math.log(5))
    torch.testing.assert_close(running[3], torch.zeros(3, dtype=torch.float64))
    given = (s - s.logsumexp(0)).exp()
    want = -(given * (given * 5).log()).sum((0, 2)) / 13
    torch.testing.assert_close(running[0], want)
