"""The benchmark of templates and filter loss compares like with like, and reports."""

import pytest
import torch

from benchmarks import filter_loss, harness

SHAPE = (6, 4, 5, 3, torch.float64, torch.channels_last)


def test_candidates_compute_the_same_loss_and_gradient() -> None:
    case = filter_loss.Case(SHAPE, torch.device("cpu"), sets=1)
    results = []
    for function in (filter_loss.fused, filter_loss.definition(case), filter_loss.direct(case)):
        case.loss(function)
        maps, _ = next(case.sets)
        results.append((function(maps).detach(), maps.grad))
        assert maps.grad is not None
        assert maps.grad.any()
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_every_call_takes_other_maps_and_fresh_gradients() -> None:
    case = filter_loss.Case(SHAPE, torch.device("cpu"), sets=2)
    seen = []
    for _ in range(2):
        case.mask(filter_loss.masked)
        case.loss(filter_loss.fused)
    for _ in range(2):
        maps, _ = next(case.sets)
        seen.append(maps)
        assert maps.is_contiguous(memory_format=torch.channels_last)
        assert maps.grad is not None
    assert not torch.equal(*seen)


def test_figures_are_ratios_of_what_was_measured_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"fused": 2.0, "products": 1.0, "autograd": 6.0, "direct": 30.0, "copy": 0.5}

    def interleaved(candidates, rounds, device, **options):
        return {name: [seconds.get(name, 4.0)] * 3 for name in candidates}

    monkeypatch.setattr(harness, "interleaved", interleaved)
    device = torch.device("cpu")
    loss = filter_loss.bench_loss(SHAPE, device, harness.Effort(3))
    assert loss["over_products"] == 2
    assert loss["speedup"] == {
        "reference": 2,
        "autograd": 3,
        "autograd, compiled": 2,
        "direct": 15,
    }
    mask = filter_loss.bench_mask(SHAPE, device, harness.Effort(3))
    assert mask["share_of_limit"] == {"forward": 0.125, "fused": 0.5}
    assert mask["clones_of_limit"] == 0.25
    results = {
        "masks": [mask],
        "losses": [loss],
        "memory": {"shape": "a shape", "multiple_of_maps": {"fused": 2.04, "direct": 9.0}},
        "step": harness.training_step("icnn", "small-cnn", 8, 2, 32, device, 3),
    }
    report = filter_loss.report(results)
    assert "| 50%          | 12%           | 25%    | 4000.00 ms |" in report
    assert "2000.00 ms | 1000.00 ms   | 2.00     |" in report
    assert "| a shape                   | 2.0x  | 9.0x   |" in report
    time = "4000.0 ms (4000.0 to 4000.0)"  # and its quartiles
    assert f"| small-cnn [2, 3, 32, 32] float32 | {time} | {time} | 1.000x        |" in report
    assert "extra memory" not in filter_loss.report(results | {"memory": None})
