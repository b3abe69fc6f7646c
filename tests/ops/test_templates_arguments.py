"""Template family at the door: what a template may be, and what is refused, by name."""

import copy
import dataclasses
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from picnn_fast import PartTemplate
from picnn_fast.functional import template_mask
from tests.ops.cases import Recorder

nan, inf = math.nan, math.inf

# what a PartTemplate is made of, the exception, the argument at fault, the rest of the message
BAD_TEMPLATES = [
    ({"norm": "l3"}, ValueError, "norm", "got 'l3', want one of 'l1', 'l2'"),
    ({"norm": 1}, ValueError, "norm", "got 1, want one of"),
    ({"profile": "flat"}, ValueError, "profile", "got 'flat', want one of"),
    ({"profile": 3}, TypeError, "profile", "got int, want 'gradient', 'uniform', a function"),
    ({"profile": torch.ones(3)}, ValueError, "profile", r"got a tensor of shape \(3,\)"),
    ({"profile": torch.ones(3, 4)}, ValueError, "profile", r"shape \(3, 4\).*two odd sides"),
    ({"profile": torch.ones(0, 3)}, ValueError, "profile", r"shape \(0, 3\).*two odd sides"),
    ({"profile": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "profile", "int64, want one of"),
    ({"gamma": 2.0}, ValueError, "gamma", "got 2.0, want None: .*'uniform'"),
    ({"profile": torch.ones(3, 3), "beta": 2.0}, ValueError, "beta", "want None: .*'gradient'"),
    ({"profile": torch.cos, "beta": 2.0}, ValueError, "beta", "want None"),
    ({"profile": torch.cos, "gamma": 2.0}, ValueError, "gamma", "want None"),
    *[
        (options | {name: value}, error, name, message)
        for options, name in (({}, "beta"), ({"profile": "uniform"}, "gamma"), ({}, "tau"))
        for value, error, message in (
            (0.0, ValueError, "got 0.0, want a number > 0"),
            (-1.0, ValueError, "got -1.0, want a number > 0"),
            (nan, ValueError, "got nan, want a number > 0"),
            (inf, ValueError, "got inf, want a number > 0"),
            ("4", TypeError, "got str, want a number"),
            (True, TypeError, "got bool, want a number"),
        )
    ],
]


@pytest.mark.parametrize(("options", "error", "name", "message"), BAD_TEMPLATES)
def test_templates_that_are_none_are_refused_by_name(options, error, name, message):
    with pytest.raises(error) as caught:
        PartTemplate(**options)
    assert re.search(rf"^{name}: .*{message}", str(caught.value), re.DOTALL), str(caught.value)


def of_nothing(distance: Tensor) -> None:
    del distance


# what to change of a good call, the exception, the argument at fault, the rest of the message
BAD_CALLS = [
    ({"x": [[1.0]]}, TypeError, "x", "got list, want a torch.Tensor"),
    ({"x": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "x", "got dtype torch.int32"),
    ({"x": torch.ones(2, 3, 4, 4).to_sparse()}, TypeError, "x", "sparse.*want torch.strided"),
    ({"x": torch.ones(2, 3, 4)}, ValueError, "x", r"got shape \(2, 3, 4\), want maps"),
    ({"x": torch.ones(2, 3, 4, 4, 4)}, ValueError, "x", r"got shape \(2, 3, 4, 4, 4\), want maps"),
    ({"x": torch.ones(2, 3, 0, 4)}, ValueError, "x", "got maps with h = 0, want 1 to 32768"),
    ({"x": torch.ones(2, 3, 4, 0)}, ValueError, "x", "got maps with w = 0, want 1 to 32768"),
    ({"x": torch.ones(0, 3, 4, 32769)}, ValueError, "x", "got maps with w = 32769"),
    ({"template": "l1"}, TypeError, "template", "got str, want a PartTemplate"),
    ({"template": None}, TypeError, "template", "got NoneType, want a PartTemplate"),
    (
        {"template": PartTemplate(profile=torch.ones(7, 7))},
        ValueError,
        "template",
        r"got a table of shape \(7, 7\), want at least \(7, 9\) for maps 4 x 5",
    ),
    (
        {"template": PartTemplate(profile=torch.full((7, 9), nan))},
        ValueError,
        "profile",
        "got values that are not finite",
    ),
    (
        {"template": PartTemplate(profile=lambda d: 1 / d)},
        ValueError,
        "profile",
        "got values that are not finite",
    ),
    (
        {"template": PartTemplate(profile=of_nothing)},
        ValueError,
        "profile",
        r"got NoneType from the function, want a tensor of .*\(7, 9\)",
    ),
    (
        {"template": PartTemplate(profile=lambda d: d.flatten())},
        ValueError,
        "profile",
        r"got \(63,\) from the function",
    ),
    ({"scale": 0.0}, ValueError, "scale", "got 0.0, want a number > 0"),
    ({"scale": nan}, ValueError, "scale", "got nan, want a number > 0"),
    ({"scale": "beta"}, ValueError, "scale", "got 'beta', want one of 'tau'"),
    ({"scale": True}, TypeError, "scale", "got bool, want a number"),
    ({"scale": None}, TypeError, "scale", "got NoneType, want a number"),
]


@pytest.mark.parametrize(("change", "error", "name", "message"), BAD_CALLS)
def test_bad_arguments_are_refused_by_name_before_anything_runs(change, error, name, message):
    arguments = {"x": torch.ones(2, 3, 4, 5), "template": PartTemplate(), "scale": 1.0} | change
    with Recorder() as recorder, pytest.raises(error) as caught:
        template_mask(**arguments)
    assert re.search(rf"^{name}: .*{message}", str(caught.value), re.DOTALL), str(caught.value)
    assert recorder.names == []


def test_the_unchanged_arguments_of_these_tests_are_good():
    with Recorder() as recorder:
        template_mask(torch.ones(2, 3, 4, 5), PartTemplate(), scale=1.0)
    assert recorder.names


def test_the_table_of_a_template_is_refused_for_maps_that_are_none():
    with pytest.raises(ValueError, match="x: got maps with h = 0"):
        PartTemplate().table(0, 3)


def test_a_larger_table_serves_smaller_maps_from_its_middle():
    whole = torch.randn(11, 15, generator=torch.Generator().manual_seed(0))
    template = PartTemplate(profile=whole)
    assert torch.equal(template.table(6, 8), whole)
    assert torch.equal(template.table(2, 3), whole[4:7, 5:10])
    x = torch.rand(2, 3, 2, 3)
    got = template_mask(x, template)
    want = template_mask(x, PartTemplate(profile=whole[4:7, 5:10].double()))
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


def test_a_function_gets_the_distances_and_a_tensor_of_them_gives_the_same():
    seen = []

    def profile(distance: Tensor) -> Tensor:
        seen.append(distance)
        return 1 - distance / 3

    for norm, far in (("l1", 5.0), ("l2", 13**0.5)):
        template = PartTemplate(norm, profile)
        table = template.table(3, 4)
        distance = seen.pop()
        assert distance.dtype == torch.float64
        assert distance[2, 3] == 0
        assert distance[0, 0] == distance[4, 6] == pytest.approx(far)
        torch.testing.assert_close(table.double(), 1 - distance / 3)
        assert torch.equal(PartTemplate(profile=table).table(3, 4), table)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(["l1", "l2"]),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 7.5]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_tables_are_the_formulas_of_the_paper(height, width, norm, beta, gamma):
    n = max(height, width)
    gradient = PartTemplate(norm, beta=beta).table(height, width)
    uniform = PartTemplate(norm, "uniform", beta=beta, gamma=gamma).table(height, width)
    for di in range(1 - height, height):
        for dj in range(1 - width, width):
            distance = abs(di) + abs(dj) if norm == "l1" else math.hypot(di, dj)
            at = di + height - 1, dj + width - 1
            want = max(1 - beta * distance / n, -1)
            assert gradient[at].item() == pytest.approx(want, abs=1e-5)
            if abs(beta * distance / n - gamma) > 1e-9:  # no rounding decides
                assert uniform[at].item() == (1 if beta * distance / n < gamma else -1)


def test_a_uniform_template_is_decided_without_rounding():
    """At d·beta / n = gamma exactly, however it rounds: not less, so -1."""
    for n in (3, 7, 14, 49):
        for d in range(1, n):
            template = PartTemplate("l1", "uniform", beta=float(n), gamma=float(d))
            row = template.table(1, n)[0]
            assert row[n - 1 + d] == -1
            assert row[n - 2 + d] == 1


def test_defaults_are_those_of_the_papers():
    torch.testing.assert_close(PartTemplate().table(5, 8), PartTemplate("l1", beta=4.0).table(5, 8))
    uniform = PartTemplate("l2", "uniform")
    assert torch.equal(
        uniform.table(5, 8), PartTemplate("l2", "uniform", beta=2.0, gamma=2.0).table(5, 8)
    )
    assert PartTemplate().tau_for(5, 8) == 0.5 / 64
    assert PartTemplate(tau=0.3).tau_for(5, 8) == 0.3


def test_a_template_of_each_kind_is_made_by_its_own_function():
    values = torch.rand(5, 7) - 0.5
    for made, same in (
        (PartTemplate.gradient("l2", beta=3.0, tau=0.1), PartTemplate("l2", beta=3.0, tau=0.1)),
        (PartTemplate.gradient(beta="published"), PartTemplate(beta="published")),
        (
            PartTemplate.uniform("l1", beta=3.0, gamma=1.0),
            PartTemplate("l1", "uniform", beta=3.0, gamma=1.0),
        ),
        (PartTemplate.radial(torch.cos, "l2", tau=0.2), PartTemplate("l2", torch.cos, tau=0.2)),
        (PartTemplate.offsets(values, tau=0.3), PartTemplate(profile=values, tau=0.3)),
    ):
        assert torch.equal(made.table(3, 4), same.table(3, 4))
        assert made.tau_for(3, 4) == same.tau_for(3, 4)
    with pytest.raises(TypeError, match="function: got str, want a function of the distance"):
        PartTemplate.radial("gradient")
    with pytest.raises(TypeError, match=r"values: got list, want a torch\.Tensor"):
        PartTemplate.offsets([[1.0]])
    with pytest.raises(ValueError, match=r"values: got a tensor of shape \(2, 3\), want"):
        PartTemplate.offsets(torch.ones(2, 3))


def test_values_are_made_once_a_size_type_and_device_and_stay_with_the_template():
    calls = []

    def profile(distance: Tensor) -> Tensor:
        calls.append(distance.shape)
        return 1 - distance

    template = PartTemplate.radial(profile)
    x = torch.rand(1, 2, 3, 4)
    with torch.inference_mode():  # what is made here is saved for a backward pass later
        first = template_mask(x, template)[0]
    leaf = x.clone().requires_grad_()
    template_mask(leaf, template)[0].square().sum().backward()
    assert torch.equal(template_mask(x, template)[0], first)
    assert calls == [(5, 7)]
    template_mask(x.double(), template)
    template_mask(x[..., :2], template)
    assert calls == [(5, 7), (5, 7), (5, 3)]
    template.table(3, 4).fill_(0)  # a copy
    assert torch.equal(template_mask(x, template)[0], first)
    for count in range(1, 40):
        template_mask(torch.ones(1, 1, 1, count), template)
    assert len(template.__dict__["_kept"]) <= 16


def test_copies_and_pickles_make_values_of_their_own():
    template = PartTemplate.gradient("l2", beta=1.5)
    table = template.table(4, 5)
    for other in (
        copy.deepcopy(template),
        copy.copy(template),
        pickle.loads(pickle.dumps(template)),
        dataclasses.replace(template, tau=0.5),
    ):
        assert "_kept" not in other.__dict__
        assert torch.equal(other.table(4, 5), table)


def test_offsets_that_are_changed_in_place_are_seen():
    values = torch.ones(3, 5)
    template = PartTemplate.offsets(values)
    x = torch.rand(1, 1, 2, 3)
    before = template_mask(x, template)[0]
    values[1, 2] = 3
    after = template_mask(x, template)[0]
    assert torch.equal(before, x)
    torch.testing.assert_close(after.amax(), 3 * x.amax())


@pytest.mark.parametrize("name", ["gradient", "uniform", "radial", "offsets"])
def test_what_is_made_while_tracing_or_in_a_transform_does_not_outlive_it(name):
    values = torch.rand(5, 7) - 0.3
    template = {
        "gradient": PartTemplate.gradient("l2"),
        "uniform": PartTemplate.uniform(),
        "radial": PartTemplate.radial(lambda d: 1 - d / 2),
        "offsets": PartTemplate.offsets(values),
    }[name]
    x = torch.rand(2, 2, 3, 4)

    def total(x: Tensor) -> Tensor:
        return template_mask(x, template)[0].square().sum()

    gradient = torch.func.grad(total)(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert template_mask(mode.from_tensor(x), template)[0].shape == x.shape
    traced = make_fx(lambda x: template_mask(x, template)[0])(x)
    masked = template_mask(x, template)[0]
    torch.testing.assert_close(traced(x), masked)
    torch.testing.assert_close(torch.func.grad(total)(x), gradient)
    torch.testing.assert_close(gradient.ne(0), masked.ne(0))


def test_a_template_cannot_be_changed():
    template = PartTemplate()
    with pytest.raises(AttributeError):
        template.norm = "l2"


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (1, 1, 1, 1)], ids=str)
def test_empty_and_least_maps_are_taken(shape):
    masked, peak = template_mask(torch.ones(shape), PartTemplate())
    assert masked.shape == shape
    assert peak.shape == shape[:2]
    assert peak.dtype == torch.int64


def test_maps_are_left_as_they_were():
    x = torch.randn(2, 3, 4, 5)
    before = x.clone()
    template_mask(x, PartTemplate())
    assert torch.equal(x, before)
