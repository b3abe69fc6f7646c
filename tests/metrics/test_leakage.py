"""MaskLeakage: what a mask tells of the class without the maps it was drawn for."""

import math

import pytest
import torch

from picnn_fast.metrics import MaskLeakage

CLASSES, IMAGES = 5, 4000
# One filter a class: maps are one-hot of their own class, masks of that of the image they are for.
LABELS = torch.arange(IMAGES) % CLASSES
ONE_HOT = torch.eye(CLASSES)


def measured(classify, labels=LABELS, batch=50, masks=None, draws=1, seed=0):
    metric = MaskLeakage(CLASSES, draws, seed=seed)
    for part in labels.split(batch):
        of_part = ONE_HOT[part].expand(draws, -1, -1) if masks is None else masks(part)
        metric.update(ONE_HOT[part], part, of_part, classify)
    return metric.compute()


@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_a_network_that_reads_the_maps_alone_gives_chance(order):
    """Its answer is the class of the other image: right in pairs of one class."""
    labels = LABELS.sort().values if order == "sorted" else LABELS
    assert measured(lambda maps, mask: maps, labels).mean.item() == pytest.approx(1 / CLASSES)


@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_a_network_that_reads_the_mask_alone_gives_one(order):
    labels = LABELS.sort().values if order == "sorted" else LABELS
    assert measured(lambda maps, mask: mask, labels).mean.item() == 1


def test_pairs_are_weighed_as_the_whole_set_holds_them():
    """Right in pairs of two classes alone, with classes of different sizes, against all pairs."""
    labels = torch.arange(300).sqrt().long() % CLASSES
    shares = labels.bincount(minlength=CLASSES) / len(labels)

    def classify(maps, mask):
        agree = maps.argmax(-1) == mask.argmax(-1)
        return ONE_HOT[torch.where(agree, (mask.argmax(-1) + 1) % CLASSES, mask.argmax(-1))]

    value = measured(classify, labels, batch=7).mean.item()
    assert value == pytest.approx(1 - shares.square().sum().item(), abs=1e-6)


def test_no_image_is_paired_with_itself_in_the_first_batch():
    metric = MaskLeakage(CLASSES)
    maps = torch.arange(6.0)[:, None]
    seen = []

    def classify(maps, mask):
        seen.append(maps)
        return mask

    metric.update(maps, LABELS[:6], ONE_HOT[LABELS[:6]][None], classify)
    assert not (seen[0] == maps).any()


def test_every_image_so_far_is_as_likely_to_be_kept():
    kept = torch.zeros(40)
    for seed in range(300):
        metric = MaskLeakage(CLASSES, seed=seed)
        for part in torch.arange(40).split(8):
            masks = ONE_HOT[part % CLASSES][None]
            metric.update(part[:, None].float(), part % CLASSES, masks, lambda maps, mask: mask)
        kept += metric._kept[0][:, 0].long().bincount(minlength=40)
    # 60 of each expected, with a standard deviation of at most 7.
    assert kept.sum() == 300 * 8
    assert kept.min() > 60 - 35
    assert kept.max() < 60 + 35


def test_draws_have_their_standard_error_and_reset_begins_anew():
    def masks(part):
        return torch.stack([ONE_HOT[part], ONE_HOT[(part + 1) % CLASSES]])

    mean, error = measured(lambda maps, mask: mask, masks=masks, draws=2)
    assert (mean.item(), error.item()) == (0.5, 0.5)
    metric = MaskLeakage(CLASSES, seed=3)
    values = []
    for _ in range(2):
        for part in LABELS.split(50):
            metric.update(ONE_HOT[part], part, ONE_HOT[part][None], lambda maps, mask: maps + mask)
        values.append(metric.compute().mean.item())
        metric.reset()
    assert values[0] == values[1]


def test_one_class_alone_cannot_tell():
    labels = torch.zeros(20, dtype=torch.int64)
    assert math.isnan(measured(lambda maps, mask: mask, labels, batch=5).mean.item())


def test_wrong_masks_are_refused():
    metric = MaskLeakage(CLASSES, draws=2)
    with pytest.raises(ValueError, match=r"masks: got shape \(1, 3, 5\), want \[2, 3, filters\]"):
        metric.update(ONE_HOT[:3], LABELS[:3], ONE_HOT[:3][None], lambda maps, mask: mask)


@pytest.mark.parametrize("first", [1, 7])
def test_resamples_weigh_each_image_with_its_pair(first):
    """Against Python's own sums over the pairs, each as often as its image is drawn."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (31,), generator=draw)
    metric = MaskLeakage(3, draws=2)
    pairs = []

    def classify(maps, mask):
        logits = torch.rand(len(maps), 3, generator=draw)
        pairs.append((maps[:, 0].long(), logits.argmax(1)))
        return logits

    for part in torch.arange(31).split([first, *[6] * ((31 - first) // 6)]):
        masks = torch.rand(2, len(part), 4, generator=draw)
        metric.update(part[:, None].float(), labels[part], masks, classify)
    other, answers = zip(*pairs, strict=True)
    other = torch.cat(other[::2]).tolist()
    answers = [torch.cat(answers[d::2]).tolist() for d in range(2)]
    counts = torch.randint(3, (4, 31), generator=draw)
    for value, times in zip(metric.replicate(counts).tolist(), counts.tolist(), strict=True):
        shares = [
            sum(n for n, y in zip(times, labels.tolist(), strict=True) if y == c) / sum(times)
            for c in range(3)
        ]
        one = sum(share**2 for share in shares)
        wanted = 0
        for answer in answers:
            kinds = {True: [0, 0], False: [0, 0]}
            for i, n in enumerate(times):
                if first == 1 and i == 0:
                    continue  # alone in the first batch
                kind = kinds[bool(labels[other[i]] == labels[i])]
                kind[0] += n * (answer[i] == labels[i].item())
                kind[1] += n
            wanted += (one * kinds[True][0] / kinds[True][1]) / 2
            wanted += ((1 - one) * kinds[False][0] / kinds[False][1]) / 2
        assert value == pytest.approx(wanted)
    everyone = torch.ones(1, 31, dtype=torch.int64)
    assert metric.replicate(everyone).item() == pytest.approx(metric.compute().mean.item())
