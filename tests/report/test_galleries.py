import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from picnn_fast.explain import LocalisationExamples, PathwayGradCam, filter_index
from picnn_fast.models import make_interpretable
from picnn_fast.report.galleries import (
    Picture,
    data_uri,
    filter_gallery,
    grad_cam_gallery,
    heat_scale,
    localisation_gallery,
    peak_gallery,
)
from tests.report.pages import draw

NAMES = ["ant", "bee", "cat"]


def decoded(uri):
    file = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
    return np.asarray(Image.open(file).convert("RGB")).astype(float) / 255


@pytest.fixture(scope="module")
def images():
    return draw(12, 3, 32, 32, seed=3)


@pytest.fixture(scope="module")
def index(images):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    network = make_interpretable(
        (features, head), "picnn", num_classes=3, num_filters=6, insert_conv=False
    )
    return filter_index(network.eval(), [(images, torch.arange(12) % 3)], top=4)


def test_a_filters_images_come_by_activation_and_by_contribution(index, images):
    gallery = filter_gallery(index, [4, 1], dict(enumerate(images)), NAMES)
    assert [row.heading for row in gallery.rows] == ["fires most on", "adds most to"] * 2
    for row, (number, ranking) in zip(
        gallery.rows,
        [(n, r) for n in (4, 1) for r in (index.by_activation, index.by_contribution)],
        strict=True,
    ):
        assert len(row.pictures) == 4
        for place, picture in enumerate(row.pictures):
            image = int(ranking.images[number, place])
            assert f"Test image {image} of class {NAMES[image % 3]}" in picture.alt
            shown = images[image].movedim(0, -1).numpy()
            assert np.array_equal(picture.pixels[::5, ::5], shown)  # its colours, larger
            told = float(picture.caption.rpartition(": ")[2])
            assert told == pytest.approx(float(ranking.values[number, place]), rel=0.01)


def test_a_box_is_where_the_field_of_the_peak_ends(index, images):
    (fired, _) = filter_gallery(index, [2], dict(enumerate(images)), NAMES).rows
    for place, picture in enumerate(fired.pictures):
        row, column = index.by_activation.positions[2, place].tolist()
        # A window of 5 pixels every 4.
        edges = (4 * column, 4 * row, 4 * column + 5, 4 * row + 5)
        assert picture.box == pytest.approx([edge / 32 for edge in edges])


def test_a_filter_is_told_in_a_sentence(index, images):
    gallery = filter_gallery(index, [3], dict(enumerate(images)), NAMES)
    owner = NAMES[int(index.owner[3])]
    nearest = int(index.neighbours[3, 0])
    above = gallery.rows[0].above
    assert above.startswith(f"Filter 3 stands for {owner} ({float(index.owned[3]):.2f}); tells")
    assert f"goes along with filter {nearest} (" in above
    assert gallery.rows[1].above == ""


def test_filters_and_images_that_are_not_there_are_refused_in_a_line(index, images):
    with pytest.raises(ValueError, match=r"^filters: got none, want at least 1"):
        filter_gallery(index, [], {}, NAMES)
    with pytest.raises(ValueError, match=r"^filters: got 6, want"):
        filter_gallery(index, [6], dict(enumerate(images)), NAMES)
    with pytest.raises(ValueError, match=r"^images: got no image \d+, want all of"):
        filter_gallery(index, [0], {}, NAMES)


def test_peaks_are_bright_where_they_fall():
    images = torch.zeros(2, 1, 20, 40)
    peaks = torch.full((2, 5, 2), torch.nan)
    peaks[0, :3] = torch.tensor([30.5, 4.5])
    (row,) = peak_gallery(images, peaks, ["a", "b"]).rows
    assert [picture.caption for picture in row.pictures] == [
        "a",
        "3 filters fire",
        "b",
        "0 filters fire",
    ]
    heat = row.pictures[1].pixels.mean(-1)
    tall, wide = heat.shape
    brightest = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(brightest[0] / tall - 4.5 / 20) < 0.06
    assert abs(brightest[1] / wide - 30.5 / 40) < 0.03
    assert row.pictures[3].pixels.max() < 0.05


def test_the_highest_heat_of_an_image_is_bright_in_every_row():
    images, dark = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8)
    heat = torch.ones(2, 8, 8) * torch.tensor([1.0, 0.01])[:, None, None]
    gallery = grad_cam_gallery(images, PathwayGradCam(heat, heat / 2, dark, dark), "ab", "ab")
    assert [row.said for row in gallery.rows] == ["", ""]
    first, second = (row.pictures[1].pixels for row in gallery.rows)
    assert np.allclose(first, second)
    assert first.mean() > 0.5
    assert "through the class's filters: at most 50%" in gallery.rows[1].pictures[2].alt


def test_localisation_shows_heat_overlap_and_the_outline_of_the_object():
    images, masks = torch.full((2, 3, 40, 40), 0.5), torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 10:20, 10:30] = True
    heat = torch.zeros(2, 40, 40)
    heat[:, 30:, 30:] = 2
    ious = torch.tensor([0.25, torch.nan])
    seen = LocalisationExamples(heat, heat > 1, ious, heat / 2, heat > 1, ious)
    gallery = localisation_gallery(images, seen, masks, ["a", "b"])
    assert gallery.columns == ("image", "CAM", "GradMap")
    first, second = gallery.rows
    assert [picture.caption for picture in first.pictures] == ["", "IoU 0.25", "IoU 0.25"]
    assert [picture.caption for picture in second.pictures] == ["", "no object", "no object"]
    image = first.pictures[0].pixels[::4, ::4]  # each pixel is four long
    inside = {(y, x) for y in range(10, 20) for x in range(10, 30)}
    core = {(y, x) for y in range(11, 19) for x in range(11, 29)}
    around = {(y, x) for y in range(9, 21) for x in range(9, 31)}
    assert {tuple(place) for place in np.argwhere((image == 0).all(-1))} == inside - core
    assert {tuple(place) for place in np.argwhere((image == 1).all(-1))} == around - inside
    assert np.array_equal(second.pictures[0].pixels[::4, ::4], np.full((40, 40, 3), 0.5))
    cam = first.pictures[1].pixels.mean(-1)
    assert cam[-2:, -2:].min() > 0.5 > cam[:4, :4].max()


@pytest.mark.parametrize("shape", [(400, 200), (200, 400, 3), (8, 8), (300, 300)])
def test_pictures_are_small_files_that_keep_their_proportions(shape):
    pixels = np.full(shape, 0.5, dtype=np.float32)
    shown = decoded(data_uri(Picture(pixels=pixels, alt="grey")))
    assert shown.shape[0] / shown.shape[1] == pytest.approx(shape[0] / shape[1], abs=0.02)
    assert max(shown.shape) <= 160
    assert np.allclose(shown, 0.5, atol=0.02)


def test_the_scale_of_heat_rises_in_brightness():
    light = decoded(heat_scale()).mean((0, 2))
    assert light[0] < 0.05
    assert light[-1] > 0.8
    assert (np.diff(light[::16]) > 0).all()
