"""MIS by every estimator, and its resamples, against plain loops."""

import math
from collections import Counter

import pytest
import torch
from scipy.special import digamma

from picnn_fast import functional
from picnn_fast.metrics import (
    MutualInformationEstimates,
    MutualInformationScore,
    draw_counts,
    mutual_information_estimates,
)

CLASSES, FILTERS, BINS = 4, 5, 8


def samples(images=60, filters=FILTERS, seed=0, classes=CLASSES):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=draw)
    x = torch.randn(images, filters, generator=draw).relu()
    x[:, 0] += labels
    return x, labels


def metric_of(x, labels, classes=CLASSES, size=17, **options):
    metric = MutualInformationEstimates(classes, bins=BINS, **options)
    for part, of in zip(x.split(size), labels.split(size), strict=True):
        metric.update(part, of)
    return metric


def test_each_score_is_that_of_its_estimator():
    x, labels = samples()
    got = metric_of(x, labels).compute()
    options = {
        "knn": {"estimator": "knn"},
        "histogram": {"estimator": "histogram", "bins": BINS},
        "miller_madow": {
            "estimator": "histogram",
            "bins": BINS,
            "bias_correction": "miller_madow",
        },
        "soft_histogram": {"estimator": "soft_histogram", "bins": BINS},
    }
    for name, of in options.items():
        matrix = functional.mutual_information(x, labels, CLASSES, **of)
        assert getattr(got, name).item() == pytest.approx(matrix.amax(0).mean().item()), name
    alone = MutualInformationScore(CLASSES)
    alone.update(x, labels)
    assert got.knn == alone.compute()
    assert torch.equal(metric_of(x, labels).matrix(), alone.matrix())


def information(terms, times):
    """Mean of the terms over images that are repeated."""
    held = [term for term, n in zip(terms, times, strict=True) for _ in range(n)]
    return math.fsum(held) / len(held)


def plug_in_terms(bins, own):
    """log p(b, y) / p(b) p(y) of each image, by counting. ``bins``: weights by bin of each."""
    joint, of_bin, of_class = Counter(), Counter(), Counter()
    for weights, y in zip(bins, own, strict=True):
        for b, weight in weights.items():
            joint[b, y] += weight
            of_bin[b] += weight
            of_class[y] += weight
    total = sum(of_class.values())
    return [
        sum(
            weight * math.log(joint[b, y] * total / (of_bin[b] * of_class[y]))
            for b, weight in weights.items()
            if weight > 0
        )
        for weights, y in zip(bins, own, strict=True)
    ]


def hard_bins(column):
    """Bins whose width is a power of two, the smallest of which BINS hold the range."""
    width = 2.0**-20
    while math.floor(max(column) / width) - math.floor(min(column) / width) >= BINS:
        width *= 2
    return [{math.floor(value / width): 1.0} for value in column]


def soft_bins(column):
    least, most = min(column), max(column)
    shares = []
    for value in column:
        place = (value - least) / (most - least) * (BINS - 1)
        below = min(math.floor(place), BINS - 2)
        shares.append({below: 1 - (place - below), below + 1: place - below})
    return shares


def knn_terms(column, own, k=3):
    """psi(k) - psi(n) - psi(m) of each image, by all distances."""
    terms = []
    for i, (value, y) in enumerate(zip(column, own, strict=True)):
        size = own.count(y)
        near = sorted(
            abs(value - other)
            for j, (other, z) in enumerate(zip(column, own, strict=True))
            if z == y and j != i
        )
        m = sum(abs(value - other) < near[k - 1] for other in column)
        terms.append(digamma(k) - digamma(size) - digamma(m))
    return terms


def test_resamples_are_those_of_each_images_term():
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(CLASSES, (60,), generator=draw)
    x = torch.rand(60, FILTERS, generator=draw, dtype=torch.float64)  # no ties
    x[:, 0] += labels
    metric = metric_of(x, labels)
    metric.compute()
    counts = torch.randint(4, (3, 60), generator=draw)
    counts[0] = 1
    got = metric.replicate(counts)
    for name, value in zip(got._fields, metric.compute(), strict=True):
        assert getattr(got, name)[0].item() == pytest.approx(value.item(), abs=1e-6), name
    for r, times in enumerate(counts.tolist()):
        wanted = dict.fromkeys(got._fields, 0.0)
        for name in got._fields:
            matrix = getattr(metric._matrices, name)
            for f in range(FILTERS):
                own = [int(y == matrix[:, f].argmax()) for y in labels.tolist()]
                column = x[:, f].tolist()
                if name == "knn":
                    terms = knn_terms(column, own)
                    value = max(0, digamma(60) + information(terms, times))
                else:
                    shares = soft_bins(column) if name == "soft_histogram" else hard_bins(column)
                    terms = plug_in_terms(shares, own)
                    change = information(terms, times) - information(terms, [1] * 60)
                    value = matrix[:, f].max().item() + change
                    value = value if name == "miller_madow" else max(0, value)
                wanted[name] += value / FILTERS
        for name, value in wanted.items():
            assert getattr(got, name)[r].item() == pytest.approx(value, abs=1e-6), name


def test_small_blocks_give_the_same(monkeypatch):
    x, labels = samples()
    (counts,) = draw_counts(60, 4)
    metric = metric_of(x, labels)
    scores, resampled = metric.compute(), metric.replicate(counts)
    monkeypatch.setattr(mutual_information_estimates, "_BLOCK", 1)
    again = metric_of(x, labels)
    torch.testing.assert_close(again.compute(), scores)
    torch.testing.assert_close(again.replicate(counts), resampled)


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_classes_without_images_and_with_one_are_no_matter(classes):
    x, labels = samples(12, classes=min(classes, 2))
    if classes == 9:
        labels[3] = 7
    (counts,) = draw_counts(12, 20)
    metric = metric_of(x, labels, classes)
    for score, resampled in zip(metric.compute(), metric.replicate(counts), strict=True):
        assert score.isfinite()
        assert resampled.isfinite().all()


def test_the_spread_of_resamples_is_that_of_samples_drawn_anew():
    """Over many filters of one distribution, each of which tells of the class alike."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 200, generator=draw) + 1.5 * (labels == 0)[:, None]
    (counts,) = draw_counts(300, 100)
    for name in ("knn", "histogram", "soft_histogram"):
        spread = []
        for f in range(0, 200, 10):
            metric = metric_of(x[:, f : f + 1], labels, 3)
            spread.append(getattr(metric.replicate(counts), name).std())
        metric = metric_of(x, labels, 3)
        metric.compute()
        truth = getattr(metric._matrices, name).amax(0).std()
        assert torch.stack(spread).mean() == pytest.approx(truth.item(), rel=0.25), name


def test_counts_of_other_images_are_refused():
    metric = metric_of(*samples())
    with pytest.raises(ValueError, match=r"counts: got shape \(1, 59\), want \[resamples, 60\]"):
        metric.replicate(torch.ones(1, 59, dtype=torch.int64))
