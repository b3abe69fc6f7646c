"""CalibrationError against Guo et al.'s equations in plain Python, and against torchmetrics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast.metrics import CalibrationError

CLASSES = 4


def batches(count: int = 3, batch: int = 50, scale: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            scale * torch.randn(batch, CLASSES, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def by_hand(confidence: list[float], correct: list[bool], bins: int) -> float:
    """Guo et al., eq. 2 to 5: bin m holds the confidences in ((m - 1) / M, m / M]."""
    error = 0.0
    for m in range(1, bins + 1):
        held = [
            i for i, p in enumerate(confidence) if (m - 1) / bins < p <= m / bins or p == 0 == m - 1
        ]
        if held:
            accuracy = sum(correct[i] for i in held) / len(held)
            mean = sum(confidence[i] for i in held) / len(held)
            error += len(held) / len(confidence) * abs(accuracy - mean)
    return error


def told(data: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[bool]]:
    logits, labels = (torch.cat(part) for part in zip(*data, strict=True))
    confidence, predicted = logits.softmax(1).max(1)
    return confidence.tolist(), (predicted == labels).tolist()


def filled(data: list[tuple[Tensor, Tensor]], bins: int = 15) -> CalibrationError:
    metric = CalibrationError(CLASSES, bins)
    for batch in data:
        metric.update(*batch)
    return metric


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_error_is_that_of_the_equations_over_batches_of_any_size(bins: int) -> None:
    data = [*batches(), *batches(1, batch=3)]
    assert filled(data, bins).compute().item() == pytest.approx(by_hand(*told(data), bins))


def test_the_error_is_that_of_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassCalibrationError

    data = batches(batch=200)
    theirs = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    for batch in data:
        theirs.update(*batch)
    assert filled(data).compute().item() == pytest.approx(theirs.compute().item(), abs=1e-6)


@given(st.lists(st.tuples(st.integers(8, 16), st.booleans()), min_size=1, max_size=30))
def test_a_confidence_on_an_edge_is_of_the_bin_below(steps: list[tuple[int, bool]]) -> None:
    # Eighths are exact, and the edges of 8 bins.
    confidence = [step / 16 if step < 16 else 1.0 for step, _ in steps]
    correct = [right for _, right in steps]
    metric = CalibrationError(2, 8)
    probabilities = torch.tensor([[p, 1 - p] for p in confidence], dtype=torch.float64)
    metric.update(
        probabilities.log().clamp_min(-1e4), torch.tensor([0 if c else 1 for c in correct])
    )
    # Of a tie the first class is predicted.
    assert metric.compute().item() == pytest.approx(by_hand(confidence, correct, 8), abs=1e-6)


def test_a_sure_network_that_is_right_is_calibrated_and_one_that_is_wrong_is_not() -> None:
    sure = 1e4 * torch.eye(CLASSES)
    assert filled([(sure, torch.arange(4))]).compute() == 0
    assert filled([(sure, torch.tensor([1, 2, 3, 0]))]).compute() == 1


def test_a_resample_is_the_error_of_the_images_drawn() -> None:
    data = batches(2, batch=20)
    metric = filled(data)
    counts = torch.stack(
        [torch.bincount(torch.randint(40, (40,)), minlength=40), torch.ones(40, dtype=torch.int64)]
    )
    each = metric.replicate(counts)
    assert each.shape == (2,)
    confidence, correct = told(data)
    drawn = [i for i, count in enumerate(counts[0].tolist()) for _ in range(count)]
    wanted = by_hand([confidence[i] for i in drawn], [correct[i] for i in drawn], 15)
    assert each[0].item() == pytest.approx(wanted)
    assert each[1].item() == pytest.approx(metric.compute().item())


def test_half_precision_logits_and_narrow_labels() -> None:
    ((logits, labels),) = batches(1)
    metric = CalibrationError(CLASSES)
    metric.update(logits.bfloat16(), labels.to(torch.int32))
    wanted = by_hand(*told([(logits.bfloat16().float(), labels)]), 15)
    assert metric.compute().item() == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_images_give_nan() -> None:
    assert math.isnan(CalibrationError(CLASSES).compute().item())


def test_bad_input_is_refused() -> None:
    ((logits, labels),) = batches(1)
    metric = CalibrationError(CLASSES)
    cases = [
        ((logits[:, :3], labels), ValueError, r"^logits: got shape \(50, 3\), want \(50, 4\)"),
        ((logits.long(), labels), TypeError, "logits: got dtype"),
        ((logits, labels + 1), ValueError, "labels: got values"),
        ((logits, [0]), TypeError, "labels: got list"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            metric.update(*arguments)
    with pytest.raises(ValueError, match="bins: got 0"):
        CalibrationError(4, 0)
