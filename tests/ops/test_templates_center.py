"""The mask layer about the centre of mass, and with a beta for each filter: in plain PyTorch."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from picnn_fast import PartTemplate
from picnn_fast.functional import template_mask
from picnn_fast.layers import LearnedBeta, TemplateMask

TEMPLATES = {
    "l1": PartTemplate("l1", beta=1.5),
    "l2": PartTemplate("l2", beta=1.5),
    "uniform": PartTemplate("l2", "uniform"),
    "table": PartTemplate(
        profile=torch.rand(13, 13, generator=torch.Generator().manual_seed(0)) - 0.3
    ),
    "function": PartTemplate("l1", lambda distance: 1 - distance / 3),
    "published": PartTemplate(beta="published"),
}
SHAPES = [(2, 3, 5, 5), (3, 2, 4, 7), (1, 4, 6, 2), (2, 2, 1, 1)]


def maps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))
    return (x.double() ** 4).to(dtype)  # with something like peaks


def centre(x: Tensor) -> list[list[tuple[int, int]]]:
    """By a loop over maps, in Python floats."""
    result = []
    for image in x.double().tolist():
        result.append([])
        for rows in image:
            total = math.fsum(map(math.fsum, rows))
            down = math.fsum(i * value for i, row in enumerate(rows) for value in row) / total
            across = math.fsum(j * value for row in rows for j, value in enumerate(row)) / total
            result[-1].append((math.floor(down + 0.5), math.floor(across + 0.5)))
    return result


def masks(x: Tensor, template: PartTemplate, centres: list[list[tuple[int, int]]]) -> Tensor:
    h, w = x.shape[2:]
    table = template.table(h, w).double().clamp_min(0)
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, row in enumerate(centres):
        for n, (i, j) in enumerate(row):
            out[b, n] = table[h - 1 - i : 2 * h - 1 - i, w - 1 - j : 2 * w - 1 - j]
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TEMPLATES)
def test_maps_are_masked_about_their_centre_of_mass(name, shape):
    x = maps(*shape)
    masked, peak = template_mask(x, TEMPLATES[name], center="mass", scale=2.0)
    centres = centre(x)
    torch.testing.assert_close(
        masked, 2 * x * masks(x, TEMPLATES[name], centres), rtol=1e-6, atol=1e-6
    )
    assert peak.dtype == torch.int64
    want = [[i * shape[3] + j for i, j in row] for row in centres]
    assert peak.tolist() == want
    assert torch.equal(TemplateMask(TEMPLATES[name], center="mass", scale=2.0)(x), masked)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_and_layouts_are_kept_and_sums_are_wide(dtype, layout):
    x = maps(2, 3, 6, 5, dtype=dtype).contiguous(memory_format=layout)
    masked, peak = template_mask(x, PartTemplate("l2"), center="mass")
    assert masked.dtype == dtype
    assert masked.stride() == x.stride()
    assert peak.tolist() == [[i * 5 + j for i, j in row] for row in centre(x)]
    want = x.double() * masks(x, PartTemplate("l2"), centre(x))
    torch.testing.assert_close(masked.double(), want, rtol=1e-2, atol=1e-6)
    # A sum of 10,000 in half precision would stop at 2048 and put the centre too early.
    wide = torch.ones(1, 1, 100, 100, dtype=dtype).contiguous(memory_format=layout)
    assert template_mask(wide, PartTemplate(), center="mass")[1].item() == 50 * 100 + 50


def test_the_middle_of_two_peaks_is_masked_where_the_first_would_be():
    x = torch.zeros(1, 1, 1, 9)
    x[..., 0], x[..., 6] = 2.0, 2.0
    assert template_mask(x, PartTemplate())[1].item() == 0
    masked, peak = template_mask(x, PartTemplate("l1", beta=1.0), center="mass")
    assert peak.item() == 3
    torch.testing.assert_close(masked[0, 0, 0], x[0, 0, 0] * (1 - 3 / 9))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_a_constant_in_every_derivative(name):
    x = maps(2, 3, 4, 5).requires_grad_()
    mask = masks(x, TEMPLATES[name], centre(x.detach()))
    weight = torch.arange(float(x.numel()), dtype=torch.float64).view_as(x)
    masked, peak = template_mask(x, TEMPLATES[name], center="mass")
    (grad,) = torch.autograd.grad((masked * weight).sum(), x)
    torch.testing.assert_close(grad, weight * mask, rtol=1e-6, atol=1e-6)
    assert not peak.requires_grad

    def call(x: Tensor) -> Tensor:
        return template_mask(x, TEMPLATES[name], center="mass")[0]

    small = maps(1, 2, 3, 3).requires_grad_()
    assert gradcheck(call, small)
    assert gradgradcheck(call, small)


def test_gradients_of_each_sample_by_transforms():
    x = maps(3, 2, 4, 4)

    def total(x: Tensor) -> Tensor:
        return template_mask(x[None], PartTemplate(), center="mass")[0].square().sum()

    got = torch.func.vmap(torch.func.grad(total))(x)
    want = torch.stack([torch.func.grad(total)(image) for image in x])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_compiles_into_one_graph(name):
    torch.compiler.reset()
    x = maps(2, 3, 4, 5).requires_grad_()
    beta = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) if name == "l2" else None

    def call(x: Tensor) -> Tensor:
        return template_mask(x, TEMPLATES[name], center="mass", beta=beta)[0].square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(x), call(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("center", ["argmax", "mass"])
def test_empty_maps_are_taken(shape, center):
    beta = torch.ones(shape[1])
    for options in ({}, {"beta": beta}):
        masked, peak = template_mask(torch.ones(shape), PartTemplate(), center=center, **options)
        assert masked.shape == shape
        assert peak.shape == shape[:2]
        assert peak.dtype == torch.int64


def test_maps_of_zeros_stay_so_and_nan_does_not_spread_to_other_maps():
    x = maps(2, 2, 3, 3)
    x[0, 0], x[1, 1, 2, 2] = 0.0, math.nan
    masked, peak = template_mask(x, PartTemplate(), center="mass")
    assert (masked[0, 0] == 0).all()
    assert peak[0, 0] == peak[1, 1] == 0
    assert masked[1, 1, 2, 2].isnan()
    assert masked[[0, 1], [1, 0]].isfinite().all()


@pytest.mark.parametrize("center", ["argmax", "mass"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_beta_for_each_filter_is_that_of_a_template_each(norm, center):
    x = maps(2, 3, 6, 4)
    betas = torch.tensor([1.0, 3.5, 8.0])
    masked, peak = template_mask(x, PartTemplate(norm), center=center, beta=betas)
    for n, beta in enumerate(betas.tolist()):
        own = template_mask(x[:, n : n + 1], PartTemplate(norm, beta=beta), center=center)
        torch.testing.assert_close((masked[:, n : n + 1], peak[:, n : n + 1]), own)


def test_the_published_beta_is_the_texts_on_coordinates_from_minus_one_to_one():
    for h, w in ((7, 7), (5, 14)):
        n = max(h, w)
        position = torch.linspace(-1, 1, n, dtype=torch.float64)
        table = PartTemplate(beta="published").table(h, w)
        for di in range(h):
            for dj in range(w):
                away = (position[di] - position[0]) + (position[dj] - position[0])
                want = max(1 - 2 * away.item(), -1)
                assert table[h - 1 + di, w - 1 + dj].item() == pytest.approx(want, abs=1e-6)
        # Where learning begins.
        start = LearnedBeta(PartTemplate(), 1)(h, w).item()
        torch.testing.assert_close(PartTemplate(beta=start).table(h, w), table)
    assert PartTemplate(beta="published").table(1, 1).item() == 1
    assert repr(PartTemplate(beta="published")) == (
        "PartTemplate(norm='l1', profile='gradient', beta='published')"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"center": "median"}, ValueError, "center: got 'median', want one of 'argmax', 'mass'"),
        ({"beta": torch.ones(2)}, ValueError, r"beta: got shape \(2,\), want \(3,\)"),
        ({"beta": [1.0]}, TypeError, "beta: got list, want a torch.Tensor"),
        ({"beta": torch.ones(3, dtype=torch.int64)}, TypeError, "beta: got dtype torch.int64"),
        (
            {"beta": torch.ones(3), "template": PartTemplate("l1", "uniform")},
            ValueError,
            "beta: got a tensor with PartTemplate.*want a gradient template",
        ),
        (
            {"beta": torch.ones(3), "template": TEMPLATES["table"]},
            ValueError,
            "beta: got a tensor with PartTemplate.*want a gradient template",
        ),
    ],
)
def test_bad_centres_and_betas_are_refused_by_name(options, error, message):
    arguments = {"template": PartTemplate(), **options}
    with pytest.raises(error, match=f"^{message}"):
        template_mask(maps(2, 3, 4, 4), **arguments)


def test_published_is_no_beta_of_a_uniform_template():
    with pytest.raises(
        TypeError, match="beta: got 'published' with profile 'uniform', want a number > 0"
    ):
        PartTemplate(profile="uniform", beta="published")


def test_a_layer_shows_its_centre():
    assert "scale=1.0, center='mass'" in repr(TemplateMask(PartTemplate(), center="mass"))
    with pytest.raises(ValueError, match="center: got 'middle'"):
        TemplateMask(PartTemplate(), center="middle")
