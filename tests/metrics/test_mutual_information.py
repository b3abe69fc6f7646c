"""MutualInformationScore against scikit-learn and against Ross's estimator written out."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor

from picnn_fast.metrics import MutualInformationScore, mutual_information

SAMPLES, FILTERS, CLASSES = 60, 5, 3


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pooled activations, many of them exactly 0 as after a ReLU, some that tell the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    activations = torch.randn(SAMPLES, FILTERS, generator=generator)
    activations[:, :CLASSES] += 2 * torch.nn.functional.one_hot(labels, CLASSES)
    return activations.relu().to(dtype), labels


def filled(activations: Tensor, labels: Tensor, **options: int) -> MutualInformationScore:
    metric = MutualInformationScore(CLASSES, **options)
    for x, y in zip(activations.split(7), labels.split(7), strict=True):
        metric.update(x, y)
    return metric


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
    np.testing.assert_array_equal(metric.matrix().numpy(), expected)
    best = [max(expected[c, i] for c in range(CLASSES)) for i in range(FILTERS)]
    assert metric.compute().item() == pytest.approx(sum(best) / FILTERS, rel=1e-12)
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


def test_a_filter_that_separates_a_class_tells_its_entropy() -> None:
    labels = torch.arange(3000) % CLASSES
    noise = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0))
    activations = noise + 10 * (labels == 1)[:, None] * torch.tensor([1.0, 0.0])
    matrix = filled(activations, labels).matrix()
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert matrix[1, 0].item() == pytest.approx(entropy, abs=0.02)
    assert matrix[:, 1].max() < 0.03


def test_new_samples_renew_the_matrix() -> None:
    activations, labels = data()
    metric = filled(activations[:30], labels[:30])
    before = metric.matrix()
    metric.update(activations[30:], labels[30:])
    torch.testing.assert_close(
        metric.matrix(), filled(activations, labels).matrix(), rtol=0, atol=0
    )
    assert (metric.matrix() != before).any()
    metric.reset()
    metric.update(activations[:30], labels[:30])
    torch.testing.assert_close(metric.matrix(), before, rtol=0, atol=0)


def test_a_class_without_samples_has_none() -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES + 1)
    metric.update(activations, labels)
    torch.testing.assert_close(metric.matrix()[CLASSES], torch.zeros(FILTERS).double())


def test_states_of_ranks_are_joined_in_order() -> None:
    activations, labels = data()
    joined = MutualInformationScore(CLASSES)
    halves = [filled(activations[:30], labels[:30]), filled(activations[30:], labels[30:])]
    for name, reduce in joined._reductions.items():
        setattr(joined, name, [reduce([reduce(getattr(half, name)) for half in halves])])
    joined._update_count = 1
    torch.testing.assert_close(
        joined.matrix(), filled(activations, labels).matrix(), rtol=0, atol=0
    )


def test_activations_are_kept_without_their_graph() -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES)
    metric.update(activations.requires_grad_(), labels)
    assert not metric.activations[0].requires_grad


def test_long_work_shows_a_progress_bar_and_short_work_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then draws as on a terminal
    activations, labels = data()
    expected = filled(activations, labels).matrix()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(mutual_information, "_SECONDS_WITHOUT_BAR", 0.0)
    torch.testing.assert_close(filled(activations, labels).matrix(), expected, rtol=0, atol=0)
    shown = capsys.readouterr()
    assert "mutual information" in shown.err
    assert shown.out == ""


def test_bad_input_is_refused() -> None:
    activations, labels = data()
    metric = MutualInformationScore(CLASSES)
    metric.update(activations, labels)
    cases = [
        ((activations[:, :, None], labels), ValueError, "activations: got shape"),
        ((activations[:, :2], labels), ValueError, "activations: got 2 filters, want 5"),
        ((activations.long(), labels), TypeError, "activations: got dtype"),
        ((activations, labels[:4]), ValueError, "labels: got shape"),
        ((activations, labels + 1), ValueError, "labels: got values"),
        ((activations, labels.float()), TypeError, "labels: got dtype"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            metric.update(*arguments)
    assert sum(len(x) for x in metric.activations) == SAMPLES

    with pytest.raises(ValueError, match="activations: got 2 samples, want at least 3"):
        filled(activations[:2], labels[:2]).compute()
    activations[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations: got values that are not finite"):
        filled(activations, labels).compute()
    for wrong, error in (
        ({"num_classes": 0}, ValueError),
        ({"num_classes": 2.0}, TypeError),
        ({"n_neighbors": 0}, ValueError),
        ({"random_state": -1}, ValueError),
        ({"random_state": 2**32}, ValueError),
        ({"random_state": None}, TypeError),
    ):
        with pytest.raises(error, match=f"{next(iter(wrong))}: got"):
            MutualInformationScore(**({"num_classes": 3} | wrong))
