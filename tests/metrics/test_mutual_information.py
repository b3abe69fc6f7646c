"""MutualInformationScore against scikit-learn, in batches, over ranks, within its memory limit."""

import itertools
import math
import pickle
import re
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor

from picnn_fast.functional import mutual_information
from picnn_fast.metrics import MutualInformationScore
from picnn_fast.metrics import mutual_information as score
from picnn_fast.ops import mutual_information as family

CPU = torch.profiler.ProfilerActivity.CPU
SAMPLES, FILTERS, CLASSES = 60, 5, 3
ESTIMATORS = ("knn", "histogram")


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pooled activations, many of them exactly 0 as after a ReLU, some that tell the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    activations = torch.randn(SAMPLES, FILTERS, generator=generator)
    activations[:, :CLASSES] += 2 * torch.nn.functional.one_hot(labels, CLASSES)
    return activations.relu().to(dtype), labels


def filled(
    activations: Tensor, labels: Tensor, size: int = 7, **options: Any
) -> MutualInformationScore:
    metric = MutualInformationScore(CLASSES, **options)
    for x, y in zip(activations.split(size), labels.split(size), strict=True):
        metric.update(x, y)
    return metric


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"n_neighbors": 5, "random_state": 7}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_matrix_is_scikit_learns_and_the_score_its_mean_of_maxima(
    dtype: torch.dtype, options: dict[str, int]
) -> None:
    activations, labels = data(dtype)
    metric = filled(activations, labels, **options)
    expected = np.stack(
        [
            mutual_info_classif(
                activations.double().numpy(),
                (labels == c).numpy(),
                discrete_features=False,
                n_neighbors=options.get("n_neighbors", 3),
                random_state=options.get("random_state", 0),
            )
            for c in range(CLASSES)
        ]
    )
    np.testing.assert_allclose(metric.matrix().numpy(), expected, rtol=0, atol=1e-9)
    best = [max(expected[c, i] for c in range(CLASSES)) for i in range(FILTERS)]
    assert metric.compute().item() == pytest.approx(sum(best) / FILTERS, rel=1e-9)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() > 0.05


def ross_2014(x: np.ndarray, is_class: np.ndarray, k: int) -> float:
    """The estimator in plain loops, for untied samples and classes of more than k samples."""
    terms = []
    for point, label in zip(x, is_class, strict=True):
        same = np.sort(np.abs(x[is_class == label] - point))[1:]
        radius = np.nextafter(same[k - 1], 0)
        within = int((np.abs(x - point) <= radius).sum())
        terms.append(digamma(k) - digamma(len(same) + 1) - digamma(within))
    return max(0.0, digamma(len(x)) + float(np.mean(terms)))


def test_the_matrix_agrees_with_the_estimator_written_out() -> None:
    _, labels = data()
    activations = torch.randn(
        SAMPLES, FILTERS, generator=torch.Generator().manual_seed(1)
    ).double() + labels[:, None] * torch.arange(FILTERS)
    matrix = filled(activations, labels).matrix()
    for c in range(CLASSES):
        for i in range(FILTERS):
            expected = ross_2014(activations[:, i].numpy(), (labels == c).numpy(), k=3)
            assert matrix[c, i].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_filter_that_separates_a_class_tells_its_entropy(estimator: str) -> None:
    labels = torch.arange(3000) % CLASSES
    noise = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    activations = noise + 10 * (labels == 1)[:, None] * torch.tensor([1.0, 0.0])
    matrix = filled(activations, labels, estimator=estimator).matrix()
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert matrix[1, 0].item() == pytest.approx(entropy, abs=0.02)
    assert matrix[:, 1].max() < 0.03


@pytest.mark.parametrize("correction", [None, "miller_madow"])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_histograms_of_batches_of_any_size_are_that_of_all_samples(
    size: int, correction: str | None
) -> None:
    activations, labels = data()
    options: dict[str, Any] = {"estimator": "histogram", "bins": 8, "bias_correction": correction}
    metric = filled(activations, labels, size, **options)
    same(metric.matrix(), mutual_information(activations, labels, CLASSES, **options))
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    same(filled(activations[order], labels[order], size, **options).matrix(), metric.matrix())


def test_histograms_keep_no_samples() -> None:
    metric = MutualInformationScore(CLASSES, estimator="histogram", bins=8)
    sizes = set()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        activations = 10**seed * torch.randn(100, FILTERS, generator=generator)
        metric.update(activations, torch.arange(100) % CLASSES)
        sizes.add(sum(state.nbytes for state in metric.metric_state.values()))
    assert sizes == {8 * FILTERS * (8 * CLASSES + 2)}
    assert metric.table[: FILTERS * 8 * CLASSES].sum() == 500 * FILTERS


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_new_samples_renew_the_matrix(estimator: str) -> None:
    activations, labels = data()
    metric = filled(activations[:30], labels[:30], estimator=estimator)
    before = metric.matrix()
    metric.update(activations[30:], labels[30:])
    same(metric.matrix(), filled(activations, labels, estimator=estimator).matrix())
    assert (metric.matrix() != before).any()
    metric.reset()
    metric.update(activations[:30, :4], labels[:30])  # another number of filters, even
    same(metric.matrix(), filled(activations[:30, :4], labels[:30], estimator=estimator).matrix())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_calling_it_gives_the_score_of_the_batch_and_keeps_the_samples(estimator: str) -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES, estimator=estimator)
    for x, y in zip(activations.split(20), labels.split(20), strict=True):
        same(metric(x, y), filled(x, y, estimator=estimator).compute())
    same(metric.matrix(), filled(activations, labels, estimator=estimator).matrix())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_states_merge_save_and_pickle(estimator: str) -> None:
    activations, labels = data()
    expected = filled(activations, labels, estimator=estimator).matrix()
    first = filled(activations[:30], labels[:30], estimator=estimator)
    merged = filled(activations[30:], labels[30:], estimator=estimator)
    merged.merge_state(first)  # puts the incoming samples first
    same(merged.matrix(), expected)
    none = MutualInformationScore(CLASSES, estimator=estimator)
    merged.merge_state(none)
    same(merged.matrix(), expected)
    if estimator == "histogram":  # torchmetrics itself calls an empty list no update
        none.merge_state(merged)
        none._update_count = 1
        same(none.matrix(), expected)
    same(pickle.loads(pickle.dumps(merged)).matrix(), expected)

    merged.persistent(True)
    again = MutualInformationScore(CLASSES, estimator=estimator)
    again.load_state_dict(merged.state_dict())
    again._update_count = 1
    same(again.matrix(), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_class_without_samples_has_none(estimator: str) -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES + 1, estimator=estimator)
    metric.update(activations, labels)
    torch.testing.assert_close(metric.matrix()[CLASSES], torch.zeros(FILTERS).double())


def test_activations_are_kept_without_graph_and_without_what_they_are_a_view_of() -> None:
    maps = torch.rand(20, FILTERS, 9, 9, requires_grad=True)
    metric = MutualInformationScore(CLASSES)
    metric.update(maps[:, :, 0, 0], torch.arange(20) % CLASSES)
    (kept,) = metric.activations
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_the_memory_limit_holds_before_the_samples_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    activations, labels = data()
    metric = MutualInformationScore(CLASSES, memory_limit=100_000)
    metric.update(activations, labels)
    before = metric.matrix()
    many, many_labels = activations.repeat(1000, 1), labels.repeat(1000)
    message = r"^memory_limit: got 60060 samples of 5 filters, .* at most 100000; .*'histogram'"
    with pytest.raises(ValueError, match=message):
        metric.update(many, many_labels)
    same(metric.matrix(), before)
    assert sum(map(len, metric.activations)) == sum(map(len, metric.labels)) == SAMPLES
    with pytest.raises(ValueError, match=message):  # calling the metric sets samples aside
        metric(many, many_labels)
    for _ in range(4):  # 19,680 bytes each time
        metric(activations, labels)
    with pytest.raises(ValueError, match=r"^memory_limit: got 360 samples"):
        metric(activations, labels)


def test_the_default_limit_takes_what_its_description_says() -> None:
    metric = MutualInformationScore(CLASSES)
    metric._check_memory(torch.empty(1, device="meta").expand(50_000, 6_000))
    with pytest.raises(ValueError, match=r"^memory_limit: "):
        metric._check_memory(torch.empty(1, device="meta").expand(50_000, 9_000))


def test_the_limit_counts_a_block_of_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    # 24 MB, kept and joined, a block of 64 MiB, and a step of 24.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    activations = torch.empty(1, device="meta", dtype=torch.float16).expand(30_000, 400)
    MutualInformationScore(CLASSES, memory_limit=150_000_000)._check_memory(activations)
    with pytest.raises(ValueError, match=r"^memory_limit: "):
        MutualInformationScore(CLASSES, memory_limit=140_000_000)._check_memory(activations)


def most_allocated(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made meanwhile hold at once, and the most that NumPy's do."""
    tracemalloc.start()
    try:
        with torch.profiler.profile(activities=[CPU], profile_memory=True) as profile:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            call()
            _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in found)) + most - before


def test_the_score_takes_no_more_memory_than_the_limit_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the samples are what counts: masks and copies of them show."""
    monkeypatch.setattr(score, "_BLOCK", 0)
    monkeypatch.setattr(score, "_STEP", 24 * 2**14)
    monkeypatch.setattr(family, "_SMALL", 0)
    monkeypatch.setattr(family, "_CHUNK", 2**14)
    monkeypatch.setattr(family, "_CACHED", 2**14)
    activations = torch.rand(1500, 1000, dtype=torch.float64)
    metric = filled(activations, torch.arange(1500) % CLASSES, 1000)
    metric.memory_limit = 1
    with pytest.raises(ValueError, match="about") as refused:
        metric.update(activations[:0], torch.zeros(0, dtype=torch.int64))
    (needed,) = re.findall(r"about (\d+) bytes", str(refused.value))
    allowed = int(needed) - activations.nbytes  # the samples are there before
    held = most_allocated(metric.compute)
    assert allowed - activations.numel() < held <= allowed


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_samples_keep_their_dtype_whatever_the_metric_is_cast_to(estimator: str) -> None:
    activations, labels = data()
    expected = filled(activations, labels, estimator=estimator).matrix()
    for cast in (
        lambda metric: metric.set_dtype(torch.float16),
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: torch.nn.ModuleList([metric]).half()[0],
    ):
        metric = cast(filled(activations[:30], labels[:30], estimator=estimator))
        metric.update(activations[30:], labels[30:])
        same(metric.matrix(), expected)
        metric.reset()
        metric.update(activations, labels)
        same(metric.matrix(), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_call_that_is_refused_loses_no_samples(estimator: str) -> None:
    activations, labels = data()
    metric = filled(activations[:30], labels[:30], estimator=estimator)
    with pytest.raises(ValueError, match=r"^activations: got 2 filters, want 5"):
        metric(activations[:, :2], labels)
    with pytest.raises(ValueError, match=r"^activations: got no sample"):
        metric(activations[:0], labels[:0])
    if estimator == "knn":
        with pytest.raises(ValueError, match=r"^activations: got 1 sample"):
            metric(activations[:1], labels[:1])
    metric(activations[30:], labels[30:])
    same(metric.matrix(), filled(activations, labels, estimator=estimator).matrix())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batches_of_no_sample_are_no_samples(estimator: str) -> None:
    activations, labels = data()
    metric = filled(activations[:0], labels[:0], estimator=estimator)
    with pytest.raises(ValueError, match=r"^activations: got no sample"):
        metric.compute()
    metric.update(activations, labels)
    same(metric.matrix(), filled(activations, labels, estimator=estimator).matrix())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bad_input_is_refused_and_changes_nothing(estimator: str) -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES, estimator=estimator)
    with pytest.raises(ValueError, match=r"^activations: got no sample"):
        metric._mutual_information()
    metric.update(activations, labels)
    before = metric.matrix()
    cases = [
        ((activations[:, :, None], labels), ValueError, "activations: got shape"),
        ((activations[:, :2], labels), ValueError, "activations: got 2 filters, want 5"),
        ((activations.long(), labels), TypeError, "activations: got dtype"),
        ((activations, labels[:4]), ValueError, "labels: got shape"),
        ((activations, labels + 1), ValueError, "labels: got values"),
        ((activations, labels.float()), TypeError, "labels: got dtype"),
    ]
    broken = activations.clone()
    broken[3, 2] = float("nan")
    message = "activations: got NaN or infinity in column 2"
    if estimator == "histogram":
        cases.append(((broken, labels), ValueError, message))
    for arguments, error, message_of_case in cases:
        with pytest.raises(error, match=f"^{message_of_case}"):
            metric.update(*arguments)
    same(metric.matrix(), before)
    if estimator == "knn":
        with pytest.raises(ValueError, match=message):
            filled(broken, labels).compute()
        with pytest.raises(ValueError, match=r"activations: got 2 samples, of different classes"):
            filled(activations[:2], torch.tensor([0, 1])).compute()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"num_classes": 0}, ValueError),
        ({"num_classes": 2.0}, TypeError),
        ({"n_neighbors": 0}, ValueError),
        ({"random_state": -1}, ValueError),
        ({"random_state": 2**32}, ValueError),
        ({"random_state": None}, TypeError),
        ({"random_state": torch.Generator()}, TypeError),
        ({"estimator": "soft_histogram"}, ValueError),
        ({"bins": 32}, ValueError),
        ({"bins": 1, "estimator": "histogram"}, ValueError),
        ({"n_neighbors": 5, "estimator": "histogram"}, ValueError),
        ({"memory_limit": 0}, ValueError),
        ({"memory_limit": 1, "estimator": "histogram"}, ValueError),
        ({"num_classes": 2**31}, ValueError),
    ],
)
def test_bad_options_are_refused_by_name(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{next(iter(wrong))}: got"):
        MutualInformationScore(**({"num_classes": 3} | wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_the_caller_writes_into_its_buffers_afterwards_does_not_count(
    estimator: str, dtype: torch.dtype
) -> None:
    activations, labels = data(dtype)
    expected = filled(activations, labels, 20, estimator=estimator).compute()
    again = MutualInformationScore(CLASSES, estimator=estimator)
    buffer, marks = torch.empty(20, FILTERS, dtype=dtype), torch.empty(20, dtype=torch.int64)
    for x, y in zip(activations.split(20), labels.split(20), strict=True):
        buffer.copy_(x)
        marks.copy_(y)
        again.update(buffer, marks)
    same(again.compute(), expected)
    written = MutualInformationScore(CLASSES, estimator=estimator)
    written.update(activations, labels)
    activations.zero_()
    labels.zero_()
    same(written.compute(), filled(*data(dtype), SAMPLES, estimator=estimator).compute())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_filters_that_are_constant_but_for_rounding_are_warned_of_once(estimator: str) -> None:
    activations, labels = data()
    activations[:, 1] = 0
    activations[:, 3] = 5 + 1e-6 * torch.randn(SAMPLES)
    activations[:, 4] = 5 + 1e-2 * torch.randn(SAMPLES)
    metric = filled(activations, labels, estimator=estimator)
    with pytest.warns(UserWarning, match=r"^activations: 2 of 5 filters are constant over the"):
        metric.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(activations, labels)
        metric.compute()
        filled(*data(), estimator=estimator).compute()
