"""The grid pointing game against a slow loop over grids, cells and pixels."""

import math

import pytest
import torch
from torch import Tensor

from picnn_fast.metrics import PointingGame

SIDE = (4, 6)


def attribution(grids: Tensor, classes: Tensor) -> Tensor:
    """Of class c, how near the first colour is to c, less a half: of either sign."""
    return (0.5 - (grids[:, :1] - classes[:, :, None, None]).abs()).to(grids.dtype)


def inputs(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images about as bright as their label says; a third is classified wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    noise = torch.randn(images, 2, *SIDE, generator=generator, dtype=torch.float64)
    pixels = labels[:, None, None, None] + noise
    logits = torch.randn(images, classes, generator=generator, dtype=torch.float64)
    predicted = torch.where(torch.rand(images, generator=generator) < 0.6, labels, 0)
    logits[torch.arange(images), predicted] += 4
    return pixels, logits, labels


def by_hand(pixels: Tensor, logits: Tensor, labels: Tensor, size: int, grids: int) -> list[float]:
    """The value of each image; NaN for one in no grid."""
    classes = logits.shape[1]
    places = min(classes, grids * size * size)
    taking_part = [place * classes // places for place in range(places)]
    ranked: dict[int, list[int]] = {}
    for c in taking_part:
        right = [i for i in range(len(labels)) if labels[i] == c == logits[i].argmax()]
        ranked[c] = sorted(right, key=lambda i: -torch.softmax(logits[i], 0).max().item())
    values, made, rank = [math.nan] * len(labels), 0, 0
    while made < grids and rank < math.ceil(grids / (places // size**2)):
        at_rank = [c for c in taking_part if len(ranked[c]) > rank]
        turn = rank % max(len(at_rank), 1)
        at_rank = at_rank[turn:] + at_rank[:turn]
        while len(at_rank) >= size * size and made < grids:
            chosen, at_rank = at_rank[: size * size], at_rank[size * size :]
            rows = [
                torch.cat([pixels[ranked[c][rank]] for c in chosen[row * size :][:size]], 2)
                for row in range(size)
            ]
            grid = torch.cat(rows, 1)[None]
            for cell, c in enumerate(chosen):
                heat = attribution(grid, torch.tensor([[c]]))[0, 0].clamp(min=0)
                y, x = cell // size * SIDE[0], cell % size * SIDE[1]
                own = heat[y : y + SIDE[0], x : x + SIDE[1]].sum().item()
                total = heat.sum().item()
                values[ranked[c][rank]] = own / total if total else 0.0
            made += 1
        rank += 1
    return values


@pytest.mark.parametrize(
    ("images", "classes", "size", "grids"),
    [(60, 6, 2, 5), (200, 10, 3, 8), (40, 4, 2, 50), (90, 20, 2, 3), (90, 20, 2, 40)],
)
def test_equals_the_slow_formulation(images: int, classes: int, size: int, grids: int) -> None:
    pixels, logits, labels = inputs(images, classes)
    metric = PointingGame(classes, attribution, size=size, grids=grids)
    for some in torch.arange(images).split(7):
        metric.update(pixels[some], logits[some], labels[some])
    want = by_hand(pixels, logits, labels, size, grids)
    assert metric.per_image().tolist() == pytest.approx(want, nan_ok=True)
    counted = [value for value in want if not math.isnan(value)]
    assert len(counted) >= size * size
    assert metric.compute().item() == pytest.approx(sum(counted) / len(counted))
    assert 1 / size**2 < metric.compute() < 1
    drawn = torch.randint(3, (5, images), generator=torch.Generator().manual_seed(1))
    for got, row in zip(metric.replicate(drawn).tolist(), drawn.tolist(), strict=True):
        again = [v for v, n in zip(want, row, strict=True) for _ in range(n) if not math.isnan(v)]
        assert got == pytest.approx(sum(again) / len(again))


def test_an_attribution_that_ignores_the_images_has_the_share_of_a_cell() -> None:
    def flat(grids: Tensor, classes: Tensor) -> Tensor:
        return torch.ones(1, classes.shape[1], *grids.shape[2:])

    metric = PointingGame(9, flat)
    metric.update(torch.rand(9, 3, 5, 7), torch.eye(9), torch.arange(9))
    assert metric.compute().item() == pytest.approx(1 / 9)


def test_where_nothing_is_positive_nothing_is_found() -> None:
    metric = PointingGame(4, lambda grids, classes: -grids.abs().expand(-1, 4, -1, -1), size=2)
    metric.update(torch.rand(4, 1, 3, 3), torch.eye(4), torch.arange(4))
    assert metric.per_image().tolist() == [0.0] * 4


def test_too_few_classes_that_are_classified_right_are_nan() -> None:
    metric = PointingGame(4, attribution, size=2)
    metric.update(torch.rand(8, 1, 3, 3), torch.eye(4)[:1].expand(8, 4), torch.arange(8) % 4)
    assert metric.compute().isnan()


def test_no_more_images_are_kept_than_grids_take() -> None:
    pixels, logits, labels = inputs(200, 6)
    metric = PointingGame(6, attribution, size=2, grids=3)
    metric.update(pixels, logits, labels)
    assert [len(kept) for kept in metric._kept.values()] == [3] * 6


def test_more_images_and_a_reset_make_grids_anew() -> None:
    pixels, logits, labels = inputs(80, 6)
    metric = PointingGame(6, attribution, size=2, grids=4)
    metric.update(pixels[:40], logits[:40], labels[:40])
    first = metric.compute()
    metric.update(pixels[40:], logits[40:], labels[40:])
    want = by_hand(pixels, logits, labels, 2, 4)
    assert metric.per_image().tolist() == pytest.approx(want, nan_ok=True)
    metric.reset()
    metric.update(pixels[:40], logits[:40], labels[:40])
    assert metric.compute() == first


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="size: got 3 with num_classes=8, want 9 classes or more"):
        PointingGame(8, attribution)
    with pytest.raises(ValueError, match="size: got 1"):
        PointingGame(8, attribution, size=1)
    metric = PointingGame(4, attribution, size=2)
    pixels, logits, labels = inputs(6, 4)
    with pytest.raises(ValueError, match=r"logits: got shape \(6, 3\), want \(6, 4\)"):
        metric.update(pixels, logits[:, :3], labels)
    with pytest.raises(ValueError, match="images: got shape"):
        metric.update(pixels[0], logits, labels)
    with pytest.raises(RuntimeError, match="want update"):
        metric(pixels, logits, labels)
    wrong = PointingGame(4, lambda grids, classes: grids, size=2)
    wrong.update(torch.rand(4, 1, 3, 3), torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match="attribution: yielded"):
        wrong.compute()
