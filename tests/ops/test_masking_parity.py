"""Masking family: what is particular about its draws, kernels and memory, on every backend.

The draws are the reference's own, which tests/reference holds against plain Python; that backends
agree with it on inputs of all kinds is held by test_conformance.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast import backends
from picnn_fast.functional import (
    bernoulli_mask,
    class_gate,
    draw_mask,
    mask_channels,
)
from picnn_fast.reference import masking as reference
from tests.cases import case_id, every_instruction_set, in_turn, kernel_cases, noted, pairwise
from tests.conftest import IN_CI, Backend
from tests.ops.cases import DTYPES, assert_within, epsilon, on_device, ulp


@dataclass(frozen=True)
class Shape:
    batch: int
    filters: int
    spatial: tuple[int, int]
    classes: int


def maps(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Random maps laid out as named, and their channel axis."""
    b, n, (h, w) = shape.batch, shape.filters, shape.spatial

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if layout == "contiguous":
        return normal(b, n, h, w), 1
    if layout == "channels_last":
        return normal(b, n, h, w).contiguous(memory_format=torch.channels_last), 1
    if layout == "sliced":
        return normal(b, n + 2, 2 * h, w + 1)[:, 1 : n + 1, ::2, 1:], 1
    if layout == "expanded":
        return normal(b, n, 1, 1).expand(b, n, h, w), 1
    if layout == "tokens":
        return normal(b, h * w, n), -1
    assert layout == "channels_last_3d"
    return normal(b, n, 2, h, w).contiguous(memory_format=torch.channels_last_3d), 1


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def summation_bound(absolute: Tensor, expected: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Rounding of a sum of ``terms`` terms in any order, then of the result to ``dtype``."""
    accumulate = reference.accumulate_dtype(dtype)
    return absolute * (terms + 8) * epsilon(accumulate) + ulp(expected, dtype)


def draws(logits: Tensor, correspondence: Tensor, seed: int, rank: int = 0) -> tuple[Any, Any]:
    """The reference's mask (bool) and pseudo-label, on the CPU."""
    wide = [t.detach().cpu() for t in (logits, correspondence)]
    wide = [t if t.dtype == torch.float64 else t.float() for t in wide]
    key = torch.tensor([seed])
    label = reference.draw_labels(wide[0], key, rank)
    return reference.draw_filters(wide[1][label], key, rank).bool(), label


# Bernoulli mask -----------------------------------------------------------------------------------


@kernel_cases(
    ("dtype", "classes", "scale"),
    pairwise(DTYPES, [1, 2, 10, 1000], [0.0, 1.0, 30.0]),
    in_turn(DTYPES, [10, 1000, 1, 2], [1.0, 30.0, 0.0]),
)
def test_draws_equal_the_reference_bit_for_bit(backend: Backend, dtype, classes, scale):
    batch, filters = (5, 5) if backend.slow else (700, 33)
    keys = ((0, 0), (2**63 - 1, 3), (-(2**63), 2**32 - 1))
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(batch, classes, generator=generator).mul(scale).to(dtype)
    correspondence = torch.rand(classes, filters, generator=generator).to(dtype)
    features = torch.ones(batch, filters, 1)
    x, z, table = (on_device(backend.device, t) for t in (features, logits, correspondence))
    for seed, rank in keys[2:] if backend.slow else keys:
        _, mask, label = bernoulli_mask(x, z, table, seed=seed, rank=rank)
        kept, drawn = draws(logits, correspondence, seed, rank)
        assert torch.equal(label.cpu(), drawn)
        assert torch.equal(mask.cpu(), kept.float())
        # The labels alone, and the filters for labels that are given.
        wide = z if dtype == torch.float64 else z.float()
        key = torch.tensor([seed], device=backend.device)
        label = torch.ops.picnn_fast.draw_labels(wide, key, rank)
        assert torch.equal(label.cpu(), drawn)
        mask = draw_mask(table, label, seed=seed, rank=rank)
        assert torch.equal(mask.cpu(), kept.to(dtype))


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
def test_a_filter_is_kept_exactly_when_u_is_below_p(backend: Backend, dtype):
    batch, filters = 2, 150
    index = torch.arange(filters)
    bits = reference.random_24_bits(index, torch.tensor(8), reference.FILTER_STREAM, 0)
    u = (bits.double() * 2.0**-24).to(dtype)
    one = torch.ones((), dtype=dtype)
    for table, expected in (
        (u, 0.0),
        (torch.nextafter(u, one), 1.0),
        (torch.zeros_like(u), 0.0),
        (torch.ones_like(u), 1.0),
    ):
        _, mask, _ = bernoulli_mask(
            torch.ones(batch, filters, device=backend.device),
            torch.zeros(batch, 1, device=backend.device),
            on_device(backend.device, table[None]),
            seed=8,
        )
        assert (mask[0] == expected).all()  # sample 0 draws indices 0 to filters - 1


@every_instruction_set
def test_every_label_interval_is_hit_where_the_reference_hits_it(backend: Backend):
    """Differences of logits where the reduction of exp changes its octave, and where it ends."""
    batch = 8 if backend.slow else 400
    octaves = -(torch.arange(32) + 0.5) * math.log(2)
    borders = torch.tensor([-21.0, torch.nextafter(torch.tensor(-21.0), torch.zeros(()))])
    row = torch.cat((octaves, octaves.nextafter(torch.zeros(())), borders, torch.zeros(1)))
    shifts = torch.linspace(-50, 50, batch)[:, None]
    for logits in (row + shifts, (row.double() + shifts.double()), row[None].expand(batch, -1)):
        correspondence = torch.full((logits.shape[1], 2), 0.5)
        _, _, label = bernoulli_mask(
            torch.ones(batch, 2, device=backend.device),
            on_device(backend.device, logits),
            on_device(backend.device, correspondence),
            seed=1,
        )
        assert torch.equal(label.cpu(), draws(logits, correspondence, 1)[1])


@every_instruction_set
def test_rows_without_a_distribution_fall_to_the_last_class(backend: Backend):
    inf, nan = math.inf, math.nan
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 4, generator=generator)
    clean = logits.clone()
    bad = {1: [nan, 0, 0, 0], 2: [0, inf, 0, 0], 4: [-inf] * 4, 5: [inf] * 4, 7: [-inf, nan, 0, 1]}
    for row, values in bad.items():
        logits[row] = torch.tensor(values)
    logits[8] = torch.tensor([-inf, 3.0, -inf, -inf])  # a distribution, on one class
    correspondence = torch.rand(4, 6, generator=generator)

    def run(values: Tensor) -> tuple[Tensor, Tensor]:
        _, mask, label = bernoulli_mask(
            torch.ones(9, 6, device=backend.device),
            values.to(backend.device),
            on_device(backend.device, correspondence),
            seed=5,
        )
        return mask.cpu(), label.cpu()

    for dtype in DTYPES:
        with noted(dtype):
            mask, label = run(logits.to(dtype))
            assert label[list(bad)].tolist() == [3] * len(bad)
            assert label[8] == 1
            clean_mask, clean_label = run(clean.to(dtype))
            others = [0, 3, 6]
            assert torch.equal(label[others], clean_label[others])
            assert torch.equal(mask[others], clean_mask[others])
            expected_mask, expected_label = draws(logits.to(dtype), correspondence, 5)
            assert torch.equal(label, expected_label)
            assert torch.equal(mask, expected_mask.float())


def test_ranks_and_seeds_draw_apart(backend: Backend):
    batch, filters = 8, 32
    features = torch.ones(batch, filters, device=backend.device)
    logits = torch.zeros(batch, 50, device=backend.device)
    correspondence = torch.full((50, filters), 0.5, device=backend.device)

    def run(seed: int, rank: int) -> tuple[Tensor, Tensor]:
        return bernoulli_mask(features, logits, correspondence, seed=seed, rank=rank)[1:]

    base = run(1, 0)
    for other in (run(1, 1), run(2, 0), run(1 + 2**32, 0)):
        agreement = (base[0] == other[0]).double().mean().item()
        assert 0.25 < agreement < 0.75
        assert not torch.equal(base[1], other[1])
    again = run(1, 0)
    assert torch.equal(base[0], again[0])
    assert torch.equal(base[1], again[1])


@pytest.mark.gpu
# The reference would need hundreds of GiB; the CPU backends, time.
@pytest.mark.parametrize("backend", ["triton-gpu", "cuda"], indirect=True)
def test_draws_beyond_index_2_to_32_use_both_counter_words(backend: Backend):
    batch, filters = 2**17 + 3, 2**15
    needed = batch * filters * 4
    if torch.cuda.mem_get_info()[0] < 1.5 * needed:
        pytest.skip(f"needs {1.5 * needed / 2**30:.0f} GiB of GPU memory")
    seed = torch.tensor([77], device="cuda")
    probabilities = torch.tensor(0.5, device="cuda").expand(batch, filters)
    mask = torch.ops.picnn_fast.draw_filters(probabilities, seed, 0)
    for row in (0, 2**17 - 1, 2**17, batch - 1):
        index = row * filters + torch.arange(filters, device="cuda")
        bits = reference.random_24_bits(index, seed, reference.FILTER_STREAM, 0)
        assert torch.equal(mask[row], (bits < 2**23).float())


# Gradients of maps --------------------------------------------------------------------------------

GRAD_LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded"]


@kernel_cases(
    ("dtype", "features_layout", "grad_layout"),
    pairwise(DTYPES, ["contiguous", "channels_last", "sliced"], GRAD_LAYOUTS),
    in_turn(DTYPES, ["contiguous", "channels_last", "sliced"], GRAD_LAYOUTS),
)
def test_backward_reads_gradients_of_any_layout(
    backend: Backend, dtype, features_layout, grad_layout
):
    shape = Shape(2, 19, (5, 7), 1)
    generator = torch.Generator().manual_seed(4)
    features = maps(shape, features_layout, dtype, generator)[0].flatten(2)
    grad = maps(shape, grad_layout, dtype, generator)[0].flatten(2)
    mask_dtype = reference.accumulate_dtype(dtype)
    mask = torch.rand(2, 19, generator=generator, dtype=torch.float64).to(mask_dtype)
    mask[:, ::3], mask[:, 1::3] = 0, 1
    grad_features, grad_mask = torch.ops.picnn_fast.masking_backward(
        on_device(backend.device, grad),
        on_device(backend.device, features),
        on_device(backend.device, mask),
    )
    assert (grad_features.dtype, grad_mask.dtype) == (dtype, mask_dtype)
    exact = grad.double() * mask.double()[..., None]
    assert_within(grad_features, exact, ulp(exact, dtype))
    binary = ((mask == 0) | (mask == 1))[..., None].expand_as(exact)
    assert torch.equal(grad_features.cpu().double()[binary], exact[binary])
    product = features.double() * grad.double()
    size = product.abs().sum(-1)
    assert_within(
        grad_mask, product.sum(-1), summation_bound(size, product.sum(-1), 35, mask_dtype)
    )


# Gradients of logits and correspondence -----------------------------------------------------------

# The compiled kernel leaves the product to the library where the table has more elements.
LARGEST_TABLE = 1 << 16
PARAMETERS = {  # batch, classes, filters
    "one_class": (5, 1, 37),
    "less_than_a_vector": (7, 5, 15),
    "a_vector_and_one": (3, 4, 17),
    "odd": (33, 11, 131),
    "no_filters": (4, 3, 0),
    "below_the_switch": (5, 257, 255),
    "at_the_switch": (5, 256, 256),
    "above_the_switch": (5, 257, 256),
    "above_the_switch_one_class": (3, 1, LARGEST_TABLE + 3),
    "above_the_switch_empty_batch": (0, 257, 256),
}
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def parameters_case(batch: int, classes: int, filters: int) -> Arguments:
    """grad_mask, logits, correspondence and pseudo_label, on the CPU."""
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(batch, filters, generator=generator),
        torch.randn(batch, classes, generator=generator).mul(2),
        torch.rand(classes, filters, generator=generator),
        torch.randint(0, classes, (batch,), generator=generator),
    )


def parameters_backward(backend: Backend, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The operator on ``backend``; results on the CPU."""
    grads = torch.ops.picnn_fast.bernoulli_parameters_backward(
        *(on_device(backend.device, t) for t in arguments)
    )
    return grads[0].cpu(), grads[1].cpu()


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "switch" in name])
def test_the_library_multiplies_large_tables_alone(cpp: Backend, name):
    """So that the cases around the switch stay around it."""
    arguments = parameters_case(*PARAMETERS[name])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        parameters_backward(cpp, arguments)
    names = {event.name for event in profile.events()}
    assert "picnn_fast::bernoulli_parameters_backward" in names
    # The table is transposed for the library alone.
    assert ("aten::transpose" in names) == (arguments[2].numel() > LARGEST_TABLE)


def assert_unchanged(backend: Backend, got: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the order in which a GPU's atomic additions come."""
    bound = 0.0 if backend.device.type == "cpu" else 1e-5
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound, equal_nan=True)


NOT_FINITE = ["odd", "less_than_a_vector", "above_the_switch"]
NOT_FINITE_VALUES = (math.nan, math.inf, -math.inf)


@every_instruction_set
@pytest.mark.parametrize("name", NOT_FINITE)
def test_logits_without_a_distribution_spoil_their_own_row_alone(backend: Backend, name):
    inf, nan = math.inf, math.nan
    grad_mask, logits, table, label = parameters_case(*PARAMETERS[name])
    clean = parameters_backward(backend, (grad_mask, logits, table, label))
    rows = logits.clone()
    rows[0, 0] = nan
    rows[1, -1] = nan
    rows[2, 2] = inf
    rows[3] = -inf
    rows[4] = torch.where(torch.arange(logits.shape[1]) == 1, 3.0, -inf)  # one class for sure
    grads = parameters_backward(backend, (grad_mask, rows, table, label))
    assert grads[0][:4].isnan().all()
    assert torch.equal(grads[0][4], torch.zeros_like(logits[4]))
    assert_unchanged(backend, grads[0][5:], clean[0][5:])
    assert_unchanged(backend, grads[1], clean[1])


@every_instruction_set
@pytest.mark.parametrize("name", [*NOT_FINITE, "one_class", "a_vector_and_one"])
def test_a_gradient_that_is_not_finite_stays_in_its_row_and_column(backend: Backend, name):
    grad_mask, logits, table, label = parameters_case(*PARAMETERS[name])
    clean = parameters_backward(backend, (grad_mask, logits, table, label))
    row, filters = 1, grad_mask.shape[1]
    others = torch.arange(len(label)) != row
    # The first, the middle, one that two overlapping vectors hold, the last.
    columns = {0, filters // 2, max(filters - 3, 0), filters - 1}
    places = (in_turn if backend.slow else pairwise)(NOT_FINITE_VALUES, sorted(columns))
    if backend.slow and filters > 200:
        places = places[1:2]
    for value, column in places:
        spoilt = grad_mask.clone()
        spoilt[row, column] = value
        grads = parameters_backward(backend, (spoilt, logits, table, label))
        assert grads[0][row].isnan().all()
        assert_unchanged(backend, grads[0][others], clean[0][others])
        expected = clean[1].clone()
        expected[label[row], column] = value
        assert_unchanged(backend, grads[1], expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("name", ["odd", "no_filters", "above_the_switch"])
def test_a_pseudo_label_out_of_range_is_refused(backend: Backend, name):
    if backend.name == "reference" and name == "no_filters":
        pytest.skip("the reference has nothing to add there, so it looks up no row")
    *arguments, label = parameters_case(*PARAMETERS[name])
    classes = arguments[1].shape[1]
    for wrong in (-1, classes, 2**62, -(2**63)):
        label[-1] = wrong
        message = {
            "reference": f"index {wrong} is out of bounds .* size {classes}",
            "cpp": rf"pseudo_label: got {wrong}, want \[0, {classes}\)",
        }[backend.name]
        with noted(wrong), pytest.raises((IndexError, RuntimeError), match=message):
            parameters_backward(backend, (*arguments, label))


# Values that are not finite -----------------------------------------------------------------------


@kernel_cases(
    ("dtype", "layout"),
    pairwise(DTYPES, ["contiguous", "channels_last", "sliced"]),
    in_turn(DTYPES, ["contiguous", "channels_last", "sliced"]),
)
def test_nan_and_infinity_pass_where_kept_and_do_not_leak_where_dropped(
    backend: Backend, dtype, layout
):
    shape = Shape(2, 21, (3, 7), 1)
    generator = torch.Generator().manual_seed(5)
    features, _ = maps(shape, layout, dtype, generator)
    for start, value in enumerate((math.nan, math.inf, -math.inf)):
        features[:, :, start % 3, start::4] = value
    keep = (torch.arange(21) % 2).to(torch.float32)
    expected = torch.where(keep[:, None, None] == 1, features, torch.zeros((), dtype=dtype))
    moved = [on_device(backend.device, t) for t in (features, keep[None])]
    logits = torch.zeros(2, 1, device=backend.device)
    labels = torch.zeros(2, dtype=torch.int64, device=backend.device)

    x = leaf(moved[0])
    masked, mask, _ = bernoulli_mask(x, logits, moved[1], seed=0)
    assert torch.equal(mask.cpu(), keep.to(dtype).expand(2, -1))
    gated = class_gate(leaf(moved[0]), moved[1], labels)
    # A gradient that is not finite stays out of dropped maps, too.
    (grad_features,) = torch.autograd.grad(masked, x, moved[0])
    for got in (masked, gated, grad_features):
        torch.testing.assert_close(got.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)
        dropped = got.detach().cpu()[:, ::2]
        assert not torch.signbit(dropped).any(), "want +0 where dropped, whatever the sign there"


def test_kept_maps_keep_the_sign_of_zero_and_subnormal_numbers(backend: Backend):
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).smallest_normal
        values = torch.tensor([0.0, -0.0, tiny / 4, -tiny / 4, tiny, -1.0], dtype=dtype)
        features = values.expand(1, 2, 6).contiguous().to(backend.device)
        masked, _, _ = bernoulli_mask(
            features,
            torch.zeros(1, 1, device=backend.device),
            torch.ones(1, 2, device=backend.device),
            seed=0,
        )
        assert torch.equal(masked, features)
        assert torch.equal(torch.signbit(masked), torch.signbit(features))


# Memory -------------------------------------------------------------------------------------------


@functools.cache
def large_case(layout: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Maps of more than 8 MiB, and float64 answers where the gradient equals the maps."""
    generator = torch.Generator().manual_seed(7)
    # Side by side, filters that fill lines of memory and such that do not.
    lines = layout == "channels_last" and dtype in (torch.float32, torch.bfloat16)
    shape = Shape(9, 128 if lines else 131, (124 // dtype.itemsize, 61), 1)
    if layout == "misaligned":  # storage that starts at no multiple of a vector
        numel = shape.batch * shape.filters * math.prod(shape.spatial)
        stored = torch.randn(numel + 1, generator=generator).to(dtype)
        features = stored[1:].view(shape.batch, shape.filters, *shape.spatial)
    else:
        features, _ = maps(shape, layout, dtype, generator)
    assert features.nbytes > 8 * 2**20
    mask = torch.rand(shape.batch, shape.filters, generator=generator, dtype=torch.float64)
    mask = mask.to(reference.accumulate_dtype(dtype))
    mask[:, ::5], mask[:, 1::5] = 0, 1
    wide = features.double()
    return features, mask, wide * mask.double()[..., None, None], wide.square().sum((2, 3))


LARGE = [
    ("contiguous", torch.float32),
    *itertools.product(["channels_last", "misaligned"], DTYPES),
]


@kernel_cases(
    ("layout", "dtype"),
    LARGE,
    [],
    fibres=[],
    sets=in_turn(["contiguous", "channels_last", "misaligned"], [torch.float32, *DTYPES[1:]]),
)
def test_maps_beyond_the_cache(backend: Backend, threads, layout, dtype):
    """Compiled kernels may cut large maps differently, or store them past the cache."""
    features, mask, exact, grad_exact = large_case(layout, dtype)
    x, z = on_device(backend.device, features), on_device(backend.device, mask)
    size, terms = grad_exact, math.prod(features.shape[2:])
    binary = (mask == 0) | (mask == 1)
    threads(3)
    gated = mask_channels(x, z).cpu()
    grad_features, grad_mask = torch.ops.picnn_fast.masking_backward(x.flatten(2), x.flatten(2), z)
    assert torch.equal(grad_features.cpu().view_as(gated), gated)
    assert_within(gated, exact, ulp(exact, dtype))
    assert torch.equal(gated.double()[binary], exact[binary])
    assert_within(grad_mask, grad_exact, summation_bound(size, size, terms, mask.dtype))
    logits = torch.zeros(len(mask), 1, device=backend.device)
    masked, drawn, _ = bernoulli_mask(x, logits, z[:1], seed=0)
    assert torch.equal(masked.cpu(), torch.where(drawn.cpu()[..., None, None] == 1, features, 0))


# No hidden copies ---------------------------------------------------------------------------------


class NewMaps(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that made a tensor of at least ``size`` elements in new memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {t.untyped_storage().data_ptr() for t in leaves if isinstance(t, Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            large = isinstance(t, Tensor) and t.numel() >= self.size
            if large and t.untyped_storage().data_ptr() not in known:
                self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "channels_last_3d"])
def test_only_the_operators_make_tensors_of_the_size_of_the_maps(layout):
    generator = torch.Generator().manual_seed(0)
    shape = Shape(4, 6, (8, 8), 3)
    features, dim = maps(shape, layout, torch.float32, generator)
    grad = torch.randn_like(features)
    assert grad.stride() == features.stride()
    logits, correspondence = leaf(torch.zeros(4, 3)), leaf(torch.full((3, 6), 0.5))
    x = leaf(features)
    with NewMaps(features.numel()) as forward:
        masked, mask, label = bernoulli_mask(x, logits, correspondence, seed=1, channel_dim=dim)
    with NewMaps(features.numel()) as backward:
        torch.autograd.grad((masked, mask), (x, logits, correspondence), (grad, mask.detach()))
    assert forward.names == ["bernoulli_mask"]
    assert backward.names == ["masking_backward"]
    with NewMaps(features.numel()) as forward:
        gated = class_gate(x, correspondence, label, channel_dim=dim)
    with NewMaps(features.numel()) as backward:
        torch.autograd.grad(gated, (x, correspondence), grad)
    assert forward.names == ["class_gate"]
    assert backward.names == ["masking_backward"]


# Arbitrary inputs ---------------------------------------------------------------------------------


@st.composite
def arbitrary_case(draw) -> dict[str, Any]:
    rank = draw(st.integers(2, 5))
    size = draw(st.lists(st.integers(0, 6), min_size=rank, max_size=rank))
    channel_dim = draw(st.sampled_from([d for d in range(-rank, rank) if d % rank != 0]))
    size[channel_dim] = draw(st.integers(1, 20))
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    dtypes = st.sampled_from(DTYPES)
    return {
        "size": size,
        "channel_dim": channel_dim,
        "order": order,
        "steps": steps,
        "classes": draw(st.integers(1, 12)),
        "dtypes": draw(st.tuples(dtypes, dtypes, dtypes)),
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "rank": draw(st.integers(0, 2**32 - 1)),
        "scale": draw(st.sampled_from([0.0, 1.0, 1e3])),
    }


def strided(size: list[int], order: list[int], steps: list[int], dtype: torch.dtype) -> Tensor:
    """Random maps whose axes lie in memory in ``order``, ``steps`` apart."""
    stored = torch.randn([size[axis] * steps[axis] for axis in order]).to(dtype)
    inverse = [order.index(axis) for axis in range(len(size))]
    return stored.permute(inverse)[tuple(slice(None, None, step) for step in steps)]


@given(arbitrary_case())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_compiled_kernels_equal_the_reference_on_arbitrary_inputs(cpp: Backend, case):
    torch.manual_seed(0)
    dtype, logits_dtype, table_dtype = case["dtypes"]
    dim, size = case["channel_dim"], case["size"]
    filters, classes = size[dim], case["classes"]
    features = strided(size, case["order"], case["steps"], dtype)
    assert list(features.shape) == size
    logits = (torch.randn(size[0], classes) * case["scale"]).to(logits_dtype)
    table = torch.rand(classes, filters).to(table_dtype)
    labels = torch.randint(0, classes, (size[0],))
    grad = torch.randn(size).to(dtype)

    def run() -> list[Tensor]:
        inputs = [leaf(features), leaf(logits), leaf(table)]
        masked, mask, label = bernoulli_mask(
            *inputs, seed=case["seed"], rank=case["rank"], channel_dim=dim
        )
        gated = class_gate(inputs[0], inputs[2], labels, channel_dim=dim)
        exact = [masked, mask, label, *torch.autograd.grad(masked, inputs[0], grad)]
        masked, mask, _ = bernoulli_mask(
            *inputs, seed=case["seed"], rank=case["rank"], channel_dim=dim
        )
        sums = torch.autograd.grad((masked, gated), inputs[1:], (grad, grad))
        return [*exact, gated, *sums]

    got = run()
    with backends.use_backend("reference"):
        expected = run()
    for one, two in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
    # The gate's product is rounded once in both; the sums, in different orders.
    assert torch.equal(got[4], expected[4])
    accumulate = reference.accumulate_dtype(dtype)
    for one, two in zip(got[5:], expected[5:], strict=True):
        if accumulate == torch.float32 and two.dtype == torch.float64:
            one, two = one.float(), two.float()  # float32 sums, stored wider
        torch.testing.assert_close(one, two)


# Compiled known answers ---------------------------------------------------------------------------


def compiled_core() -> Any:
    if backends.extension is None:
        if IN_CI:
            pytest.fail(f"CI must run the compiled core: {backends.extension_error}")
        pytest.skip(f"{backends.extension_error}")
    return backends.extension


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (2**32 - 1,) * 4,
            (2**32 - 1,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_compiled_philox_gives_the_published_known_answers(counter, key, answer):
    assert tuple(compiled_core().philox4x32_10(counter, key)) == answer


def test_compiled_draws_use_both_words_of_index_and_seed():
    keys = itertools.product((0, 2**32 + 1, 2**64 - 1), ((0, 0), (1, 0), (0, 5), (1, 2**32 - 1)))
    index = [0, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3]
    for seed, (stream, rank) in keys:
        signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        expected = reference.random_24_bits(torch.tensor(index), signed, stream, rank)
        got = [
            compiled_core().random_24_bits(index=i, seed=seed, stream=stream, rank=rank)
            for i in index
        ]
        assert got == expected.tolist(), (seed, stream, rank)


def test_operators_take_any_number_of_spatial_axes(backend: Backend):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator).to(backend.device)
    table = torch.rand(4, 5, generator=generator).to(backend.device)
    seed = torch.tensor([7], device=backend.device)
    labels = torch.tensor([3, 0, 3], device=backend.device)
    ops = torch.ops.picnn_fast
    for spatial in ((), (6,), (2, 3), (1, 6), (2, 1, 3)):
        features = torch.randn(3, 5, *spatial, generator=generator).to(backend.device)
        flat = features.reshape(3, 5, math.prod(spatial))
        with noted(spatial):
            masked, mask, _ = ops.bernoulli_mask(features, logits, table, seed, 0)
            gated = ops.mask_channels(features, table[labels])
            grads = ops.masking_backward(features.cos(), features, mask)
            assert masked.shape == gated.shape == grads[0].shape == features.shape
            expected = ops.bernoulli_mask(flat, logits, table, seed, 0)[0]
            assert torch.equal(masked.view_as(flat), expected)
            assert torch.equal(gated.view_as(flat), ops.mask_channels(flat, table[labels]))
            expected = ops.masking_backward(flat.cos(), flat, mask)
            assert torch.equal(grads[0].view_as(flat), expected[0])
            assert torch.equal(grads[1], expected[1])


def test_kernels_refuse_spatial_axes_that_are_not_one_in_memory(backend: Backend):
    if backend.name.startswith("reference"):
        pytest.skip("the reference reads any strides")
    cropped = torch.randn(2, 3, 4, 4, device=backend.device)[..., :3]
    mask = torch.rand(2, 3, device=backend.device)
    with pytest.raises(RuntimeError, match=r"features: the strides|maps: the strides|view size"):
        torch.ops.picnn_fast.mask_channels(cropped, mask)
    # The public function copies them.
    got = mask_channels(cropped, mask)
    assert torch.equal(got, mask_channels(cropped.contiguous(), mask))
