"""The benchmark of the correlation of filters compares like with like, and reports."""

import pytest
import torch

from benchmarks import correlation, harness

SHAPE = (6, 4, 5, 3, torch.float64, torch.channels_last)


def test_candidates_compute_the_same_loss_and_gradient() -> None:
    case = correlation.Case(SHAPE, torch.device("cpu"), sets=1)
    results = []
    for function in (case.fused, case.published, case.plain):
        case.step(function)
        maps = next(case.sets)
        results.append((function(maps).detach(), maps.grad))
        assert maps.grad is not None
        assert maps.grad.any()
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_figures_are_ratios_of_what_was_measured_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {"fused": 2.0, "forward": 1.0, "plain": 6.0, "published": 30.0, "copy": 0.5}
    seconds |= {"kernels": 1.5, "a call": 0.03}

    def interleaved(candidates, rounds, device, **options):
        return {name: [seconds.get(name, 4.0)] * 3 for name in candidates}

    monkeypatch.setattr(harness, "interleaved", interleaved)
    loss = correlation.bench_loss(SHAPE, torch.device("cpu"), harness.Effort(3))
    assert loss["speedup"] == {"published": 15, "plain": 3, "plain, compiled": 2}
    # The maps are read twice, and as much is written once; a copy reads and writes once.
    assert loss["share_of_limit"] == {"forward": 0.25, "fused": 0.375, "kernels": 0.5}
    memory = {"shape": "a shape", "multiple_of_maps": {"fused": 1.04, "published": 9.0}}
    report = correlation.report({"losses": [loss], "memory": memory})
    assert "| 2000.00 ms | 15.0x" in report
    assert "| 38%          | 25%           | 50%           | 30.00 ms |" in report
    assert "| a shape                   | 1.0x  | 9.0x      |" in report
    del loss["share_of_limit"]["kernels"], loss["milliseconds"]["a call"]  # of an older version
    assert "| 25%           |               |        |" in correlation.report(
        {"losses": [loss], "memory": None}
    )
    assert "extra memory" not in correlation.report({"losses": [loss], "memory": None})
