"""The fixed cost of a call: operators on tiny tensors, beside plain PyTorch as a user writes it.

    python -m benchmarks.calls [--device cpu|cuda] [--smoke]

Forward and backward, Python included, on one thread; nothing is left of the arithmetic. Beside them
an ``autograd.Function`` that does nothing, the least that an operator with a gradient in Python can
cost, one of template_mask's kernels and nothing else, and ``x * 2``. A file of its own: it is of
all families.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import correlation, filter_loss, harness, masking
from benchmarks.harness import Effort
from picnn_fast import PartTemplate, functional

BATCH, FILTERS, SIDE, CLASSES, BINS = 2, 4, 3, 5, 4
CALLS = 4  # that are timed together
EMPTY, DOUBLE = "an empty autograd.Function", "x * 2"
KERNELS = "template_mask, its kernels alone"
Candidates = dict[str, Callable[[], Tensor]]


class Empty(torch.autograd.Function):
    """A new tensor, and one for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


class TemplateMask(torch.autograd.Function):
    """The kernels by PyTorch's dispatcher, without what the library has around them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor) -> Tensor:
        operator = torch.ops.picnn_fast.template_mask.default
        masked, peak = harness.below_autograd(operator, x, offsets, 1.0)
        ctx.save_for_backward(peak, offsets)
        return masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        operator = torch.ops.picnn_fast.template_mask_backward.default
        return harness.below_autograd(operator, grad, *ctx.saved_tensors, 1.0), None


class Tiny:
    """Tensors that every candidate shares."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def leaf(*size: int) -> Tensor:
            return torch.rand(*size, device=device, generator=generator).requires_grad_()

        self.maps = leaf(BATCH, FILTERS, SIDE, SIDE)
        self.logits, self.mask = leaf(BATCH, CLASSES), leaf(BATCH, FILTERS)
        self.table = leaf(CLASSES, FILTERS)
        self.activations = leaf(2 * CLASSES, FILTERS)
        self.labels = torch.arange(BATCH, device=device)
        self.classes = torch.arange(2 * CLASSES, device=device) % CLASSES
        self.leaves = (self.maps, self.logits, self.mask, self.table, self.activations)

    def forget(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def timed(self, output: Callable[[], Tensor]) -> Callable[[], None]:
        """``CALLS`` forward and backward passes."""
        grad = torch.rand_like(output())

        def call() -> None:
            for _ in range(CALLS):
                self.forget()
                output().backward(grad)

        return call

    def ours(self) -> Candidates:
        x, template = self.maps, PartTemplate("l1")
        estimates = functional.FilterLossState.empty(FILTERS, SIDE, SIDE, device=self.device)
        groups = torch.arange(FILTERS, device=self.device) % 2
        mean = torch.zeros(FILTERS, SIDE, SIDE, device=self.device)
        return {
            "bernoulli_mask": lambda: functional.bernoulli_mask(x, self.logits, self.table)[0],
            "draw_mask": lambda: functional.draw_mask(self.table, self.labels),
            "mask_channels": lambda: functional.mask_channels(x, self.mask),
            "class_gate": lambda: functional.class_gate(x, self.table, self.labels),
            "template_mask": lambda: functional.template_mask(x, template)[0],
            "filter_loss": lambda: functional.filter_loss(x, template),
            "filter_loss, running": lambda: functional.filter_loss(
                x, template, estimator="running", state=estimates
            ),
            "group_correlation_loss": lambda: functional.group_correlation_loss(
                x, mean, groups, num_groups=2
            ),
            "soft_histogram_mutual_information": lambda: (
                functional.soft_histogram_mutual_information(
                    self.activations, self.classes, CLASSES, bins=BINS
                )
            ),
        }

    def plain(self) -> Candidates:
        x, case = self.maps, (BATCH, FILTERS, SIDE, SIDE, torch.float32, torch.contiguous_format)
        of_losses = filter_loss.Case(case, self.device, sets=1)
        bank = of_losses.rows[:-1].view(-1, SIDE, SIDE).clamp_min(0)
        of_groups = correlation.Case(case, self.device, sets=1)
        estimates = of_losses.rows.new_zeros(FILTERS, len(of_losses.rows))

        def drawn() -> Tensor:
            rows = self.table[self.labels]
            return torch.bernoulli(rows.detach()) + rows - rows.detach()

        return {
            "bernoulli_mask": lambda: masking.plain(x, self.logits, self.table),
            "draw_mask": drawn,
            "mask_channels": lambda: x * self.mask[:, :, None, None],
            "class_gate": lambda: x * self.table[self.labels][:, :, None, None],
            "template_mask": lambda: x * bank[x.detach().flatten(2).argmax(-1)],
            "filter_loss": lambda: plain_loss(x, of_losses.rows),
            "filter_loss, running": lambda: plain_running_loss(x, of_losses.rows, estimates),
            "group_correlation_loss": lambda: of_groups.published(x),
            "soft_histogram_mutual_information": lambda: plain_information(
                self.activations, self.classes
            ),
        }

    def floors(self) -> Candidates:
        offsets = PartTemplate("l1").offsets_for(SIDE, SIDE, self.maps)
        return {
            KERNELS: lambda: TemplateMask.apply(self.maps, offsets),
            EMPTY: lambda: Empty.apply(self.maps),
            DOUBLE: lambda: self.maps * 2,
        }


def plain_loss(x: Tensor, rows: Tensor) -> Tensor:
    """Minus the mutual information of maps and templates (ICNN, eq. 1 to 3)."""
    scores = torch.einsum("bnp,tp->nbt", x.flatten(2), rows)
    given = scores.softmax(1)
    return -(given * (given / given.mean(2, keepdim=True)).log()).sum(1).mean(1)


def plain_running_loss(x: Tensor, rows: Tensor, log_z: Tensor) -> Tensor:
    """Its linear form by running estimates of Z_T, renewed in place (eq. 4)."""
    scores = torch.einsum("bnp,tp->nbt", x.flatten(2), rows)
    with torch.no_grad():
        log_z.lerp_(scores.logsumexp(1), 0.1)
        given = (scores - log_z[:, None]).exp()
        weight = given * (given / given.mean(2, keepdim=True)).log()
    return -(weight * scores).sum(1).mean(1)


def plain_information(activations: Tensor, labels: Tensor) -> Tensor:
    """Of filters and classes, from counts shared out between the nearest centres."""
    least, most = activations.detach().aminmax(dim=0)
    position = (activations - least) / (most - least) * (BINS - 1)
    centres = torch.arange(BINS, device=activations.device)
    shares = (1 - (position[..., None] - centres).abs()).clamp_min(0)
    one_hot = nn.functional.one_hot(labels, CLASSES).to(shares.dtype)
    joint = torch.einsum("mnb,mc->cnb", shares, one_hot) / len(labels)
    marginal, total = joint.sum(2, keepdim=True), joint.sum(0)
    rest, other = total - joint, 1 - marginal
    return (
        torch.xlogy(joint, (joint / (marginal * total)).clamp_min(1e-9))
        + torch.xlogy(rest, (rest / (other * total)).clamp_min(1e-9))
    ).sum(2)


def bench(device: torch.device, effort: Effort) -> list[dict[str, Any]]:
    """Microseconds of a call of each operator and of its plain expression, and their ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiny = Tiny(device)
        ours, plain, floors = tiny.ours(), tiny.plain(), tiny.floors()
        candidates = {name: tiny.timed(output) for name, output in (ours | floors).items()}
        candidates |= {f"{name}, plain": tiny.timed(output) for name, output in plain.items()}
        times = harness.interleaved(candidates, effort.rounds, device, wall=True, shuffled=True)
    finally:
        torch.set_num_threads(threads)

    # The best quartile: a call takes less than what the machine may do beside it.
    best = {name: sorted(seconds)[len(seconds) // 4] for name, seconds in times.items()}

    def microseconds(name: str) -> float:
        return best[name] * 1e6 / CALLS

    def beside_plain(name: str, function: str) -> dict[str, Any]:
        other = f"{function}, plain"
        return {
            "name": name,
            "microseconds": microseconds(name),
            "plain_microseconds": microseconds(other),
            "over_plain": best[name] / best[other],
            "over_empty": best[name] / best[EMPTY],
        }

    rows = [beside_plain(name, name) for name in ours]
    rows.append(beside_plain(KERNELS, "template_mask"))
    return rows + [{"name": name, "microseconds": microseconds(name)} for name in (EMPTY, DOUBLE)]


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements, within ``measure(results, title)``."""
    results: dict[str, Any] = {"calls": []}
    with measure(results, "calls"):
        results["calls"] += bench(device, Effort.of(1000, device, smoke=smoke))
    return results


def report(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = []
    for entry in results["calls"]:
        row = [f"`{entry['name']}`", f"{entry['microseconds']:.0f} µs", "", "", ""]
        if "over_plain" in entry:
            row[2:] = [
                f"{entry['plain_microseconds']:.0f} µs",
                f"{entry['over_plain']:.2f}x",
                f"{entry['over_empty']:.2f}x",
            ]
        rows.append(row)
    header = ["a call, forward + backward", "ours", "plain", "over plain", "over an empty Function"]
    return harness.table(header, rows)


SECTION = f"""
## What a call costs

Operators on maps [{BATCH}, {FILTERS}, {SIDE}, {SIDE}], forward and backward, on one thread:
checks, autograd and dispatch, and next to no arithmetic. *plain*: the same function as one would
write it in PyTorch; candidates take turns, each round in another order, times and ratios are of the
best quartiles. What runs under `torch.compile` or in a CUDA graph pays none of it.

An empty Function takes most of what a plain expression of two or three calls does: the core keeps
to PyTorch's stable ABI, which has no autograd, so gradients are Python, where `torch.func` and
double backward find them. *{KERNELS}*: its two kernels in such a Function and nothing else, no
check and no template looked up; beside it is what these add.

<results: calls-*.json>
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("calls", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
