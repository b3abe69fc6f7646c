"""The gradient of ICNN's published code and its learnt beta, beside loops that follow the words."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from picnn_fast import PartTemplate
from picnn_fast.functional import published_filter_loss
from picnn_fast.layers import LearnedBeta

ALPHA = 0.5
LABELS = torch.tensor([0, 1, 2, 1, 0, 1])
CATEGORY = torch.tensor([1, 0, 1, 2])


def maps(height: int = 5, width: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return (2 * torch.rand(6, 4, height, width, generator=generator)).to(dtype)


class Published:
    """What the published code computes of a batch, one filter and image at a time."""

    def __init__(
        self, x: Tensor, labels: list[int], category: list[int], betas: list[float], norm: str
    ) -> None:
        self.images, self.filters, self.h, self.w = x.shape
        self.x = x.double().tolist()
        self.labels, self.category = labels, category
        self.betas, self.norm = betas, norm

    def positions(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.h) for j in range(self.w)]

    def centre(self, b: int, f: int) -> tuple[int, int]:
        total = sum(map(sum, self.x[b][f]))
        down = sum(i * self.x[b][f][i][j] for i, j in self.positions()) / total
        across = sum(j * self.x[b][f][i][j] for i, j in self.positions()) / total
        return math.floor(down + 0.5), math.floor(across + 0.5)

    def template(self, b: int, f: int, i: int, j: int) -> float:
        """On coordinates from -1 to 1."""
        ci, cj = self.centre(b, f)
        d = abs(i - ci) + abs(j - cj) if self.norm == "l1" else math.hypot(i - ci, j - cj)
        return max(1 - self.betas[f] * d * 2 / (max(self.h, self.w) - 1), -1)

    def response(self, b: int, f: int, of: tuple[int, int]) -> float:
        """Mean of map (b, f) times the template of another."""
        return sum(
            self.x[b][f][i][j] * self.template(*of, i, j) for i, j in self.positions()
        ) / len(self.positions())

    def mean(self, b: int, f: int) -> float:
        return sum(map(sum, self.x[b][f])) / len(self.positions())

    def strengths(self, f: int) -> list[float]:
        """Of each image, positive ones and negative ones normalised apart."""
        batch = range(self.images)
        positive = [self.labels[b] == self.category[f] for b in batch]
        s = [self.response(b, f, (b, f)) if positive[b] else -self.mean(b, f) for b in batch]
        flipped = [self.response(b, f, (self.images - 1 - b, self.filters - 1 - f)) for b in batch]
        result = [0.0] * self.images
        for kind, exponents in ((True, flipped), (False, [-self.mean(b, f) for b in batch])):
            own = [b for b in batch if positive[b] == kind]
            z = sum(math.exp(e / ALPHA) for e in exponents) / self.images
            raw = {b: math.exp(s[b] / ALPHA) * (s[b] - ALPHA * math.log(z) + ALPHA) for b in own}
            for b in own:
                result[b] = raw[b] / (sum(raw.values()) / len(own))
        return result

    def gradient(self, density: list[float]) -> Tensor:
        out = torch.zeros(self.images, self.filters, self.h, self.w, dtype=torch.float64)
        for f in range(self.filters):
            for b, strength in enumerate(self.strengths(f)):
                for i, j in self.positions():
                    if self.labels[b] == self.category[f]:
                        toward = -self.template(b, f, i, j) * 0.5 / density[f]
                    else:
                        toward = 0.5 / (1 - density[f])
                    out[b, f, i, j] = toward * strength / self.images
        return out

    def target(self, f: int) -> float:
        weighted, total = 0.0, 0.0
        for b, strength in enumerate(self.strengths(f)):
            if self.labels[b] != self.category[f]:
                continue
            ci, cj = self.centre(b, f)
            moment = sum(
                ((i - ci) ** 2 + (j - cj) ** 2) * self.x[b][f][i][j] for i, j in self.positions()
            )
            spread = math.sqrt(moment / sum(map(sum, self.x[b][f])))
            weighted, total = weighted + strength * spread, total + strength
        return min(max(3 / (weighted / total), 1.5), 3)


def gradient(x: Tensor, template: PartTemplate | None = None, **options: Any) -> Tensor:
    x = x.clone().requires_grad_()
    options = {
        "labels": LABELS,
        "filter_category": CATEGORY,
        "density": torch.tensor([0.5, 0.25, 0.5, 0.125]),
        **options,
    }
    loss = published_filter_loss(x, template or PartTemplate(beta="published"), **options)
    assert loss.shape == (x.shape[1],)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return grad


@pytest.mark.parametrize("size", [(5, 4), (3, 6)], ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_is_that_of_the_words(norm, size):
    x = maps(*size)
    direct = Published(x, LABELS.tolist(), CATEGORY.tolist(), [2.0] * 4, norm)
    want = direct.gradient([0.5, 0.25, 0.5, 0.125])
    got = gradient(x, PartTemplate(norm, beta="published"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert sum(abs(s - 1) > 0.01 for f in range(4) for s in direct.strengths(f)) > 8


def test_betas_of_filters_are_those_of_their_templates_and_of_those_they_are_paired_with():
    x, betas = maps(), [1.5, 2.0, 2.5, 3.0]
    direct = Published(x, LABELS.tolist(), CATEGORY.tolist(), betas, "l1")
    learnt = LearnedBeta(PartTemplate(), 4).double()
    learnt.value.copy_(torch.tensor(betas))
    got = gradient(x, PartTemplate(), beta=learnt(5, 4))
    torch.testing.assert_close(
        got, direct.gradient([0.5, 0.25, 0.5, 0.125]), rtol=1e-12, atol=1e-14
    )


def test_strengths_are_one_on_average_over_each_kind_of_image():
    grad = gradient(maps(), density=torch.full((4,), 0.25))
    negative = LABELS[:, None] != CATEGORY
    for f in range(4):
        of_negatives = grad[negative[:, f], f].mean((1, 2)) * 6 / (0.5 / 0.75)
        assert of_negatives.mean().item() == pytest.approx(1)
        assert (grad[negative[:, f], f] > 0).all()  # pushes down


def test_large_activations_and_empty_kinds_stay_finite():
    one_kind = {"labels": torch.ones(6, dtype=torch.int64)}
    density = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for scale in (0.0, 1e-20, 1.0, 1e4, 1e15):
        x = scale * maps(dtype=torch.float32)
        assert gradient(x).isfinite().all()
        grad = gradient(x, **one_kind, density=density)
        assert grad.isfinite().all()
        # Every image is another category's: down, all of them or those that weigh most.
        assert (grad[:, 1] >= 0).all()
        assert grad[:, 1].sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts_give_the_same(dtype, layout):
    x = maps(dtype=dtype).contiguous(memory_format=layout)
    got = gradient(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), gradient(x.double()), rtol=2e-2, atol=1e-6)


def test_it_compiles_into_one_graph_and_takes_an_empty_batch():
    torch.compiler.reset()
    options = {"filter_category": CATEGORY, "density": torch.full((4,), 0.5)}

    def call(x: Tensor, labels: Tensor) -> Tensor:
        return published_filter_loss(x, PartTemplate("l2"), labels=labels, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps(), LABELS), call(maps(), LABELS))
    empty = call(maps()[:0].requires_grad_(), LABELS[:0])
    assert empty.tolist() == [0, 0, 0, 0]
    empty.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": LABELS[:2]}, ValueError, r"labels: got shape \(2,\), want \(6,\)"),
        ({"labels": LABELS.float()}, TypeError, "labels: got dtype torch.float32"),
        ({"labels": None}, TypeError, "labels: got NoneType"),
        ({"filter_category": CATEGORY[:2]}, ValueError, r"filter_category: got shape \(2,\)"),
        ({"density": torch.ones(3)}, ValueError, r"density: got shape \(3,\), want \(4,\)"),
        ({"density": 0.5}, TypeError, "density: got float"),
        ({"beta": torch.ones(3)}, ValueError, r"beta: got shape \(3,\), want \(4,\)"),
        ({"template": "l1"}, TypeError, "template: got str, want a PartTemplate"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        gradient(maps(), **options)


def test_a_learnt_beta_moves_towards_the_published_target():
    for scale in (1.0, 4.0):  # strengths depend on it
        x, betas = scale * maps() ** 6, [1.5, 2.0, 2.5, 3.0]
        learnt = LearnedBeta(PartTemplate(), 4, rate=0.5).double()
        learnt.value.copy_(torch.tensor(betas))
        direct = Published(x, LABELS.tolist(), CATEGORY.tolist(), betas, "l1")
        targets = [direct.target(f) for f in range(4)]
        assert any(1.5 < target < 3 for target in targets)
        learnt.observe(x, LABELS, CATEGORY)
        assert learnt.value.tolist() == betas
        learnt.step()
        want = [b - 0.5 / 6 * (b - target) for b, target in zip(betas, targets, strict=True)]
        torch.testing.assert_close(learnt.value, torch.tensor(want, dtype=torch.float64))


def test_learnt_betas_stay_in_range_and_where_they_are_without_an_image():
    learnt = LearnedBeta(PartTemplate(), 3, rate=1.0)
    x = torch.ones(2, 3, 9, 9)  # spread over the map
    x[:, 1] = 0
    x[:, 1, 4, 4] = 7.0  # a single position
    labels, category = torch.tensor([0, 0]), torch.tensor([0, 0, 1])
    for _ in range(20):
        learnt.observe(x, labels, category)
        learnt.step()
    torch.testing.assert_close(learnt.value, torch.tensor([1.5, 3.0, 2.0]), rtol=0, atol=1e-3)
    learnt.observe(torch.zeros(2, 3, 9, 9), labels, category)
    before = learnt.value.clone()
    learnt.step()
    assert torch.equal(learnt.value, before)
    learnt.observe(x[:0], labels[:0], category)
    learnt.step()
    assert torch.equal(learnt.value, before)


def test_a_learnt_beta_of_a_half_model_does_not_lose_its_small_steps():
    learnt = LearnedBeta(PartTemplate(), 1).half()
    x = torch.ones(64, 1, 9, 9, dtype=torch.float16)
    for _ in range(10):
        learnt.observe(x, torch.zeros(64, dtype=torch.int64), torch.tensor([0]))
        learnt.step()
    assert learnt.value.item() == pytest.approx(1.5 + 0.5 * (1 - 0.05 / 64) ** 10, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("l1", 3), TypeError, "template: got str"),
        ((PartTemplate("l1", "uniform"), 3), ValueError, "template: got .*want a gradient"),
        ((PartTemplate(profile=torch.ones(3, 3)), 3), ValueError, "template: got .*a gradient"),
        ((PartTemplate(), 0), ValueError, "num_filters: got 0"),
        ((PartTemplate(), 3, 1.5), ValueError, r"rate: got 1.5, want a number in \(0, 1\]"),
    ],
)
def test_a_learnt_beta_of_nothing_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LearnedBeta(*arguments)
