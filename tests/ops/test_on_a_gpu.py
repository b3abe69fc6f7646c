"""What only a GPU can show of the operators: streams, graphs, devices, asserts.

And as much of it as tensors without data show where there is none.

Over all operators and the backends of a GPU; what a family owes there beyond is in its own files.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from picnn_fast import PartTemplate
from picnn_fast.functional import (
    bernoulli_mask,
    class_gate,
    filter_loss,
    group_correlation_loss,
    mask_channels,
    template_mask,
)
from picnn_fast.ops.histogram import update
from tests.conftest import HAS_GPU, Backend
from tests.ops.cases import CASES, Arguments, OperatorCase, as_tuple, on_device
from tests.reference.test_histogram import fresh

ROOT = Path(__file__).parents[2]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
KERNELS = ["triton-gpu", "cuda"]
on_kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)
# Where there is no GPU, they are no cases.
every_case_on_kernels = pytest.mark.parametrize(
    ("backend", "case"),
    list(itertools.product(KERNELS, CASES)) if HAS_GPU else [],
    ids=str,
    indirect=["backend"],
)


def on_gpu(case: OperatorCase, device: str = "cuda") -> Arguments:
    return tuple(
        on_device(torch.device(device), a) if isinstance(a, Tensor) else a for a in case.arguments()
    )


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def run(case: OperatorCase, arguments: Arguments) -> tuple[Tensor, ...]:
    """Results, then copies of what is written to."""
    written = case.written()
    given = [a.clone() if i in written else a for i, a in enumerate(arguments)]
    return (*as_tuple(case.operator(*given)), *(given[i] for i in written))


@every_case
def test_nothing_is_made_on_another_device_or_read_back(case: OperatorCase) -> None:
    """The reference, and the shape function, on a GPU that there need not be."""
    cpu = case.arguments()
    expected = run(case, cpu)
    with FakeTensorMode():
        arguments = tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            if isinstance(a, Tensor)
            else a
            for a in cpu
        )
        ran = [run(case, arguments)]
        # The definition by nearest neighbours goes from class to class, and so counts them.
        if case.family != "mutual_information":
            ran.append(case.reference(*arguments))
        for results in ran:
            for got, want in zip(results, expected, strict=False):
                assert (got.device.type, got.dtype) == ("cuda", want.dtype)
                assert got.shape == want.shape


@pytest.mark.gpu
@every_case_on_kernels
def test_an_operator_never_waits_for_the_device_and_a_graph_replays_it(
    backend: Backend, case: OperatorCase
) -> None:
    arguments = on_gpu(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run(case, arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case, arguments)
    for result in got:
        result.fill_(0)
    graph.replay()
    assert_same(got, expected)


@pytest.mark.gpu
@every_case_on_kernels
def test_results_on_a_stream_of_its_own_are_those_of_the_usual_one(
    backend: Backend, case: OperatorCase
) -> None:
    arguments = on_gpu(case)
    expected = run(case, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What is read comes late on this stream: a launch on another would not wait for it.
        torch.cuda._sleep(20_000_000)
        late = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
        got = run(case, late)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.gpu
@every_case_on_kernels
def test_a_second_device_is_used_while_the_first_is_current(
    backend: Backend, case: OperatorCase
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = run(case, on_gpu(case, "cuda:0"))
    got = run(case, on_gpu(case, "cuda:1"))
    assert torch.cuda.current_device() == 0
    for one, two in zip(got, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.cpu().nan_to_num(7), two.cpu().nan_to_num(7))


def masked_in_every_way(maps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks, which leave the last filter of the last sample, and what they were made of."""
    samples, filters = maps.shape[:2]
    table = torch.zeros(samples, filters, device=maps.device)
    table[-1, -1] = 1
    mask = (2 * table).requires_grad_()
    yield mask_channels(maps, mask), mask
    gate = (2 * table).requires_grad_()
    yield class_gate(maps, gate, torch.arange(samples, device=maps.device)), gate
    table.requires_grad_()
    sure = 99 * torch.eye(samples, device=maps.device)
    yield bernoulli_mask(maps, sure, table, seed=0)[0], table
    yield template_mask(maps, PartTemplate())[0], maps


def assert_the_last_map_is_masked_as_alone(shape: tuple[int, ...], device: str) -> None:
    maps = torch.empty(shape, dtype=torch.bfloat16, device=device).fill_(1)
    maps[-1, -1, -1, -2] = 3
    peaks = template_mask(maps, PartTemplate())[1]
    assert peaks[-1, -1].item() == shape[2] * shape[3] - 2
    assert peaks[0, 0].item() == 0
    own = maps[-1:, -1:].clone()
    ways = zip(*(masked_in_every_way(x.requires_grad_()) for x in (maps, own)), strict=True)
    for (masked, leaf), (alone, own_leaf) in ways:
        maps.grad = own.grad = None
        assert torch.equal(masked[-1:, -1:], alone)
        assert leaf is maps or not masked[0].any()
        masked.backward(maps.detach())
        alone.backward(own.detach())
        for got, expected in ((maps, own), (leaf, own_leaf)):
            assert got.grad is not None
            assert expected.grad is not None
            assert expected.grad.any()
            torch.testing.assert_close(got.grad[-1:, -1:], expected.grad)
        del masked, alone


@pytest.mark.gpu
@on_kernels
def test_maps_of_more_elements_than_32_bits_count_are_masked_to_the_last(backend: Backend) -> None:
    shape = (2, 2**15 + 1, 182, 182)
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of memory")
    assert math.prod(shape) > 2**31
    assert_the_last_map_is_masked_as_alone(shape, "cuda")


def test_the_last_map_is_masked_as_alone_on_the_cpu() -> None:
    """The same with few, so that it is sound where a GPU first runs it."""
    assert_the_last_map_is_masked_as_alone((2, 33, 12, 12), "cpu")


@pytest.mark.gpu
@on_kernels
def test_filters_of_more_elements_than_32_bits_count_have_their_losses(backend: Backend) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of memory")
    maps = torch.zeros(70_000, 640, 7, 7, dtype=torch.bfloat16, device="cuda")
    assert maps.numel() > 2**31
    maps[:, -1] = torch.randn(70_000, 7, 7, device="cuda").relu_().bfloat16()
    maps.requires_grad_()
    alone = maps.detach()[:, -1:].clone().requires_grad_()
    losses = filter_loss(maps, PartTemplate()), filter_loss(alone, PartTemplate())
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(losses[0][-1:], losses[1])
    assert maps.grad is not None
    assert alone.grad is not None
    assert alone.grad.any()
    torch.testing.assert_close(maps.grad[:, -1:], alone.grad)


def assert_the_last_image_is_as_alone(images: int, device: str) -> None:
    """Loss and gradient of groups of filters, of which the last image's alone count."""
    groups = torch.arange(640, device=device) % 3
    mean = torch.full((640, 7, 7), 0.25, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = torch.empty(
            images, 640, 7, 7, dtype=torch.bfloat16, device=device, memory_format=layout
        ).zero_()
        maps[-1] = torch.randn(640, 7, 7, device=device, generator=generator).relu_().bfloat16()
        alone = maps[-1:].clone(memory_format=layout).requires_grad_()
        maps.requires_grad_()
        positive = torch.arange(images, device=device) == images - 1
        losses = [
            group_correlation_loss(maps, mean, groups, num_groups=3, positive=positive),
            group_correlation_loss(alone, mean, groups, num_groups=3),
        ]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        assert maps.grad is not None
        assert alone.grad is not None
        assert alone.grad.any()
        torch.testing.assert_close(maps.grad[-1:], alone.grad, rtol=0.02, atol=1e-8)
        assert not maps.grad[: images // 2].any()
        del maps, losses


@pytest.mark.gpu
@on_kernels
def test_groups_of_more_elements_than_32_bits_count_have_their_loss(backend: Backend) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of memory")
    assert 70_000 * 640 * 49 > 2**31
    assert_the_last_image_is_as_alone(70_000, "cuda")


def test_the_loss_of_an_image_among_others_is_its_own_on_the_cpu() -> None:
    """The same with few, so that it is sound where a GPU first runs it."""
    assert_the_last_image_is_as_alone(40, "cpu")


def assert_all_activations_are_counted(samples: int, filters: int, device: str) -> None:
    activations = torch.zeros(samples, filters, dtype=torch.bfloat16, device=device)
    activations[-1, -1] = 1
    labels = torch.arange(samples, device=device) % 3
    counts, minimum, maximum = (t.to(device) for t in fresh(filters, 4, 3))
    update(counts, minimum, maximum, activations, labels)
    assert (counts.sum((1, 2)) == samples).all()
    assert counts[-1, 1:].sum().item() == 1
    assert (minimum == 0).all()
    assert maximum[-1].item() == 1

    low, width = torch.full((filters,), -0.5, device=device), torch.ones(filters, device=device)
    soft = torch.ops.picnn_fast.soft_histogram(activations, labels, low, width, 4, 3)
    assert soft[0].sum().item() == samples
    wanted = torch.tensor([(samples - 1) / 2, samples / 2, 0.5, 0], device=device)
    torch.testing.assert_close(soft[-1].sum(1), wanted)
    slopes = torch.arange(12.0, device=device).square().view(1, 4, 3).expand(filters, 4, 3)
    backward = torch.ops.picnn_fast.soft_histogram_backward
    grad = backward(slopes, activations, labels, low, width)[-3:, -2:]
    assert torch.equal(
        grad, backward(slopes[-2:], activations[-3:, -2:].clone(), labels[-3:], low[:2], width[:2])
    )


@pytest.mark.gpu
@on_kernels
def test_more_activations_than_32_bits_count_are_all_counted(backend: Backend) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of memory")
    assert_all_activations_are_counted(2**20, 2**11 + 1, "cuda")


def test_all_activations_are_counted_on_the_cpu() -> None:
    """The same with few, so that it is sound where a GPU first runs it."""
    assert_all_activations_are_counted(200, 9, "cpu")


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_many_classes_are_those_of_the_cpu(backend: Backend, dtype: torch.dtype) -> None:
    """Tables that no block or cache holds: samples are sorted by their labels."""
    samples, filters, bins, classes = 33_000, 136, 64, 1000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, filters, generator=generator).relu_().to(dtype)
    labels = torch.randint(classes, (samples,), generator=generator)
    low, width = torch.zeros(filters), torch.full((filters,), 4 / bins)
    slopes = torch.randn(filters, bins, classes, generator=generator)
    runs = []
    for device in ("cpu", "cuda"):
        state = tuple(t.to(device) for t in fresh(filters, bins, classes))
        given = x.to(device), labels.to(device)
        update(*state, *given)
        grid = low.to(device), width.to(device)
        soft = torch.ops.picnn_fast.soft_histogram(*given, *grid, bins, classes)
        backward = torch.ops.picnn_fast.soft_histogram_backward
        grad = backward(slopes.to(device), *given, *grid)
        runs.append([t.cpu() for t in (*state, soft, grad)])
    for one, two in zip(*runs, strict=True):
        torch.testing.assert_close(one, two, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(runs[0][0], runs[1][0])


def assert_threads_count_side_by_side(device: str) -> None:
    """Tables of sizes of their own, that want more shared memory than any kernel may have.

    The first does with the kernel's own arrays alone.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator).to(device)

    def counted(classes: int) -> Tensor:
        labels = torch.arange(500, device=device) % classes
        counts, minimum, maximum = (t.to(device) for t in fresh(16, 40, classes))
        for _ in range(3):
            update(counts, minimum, maximum, x, labels)
        return counts

    sizes = [72, 200, 220, 240, 260, 300] * 4
    expected = [counted(classes) for classes in sizes]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(counted, sizes))
    assert all(map(torch.equal, got, expected))


@pytest.mark.gpu
@on_kernels
def test_threads_launch_side_by_side_whatever_shared_memory_each_wants(backend: Backend) -> None:
    assert_threads_count_side_by_side("cuda")


def test_threads_count_side_by_side_on_the_cpu() -> None:
    """The same, so that it is sound where a GPU first runs it."""
    assert_threads_count_side_by_side("cpu")


DETERMINISTIC = """
import torch
from picnn_fast import PartTemplate
from picnn_fast.functional import *

torch.use_deterministic_algorithms(True)
generator = torch.Generator("cuda").manual_seed(0)
maps = torch.randn(512, 16, 7, 7, device="cuda", generator=generator).relu_().requires_grad_()
logits = torch.randn(512, 5, device="cuda", generator=generator).requires_grad_()
table = torch.rand(5, 16, device="cuda", generator=generator).requires_grad_()
labels = torch.randint(5, (512,), device="cuda", generator=generator)
groups = torch.arange(16, device="cuda") % 3
losses = {
    "bernoulli_mask": lambda: bernoulli_mask(maps, logits, table, seed=1)[0].square().sum(),
    "class_gate": lambda: class_gate(maps, table, labels).square().sum(),
    "template_mask": lambda: template_mask(maps, PartTemplate())[0].square().sum(),
    "filter_loss": lambda: filter_loss(maps[:64], PartTemplate()).sum(),
    "group_correlation_loss": lambda: group_correlation_loss(maps, maps.detach().mean(0), groups),
    "group_class_loss": lambda: group_class_loss(maps, groups, labels, 5),
    "mutual_information": lambda: mutual_information(
        maps.mean((2, 3)), labels, 5, estimator="soft_histogram"
    ).sum(),
}
for name, loss in losses.items():
    runs = []
    for _ in range(2):
        got = torch.autograd.grad(loss(), (maps, logits, table), allow_unused=True)
        runs.append([g for g in got if g is not None])
    assert runs[0], name
    assert all(map(torch.equal, *runs)), name
for estimator in ("knn", "histogram"):
    m = [mutual_information(maps.mean((2, 3)), labels, 5, estimator=estimator) for _ in range(2)]
    assert torch.equal(*m), estimator
"""


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.gpu
def test_gradients_repeat_to_the_bit_where_only_deterministic_algorithms_are_allowed() -> None:
    done = in_a_process(DETERMINISTIC, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert done.returncode == 0, done.stderr


def test_gradients_repeat_to_the_bit_on_the_cpu() -> None:
    """The same script, so that it is sound where a GPU first runs it."""
    try:
        exec(DETERMINISTIC.replace('"cuda"', '"cpu"'), {})
    finally:
        torch.use_deterministic_algorithms(False)


WITHOUT_CUDA_KERNELS = """
import json, sys
sys.modules["picnn_fast._C"] = None
import torch
from picnn_fast import backends, functional
served = {name: backends.serving("cuda", name) for name in backends.operators()}
if torch.cuda.is_available():
    maps, labels = torch.rand(3, 4, 5, 5, device="cuda"), torch.tensor([0, 1, 1], device="cuda")
    gate = torch.rand(2, 4, device="cuda", requires_grad=True)
    functional.class_gate(maps, gate, labels).sum().backward()
    wanted = torch.zeros_like(gate).index_add_(0, labels, maps.sum((2, 3)))
    torch.testing.assert_close(gate.grad, wanted)
print(json.dumps(served))
"""


@pytest.mark.gpu
def test_triton_serves_a_gpu_where_no_kernels_were_compiled() -> None:
    done = in_a_process(WITHOUT_CUDA_KERNELS)
    assert done.returncode == 0, done.stderr
    served = json.loads(done.stdout)
    assert set(served.values()) == {"triton"}


# An assert ends the use of the device by a process: each has one of its own.
BAD = {
    "histogram": """
labels[3] = 5
mutual_information(x, labels, 5, estimator="histogram")
""",
    "histogram, not finite": """
x[3, 1] = torch.inf
mutual_information(x, labels, 5, estimator="histogram")
""",
    "soft_histogram": """
labels[3] = -1
mutual_information(x, labels, 5, estimator="soft_histogram")
""",
    "knn": """
labels[3] = 7
mutual_information(x, labels, 5)
""",
    "groups": """
groups = torch.tensor([0, 1, 7], device="cuda")
group_correlation_loss(x[:, :, None, None], x[0, :, None, None], groups, num_groups=3)
""",
    "a table of draws": """
draw_mask(torch.full((5, 3), 1.5, device="cuda"), labels)
""",
    "a table of no draw": """
draw_mask(torch.full((5, 3), 1.5, device="cuda"), labels[:0])
""",
    "a table of no mask": """
bernoulli_mask(x[:0], torch.rand(0, 5, device="cuda"), torch.full((5, 3), 1.5, device="cuda"))
""",
    "a table of a gate": """
labels[3] = 9
class_gate(torch.rand(40, 3, 2, 2, device="cuda"), torch.rand(5, 3, device="cuda"), labels)
""",
}
ARGUMENTS = """
import torch
from picnn_fast.functional import *
x = torch.rand(40, 3, device="cuda")
labels = torch.arange(40, device="cuda") % 5
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_ends_in_a_device_side_assert(name: str) -> None:
    done = in_a_process(ARGUMENTS + BAD[name] + "\ntorch.cuda.synchronize()\n")
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_an_error_on_the_cpu(name: str) -> None:
    """The same calls, so that they are bad where a GPU first runs them."""
    scope: dict[str, Any] = {}
    exec(ARGUMENTS.replace('"cuda"', '"cpu"'), scope)
    with pytest.raises(ValueError, match=r"^(labels|activations|groups|correspondence): "):
        exec(BAD[name].replace('"cuda"', '"cpu"'), scope)
