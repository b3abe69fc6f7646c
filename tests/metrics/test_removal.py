"""FilterRemoval against a loop over images and classes."""

import itertools
import math

import pytest
import torch

from picnn_fast.metrics import FilterRemoval, most_active_filters, owned_filters

CLASSES, FILTERS, IMAGES = 4, 20, 50


def _data(seed=0, classes=CLASSES):
    draw = torch.Generator().manual_seed(seed)
    maps = torch.rand(IMAGES, FILTERS, 2, 2, generator=draw)
    labels = torch.randint(classes, (IMAGES,), generator=draw)
    ownership = torch.rand(classes, FILTERS, generator=draw)
    weight = torch.randn(classes, FILTERS, generator=draw)

    def classify(maps, mask):
        return (maps * mask[:, :, None, None]).mean((2, 3)) @ weight.T

    return maps, labels, ownership, classify


def _loop(maps, labels, removed, classes, classify):
    """Both accuracies, image by image and class by class."""
    own, others = [], []
    for c, filters in zip(classes, removed, strict=True):
        mask = torch.tensor([[0.0 if gone else 1.0 for gone in filters]])
        right = [
            classify(maps[i : i + 1], mask)[0].argmax().item() == labels[i].item()
            for i in range(len(maps))
        ]
        of = [label == c for label in labels.tolist()]
        if any(of):
            own.append(sum(r for r, o in zip(right, of, strict=True) if o) / sum(of))
        rest = [r for r, o in zip(right, of, strict=True) if not o]
        if rest:
            others.append(sum(rest) / len(rest))
    return sum(own) / len(own), sum(others) / len(others)


def _run(metric, maps, labels, classify):
    for some in torch.arange(len(maps)).split(9):
        metric.update(maps[some], labels[some], classify)
    return tuple(value.item() for value in metric.compute())


def test_filters_owned_by_more_than_a_half_are_removed_class_by_class():
    maps, labels, ownership, classify = _data()
    metric = FilterRemoval(CLASSES, FILTERS, ownership=ownership)
    removed = [[share > 0.5 for share in row] for row in ownership.tolist()]
    assert metric.removed().tolist() == removed
    expected = _loop(maps, labels, removed, range(CLASSES), classify)
    assert _run(metric, maps, labels, classify) == pytest.approx(expected)


def test_without_ownership_the_tenth_that_a_class_activates_most_is_removed():
    maps, labels, _, classify = _data(1)
    pooled = maps.mean((2, 3))
    metric = FilterRemoval(CLASSES, FILTERS)
    for some in torch.arange(IMAGES).split(13):
        metric.prepare(pooled[some], labels[some])
    removed = []
    for c in range(CLASSES):
        means = [
            sum(row[k] for row, y in zip(pooled.tolist(), labels.tolist(), strict=True) if y == c)
            for k in range(FILTERS)
        ]
        top = sorted(range(FILTERS), key=lambda k, means=means: -means[k])[: FILTERS // 10]
        removed.append([k in top for k in range(FILTERS)])
    assert metric.removed().tolist() == removed
    expected = _loop(maps, labels, removed, range(CLASSES), classify)
    assert _run(metric, maps, labels, classify) == pytest.approx(expected)


def test_what_a_set_of_classes_activates_most_is_of_their_mean():
    means = torch.tensor([[5.0, 4.0, 0.0, 0.0], [0.0, 4.0, 5.0, 0.0], [math.nan] * 4])
    assert most_active_filters(means, [0, 1], 0.25).tolist() == [False, True, False, False]
    assert most_active_filters(means, [0, 2], 0.5).tolist() == [True, True, False, False]
    assert most_active_filters(means, [1], 0.01).sum() == 1


def test_filters_of_a_set_of_classes_are_those_of_any():
    ownership = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.51, 0.0]])
    assert owned_filters(ownership, [0]).tolist() == [True, False, False]
    assert owned_filters(ownership, [0, 1]).tolist() == [True, True, False]


def test_of_many_classes_twenty_are_removed_spread_evenly_from_first_to_last():
    assert FilterRemoval(20, 2).classes == list(range(20))
    classes = FilterRemoval(96, 2).classes
    assert len(set(classes)) == 20
    assert (classes[0], classes[-1]) == (0, 95)
    assert {b - a for a, b in itertools.pairwise(classes)} == {5}


def test_classes_without_images_do_not_count_among_those_removed():
    maps, labels, ownership, classify = _data(2)
    labels = labels.clamp_max(2)
    metric = FilterRemoval(CLASSES, FILTERS, ownership=ownership)
    removed = (ownership > 0.5).tolist()
    expected = _loop(maps, labels, removed, range(CLASSES), classify)
    assert _run(metric, maps, labels, classify) == pytest.approx(expected)


def test_a_resample_is_the_value_of_its_images():
    maps, labels, ownership, classify = _data(3)
    counts = torch.randint(0, 3, (4, IMAGES), generator=torch.Generator().manual_seed(0))
    metric = FilterRemoval(CLASSES, FILTERS, ownership=ownership)
    _run(metric, maps, labels, classify)
    drawn = metric.replicate(counts)
    for r, count in enumerate(counts):
        images = torch.arange(IMAGES).repeat_interleave(count)
        again = FilterRemoval(CLASSES, FILTERS, ownership=ownership)
        expected = _run(again, maps[images], labels[images], classify)
        assert [values[r].item() for values in drawn] == pytest.approx(expected)


def test_a_reset_forgets_which_filters_classes_activate():
    maps, labels, _, classify = _data(4)
    metric = FilterRemoval(CLASSES, FILTERS)
    metric.prepare(maps.mean((2, 3)), labels)
    _run(metric, maps, labels, classify)
    metric.reset()
    with pytest.raises(ValueError, match=r"^prepare: got no image"):
        metric.update(maps, labels, classify)


def test_bad_input_is_refused_by_name():
    maps, labels, ownership, classify = _data()
    metric = FilterRemoval(4, FILTERS, ownership=ownership)
    cases = [
        (lambda: FilterRemoval(3, FILTERS, ownership=ownership), ValueError, "ownership: got sha"),
        (lambda: FilterRemoval(4, FILTERS, classes=[4]), ValueError, "classes: got 4"),
        (lambda: FilterRemoval(4, FILTERS, classes=[]), ValueError, "classes: got none"),
        (lambda: FilterRemoval(4, FILTERS, classes=2), TypeError, "classes: got int"),
        (lambda: owned_filters(ownership[0], [0]), ValueError, "ownership: got shape"),
        (lambda: most_active_filters(ownership, [0], 1.5), ValueError, "share: got 1.5"),
        (
            lambda: FilterRemoval(4, 3).prepare(maps.mean((2, 3)), labels),
            ValueError,
            "activations: got",
        ),
        (lambda: metric.update(maps, labels + 4, classify), ValueError, "labels: got values"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            call()
