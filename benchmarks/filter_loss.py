"""Cost of the template families: the mask layer, and the filter loss with its gradient.

    python -m benchmarks.filter_loss [--device cpu|cuda] [--smoke]

Mask layer, forward and backward: "fused", the public function; "reference", the same on the
reference backend; "plain", argmax, the bank of all templates indexed by it, a product, under
autograd, eager and compiled by torch.compile. Limit: each pass reads the maps and writes as much,
at the bandwidth of copying maps of the same size in the same run. Beside it what no mask layer
undercuts: "clones", ``clone()`` in its place, of the maps and of the gradient; "call", the mask
layer on a single map, among the other candidates, which leave nothing of it in the caches.

Filter loss over the batch, forward and backward: "fused"; "products", its two matrix products
alone, into memory that is there already; "reference", the same function on the reference backend;
"autograd", the definition by a matrix product under autograd, eager and compiled; "direct", the
responses as the paper writes them, a product of all maps with each template in turn, under autograd
too. Extra memory is what one forward and backward pass takes at its peak beyond the maps, the
gradient included: on the CPU the resident memory of a process of its own, on a GPU what its
allocator hands out.
"""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Effort
from picnn_fast import PartTemplate, functional
from picnn_fast.reference import filter_loss as reference

Shape = tuple[int, int, int, int, torch.dtype, torch.memory_format]
CPU_SHAPES: tuple[Shape, ...] = (
    # batch, filters, height, width, dtype, layout
    (32, 512, 14, 14, torch.float32, torch.contiguous_format),
    (32, 512, 14, 14, torch.float32, torch.channels_last),
    (128, 512, 7, 7, torch.float32, torch.contiguous_format),
    (128, 512, 7, 7, torch.float32, torch.channels_last),
)
CUDA_SHAPES: tuple[Shape, ...] = (
    (128, 512, 14, 14, torch.bfloat16, torch.channels_last),
    (128, 512, 14, 14, torch.bfloat16, torch.contiguous_format),
    (128, 512, 14, 14, torch.float32, torch.contiguous_format),
    (32, 512, 14, 14, torch.float32, torch.contiguous_format),
)
SMOKE_SHAPES: tuple[Shape, ...] = ((2, 2, 3, 3, torch.float32, torch.contiguous_format),)
TEMPLATE = PartTemplate()
SETS = 4


class Case:
    """Maps of one shape, shared by every candidate.

    Every call takes the next of a few sets, so that none finds its own in the cache.
    """

    def __init__(self, shape: Shape, device: torch.device, sets: int = SETS) -> None:
        batch, filters, height, width, dtype, layout = shape
        generator = torch.Generator(device).manual_seed(0)

        def maps() -> Tensor:
            values = torch.randn(batch, filters, height, width, device=device, generator=generator)
            return values.to(dtype).to(memory_format=layout)

        # After a ReLU, and large enough that responses differ.
        pairs = [((20 * maps().relu_()).requires_grad_(), maps()) for _ in range(sets)]
        self.sets = itertools.cycle(pairs)
        like = pairs[0][0]
        arguments = (TEMPLATE.offsets_for(height, width, like), TEMPLATE.tau_for(height, width))
        self.rows = reference._templates(like, *arguments)  # [P + 1, P]

    def maps(self) -> Tensor:
        return next(self.sets)[0].detach()

    def mask(self, function: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward through the masked maps."""
        maps, grad = next(self.sets)
        maps.grad = None
        function(maps).backward(grad)

    def loss(self, function: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of the mean over filters."""
        maps, _ = next(self.sets)
        maps.grad = None
        function(maps).mean().backward()


def masked(maps: Tensor) -> Tensor:
    return functional.template_mask(maps, TEMPLATE)[0]


def fused(maps: Tensor) -> Tensor:
    return functional.filter_loss(maps, TEMPLATE)


def describe(shape: Shape) -> str:
    *sizes, dtype, layout = shape
    name = "channels_last" if layout == torch.channels_last else "contiguous"
    return f"{sizes} {str(dtype).removeprefix('torch.')} {name}"


def bench_mask(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """The mask layer beside eager and compiled PyTorch, and its share of the copy limit."""
    case = Case(shape, device)
    bank = case.rows[:-1].view(-1, *shape[2:4]).div(TEMPLATE.tau_for(*shape[2:4])).clamp_min(0)
    bank = bank.to(shape[4])

    def plain(maps: Tensor) -> Tensor:
        return maps * bank[maps.detach().flatten(2).argmax(-1)]

    single = Case((1, 1, *shape[2:]), device, sets=1)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend=effort.compiler)
    candidates, backends = harness.beside_triton(
        {
            "fused": lambda: case.mask(masked),
            "forward": lambda: masked(case.maps()),
            "reference": lambda: case.mask(masked),
            "plain": lambda: case.mask(plain),
            "plain, compiled": lambda: case.mask(compiled),
            "clones": lambda: case.mask(Tensor.clone),
            "call": lambda: single.mask(masked),
            "copy": harness.copies(case.maps, SETS),
        },
        ("fused", "forward"),
        device,
    )
    backends["reference"] = "reference"
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)

    def share(name: str, passes: int) -> float:
        """Of the limit, where a copy makes one pass."""
        return passes * harness.ratio(times, "copy", name)

    return {
        "shape": describe(shape),
        "milliseconds": {name: harness.summary(values) for name, values in times.items()},
        "speedup": {
            name: harness.ratio(times, name, "fused")
            for name in ("reference", "plain", "plain, compiled")
        },
        "share_of_limit": {"forward": share("forward", 1), "fused": share("fused", 2)},
        "clones_of_limit": share("clones", 2),
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("fused", "forward"), effort, device, backends),
    }


def definition(case: Case) -> Callable[[Tensor], Tensor]:
    """The loss by a matrix product with the templates, made beforehand."""

    def loss(maps: Tensor) -> Tensor:
        responses = maps.flatten(2).to(case.rows.dtype) @ case.rows.T
        given, log_ratio = reference.batch_terms(responses)
        return -(given * log_ratio).sum((0, 2)) / len(case.rows)

    return loss


def direct(case: Case) -> Callable[[Tensor], Tensor]:
    """The responses one template at a time: all at once they would be [B, N, P + 1, h, w]."""

    def loss(maps: Tensor) -> Tensor:
        templates = case.rows.view(-1, *maps.shape[2:])
        responses = torch.stack([(maps * template).sum((2, 3)) for template in templates], -1)
        given, log_ratio = reference.batch_terms(responses)
        return -(given * log_ratio).sum((0, 2)) / len(case.rows)

    return loss


def bench_loss(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """The filter loss beside its matrix products, the definition and the direct formulation."""
    case = Case(shape, device)
    by_product = definition(case)
    rows = case.maps().flatten(2).flatten(0, 1).contiguous()
    templates = case.rows.to(rows.dtype)
    responses = rows.new_empty(len(rows), len(templates))
    gradient = torch.empty_like(rows)

    def products() -> None:
        torch.mm(rows, templates.T, out=responses)
        torch.mm(responses, templates, out=gradient)

    state = functional.FilterLossState.empty(
        *shape[1:4],
        dtype=torch.float64 if shape[4] == torch.float64 else torch.float32,
        device=device,
    )

    def by_state(estimator: Any) -> Callable[[Tensor], Tensor]:
        return lambda maps: functional.filter_loss(maps, TEMPLATE, estimator=estimator, state=state)

    torch._dynamo.reset()
    compiled = torch.compile(by_product, backend=effort.compiler)
    candidates, backends = harness.beside_triton(
        {
            "fused": lambda: case.loss(fused),
            "running": lambda: case.loss(by_state("running")),
            "target": lambda: case.loss(by_state("target")),
            "products": products,
            "reference": lambda: case.loss(fused),
            "autograd": lambda: case.loss(by_product),
            "autograd, compiled": lambda: case.loss(compiled),
        },
        ("fused", "running", "target"),
        device,
    )
    backends["reference"] = "reference"
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    # Seconds a call: a few are enough.
    one_by_one = direct(case)
    slow = harness.interleaved(
        {"fused": lambda: case.loss(fused), "direct": lambda: case.loss(one_by_one)},
        max(3, effort.rounds // 10),
        device,
        warmup=1,
    )
    others = ("reference", "autograd", "autograd, compiled")
    milliseconds = {name: harness.summary(values) for name, values in times.items()}
    return {
        "shape": describe(shape),
        "milliseconds": milliseconds | {"direct": harness.summary(slow["direct"])},
        "over_products": harness.ratio(times, "fused", "products"),
        "speedup": {
            **{name: harness.ratio(times, name, "fused") for name in others},
            "direct": harness.ratio(slow, "direct", "fused"),
        },
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("fused", "running", "target"), effort, device, backends),
    }


def extra_memory(candidate: str, shape: Shape, device: torch.device) -> float:
    """Peak memory of one forward and backward pass beyond the maps, over that of the maps.

    For a process of its own, in which nothing larger has run before.
    """
    functions = {"fused": lambda _: fused, "autograd": definition, "direct": direct}
    few = Case((2, 2, 2, 2, *shape[4:]), device, sets=1)
    few.loss(functions[candidate](few))  # loads what is loaded once
    case = Case(shape, device, sets=1)
    function = functions[candidate](case)
    return harness.extra_bytes(lambda: case.loss(function), device) / case.maps().nbytes


def bench_memory(
    candidates: tuple[str, ...], shape: Shape, device: torch.device
) -> dict[str, Any] | None:
    """Extra memory of each candidate; on the CPU where Linux tells it."""
    if not harness.tells_memory(device):
        return None
    spawn = multiprocessing.get_context("spawn")
    multiples = {}
    for candidate in candidates:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            multiples[candidate] = process.submit(extra_memory, candidate, shape, device).result()
    return {"shape": describe(shape), "multiple_of_maps": multiples}


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements of both families, each within ``measure(results, title)``."""
    shapes = SMOKE_SHAPES if smoke else CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    effort = Effort.of(50, device, smoke=smoke)
    results: dict[str, Any] = {"masks": [], "losses": [], "memory": None, "step": None}
    for shape in shapes:
        with measure(results, f"template_mask {describe(shape)}"):
            results["masks"].append(bench_mask(shape, device, effort))
    for shape in shapes:
        with measure(results, f"filter_loss {describe(shape)}"):
            results["losses"].append(bench_loss(shape, device, effort))
    candidates = ("fused",) if smoke else ("fused", "autograd", "direct")
    with measure(results, "extra memory"):
        results["memory"] = bench_memory(candidates, shapes[0], device)
    if smoke:
        step = ("small-cnn", 96, 2, 32, device, 2)
    elif device.type == "cuda":
        step = ("vgg16", 512, 64, 224, device, 30)
    else:
        step = ("vgg16", 512, 4, 224, device, 9)
    with measure(results, "training step"):
        results["step"] = harness.training_step("icnn", *step)
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""

    def time(entry: dict[str, Any], name: str) -> str:
        return f"{entry['milliseconds'][name]['median']:.2f} ms"

    def speedups(entry: dict[str, Any]) -> list[str]:
        return [f"{value:.2f}x" for value in entry["speedup"].values()]

    rows = [
        [
            entry["shape"],
            time(entry, "fused"),
            *speedups(entry),
            f"{entry['share_of_limit']['fused']:.0%}",
            f"{entry['share_of_limit']['forward']:.0%}",
            *harness.floors(entry),
        ]
        for entry in results["masks"]
    ]
    header = [
        "template_mask, forward + backward",
        "fused",
        *(f"over {name}" for entry in results["masks"][:1] for name in entry["speedup"]),
        "of the limit",
        "forward alone",
        *harness.floor_names(results["masks"]),
    ]
    parts = [harness.table(header, rows), *harness.triton_tables("template_mask", results["masks"])]
    rows = [
        [
            entry["shape"],
            time(entry, "fused"),
            time(entry, "products"),
            f"{entry['over_products']:.2f}",
            *speedups(entry),
            time(entry, "running"),
            time(entry, "target"),
        ]
        for entry in results["losses"]
    ]
    header = [
        "filter_loss, forward + backward",
        "fused",
        "two products",
        "of these",
        *(f"over {name}" for entry in results["losses"][:1] for name in entry["speedup"]),
        "running",
        "target",
    ]
    parts.append(harness.table(header, rows))
    parts += harness.triton_tables("filter_loss", results["losses"])
    if results["memory"]:
        multiples = results["memory"]["multiple_of_maps"]
        row = [results["memory"]["shape"], *(f"{value:.1f}x" for value in multiples.values())]
        parts.append(harness.table(["extra memory, of the maps", *multiples], [row]))
    parts += harness.step_table(results["step"])
    return "\n\n".join(parts)


SECTION = """
## Part templates and the filter loss

<results: filter_loss-*.json>

- *of the limit*: one read and one write of the maps, and again for the gradient, over the bandwidth
  of copying maps of the same size. Memory of the AMD EPYC here, which it shares with other hosts,
  is fast in some minutes and slow in others: three runs gave 80 to 92 % where a copy takes .37 ms,
  as in this one, and 94 to 104 where it takes .6, in either layout. *Plain*: argmax, a table of
  masks and a product, as one would write them.
- *clones*: `clone()` in place of the operator, of the maps and of the gradient, as a share of their
  own limit; *a call*: the operator, forward and backward, on next to nothing, between the other
  candidates, which leave nothing of it in the caches. What a call takes, no kernel makes up for.
- *two products*: responses and gradient as library matrix products alone; *of these*: what all of
  the exact loss and its gradient takes, as a share of them. On AMD the library, MKL, multiplies by
  AVX2. Told in another run that the processor is Intel's, it took its AVX-512 path: 6.5 and 2.7 ms,
  of which the exact loss took .70 to .75 and 1.4. *Autograd*: the definition by matrix products
  left to autograd; *direct*: by broadcasting maps and templates; *running*, *target*: the other
  estimators.
- *extra memory*: the highest of a process during forward and backward, above what it held before.
- *training step*: ICNN over STD, the same network without mask layers and filter losses, its
  inserted convolution included; in brackets the quartiles of the rounds, which spread wider
  than the two differ.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("filter_loss", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
