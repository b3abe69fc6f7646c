"""Throughput: what runs, in which order, and medians of times by a clock of the test's own."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import Throughput, throughput


class Clock:
    """Time that passes only while a network runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def taking(self, name: str, seconds: Iterator[float]) -> Callable[[Tensor], None]:
        def run(images: Tensor) -> None:
            self.ran.append(name)
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    return clock


def always(value: float) -> Iterator[float]:
    while True:
        yield value


def test_medians_of_rounds_in_turn_leave_out_what_is_slow_once(clock: Clock) -> None:
    # Three runs of each are not timed; then the third of five rounds is slow for both.
    network = clock.taking("network", iter([9.0] * 3 + [3.0, 3.0, 50.0, 3.0, 3.0]))
    plain = clock.taking("plain", iter([9.0] * 3 + [2.0, 2.0, 60.0, 2.0, 2.0]))
    metric = Throughput(rounds=5)
    metric.update(network, plain, torch.zeros(6, 1, 2, 2))
    speed = metric.compute()
    assert speed.images_per_second.item() == 2
    assert speed.plain_images_per_second.item() == 3
    assert speed.overhead.item() == 1.5
    forth, back = ["network", "plain"], ["plain", "network"]
    assert clock.ran == forth * 3 + forth + back + forth + back + forth


def test_the_first_batch_is_timed_once_and_after_a_reset_another(clock: Clock) -> None:
    network, plain = clock.taking("network", always(2.0)), clock.taking("plain", always(1.0))
    metric = Throughput(rounds=2)
    for size in (0, 4, 4, 3):
        metric.update(network, plain, torch.zeros(size, 1, 2, 2))
    assert clock.ran == []
    assert metric.compute().images_per_second.item() == 2
    assert metric.compute().overhead.item() == 2
    assert len(clock.ran) == 2 * (3 + 2)
    metric.reset()
    metric.update(network, plain, torch.zeros(3, 1, 2, 2))
    assert metric.compute().images_per_second.item() == 1.5


def test_a_network_beside_itself_has_next_to_no_overhead() -> None:
    network = torch.nn.Conv2d(3, 16, 3).eval()
    metric = Throughput(rounds=25)
    metric.update(network, network, torch.randn(16, 3, 32, 32))
    speed = metric.compute()
    assert 0.5 < speed.overhead.item() < 2
    assert speed.images_per_second > 0


def test_what_a_network_draws_is_not_taken_from_the_users_generator() -> None:
    metric = Throughput(rounds=2)
    metric.update(torch.rand_like, torch.rand_like, torch.zeros(2, 1, 2, 2))
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    metric.compute()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_timed_gives_nan() -> None:
    assert all(math.isnan(value.item()) for value in Throughput().compute())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds: got 0, want"):
        Throughput(rounds=0)
    with pytest.raises(TypeError, match="images: got list, want"):
        Throughput().update(torch.nn.ReLU(), torch.nn.ReLU(), [])
