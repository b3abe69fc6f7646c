"""GateSimilarity against loops over classes, written from section 4.2 of CSG's paper."""

import math

import pytest
import torch

from picnn_fast.metrics import GateSimilarity

CLASSES, FILTERS, IMAGES = 3, 7, 60


def _data(seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (IMAGES,), generator=draw)
    pooled = torch.rand(IMAGES, FILTERS, generator=draw)
    logits = torch.randn(IMAGES, CLASSES, generator=draw)
    gate = torch.rand(CLASSES, FILTERS, generator=draw)
    return pooled, logits, labels, gate


def _cosine(a, b):
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _matrix(pooled, logits, labels, gate, *, positive):
    rows = []
    for y in range(CLASSES):
        mean, count = [0.0] * FILTERS, 0
        for features, scores, label in zip(
            pooled.tolist(), logits.tolist(), labels.tolist(), strict=True
        ):
            if label == y and (scores.index(max(scores)) == y) == positive:
                mean = [m + x for m, x in zip(mean, features, strict=True)]
                count += 1
        if count:
            rows.append([_cosine([m / count for m in mean], row) for row in gate.tolist()])
        else:
            rows.append([math.nan] * CLASSES)
    return rows


def _dominance(matrix):
    each = []
    for y, row in enumerate(matrix):
        if not math.isnan(row[0]):
            others = [value for c, value in enumerate(row) if c != y]
            each.append(row[y] - sum(others) / len(others))
    return sum(each) / len(each) if each else math.nan


def _metric(pooled, logits, labels, gate):
    metric = GateSimilarity(gate)
    for some in torch.arange(len(labels)).split(11):
        metric.update(pooled[some], logits[some], labels[some])
    return metric


def test_matrices_are_cosines_of_a_classs_mean_feature_and_every_row_of_the_gate():
    data = _data()
    found = _metric(*data).matrices()
    for matrix, positive in ((found.true_positives, True), (found.false_negatives, False)):
        expected = torch.tensor(_matrix(*data, positive=positive), dtype=torch.float64)
        torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=1e-6)


def test_the_value_is_how_far_the_diagonal_exceeds_the_rest_of_its_row():
    data = _data(1)
    found = _metric(*data).compute()
    for value, positive in ((found.true_positives, True), (found.false_negatives, False)):
        expected = _dominance(_matrix(*data, positive=positive))
        assert value.item() == pytest.approx(expected, abs=1e-6)


def test_features_along_their_own_row_dominate_and_a_flat_gate_tells_nothing():
    labels = torch.arange(6) % CLASSES
    gate = torch.eye(CLASSES, FILTERS)
    right = torch.eye(CLASSES)[labels]
    assert _metric(gate[labels], right, labels, gate).compute().true_positives.item() == 1.0
    flat = _metric(gate[labels], right, labels, torch.ones_like(gate)).compute()
    assert flat.true_positives.item() == pytest.approx(0, abs=1e-12)


def test_without_an_error_there_are_no_false_negatives():
    pooled, _, labels, gate = _data()
    metric = _metric(pooled, torch.eye(CLASSES)[labels], labels, gate)
    assert metric.matrices().false_negatives.isnan().all()
    assert metric.compute().false_negatives.isnan()
    assert not metric.compute().true_positives.isnan()


def test_a_resample_is_the_value_of_its_images():
    data = _data(2)
    counts = torch.randint(0, 3, (4, IMAGES), generator=torch.Generator().manual_seed(0))
    drawn = _metric(*data).replicate(counts)
    for r, count in enumerate(counts):
        images = torch.arange(IMAGES).repeat_interleave(count)
        again = _metric(*(part[images] for part in data[:3]), data[3]).compute()
        for values, value in zip(drawn, again, strict=True):
            assert values[r].item() == pytest.approx(value.item(), abs=1e-12)


def test_bad_input_is_refused_by_name():
    pooled, logits, labels, gate = _data()
    for ownership, message in (
        (gate[:1], r"got shape \(1, 7\)"),
        (gate[0], r"got shape \(7,\)"),
    ):
        with pytest.raises(ValueError, match=f"^ownership: {message}"):
            GateSimilarity(ownership)
    metric = GateSimilarity(gate)
    cases = [
        ((pooled, logits[:, :2], labels), ValueError, "logits: got shape"),
        ((pooled, logits, labels + 1), ValueError, "labels: got values"),
        ((pooled[:, 1:], logits, labels), ValueError, "activations: got 6 filters"),
        ((None, logits, labels), TypeError, "activations: got NoneType"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            metric.update(*arguments)
    assert not metric.labels
