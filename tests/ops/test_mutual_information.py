"""Mutual information: against scikit-learn, in corner cases, and what is refused."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from picnn_fast.functional import (
    mutual_information,
    mutual_information_score,
    soft_histogram_mutual_information,
)
from picnn_fast.ops import mutual_information as family
from picnn_fast.reference import histogram as histogram_reference
from tests.conftest import Backend
from tests.ops.cases import Recorder

ESTIMATORS = ("knn", "histogram", "soft_histogram")


def sample(
    samples: int = 60, filters: int = 5, classes: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Pooled activations, many exactly 0 as after a ReLU, that tell classes more or less."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    activations = torch.randn(samples, filters, generator=generator)
    activations += 2 * torch.nn.functional.one_hot(labels % filters, filters)
    return activations.relu(), labels


def scikit_learn(
    activations: Tensor, labels: Tensor, num_classes: int, target: str = "class", **options: Any
) -> Tensor:
    x = activations.double().numpy()
    options = {"discrete_features": False, "random_state": 0} | options
    if target == "label":
        return torch.from_numpy(mutual_info_classif(x, labels.numpy(), **options)).double()
    rows = [mutual_info_classif(x, (labels == c).numpy(), **options) for c in range(num_classes)]
    return torch.from_numpy(np.stack(rows)).double()  # all 0: integers


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", ["class", "label"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_knn_is_scikit_learns(dtype: torch.dtype, target: str) -> None:
    activations, labels = sample()
    activations = activations.to(dtype)
    for options in ({}, {"random_state": 2**32 - 1, "n_neighbors": 7}):
        got = mutual_information(activations, labels, 3, target=target, **options)
        assert got.dtype == torch.float64
        close(got, scikit_learn(activations, labels, 3, target, **options))


@pytest.mark.parametrize("layout", ["columns", "strided", "integers"])
def test_knn_takes_any_strides_and_any_integers(layout: str) -> None:
    activations, labels = sample()
    expected = scikit_learn(activations, labels, 3)
    if layout == "columns":
        activations = activations.T.contiguous().T
    elif layout == "strided":
        activations = activations.repeat_interleave(2, 1)[:, ::2]
    else:
        labels = labels.to(torch.uint8)
    close(mutual_information(activations, labels, 3), expected)


def test_knn_takes_any_number_of_neighbours() -> None:
    activations, labels = sample()
    expected = scikit_learn(activations, labels, 3, n_neighbors=60)
    for n_neighbors in (60, 2**31, 2**80):
        close(mutual_information(activations, labels, 3, n_neighbors=n_neighbors), expected)


def corner(name: str) -> tuple[Tensor, Tensor, int]:
    """Activations, labels and number of classes of a named corner case."""
    activations, labels = sample()
    if name == "constant columns":
        return torch.tensor([0.0, 1.0, 1e6, -1e-30]).expand(60, 4), labels, 3
    if name == "mostly zero columns":
        activations[3:] = 0
        return activations, labels, 3
    if name == "a class with one sample":
        labels[labels == 2] = 1
        labels[7] = 2
        return activations, labels, 3
    if name == "a class with none":
        return activations, labels, 5
    if name == "fewer samples than neighbours":
        return activations[:6], torch.tensor([0, 0, 1, 1, 2, 2]), 3
    if name == "all samples of one class":
        return activations, torch.zeros_like(labels), 1
    if name == "duplicates":
        return (activations * 4).round() / 4, labels, 3
    if name == "duplicates beyond the noise":
        return (1e9 + activations.double()).round(), labels, 3
    assert name == "two samples of one class"
    return activations[:2], torch.zeros(2, dtype=torch.int64), 2


CORNERS = (
    "constant columns",
    "mostly zero columns",
    "a class with one sample",
    "a class with none",
    "fewer samples than neighbours",
    "all samples of one class",
    "duplicates",
    "duplicates beyond the noise",
    "two samples of one class",
)


@pytest.mark.parametrize("target", ["class", "label"])
@pytest.mark.parametrize("name", CORNERS)
def test_knn_does_as_scikit_learn_in_corner_cases(name: str, target: str) -> None:
    activations, labels, classes = corner(name)
    got = mutual_information(activations, labels, classes, target=target)
    close(got, scikit_learn(activations, labels, classes, target))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", CORNERS)
def test_corner_cases_are_finite_by_every_estimator(name: str, estimator: str) -> None:
    activations, labels, classes = corner(name)
    got = mutual_information(activations, labels, classes, estimator=estimator)
    assert got.shape == (classes, activations.shape[1])
    assert (got > -1e-6).all()
    assert (got < math.log(2) + 1e-6).all()
    if name in ("all samples of one class", "two samples of one class"):
        assert (got.abs() < 1e-6).all()
    if name == "constant columns" and estimator != "knn":
        assert (got.abs() < 1e-6).all()
    if name == "a class with none":
        assert (got[3:].abs() < 1e-6).all()


def test_histograms_take_one_sample_and_know_nothing() -> None:
    activations, labels = sample()
    for estimator in ESTIMATORS[1:]:
        got = mutual_information(activations[:1], labels[:1], 3, estimator=estimator)
        torch.testing.assert_close(got, torch.zeros_like(got))


def test_histogram_is_the_plug_in_estimate() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    activations = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 2.0, 3.0, 3.0])[:, None]
    # p(x, y): bin 0 holds 2 of class 0; bin 1, 2 and 1; bin 2, 1 of class 1; bin 3, 2 of class 1.
    expected = sum(
        n / 8 * math.log((n / 8) / (x / 8 * 0.5))
        for n, x in [(2, 2), (2, 3), (1, 3), (1, 1), (2, 2)]
    )
    got = mutual_information(activations, labels, 2, estimator="histogram", bins=4)
    close(got, torch.full((2, 1), expected, dtype=torch.float64))
    label = mutual_information(
        activations, labels, 2, estimator="histogram", bins=4, target="label"
    )
    close(label, got[0])
    corrected = mutual_information(
        activations, labels, 2, estimator="histogram", bins=4, bias_correction="miller_madow"
    )
    close(corrected, got + (4 + 2 - 5 - 1) / 16)
    soft = mutual_information(activations, labels, 2, estimator="soft_histogram", bins=4)
    assert soft.dtype == torch.float32  # samples on the bin centres 0, 1, 2, 3: the same counts
    torch.testing.assert_close(soft.double(), got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_filter_that_separates_the_classes_tells_the_entropies(estimator: str) -> None:
    labels = torch.arange(3000) % 3
    noise = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    activations = noise + 10 * labels[:, None] * torch.tensor([1.0, 0.0])
    entropy = math.log(3) / 3 + 2 / 3 * math.log(3 / 2)
    got = mutual_information(activations, labels, 3, estimator=estimator)
    torch.testing.assert_close(
        got[:, 0].double(), torch.full((3,), entropy).double(), atol=0.02, rtol=0
    )
    assert (got[:, 1] < 0.03).all()
    joint = mutual_information(activations, labels, 3, estimator=estimator, target="label")
    assert joint[0].item() == pytest.approx(math.log(3), abs=0.02)
    assert joint[1] < 0.05


def within_fixed_ends() -> tuple[Tensor, Tensor, Tensor]:
    """Activations in double precision, two more that set their range, and the labels of all."""
    activations, labels = sample()
    ends = torch.tensor([[-1.0], [9.0]], dtype=torch.float64).expand(2, activations.shape[1])
    return activations.double(), ends, torch.cat([labels, labels[:2]])


def test_a_step_along_the_soft_gradient_gains_what_it_says() -> None:
    activations, ends, labels = within_fixed_ends()

    def information(activations: Tensor) -> Tensor:
        x = torch.cat([activations, ends])
        return mutual_information(x, labels, 3, estimator="soft_histogram", bins=8).sum()

    before = information(activations.requires_grad_())
    (gradient,) = torch.autograd.grad(before, activations)
    step = 1e-6
    gain = (information(activations + step * gradient) - before).item()
    assert gain > 0
    assert gain == pytest.approx(step * gradient.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("target", ["class", "label"])
def test_soft_second_derivatives_are_those_of_the_definition(target: Any) -> None:
    activations, ends, labels = within_fixed_ends()
    activations, labels = activations[:12, :2], torch.cat([labels[:12], labels[-2:]])
    width = torch.full((2,), 10 / 7, dtype=torch.float64)
    low = torch.full((2,), -1.0, dtype=torch.float64)

    def ours(activations: Tensor) -> Tensor:
        x = torch.cat([activations, ends[:, :2]])
        options: dict[str, Any] = {"estimator": "soft_histogram", "bins": 8, "target": target}
        return mutual_information(x, labels, 3, **options).square().sum()

    def definition(activations: Tensor) -> Tensor:
        x = torch.cat([activations, ends[:, :2]])
        counts = histogram_reference.soft_histogram(x, labels, low, width, 8, 3)
        return family.plug_in(counts, target).square().sum()

    one, two = (torch.autograd.functional.hessian(f, activations) for f in (ours, definition))
    assert two.any()
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_samples_have_a_gradient_wherever_the_activations_lie(
    backend: Backend, dtype: torch.dtype
) -> None:
    """The least, and none of the greatest: rounding of the centres plays no part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 30, generator=generator, dtype=torch.float64)
    labels = torch.arange(40, device=backend.device) % 3
    for offset, bins in itertools.product((0, 1, -3, 1000), (2, 7)):
        moved = (x + offset).to(backend.device, dtype).requires_grad_()
        soft_histogram_mutual_information(moved, labels, 3, bins=bins).square().sum().backward()
        least, most = (moved.detach() == end for end in (moved.amin(0), moved.amax(0)))
        constant = least & most
        assert (moved.grad[most] == 0).all()
        assert (moved.grad[least & ~constant] != 0).all()


def test_a_constant_filter_has_no_gradient() -> None:
    labels = torch.arange(6) % 2
    for value in (0.0, 0.3, -1e9, 1e-40):
        activations = torch.full((6, 1), value, requires_grad=True)
        mutual_information(activations, labels, 2, estimator="soft_histogram").sum().backward()
        assert torch.equal(activations.grad, torch.zeros(6, 1))


@pytest.mark.parametrize("estimator", ["knn", "histogram"])
def test_blocks_of_filters_make_no_difference(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations, labels = sample(filters=11)
    whole = mutual_information(activations.double(), labels, 3, estimator=estimator)
    monkeypatch.setattr(family, "_SCRATCH_BYTES", 1)
    close(mutual_information(activations, labels, 3, estimator=estimator), whole)


def test_a_generator_draws_other_noise_that_tells_the_same() -> None:
    activations, labels = sample(samples=2000, filters=9)
    expected = mutual_information(activations, labels, 3)
    draws = [
        mutual_information(activations, labels, 3, random_state=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0], expected, rtol=0, atol=0.05)
    # Without ties to break, noise of 1e-10 hardly shows.
    untied = activations + torch.rand(2000, 9, generator=torch.Generator().manual_seed(0))
    close(
        mutual_information(untied, labels, 3, random_state=torch.Generator().manual_seed(1)),
        mutual_information(untied, labels, 3),
    )


def test_a_generator_scales_and_adds_noise_as_scikit_learn_does() -> None:
    activations = sample(samples=5000, filters=3)[0].double() * 1e3
    activations[:, 2] = 7.0
    (block,) = family._prepare_with(activations, torch.Generator().manual_seed(0))
    deviation = activations.std(0, correction=0)
    scaled = (activations / torch.where(deviation > 0, deviation, 1)).T
    noise = (block - scaled) / scaled.abs().mean(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(noise.std(1) / 1e-10, torch.ones(3).double(), rtol=0, atol=0.05)
    assert (noise.mean(1).abs() < 1e-11).all()


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_gpu_gives_what_the_cpu_gives(estimator: str) -> None:
    activations, labels = sample(samples=500)
    expected = mutual_information(activations, labels, 3, estimator=estimator)
    got = mutual_information(activations.cuda(), labels.cuda(), 3, estimator=estimator)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-5)
    if estimator == "knn":
        generator = torch.Generator("cuda").manual_seed(0)
        drawn = mutual_information(activations.cuda(), labels.cuda(), 3, random_state=generator)
        torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activations": [[1.0]]}, TypeError, "activations: got list"),
        ({"activations": torch.ones(60, 2).long()}, TypeError, "activations: got dtype"),
        ({"activations": torch.ones(60)}, ValueError, "activations: got shape"),
        ({"activations": torch.ones(60, 0)}, ValueError, "activations: got shape"),
        ({"labels": torch.zeros(4).long()}, ValueError, "labels: got shape"),
        ({"labels": torch.zeros(60)}, TypeError, "labels: got dtype"),
        ({"labels": torch.arange(60)}, ValueError, r"labels: got values in \[0, 59\]"),
        ({"labels": -torch.ones(60).long()}, ValueError, "labels: got values"),
        ({"num_classes": 0}, ValueError, "num_classes: got 0"),
        ({"num_classes": 2**31}, ValueError, "num_classes: got 2147483648"),
        ({"num_classes": 2.0}, TypeError, "num_classes: got float"),
        ({"estimator": "kde"}, ValueError, "estimator: got 'kde'"),
        ({"target": "filter"}, ValueError, "target: got 'filter'"),
        ({"random_state": -1}, ValueError, "random_state: got -1"),
        ({"random_state": 2**32}, ValueError, "random_state: got 4294967296"),
        ({"random_state": None}, TypeError, "random_state: got NoneType"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors: got 0"),
        ({"n_neighbors": 2.5}, TypeError, "n_neighbors: got float"),
        ({"bins": 32}, ValueError, "bins: got 32 with estimator='knn'"),
        ({"bias_correction": "miller_madow"}, ValueError, "bias_correction: got 'miller_madow' w"),
        ({"estimator": "histogram", "bins": 1}, ValueError, "bins: got 1"),
        ({"estimator": "histogram", "n_neighbors": 5}, ValueError, "n_neighbors: got 5 with"),
        ({"estimator": "soft_histogram", "random_state": 1}, ValueError, "random_state: got 1 w"),
        ({"estimator": "histogram", "bias_correction": "jackknife"}, ValueError, "bias_correction"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    activations, labels = sample()
    arguments = {"activations": activations, "labels": labels, "num_classes": 3} | changes
    with pytest.raises(error, match=f"^{message}"):
        mutual_information(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("estimator", ["knn", "histogram"])
def test_values_that_are_not_finite_are_refused_by_column(
    estimator: str, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations, labels = sample()
    activations[50, 3] = activations[2, 4] = value
    activations = activations.to(dtype)
    message = "^activations: got NaN or infinity in column 3, want finite values"
    for scratch in (2**24, 1):  # in one block, and in one for each filter
        monkeypatch.setattr(family, "_SCRATCH_BYTES", scratch)
        with pytest.raises(ValueError, match=message):
            mutual_information(activations, labels, 3, estimator=estimator)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_soft_histogram_passes_on_what_is_not_finite_to_its_filter_alone(value: float) -> None:
    activations, labels = sample()
    expected = mutual_information(activations, labels, 3, estimator="soft_histogram")
    activations[50, 3] = value
    got = mutual_information(activations, labels, 3, estimator="soft_histogram")
    others = torch.tensor([0, 1, 2, 4])
    assert got[:, 3].isnan().any()
    assert torch.equal(got[:, others], expected[:, others])


def test_too_few_samples_are_refused() -> None:
    activations, labels = sample()
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match=r"^activations: got no sample"):
            mutual_information(activations[:0], labels[:0], 3, estimator=estimator)
    with pytest.raises(ValueError, match=r"^activations: got 1 sample, want at least 2"):
        mutual_information(activations[:1], labels[:1], 3)
    with pytest.raises(ValueError, match=r"^activations: got 2 samples, of different classes"):
        mutual_information(activations[:2], torch.tensor([0, 1]), 3)
    for singles in (torch.tensor([0, 1]), torch.tensor([0, 2, 1])):
        with pytest.raises(ValueError, match=r"^labels: got one sample of each label"):
            mutual_information(activations[: len(singles)], singles, 3, target="label")
    # Every class has one sample: for each, the rest are left, and say nothing.
    got = mutual_information(activations[:3], torch.tensor([0, 2, 1]), 3)
    close(got, scikit_learn(activations[:3], torch.tensor([0, 2, 1]), 3))


def test_the_score_is_the_mean_of_the_best_classes() -> None:
    mi = torch.tensor([[0.1, 0.4, 0.0], [0.3, 0.2, 0.0]])
    assert mutual_information_score(mi).item() == pytest.approx(0.7 / 3)
    for wrong, error in (
        (torch.zeros(3), ValueError),
        (torch.zeros(0, 3), ValueError),
        (torch.zeros(3, 0), ValueError),
        (torch.zeros(3, 3).long(), TypeError),
        ([[0.1]], TypeError),
    ):
        with pytest.raises(error, match=r"^mi: got"):
            mutual_information_score(wrong)


def test_on_a_gpu_the_filters_of_a_block_are_as_many_as_its_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each block costs launches; without a device only the operators that would run are seen."""
    gpu = SimpleNamespace(total_memory=2**36)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        assert family._scratch_bytes(torch.device("cuda")) == 2**31
        assert family._scratch_bytes(torch.device("cpu")) == 2**24
    monkeypatch.setattr(family, "_scratch_bytes", lambda device: gpu.total_memory // 32)
    with FakeTensorMode():
        activations = torch.rand(10_000, 512, device="cuda")
        labels = torch.zeros(10_000, dtype=torch.int64, device="cuda")
        for memory, blocks in ((2**36, 1), (2**33, 3)):
            gpu.total_memory = memory
            with Recorder() as ran:
                mutual_information(activations, labels, 200, estimator="histogram", bins=64)
            assert ran.names.count("picnn_fast::histogram_update") == blocks
