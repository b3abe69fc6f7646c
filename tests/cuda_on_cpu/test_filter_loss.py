"""CUDA kernels of the filter loss on the CPU, beyond the parity suite in tests/ops.

Filters that a block holds whole and filters that are cut into tiles, by size or because a device
has less shared memory; several strips of rows and groups of columns to a product; numbers that the
matrix units do not take.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.reference import filter_loss as reference
from picnn_fast.reference.masking import accumulate_dtype
from picnn_fast.reference.templates import map_peaks
from tests.cuda_on_cpu.build import launches

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TEMPLATES = {
    "gradient": PartTemplate(),
    "uniform": PartTemplate("l2", "uniform"),
    "table": PartTemplate(profile=(torch.arange(61.0 * 61) * 0.7).sin().view(61, 61)),
}
# Batch, filters, height, width.
SHAPES = {
    "one_strip": (5, 2, 7, 7),
    "four_columns_to_a_warp": (67, 1, 7, 7),  # three strips, two groups of columns
    "eight_columns_to_a_warp": (70, 1, 13, 15),
    "negative_template_alone_in_a_tile": (65, 1, 8, 8),
    "two_strips_to_a_tile": (33, 1, 5, 9),
}
FORMS = ("resident", "tiled")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No shared memory to ask for: then no filter fits a block."""
    if request.param == "tiled":
        monkeypatch.setenv("PICNN_FAST_FIBRE_SHARED", "0")
    else:
        monkeypatch.delenv("PICNN_FAST_FIBRE_SHARED", raising=False)
    name: str = request.param
    return name


def maps(shape: tuple[int, int, int, int], scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(shape, generator=generator)).relu().to(dtype)


def state(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running estimates, some of them not begun, in memory in the order of templates."""
    generator = torch.Generator().manual_seed(1)
    dtype = accumulate_dtype(x.dtype)
    templates = x.shape[2] * x.shape[3] + 1
    log_mean = torch.randn(templates, x.shape[1], generator=generator).to(dtype).T
    log_mean[:, ::3] = -torch.inf
    return log_mean, torch.randn(2 * x.shape[1], generator=generator).to(dtype)[::2]


def assigned(x: Tensor) -> Tensor:
    peak = map_peaks(x)
    peak[::2] = x.shape[2] * x.shape[3]
    return peak.T.contiguous().T


def all_forms(
    operators: dict[str, Callable[..., Any]], x: Tensor, template: PartTemplate, tau: float
) -> list[Tensor]:
    offsets = template.offsets_for(x.shape[2], x.shape[3], x)
    results = list(operators["filter_loss"](x, offsets, tau, True))
    running = operators["filter_loss_running"]
    results += running(x, *state(x), 0.3, None, offsets, tau, True)
    results += running(x, *state(x), 0.3, assigned(x), offsets, tau, True)
    return results


REFERENCE: dict[str, Callable[..., Any]] = {
    "filter_loss": reference.filter_loss,
    "filter_loss_running": reference.filter_loss_running,
}


def check(
    kernels: dict[str, Callable[..., Any]], x: Tensor, template: PartTemplate, tau: float
) -> None:
    """Within what rounding of the responses can do."""
    got = all_forms(kernels, x, template, tau)
    wide = x.double()
    exact = reference_in_double(wide, x, template, tau)
    epsilon = torch.finfo(accumulate_dtype(x.dtype)).eps
    # Of a response; log_mean and log_ratio are no less exact, the loss loses by exp and log.
    size = tau * template.table(x.shape[2], x.shape[3]).abs().max().item()
    response = 8 * epsilon * (8 + size * wide.abs().sum((2, 3)).max().item())
    bounds = [4 * response, 8 * size * response]
    bounds += 2 * [4 * response, 8 * size * response, response, response]
    for one, two, bound in zip(got, exact, bounds, strict=True):
        assert one.dtype == accumulate_dtype(x.dtype)
        torch.testing.assert_close(one.double(), two, rtol=4 * epsilon, atol=bound)
    for grad in (got[1], got[3], got[7]):
        assert grad.stride() == torch.empty_like(x).stride()


def reference_in_double(
    wide: Tensor, x: Tensor, template: PartTemplate, tau: float
) -> list[Tensor]:
    offsets = template.offsets_for(x.shape[2], x.shape[3], wide)
    log_mean, log_ratio = (t.double() for t in state(x))
    which = assigned(x)
    results = list(reference.filter_loss(wide, offsets, tau, True))
    for choice in (None, which):
        results += reference.filter_loss_running(
            wide, log_mean, log_ratio, 0.3, choice, offsets, tau, True
        )
    return results


@pytest.mark.parametrize("shape", SHAPES)
def test_filters_of_every_division_agree_with_the_reference(
    kernels: dict[str, Callable[..., Any]], form: str, shape: str
) -> None:
    x = maps(SHAPES[shape], 30.0, torch.float32)
    check(kernels, x, TEMPLATES["gradient"], TEMPLATES["gradient"].tau_for(*x.shape[2:]))


def test_maps_too_large_for_a_block_of_any_device_agree_with_the_reference(
    kernels: dict[str, Callable[..., Any]],
) -> None:
    x = maps((2, 1, 27, 19), 100.0, torch.float32)
    template = TEMPLATES["gradient"]
    tau = template.tau_for(27, 19)
    loss, grad = kernels["filter_loss"](x, template.offsets_for(27, 19, x), tau, True)
    wide = x.double()
    exact = reference.filter_loss(wide, template.offsets_for(27, 19, wide), tau, True)
    for one, two in zip((loss, grad), exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=0, atol=2e-5 * two.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "template", "layout"),
    [
        *itertools.product(DTYPES, ["gradient"], ("contiguous", "channels_last")),
        *itertools.product(DTYPES[:2], ["uniform", "table"], ["contiguous"]),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_every_dtype_template_and_layout_agrees_with_the_reference(
    kernels: dict[str, Callable[..., Any]],
    form: str,
    dtype: torch.dtype,
    template: str,
    layout: str,
) -> None:
    x = maps((34, 3, 5, 6), 10.0, dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    check(kernels, x, TEMPLATES[template], 0.02)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_zero_maps_and_large_activations_stay_finite(
    kernels: dict[str, Callable[..., Any]], form: str, scale: float
) -> None:
    x = maps((9, 2, 7, 7), scale, torch.float32)
    template = TEMPLATES["gradient"]
    check(kernels, x, template, template.tau_for(7, 7))
    assert all(result.isfinite().all() for result in all_forms(kernels, x, template, 0.01))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2e38])
@pytest.mark.parametrize("template", ["gradient", "uniform"])
def test_what_the_matrix_units_cannot_take_comes_out_as_in_the_reference(
    kernels: dict[str, Callable[..., Any]], form: str, template: str, value: float
) -> None:
    """Infinities, NaN and zeros where the reference has them; other filters are not the worse."""
    x = maps((6, 3, 7, 7), 1.0, torch.float32)
    x[2, 1, 3, 4] = value
    got = all_forms(kernels, x, TEMPLATES[template], 0.01)
    expected = all_forms(REFERENCE, x, TEMPLATES[template], 0.01)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, equal_nan=True)
        filters = 1 if one.ndim == 4 else 0
        others = torch.tensor([0, 2])
        assert one.index_select(filters, others).isfinite().all()


def test_infinite_weights_make_an_infinite_gradient(
    kernels: dict[str, Callable[..., Any]], form: str
) -> None:
    x = maps((6, 2, 7, 7), 1.0, torch.float32)
    offsets = PartTemplate(profile=-torch.ones(13, 13)).offsets_for(7, 7, x)
    log_ratio = torch.tensor([0, torch.inf])
    state = x.new_zeros(2, 50), log_ratio, 0.5, None
    expected = reference.filter_loss_running(x, *state, offsets, 0.1, True)[1]
    assert (expected[:, 1] == -torch.inf).all()
    assert expected[:, 0].isfinite().all()
    got = kernels["filter_loss_running"](x, *state, offsets, 0.1, True)[1]
    torch.testing.assert_close(got, expected)


# What the usual order gives, for all others.
IN_ORDER: dict[tuple[str, str], list[Tensor]] = {}


@pytest.mark.parametrize("shape", ["one_strip", "four_columns_to_a_warp"])
def test_results_have_the_same_bits_in_every_order(
    kernels: dict[str, Callable[..., Any]],
    form: str,
    shape: str,
    schedule: Callable[[], None],
) -> None:
    x = maps(SHAPES[shape], 30.0, torch.float32)
    if (form, shape) not in IN_ORDER:
        IN_ORDER[form, shape] = all_forms(kernels, x, TEMPLATES["gradient"], 0.01)
    expected = IN_ORDER[form, shape]
    schedule()
    got = all_forms(kernels, x, TEMPLATES["gradient"], 0.01)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


@pytest.mark.parametrize("sums", ["once", "each"])
def test_float32_products_are_better_than_one_pass_of_the_matrix_units(
    kernels: dict[str, Callable[..., Any]],
    form: str,
    sums: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """exp(s) magnifies: ten bits of mantissa would be 1e-3 of a response."""
    monkeypatch.setenv("PICNN_FAST_FIBRE_SUMS", sums)
    x = maps((3, 1, 14, 14), 3e3, torch.float32)
    offsets = TEMPLATES["gradient"].offsets_for(14, 14, x)
    begin = torch.full((1, 197), -torch.inf), torch.full((1,), -torch.inf)
    tau = TEMPLATES["gradient"].tau_for(14, 14)
    log_mean = kernels["filter_loss_running"](x, *begin, 1.0, None, offsets, tau, False)[2]
    wide = TEMPLATES["gradient"].offsets_for(14, 14, x.double())
    exact = reference.filter_loss_running(
        x.double(), begin[0].double(), begin[1].double(), 1.0, None, wide, tau, False
    )[2]
    assert exact.abs().max() > 100
    torch.testing.assert_close(log_mean.double(), exact, rtol=2e-6, atol=2e-4)


def test_empty_batches_and_no_filters(kernels: dict[str, Callable[..., Any]], form: str) -> None:
    for shape in ((0, 3, 4, 5), (4, 0, 4, 5), (0, 2, 1, 1)):
        x = torch.zeros(shape)
        got = all_forms(kernels, x, TEMPLATES["gradient"], 0.1)
        for one, two in zip(got, all_forms(REFERENCE, x, TEMPLATES["gradient"], 0.1), strict=True):
            assert torch.equal(one, two)


def test_a_filter_in_tiles_takes_seven_kernels_and_one_in_a_block_takes_one(
    kernels: dict[str, Callable[..., Any]], form: str
) -> None:
    """Of seven the gradient is one. Tiles have a number zeroed besides, which is no kernel here."""
    x = maps((7, 2, 5, 5), 10.0, torch.float32)
    offsets = TEMPLATES["gradient"].offsets_for(5, 5, x)
    for with_grad, tiled in ((True, 7), (False, 6)):
        for operator, others in (
            ("filter_loss", ()),
            ("filter_loss_running", (*state(x), 0.2, None)),
        ):
            before = launches("filter_loss")
            kernels[operator](x, *others, offsets, 0.1, with_grad)
            assert launches("filter_loss") - before == (tiled if form == "tiled" else 1)


def test_the_loss_is_the_same_without_its_gradient(
    kernels: dict[str, Callable[..., Any]], form: str
) -> None:
    x = maps((7, 2, 5, 5), 10.0, torch.float32)
    offsets = TEMPLATES["gradient"].offsets_for(5, 5, x)
    for operator, others in (("filter_loss", ()), ("filter_loss_running", (*state(x), 0.2, None))):
        loss, grad, *estimates = kernels[operator](x, *others, offsets, 0.1, False)
        full = kernels[operator](x, *others, offsets, 0.1, True)
        assert grad.numel() == 0
        assert torch.equal(loss, full[0])
        assert all(map(torch.equal, estimates, full[2:]))


@pytest.mark.parametrize("template", [-1, 26, 2**40])
def test_a_template_that_there_is_not_ends_the_kernel(
    kernels: dict[str, Callable[..., Any]], form: str, template: int
) -> None:
    x = maps((3, 2, 5, 5), 1.0, torch.float32)
    which = torch.zeros(3, 2, dtype=torch.int64)
    which[1, 1] = template
    offsets = TEMPLATES["gradient"].offsets_for(5, 5, x)
    with pytest.raises(RuntimeError, match="assertion failed in thread"):
        kernels["filter_loss_running"](x, *state(x), 0.1, which, offsets, 0.1, True)


def test_malformed_arguments_are_refused(kernels: dict[str, Callable[..., Any]]) -> None:
    x = maps((3, 2, 5, 5), 1.0, torch.float32)
    offsets = TEMPLATES["table"].offsets_for(5, 5, x)
    mean, ratio = state(x)
    which = torch.zeros(3, 2, dtype=torch.int64)
    batch, running = kernels["filter_loss"], kernels["filter_loss_running"]
    for operator, arguments, message in (
        (batch, (x[0], offsets), r"x: want maps \[B, N, h, w\]"),
        (batch, (x.int(), offsets), "x: want float32, float64, bfloat16 or float16"),
        (batch, (x, offsets[1:]), "offsets: got shape .*, want"),
        (running, (x, mean[:, 1:], ratio, 0.1, None, offsets), "log_mean: got shape .*, want"),
        (running, (x, mean.double(), ratio, 0.1, None, offsets), "log_mean: want float32"),
        (running, (x, mean, ratio[1:], 0.1, None, offsets), "log_ratio: got shape .*, want"),
        (running, (x, mean, ratio, 0.0, None, offsets), r"momentum: got .*, want \(0, 1\]"),
        (running, (x, mean, ratio, 0.1, which.int(), offsets), "assigned: want int64"),
        (running, (x, mean, ratio, 0.1, which[1:], offsets), "assigned: got shape .*, want"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, 0.1, True)
