"""Whether filters, and all of them together, show where the object is: GradMap, ActivMap, CAM."""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast.metrics.bootstrap import PerImageMetric, resampled_means
from picnn_fast.metrics.ranks import all_reduce, by_filters, gather_objects
from picnn_fast.metrics.thresholds import kth_greatest
from picnn_fast.reference.masking import add_by_label

# Elements that are looked at together.
_BLOCK = 2**22
# Of the maps that are kept for a threshold.
_MEMORY_LIMIT = 2**30
# The published deviation of the smoothing, and the image it was chosen for, in pixels.
_SIGMA, _SIDE = 30, 128


class Localisation(NamedTuple):
    """How well regions find the object.

    Attributes:
        iou: mean intersection over union of region and object, "Avg-IoU".
        precision: share of images in which that is great enough, "AP20" or "AP30".
    """

    iou: Tensor
    precision: Tensor


class _MeanLocalisation(PerImageMetric):
    """A value an image, and whether it is great enough."""

    higher_is_better = True
    strict: ClassVar[bool]

    ious: list[Tensor]

    def __init__(self, iou: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iou = checks.share("iou", iou)
        self.add_rows("ious", dtype=torch.float64)

    def per_image(self) -> Tensor:
        """The IoU of each image seen ``[M]``, float64; NaN where its object mask is empty."""
        return self.rows("ious")

    def compute(self) -> Localisation:
        """Scalars in [0, 1], float64 (float32 on MPS); NaN where no image counts."""
        return Localisation(*(values.nanmean() for values in self._values()))

    def replicate(self, counts: Tensor) -> Localisation:
        """Of each resample, ``[R]``.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return Localisation(*(resampled_means(values, counts) for values in self._values()))

    def _values(self) -> tuple[Tensor, Tensor]:
        ious = self.rows("ious")
        enough = ious > self.iou if self.strict else ious >= self.iou
        return ious, enough.to(ious.dtype).where(~ious.isnan(), math.nan)


class SaliencyLocalisation(_MeanLocalisation):
    """Whether the pixels that move something most are those of the object (GradMap).

    Saliency is divided by its root mean square over the image and smoothed by a Gaussian, whose
    deviation is 30 pixels in an image of 128 and as much of any other's height and width, cut off
    at one deviation, the border reflected. Its region is where that is above 1. IoU of region and
    object is averaged over the saliencies of an image.

    Args:
        iou: of an image, that a success wants at least; in (0, 1).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-Specific Filters", ECCV 2020, section 5.1, as in the authors' published code.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import SaliencyLocalisation
        >>> object_masks = torch.zeros(1, 32, 32, dtype=torch.bool)
        >>> object_masks[:, 8:24, 8:24] = True
        >>> saliency = object_masks[:, None].float()  # of one thing that moves
        >>> metric = SaliencyLocalisation()
        >>> metric.update(saliency, object_masks)
        >>> metric.compute().precision.item()
        1.0
    """

    strict = False

    def __init__(self, *, iou: float = 0.2, **kwargs: Any) -> None:
        super().__init__(iou, **kwargs)

    def update(self, saliency: Tensor, object_masks: Tensor) -> None:
        """Add a batch of images.

        Args:
            saliency: ``[B, F, H, W]`` of F things in each image, at least 0, any floating dtype.
            object_masks: ``[B, H, W]`` bool; an image whose mask is empty does not count.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape.
        """
        checks.floating("saliency", saliency)
        if saliency.ndim != 4 or saliency.shape[1] == 0:
            raise ValueError(
                f"saliency: got shape {tuple(saliency.shape)}, want [B, F, H, W] of one or more"
            )
        _check_masks(object_masks, len(saliency), saliency.shape[2:])
        regions = saliency_maps(saliency) > 1
        self.append(ious=region_ious(regions, object_masks[:, None]).mean(1))


class GradMapLocalisation(SaliencyLocalisation):
    """Whether the pixels that move a class's filters are those of the object (GradMap).

    A class's filters are those of the greatest mean activation over its images, which ``prepare``
    is to see beforehand; ``top_filters`` says which they are, and ``update`` takes their saliency:
    the gradient of a filter's mean activation with respect to the image, its norm over the colours.

    ``reset`` forgets the images of ``update`` alone. Each rank chooses filters by what its own
    ``prepare`` saw, unless all call ``join_prepared`` before the first ``update``.

    Args:
        num_filters: N.
        num_classes: K.
        filters: of each class; all, where there are fewer.
        iou: mean of an image's filters that a success wants at least, in (0, 1).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        As of ``SaliencyLocalisation``.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import GradMapLocalisation
        >>> metric = GradMapLocalisation(num_filters=3, num_classes=2, filters=2)
        >>> pooled, labels = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])
        >>> metric.prepare(pooled, labels)
        >>> metric.top_filters(labels)
        tensor([[0, 2],
                [2, 1]])
    """

    def __init__(
        self,
        num_filters: int,
        num_classes: int,
        *,
        filters: int = 30,
        iou: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(iou=iou, **kwargs)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.filters = min(checks.integer("filters", filters, 1), num_filters)
        # On the device that the first images are added on; MPS has no double precision to move.
        self._sums: Tensor | None = None
        self._images = torch.zeros(num_classes, dtype=torch.int64)

    def prepare(self, pooled: Tensor, labels: Tensor) -> None:
        """Add a batch to the class means.

        Args:
            pooled: ``[B, N]`` sums or means of each map over its positions, any floating dtype.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.pooled("pooled", pooled)
        if pooled.shape[1] != self.num_filters:
            raise ValueError(f"pooled: got {pooled.shape[1]} filters, want {self.num_filters}")
        checks.labels("labels", labels, len(pooled), self.num_classes)
        sums = self._class_sums()
        labels = labels.to(self.device, torch.int64)
        add_by_label(sums, labels, pooled.detach().to(sums))
        self._images += labels.bincount(minlength=self.num_classes).cpu()

    def join_prepared(self, group: Any = None) -> None:
        """Choose filters by what ``prepare`` saw on all ranks, once; all of them call it.

        Args:
            group: of ``torch.distributed``; None: of all processes.
        """
        self._sums = all_reduce(self._class_sums(), "SUM", group)
        self._images = all_reduce(self._images.to(self.device), "SUM", group).cpu()

    def _class_sums(self) -> Tensor:
        """``[K, N]``, what ``prepare`` saw."""
        if self._sums is None:
            shape = (self.num_classes, self.num_filters)
            self._sums = torch.zeros(shape, dtype=self.wide, device=self.device)
        return self._sums

    def top_filters(self, labels: Tensor) -> Tensor:
        """Of each label's class the filters of the greatest mean activation.

        Args:
            labels: ``[B]`` integers in [0, K).

        Returns:
            ``[B, F]`` int64, the greatest first, F as ``filters`` says; of equal ones the first.

        Raises:
            TypeError: labels that are no integers.
            ValueError: labels out of range, or of which ``prepare`` saw no image.
        """
        checks.labels("labels", labels, labels.numel(), self.num_classes)
        if self._sums is None or not (self._images[labels.cpu().long()] > 0).all():
            raise ValueError(
                "labels: got a class of which prepare() saw no image, want classes that it saw"
            )
        # Means of one class lie in the order of its sums.
        order = self._sums.argsort(dim=1, descending=True, stable=True)
        chosen: Tensor = order[:, : self.filters][labels.to(self.device, torch.int64)]
        return chosen


class ActivMapLocalisation(PerImageMetric):
    """Whether a filter's activations cover the object of a class (ActivMap).

    A filter's threshold is its int(``top`` · positions)-th greatest activation over the images,
    which ``prepare`` is to see beforehand. Its region in an image is where its map, resized
    bilinearly, is at least that. A success is an IoU of region and object above ``iou``. A filter
    counts for the class in which its share of successes is greatest, of equal ones that of the
    greater mean IoU, with that share and that mean IoU; the figures are means over filters.

    A filter whose threshold is 0, for it fires in few places, has the whole of every image as its
    region, as in the authors' code.

    It takes two passes: whether a place is in a region hangs on the activations of all images, the
    later ones too, and maps and masks of all are more than can be kept.

    ``prepare`` keeps the maps in single precision until the first ``update``. Where those of all
    images would take more than ``memory_limit``, the thresholds are those of every second, fourth
    … image. ``reset`` forgets the images of ``update`` alone. Each rank has thresholds of what its
    own ``prepare`` saw, unless all call ``join_prepared`` before the first ``update``; a rank keeps
    no more than that many bytes of its own maps then, and is sent as many of the others'.

    Args:
        num_filters: N.
        num_classes: K.
        top: share of a filter's activations, in (0, 1).
        iou: of region and object, that a success wants more than; in (0, 1).
        memory_limit: of maps that are kept, bytes.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-Specific Filters", ECCV 2020, section 5.1, as in the authors' published code, but for
        its last batch, which that writes to the wrong rows.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import ActivMapLocalisation
        >>> maps, object_masks = torch.zeros(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> maps[0, 0, :4, :4] = object_masks[0, :4, :4] = 1  # the second filter never fires
        >>> metric = ActivMapLocalisation(num_filters=2, num_classes=1, top=0.25)
        >>> metric.prepare(maps)
        >>> metric.update(maps, object_masks, torch.tensor([0]))
        >>> iou, precision = metric.compute()
        >>> iou.item(), precision.item()
        (0.625, 0.5)
    """

    higher_is_better = True
    resamples_lie_aside = True

    ious: list[Tensor]
    labels: list[Tensor]
    thresholds: Tensor

    def __init__(
        self,
        num_filters: int,
        num_classes: int,
        *,
        top: float = 0.3,
        iou: float = 0.3,
        memory_limit: int = _MEMORY_LIMIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.top = checks.share("top", top)
        self.iou = checks.share("iou", iou)
        self.memory_limit = checks.integer("memory_limit", memory_limit, 1)
        self.add_rows("ious", num_filters, dtype=torch.float64)
        self.add_rows("labels", dtype=torch.int64)
        self.register_buffer("thresholds", torch.full((num_filters,), math.nan), persistent=False)
        self._begin()

    def _begin(self) -> None:
        self._kept: list[Tensor] = []
        # Of the images that prepare() is shown: the first, among those of all ranks; the next; and
        # that every second, fourth … is kept.
        self._first = self._next = 0
        self._every = 1

    def skip(self, sizes: Sequence[int]) -> list[int]:
        """Count images of ``prepare`` that were given to other ranks; before the first of its own.

        Args:
            sizes: of their batches.

        Returns:
            No image: none of them is wanted.
        """
        self._first = self._next = sum(sizes)
        return []

    def prepare(self, maps: Tensor) -> None:
        """Add a batch to those of which the thresholds are; after an update, to new ones.

        Args:
            maps: ``[B, N, h, w]``, any floating dtype; compared in single precision.

        Raises:
            TypeError: not a tensor of floating dtype.
            ValueError: of another shape, or not finite (on a GPU a device-side assert).
        """
        self._check_maps(maps)
        chosen = (torch.arange(len(maps)) + self._next) % self._every == 0
        self._next += len(maps)
        # A copy: the caller may write into the maps before they are read again.
        self._kept.append(maps.detach()[chosen.to(maps.device)].to(self.device, torch.float32))
        while self._too_many(sum(map(len, self._kept)), maps.shape[1:]):
            self._thin_out(2 * self._every)

    def join_prepared(self, group: Any = None) -> None:
        """Take thresholds of what ``prepare`` saw on all ranks; all of them call it.

        Those of one process that saw all, where ``skip`` told each rank which images are its own.

        Args:
            group: of ``torch.distributed``; None: of all processes.
        """
        size = next((tuple(maps.shape[1:]) for maps in self._kept if len(maps)), None)
        facts = gather_objects((self._next - self._first, self._every, size), group)
        sizes = [size for _, _, size in facts if size is not None]
        if not sizes:
            return
        images, every = sum(fact[0] for fact in facts), max(fact[1] for fact in facts)
        while self._too_many(-(-images // every), sizes[0]):
            every *= 2
        self._thin_out(every)
        own = torch.cat(self._kept) if self._kept else None

        def compute(maps: Tensor, filters: slice) -> Tensor:
            k = max(1, int(self.top * maps[:, 0].numel()))
            return kth_greatest([maps], k)

        self.thresholds.copy_(by_filters(own, self.num_filters, compute, group))
        self._begin()

    def _too_many(self, images: int, size: Sequence[int]) -> bool:
        return images > 1 and images * 4 * math.prod(size) > self.memory_limit

    def _thin_out(self, every: int) -> None:
        """Of the maps that are kept, keep those of every so many images."""
        if every == self._every or not self._kept:
            return
        first = -(-self._first // self._every)  # of those kept, counted from the first of all ranks
        factor = every // self._every
        self._kept = [torch.cat(self._kept)[-first % factor :: factor].clone()]
        self._every = every

    def update(self, maps: Tensor, object_masks: Tensor, labels: Tensor) -> None:
        """Add a batch of images.

        Args:
            maps: ``[B, N, h, w]``, any floating dtype.
            object_masks: ``[B, H, W]`` bool at the size of the image; an image whose mask is empty
                does not count.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, maps not finite, labels out of range, or no image shown to
                ``prepare``.
        """
        self._check_maps(maps)
        _check_masks(object_masks, len(maps))
        checks.labels("labels", labels, len(maps), self.num_classes)
        self._take_thresholds()
        maps, masks = maps.detach().to(self.device, torch.float32), object_masks.to(self.device)
        each = [self._of_image(x, mask) for x, mask in zip(maps, masks, strict=True)]
        ious = torch.stack(each) if each else maps.new_empty(0, self.num_filters)
        self.append(ious=ious, labels=labels)

    def compute(self) -> Localisation:
        """Scalars in [0, 1], float64 (float32 on MPS); NaN where no image counts."""
        everyone = torch.ones(1, self.seen, dtype=torch.int64, device=self.device)
        return Localisation(*(values[0] for values in self._of(everyone)))

    def replicate(self, counts: Tensor) -> Localisation:
        """Of each resample, ``[R]``, by the thresholds of all images.

        A filter's class is chosen anew in each. The best of several gains by chance, so that of few
        images resamples lie above the value itself: an evaluation's interval has their spread about
        it.

        Args:
            counts: ``[R, M]`` int64, how often each image seen is drawn.

        Raises:
            TypeError, ValueError: counts of another dtype or shape.
        """
        self.check_counts(counts)
        return self._of(counts)

    def _check_maps(self, maps: Tensor) -> None:
        checks.floating("maps", maps)
        if maps.ndim != 4 or maps.shape[1] != self.num_filters:
            raise ValueError(
                f"maps: got shape {tuple(maps.shape)}, want [B, {self.num_filters}, h, w]"
            )
        finite = maps.isfinite().all()
        checks.holds("maps", finite, lambda: "NaN or infinity", "finite activations")

    def _take_thresholds(self) -> None:
        if sum(map(len, self._kept)) > 0:
            positions = sum(maps[:, 0].numel() for maps in self._kept)
            k = max(1, int(self.top * positions))
            self.thresholds.copy_(kth_greatest(self._kept, k))
            self._begin()
        elif self.thresholds.isnan().any():
            raise ValueError("maps: got an update before any image was shown to prepare()")

    def _of_image(self, maps: Tensor, mask: Tensor) -> Tensor:
        """IoU of each filter's region and the object, ``[N]``."""
        found = []
        shown = mask.flatten().to(maps.dtype)
        area = shown.sum()
        for filters in torch.arange(self.num_filters).split(max(1, _BLOCK // mask.numel())):
            filters = filters.to(maps.device)
            resized = _resized(maps[filters], mask.shape).flatten(1)
            # As 0 and 1 in place: regions of bool would be read and written twice more.
            regions = torch.ge(resized, self.thresholds[filters, None], out=resized)
            overlap, region = regions @ shown, regions.sum(1)
            found.append((overlap / (region + area - overlap)).where(area > 0, math.nan))
        return torch.cat(found)

    def _of(self, counts: Tensor) -> Localisation:
        chunks = counts.to(self.device).split(
            max(1, _BLOCK // (self.num_classes * self.num_filters))
        )
        parts = [torch.stack(self._of_some(some)) for some in chunks]
        return Localisation(*torch.cat(parts, 1))

    def _of_some(self, counts: Tensor) -> tuple[Tensor, ...]:
        """Mean IoU and share of successes of each resample, ``[r]``."""
        ious, labels = self.rows("ious"), self.rows("labels")
        successes = (ious > self.iou).to(ious.dtype).where(~ious.isnan(), math.nan)
        of_class = [labels == c for c in range(self.num_classes)]
        mean, share = (
            torch.stack([resampled_means(values[i], counts[:, i]) for i in of_class], 1)
            for values in (ious, successes)
        )  # [r, K, N]
        best = share.nan_to_num(-1).amax(1)
        mean = mean.where(share == best[:, None], -1).amax(1)
        # Of a resample without any image no filter counts.
        return tuple(values.where(best >= 0, math.nan).mean(1) for values in (mean, best))


class CAMLocalisation(_MeanLocalisation):
    """Whether class activation maps cover the object (CAM).

    A map is resized bilinearly. Its region are the pixels that are at least the int(``top`` ·
    pixels)-th greatest of the image.

    Args:
        top: share of the pixels, in (0, 1).
        iou: of region and object, that a success wants more than; in (0, 1).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-Specific Filters", ECCV 2020, section 5.1; Zhou et al., "Learning Deep Features for
        Discriminative Localization", CVPR 2016.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import CAMLocalisation
        >>> object_masks = torch.zeros(1, 10, 10, dtype=torch.bool)
        >>> object_masks[0, :3] = True
        >>> metric = CAMLocalisation()
        >>> metric.update(torch.arange(100.0).flip(0).reshape(1, 10, 10), object_masks)
        >>> metric.compute().iou.item()
        1.0
    """

    strict = True

    def __init__(self, *, top: float = 0.3, iou: float = 0.3, **kwargs: Any) -> None:
        super().__init__(iou, **kwargs)
        self.top = checks.share("top", top)

    def update(self, heat: Tensor, object_masks: Tensor) -> None:
        """Add a batch of images.

        Args:
            heat: ``[B, h, w]`` of either sign, any floating dtype: the class activation map of each
                image's true label, up to a positive factor.
            object_masks: ``[B, H, W]`` bool at the size of the image; an image whose mask is empty
                does not count.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape.
        """
        checks.floating("heat", heat)
        if heat.ndim != 3:
            raise ValueError(f"heat: got shape {tuple(heat.shape)}, want [B, h, w]")
        _check_masks(object_masks, len(heat))
        regions = top_regions(heat, object_masks.shape[1:], self.top)
        self.append(ious=region_ious(regions, object_masks))


def saliency_maps(saliency: Tensor) -> Tensor:
    """Saliency over its root mean square, smoothed: GradMaps, see ``SaliencyLocalisation``.

    Args:
        saliency: ``[…, H, W]`` at least 0; all 0 stays so.

    Returns:
        The same shape, float32 or wider.
    """
    saliency = checks.accumulable(saliency.detach())
    scale = saliency.square().mean((-2, -1), keepdim=True).sqrt()
    height, width = (_smoothing(side).to(saliency) for side in saliency.shape[-2:])
    with torch.autocast(saliency.device.type, enabled=False):
        return height @ (saliency / scale).where(scale > 0, 0.0) @ width.T


def top_regions(heat: Tensor, size: tuple[int, ...], top: float) -> Tensor:
    """The greatest share of pixels of maps resized bilinearly, see ``CAMLocalisation``.

    Args:
        heat: ``[B, h, w]``.
        size: H and W.
        top: share of the pixels, in (0, 1); one pixel at least.

    Returns:
        ``[B, H, W]`` bool.
    """
    resized = _resized(checks.accumulable(heat.detach()), size)
    flat = resized.flatten(1)
    k = max(1, int(top * flat.shape[1]))
    return resized >= flat.kthvalue(flat.shape[1] - k + 1, 1).values[:, None, None]


def region_ious(regions: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of regions and objects.

    Args:
        regions: ``[…, H, W]`` bool.
        masks: ``[…, H, W]`` bool, broadcast against the regions.

    Returns:
        ``[…]`` float64 (float32 on MPS); NaN where the mask is empty.
    """
    dtype = torch.float32 if regions.device.type == "mps" else torch.float64
    # Sums of 0 and 1 are exact in single precision below 2**24, and far quicker than of bool.
    covered, shown = (x.to(regions.device).flatten(-2).float() for x in (regions, masks))
    overlap, region, area = (x.sum(-1).to(dtype) for x in (covered * shown, covered, shown))
    return (overlap / (region + area - overlap)).where(area > 0, math.nan)


@lru_cache(maxsize=8)
def _smoothing(side: int) -> Tensor:
    """A Gaussian along an axis of so many pixels as a product: ``[side, side]`` float64."""
    sigma = _SIGMA / _SIDE * side
    radius = round(sigma)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = (-0.5 * (taps / sigma).square()).exp()
    unit = torch.eye(side, dtype=torch.float64)[None]
    windows = F.pad(unit, (radius, radius), mode="reflect")[0].unfold(1, len(taps), 1)
    return (windows @ (taps / taps.sum())).T


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps ``[n, h, w]`` to ``[n, H, W]``, bilinearly, as ``interpolate`` without corners aligned.

    On the CPU in a tenth of its time, where maps are much smaller; and never as a product of
    matrices, whose precision a user may have lowered.
    """
    return _stretched(_stretched(maps, 2, size[1]), 1, size[0])


def _stretched(maps: Tensor, dim: int, pixels: int) -> Tensor:
    shape = list(maps.shape)
    shape[dim] = pixels
    out = maps.new_empty(shape)
    for first, lower, upper, weights in _between(maps.shape[dim], pixels):
        part = out.narrow(dim, first, len(weights))
        part.copy_(maps.narrow(dim, lower, 1).expand_as(part))
        weights = weights.to(maps).view(-1, *[1] * (2 - dim))
        part.lerp_(maps.narrow(dim, upper, 1).expand_as(part), weights)
    return out


@lru_cache(maxsize=16)
def _between(side: int, pixels: int) -> list[tuple[int, int, int, Tensor]]:
    """Pixels between the same two elements: the first, both elements, shares of the second."""
    place = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * side / pixels - 0.5).clamp(min=0)
    lower = place.long()
    counts = lower.bincount(minlength=side).tolist()
    firsts = itertools.accumulate(counts, initial=0)
    return [
        (first, i, min(i + 1, side - 1), place[first : first + count] - i)
        for i, (first, count) in enumerate(zip(firsts, counts, strict=False))
        if count
    ]


def _check_masks(masks: Tensor, batch: int, size: tuple[int, ...] | None = None) -> None:
    checks.tensor("object_masks", masks)
    if masks.dtype != torch.bool:
        raise TypeError(f"object_masks: got dtype {masks.dtype}, want torch.bool")
    if masks.ndim != 3 or len(masks) != batch or (size and masks.shape[1:] != size):
        wanted = ", ".join(map(str, (batch, *(size or ("H", "W")))))
        raise ValueError(f"object_masks: got shape {tuple(masks.shape)}, want [{wanted}]")
