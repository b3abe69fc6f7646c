"""PathwayAccuracy against a loop over samples."""

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import PathwayAccuracy

CLASSES = 4


def batches(count: int = 3, batch: int = 7) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            *torch.randn(3, batch, CLASSES, generator=generator).unbind(),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def by_hand(data: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    right, total = [0, 0, 0], 0
    for *all_logits, labels in data:
        for sample, label in enumerate(labels.tolist()):
            total += 1
            for pathway, logits in enumerate(all_logits):
                row = logits[sample].tolist()
                right[pathway] += row.index(max(row)) == label
    return {f"acc{i + 1}": right[i] / total for i in range(3)}


def test_accuracies_equal_a_slow_loop_over_batches_of_any_size() -> None:
    data = [*batches(), *batches(1, batch=2)]
    metric = PathwayAccuracy(CLASSES)
    for batch in data:
        metric.update(*batch)
    actual = {name: value.item() for name, value in metric.compute().items()}
    assert actual == pytest.approx(by_hand(data))


def test_the_three_accuracies_are_not_mixed_up() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    right = torch.eye(4)
    half = right.clone()
    half[:2] = half[:2].flip(-1)
    metric = PathwayAccuracy(CLASSES)
    metric.update(right, half, right.flip(-1), labels)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {"acc1": 1.0, "acc2": 0.5, "acc3": 0.0}


def test_forward_gives_the_batch_and_adds_to_the_total() -> None:
    data = batches()
    metric = PathwayAccuracy(CLASSES)
    for batch in data:
        value = {name: v.item() for name, v in metric(*batch).items()}
        assert value == pytest.approx(by_hand([batch]))
    assert metric.compute()["acc1"].item() == pytest.approx(by_hand(data)["acc1"])
    metric.reset()
    metric.update(*data[0])
    assert metric.compute()["acc2"].item() == pytest.approx(by_hand(data[:1])["acc2"])


def test_states_of_ranks_add_up() -> None:
    # What torchmetrics does over ranks: each state is reduced by the function it declares.
    first, second, joined = (PathwayAccuracy(CLASSES) for _ in range(3))
    data = batches(2)
    first.update(*data[0])
    second.update(*data[1])
    for name, reduce in joined._reductions.items():
        setattr(joined, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
    joined._update_count = 1
    values = {name: value.item() for name, value in joined.compute().items()}
    assert values == pytest.approx(by_hand(data))


def test_half_precision_logits_and_narrow_labels() -> None:
    *logits, labels = batches(1)[0]
    metric = PathwayAccuracy(CLASSES)
    metric.update(*(x.bfloat16() for x in logits), labels.to(torch.int32))
    expected = by_hand([(*(x.bfloat16() for x in logits), labels)])
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_samples_give_nan() -> None:
    assert all(value.isnan() for value in PathwayAccuracy(CLASSES).compute().values())


def test_bad_input_is_refused() -> None:
    logits, masked, complement, labels = batches(1)[0]
    metric = PathwayAccuracy(CLASSES)
    cases = [
        ((logits[:3], masked, complement, labels), ValueError, r"^logits: got shape \(3, 4\)"),
        ((logits, masked[:, :2], complement, labels), ValueError, r"masked_logits: got shape"),
        ((logits, masked, None, labels), TypeError, "complement_logits: got NoneType"),
        ((logits, masked, complement.long(), labels), TypeError, "complement_logits: got dtype"),
        ((logits, masked, complement, labels + 1), ValueError, "labels: got values"),
        ((logits, masked, complement, labels.float()), TypeError, "labels: got dtype"),
        ((logits, masked, complement, [0]), TypeError, "labels: got list"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            metric.update(*arguments)
    assert metric.total == 0
    with pytest.raises(ValueError, match="num_classes: got 0"):
        PathwayAccuracy(0)
    with pytest.raises(TypeError, match="num_classes: got float"):
        PathwayAccuracy(2.0)
