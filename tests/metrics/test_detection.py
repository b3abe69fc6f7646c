"""DetectionError against a forest fitted by hand on splits made by hand."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier

from picnn_fast.metrics import DetectionError, MeanOverDraws

FEATURES, CLASSES, IMAGES = 5, 3, 40


def _data(seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(IMAGES, FEATURES, generator=draw)
    adversarial = normal + 0.8 * torch.randn(IMAGES, FEATURES, generator=draw) + 0.5
    logits, attacked = torch.randn(2, IMAGES, CLASSES, generator=draw)
    labels = torch.randint(CLASSES, (IMAGES,), generator=draw)
    return normal, adversarial, logits, attacked, labels


def _metric(data, **options):
    metric = DetectionError(**options)
    for some in torch.arange(IMAGES).split(9):
        metric.update(*(part[some] for part in data))
    return metric


def _by_hand(normal, adversarial, used, count, seed):
    """Half of the images tested, the rest trained on, each with its attacked copy."""
    order = [used[i] for i in np.random.default_rng(seed).permutation(len(used))]
    test, rest = order[: len(order) // 2], order[len(order) // 2 :]
    train = rest[: count // 2]
    forest = RandomForestClassifier(n_estimators=100, random_state=0)
    samples = [x[i].numpy() for i in train for x in (normal, adversarial)]
    forest.fit(samples, [0, 1] * len(train))
    wrong = 0
    for i in test:
        wrong += int(forest.predict([normal[i].numpy()])[0] != 0)
        wrong += int(forest.predict([adversarial[i].numpy()])[0] != 1)
    return wrong / (2 * len(test))


def _fooled(logits, attacked, labels):
    return [
        i
        for i in range(IMAGES)
        if logits[i].argmax() == labels[i] and attacked[i].argmax() != labels[i]
    ]


def test_errors_are_those_of_a_forest_that_never_saw_an_image_it_is_tested_on():
    data = _data()
    normal, adversarial, *_ = data
    found = _metric(data, samples=[12, 40], seeds=2, all_attacked=True).compute()
    for row, count in enumerate((12, 40)):
        for seed in range(2):
            expected = _by_hand(normal, adversarial, range(IMAGES), count, seed)
            assert found.errors[row, seed].item() == pytest.approx(expected)


def test_attacks_that_failed_are_left_out_unless_all_are_asked_for():
    data = _data(1)
    normal, adversarial, logits, attacked, labels = data
    used = _fooled(logits, attacked, labels)
    found = _metric(data, samples=[4], seeds=1).compute()
    assert 4 <= found.used.item() == len(used) < IMAGES
    assert found.errors.item() == pytest.approx(_by_hand(normal, adversarial, used, 4, 0))
    assert _metric(data, samples=[4], seeds=1, all_attacked=True).compute().used == IMAGES


def test_accuracy_and_success_stand_beside():
    data = _data(2)
    *_, logits, attacked, labels = data
    found = _metric(data, samples=[4], seeds=1).compute()
    right = [(logits[i].argmax() == labels[i]).item() for i in range(IMAGES)]
    after = [(attacked[i].argmax() == labels[i]).item() for i in range(IMAGES)]
    assert found.attacked == IMAGES
    assert found.accuracy.item() == pytest.approx(sum(right) / IMAGES)
    assert found.attacked_accuracy.item() == pytest.approx(sum(after) / IMAGES)
    assert found.success.item() == pytest.approx(
        len(_fooled(logits, attacked, labels)) / sum(right)
    )


def test_the_value_is_of_the_most_training_samples_that_the_images_give():
    data = _data()
    metric = _metric(data, samples=[500, 20], seeds=3, all_attacked=True)
    found = metric.compute()
    assert found.samples.tolist() == [20, 500]
    assert found.errors[1].isnan().all()
    expected = MeanOverDraws.of(found.errors[0])
    assert found.error == expected
    assert expected.standard_error > 0


def test_too_few_images_give_no_value():
    assert _metric(_data(), seeds=1).compute().error.mean.isnan()


def test_bad_input_is_refused_by_name():
    normal, adversarial, logits, attacked, labels = _data()
    for samples, error, message in (
        ([3], ValueError, r"samples: got \[3\], want even"),
        ([], ValueError, r"samples: got \[\]"),
        (500, TypeError, "samples: got int"),
        ([0], ValueError, "samples: got 0"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            DetectionError(samples)
    metric = DetectionError()
    cases = [
        ((normal[0], adversarial, logits, attacked, labels), "normal: got shape"),
        ((normal, adversarial[1:], logits, attacked, labels), "adversarial: got shape"),
        ((normal, adversarial, logits[1:], attacked, labels), "logits: got shape"),
        ((normal, adversarial, logits, attacked[:, 1:], labels), "adversarial_logits: got shape"),
        ((normal, adversarial, logits, attacked, labels + 3), "labels: got values"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            metric.update(*arguments)
    assert not metric.right
