"""A case for each operator: how its arguments are made, and what its results are held to.

``test_conformance.py`` writes what every operator owes once, over these cases and all backends. An
operator without a case fails a test there.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.reference import correlation as correlation_reference
from picnn_fast.reference import filter_loss as filter_loss_reference
from picnn_fast.reference import histogram as histogram_reference
from picnn_fast.reference import masking as masking_reference
from picnn_fast.reference.masking import accumulate_dtype
from tests.reference.test_correlation import pairwise_loss

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shape = tuple[int, ...]
Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OperatorCase:
    """An operator, its arguments and its bounds.

    Args:
        family: of the operator, whose reference is ``picnn_fast.reference.<family>.<name>``.
        make: arguments on the CPU, of a shape, a layout and a dtype, from a generator.
        shapes: by name; "odd" is run in every layout and dtype, "small" is what serves where the
            size does not matter.
        heavy: shapes that are left out where Triton's kernels are interpreted.
        many: a shape that threads share.
        any_shape: what hypothesis draws shapes from.
        rounding: for each result: None, equal to the reference bit for bit; else how far it may
            be from the reference in float64, in units of the rounding of the accumulation type at
            the largest result, beside the rounding of the result itself.
        least: what the largest result counts as at least: it may be the rest of a difference.
        leaves: positions of the arguments that have gradients.
        gradient_rounding: as ``rounding``, of their gradients.
        plain: what autograd differentiates to get the gradients expected; first results first. None
            is the reference.
        judged_wide: whether the reference may be asked in float64, where the float arguments mean
            the same.
        maps: positions of the arguments that lie in memory as the layout says.
        free: axes of arguments, by position, whose size is tied to no other argument's.
        copied: backends that copy the arguments, by design.
        internal: positions of results that only the gradient reads.
        second: whether second derivatives are offered; else they are refused.
    """

    name: str
    family: str
    make: Callable[[Shape, str, torch.dtype, torch.Generator], Arguments]
    shapes: dict[str, Shape]
    layouts: tuple[str, ...]
    many: Shape
    any_shape: st.SearchStrategy[Shape]
    rounding: tuple[float | None, ...]
    least: float = 2**-6
    leaves: tuple[int, ...] = ()
    gradient_rounding: tuple[float, ...] = ()
    plain: Callable[..., Any] | None = None
    heavy: tuple[str, ...] = ()
    internal: tuple[int, ...] = ()
    copied: tuple[str, ...] = ()
    second: bool = True
    judged_wide: bool = True
    maps: tuple[int, ...] = (0,)
    free: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return self.name

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.picnn_fast, self.name).default

    def reference(self, *arguments: Any) -> tuple[Any, ...]:
        module = importlib.import_module(f"picnn_fast.reference.{self.family}")
        return as_tuple(getattr(module, self.name)(*arguments))

    def arguments(
        self,
        shape: Shape | str = "small",
        layout: str = "contiguous",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        size = self.shapes[shape] if isinstance(shape, str) else shape
        return self.make(size, layout, dtype or self.dtypes[0], generator)

    def written(self) -> list[int]:
        """Positions of the arguments that the schema says are written to."""
        given = self.operator._schema.arguments
        return [i for i, a in enumerate(given) if a.alias_info and a.alias_info.is_write]


def as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


# Tensors ------------------------------------------------------------------------------------------


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators of picnn_fast that ran, and did not refuse to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "picnn_fast":
            self.names.append(func.name())
        return result


def on_device(device: torch.device, t: Tensor) -> Tensor:
    """``t`` on ``device`` with the same strides and offset, which ``to`` would make dense."""
    size = t.untyped_storage().nbytes() // t.itemsize
    storage = t.detach().as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def dense(x: Tensor) -> bool:
    """Whether the elements fill their memory in some order of the axes."""
    order = sorted(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d]), reverse=True)
    return x.numel() > 0 and x.permute(order).is_contiguous()


def steps(x: Tensor) -> list[int]:
    """Strides of the axes that have any: that of an axis of size 1 means nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of ``dtype`` at the size of ``value`` (float64)."""
    info = torch.finfo(dtype)
    exponent = value.abs().clamp_min(info.smallest_normal).log2().floor()
    return torch.exp2(exponent) * info.eps


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = (got.detach().cpu().double() - expected).abs() - bound
    assert not (excess > 0).any(), f"off by {excess.max():.3g} beyond the rounding bound"


def assert_near(
    got: Tensor, exact: Tensor, units: float, accumulate: torch.dtype, least: float
) -> None:
    """Within ``units`` of rounding at the largest of ``exact``, or at ``least``, and the rounding
    of the result."""
    got, exact, dtype = got.detach().cpu().double(), exact.double(), got.dtype
    finite = exact.isfinite()
    torch.testing.assert_close(got[~finite], exact[~finite], equal_nan=True)
    got, exact = got[finite], exact[finite]
    scale = max(least, exact.abs().max().item() if exact.numel() else 0.0)
    bound = units * torch.finfo(accumulate).eps * scale + ulp(exact, dtype)
    excess = (got - exact).abs() - bound
    assert not excess.isnan().any()
    assert not (excess > 0).any(), f"off by {excess.max():.3g} beyond the rounding bound"


# Maps [B, N, h, w] --------------------------------------------------------------------------------

MAP_LAYOUTS = ("contiguous", "channels_last", "strided", "batch_innermost", "expanded")
MAP_SHAPES: dict[str, Shape] = {
    "odd": (3, 5, 5, 3),
    "small": (2, 3, 3, 2),
    "single_element": (2, 3, 1, 1),
    "one_image_and_filter": (1, 1, 4, 5),
    "row": (3, 2, 1, 7),
    "vector_tails": (2, 35, 13, 11),
    "ImageNet": (2, 4, 14, 14),
    "empty_batch": (0, 3, 4, 4),
}


def maps(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator, *, relu: bool
) -> Tensor:
    """Random maps laid out as named; their positions lie in memory as one axis would."""
    b, n, h, w = shape

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator)
        return ((values + 0.4).relu() if relu else values).to(dtype)

    if layout == "contiguous":
        return normal(b, n, h, w)
    if layout == "channels_last":
        return normal(b, n, h, w).contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return normal(b, n + 2, h, 2 * w)[:, 1 : n + 1, :, 1::2]
    if layout == "batch_innermost":
        return normal(n, h, w, b).permute(3, 0, 1, 2)
    assert layout == "expanded"
    return normal(b, n, 1, 1).expand(b, n, h, w)


def some_maps(batch: int, filters: int, side: int) -> st.SearchStrategy[Shape]:
    sides = st.integers(1, side)
    return st.tuples(st.integers(0, batch), st.integers(1, filters), sides, sides)


# Masking ------------------------------------------------------------------------------------------

CLASSES = 4
_MASKING: dict[str, Any] = {
    "family": "masking",
    "shapes": MAP_SHAPES | {"vector_tails": (2, 131, 9, 5), "no_position": (2, 3, 0, 3)},
    "layouts": MAP_LAYOUTS,
    "many": (48, 200, 7, 7),
    "heavy": ("vector_tails",),
    "any_shape": some_maps(6, 40, 9),
    "free": {0: (2, 3)},
}


def _mask(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Zeros, ones and others, in the type that maps of ``dtype`` are masked in."""
    mask = torch.rand(shape[:2], generator=generator)
    mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.7, 1.0, mask))
    return mask.to(accumulate_dtype(dtype))


def _draw_labels(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    logits = torch.randn(shape, generator=generator).mul(2).to(dtype)
    return matrix(logits, layout), torch.tensor([-12345]), 1


def _draw_filters(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    probabilities = torch.rand(shape, generator=generator).to(dtype)
    # Rows of the samples' own, or those of their labels.
    if dtype == torch.float32 or not shape[0]:
        return matrix(probabilities, layout), torch.tensor([-12345]), 1
    labels = torch.randint(0, shape[0], (shape[0] + 1,), generator=generator)
    return matrix(probabilities, layout), torch.tensor([-12345]), 1, labels, True


def _drawn_straight_through(
    probabilities: Tensor,
    seed: Tensor,
    rank: int,
    labels: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    kept = masking_reference.draw_filters(probabilities.detach(), seed, rank, labels)
    rows = probabilities if labels is None else probabilities[labels]
    return kept + rows - rows.detach()


def _bernoulli_mask(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    wide = accumulate_dtype(dtype)
    logits = torch.randn(shape[0], CLASSES, generator=generator).mul(2).to(wide)
    correspondence = torch.rand(CLASSES, shape[1], generator=generator).to(wide)
    features = maps(shape, layout, dtype, generator, relu=False)
    return features, logits, correspondence, torch.tensor([-12345]), 1


def _mask_channels(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    features = maps(shape, layout, dtype, generator, relu=False)
    return features, _mask(shape, dtype, generator)


def _masking_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    grad = maps(shape, layout, dtype, generator, relu=False)
    return grad, *_mask_channels(shape, layout, dtype, generator)


def _sums_by_label(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    rows = matrix(torch.randn(shape, generator=generator).to(dtype), layout)
    return rows, torch.randint(0, CLASSES - 1, shape[:1], generator=generator), CLASSES


def _class_gate(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    gate = _mask((CLASSES, *shape[1:]), dtype, generator)
    labels = torch.randint(0, CLASSES - 1, shape[:1], generator=generator)
    return maps(shape, layout, dtype, generator, relu=False), gate, labels


def _parameters_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    batch, classes, filters = shape
    tables = [
        torch.randn(batch, filters, generator=generator),
        torch.randn(batch, classes, generator=generator) * 2,
        torch.rand(classes, filters, generator=generator),
    ]
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return *(matrix(t.to(dtype), layout) for t in tables), labels


def matrix(values: Tensor, layout: str) -> Tensor:
    """``values`` [rows, columns] laid out as named; in between, what must not be read."""
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "strided":
        memory = values.new_full((2 * values.shape[0] + 1, 3 * values.shape[1] + 2), math.nan)
        memory[1::2, 2::3] = values
        return memory[1::2, 2::3]
    if layout == "expanded":
        return values[:1].expand(values.shape) if len(values) else values
    assert layout == "contiguous"
    return values


MATRIX_LAYOUTS = ("contiguous", "transposed", "strided", "expanded")

# Of tables of a row a sample.
_DRAWS: dict[str, Any] = _MASKING | {
    "shapes": {
        "odd": (33, 11),
        "small": (4, 5),
        "one_of_each": (1, 1),
        "vector_tails": (3, 1031),
        "empty_batch": (0, 3),
    },
    "layouts": MATRIX_LAYOUTS,
    "many": (300, 700),
    "any_shape": st.tuples(st.integers(0, 40), st.integers(1, 40)),
    "free": {0: (0, 1)},
    "dtypes": DTYPES[:2],
}

_DRAWN = {0: (0, 1), 3: (0,)}

MASKING = (
    OperatorCase(
        name="draw_labels", make=_draw_labels, rounding=(None,), judged_wide=False, **_DRAWS
    ),
    OperatorCase(
        name="draw_filters",
        make=_draw_filters,
        rounding=(None,),
        leaves=(0,),
        gradient_rounding=(64,),
        plain=_drawn_straight_through,
        judged_wide=False,
        # A table's gradient lies as the mask does, whatever the table's layout.
        **(_DRAWS | {"layouts": ("contiguous", "strided", "expanded"), "free": _DRAWN}),
    ),
    OperatorCase(
        name="bernoulli_mask",
        make=_bernoulli_mask,
        rounding=(None, None, None),
        leaves=(0, 1, 2),
        gradient_rounding=(0, 128, 128),
        plain=masking_reference.straight_through,
        **_MASKING,
    ),
    OperatorCase(
        name="mask_channels",
        make=_mask_channels,
        rounding=(None,),
        leaves=(0, 1),
        gradient_rounding=(1, 64),
        plain=lambda features, mask: features * mask[..., None, None],
        **_MASKING,
    ),
    OperatorCase(
        name="masking_backward",
        make=_masking_backward,
        rounding=(None, 64),
        leaves=(0, 1, 2),
        gradient_rounding=(1, 1, 64),
        plain=lambda grad, features, mask: (
            grad * mask[..., None, None],
            (features * grad).sum((2, 3)),
        ),
        **(_MASKING | {"maps": (0, 1), "free": {}}),
    ),
    OperatorCase(
        name="class_gate",
        make=_class_gate,
        rounding=(None, None),
        leaves=(0, 1),
        gradient_rounding=(1, 64),
        plain=lambda features, gate, labels: (
            features * gate[labels][..., None, None],
            gate[labels],
        ),
        **(_MASKING | {"free": {0: (2, 3), 1: (0,)}}),
    ),
    OperatorCase(
        name="sums_by_label",
        copied=("cpp",),
        make=_sums_by_label,
        rounding=(64,),
        **(_DRAWS | {"free": {0: (1,)}}),
    ),
    OperatorCase(
        name="bernoulli_parameters_backward",
        copied=("cpp",),
        least=1.0,
        make=_parameters_backward,
        rounding=(64, 64),
        **(
            _MASKING
            | {
                "shapes": {
                    "odd": (33, 11, 131),
                    "small": (4, 3, 5),
                    "one_of_each": (1, 1, 1),
                    "one_filter": (4, 3, 1),
                    "a_vector_and_one": (3, 4, 17),
                    "empty_batch": (0, 3, 21),
                    "no_filters": (4, 3, 0),
                    "for_the_library": (5, 257, 256),
                },
                "layouts": MATRIX_LAYOUTS,
                "many": (300, 40, 700),
                "any_shape": st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 140)),
                "maps": (0, 1, 2),
                "free": {},
                "dtypes": DTYPES[:2],
            }
        ),
    ),
)


# Correlation --------------------------------------------------------------------------------------

GROUPS = 3
_CORRELATION: dict[str, Any] = {
    "family": "correlation",
    "least": 1.0,
    "shapes": MAP_SHAPES | {"many_filters": (2, 150, 2, 3), "beyond_registers": (1, 4, 17, 19)},
    "layouts": MAP_LAYOUTS,
    "many": (9, 300, 7, 7),
    "heavy": ("vector_tails", "many_filters"),
    "any_shape": some_maps(3, 80, 18),
}


def _group_correlation(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x = maps(shape, layout, dtype, generator, relu=True)
    mean = (torch.rand(shape[1:], generator=generator) / 2).to(accumulate_dtype(dtype))
    groups = torch.randint(0, GROUPS, shape[1:2], generator=generator)
    return x, mean, groups, GROUPS, torch.arange(shape[0]) % 3 != 1


def _group_correlation_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x, mean, groups, count, positive = _group_correlation(shape, layout, dtype, generator)
    kept = correlation_reference.group_correlation(x, mean, groups, count, positive)[1:]
    return torch.tensor(1.5, dtype=mean.dtype), x, mean, groups, positive, *kept


def _pairwise_loss(x: Tensor, mean: Tensor, groups: Tensor, count: int, positive: Tensor) -> Tensor:
    return pairwise_loss(x, mean, groups, positive) if positive.any() else 0 * x.sum()


CORRELATION = (
    OperatorCase(
        name="group_correlation",
        internal=(1, 2, 3),
        second=False,
        make=_group_correlation,
        rounding=(64, 64, 64, 64),
        leaves=(0,),
        gradient_rounding=(64,),
        plain=_pairwise_loss,
        **_CORRELATION,
    ),
    OperatorCase(
        name="group_correlation_backward",
        make=_group_correlation_backward,
        rounding=(64,),
        **(_CORRELATION | {"maps": (1,)}),
    ),
)


# Templates and the filter loss --------------------------------------------------------------------

_TEMPLATES: dict[str, Any] = {
    "family": "templates",
    "shapes": MAP_SHAPES | {"no_filters": (2, 0, 4, 4)},
    "layouts": MAP_LAYOUTS,
    "many": (9, 300, 7, 7),
    "heavy": ("vector_tails", "many_filters"),
    "any_shape": some_maps(3, 20, 30),
}


# Every filter has as many templates as positions.
_FILTER_LOSS: dict[str, Any] = _TEMPLATES | {
    "family": "filter_loss",
    "least": 2**-3,
    "heavy": ("vector_tails", "ImageNet"),
    "shapes": _TEMPLATES["shapes"] | {"vector_tails": (2, 19, 7, 5), "ImageNet": (1, 2, 14, 14)},
    "any_shape": some_maps(9, 18, 12),
}


def offsets(x: Tensor) -> Tensor:
    """A template, as the operators take it."""
    return PartTemplate("l1", beta=0.7).offsets_for(*x.shape[2:], x)


def _template_mask(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x = maps(shape, layout, dtype, generator, relu=True)
    if layout != "expanded":
        x = x.clamp_(max=1)  # of equal maxima, the first is the peak
    return x, offsets(x), 0.75


def _template_mask_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    grad, values, scale = _template_mask(shape, layout, dtype, generator)
    peak = torch.randint(0, shape[2] * shape[3], shape[:2], generator=generator)
    return grad, peak, values, scale


def _filter_loss(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    # Responses of a few units.
    x = maps(shape, layout, dtype, generator, relu=True) * 30
    return x, offsets(x), 0.5 / max(shape[2:]) ** 2, True


def _filter_loss_running(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x, *end = _filter_loss(shape, layout, dtype, generator)
    wide, templates = accumulate_dtype(dtype), shape[2] * shape[3] + 1
    log_mean = torch.randn(shape[1], templates, generator=generator).to(wide)
    log_ratio = torch.randn(shape[1], generator=generator).mul(0.1).to(wide)
    log_mean[:1] = log_ratio[:1] = -math.inf
    assigned = torch.randint(0, templates, shape[:2], generator=generator)
    if dtype in (torch.float32, torch.bfloat16):
        assigned = None  # all templates count
    return x, log_mean, log_ratio, 0.3, assigned, *end


def _running_surrogate(*arguments: Any) -> Tensor:
    """Whose derivative is the gradient by formula: the loss's own is not the one wanted."""
    x = arguments[0]
    grad = filter_loss_reference.filter_loss_running(x.detach(), *arguments[1:])[1]
    return (grad * x).sum((0, 2, 3))


def _map_peaks(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x = _template_mask(shape, layout, dtype, generator)[0]
    if dtype in (torch.float32, torch.bfloat16):
        return x, None, None
    labels, categories = (torch.randint(0, 2, (n,), generator=generator) for n in shape[:2])
    return x, labels, categories


TEMPLATES = (
    OperatorCase(
        name="map_peaks",
        free={0: (2, 3)},
        make=_map_peaks,
        rounding=(None,),
        **_TEMPLATES,
    ),
    OperatorCase(
        name="template_mask",
        free={0: (0, 1, 2, 3)},
        make=_template_mask,
        rounding=(16, None),
        leaves=(0,),
        gradient_rounding=(16,),
        **_TEMPLATES,
    ),
    OperatorCase(
        name="template_mask_backward",
        leaves=(0,),
        gradient_rounding=(16,),
        free={0: (2, 3)},
        make=_template_mask_backward,
        rounding=(16,),
        **_TEMPLATES,
    ),
    OperatorCase(
        name="filter_loss",
        free={0: (0, 1, 2, 3)},
        second=False,
        make=_filter_loss,
        rounding=(256, 256),
        leaves=(0,),
        gradient_rounding=(256,),
        plain=lambda *arguments: filter_loss_reference.definition(*arguments[:-1]),
        **_FILTER_LOSS,
    ),
    OperatorCase(
        name="filter_loss_running",
        second=False,
        make=_filter_loss_running,
        rounding=(256, 256, 256, 256),
        leaves=(0,),
        gradient_rounding=(256,),
        plain=_running_surrogate,
        **_FILTER_LOSS,
    ),
)


# Activations [M, N] -------------------------------------------------------------------------------

_HISTOGRAM: dict[str, Any] = {
    "family": "histogram",
    "shapes": {  # samples, filters, bins, classes
        "odd": (67, 5, 4, 4),
        "small": (6, 3, 4, 2),
        "one_sample": (1, 3, 5, 2),
        "one_filter": (33, 1, 4, 3),
        "empty_batch": (0, 4, 4, 3),
        "one_class": (21, 7, 6, 1),
        "two_bins": (40, 3, 2, 3),
        "filter_tails": (19, 35, 7, 2),
        "many_classes": (23, 3, 16, 301),
        "many_bins": (30, 2, 1000, 2),
    },
    "layouts": MATRIX_LAYOUTS,
    "many": (20_000, 40, 16, 4),
    "any_shape": st.tuples(
        st.integers(0, 90), st.integers(1, 40), st.integers(2, 70), st.integers(1, 9)
    ),
}


def _activations(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Of very different scales; their labels; and the scales."""
    samples, filters, _, classes = shape
    spread = torch.exp2(torch.arange(filters) % 7 - 3.0)
    x = torch.randn(samples, filters, generator=generator) * spread
    return x.to(dtype), torch.randint(0, classes, (samples,), generator=generator), spread


def _histogram_update(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    _, filters, bins, classes = shape
    x, labels, _ = _activations(shape, dtype, generator)
    # After some samples of a narrower range.
    state = (
        torch.zeros(filters, bins, classes, dtype=torch.int64),
        torch.full((filters,), math.inf, dtype=torch.float64),
        torch.full((filters,), -math.inf, dtype=torch.float64),
    )
    seen = len(x) // 4
    histogram_reference.histogram_update(*state, x[:seen] / 3, labels[:seen])
    return *state, matrix(x, layout), labels


def _soft_histogram(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    """Some samples beyond the range; at centres, where the slope has a step, in the backward."""
    _, _, bins, classes = shape
    x, labels, spread = _activations(shape, dtype, generator)
    wide = accumulate_dtype(dtype)
    low, width = (-1.7 * spread).to(wide), (3.1 * spread / bins).to(wide)
    return matrix(x, layout), labels, low, width, bins, classes


def _soft_histogram_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    x, labels, low, width, bins, classes = _soft_histogram(shape, "contiguous", dtype, generator)
    centres = low + torch.arange(len(x[::5]))[:, None] % bins * width
    x = x.clone()
    x[::5] = centres.to(dtype)
    x = matrix(x, layout)
    grad = torch.randn(shape[1], bins, classes, generator=generator).to(low.dtype)
    return grad, x, labels, low, width


INFORMATION_LAYOUTS = ("contiguous", "transposed", "filters_apart")


def _counts(shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A quarter of the cells empty; a class without samples, one alone, and a bin without."""
    _, filters, bins, classes = shape
    counts = torch.rand(filters, bins, classes, generator=generator, dtype=torch.float64)
    counts = (counts * 4 - 1).relu().to(dtype)
    counts[:1, :, -1] = 0
    counts[1:2, :, 1:] = 0
    counts[2:3, 0] = 0
    if layout == "transposed":
        return counts.mT.contiguous().mT
    if layout == "filters_apart":
        return torch.stack((counts, counts + torch.nan), 1)[:, 0]
    return counts


def _histogram_information(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    # By label or not, corrected or not: in turn.
    turn = INFORMATION_LAYOUTS.index(layout)
    by_label = (turn + shape[2] // 16) % 2 == 1
    corrected = (turn + (dtype == torch.float64)) % 2 == 1
    return _counts(shape, layout, dtype, generator), by_label, corrected


def _histogram_information_backward(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    counts, by_label, _ = _histogram_information(shape, layout, dtype, generator)
    information = histogram_reference.histogram_information(counts, by_label, False)
    grad = torch.randn(information.shape[::-1], generator=generator).to(dtype)
    grad = grad if by_label else grad.T
    return grad, counts, information, by_label


# Counts [N, bins, K].
_INFORMATION: dict[str, Any] = _HISTOGRAM | {
    "shapes": {name: shape for name, shape in _HISTOGRAM["shapes"].items() if shape[0] > 1}
    | {"empty_batch": (9, 0, 4, 3)},
    "layouts": INFORMATION_LAYOUTS,
    "any_shape": st.tuples(st.just(9), st.integers(1, 9), st.integers(2, 70), st.integers(1, 70)),
    "dtypes": (torch.float32, torch.float64),
}


HISTOGRAM = (
    OperatorCase(
        name="histogram_update",
        make=_histogram_update,
        rounding=(None, None, None, None),
        **(_HISTOGRAM | {"maps": (3,)}),
    ),
    OperatorCase(
        name="soft_histogram",
        make=_soft_histogram,
        rounding=(64,),
        leaves=(0,),
        gradient_rounding=(64,),
        # Which side of a centre a sample is on, its own type decides.
        judged_wide=False,
        **_HISTOGRAM,
    ),
    OperatorCase(
        name="soft_histogram_backward",
        free={0: (1, 2)},
        make=_soft_histogram_backward,
        rounding=(8,),
        judged_wide=False,
        **(_HISTOGRAM | {"maps": (1,)}),
    ),
    OperatorCase(
        name="histogram_information",
        free={0: (0, 1, 2)},
        make=_histogram_information,
        rounding=(64,),
        leaves=(0,),
        gradient_rounding=(64,),
        **_INFORMATION,
    ),
    OperatorCase(
        name="histogram_information_backward",
        free={1: (1,)},
        make=_histogram_information_backward,
        rounding=(64,),
        **(_INFORMATION | {"maps": (1,)}),
    ),
)


# Nearest neighbours -------------------------------------------------------------------------------


def _knn_mutual_information(
    shape: Shape, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> Arguments:
    filters, samples, classes = shape
    values = torch.randn(filters, samples, generator=generator, dtype=dtype)
    if layout == "rows_apart":
        memory = values.new_full((2 * filters, samples + 7), math.nan)
        memory[::2, 3 : samples + 3] = values
        values = memory[::2, 3 : samples + 3]
    return values, torch.randint(0, classes, (samples,), generator=generator), classes, 3


MUTUAL_INFORMATION = (
    OperatorCase(
        name="knn_mutual_information",
        copied=("cuda",),
        family="mutual_information",
        make=_knn_mutual_information,
        shapes={
            "odd": (3, 61, 4),
            "small": (3, 9, 2),
            "one_filter": (1, 30, 3),
            "one_class": (2, 20, 1),
            "many_classes": (1, 50, 40),
            "empty_batch": (2, 0, 3),
            "no_filters": (0, 20, 3),
        },
        layouts=("contiguous", "rows_apart"),
        many=(7, 500, 6),
        any_shape=st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(1, 6)),
        free={0: (0,)},
        rounding=(1e6, 1e6),
        dtypes=(torch.float64,),
    ),
)

CASES: Sequence[OperatorCase] = (
    *MASKING,
    *TEMPLATES,
    *CORRELATION,
    *HISTOGRAM,
    *MUTUAL_INFORMATION,
)
