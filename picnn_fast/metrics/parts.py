"""Whether filters stand for object parts: location instability and part interpretability."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.backbones import ReceptiveField
from picnn_fast.metrics.bootstrap import PerImageMetric
from picnn_fast.metrics.ranks import all_reduce, by_filters, gather_rows
from picnn_fast.metrics.thresholds import kth_greatest
from picnn_fast.reference.masking import add_by_label

# Elements that compute() works on at a time.
_BLOCK = 2**22
_MEMORY_LIMIT = 2**32
# Elements of resamples that are worked on at a time: few enough for a cache.
_RESAMPLED = 2**20
# Resamples of a figure that costs much.
_FEWEST = 100
# Standard deviations of how many images a resample draws of some, which are at most their root.
_MARGIN = 8
# A pixel whose centre lies on the rim of a round field belongs to it, whatever the rounding.
_RIM = 1 + 1e-9


class _PartMetric(PerImageMetric):
    """What both metrics share: filters, their receptive field, categories of images."""

    labels: list[Tensor]

    def __init__(
        self, num_filters: int, receptive_field: ReceptiveField, num_classes: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        if not isinstance(receptive_field, ReceptiveField):
            raise TypeError(
                f"receptive_field: got {type(receptive_field).__name__}, want a ReceptiveField,"
                " as backbones.receptive_field gives"
            )
        self.receptive_field = receptive_field
        self.add_rows("labels", dtype=torch.int64)
        self._per_filter = torch.full((num_filters,), math.nan, dtype=torch.float64)

    def per_filter(self) -> Tensor:
        """The value of each filter ``[N]``, float64 on the CPU; NaN where it has none."""
        self.compute()
        return self._per_filter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Add a batch as ``update`` does, and return the value of this batch alone.

        Raises:
            TypeError, ValueError: as ``update`` does. The metric is then as it was before.
        """
        # What follows takes the images so far out of the metric.
        self._check(*args, **kwargs)
        value: Tensor = super().forward(*args, **kwargs)
        return value

    def _check(self, maps: Tensor, annotations: Tensor, labels: Tensor | None = None) -> None:
        """Refuse a batch."""
        raise NotImplementedError

    def _check_maps(self, maps: Tensor, labels: Tensor | None) -> None:
        self.receptive_field.check_maps(maps)
        if maps.shape[1] != self.num_filters:
            raise ValueError(
                f"maps: got {maps.shape[1]} filters, want {self.num_filters}, num_filters"
            )
        checks.holds(
            "maps",
            maps.isfinite().all(),
            lambda: "NaN or infinity",
            "finite activations",
        )
        if labels is not None:
            checks.labels("labels", labels, len(maps), self.num_classes)
        elif self.num_classes > 1:
            raise ValueError(
                f"labels: got None with num_classes={self.num_classes}, want [B] integers"
            )

    def _classes(self, maps: Tensor, labels: Tensor | None) -> Tensor:
        return torch.zeros(len(maps), dtype=torch.int64) if labels is None else labels

    def _mean(self) -> Tensor:
        """Over the filters that have a value; float32 where there is no float64."""
        return self._per_filter.nanmean().to(self.device, self.wide)


class LocationInstability(_PartMetric):
    """How much the place of a filter's peak wanders relative to landmarks of the object.

    D_{f,k} is the standard deviation, over images that show landmark k, of the distance between
    the centre of the peak's receptive field and the landmark, divided by the diagonal of the
    image; over the ``images`` of them in which filter f peaks highest. A filter's value is the
    mean over landmarks; with several categories that of the category for which it is least. The
    metric is the mean over filters: the lower, the more a filter keeps to one part.

    The deviation is that of a sample (divisor n - 1), as in the authors' published code; the text
    says no more than "variation". A filter and landmark with fewer than two images do not count;
    NaN where none counts.

    Of equal peaks (a filter that does not fire peaks at 0) the image seen first counts, and that
    of the lower rank. Batches of any size give the same, bit for bit, and so do ranks together
    where no peaks are equal. Of every image the peaks, their places and the landmarks are kept in
    single precision, ``12 · N + 8 · L + 8`` bytes, however many categories there are. Resamples
    cost what they look at, N · L · about 200 images a category: some 10^9 places are looked at in
    all, but 100 resamples at least.

    Args:
        num_filters: N.
        num_landmarks: L.
        receptive_field: of the maps, see ``backbones.receptive_field``.
        num_classes: K; 1 takes all images as of one category.
        images: most images for a filter, category and landmark, >= 2; 100 in the paper.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 5.2.2.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import LocationInstability
        >>> from picnn_fast.backbones import receptive_field
        >>> field = receptive_field(torch.nn.Conv2d(3, 2, 4, stride=4), image_size=32)
        >>> metric = LocationInstability(2, 1, field)
        >>> maps = torch.zeros(2, 2, 8, 8)  # of two images
        >>> maps[0, :, 1, 1] = maps[1, 0, 1, 2] = maps[1, 1, 1, 6] = 1
        >>> metric.update(maps, landmarks=torch.tensor([[[8.0, 8.0]], [[12.0, 8.0]]]))
        >>> metric.per_filter()  # the first filter peaks at the same place beside the landmark
        tensor([0.0000, 0.1768], dtype=torch.float64)
    """

    higher_is_better = False
    resamples_lie_aside = True  # the least over categories, of images that repeat one another

    peaks: list[Tensor]
    centres: list[Tensor]
    landmarks: list[Tensor]

    def __init__(
        self,
        num_filters: int,
        num_landmarks: int,
        receptive_field: ReceptiveField,
        *,
        num_classes: int = 1,
        images: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_filters, receptive_field, num_classes, **kwargs)
        self.num_landmarks = checks.integer("num_landmarks", num_landmarks, 1)
        self.images = checks.integer("images", images, 2)
        self.add_rows("peaks", num_filters, dtype=torch.float32)
        self.add_rows("centres", num_filters, 2, dtype=torch.float32)
        self.add_rows("landmarks", num_landmarks, 2, dtype=torch.float32)
        self._deviations = torch.empty(0)
        self._categories = torch.empty(0)

    @property
    def _ranks(self) -> int:
        """By then next to every resample has drawn ``images`` of the images with highest peaks."""
        return self.images + _MARGIN * math.isqrt(self.images)

    @property
    def most_resamples(self) -> int:  # type: ignore[override]
        """Such that a billion places are looked at, or 100."""
        images = self.rows("labels").bincount().clamp_max(self._ranks).sum()
        return max(_FEWEST, 10**9 // max(1, self.num_filters * self.num_landmarks * int(images)))

    def update(self, maps: Tensor, landmarks: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch of images.

        Args:
            maps: ``[B, N, h, w]`` after the activation or mask, any floating dtype, on any device.
            landmarks: ``[B, L, 2]`` (x, y) in pixels of the image, any floating dtype; NaN where
                the image does not show the landmark.
            labels: ``[B]`` integers in [0, K); may be None where K is 1.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, maps or landmarks not finite, labels out of range (on a
                GPU values are a device-side assert). The metric is then as it was before.
        """
        self._check(maps, landmarks, labels)
        peaks, centres = self.receptive_field.peaks(maps)
        labels = self._classes(maps, labels)
        self.append(peaks=peaks, centres=centres, landmarks=landmarks, labels=labels)

    def compute(self) -> Tensor:
        """Location instability, a share of the diagonal; float64 on the metric's device."""
        shape = (self.num_filters, self.num_classes, self.num_landmarks)
        self._deviations = torch.full(shape, math.nan, dtype=torch.float64)
        for c, _, filters, ranked in self._ranked():
            distances, held = (x[..., : self.images].cpu() for x in ranked[:2])
            distances = distances.double()
            count = held.sum(-1)
            mean = distances.sum(-1) / count
            squares = ((distances - mean[..., None]) ** 2).where(held, 0.0).sum(-1)
            deviations = (squares / (count - 1)).sqrt().where(count > 1, math.nan)
            self._deviations[filters, c] = deviations
        of_category = self._deviations.nanmean(-1).nan_to_num(math.inf)
        least, category = of_category.min(1)
        counts = least < math.inf
        self._per_filter = least.where(counts, math.nan)
        self._categories = category.where(counts, -1)
        return self._mean()

    def deviations(self) -> Tensor:
        """D ``[N, K, L]``, float64 on the CPU; NaN where fewer than two images count."""
        self.compute()
        return self._deviations

    def categories(self) -> Tensor:
        """``[N]`` int64: the category each filter is least unstable for; -1 where none counts."""
        self.compute()
        return self._categories

    def replicate(self, counts: Tensor) -> Tensor:
        """The metric of each resample ``[R]``, with images as often as they are drawn.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        times = counts.T.to(self.device, torch.float32, copy=True)  # [M, R]: whole numbers
        best = torch.full((self.num_filters, len(counts)), math.inf, device=self.device)
        for _, images, filters, (distances, held, order) in self._ranked():
            drawn = times[images]
            ranks = min(len(images), self._ranks)
            some = max(1, _RESAMPLED // (self.num_landmarks * ranks * len(counts)))
            blocks = zip(distances.split(some), held.split(some), order.split(some), strict=True)
            values = [self._resampled(drawn, *block, ranks) for block in blocks]
            best[filters] = torch.minimum(best[filters], torch.cat(values))
        return best.to(self.wide).where(best < math.inf, math.nan).nanmean(0)

    def _resampled(
        self, drawn: Tensor, distances: Tensor, held: Tensor, order: Tensor, ranks: int
    ) -> Tensor:
        """Mean deviation ``[n, R]`` over landmarks, infinite where there is none.

        Args:
            drawn: ``[M, R]``, how often each of the category's images is drawn.
            distances, held, order: ``[n, L, M]`` as of ``_ranked``.
            ranks: how many of M to look at first.
        """
        times = drawn[order[..., :ranks]]  # [n, L, ranks, R]
        upto = times.cumsum(-2)
        # A landmark that few images show is at its end before.
        short = upto[..., -1, :] < self.images
        if ranks < order.shape[-1] and (short & held[..., ranks, None]).any():
            return self._resampled(drawn, distances, held, order, order.shape[-1])
        room = upto.sub_(times).neg_().add_(self.images).clamp_(min=0)
        taken = torch.minimum(times, room, out=room)
        shown = held[..., :ranks].float()
        # About a value near the mean, so that squares lose no digits; 0 where nothing is shown,
        # which comes last.
        about = (distances[..., :ranks] - distances[..., :1]).float() * shown
        count, first, second = (torch.stack([shown, about, about.square()], -2) @ taken).unbind(-2)
        squares = (second - first * first / count).clamp_min(0)
        deviations = (squares / (count - 1)).sqrt().where(count > 1, math.nan)
        return deviations.nanmean(1).nan_to_num(math.inf)

    def _ranked(self) -> Iterator[tuple[int, Tensor, slice, tuple[Tensor, Tensor, Tensor]]]:
        """By category and block of n filters, the M images of the category by their peaks.

        Yields:
            category, its images ``[M]``, the filters, and of these ``[n, L, M]`` from the highest
            peak down: the distance from the landmark, a share of the diagonal, 0 where the image
            does not show it; whether it does; which of the M images it is.
        """
        names = ("peaks", "centres", "landmarks", "labels")
        peaks, centres, landmarks, labels = map(self.rows, names)
        diagonal = math.hypot(*self.receptive_field.image_size)
        for c in labels.unique().tolist():
            images = (labels == c).nonzero()[:, 0]
            points = landmarks[images]
            shown = ~points.isnan().any(-1).T
            some = max(1, _BLOCK // (self.num_landmarks * len(images)))
            for first in range(0, self.num_filters, some):
                filters = slice(first, first + some)
                scores = peaks[images, filters].T[:, None].where(shown, -math.inf)
                scores, order = scores.sort(stable=True, descending=True)
                held = scores > -math.inf
                row, column = (torch.arange(n, device=order.device) for n in order.shape[:2])
                offsets = centres[images[order], first + row[:, None, None]]
                offsets = offsets - points[order, column[:, None]]
                distances = (offsets.norm(dim=-1) / diagonal).where(held, 0.0).to(self.wide)
                yield c, images, filters, (distances, held, order)

    def _check(self, maps: Tensor, landmarks: Tensor, labels: Tensor | None = None) -> None:
        self._check_maps(maps, labels)
        checks.floating("landmarks", landmarks)
        wanted = (len(maps), self.num_landmarks, 2)
        if tuple(landmarks.shape) != wanted:
            raise ValueError(
                f"landmarks: got shape {tuple(landmarks.shape)}, want {wanted}: the batch of maps,"
                " num_landmarks, (x, y)"
            )
        hidden = landmarks.isnan()
        whole = (hidden[..., 0] == hidden[..., 1]).all() & ~landmarks.isinf().any()
        checks.holds(
            "landmarks",
            whole,
            lambda: "infinity, or NaN in one of x and y",
            "pixels, or NaN for both x and y",
        )


class PartInterpretability(_PartMetric):
    """How often a filter's strongest activations cover one part of the object.

    A filter's activations above its threshold T_f are valid, the ``top`` share of all positions of
    all images: as near as a whole number of positions comes, at least one, fewer where values are
    equal. The valid positions' fields, laid over one another, are the filter's region in the
    image. It is associated with part k where IoU of region and part > ``iou``. P_{f,k} is the share
    of the images showing part k in which it is; P_f = max over k; the metric is the mean of P_f.

    With several categories, each filter first takes the one whose images activate it most (mean of
    Σ_ij x_ij); threshold and P then are over images of that category alone.

    Fields are round (the paper's footnote 5), about the centres of receptive fields. The paper
    leaves their size open. The theoretical field of a deep network is as large as the image, and
    one so large could never have an IoU of 0.2 with a part; so the default is the effective one,
    ``ReceptiveField.diameters``: 62 pixels for AlexNet's and VGG-16's last convolution, of 163 and
    196. Resizing maps as Bau et al. do would draw regions of about two strides, whatever lies
    below the maps.

    Order, batches and ranks make no difference. All maps and masks are kept, ``4 · N · h · w +
    P · H · W / 8`` bytes an image, for the threshold is not known before the last image; then N · P
    bytes more say which parts were found. Over ranks each keeps its own: for thresholds a rank is
    sent as many maps as it has, of some filters and all images, and what is gathered are the N · P
    bytes an image.

    Args:
        num_filters: N.
        num_parts: P.
        receptive_field: of the maps, see ``backbones.receptive_field``.
        num_classes: K; 1 takes all images as of one category.
        top: share of activations that are valid, in (0, 1).
        iou: of region and part, that association wants more than; in (0, 1).
        diameter: of the round fields in pixels, >= √2; None takes the effective one.
        memory_limit: in bytes: ``update`` refuses images with which ``compute`` would need more on
            this process; what was found, and some 200 MB, are not counted. 4 GiB are enough for
            some 5,000 images of 224 pixels with 512 maps of 14 x 14 on each rank.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 5.2.1;
        Bau, Zhou, Khosla, Oliva, Torralba, "Network Dissection", CVPR 2017.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import PartInterpretability
        >>> from picnn_fast.backbones import receptive_field
        >>> field = receptive_field(torch.nn.Conv2d(3, 2, 4, stride=4), image_size=32)
        >>> metric = PartInterpretability(2, 1, field, top=0.02)
        >>> maps, masks = torch.zeros(4, 2, 8, 8), torch.zeros(4, 1, 32, 32, dtype=torch.bool)
        >>> masks[:, :, :8, :8] = True
        >>> maps[:, 0, 1, 1] = 1  # within the part in every image
        >>> maps[:, 1, 6, 6] = 1  # elsewhere
        >>> metric.update(maps, masks)
        >>> metric.compute(), metric.per_filter()
        (tensor(0.5000, dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """

    higher_is_better = True

    maps: list[Tensor]
    masks: list[Tensor]

    def __init__(
        self,
        num_filters: int,
        num_parts: int,
        receptive_field: ReceptiveField,
        *,
        num_classes: int = 1,
        top: float = 0.005,
        iou: float = 0.2,
        diameter: float | None = None,
        memory_limit: int = _MEMORY_LIMIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_filters, receptive_field, num_classes, **kwargs)
        self.num_parts = checks.integer("num_parts", num_parts, 1)
        self.top = checks.share("top", top)
        self.iou = checks.share("iou", iou)
        if diameter is not None and checks.positive("diameter", diameter) < math.sqrt(2):
            raise ValueError(
                f"diameter: got {diameter}, want at least √2 pixels, which hold one, or None"
            )
        self.diameters = (
            receptive_field.diameters() if diameter is None else (float(diameter), float(diameter))
        )
        self.memory_limit = checks.integer("memory_limit", memory_limit, 1)
        self.add_rows("maps", num_filters, *receptive_field.map_size, dtype=torch.float32)
        pixels = math.prod(receptive_field.image_size)
        self.add_rows("masks", num_parts, math.ceil(pixels / 8), dtype=torch.uint8)
        self._association = torch.empty(0)
        self._categories = torch.empty(0)
        self._found = self._shown = torch.empty(0)
        # Category of each filter, what was found and what is shown in the images of all ranks.
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, maps: Tensor, part_masks: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch of images.

        Args:
            maps: ``[B, N, h, w]`` after the activation or mask, any floating dtype, on any device;
                kept and compared in single precision.
            part_masks: ``[B, P, H, W]`` bool at the size of the image; empty where the image does
                not show the part. They may overlap.
            labels: ``[B]`` integers in [0, K); may be None where K is 1.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, maps not finite (on a GPU a device-side assert), labels
                out of range, too many images for the memory limit. The metric is then as it was
                before.
        """
        self._check(maps, part_masks, labels)
        masks = _packed(part_masks.to(self.device))
        self.append(maps=maps, masks=masks, labels=self._classes(maps, labels))

    def compute(self) -> Tensor:
        """Part interpretability in [0, 1]; float64 on the metric's device; NaN where none counts.

        1,000 images of 128 pixels with 128 maps of 16 x 16 and 5 parts take some seconds.
        """
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            category, self._found, self._shown = self._joined or self._look()
            self._categories = category.cpu()
            everyone = torch.ones(1, len(self._shown), dtype=self.wide, device=self.device)
            self._association = self._associations(everyone)[0].cpu().double()
        best = self._association.nan_to_num(-1).amax(1)
        self._per_filter = best.where(best >= 0, math.nan)
        return self._mean()

    def replicate(self, counts: Tensor) -> Tensor:
        """The metric of each resample ``[R]``: the share of its images whose part a filter finds.

        A filter's threshold and category stay those of all images, so that its regions do: of so
        many positions the top share ends where it does, whichever images are drawn.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        self.compute()
        counts = counts.to(self.device, self.wide)
        rows = max(1, _BLOCK // (self.num_filters * self.num_parts))
        best = [self._associations(part).nan_to_num(-1).amax(2) for part in counts.split(rows)]
        values = torch.cat(best)
        return values.where(values >= 0, math.nan).nanmean(1)

    def _associations(self, counts: Tensor) -> Tensor:
        """P_{f,k} ``[R, N, P]`` of images so often ``[R, M]``; NaN where none shows the part."""
        size = (len(counts), self.num_filters, self.num_parts)
        labels, category = self.rows("labels"), self._categories.to(counts.device)
        showing = counts.new_zeros(size)
        for c in category.unique().tolist():  # -1 where there is no image, and none shows a part
            images = labels == c
            showing[:, category == c] = (counts[:, images] @ self._shown[images].to(counts))[
                :, None
            ]
        hits = counts.new_zeros(size)
        some = max(1, _BLOCK // self.num_filters // self.num_parts)
        for first in range(0, counts.shape[1], some):
            images = slice(first, first + some)
            found = self._found[images].flatten(1).to(counts)
            hits += (counts[:, images] @ found).view(size)
        return (hits / showing).where(showing > 0, math.nan)

    def association(self) -> Tensor:
        """P_{f,k} ``[N, P]``, float64 on the CPU; NaN where no image shows the part."""
        self.compute()
        return self._association

    def best_part(self) -> Tensor:
        """``[N]`` int64: the part each filter is associated with most; -1 where none is shown."""
        association = self.association().nan_to_num(-1)
        best, part = association.max(1)
        return part.where(best >= 0, -1)

    def categories(self) -> Tensor:
        """``[N]`` int64: the category whose images activate each filter most; -1 without image."""
        self.compute()
        return self._categories

    def join(self, to: int | None = None, group: Any = None) -> None:
        """Take in what the other ranks have seen; all ranks call it.

        Args:
            to: the rank in the group that is to compute, and alone gets what there is; None: every
                rank.
            group: of ``torch.distributed``; None: of all processes.
        """
        labels = gather_rows(self.rows("labels"), None, group)
        assert labels is not None
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            sums, images = (all_reduce(total, "SUM", group) for total in self._sums())
            category = self._category(sums, images)

            def thresholds(maps: Tensor, filters: slice) -> Tensor:
                return self._thresholds([maps], [labels], category[filters])

            of_filters = by_filters(self.rows("maps"), self.num_filters, thresholds, group)
            found, shown = (
                gather_rows(part, to, group) for part in self._hits(category, of_filters)
            )
        if found is not None and shown is not None:
            self._joined = category, found, shown
            self.labels = [labels]

    def unsync(self, should_unsync: bool = True) -> None:
        super().unsync(should_unsync)
        if should_unsync:
            self._joined = None

    def _look(self) -> tuple[Tensor, Tensor, Tensor]:
        """The category of each filter ``[N]``, and ``_hits``."""
        category = self._category(*self._sums())
        thresholds = self._thresholds(_batches(self.maps), _batches(self.labels), category)
        return category, *self._hits(category, thresholds)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Sums of maps over each category's images ``[K, N]``, and how many that are ``[K, 1]``."""
        sums = torch.zeros(
            self.num_classes, self.num_filters, dtype=torch.float64, device=self.device
        )
        images = torch.zeros(self.num_classes, 1, dtype=torch.float64, device=self.device)
        for maps, labels in zip(_batches(self.maps), _batches(self.labels), strict=True):
            add_by_label(sums, labels, maps.sum((2, 3), dtype=torch.float64))
            add_by_label(images, labels, torch.ones_like(labels[:, None], dtype=torch.float64))
        return sums, images

    def _category(self, sums: Tensor, images: Tensor) -> Tensor:
        means = (sums / images).nan_to_num(-math.inf)
        best, category = means.max(0)
        return category.where(best > -math.inf, -1)

    def _thresholds(
        self, maps: Sequence[Tensor], labels: Sequence[Tensor], category: Tensor
    ) -> Tensor:
        """T ``[n]``, over the images of each filter's category.

        Args:
            maps, labels: ``[b, n, h, w]`` and ``[b]`` of all batches.
            category: ``[n]``.
        """
        thresholds = torch.full((len(category),), math.inf, device=self.device)
        for c in category.unique().tolist():
            rows = [(of == c).nonzero()[:, 0] for of in labels]
            total = math.prod(self.receptive_field.map_size) * sum(map(len, rows))
            if total == 0:
                continue
            valid = min(max(round(self.top * total), 1), total - 1)
            filters = (category == c).nonzero()[:, 0]
            thresholds[filters] = kth_greatest(maps, valid + 1, images=rows, filters=filters)
        return thresholds

    def _hits(self, category: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Whether an image has an association ``[M, N, P]``, and shows the part ``[M, P]``."""
        size = (self.seen, self.num_filters, self.num_parts)
        hits = torch.zeros(size, dtype=torch.bool, device=self.device)
        shown = torch.zeros(size[::2], dtype=torch.bool, device=self.device)
        down, across = self._round_field()
        columns = self.receptive_field.map_size[1]
        strides = self.receptive_field.stride
        height, width = self.receptive_field.image_size
        some = max(1, _BLOCK // (height * width))
        batches = zip(*map(_batches, (self.maps, self.masks, self.labels)), strict=True)
        images = ((m[i], p[i], y[i]) for m, p, y in batches for i in range(len(m)))
        for image, (maps, masks, label) in enumerate(images):
            parts = _unpacked(masks, height * width).float()
            area = parts.sum(1)
            shown[image] = area > 0
            valid = (maps.flatten(1) > thresholds[:, None]) & (category == label)[:, None]
            fired = valid.any(1).nonzero()[:, 0]
            for filters in fired.split(some):
                region = torch.zeros(
                    len(filters), height * width, dtype=torch.bool, device=self.device
                )
                for cells in valid[filters].nonzero().split(max(1, _BLOCK // len(down))):
                    row, position = cells[:, :, None].unbind(1)
                    y = position // columns * strides[0] + down
                    x = position % columns * strides[1] + across
                    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                    region.view(-1)[((row * height + y) * width + x)[inside]] = True
                covered = region.float()
                # Whole numbers, exact in single precision below 2**24; their ratio in double.
                overlap = covered @ parts.T
                union = covered.sum(1, keepdim=True) + area - overlap
                hits[image, filters] = (overlap.double() / union.double() > self.iou) & (area > 0)
        return hits, shown

    def _round_field(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the pixels in the round field of position (0, 0), unclipped."""
        axes = [
            torch.arange(math.floor(centre - diameter / 2), math.ceil(centre + diameter / 2))
            for centre, diameter in zip(
                self.receptive_field.first_centre, self.diameters, strict=True
            )
        ]
        down, across = (
            ((axis + 0.5 - centre).double() * (2 / diameter)).square()
            for axis, centre, diameter in zip(
                axes, self.receptive_field.first_centre, self.diameters, strict=True
            )
        )
        rows, columns = (down[:, None] + across <= _RIM).nonzero(as_tuple=True)
        return axes[0][rows].to(self.device), axes[1][columns].to(self.device)

    def _check(self, maps: Tensor, part_masks: Tensor, labels: Tensor | None = None) -> None:
        self._check_maps(maps, labels)
        checks.tensor("part_masks", part_masks)
        if part_masks.dtype != torch.bool:
            raise TypeError(f"part_masks: got dtype {part_masks.dtype}, want torch.bool")
        wanted = (len(maps), self.num_parts, *self.receptive_field.image_size)
        if tuple(part_masks.shape) != wanted:
            raise ValueError(
                f"part_masks: got shape {tuple(part_masks.shape)}, want {wanted}: the batch of"
                " maps, num_parts and image_size of the receptive field"
            )
        self._check_memory(len(maps))

    def _check_memory(self, more: int) -> None:
        """Refuse a batch with which ``compute`` would need more than the limit."""
        images = more + sum(map(len, self.labels))
        field = self.receptive_field
        an_image = 4 * self.num_filters * math.prod(field.map_size)
        an_image += self.num_parts * math.ceil(math.prod(field.image_size) / 8) + 8
        needed = 2 * images * an_image
        if needed > self.memory_limit:
            raise ValueError(
                f"memory_limit: got {images} images of {self.num_filters} maps, for which compute()"
                f" needs about {needed} bytes, want at most {self.memory_limit}; give a higher"
                " memory_limit, or fewer images"
            )


def _batches(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Tensors of a state that is a list, or was joined over ranks."""
    return [state] if isinstance(state, Tensor) else state


def _packed(masks: Tensor) -> Tensor:
    """Bool masks ``[B, P, H, W]`` as bits: ``[B, P, ⌈HW/8⌉]`` uint8."""
    bits = masks.flatten(2).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed: Tensor = (bits << places).sum(-1, dtype=torch.uint8)
    return packed


def _unpacked(packed: Tensor, pixels: int) -> Tensor:
    """``[P, ⌈HW/8⌉]`` uint8 to ``[P, HW]`` of 0 and 1, uint8."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(1)[:, :pixels]
