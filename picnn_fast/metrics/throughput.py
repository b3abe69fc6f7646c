"""Throughput: images a second of a network, beside those of the plain network in it."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.ranks import JoinedMetric

_WARM_UP = 3  # rounds that are not timed


class Speed(NamedTuple):
    """How fast a network is.

    Attributes:
        images_per_second: of the network.
        plain_images_per_second: of the plain network.
        overhead: how many times as long as the plain network the network takes.
    """

    images_per_second: Tensor
    plain_images_per_second: Tensor
    overhead: Tensor


class Throughput(JoinedMetric):
    """Wall-clock time of a network and of the plain network in it, on the same images in turn.

    In each round both run once, in the next in the other order. Of all rounds medians are taken,
    of the overhead that of the ratios within rounds, so that what else the machine does meanwhile
    counts little. The first batch is what they run on, in ``compute``, when processes that read
    images are done. A rank measures itself alone.

    Args:
        rounds: that are timed.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.metrics import Throughput
        >>> metric = Throughput(rounds=3)
        >>> plain = nn.Conv2d(3, 8, 3)
        >>> metric.update(nn.Sequential(plain, nn.ReLU()), plain, torch.randn(4, 3, 16, 16))
        >>> metric.compute().images_per_second.item() > 0
        True
    """

    is_differentiable = False
    higher_is_better = None  # throughput is better high, overhead low
    full_state_update = True

    def __init__(self, rounds: int = 21, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rounds = checks.integer("rounds", rounds, 1)
        self._pair: tuple[Callable[[Tensor], Any], ...] = ()
        self._images: Tensor | None = None

    def update(
        self, network: Callable[[Tensor], Any], plain: Callable[[Tensor], Any], images: Tensor
    ) -> None:
        """Take the first batch; later ones are left out.

        Args:
            network, plain: take the images; they run as they are, in their own mode.
            images: ``[B, C, H, W]``, on the device of both.

        Raises:
            TypeError: images that are no tensor.
        """
        checks.tensor("images", images)
        if self._images is None and len(images) > 0:
            self._pair, self._images = (network, plain), images

    def compute(self) -> Speed:
        """Scalars, float32, without gradients of what runs; NaN before the first batch."""
        images = self._images
        if images is None:
            return Speed(*torch.full((3,), torch.nan, device=self.device))
        # What networks draw as they run leaves torch's generators as they were.
        devices = [images.device] if images.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for run in self._pair * _WARM_UP:
                _seconds(run, images)
            took: tuple[list[float], list[float]] = ([], [])
            for number in range(self.rounds):
                for which in (number % 2, 1 - number % 2):
                    took[which].append(_seconds(self._pair[which], images))
        ratios = [network / plain for network, plain in zip(*took, strict=True)]
        speeds = [len(images) / statistics.median(times) for times in took]
        return Speed(*torch.tensor([*speeds, statistics.median(ratios)], device=self.device))

    def join(self, to: int | None = None, group: Any = None) -> None:
        """Nothing is taken in: a rank measures itself."""

    def reset(self) -> None:
        """As before the first batch."""
        super().reset()
        self._pair, self._images = (), None


def _seconds(run: Callable[[Tensor], Any], images: Tensor) -> float:
    """Of one run, until the device is done."""
    _wait(images.device)
    start = time.perf_counter()
    run(images)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
