"""Localisation against slow loops over images, filters and pixels, written from the text."""

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast.metrics import (
    ActivMapLocalisation,
    CAMLocalisation,
    GradMapLocalisation,
    SaliencyLocalisation,
)
from picnn_fast.metrics.localisation import saliency_maps

IMAGES, FILTERS, CLASSES = 11, 5, 3
MAP, IMAGE = (3, 4), (13, 10)  # odd, and not square
BATCHES = (4, 4, 3)  # the last is smaller


def rectangles(seed: int, images: int = IMAGES) -> Tensor:
    """Object masks; the third is empty."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, *IMAGE, dtype=torch.bool)
    for mask in masks:
        y, x, h, w = torch.randint(2, 8, (4,), generator=generator).tolist()
        mask[y - 2 : y + h, x - 2 : x + w] = True
    masks[2] = False
    return masks


def iou_by_hand(region: Tensor, mask: Tensor) -> float:
    """Pixel by pixel; NaN of an empty mask."""
    both = either = shown = 0
    for a, b in zip(region.flatten().tolist(), mask.flatten().tolist(), strict=True):
        both, either, shown = both + (a and b), either + (a or b), shown + b
    return both / either if shown else math.nan


def means_by_hand(values: list[float]) -> float:
    counted = [value for value in values if not math.isnan(value)]
    return statistics.fmean(counted) if counted else math.nan


def resized_by_hand(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinearly, corners not aligned: centres of pixels keep their share of the side."""
    out = torch.empty(size, dtype=values.dtype)
    for y in range(size[0]):
        for x in range(size[1]):
            total = 0.0
            places = []
            for at, side, cells in ((y, size[0], values.shape[0]), (x, size[1], values.shape[1])):
                place = max((at + 0.5) * cells / side - 0.5, 0.0)
                low = int(place)
                places.append([(low, 1 - place % 1), (min(low + 1, cells - 1), place % 1)])
            for row, a in places[0]:
                for column, b in places[1]:
                    total += a * b * values[row, column].item()
            out[y, x] = total
    return out


def kth_by_hand(values: Tensor, share: float) -> float:
    """The int(share · number)-th greatest."""
    ordered = sorted(values.flatten().tolist(), reverse=True)
    return ordered[int(share * len(ordered)) - 1]


def counts(resamples: int = 4, images: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(images, (resamples, images), generator=generator)
    return torch.stack([row.bincount(minlength=images) for row in drawn])


def test_the_resize_by_hand_is_torchs() -> None:
    values = torch.rand(MAP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = F.interpolate(values[None, None], size=IMAGE, mode="bilinear")[0, 0]
    torch.testing.assert_close(resized_by_hand(values, IMAGE), want)


class TestCAM:
    def ious(self, heat: Tensor, masks: Tensor) -> list[float]:
        values = []
        for image in range(len(heat)):
            resized = resized_by_hand(heat[image], IMAGE)
            values.append(iou_by_hand(resized >= kth_by_hand(resized, 0.3), masks[image]))
        return values

    def test_equals_the_slow_formulation(self) -> None:
        heat = torch.randn(
            IMAGES, *MAP, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        masks = rectangles(2)
        metric = CAMLocalisation()
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.update(heat[some], masks[some])
        each = self.ious(heat, masks)
        assert metric.per_image().tolist() == pytest.approx(each, nan_ok=True)
        iou, precision = metric.compute()
        enough = [math.nan if math.isnan(value) else float(value > 0.3) for value in each]
        assert iou.item() == pytest.approx(means_by_hand(each))
        assert precision.item() == pytest.approx(means_by_hand(enough))
        assert 0 < precision < 1
        replicated = metric.replicate(counts())
        for r, drawn in enumerate(counts()):
            again = CAMLocalisation()
            images = torch.arange(IMAGES).repeat_interleave(drawn)
            again.update(heat[images], masks[images])
            for got, want in zip(replicated, again.compute(), strict=True):
                assert got[r].item() == pytest.approx(want.item())

    def test_a_success_wants_more_than_the_limit(self) -> None:
        """3 pixels of 10 are the region, all of the object: an IoU of exactly .3."""
        heat = torch.arange(10.0).reshape(1, 2, 5)
        metric = CAMLocalisation()
        metric.update(heat, torch.ones(1, 2, 5, dtype=torch.bool))
        assert metric.compute().iou.item() == 0.3
        assert metric.compute().precision.item() == 0

    def test_no_image_with_an_object_is_nan(self) -> None:
        metric = CAMLocalisation()
        metric.update(torch.rand(2, 3, 3), torch.zeros(2, 6, 6, dtype=torch.bool))
        assert all(value.isnan() for value in metric.compute())


class TestSaliency:
    def gradmap(self, saliency: Tensor) -> Tensor:
        """Over its root mean square, then a Gaussian of 30 pixels in 128, cut off at one sigma."""
        scale = saliency.square().mean().sqrt()
        if scale == 0:
            return torch.zeros_like(saliency)
        height, width = saliency.shape
        sigmas = [30 * side / 128 for side in (height, width)]
        out = torch.zeros_like(saliency)
        for y in range(height):
            for x in range(width):
                total = weight = 0.0
                for dy in range(-round(sigmas[0]), round(sigmas[0]) + 1):
                    for dx in range(-round(sigmas[1]), round(sigmas[1]) + 1):
                        w = math.exp(-((dy / sigmas[0]) ** 2 + (dx / sigmas[1]) ** 2) / 2)
                        row, column = abs(y + dy), abs(x + dx)  # reflected, the border not twice
                        row = min(row, 2 * (height - 1) - row)
                        column = min(column, 2 * (width - 1) - column)
                        total += w * (saliency[row, column] / scale).item()
                        weight += w
                out[y, x] = total / weight
        return out

    def test_equals_the_slow_formulation(self) -> None:
        generator = torch.Generator().manual_seed(3)
        masks = rectangles(4)
        saliency = torch.rand(IMAGES, 2, *IMAGE, generator=generator, dtype=torch.float64) ** 8
        on_object = torch.randn(IMAGES, 2, 1, 1, generator=generator)
        saliency += masks[:, None] * on_object.clamp_min(0)
        saliency[4, 1] = 0  # a filter that nothing moves
        metric = SaliencyLocalisation(iou=0.3)
        each = []
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.update(saliency[some], masks[some])
        for image in range(IMAGES):
            found = [
                iou_by_hand(self.gradmap(saliency[image, f]) > 1, masks[image]) for f in range(2)
            ]
            each.append(sum(found) / 2)
        assert metric.per_image().tolist() == pytest.approx(each, nan_ok=True)
        iou, precision = metric.compute()
        enough = [math.nan if math.isnan(value) else float(value >= 0.3) for value in each]
        assert iou.item() == pytest.approx(means_by_hand(each))
        assert precision.item() == pytest.approx(means_by_hand(enough))
        assert 0 < precision < 1
        drawn = counts(1)
        again = [v for v, n in zip(each, drawn[0].tolist(), strict=True) for _ in range(n)]
        assert metric.replicate(drawn).iou.item() == pytest.approx(means_by_hand(again))

    def test_a_mean_at_the_limit_is_a_success(self) -> None:
        """One region of five is all of the object, and nothing moves the others: .2."""
        saliency = torch.zeros(1, 5, 32, 32)
        saliency[0, 0, 8:20, 4:24] = 1
        metric = SaliencyLocalisation()
        metric.update(saliency, saliency_maps(saliency[:, 0]) > 1)
        assert metric.compute().iou.item() == 0.2
        assert metric.compute().precision.item() == 1

    def test_the_published_smoothing_is_torchvisions(self) -> None:
        """Sigma 30 and a window of 61 at 128 pixels."""
        blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
        saliency = torch.rand(2, 128, 128, generator=torch.Generator().manual_seed(0))
        scaled = saliency / saliency.square().mean((1, 2), keepdim=True).sqrt()
        torch.testing.assert_close(saliency_maps(saliency), blur(scaled, [61, 61], [30.0, 30.0]))


class TestGradMap:
    def test_filters_are_those_of_the_greatest_class_mean(self) -> None:
        generator = torch.Generator().manual_seed(6)
        pooled = torch.randint(0, 4, (IMAGES, FILTERS), generator=generator).double()
        labels = torch.arange(IMAGES) % CLASSES
        metric = GradMapLocalisation(FILTERS, CLASSES, filters=3)
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.prepare(pooled[some], labels[some])
        for c in range(CLASSES):
            means = [
                statistics.fmean(pooled[image, f].item() for image in range(c, IMAGES, CLASSES))
                for f in range(FILTERS)
            ]
            want = sorted(range(FILTERS), key=lambda f: -means[f])[:3]
            assert metric.top_filters(torch.tensor([c])).tolist() == [want]

    def test_all_filters_count_where_there_are_few(self) -> None:
        metric = GradMapLocalisation(4, 1)
        metric.prepare(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), torch.tensor([0]))
        assert metric.top_filters(torch.tensor([0, 0])).tolist() == [[1, 3, 2, 0]] * 2

    def test_a_class_that_was_not_prepared_is_refused(self) -> None:
        metric = GradMapLocalisation(2, 2)
        metric.prepare(torch.ones(1, 2), torch.tensor([0]))
        with pytest.raises(ValueError, match=r"labels: got a class of which prepare\(\) saw no"):
            metric.top_filters(torch.tensor([0, 1]))


class TestActivMap:
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(7)
        labels = torch.arange(IMAGES) % CLASSES
        maps = torch.randn(IMAGES, FILTERS, *MAP, generator=generator).relu()
        # A filter that fires with one class, one on every object, and one that never fires.
        masks = rectangles(8)
        maps[:, 1] *= (labels == 1)[:, None, None]
        maps[:, 2] = F.adaptive_avg_pool2d(masks[:, None].float(), MAP)[:, 0] + 0.1
        maps[:, 3] = 0
        return maps, masks, labels

    def by_hand(
        self, maps: Tensor, masks: Tensor, labels: Tensor, thresholds: list[float]
    ) -> tuple[float, float]:
        ious, shares = [], []
        for f in range(FILTERS):
            of_class = []
            for c in range(CLASSES):
                found = [
                    iou_by_hand(
                        resized_by_hand(maps[image, f], IMAGE) >= thresholds[f], masks[image]
                    )
                    for image in range(len(maps))
                    if labels[image] == c and masks[image].any()
                ]
                if found:
                    share = sum(value > 0.3 for value in found) / len(found)
                    of_class.append((share, statistics.fmean(found)))
            if of_class:
                best = max(of_class)
                shares.append(best[0])
                ious.append(best[1])
        return means_by_hand(ious), means_by_hand(shares)

    def metric(self, maps: Tensor, masks: Tensor, labels: Tensor) -> ActivMapLocalisation:
        metric = ActivMapLocalisation(FILTERS, CLASSES)
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.prepare(maps[some])
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.update(maps[some], masks[some], labels[some])
        return metric

    def test_equals_the_slow_formulation(self) -> None:
        maps, masks, labels = self.inputs()
        metric = self.metric(maps, masks, labels)
        thresholds = [kth_by_hand(maps[:, f], 0.3) for f in range(FILTERS)]
        want = self.by_hand(maps, masks, labels, thresholds)
        assert [value.item() for value in metric.compute()] == pytest.approx(want)
        assert 0.3 < want[0] < want[1] < 1
        replicated = metric.replicate(counts())
        for r, drawn in enumerate(counts()):
            images = torch.arange(IMAGES).repeat_interleave(drawn)
            want = self.by_hand(maps[images], masks[images], labels[images], thresholds)
            assert [value[r].item() for value in replicated] == pytest.approx(want)

    def test_chunks_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = self.inputs()
        want, replicated = self.metric(*inputs).compute(), self.metric(*inputs).replicate(counts())
        monkeypatch.setattr("picnn_fast.metrics.localisation._BLOCK", 2 * IMAGE[0] * IMAGE[1])
        assert self.metric(*inputs).compute() == want
        monkeypatch.setattr("picnn_fast.metrics.localisation._BLOCK", 1)
        for got, wanted in zip(self.metric(*inputs).replicate(counts()), replicated, strict=True):
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize(("kept", "every"), [(11, 1), (10, 2), (6, 2), (5, 4), (2, 8), (0, 16)])
    def test_of_maps_too_many_to_keep_an_even_share_has_the_threshold(
        self, kept: int, every: int
    ) -> None:
        maps, masks, labels = self.inputs()
        limit = max(1, kept * 4 * FILTERS * MAP[0] * MAP[1])
        metric = ActivMapLocalisation(FILTERS, CLASSES, memory_limit=limit)
        for some in torch.arange(IMAGES).split(BATCHES):
            metric.prepare(maps[some])
        metric.update(maps, masks, labels)
        want = [kth_by_hand(maps[::every, f], 0.3) for f in range(FILTERS)]
        assert metric.thresholds.tolist() == want

    def test_an_update_before_any_image_was_prepared_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"maps: got an update before any image was shown"):
            ActivMapLocalisation(FILTERS, CLASSES).update(*self.inputs())

    def test_images_shown_after_an_update_make_new_thresholds(self) -> None:
        maps, masks, labels = self.inputs()
        metric = self.metric(maps, masks, labels)
        metric.reset()
        metric.prepare(10 * maps)
        metric.update(10 * maps, masks, labels)
        torch.testing.assert_close(
            [*metric.compute()], [*self.metric(maps, masks, labels).compute()]
        )

    def test_forward_gives_the_batch_and_adds_it(self) -> None:
        maps, masks, labels = self.inputs()
        metric = ActivMapLocalisation(FILTERS, CLASSES)
        metric.prepare(maps)
        first = metric(maps[:5], masks[:5], labels[:5])
        metric(maps[5:], masks[5:], labels[5:])
        assert metric.compute() == self.metric(maps, masks, labels).compute() != first


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (CAMLocalisation, (torch.rand(2, 3, 3), torch.rand(2, 6, 6)), "object_masks: got dtype"),
        (
            CAMLocalisation,
            (torch.rand(2, 3, 3), torch.ones(3, 6, 6, dtype=torch.bool)),
            r"object_masks: got shape \(3, 6, 6\), want \[2, H, W\]",
        ),
        (
            CAMLocalisation,
            (torch.rand(3, 3), torch.ones(3, 3, dtype=torch.bool)),
            r"heat: got shape",
        ),
        (
            SaliencyLocalisation,
            (torch.rand(2, 1, 6, 6), torch.ones(2, 6, 7, dtype=torch.bool)),
            r"object_masks: got shape \(2, 6, 7\), want \[2, 6, 6\]",
        ),
        (
            SaliencyLocalisation,
            (torch.rand(2, 0, 6, 6), torch.ones(2, 6, 6, dtype=torch.bool)),
            "saliency: got shape",
        ),
        (
            lambda: ActivMapLocalisation(2, 2),
            (torch.rand(2, 3, 4, 4), torch.ones(2, 6, 6, dtype=torch.bool), torch.tensor([0, 1])),
            r"maps: got shape \(2, 3, 4, 4\), want \[B, 2, h, w\]",
        ),
        (
            lambda: ActivMapLocalisation(2, 2),
            (torch.rand(1, 2, 4, 4), torch.ones(1, 6, 6, dtype=torch.bool), torch.tensor([2])),
            "labels: got values in",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(make, arguments, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make().update(*arguments)


@pytest.mark.parametrize("make", [CAMLocalisation, SaliencyLocalisation])
@pytest.mark.parametrize("iou", [0.0, 1.0, -0.1])
def test_a_limit_that_is_no_share_is_refused(make, iou) -> None:
    with pytest.raises(ValueError, match="iou: got"):
        make(iou=iou)
