"""PathwayAccuracy against a loop over draws and samples."""

import math

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import PathwayAccuracy

CLASSES, DRAWS = 4, 3


def batches(count: int = 3, batch: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(DRAWS, batch, CLASSES, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def by_hand(data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    right, total = [0] * DRAWS, 0
    for logits, labels in data:
        for sample, label in enumerate(labels.tolist()):
            total += 1
            for draw in range(DRAWS):
                row = logits[draw, sample].tolist()
                right[draw] += row.index(max(row)) == label
    each = [count / total for count in right]
    mean = sum(each) / DRAWS
    variance = sum((value - mean) ** 2 for value in each) / (DRAWS - 1)
    return mean, math.sqrt(variance / DRAWS)


def values(metric: PathwayAccuracy) -> tuple[float, ...]:
    return tuple(value.item() for value in metric.compute())


def test_mean_and_standard_error_equal_a_slow_loop_over_batches_of_any_size() -> None:
    data = [*batches(), *batches(1, batch=2)]
    metric = PathwayAccuracy(CLASSES, DRAWS)
    for batch in data:
        metric.update(*batch)
    assert values(metric) == pytest.approx(by_hand(data))


def test_a_single_draw_has_no_standard_error() -> None:
    metric = PathwayAccuracy(CLASSES)
    metric.update(torch.eye(4)[:, [1, 0, 2, 3]], torch.arange(4))
    mean, error = values(metric)
    assert mean == 0.5
    assert math.isnan(error)


def test_forward_gives_the_batch_and_adds_to_the_total() -> None:
    data = batches()
    metric = PathwayAccuracy(CLASSES, DRAWS)
    for batch in data:
        assert metric(*batch)[0].item() == pytest.approx(by_hand([batch])[0])
    assert values(metric) == pytest.approx(by_hand(data))
    metric.reset()
    metric.update(*data[0])
    assert values(metric) == pytest.approx(by_hand(data[:1]))


def test_states_of_ranks_are_joined() -> None:
    # What torchmetrics does over ranks: each state is reduced by the function it declares.
    first, second, joined = (PathwayAccuracy(CLASSES, DRAWS) for _ in range(3))
    data = batches(2)
    first.update(*data[0])
    second.update(*data[1])
    for name, reduce in joined._reductions.items():
        setattr(joined, name, reduce([*getattr(first, name), *getattr(second, name)]))
    joined._update_count = 1
    assert values(joined) == pytest.approx(by_hand(data))


def test_resamples_are_recomputed_with_images_repeated() -> None:
    data = [*batches(), *batches(1, batch=2)]
    metric = PathwayAccuracy(CLASSES, DRAWS)
    for batch in data:
        metric.update(*batch)
    logits, labels = torch.cat([x for x, _ in data], 1), torch.cat([y for _, y in data])
    counts = torch.randint(3, (5, len(labels)), generator=torch.Generator().manual_seed(1))
    for value, times in zip(metric.replicate(counts).tolist(), counts, strict=True):
        repeated = torch.arange(len(labels)).repeat_interleave(times)
        assert value == pytest.approx(by_hand([(logits[:, repeated], labels[repeated])])[0])


def test_half_precision_logits_and_narrow_labels() -> None:
    logits, labels = batches(1)[0]
    metric = PathwayAccuracy(CLASSES, DRAWS)
    metric.update(logits.bfloat16(), labels.to(torch.int32))
    assert values(metric) == pytest.approx(by_hand([(logits.bfloat16(), labels)]))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_samples_give_nan() -> None:
    assert all(math.isnan(value) for value in values(PathwayAccuracy(CLASSES)))


def test_bad_input_is_refused() -> None:
    logits, labels = batches(1)[0]
    metric = PathwayAccuracy(CLASSES, DRAWS)
    cases = [
        ((logits[:, :3], labels), ValueError, r"^logits: got shape \(3, 3, 4\), want \(3, 7, 4\)"),
        ((logits[0], labels), ValueError, r"^logits: got shape \(7, 4\)"),
        ((None, labels), TypeError, "logits: got NoneType"),
        ((logits.long(), labels), TypeError, "logits: got dtype"),
        ((logits, labels + 1), ValueError, "labels: got values"),
        ((logits, labels.float()), TypeError, "labels: got dtype"),
        ((logits, [0]), TypeError, "labels: got list"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            metric.update(*arguments)
    assert metric.seen == 0
    for name, arguments in (("num_classes", (0,)), ("draws", (4, 0))):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            PathwayAccuracy(*arguments)
    with pytest.raises(TypeError, match="num_classes: got float"):
        PathwayAccuracy(2.0)
