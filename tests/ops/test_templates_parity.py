"""Template family: every backend finds the reference's peaks and multiplies by its masks.

Peaks are compared exactly; masks with their definition in float64, within the rounding of a
template's value and of the product.
"""

import math

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.functional import template_mask
from picnn_fast.reference import templates as reference
from picnn_fast.reference.masking import accumulate_dtype
from tests.cases import in_turn, kernel_cases, noted, pairwise
from tests.conftest import Backend
from tests.ops.cases import (
    DTYPES,
    assert_within,
    epsilon,
    on_device,
    ulp,
)

SHAPES = {
    "odd": (3, 5, 5, 3),
    "single_element": (2, 3, 1, 1),
    "row": (3, 2, 1, 7),
    "column": (2, 2, 9, 1),
    "square": (2, 3, 7, 7),
    "vector_tails": (2, 19, 13, 11),
    "ImageNet": (2, 2, 14, 14),
    "empty_batch": (0, 3, 4, 4),
    "no_filters": (2, 0, 4, 4),
}
LAYOUTS = ("contiguous", "channels_last", "sliced", "batch_innermost", "expanded")
MAIN = LAYOUTS[:2]


def offsets(height: int, width: int) -> Tensor:
    """A table without any symmetry."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2 * height - 1, 2 * width - 1, generator=generator, dtype=torch.float64)


TEMPLATES = {
    "l1": PartTemplate("l1"),
    "l2": PartTemplate("l2"),
    "l1 wide": PartTemplate("l1", beta=0.7),
    "l2 wide": PartTemplate("l2", beta=1.1),
    "l1 uniform": PartTemplate("l1", "uniform", beta=5.0),
    "l2 uniform": PartTemplate("l2", "uniform", beta=4.0, gamma=1.5),
    "function": PartTemplate("l2", lambda d: (1 - 0.21 * d * d).exp() - 1),
    "table": PartTemplate(profile=offsets(15, 17)),
}


def maps(
    shape: tuple[int, int, int, int],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Tensor:
    """Random maps laid out as named, like those after a ReLU: a third of them zeros."""
    b, n, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) + 0.4).relu().to(dtype)

    if layout == "contiguous":
        return normal(b, n, h, w)
    if layout == "channels_last":
        return normal(b, n, h, w).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return normal(b, n + 2, 2 * h, w + 1)[:, 1 : n + 1, ::2, 1:]
    if layout == "batch_innermost":
        return normal(n, h, w, b).permute(3, 0, 1, 2)
    assert layout == "expanded"
    return normal(b, n, 1, 1).expand(b, n, h, w)


def masks(peak: Tensor, template: PartTemplate, like: Tensor, scale: float) -> Tensor:
    """The masks of those peaks in float64 on the CPU."""
    height, width = like.shape[2:]
    ones = torch.ones(like.shape, dtype=torch.float64)
    offsets = template.offsets_for(height, width, ones)
    return reference.template_mask_backward(ones, peak.cpu(), offsets, scale)


def assert_masked(
    got: Tensor, x: Tensor, peak: Tensor, template: PartTemplate, scale: float
) -> None:
    """``got`` is ``x`` times the masks, within rounding."""
    accumulate = accumulate_dtype(x.dtype)
    wide = x.detach().cpu().double()
    expected = wide * masks(peak, template, x, scale)
    # slope·d is at most 1 where the mask is not 0; a table's values are below 4 here.
    bound = wide.abs() * scale * 16 * epsilon(accumulate) + ulp(expected, x.dtype)
    assert_within(got, expected, bound)


def first_peaks(x: Tensor) -> Tensor:
    return reference.map_peaks(x.cpu())


@kernel_cases(
    ("name", "layout", "shape", "dtype"),
    pairwise(TEMPLATES, MAIN, [(2, 5, 7, 7), (2, 3, 5, 11)], (torch.float32, torch.float64)),
    # To a kernel each is a table of numbers.
    in_turn(["function", "table", "l2 uniform"], MAIN, [(2, 3, 5, 11)], DTYPES[:2]),
)
def test_every_kind_of_template(backend: Backend, name, layout, shape, dtype):
    x = maps(shape, layout, dtype)
    leaf = on_device(backend.device, x).requires_grad_()
    masked, peak = template_mask(leaf, TEMPLATES[name])
    (grad,) = torch.autograd.grad(masked.sum(), leaf)
    assert torch.equal(peak.cpu(), first_peaks(x))
    assert_masked(masked, x, peak, TEMPLATES[name], 1.0)
    assert_masked(grad, torch.ones_like(x), peak, TEMPLATES[name], 1.0)
    assert (grad > 0).any()


@kernel_cases(["layout"], [("contiguous",), ("channels_last",)], [("channels_last",)])
def test_a_peak_anywhere_gets_its_own_template(backend: Backend, layout):
    height, width = (3, 4) if backend.slow else (9, 6)
    count = height * width
    x = torch.eye(count).view(1, count, height, width) + 0.5
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    for name in ("l1", "l2", "table"):
        masked, peak = template_mask(on_device(backend.device, x), TEMPLATES[name])
        assert torch.equal(peak.cpu(), torch.arange(count)[None])
        assert_masked(masked, x, peak, TEMPLATES[name], 1.0)


@kernel_cases(
    ("dtype", "layout"),
    pairwise(DTYPES, ["contiguous", "channels_last", "batch_innermost"]),
    in_turn(DTYPES, ["contiguous", "channels_last", "batch_innermost"]),
)
def test_of_equal_maxima_the_first_in_row_major_order_is_the_peak(backend: Backend, dtype, layout):
    x = maps((4, 3, 5, 7), layout, dtype)
    x.clamp_(max=0.25)
    assert (x == 0.25).sum((2, 3)).min() > 1
    x[0, 0] = 0  # a map of zeros
    x[0, 1] = -torch.inf
    x[1] = torch.where(torch.arange(35).view(5, 7) == 20, 3.0, -1.0)
    masked, peak = template_mask(on_device(backend.device, x), PartTemplate("l1"))
    assert torch.equal(peak.cpu(), first_peaks(x))
    assert peak[0, 0] == peak[0, 1] == 0
    assert (peak[1] == 20).all()
    assert not masked[0, 0].any()


@kernel_cases(
    ("dtype", "layout", "shape"),
    pairwise(
        DTYPES, ["contiguous", "channels_last", "batch_innermost"], [(2, 4, 3, 3), (1, 4, 7, 7)]
    ),
    in_turn(DTYPES, ["contiguous", "channels_last"], [(2, 4, 3, 3)]),
)
def test_nan_and_infinity_are_as_in_the_reference(backend: Backend, dtype, layout, shape):
    nan, inf = math.nan, math.inf
    x = maps(shape, layout, dtype)
    last = (shape[2] - 1, shape[3] - 1)
    x[0, 0, 1, 1], x[0, 0, 2, 0] = inf, nan  # NaN is above infinity
    x[0, 1, 0, 2], x[0, 1][last] = inf, inf
    x[0, 2], x[0, 2][last] = -inf, nan
    x[0, 3, 0, 0], x[0, 3][last] = -inf, inf
    # No position where the template is 0 up to rounding.
    template = PartTemplate("l1", beta=3.1)
    leaf = on_device(backend.device, x).requires_grad_()
    masked, peak = template_mask(leaf, template)
    offsets = template.offsets_for(*shape[2:], x)
    expected, expected_peak = reference.template_mask(x, offsets, 1.0)
    assert torch.equal(peak.cpu(), expected_peak)
    bound = 16 * epsilon(dtype)
    torch.testing.assert_close(
        masked.detach().cpu(), expected, rtol=bound, atol=bound, equal_nan=True
    )
    assert expected.isnan().any()
    (grad,) = torch.autograd.grad(masked, leaf, on_device(backend.device, x))
    torch.testing.assert_close(grad.cpu(), expected, rtol=bound, atol=bound, equal_nan=True)


def test_among_many_filters_side_by_side_nan_and_infinity_have_their_place(cpp: Backend):
    nan, inf = math.nan, math.inf
    for dtype in DTYPES:
        # Vectors of filters and some more, of several units of work.
        x = maps((9, 84, 3, 5), "channels_last", dtype)
        x[0, 17, 1, 2] = x[0, 17, 2, 2] = x[8, 83, 2, 4] = x[5, 3, 0, 0] = nan
        x[1, 60, 2, 0], x[1, 60, 0, 4], x[2, 82, 0, 3] = inf, -inf, inf
        x[4, 79] = -inf
        with noted(dtype):
            assert torch.equal(torch.ops.picnn_fast.map_peaks(x), first_peaks(x))
            masked, peak = template_mask(x, TEMPLATES["l1"])
            assert torch.equal(peak, first_peaks(x))
            offsets = TEMPLATES["l1"].offsets_for(3, 5, x)
            expected, _ = reference.template_mask(x, offsets, 1.0)
            torch.testing.assert_close(masked, expected, rtol=0, atol=0, equal_nan=True)


@kernel_cases(
    ("grad_layout", "features_layout"),
    pairwise(LAYOUTS, ["contiguous", "channels_last", "sliced"]),
    in_turn(LAYOUTS, ["channels_last", "sliced", "contiguous"]),
)
def test_backward_reads_gradients_of_any_layout(backend: Backend, features_layout, grad_layout):
    shape = (2, 3, 5, 3)
    leaf = on_device(backend.device, maps(shape, features_layout)).requires_grad_()
    grad_masked = maps(shape, grad_layout, seed=5)
    masked, peak = template_mask(leaf, TEMPLATES["l2 wide"])
    (grad,) = torch.autograd.grad(masked, leaf, on_device(backend.device, grad_masked))
    assert_masked(grad, grad_masked, peak, TEMPLATES["l2 wide"], 1.0)


def test_the_scale_is_that_of_the_peak(backend: Backend):
    x = maps((2, 3, 7, 5))
    peaks = x.flatten(2).amax(-1)
    for scale, factor in ((1.0, 1.0), (3.0, 3.0), (0.001, 0.001), ("tau", 0.5 / 49)):
        with noted(scale):
            masked, peak = template_mask(x.to(backend.device), PartTemplate("l1"), scale=scale)
            at_peak = masked.cpu().flatten(2).gather(-1, peak.cpu()[..., None])[..., 0]
            torch.testing.assert_close(at_peak, peaks * factor, rtol=1e-6, atol=0)
            assert_masked(masked, x, peak, PartTemplate("l1"), factor)


LARGE = [(1, 2, 64, 64), (1, 3, 40, 33), (2, 2, 1, 300), (1, 2, 300, 1)]


@kernel_cases(
    ("shape", "layout", "name"),
    pairwise(LARGE, MAIN, ("l1", "l2 uniform")),
    in_turn(LARGE, MAIN, ("l1", "l2 uniform", "l2 uniform", "l1")),
)
def test_large_maps(backend: Backend, shape, layout, name):
    b, n, h, w = shape
    if backend.slow:
        h, w = (h + 1) // 2, (w + 1) // 2
    x = maps((b, n, h, w), layout)
    leaf = on_device(backend.device, x).requires_grad_()
    masked, peak = template_mask(leaf, TEMPLATES[name])
    (grad,) = torch.autograd.grad(masked.sum(), leaf)
    assert torch.equal(peak.cpu(), first_peaks(x))
    assert_masked(masked, x, peak, TEMPLATES[name], 1.0)
    assert_masked(grad, torch.ones_like(x), peak, TEMPLATES[name], 1.0)


def test_tall_maps_with_rows_shorter_than_a_vector(cpp: Backend):
    x = maps((1, 2, 5000, 11))
    masked, peak = template_mask(x, TEMPLATES["l2"])
    assert torch.equal(peak, first_peaks(x))
    assert_masked(masked, x, peak, TEMPLATES["l2"], 1.0)


@kernel_cases(("layout", "dtype"), pairwise(MAIN, (torch.float32, torch.bfloat16)), [], fibres=[])
def test_maps_beyond_the_cache_and_many_filters(backend: Backend, layout, dtype):
    """Outputs that are written past the caches, and rows of filters longer than any buffer."""
    x = maps((1, 2500, 31, 31), layout, dtype)
    masked, peak = template_mask(x.to(backend.device), TEMPLATES["l1 wide"])
    assert torch.equal(peak.cpu(), first_peaks(x))
    assert_masked(masked, x, peak, TEMPLATES["l1 wide"], 1.0)


def test_a_peak_out_of_range_is_refused(cpp: Backend):
    offsets = PartTemplate().offsets_for(5, 7, torch.empty(0))
    for wrong in (-1, 35, 2**40, -(2**63)):
        peak = torch.zeros(2, 3, dtype=torch.int64)
        peak[1, 2] = wrong
        for layout in ("contiguous", "channels_last", "batch_innermost"):
            grad, message = maps((2, 3, 5, 7), layout), rf"peak: got {wrong}, want \[0, 35\)"
            with noted(wrong, layout), pytest.raises(RuntimeError, match=message):
                torch.ops.picnn_fast.template_mask_backward(grad, peak, offsets, 1.0)


# offsets, which maps 5 x 7 want [9, 13]; the message
WRONG = {
    "too small": (torch.ones(9, 9), "offsets: got shape .*, want"),
    "of another dtype": (torch.ones(9, 13, dtype=torch.float64), "offsets: want float32"),
    "with strides": (torch.ones(13, 9).T, "offsets: want them contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_compiled_kernels_refuse_templates_that_are_none(cpp: Backend, name):
    offsets, message = WRONG[name]
    x = torch.ones(2, 3, 5, 7)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.template_mask(x, offsets, 1.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.picnn_fast.filter_loss(x, offsets, 1.0, True)
