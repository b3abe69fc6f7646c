"""Cost of the correlation family: the loss of ICCNN by groups of filters, with its gradient.

    python -m benchmarks.correlation [--device cpu|cuda] [--smoke]

Forward and backward: "fused", the public function; "published", the similarity of all pairs of
filters on each image, ``[B, C, C]``, as the authors' code has it, under autograd; "plain", the sums
of normalised maps by a product with the groups' members, under autograd, eager and compiled by
torch.compile. Limit: the maps are read once in each pass and their gradient is written, at the
bandwidth of copying maps of the same size in the same run. Extra memory is what one forward and
backward pass takes at its peak beyond the maps, the gradient included: on the CPU the resident
memory of a process of its own, on a GPU what its allocator hands out.
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
from benchmarks.filter_loss import SETS, Shape, describe
from benchmarks.harness import Effort
from picnn_fast import functional

GROUPS = 16
LAYOUTS = tuple(
    (dtype, layout)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
)
SHAPES: tuple[Shape, ...] = tuple((32, 512, 14, 14, *layout) for layout in LAYOUTS)
SMOKE_SHAPES: tuple[Shape, ...] = ((2, 4, 3, 3, *LAYOUTS[0]), (2, 4, 3, 3, *LAYOUTS[-1]))
EPSILON = 1e-5


class Case:
    """Maps of one shape and their groups, shared by every candidate.

    Every call takes the next of a few sets of maps, so that none finds its own in the cache.
    """

    def __init__(self, shape: Shape, device: torch.device, sets: int = SETS) -> None:
        batch, filters, height, width, dtype, layout = shape
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, generator=generator)

        maps = [
            random(batch, filters, height, width)
            .relu_()
            .to(dtype)
            .to(memory_format=layout)
            .requires_grad_()
            for _ in range(sets)
        ]
        self.sets = itertools.cycle(maps)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.mean = random(filters, height, width).abs_().mul_(0.4).to(wide)
        self.num_groups = min(GROUPS, filters)
        order = torch.randperm(filters, device=device, generator=generator)
        self.groups = order % self.num_groups
        self.members = torch.nn.functional.one_hot(self.groups, self.num_groups).T.to(wide)

    def maps(self) -> Tensor:
        return next(self.sets).detach()

    def step(self, loss: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward."""
        maps = next(self.sets)
        maps.grad = None
        loss(maps).backward()

    def fused(self, maps: Tensor) -> Tensor:
        return functional.group_correlation_loss(
            maps, self.mean, self.groups, num_groups=self.num_groups
        )

    def kernels(self, maps: Tensor) -> Tensor:
        """What ``fused`` and its gradient call, without checks and autograd."""
        operators, given = torch.ops.picnn_fast, (maps, self.mean, self.groups)
        loss, *kept = operators.group_correlation(*given, self.num_groups, None)
        grad: Tensor = operators.group_correlation_backward(loss, *given, None, *kept)
        return grad

    def published(self, maps: Tensor) -> Tensor:
        centred = (maps.to(self.mean.dtype) - self.mean).flatten(2)
        variance = centred.square().sum(2)
        norms = (variance[:, :, None] * variance[:, None]).sqrt().clamp_min(EPSILON**2)
        similarity = centred @ centred.mT / norms + 1
        pairs = similarity.mean(0)
        rows = self.members @ pairs
        return self._loss((rows * self.members).sum(1), rows.sum(1))

    def plain(self, maps: Tensor) -> Tensor:
        centred = (maps.to(self.mean.dtype) - self.mean).flatten(2)
        sums = self.members @ torch.nn.functional.normalize(centred, dim=2, eps=EPSILON)
        within = sums.square().sum(2).mean(0)
        across = (sums * sums.sum(1, keepdim=True)).sum(2).mean(0)
        sizes = self.members.sum(1)
        return self._loss(within + sizes.square(), across + sizes * len(self.groups))

    def _loss(self, within: Tensor, across: Tensor) -> Tensor:
        return -(within / (across + EPSILON)).sum()


def bench_loss(shape: Shape, device: torch.device, effort: Effort) -> dict[str, Any]:
    """The loss beside both formulations in PyTorch, and its share of the copy limit."""
    case, tiny = Case(shape, device), Case((2, 4, 3, 3, *shape[4:]), device)
    copy = harness.copies(case.maps, SETS)
    torch._dynamo.reset()
    compiled = torch.compile(case.plain, backend=effort.compiler)
    candidates, backends = harness.beside_triton(
        {
            "fused": lambda: case.step(case.fused),
            "forward": lambda: case.fused(case.maps()),
            "plain": lambda: case.step(case.plain),
            "plain, compiled": lambda: case.step(compiled),
            "copy": copy,
        },
        ("fused", "forward"),
        device,
    )
    times = harness.interleaved(candidates, effort.rounds, device, backends=backends)
    # By themselves: what they leave in the caches would be found there by the others.
    alone = {
        "a call": lambda: tiny.step(tiny.fused),
        "plain": lambda: case.step(case.plain),
        "copy": copy,
        "kernels": lambda: case.kernels(case.maps()),
    }
    times_alone = harness.interleaved(alone, effort.rounds, device)
    times |= {"a call": times_alone["a call"]}
    # Tenths of a second a call: a few are enough.
    slow = harness.interleaved(
        {
            "fused": lambda: case.step(case.fused),
            "published": lambda: case.step(case.published),
        },
        max(3, effort.rounds // 5),
        device,
        warmup=1,
    )

    def share(name: str, passes: float, times: dict[str, list[float]] = times) -> float:
        """Of the limit, where a copy makes one pass: it reads and writes."""
        return passes * harness.ratio(times, "copy", name)

    milliseconds = {name: harness.summary(values) for name, values in times.items()}
    return {
        "shape": describe(shape),
        "groups": case.num_groups,
        "milliseconds": milliseconds | {"published": harness.summary(slow["published"])},
        "speedup": {
            "published": harness.ratio(slow, "published", "fused"),
            **{name: harness.ratio(times, name, "fused") for name in ("plain", "plain, compiled")},
        },
        "share_of_limit": {
            "forward": share("forward", 0.5),
            "fused": share("fused", 1.5),
            "kernels": share("kernels", 1.5, times_alone),
        },
        **harness.triton_ratios(times),
        **harness.wall_times(candidates, ("fused", "forward"), effort, device, backends),
    }


def extra_memory(candidate: str, shape: Shape, device: torch.device) -> float:
    """Peak memory of one forward and backward pass beyond the maps, over that of the maps.

    For a process of its own, in which nothing larger has run before.
    """
    few = Case((2, 2, 2, 2, *shape[4:]), device, sets=1)
    few.step(getattr(few, candidate))  # loads what is loaded once
    case = Case(shape, device, sets=1)
    extra = harness.extra_bytes(lambda: case.step(getattr(case, candidate)), device)
    return extra / case.maps().nbytes


def bench_memory(shape: Shape, device: torch.device) -> dict[str, Any] | None:
    """Extra memory of each candidate; on the CPU where Linux tells it."""
    if not harness.tells_memory(device):
        return None
    spawn = multiprocessing.get_context("spawn")
    multiples = {}
    for candidate in ("fused", "published", "plain"):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            multiples[candidate] = process.submit(extra_memory, candidate, shape, device).result()
    return {"shape": describe(shape), "multiple_of_maps": multiples}


def run(
    device: torch.device, *, smoke: bool, measure: Callable[..., AbstractContextManager[None]]
) -> dict[str, Any]:
    """All measurements, each within ``measure(results, title)``."""
    effort = Effort.of(30, device, smoke=smoke)
    shapes = SMOKE_SHAPES if smoke else SHAPES
    results: dict[str, Any] = {"losses": [], "memory": None}
    for shape in shapes:
        with measure(results, f"group_correlation_loss {describe(shape)}"):
            results["losses"].append(bench_loss(shape, device, effort))
    if not smoke:
        with measure(results, "extra memory"):
            results["memory"] = bench_memory(shapes[0], device)
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    rows = [
        [
            f"{entry['shape']}, {entry['groups']} groups",
            f"{entry['milliseconds']['fused']['median']:.2f} ms",
            *(f"{value:.1f}x" for value in entry["speedup"].values()),
            f"{entry['share_of_limit']['fused']:.0%}",
            f"{entry['share_of_limit']['forward']:.0%}",
            f"{entry['share_of_limit']['kernels']:.0%}"
            if "kernels" in entry["share_of_limit"]
            else "",
            f"{entry['milliseconds']['a call']['median']:.2f} ms"
            if "a call" in entry["milliseconds"]
            else "",
        ]
        for entry in results["losses"]
    ]
    header = [
        "group_correlation_loss, forward + backward",
        "fused",
        *(f"over {name}" for entry in results["losses"][:1] for name in entry["speedup"]),
        "of the limit",
        "forward alone",
        "kernels alone",
        "a call",
    ]
    parts = [harness.table(header, rows)]
    parts += harness.triton_tables("group_correlation_loss", results["losses"])
    if results["memory"]:
        multiples = results["memory"]["multiple_of_maps"]
        row = [results["memory"]["shape"], *(f"{value:.1f}x" for value in multiples.values())]
        parts.append(harness.table(["extra memory, of the maps", *multiples], [row]))
    return "\n\n".join(parts)


SECTION = """
## Correlation of filters by group

<results: correlation-*.json>

- *of the limit*: the maps read in each pass and their gradient written, over the bandwidth of
  copying maps of the same size. The AMD EPYC here shares its memory with other hosts: a copy takes
  .4 ms in some minutes and .65 in others, where the operator varies little. In ten runs the share
  was 54 to 81 % contiguous and 44 to 68 % channels_last; the table is of the median run. That of
  the Intel Xeon is of older kernels, and of `clone()` in place of copies. *Kernels alone*: both
  passes without checks and autograd. *A call*: forward and backward on next to nothing, after
  *plain*, which leaves nothing of it in the caches: what no kernel makes up for.
- *published*: the similarity of all pairs of filters on each image, as the authors' code has it;
  *plain*: sums of normalised maps by group, in PyTorch's operators.
- *extra memory*: the highest of a process during forward and backward, above what it held before.
"""


def main(arguments: list[str] | None = None) -> None:
    harness.command_line("correlation", __doc__.splitlines()[0], run, report, arguments)


if __name__ == "__main__":
    main()
