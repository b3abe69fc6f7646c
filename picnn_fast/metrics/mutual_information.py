"""Mutual information between filters and classes, and its score MIS."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from picnn_fast import checks, functional
from picnn_fast.metrics.ranks import JoinedMetric, all_reduce, gather_objects, gather_rows, world
from picnn_fast.ops import histogram
from picnn_fast.ops.mutual_information import plug_in
from picnn_fast.reference.histogram import widen

# What compute() takes: the samples as they came, joined, and in double precision a block of filters
# at a time, of as many bytes again or this many; bytes a sample for each thread; and what a step of
# the preparation holds.
_BLOCK = 2**26
_SCRATCH = 128
_STEP = 24 * 2**20
_MEMORY_LIMIT = 2**32
# Share of its value by which a filter may vary, and count as constant: rounding of float32 that
# went through a network in batches of several sizes.
_ROUNDING = 2**-17


class MutualInformationScore(JoinedMetric):
    """MIS: how much each filter tells about the class it tells most about (CSG section 4.1).

    m[c, i] is the mutual information, in nats, between filter i's pooled activation and 1[y = c];
    MIS = mean over filters of max over classes of m. See ``functional.mutual_information``.

    - ``estimator="knn"``, nearest neighbours, is the papers' figure, that of
      ``sklearn.feature_selection.mutual_info_classif`` to 1e-9. It keeps all samples. M = 50,000,
      N = 512 takes some seconds on two cores, however many classes there are. Ties are broken by
      noise of about 1e-10, drawn for the whole matrix: m is reproduced exactly by the same samples
      in the same order; a filter scored alone, or samples in another order (as when ranks are
      joined), differ slightly.
    - ``estimator="histogram"`` keeps counts, ``8 · N · bins · K`` bytes however many samples there
      are. Order, batches and ranks make no difference. Too high by about bins / 2M.

    Over ranks the score is that of all their samples, of "knn" in the order of the ranks. What they
    gather, "knn" alone, is the samples of all, once: M · N of their dtype, 4 bytes of float32, and
    8 M of labels, on each rank that computes; of "histogram" counts are added up. Samples are kept
    in their own dtype, whatever dtype the metric is cast to.

    Args:
        num_classes: K, below 2**31.
        n_neighbors: of "knn": neighbours a point is compared with; 3 in the papers.
        random_state: of "knn": seed of the noise.
        estimator: "knn" or "histogram".
        bins: of "histogram", 2 to 2**24.
        bias_correction: of "histogram": None or "miller_madow".
        memory_limit: of "knn", in bytes: ``update`` refuses samples with which ``compute`` would
            need more on this process if every rank had as many.
            4 GiB are enough for some 50,000 samples of 6,000 filters in float32.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or an option of the other estimator.

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
    table: Tensor

    def __init__(
        self,
        num_classes: int,
        n_neighbors: int = 3,
        random_state: int = 0,
        *,
        estimator: Literal["knn", "histogram"] = "knn",
        bins: int = 64,
        bias_correction: Literal["miller_madow"] | None = None,
        memory_limit: int = _MEMORY_LIMIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        checks.one_of("estimator", estimator, ("knn", "histogram"))
        self.num_classes = checks.integer("num_classes", num_classes, 1, 2**31)
        what = f"estimator={estimator!r}, which has no such option"
        if estimator == "knn":
            checks.left_out(what, bins=(bins, 64), bias_correction=(bias_correction, None))
        else:
            checks.left_out(
                what,
                n_neighbors=(n_neighbors, 3),
                random_state=(random_state, 0),
                memory_limit=(memory_limit, _MEMORY_LIMIT),
            )
        self.estimator = estimator
        self.n_neighbors = checks.integer("n_neighbors", n_neighbors, 1)
        # A generator would give another matrix each time.
        self.random_state = checks.integer("random_state", random_state, 0, 2**32)
        self.bins = checks.integer("bins", bins, 2, histogram.MOST_BINS + 1)
        if bias_correction is not None:
            checks.one_of("bias_correction", bias_correction, ("miller_madow",))
        self.bias_correction = bias_correction
        self.memory_limit = checks.integer("memory_limit", memory_limit, 1)
        self._matrix: Tensor | None = None
        self._warned = False
        if estimator == "knn":
            self.add_state("activations", [], dist_reduce_fx="cat")
            self.add_state("labels", [], dist_reduce_fx="cat")
        else:
            # Counts and range in one, for they merge together; empty before the first sample.
            merge = functools.partial(_merge, bins=bins, classes=num_classes)
            self.add_state("table", torch.zeros(0, dtype=torch.int64), dist_reduce_fx=merge)

    def update(self, activations: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            activations: ``[B, N]`` maps averaged over their positions, any floating dtype, on any
                device.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, labels out of range; too many samples for the memory
                limit ("knn"); NaN or infinity ("histogram"; on a GPU a device-side assert). The
                metric is then as it was before.
        """
        self._check(activations, labels)
        if self.estimator == "histogram":
            self._count(activations.detach().to(self.device), labels.to(self.device, torch.int64))
            return
        # Copies: the caller may write into both before they are read again.
        self.activations.append(activations.detach().to(self.device, copy=True))
        self.labels.append(labels.to(self.device, torch.int64, copy=True))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """Add a batch as ``update`` does, and return the score of this batch alone.

        Raises:
            TypeError, ValueError: as ``update`` and ``compute`` do. The metric is then as it was
                before.
        """
        # What follows takes the samples so far out of the metric while it scores the batch.
        self._check(activations, labels)
        before = {k: list(v) if isinstance(v, list) else v for k, v in self.__dict__.items()}
        try:
            score: Tensor = super().forward(activations, labels)
        except Exception:
            self.__dict__.update(before)
            raise
        return score

    def compute(self) -> Tensor:
        """MIS in nats: a scalar on the metric's device, float64; float32 on MPS.

        Raises:
            ValueError: too few samples, see ``functional.mutual_information``, or activations that
                are not finite.

        Warns:
            UserWarning: once, of filters that are constant over the samples.
        """
        self._matrix = self._mutual_information().cpu()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return functional.mutual_information_score(self._matrix).to(self.device, dtype)

    def matrix(self) -> Tensor:
        """m ``[K, N]`` in nats, float64 on the CPU: mutual information of filters and classes.

        A class without samples has 0. Computed once with the score, over all ranks.
        """
        self.compute()
        assert self._matrix is not None
        return self._matrix

    def _mutual_information(self) -> Tensor:
        if self.estimator == "histogram":
            counts, minimum, maximum = _parts(self.table, self.bins, self.num_classes)
            some = bool((minimum <= maximum).any())  # a batch of no sample leaves a table too
        else:
            some = self._filters() > 0
        if not some:
            raise ValueError("activations: got no sample, want at least one")
        if self.estimator == "histogram":
            self._warn_of_constant(minimum, maximum)
            few = max(1, 2**20 // (self.bins * self.num_classes))
            return torch.cat(
                [plug_in(block, "class", self.bias_correction) for block in counts.split(few)], 1
            )
        activations, labels = self._samples()
        matrix = functional.knn_mutual_information(
            activations,
            labels,
            self.num_classes,
            n_neighbors=self.n_neighbors,
            random_state=self.random_state,
        )
        self._warn_of_constant(activations.amin(0).double(), activations.amax(0).double())
        return matrix

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Activations ``[M, N]`` and labels ``[M]`` of "knn"."""
        parts = [_cat(x) for x in (self.activations, self.labels)]
        if parts[0].device.type not in ("cpu", "cuda"):  # MPS has no float64
            parts = [part.cpu() for part in parts]
        return parts[0], parts[1]

    def _warn_of_constant(self, least: Tensor, most: Tensor) -> None:
        if self._warned:
            return
        constant = most - least <= _ROUNDING * torch.maximum(least.abs(), most.abs())
        count = int(constant.sum())
        if count:
            self._warned = True
            warnings.warn(
                f"activations: {count} of {len(constant)} filters are constant over the samples,"
                " but for rounding: they tell nothing of the classes, and what is estimated of"
                " them is noise",
                stacklevel=2,
            )

    def _filters(self) -> int:
        """N, or 0 before the first sample."""
        if self.estimator == "histogram":
            return self.table.numel() // _row(self.bins, self.num_classes)
        return self.activations[0].shape[1] if self.activations else 0

    def _count(self, activations: Tensor, labels: Tensor) -> None:
        table = self.table
        if table.numel() == 0:
            table = _empty(activations.shape[1], self.bins, self.num_classes, self.device)
        histogram.update(*_parts(table, self.bins, self.num_classes), activations, labels)
        self.table = table

    def _check(self, activations: Tensor, labels: Tensor) -> None:
        """Refuse a batch, but for values of its activations."""
        checks.pooled("activations", activations)
        filters = self._filters()
        if filters and activations.shape[1] != filters:
            raise ValueError(
                f"activations: got {activations.shape[1]} filters, want {filters} as in the"
                " batches before"
            )
        checks.labels("labels", labels, len(activations), self.num_classes)
        if self.estimator == "knn":
            self._check_memory(activations)

    def _check_memory(self, activations: Tensor) -> None:
        """Refuse a batch with which ``compute`` would need more than the limit."""
        samples = len(activations) + sum(map(len, self.labels))
        stored = activations.nbytes + sum(batch.nbytes for batch in self.activations)
        ranks = world(self.process_group)[1]
        samples, stored = ranks * samples, ranks * stored
        elements = samples * activations.shape[1]
        needed = 2 * stored + min(8 * elements, max(stored, _BLOCK)) + min(24 * elements, _STEP)
        needed += _SCRATCH * torch.get_num_threads() * samples
        if needed > self.memory_limit:
            raise ValueError(
                f"memory_limit: got {samples} samples of {activations.shape[1]} filters, for which"
                f" compute() needs about {needed} bytes, want at most {self.memory_limit}; give a"
                " higher memory_limit, or estimator='histogram', which keeps no samples"
            )

    def join(self, to: int | None = None, group: Any = None) -> None:
        """Take in what the other ranks have seen; all ranks call it.

        Args:
            to: the rank in the group that is to compute, and alone gets what there is; None: every
                rank.
            group: of ``torch.distributed``; None: of all processes.

        Raises:
            ValueError: on every rank, ranks that saw different numbers of filters.
        """
        held = [x.dtype for x in self.activations] if self.estimator == "knn" else []
        facts = gather_objects((self._filters(), held), group)
        widths = sorted({fact[0] for fact in facts} - {0})
        if len(widths) > 1:
            raise ValueError(
                f"activations: got {' and '.join(map(str, widths))} filters on different ranks,"
                " want as many on each"
            )
        if not widths:
            return
        if self.estimator == "histogram":
            self.table = self._joined_table(widths[0], group)
            return
        common = functools.reduce(torch.promote_types, [x for fact in facts for x in fact[1]])
        activations = torch.empty(0, widths[0], dtype=common, device=self.device)
        labels = torch.empty(0, dtype=torch.int64, device=self.device)
        if held:
            activations, labels = map(_cat, (self.activations, self.labels))
        joined = gather_rows(activations.to(common), to, group), gather_rows(labels, to, group)
        if joined[0] is not None and joined[1] is not None:
            self.activations, self.labels = [joined[0]], [joined[1]]

    def _joined_table(self, filters: int, group: Any) -> Tensor:
        """The table of the samples of all ranks."""
        size = self.bins, self.num_classes
        table = self.table
        if table.numel() == 0:
            table = _empty(filters, *size, self.device)
        counts, least, most = _parts(table, *size)
        joined = _empty(filters, *size, self.device)
        all_counts, minimum, maximum = _parts(joined, *size)
        minimum.copy_(all_reduce(least, "MIN", group))
        maximum.copy_(all_reduce(most, "MAX", group))
        wide = widen(counts, least, most, minimum, maximum)
        all_counts.copy_(all_reduce(wide, "SUM", group))
        return joined

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        def keeping_dtype(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(keeping_dtype, exclude_state)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # Tables merge where both have samples.
        other = incoming_state.get("table")
        if other is None or (other.numel() and self.table.numel()):
            super()._reduce_states(incoming_state)
        elif other.numel():
            self.table = other


def _cat(batches: list[Tensor]) -> Tensor:
    """All of them; no copy of a single one."""
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _row(bins: int, classes: int) -> int:
    """Elements of a table for each filter: its counts, minimum and maximum."""
    return bins * classes + 2


def _parts(table: Tensor, bins: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a table: counts ``[N, bins, K]`` int64, minimum and maximum ``[N]`` float64."""
    filters = table.numel() // _row(bins, classes)
    counts, least, most = table.split([filters * bins * classes, filters, filters])
    return (
        counts.view(filters, bins, classes),
        least.view(torch.float64),
        most.view(torch.float64),
    )


def _empty(filters: int, bins: int, classes: int, device: torch.device) -> Tensor:
    """The table of no sample."""
    table = torch.zeros(filters * _row(bins, classes), dtype=torch.int64, device=device)
    _, minimum, maximum = _parts(table, bins, classes)
    minimum.fill_(torch.inf)
    maximum.fill_(-torch.inf)
    return table


def _merge(tables: Tensor, *, bins: int, classes: int) -> Tensor:
    """The table of all samples of ``tables`` ``[R, …]``."""
    parts = [_parts(table, bins, classes) for table in tables]
    merged = torch.zeros_like(tables[0])
    counts, minimum, maximum = _parts(merged, bins, classes)
    minimum.copy_(torch.stack([least for _, least, _ in parts]).amin(0))
    maximum.copy_(torch.stack([most for _, _, most in parts]).amax(0))
    for part in parts:
        counts += widen(*part, minimum, maximum)
    return merged
