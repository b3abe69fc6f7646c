"""The reference's templates and masks against the paper's text in plain Python."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast import PartTemplate
from picnn_fast.reference import templates


def template_at(
    mu: tuple[int, int], height: int, width: int, *, norm: str, beta: float
) -> list[list[float]]:
    """T_mu / tau of ICNN, section 3, at every position."""
    n = max(height, width)

    def distance(i: int, j: int) -> float:
        di, dj = abs(i - mu[0]), abs(j - mu[1])
        return di + dj if norm == "l1" else math.sqrt(di * di + dj * dj)

    return [[max(1 - beta * distance(i, j) / n, -1) for j in range(width)] for i in range(height)]


def first_peak(rows: list[list[float]]) -> tuple[int, int]:
    """The first maximum in row-major order, NaN above all else."""
    best, peak = -math.inf, (0, 0)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if math.isnan(value):
                return i, j
            if value > best:
                best, peak = value, (i, j)
    return peak


sides = st.integers(1, 9)
norms = st.sampled_from(["l1", "l2"])
values = st.floats(-8, 8, width=16)


@given(sides, sides, norms, st.sampled_from([0.5, 2.0, 4.0]))
def test_the_matrix_of_templates_holds_each_of_them(height, width, norm, beta):
    template = PartTemplate(norm, beta=beta)
    offsets = template.offsets_for(height, width, torch.empty(0, dtype=torch.float64))
    matrix = templates.template_matrix(offsets, height, width)
    assert matrix.shape == (height * width, height * width)
    for mu in range(height * width):
        want = template_at(divmod(mu, width), height, width, norm=norm, beta=beta)
        torch.testing.assert_close(
            matrix[mu].view(height, width), torch.tensor(want, dtype=torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_values_are_rounded_correctly_whatever_pytorchs_square_root_does(norm, dtype, monkeypatch):
    """On some processors it is that of a library which is a unit in the last place off."""

    def off(root):
        return lambda x: torch.nextafter(root(x), torch.full_like(x, math.inf))

    for owner in (torch, torch.Tensor):
        monkeypatch.setattr(owner, "sqrt", off(owner.sqrt))
    height, width, beta = 31, 23, 1.7
    template = PartTemplate(norm, beta=beta)
    got = template.offsets_for(height, width, torch.empty(0, dtype=dtype))
    number = np.float64 if dtype == torch.float64 else np.float32

    def value(di, dj):
        # Rounding a double's square root to float32 is right for integers as small as these.
        distance = abs(di) + abs(dj) if norm == "l1" else math.sqrt(di * di + dj * dj)
        return max(number(1) - number(beta / max(height, width)) * number(distance), number(-1))

    want = [[value(i, j) for j in range(1 - width, width)] for i in range(1 - height, height)]
    assert got.dtype == dtype
    assert np.array_equal(got.numpy(), np.array(want))
    if dtype == torch.float32:
        assert torch.equal(template.table(height, width), got)


def test_a_function_takes_distances_that_are_rounded_correctly(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: x * math.nan)
    seen = []

    def profile(distance):
        seen.append(distance)
        return 1 - distance

    PartTemplate("l2", profile).table(9, 5)
    want = [[math.hypot(i, j) for j in range(-4, 5)] for i in range(-8, 9)]
    assert seen[0].dtype == torch.float64
    torch.testing.assert_close(seen[0], torch.tensor(want, dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_table_is_read_at_the_offset_from_the_peak():
    height, width = 3, 4
    table = torch.arange(5.0 * 7).view(5, 7)
    matrix = templates.template_matrix(table, height, width)
    for mu in range(12):
        for position in range(12):
            di = position // width - mu // width
            dj = position % width - mu % width
            assert matrix[mu, position] == table[di + height - 1, dj + width - 1]


@given(st.data(), sides, sides, norms, st.sampled_from([1.5, 4.0]), st.sampled_from([1.0, 0.25]))
def test_a_map_is_multiplied_by_the_positive_part_at_its_peak(
    data, height, width, norm, beta, scale
):
    rows = data.draw(
        st.lists(st.lists(values, min_size=width, max_size=width), min_size=height, max_size=height)
    )
    x = torch.tensor(rows, dtype=torch.float64).view(1, 1, height, width)
    offsets = PartTemplate(norm, beta=beta).offsets_for(height, width, x)
    masked, peak = templates.template_mask(x, offsets, scale)
    mu = first_peak(rows)
    assert divmod(peak.item(), width) == mu
    template = template_at(mu, height, width, norm=norm, beta=beta)
    want = [
        [value * scale * max(t, 0) for value, t in zip(row, line, strict=True)]
        for row, line in zip(rows, template, strict=True)
    ]
    torch.testing.assert_close(masked[0, 0], torch.tensor(want, dtype=torch.float64))
    back = templates.template_mask_backward(x, peak, offsets, scale)
    assert torch.equal(back, masked)


def test_the_peak_is_the_first_maximum_and_nan_is_above_all():
    nan, inf = math.nan, math.inf
    for rows in (
        [[1.0, 3.0], [3.0, 2.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[-inf, -inf], [-inf, -inf]],
        [[inf, 1.0], [nan, nan]],
        [[-inf, 1.0], [inf, inf]],
    ):
        x = torch.tensor(rows).view(1, 1, 2, 2)
        peak = templates.map_peaks(x)
        assert divmod(peak.item(), 2) == first_peak(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_keep_type_and_layout(dtype):
    x = torch.rand(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    masked, peak = templates.template_mask(x, PartTemplate().offsets_for(4, 5, x), 1.0)
    assert masked.dtype == dtype
    assert masked.stride() == x.stride()
    assert (peak.dtype, peak.shape) == (torch.int64, (2, 3))


def centre_counted_from_one(rows: list[list[float]]) -> tuple[int, int]:
    """As the published code counts: from 1, halves away from zero, at least 1; then from 0."""
    h, w = len(rows), len(rows[0])
    total = sum(Fraction(value) for row in rows for value in row)
    if total == 0:
        return 0, 0
    down = sum((i + 1) * Fraction(rows[i][j]) for i in range(h) for j in range(w)) / total
    across = sum((j + 1) * Fraction(rows[i][j]) for i in range(h) for j in range(w)) / total
    i, j = (
        math.floor(place + Fraction(1, 2)) if place >= 0 else math.ceil(place - Fraction(1, 2))
        for place in (down, across)
    )
    return min(max(i, 1), h) - 1, min(max(j, 1), w) - 1


@given(st.data(), sides, sides, st.booleans())
def test_the_centre_of_mass_is_rounded_as_in_the_published_code(data, height, width, positive):
    drawn = st.floats(0, 8, width=16) if positive else values
    rows = data.draw(
        st.lists(st.lists(drawn, min_size=width, max_size=width), min_size=height, max_size=height)
    )
    x = torch.tensor(rows, dtype=torch.float64).view(1, 1, height, width)
    got = divmod(templates.centre_of_mass(x).item(), width)
    total = sum(Fraction(value) for row in rows for value in row)
    if total == 0 and any(value for row in rows for value in row):
        # Signs that cancel have no centre: anywhere on the map will do.
        assert 0 <= got[0] < height
        assert 0 <= got[1] < width
    else:
        assert got == centre_counted_from_one(rows)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ([1.0, 1.0], 1),  # 0.5 goes up, to 1
        ([0.0, 1.0, 1.0], 2),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3),
        ([3.0, 1.0], 0),
        ([0.0, 0.0, 0.0], 0),
        ([-1.0, -1.0], 1),
        ([-1.0, 0.0, 2.0], 2),  # 4 lies beyond
        ([2.0, 0.0, -1.0], 0),  # -2 as well
        ([1.0, 0.0, -1.0], 0),  # -inf
        ([-1.0, 0.0, 1.0], 2),
        ([0.0, math.nan, 1.0], 0),
        ([0.0, 1.0, math.inf], 0),
        ([0.0, 3e38, 3e38], 0),  # their sum is infinite in single precision
    ],
)
def test_halves_go_up_and_what_has_no_centre_is_put_at_the_first_position(row, column):
    x = torch.tensor(row)
    assert templates.centre_of_mass(x.view(1, 1, 1, -1)).item() == column
    assert templates.centre_of_mass(x.view(1, 1, -1, 1)).item() == column


@pytest.mark.parametrize("norm", [1, 2])
def test_tables_by_slope_are_those_of_each_template(norm):
    slopes = torch.tensor([0.1, 0.5, 1.3], dtype=torch.float64)
    got = templates.gradient_tables(slopes, norm, 5, 3)
    for table, slope in zip(got, slopes.tolist(), strict=True):
        want = templates.gradient_offsets(5, 3, norm, slope, torch.float64, torch.device("cpu"))
        torch.testing.assert_close(table, want)


def test_the_spread_is_the_root_of_the_mean_square_distance_from_the_centre():
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 2] = 0
    centre = torch.tensor([[0, 7, 19], [3, 11, 5]])
    got = templates.spread_about(x, centre)
    for b in range(2):
        for n in range(3):
            ci, cj = divmod(centre[b, n].item(), 5)
            pairs = [(i, j) for i in range(4) for j in range(5)]
            total = sum(x[b, n, i, j].item() for i, j in pairs)
            moment = sum(((i - ci) ** 2 + (j - cj) ** 2) * x[b, n, i, j].item() for i, j in pairs)
            if total == 0:
                assert got[b, n].isnan()
            else:
                assert got[b, n].item() == pytest.approx(math.sqrt(moment / total))
