"""Mutual information between filters and classes, and its score MIS."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from picnn_fast.ops import checks

# A progress bar appears where the work will take longer than this.
_SECONDS_WITHOUT_BAR = 3.0


def _classes(num_classes: int) -> Iterator[int]:
    """0 … num_classes - 1; once the first has shown that they take long, with a progress bar."""
    start = time.monotonic()
    yield 0
    seconds = (time.monotonic() - start) * (num_classes - 1)
    bar = Progress(
        *Progress.get_default_columns(),
        console=Console(stderr=True),
        transient=True,
        disable=seconds < _SECONDS_WITHOUT_BAR or checks.rank(None) != 0,
    )
    with bar:
        task = bar.add_task("mutual information", total=num_classes, completed=1)
        for label in range(1, num_classes):
            yield label
            bar.advance(task)


class MutualInformationScore(Metric):
    """MIS: how much each filter tells about the class it tells most about (CSG section 4.1).

    m[c, i] is the mutual information, in nats, between filter i's pooled activation and 1[y = c];
    MIS = mean over filters of max over classes of m. Estimated by nearest neighbours (Ross 2014):
    exactly ``sklearn.feature_selection.mutual_info_classif(activations, labels == c,
    discrete_features=False, n_neighbors=n_neighbors, random_state=random_state)`` on the whole
    matrix ``[M, N]`` in float64, once a class.

    Scikit-learn scales each filter by its standard deviation and adds noise of about 1e-10, drawn
    for the whole matrix from ``random_state``: the same for every class. It only breaks ties, but
    there are many where a ReLU leaves zeros. So m is reproduced exactly by the same samples in the
    same order; a filter scored alone, or samples in another order (as when ranks are joined),
    differ slightly.

    Takes O(K · N · M log M): about 34 s for M = 10,000, N = 128, K = 10 on one core. Work of more
    than a few seconds shows a progress bar on stderr.

    Args:
        num_classes: K.
        n_neighbors: neighbours a point is compared with; 3 in the papers.
        random_state: seed of the noise.
        **kwargs: of ``torchmetrics.Metric``.

    Source:
        Liang et al., "Training Interpretable CNNs by Differentiating Class-Specific Filters",
        ECCV 2020, section 4.1; Ross, "Mutual Information between Discrete and Continuous Data
        Sets", PLoS ONE 9(2), 2014.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import MutualInformationScore
        >>> labels = torch.arange(40) % 2
        >>> activations = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> activations[:, 0] += 10 * labels
        >>> metric = MutualInformationScore(num_classes=2)
        >>> metric.update(activations, labels)
        >>> metric.matrix().shape, (metric.matrix()[:, 0] > 0.6).all().item()
        (torch.Size([2, 3]), True)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    activations: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self, num_classes: int, n_neighbors: int = 3, random_state: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        least = {"num_classes": 1, "n_neighbors": 1, "random_state": 0}
        given = {
            "num_classes": num_classes,
            "n_neighbors": n_neighbors,
            "random_state": random_state,
        }
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {type(value).__name__}, want an int")
            if value < least[name]:
                raise ValueError(f"{name}: got {value}, want an int >= {least[name]}")
        if random_state >= 2**32:
            raise ValueError(f"random_state: got {random_state}, want an int below 2**32")
        self.num_classes = num_classes
        self.n_neighbors = n_neighbors
        self.random_state = random_state
        self._matrix: Tensor | None = None
        self.add_state("activations", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, activations: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            activations: ``[B, N]`` maps averaged over their positions, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.floating("activations", activations)
        if activations.ndim != 2:
            raise ValueError(
                f"activations: got shape {tuple(activations.shape)}, want [samples, filters]:"
                " maps averaged over their positions"
            )
        if self.activations and activations.shape[1] != self.activations[0].shape[1]:
            raise ValueError(
                f"activations: got {activations.shape[1]} filters, want"
                f" {self.activations[0].shape[1]} as in the batches before"
            )
        checks.labels("labels", labels, len(activations), self.num_classes)
        self.activations.append(activations.detach())
        self.labels.append(labels.to(torch.int64))

    def compute(self) -> Tensor:
        """MIS in nats: a scalar on the metric's device, float64; float32 on MPS.

        Raises:
            ValueError: fewer than 3 samples, or activations that are not finite.
        """
        self._matrix = self._mutual_information()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return self._matrix.amax(0).mean().to(self.device, dtype)

    def matrix(self) -> Tensor:
        """m ``[K, N]`` in nats, float64 on the CPU: mutual information of filters and classes.

        A class without samples has 0. Computed once with the score, over all ranks.
        """
        self.compute()
        assert self._matrix is not None
        return self._matrix

    def _mutual_information(self) -> Tensor:
        samples = sum(len(labels) for labels in self.labels)
        if samples < 3:
            raise ValueError(f"activations: got {samples} samples, want at least 3")
        x = dim_zero_cat(self.activations).cpu().double().numpy()
        y = dim_zero_cat(self.labels).cpu().numpy()
        if not np.isfinite(x).all():
            raise ValueError("activations: got values that are not finite, want finite activations")
        rows = [
            mutual_info_classif(
                x,
                y == label,
                discrete_features=False,
                n_neighbors=self.n_neighbors,
                random_state=self.random_state,
            )
            for label in _classes(self.num_classes)
        ]
        return torch.from_numpy(np.stack(rows))
