"""MIS by every estimator, of one set of activations, and what resamples make of it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast import checks, functional
from picnn_fast.metrics.bootstrap import check_counts, resampled_means
from picnn_fast.metrics.mutual_information import MutualInformationScore
from picnn_fast.ops.histogram import MOST_BINS
from picnn_fast.ops.mutual_information import prepare
from picnn_fast.reference.histogram import bins_of
from picnn_fast.reference.masking import add_by_label
from picnn_fast.reference.mutual_information import ross_terms

# Elements that a step may hold beside the activations.
_BLOCK = 2**22


class ScoreEstimates(NamedTuple):
    """MIS in nats, by each estimator of the mutual information.

    Attributes:
        knn: by nearest neighbours, the papers' figure.
        histogram: by counts in bins; too high by about bins / 2M.
        miller_madow: the same with Miller and Madow's correction.
        soft_histogram: by counts shared out between the two nearest bins.
    """

    knn: Tensor
    histogram: Tensor
    miller_madow: Tensor
    soft_histogram: Tensor


class MutualInformationEstimates(MutualInformationScore):
    """MIS by every estimator: how much of the figure is the estimator's.

    The activations are kept once, as ``MutualInformationScore(estimator="knn")`` does, whose score
    ``knn`` is.

    Args:
        num_classes: K.
        n_neighbors: of nearest neighbours.
        random_state: of nearest neighbours: seed of the noise.
        bins: of the histograms.
        **kwargs: of ``MutualInformationScore``.

    Source:
        As of ``functional.mutual_information``.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import MutualInformationEstimates
        >>> labels = torch.arange(400) % 2
        >>> activations = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> activations[:, 0] += 10 * labels
        >>> metric = MutualInformationEstimates(num_classes=2)
        >>> metric.update(activations, labels)
        >>> [round(score.item(), 2) for score in metric.compute()]
        [0.23, 0.27, 0.24, 0.26]
    """

    resamples_lie_aside = True  # of filters that tell nothing, whose least estimate is 0

    def __init__(
        self,
        num_classes: int,
        n_neighbors: int = 3,
        random_state: int = 0,
        *,
        bins: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, n_neighbors, random_state, **kwargs)
        self.bins = checks.integer("bins", bins, 2, MOST_BINS + 1)

    @property
    def seen(self) -> int:
        """M, how many images were seen."""
        return sum(map(len, self.labels))

    def compute(self) -> ScoreEstimates:  # type: ignore[override]
        """Scalars on the metric's device, float64; float32 on MPS.

        Raises:
            ValueError: too few samples, or activations that are not finite.
        """
        knn = super().compute()
        assert self._matrix is not None
        self._matrices = ScoreEstimates(
            self._matrix,
            self._by_blocks(functional.histogram_mutual_information),
            self._by_blocks(
                functional.histogram_mutual_information, bias_correction="miller_madow"
            ),
            self._by_blocks(functional.soft_histogram_mutual_information),
        )
        others = (functional.mutual_information_score(m).to(knn) for m in self._matrices[1:])
        return ScoreEstimates(knn, *others)

    def replicate(self, counts: Tensor) -> ScoreEstimates:
        """Each score of each resample ``[R]``.

        An estimate is the mean, over images, of a term that each of them has: log p(x, y) / p(x)
        p(y) as the estimator has it. What is resampled are these terms, each filter's of the class
        that it tells most about, not the images: an image drawn twice would be its own nearest
        neighbour, at a distance of 0, and empty bins would be more. To first order that is the
        same, for the terms are the influence of each image on what is estimated.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        activations, labels = self._samples()
        check_counts(counts, len(labels))
        self.compute()
        matrices = self._matrices
        of_samples = activations, labels, counts.to(labels.device)
        return ScoreEstimates(
            _resampled(self._knn_terms, None, matrices.knn, *of_samples),
            _resampled(self._hard_terms, 0.0, matrices.histogram, *of_samples),
            _resampled(self._hard_terms, -math.inf, matrices.miller_madow, *of_samples),
            _resampled(self._soft_terms, 0.0, matrices.soft_histogram, *of_samples),
        )

    def _by_blocks(self, estimate: Callable[..., Tensor], **options: Any) -> Tensor:
        """m ``[K, N]`` of a histogram, by blocks of filters."""
        activations, labels = self._samples()
        some = max(1, _BLOCK // (self.bins * self.num_classes))
        blocks = [
            estimate(part, labels, self.num_classes, bins=self.bins, **options)
            for part in activations.split(some, 1)
        ]
        return torch.cat(blocks, 1)

    def _knn_terms(self, activations: Tensor, labels: Tensor, classes: Tensor) -> Iterator[Tensor]:
        k = min(self.n_neighbors, len(labels))
        some = max(1, _BLOCK // len(labels))
        rest = classes
        for values in prepare(activations, self.random_state):
            for part in values.split(some):
                own, rest = rest[: len(part)], rest[len(part) :]
                part = part.to(labels.device)
                terms = torch.empty_like(part)
                for c in own.unique().tolist():
                    terms[own == c] = ross_terms(part[own == c], (labels == c).long(), k)
                yield terms.T

    def _hard_terms(self, activations: Tensor, labels: Tensor, classes: Tensor) -> Iterator[Tensor]:
        for x, own in self._blocks(activations, labels, classes):
            bins = bins_of(x, *x.aminmax(dim=0), self.bins)
            cells = (torch.arange(x.shape[1], device=x.device) * self.bins + bins) * 2 + own
            size = (x.shape[1], self.bins, 2)
            counts = cells.flatten().bincount(minlength=math.prod(size)).view(size)
            yield _log_ratios(counts).flatten()[cells]

    def _soft_terms(self, activations: Tensor, labels: Tensor, classes: Tensor) -> Iterator[Tensor]:
        for x, own in self._blocks(activations, labels, classes):
            least, most = x.aminmax(dim=0)
            place = (x - least) / ((most - least) / (self.bins - 1)).where(most > least, 1.0)
            below = place.floor().clamp(0, self.bins - 2)
            upper = place - below
            first = torch.arange(x.shape[1], device=x.device) * self.bins
            cells = ((first + below.long()) * 2 + own).flatten()
            counts = x.new_zeros(2 * self.bins * x.shape[1])
            add_by_label(counts, cells, (1 - upper).flatten())
            add_by_label(counts, cells + 2, upper.flatten())
            ratios = _log_ratios(counts.view(-1, self.bins, 2)).flatten()
            terms = (1 - upper) * ratios[cells].view_as(x)
            yield terms + upper * ratios[cells + 2].view_as(x)

    def _blocks(
        self, activations: Tensor, labels: Tensor, classes: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Activations ``[M, n]`` float64, and whether each is of its filter's class, 0 or 1."""
        some = max(1, _BLOCK // len(labels))
        for part, of in zip(activations.split(some, 1), classes.split(some), strict=True):
            yield part.double(), (labels[:, None] == of).long()


def _log_ratios(counts: Tensor) -> Tensor:
    """What a sample of each cell adds to the plug-in estimate: log p(b, y) / p(b) p(y).

    Args:
        counts: ``[N, bins, K]``, hard or soft.

    Returns:
        ``[N, bins, K]`` float64, in nats; 0 where no sample is.
    """
    counts = counts.double()
    some = counts > 0
    total = counts.sum((1, 2), keepdim=True)
    apart = counts.sum(2, keepdim=True) * counts.sum(1, keepdim=True)
    return torch.where(some, counts * total / torch.where(some, apart, 1), 1.0).log()


def _resampled(
    terms_of: Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]],
    floor: float | None,
    matrix: Tensor,
    activations: Tensor,
    labels: Tensor,
    counts: Tensor,
) -> Tensor:
    """The score of each resample ``[R]``.

    Args:
        terms_of: activations, labels and the class of each filter to the terms of each image
            ``[M, n]``, by blocks of filters; NaN where an image is left out.
        floor: of an estimate; None: 0, and the matrix tells those below no more.
        matrix: m ``[K, N]`` of all images.
        activations: ``[M, N]``.
        labels: ``[M]``.
        counts: ``[R, M]``.
    """
    best, classes = (x.to(labels.device) for x in matrix.double().max(0))
    total = torch.zeros(len(counts), dtype=torch.float64, device=labels.device)
    for terms in terms_of(activations, labels, classes):
        value, best = best[: terms.shape[1]], best[terms.shape[1] :]
        mean = terms.nanmean(0)
        if floor is None:
            value = mean + (~terms.isnan()).sum(0).double().digamma()
        total += (value + resampled_means(terms, counts) - mean).clamp_min(floor or 0.0).sum(1)
    return total / matrix.shape[1]
