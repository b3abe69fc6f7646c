"""Cost of the masking family: the fused operators, late masking, and a whole training step.

    python -m benchmarks.masking [--device cpu|cuda] [--smoke]

Candidates, all forward and backward: "fused", the operator; "reference", the same operator on the
reference backend, eager PyTorch; "autograd", its definition under autograd, eager and compiled by
torch.compile; "plain", what one would write with PyTorch's own random numbers, eager and compiled.

Limit: the fewest bytes that must move, over the bandwidth of copying maps of the same size in the
same run. Forward: write the masked maps, read those that are kept. Backward: read the maps and the
gradient, write the gradient of the maps. Beside it what no operator undercuts: "clones",
``clone()`` in its place, of the maps and of the gradient; "call", the operator on one map a
position large, among the other candidates, which leave nothing of it in the caches. "kernels": the
operator's kernels and nothing around them.
"""

import itertools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Effort
from picnn_fast import checks, functional
from picnn_fast.reference import masking as reference

CPU_SHAPES = (
    # batch, filters, height, width, classes, dtype, layout
    (128, 512, 7, 7, 10, torch.float32, torch.contiguous_format),
    (64, 512, 14, 14, 100, torch.float32, torch.contiguous_format),
    (128, 512, 7, 7, 10, torch.float32, torch.channels_last),
    (64, 512, 14, 14, 100, torch.float32, torch.channels_last),
)
CUDA_SHAPES = (
    (1024, 2048, 7, 7, 1000, torch.bfloat16, torch.channels_last),
    (1024, 2048, 7, 7, 1000, torch.bfloat16, torch.contiguous_format),
    (1024, 512, 14, 14, 100, torch.float32, torch.contiguous_format),
    (1024, 512, 14, 14, 100, torch.float32, torch.channels_last),
    (128, 512, 7, 7, 10, torch.float32, torch.contiguous_format),
)
SMOKE_SHAPES = ((2, 4, 3, 3, 5, torch.float32, torch.contiguous_format),)
Shape = tuple[int, int, int, int, int, torch.dtype, torch.memory_format]


SETS = 4
LINE_BYTES = {"cpu": 64, "cuda": 32}  # that are read at once


class Case:
    """Inputs of one shape, shared by every candidate, and a gradient to send back.

    Every call takes the next of a few sets of maps, so that none finds its own in the cache.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        batch, filters, height, width, classes, dtype, layout = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        def maps() -> Tensor:
            return normal(batch, filters, height, width).to(dtype).to(memory_format=layout)

        self.sets = itertools.cycle([(maps().requires_grad_(), maps()) for _ in range(SETS)])
        self.logits = normal(batch, classes).requires_grad_()
        self.correspondence = normal(classes, filters).softmax(0).requires_grad_()
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def maps(self) -> Tensor:
        return next(self.sets)[0].detach()

    def step(self, mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Forward and backward through the masked maps."""
        maps, grad = next(self.sets)
        maps.grad = self.logits.grad = self.correspondence.grad = None
        mask(maps, self.logits, self.correspondence).backward(grad)


def fused(maps: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
    return functional.bernoulli_mask(maps, logits, correspondence)[0]


def cloned(maps: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
    return maps.clone()


def plain(maps: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
    """What one would write in PyTorch, with its own random numbers."""
    y1 = logits.softmax(-1)
    one_hot = nn.functional.one_hot(torch.multinomial(y1, 1).squeeze(1), logits.shape[1])
    p = (one_hot + y1 - y1.detach()) @ correspondence
    mask = torch.bernoulli(p.detach()) + p - p.detach()
    return maps * mask[:, :, None, None].to(maps.dtype)


def definition(seed: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The reference's forward under autograd, with the same draws as the fused operator."""

    def mask(maps: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
        flat = maps.flatten(2)
        return reference.straight_through(flat, logits, correspondence, seed, 0)[0].view_as(maps)

    return mask


def kernels_of(case: Case) -> Callable[[], None]:
    """Forward and backward by the kernels alone."""
    operators = torch.ops.picnn_fast
    logits, table = case.logits.detach(), case.correspondence.detach()

    def call() -> None:
        maps, grad = next(case.sets)
        _, mask, pseudo_label = harness.below_autograd(
            operators.bernoulli_mask.default, maps.detach(), logits, table, case.seed, 0, True
        )
        _, grad_mask = harness.below_autograd(
            operators.masking_backward.default, grad, maps.detach(), mask
        )
        harness.below_autograd(
            operators.bernoulli_parameters_backward.default, grad_mask, logits, table, pseudo_label
        )

    return call


def shares_read(case: Case, draws: int = 5) -> tuple[float, float]:
    """Of the maps, the share that the forward pass needs, and that of the lines which hold it."""
    kept, lines = [], []
    for _ in range(draws):
        maps = case.maps()
        mask = functional.bernoulli_mask(maps, case.logits, case.correspondence)[1] != 0
        needed = torch.empty_like(maps, dtype=torch.bool).copy_(mask[:, :, None, None])
        line = LINE_BYTES[maps.device.type] // maps.element_size()
        count = maps.numel() // line
        in_memory = needed.as_strided((count, line), (line, 1))
        kept.append(mask.float().mean().item())
        lines.append(in_memory.any(1).float().mean().item())
    return statistics.fmean(kept), statistics.fmean(lines)


def describe(shape: Shape) -> str:
    *sizes, classes, dtype, layout = shape
    name = "channels_last" if layout == torch.channels_last else "contiguous"
    return f"{sizes} K={classes} {str(dtype).removeprefix('torch.')} {name}"


def bench_operator(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """The fused operator beside eager and compiled PyTorch, and its share of the copy limit."""
    case, single = Case(shape, device), Case((1, 1, 1, 1, *shape[4:]), device)
    autograd = definition(case.seed)
    torch._dynamo.reset()
    compiled = torch.compile(autograd, backend=effort.compiler)
    plain_compiled = torch.compile(plain, backend=effort.compiler)
    candidates, backends = harness.beside_triton(
        {
            "fused": lambda: case.step(fused),
            "reference": lambda: case.step(fused),
            "autograd": lambda: case.step(autograd),
            "autograd, compiled": lambda: case.step(compiled),
            "plain": lambda: case.step(plain),
            "plain, compiled": lambda: case.step(plain_compiled),
            "kernels": kernels_of(case),
            "clones": lambda: case.step(cloned),
            "call": lambda: single.step(fused),
            "copy": harness.copies(case.maps, SETS),
        },
        ("fused",),
        device,
    )
    backends["reference"] = "reference"
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    kept, lines = shares_read(case)
    # Backward reads two and writes one; forward writes one and reads the kept share.
    return {
        "kept_share": kept,
        **against_the_limit(shape, case, times, 4 + kept),
        "kernels_of_limit": (4 + kept) / 2 * harness.ratio(times, "copy", "kernels"),
        "whole_lines_of_limit": (4 + kept) / (4 + lines),
        **harness.wall_times(candidates, ("fused",), effort, device, backends),
    }


def bench_gate(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """The class gate beside eager and compiled PyTorch, with gates that are all open a little."""
    case, single = Case(shape, device), Case((1, 1, 1, 1, *shape[4:]), device)
    labels = torch.arange(shape[0], device=device) % shape[4]
    label = labels[:1].clone()

    def gated(maps: Tensor, logits: Tensor, table: Tensor) -> Tensor:
        return functional.class_gate(maps, table, labels)

    def single_gated(maps: Tensor, logits: Tensor, table: Tensor) -> Tensor:
        return functional.class_gate(maps, table, label)

    def multiplied(maps: Tensor, logits: Tensor, table: Tensor) -> Tensor:
        return maps * table[labels][:, :, None, None].to(maps.dtype)

    torch._dynamo.reset()
    compiled = torch.compile(multiplied, backend=effort.compiler)
    candidates, backends = harness.beside_triton(
        {
            "fused": lambda: case.step(gated),
            "reference": lambda: case.step(gated),
            "plain": lambda: case.step(multiplied),
            "plain, compiled": lambda: case.step(compiled),
            "clones": lambda: case.step(cloned),
            "call": lambda: single.step(single_gated),
            "copy": harness.copies(case.maps, SETS),
        },
        ("fused",),
        device,
    )
    backends["reference"] = "reference"
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    # Forward reads one and writes one, backward reads two and writes one.
    return {
        **against_the_limit(shape, case, times, 5),
        **harness.wall_times(candidates, ("fused",), effort, device, backends),
    }


def against_the_limit(
    shape: Shape, case: Case, times: dict[str, list[float]], passes: float
) -> dict[str, Any]:
    """The fused candidate over the others, and its share of ``passes`` over the maps at the
    bandwidth of a copy, which makes two."""
    return {
        "shape": describe(shape),
        "bytes_needed": passes * case.maps().nbytes,
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "speedup": {
            name: harness.ratio(times, name, "fused")
            for name in times
            if name not in ("fused", "kernels", "clones", "call", "copy")
            and not name.endswith(harness.TRITON)
        },
        **harness.triton_ratios(times),
        "share_of_limit": passes / 2 * harness.ratio(times, "copy", "fused"),
        "clones_of_limit": 2 * harness.ratio(times, "copy", "clones"),
    }


LATE_PARTS = ("autograd", "draws", "checks", "gradients")


class Nothing(torch.autograd.Function):
    """What autograd itself costs: one function of three inputs, and room for their gradients."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, logits: Tensor, correspondence: Tensor) -> Tensor:
        ctx.save_for_backward(maps, logits, correspondence)
        return torch.empty_like(maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def bench_late(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Masking the pooled maps against masking the maps and pooling them again.

    Beside them the parts that no masking of the pooled maps can do without, each alone: autograd's
    own cost, the draws, the checks of values with the draw of a seed, the kernels of the gradients.
    """
    case = Case(shape, device)
    logits, table = case.logits, case.correspondence
    pooled = case.maps().mean((2, 3)).requires_grad_()
    grad = torch.randn_like(pooled)

    def forget() -> None:
        pooled.grad = logits.grad = table.grad = None

    def at_maps() -> None:
        forget()
        maps, _ = next(case.sets)
        maps.grad = None
        masked = fused(maps, logits, table)
        nn.functional.adaptive_avg_pool2d(masked, 1).flatten(1).backward(grad)

    def late() -> None:
        forget()
        fused(pooled, logits, table).backward(grad)

    def autograd() -> None:
        forget()
        Nothing.apply(pooled, logits, table).backward(grad)

    values = pooled.detach(), logits.detach(), table.detach()
    operators = torch.ops.picnn_fast
    _, mask, pseudo_label = operators.bernoulli_mask(*values, case.seed, 0)

    def draws() -> None:
        operators.bernoulli_mask(*values, case.seed, 0)

    def validation() -> None:
        checks.probabilities("correspondence", values[2])
        checks.seed(None, device)

    def gradients() -> None:
        _, grad_mask = operators.masking_backward(grad, values[0], mask)
        operators.bernoulli_parameters_backward(grad_mask, *values[1:], pseudo_label)

    parts = dict(zip(LATE_PARTS, (autograd, draws, validation, gradients), strict=True))
    candidates, backends = harness.beside_triton(
        {"maps": at_maps, "late": late}, ("maps", "late"), device
    )
    times = harness.interleaved(candidates | parts, effort.rounds, device, backends=backends)
    times["parts"] = [sum(seconds) for seconds in zip(*(times[p] for p in parts), strict=True)]
    return {
        "shape": describe(shape),
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "speedup": harness.ratio(times, "maps", "late"),
        "speedup_of_parts": harness.ratio(times, "maps", "parts"),
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("maps", "late"), effort, device, backends),
    }


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements of the family, each within ``measure(results, title)``."""
    cuda = device.type == "cuda"
    shapes = SMOKE_SHAPES if smoke else CUDA_SHAPES if cuda else CPU_SHAPES
    effort = Effort.of(50, device, smoke=smoke)
    results: dict[str, Any] = {"operators": [], "gates": [], "late": [], "step": None}
    # First: once torch.compile has run in a process, every Python call in it costs a little more.
    for shape in shapes[:2]:
        with measure(results, f"late masking {describe(shape)}"):
            results["late"].append(bench_late(shape, device, effort))
    for shape in shapes:
        with measure(results, f"operator {describe(shape)}"):
            results["operators"].append(bench_operator(shape, device, effort))
    for shape in shapes:
        with measure(results, f"class gate {describe(shape)}"):
            results["gates"].append(bench_gate(shape, device, effort))
    if smoke:
        step = ("small-resnet", 128, 2, 32, device, 2)
    elif cuda:
        step = ("resnet50", 128, 128, 224, device, 50)
    else:
        step = ("resnet18", 128, 8, 224, device, 30)
    with measure(results, "training step"):
        results["step"] = harness.training_step("picnn", *step)
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    parts = []
    for title, part in (("bernoulli_mask", "operators"), ("class_gate", "gates")):
        names = list(results[part][0]["speedup"]) if results[part] else []
        alone = {
            key: head
            for key, head in (
                ("kernels_of_limit", "kernels alone"),
                ("whole_lines_of_limit", "whole lines"),
            )
            if all(key in entry for entry in results[part])
        }
        rows = [
            [
                entry["shape"],
                f"{entry['milliseconds']['fused']['median']:.2f} ms",
                *(f"{entry['speedup'][name]:.2f}x" for name in names),
                f"{entry['share_of_limit']:.0%}",
                *(f"{entry[key]:.0%}" for key in alone),
                *harness.floors(entry),
            ]
            for entry in results[part]
        ]
        header = [
            f"{title}, forward + backward",
            "fused",
            *(f"over {name}" for name in names),
            "of the limit",
            *alone.values(),
            *harness.floor_names(results[part]),
        ]
        parts.append(harness.table(header, rows))
        parts += harness.triton_tables(title, results[part])
    rows = [
        [
            entry["shape"],
            f"{entry['milliseconds']['maps']['median']:.2f} ms",
            f"{entry['milliseconds']['late']['median']:.2f} ms",
            f"{entry['speedup']:.1f}x",
            *(f"{entry['milliseconds'][part]['median']:.2f} ms" for part in LATE_PARTS),
            f"{entry['speedup_of_parts']:.1f}x",
        ]
        for entry in results["late"]
    ]
    header = [
        "late masking",
        "masking the maps",
        "late",
        "speed-up",
        *(f"{part} alone" for part in LATE_PARTS),
        "speed-up of the parts",
    ]
    parts.append(harness.table(header, rows))
    parts += harness.triton_tables("late masking", results["late"])
    parts += harness.step_table(results["step"])
    return "\n\n".join(parts)


SECTION = """
## Masking

All candidates take turns in one run; times are medians, ratios the median of the rounds.

<results: masking-*.json>

- *reference*: the same operator in eager PyTorch (`use_backend("reference")`); *autograd*: its
  definition left to autograd, the same draws; *plain*: what one would write with PyTorch's own
  random numbers; *compiled*: by `torch.compile`.
- *of the limit*: the fewest bytes that must move, over the bandwidth of copying maps of that size.
- *clones*: `clone()` in place of the operator, of the maps and of the gradient, as a share of their
  own limit; *a call*: the operator, forward and backward, on next to nothing, between the other
  candidates, which leave nothing of it in the caches. What a call takes, no kernel makes up for.
- *kernels alone*: the operator's three kernels by PyTorch's dispatcher, without checks, seed or
  autograd; *whole lines*: what is left of the limit where memory is read by lines, of 64 bytes on a
  CPU. Of channels_last maps a line holds 16 filters: where a mask keeps a tenth of them, four lines
  in five are read. Where one of these stays below 85 %, or *clones* does, so must the operator.
- *late masking*: a mask per channel commutes with pooling, so where the head starts with pooling
  PICNN masks the pooled maps instead. Beside it the parts it cannot do without, each alone:
  autograd's own cost of a function of three inputs, the draws, the checks of values with the draw
  of a seed, the kernels of the gradients; *of the parts*: the ratio if nothing else took time.
- *training step*: PICNN over STD with the same inserted convolution, not over the plain network; in
  brackets the quartiles of the rounds, which spread wider than the two differ. What the convolution
  and its filters add grows with the number of classes, and was not measured here.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("masking", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
