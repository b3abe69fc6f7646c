"""Part metrics against slow loops written from the paper's text."""

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from picnn_fast.backbones import ReceptiveField
from picnn_fast.metrics import LocationInstability, PartInterpretability

FIELD = ReceptiveField((9, 7), (4, 3), (1.5, 2.0), (3, 4), (12, 13), (1.3, 0.8))
FILTERS, LANDMARKS, PARTS = 3, 2, 3


def example(seed: int, images: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps (many equal values), landmarks and masks (some not shown) and labels."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(-4, 9, (images, FILTERS, *FIELD.map_size), generator=generator)
    maps = maps.float().relu() / 3
    landmarks = 12 * torch.rand(images, LANDMARKS, 2, generator=generator)
    landmarks[torch.rand(images, LANDMARKS, generator=generator) < 0.3] = math.nan
    masks = torch.zeros(images, PARTS, *FIELD.image_size, dtype=torch.bool)
    for image in range(images):
        for part in range(PARTS):
            y, x, h, w = (int(v) for v in torch.randint(0, 9, (4,), generator=generator))
            masks[image, part, y : y + h, x : x + w] = True
    return maps, landmarks, masks, torch.randint(classes, (images,), generator=generator)


def instability_by_hand(
    maps: Tensor, landmarks: Tensor, labels: Tensor, classes: int, most: int
) -> list[float]:
    """Of each filter; Python's own sort, sample deviation and mean."""
    values = []
    for f in range(FILTERS):
        of_category = []
        for c in range(classes):
            deviations = []
            for k in range(LANDMARKS):
                found = []
                for image in range(len(maps)):
                    x, y = landmarks[image, k].tolist()
                    if labels[image] != c or math.isnan(x):
                        continue
                    flat = maps[image, f].flatten().tolist()
                    row, column = divmod(flat.index(max(flat)), FIELD.map_size[1])
                    centre = (2.0 + 3 * column, 1.5 + 4 * row)
                    distance = math.dist(centre, (x, y)) / math.hypot(12, 13)
                    found.append((max(flat), distance))
                found.sort(key=lambda item: -item[0])  # stable: the first of equal ones
                if len(found) >= 2:
                    deviations.append(statistics.stdev(d for _, d in found[:most]))
            if deviations:
                of_category.append(statistics.fmean(deviations))
        values.append(min(of_category, default=math.nan))
    return values


def interpretability_by_hand(
    maps: Tensor, masks: Tensor, labels: Tensor, classes: int, top: float, wanted: float
) -> list[list[float]]:
    """P_{f,k}; NaN where no image of the filter's category shows k."""
    table = []
    tall, wide = (max(2.35482 * s, math.sqrt(2) * t) for s, t in ((1.3, 4), (0.8, 3)))
    for f in range(FILTERS):
        means = []
        for c in range(classes):
            sums = [maps[i, f].double().sum().item() for i in range(len(maps)) if labels[i] == c]
            means.append(statistics.fmean(sums) if sums else -math.inf)
        category = means.index(max(means))
        images = [i for i in range(len(maps)) if labels[i] == category]
        scores = sorted((v for i in images for v in maps[i, f].flatten().tolist()), reverse=True)
        threshold = scores[min(max(round(top * len(scores)), 1), len(scores) - 1)]
        row = []
        for k in range(PARTS):
            hits = []
            for i in images:
                part = {tuple(p) for p in masks[i, k].nonzero().tolist()}
                if not part:
                    continue
                region = {
                    (y, x)
                    for cell in (maps[i, f] > threshold).nonzero().tolist()
                    for y in range(12)
                    for x in range(13)
                    if math.hypot(
                        (y + 0.5 - 1.5 - 4 * cell[0]) / (tall / 2),
                        (x + 0.5 - 2.0 - 3 * cell[1]) / (wide / 2),
                    )
                    <= 1
                }
                hits.append(len(region & part) / len(region | part) > wanted)
            row.append(statistics.fmean(hits) if hits else math.nan)
        table.append(row)
    return table


def same(got: Tensor, want: Any) -> None:
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6, equal_nan=True)


def batches(size: int, *tensors: Tensor) -> Any:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


@given(
    seed=st.integers(0, 9999),
    images=st.integers(1, 14),
    classes=st.integers(1, 3),
    most=st.integers(2, 5),
    size=st.integers(1, 6),
)
def test_location_instability_is_that_of_a_slow_loop(
    seed: int, images: int, classes: int, most: int, size: int
) -> None:
    maps, landmarks, _, labels = example(seed, images, classes)
    metric, whole = (
        LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=classes, images=most)
        for _ in range(2)
    )
    for batch in batches(size, maps, landmarks, labels):
        metric.update(*batch)
    whole.update(maps, landmarks, labels)
    values = instability_by_hand(maps, landmarks, labels, classes, most)
    same(metric.per_filter(), values)
    same(metric.compute(), torch.tensor(values, dtype=torch.float64).nanmean())
    assert torch.equal(metric.deviations().nan_to_num(-1), whole.deviations().nan_to_num(-1))
    least = metric.deviations().nanmean(-1)
    for f, c in enumerate(metric.categories().tolist()):
        assert math.isnan(values[f]) if c < 0 else least[f, c] == metric.per_filter()[f]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 9999),
    images=st.integers(1, 8),
    classes=st.integers(1, 2),
    top=st.sampled_from([0.005, 0.03, 0.1, 0.4]),
    iou=st.sampled_from([0.04, 0.2]),
    size=st.integers(1, 6),
)
def test_part_interpretability_is_that_of_a_slow_loop(
    seed: int, images: int, classes: int, top: float, iou: float, size: int
) -> None:
    maps, _, masks, labels = example(seed, images, classes)
    metric = PartInterpretability(FILTERS, PARTS, FIELD, num_classes=classes, top=top, iou=iou)
    for batch in batches(size, maps, masks, labels):
        metric.update(*batch)
    table = interpretability_by_hand(maps, masks, labels, classes, top, iou)
    same(metric.association(), table)
    best = [max((p for p in row if p == p), default=math.nan) for row in table]
    same(metric.per_filter(), best)
    same(metric.compute(), torch.tensor(best, dtype=torch.float64).nanmean())
    for row, value, part in zip(table, best, metric.best_part().tolist(), strict=True):
        assert math.isnan(value) if part < 0 else row.index(value) == part


@given(
    seed=st.integers(0, 9999),
    images=st.integers(2, 14),
    classes=st.integers(1, 3),
    most=st.integers(2, 5),
)
def test_resamples_of_location_instability_are_those_of_images_that_are_repeated(
    seed: int, images: int, classes: int, most: int
) -> None:
    maps, landmarks, _, labels = example(seed, images, classes)
    metric = LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=classes, images=most)
    for batch in batches(4, maps, landmarks, labels):
        metric.update(*batch)
    counts = torch.randint(4, (3, images), generator=torch.Generator().manual_seed(seed))
    counts[0] = 1
    wanted = []
    for times in counts:
        rows = torch.arange(images).repeat_interleave(times)
        values = instability_by_hand(maps[rows], landmarks[rows], labels[rows], classes, most)
        wanted.append(torch.tensor(values, dtype=torch.float64).nanmean())
    got = metric.replicate(counts)
    same(got, torch.stack(wanted))
    same(got[:1], metric.compute()[None])


def test_few_resamples_are_wanted_where_each_looks_at_many_places() -> None:
    maps, landmarks, _, labels = example(0, 50, 2)
    metric = LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=2, images=4)
    metric.update(maps, landmarks, labels)
    ranks = sum(min(int((labels == c).sum()), 4 + 8 * 2) for c in range(2))
    assert metric.most_resamples == 10**9 // (FILTERS * LANDMARKS * ranks)
    metric.num_filters = 10**9
    assert metric.most_resamples == 100


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_resamples_that_draw_few_of_the_highest_peaks_look_further(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, landmarks, _, labels = example(5, 40, 1)
    metric = LocationInstability(FILTERS, LANDMARKS, FIELD, images=ranks)
    metric.update(maps, landmarks, labels)
    monkeypatch.setattr("picnn_fast.metrics.parts._MARGIN", 0)
    counts = torch.zeros(2, 40, dtype=torch.int64)
    counts[0, 20:], counts[1, ::7] = 1, 2
    wanted = []
    for times in counts:
        rows = torch.arange(40).repeat_interleave(times)
        values = instability_by_hand(maps[rows], landmarks[rows], labels[rows], 1, ranks)
        wanted.append(torch.tensor(values, dtype=torch.float64).nanmean())
    same(metric.replicate(counts), torch.stack(wanted))


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), images=st.integers(1, 8), size=st.integers(1, 6))
def test_resamples_of_part_interpretability_are_those_of_images_that_are_repeated(
    seed: int, images: int, size: int
) -> None:
    """Maps of 0 and 1, so that the threshold is 0 of any images, and one category."""
    maps, _, masks, labels = example(seed, images, 1)
    maps = (maps > 2).float()
    maps[:, :, 0, 0] = 1  # more than the share that is valid
    metric = PartInterpretability(FILTERS, PARTS, FIELD, top=0.999, iou=0.04)
    for batch in batches(size, maps, masks, labels):
        metric.update(*batch)
    counts = torch.randint(4, (3, images), generator=torch.Generator().manual_seed(seed))
    counts[0] = 1
    wanted = []
    for times in counts:
        rows = torch.arange(images).repeat_interleave(times)
        if len(rows) == 0:
            wanted.append(math.nan)
            continue
        table = interpretability_by_hand(maps[rows], masks[rows], labels[rows], 1, 0.999, 0.04)
        best = [max((p for p in row if p == p), default=math.nan) for row in table]
        wanted.append(torch.tensor(best, dtype=torch.float64).nanmean().item())
    same(metric.replicate(counts), wanted)
    same(metric.replicate(counts)[:1], metric.compute()[None])


def test_resamples_of_part_interpretability_keep_threshold_and_category() -> None:
    maps, _, masks, labels = example(2, 12, 2)
    metric = PartInterpretability(FILTERS, PARTS, FIELD, num_classes=2, top=0.1, iou=0.04)
    metric.update(maps, masks, labels)
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(3, (5, 12), generator=draw)
    found, tables = metric.association(), []
    for times in counts.tolist():
        table = torch.full_like(found, math.nan)
        for f, c in enumerate(metric.categories().tolist()):
            for k in range(PARTS):
                hits = of = 0
                for i, n in enumerate(times):
                    if labels[i] == c and masks[i, k].any():
                        of += n
                        hits += n * int(metric._found[i, f, k])
                table[f, k] = hits / of if of else math.nan
        tables.append(table.nan_to_num(-1).amax(1))
    best = torch.stack(tables)
    same(metric.replicate(counts), best.where(best >= 0, math.nan).nanmean(1))
    assert 0 < metric._found.sum() < metric._found.numel()


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, _, masks, labels = example(0, 9, 2)
    metric = PartInterpretability(FILTERS, PARTS, FIELD, num_classes=2, top=0.2)
    metric.update(maps, masks, labels)
    wanted = metric.association()
    metric.update(maps[:0], masks[:0], labels[:0])
    counts = torch.randint(3, (4, 9), generator=torch.Generator().manual_seed(0))
    resampled = metric.replicate(counts)
    monkeypatch.setattr("picnn_fast.metrics.parts._BLOCK", 1)
    same(metric.replicate(counts), resampled)
    metric._computed = None
    same(metric.association(), wanted)
    assert wanted.max() > 0


def test_small_blocks_give_the_same_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, landmarks, _, labels = example(0, 9, 2)
    metric = LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=2, images=3)
    metric.update(maps, landmarks, labels)
    wanted = metric.deviations()
    metric.update(maps[:0], landmarks[:0], labels[:0])
    counts = torch.randint(3, (4, 9), generator=torch.Generator().manual_seed(0))
    resampled = metric.replicate(counts)
    monkeypatch.setattr("picnn_fast.metrics.parts._BLOCK", 1)
    same(metric.replicate(counts), resampled)
    metric._computed = None
    assert torch.equal(metric.deviations().nan_to_num(-1), wanted.nan_to_num(-1))
    assert wanted.nan_to_num().max() > 0


@pytest.mark.parametrize("classes", [1, 200])
def test_location_instability_holds_as_much_however_many_categories(classes: int) -> None:
    maps, landmarks, _, labels = example(0, 8, classes)
    metric = LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=classes)
    for batch in batches(3, maps, landmarks, labels):
        metric.update(*batch)
    states = (metric.peaks, metric.centres, metric.landmarks, metric.labels)
    held = sum(x.untyped_storage().nbytes() for state in states for x in state)
    assert held == 8 * (12 * FILTERS + 8 * LANDMARKS + 8)


def test_a_filter_of_one_part_and_one_of_none() -> None:
    field = ReceptiveField((4, 4), (4, 4), (2.0, 2.0), (8, 8), (32, 32))
    maps, masks = torch.zeros(6, 2, 8, 8), torch.zeros(6, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :10, :10] = True
    masks[::2, 1, 20:, 20:] = True  # the second part is shown by half of the images
    maps[:, 0, 1, 1] = 1
    maps[::2, 1, 6, 6] = 1
    metric = PartInterpretability(2, 2, field, top=6 / 384, diameter=8)
    metric.update(maps, masks)
    same(metric.association(), [[1.0, 0.0], [0.0, 1.0]])
    assert metric.best_part().tolist() == [0, 1]
    # A field as large as the image is associated with no part.
    metric = PartInterpretability(2, 2, field, top=6 / 384, diameter=100)
    metric.update(maps, masks)
    same(metric.compute(), 0.0)


def test_the_category_is_the_one_that_activates_a_filter_most() -> None:
    maps, _, masks, _ = example(1, 4, 1)
    maps[2:, 0] += 1
    maps[:2, 1:] += 9
    metric = PartInterpretability(FILTERS, PARTS, FIELD, num_classes=3)
    metric.update(maps, masks, torch.tensor([0, 0, 2, 2]))
    assert metric.categories().tolist() == [2, 0, 0]


def metrics() -> list[tuple[Any, tuple[Tensor, Tensor, Tensor]]]:
    maps, landmarks, masks, labels = example(3, 10, 2)
    return [
        (
            LocationInstability(FILTERS, LANDMARKS, FIELD, num_classes=2, images=3),
            (maps, landmarks, labels),
        ),
        (
            PartInterpretability(FILTERS, PARTS, FIELD, num_classes=2, top=0.1),
            (maps, masks, labels),
        ),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_forward_gives_the_batch_and_adds_to_the_total(which: int) -> None:
    metric, data = metrics()[which]
    alone, total = metric.clone(), metric.clone()
    total.update(*data)
    for batch in batches(4, *data):
        alone.reset()
        alone.update(*batch)
        same(metric(*batch), alone.compute())
    with pytest.raises(ValueError, match="labels: got None with num_classes=2"):
        metric(*data[:2])
    same(metric.per_filter(), total.per_filter())
    metric.set_dtype(torch.float16)
    same(metric.compute(), total.compute())


@pytest.mark.parametrize("which", [0, 1])
def test_the_caller_may_write_into_its_maps_afterwards(which: int) -> None:
    metric, data = metrics()[which]
    other = metric.clone()
    metric.update(*data)
    other.update(*(x.clone() for x in data))
    for x in data:
        x.zero_()
    same(metric.compute(), other.compute())
    assert metric.compute() > 0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_of_any_floating_dtype(which: int, dtype: torch.dtype) -> None:
    metric, (maps, annotations, labels) = metrics()[which]
    other = metric.clone()
    metric.update(maps.to(dtype), annotations, labels.to(torch.int32))
    other.update(maps.to(dtype).float(), annotations, labels)
    same(metric.compute(), other.compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("which", [0, 1])
def test_no_image_gives_nan(which: int) -> None:
    metric, data = metrics()[which]
    for _ in range(2):
        assert metric.compute().isnan()
        assert metric.per_filter().isnan().all()
        assert metric.categories().tolist() == [-1] * FILTERS
        metric.update(*(x[:0] for x in data))


def test_memory_is_refused_before_it_is_taken() -> None:
    maps, _, masks, _ = example(0, 8, 1)
    an_image = 4 * FILTERS * 12 + PARTS * 20 + 8
    metric = PartInterpretability(FILTERS, PARTS, FIELD, memory_limit=2 * 8 * an_image)
    metric.update(maps, masks)
    stored = sum(x.nbytes for state in (metric.maps, metric.masks, metric.labels) for x in state)
    assert stored == 8 * an_image
    with pytest.raises(ValueError, match=r"^memory_limit: got 9 images of 3 maps"):
        metric.update(maps[:1], masks[:1])
    assert sum(map(len, metric.labels)) == 8


def test_bad_input_is_refused() -> None:
    maps, landmarks, masks, labels = example(0, 4, 2)
    instability = LocationInstability(FILTERS, LANDMARKS, FIELD)
    interpretability = PartInterpretability(FILTERS, PARTS, FIELD)
    half = landmarks.nan_to_num(1)
    half[0, 0, 1] = math.nan
    cases: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (instability, (maps[:, :2], landmarks), ValueError, "maps: got 2 filters, want 3"),
        (instability, (maps[..., :2], landmarks), ValueError, "maps: got shape"),
        (instability, (maps / 0, landmarks), ValueError, "maps: got NaN or infinity"),
        (instability, (maps.long(), landmarks), TypeError, "maps: got dtype"),
        (instability, (maps, landmarks[:, :1]), ValueError, "landmarks: got shape"),
        (instability, (maps, landmarks / 0), ValueError, "landmarks: got infinity"),
        (instability, (maps, half), ValueError, "landmarks: got infinity, or NaN in one"),
        (instability, (maps, landmarks, labels + 1), ValueError, "labels: got values"),
        (interpretability, (maps, masks[:2]), ValueError, "part_masks: got shape"),
        (interpretability, (maps, masks.int()), TypeError, "part_masks: got dtype torch.int32"),
        (interpretability, (maps, None), TypeError, "part_masks: got NoneType"),
        (interpretability, (maps / 0, masks), ValueError, "maps: got NaN or infinity"),
    ]
    for metric, arguments, error, message in cases:
        with pytest.raises(error, match=f"^{message}"):
            metric.update(*arguments)
    assert not interpretability.labels
    assert not instability.labels
    for options, error, message in (
        ({"top": 1.0}, ValueError, "top: got 1.0"),
        ({"iou": 0}, ValueError, "iou: got 0"),
        ({"diameter": 1.0}, ValueError, "diameter: got 1.0, want at least √2"),
        ({"memory_limit": 0}, ValueError, "memory_limit: got 0"),
        ({"num_classes": 0}, ValueError, "num_classes: got 0"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            PartInterpretability(FILTERS, PARTS, FIELD, **options)
    with pytest.raises(ValueError, match=r"^images: got 1"):
        LocationInstability(FILTERS, LANDMARKS, FIELD, images=1)
    with pytest.raises(TypeError, match=r"^receptive_field: got tuple"):
        LocationInstability(FILTERS, LANDMARKS, (1, 2))  # type: ignore[arg-type]
