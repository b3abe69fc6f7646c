import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.explain import PathwayGradCam
from picnn_fast.report import plot_correspondence, plot_curves, plot_grad_cam
from picnn_fast.report.figures import sort_filters


def _pixels(path):
    return matplotlib.image.imread(path)[:, :, :3]


def test_correspondence_shows_the_probabilities(tmp_path):
    sharp, flat = torch.eye(4).repeat(1, 5), torch.full((4, 20), 0.25)
    for name, matrix in (("sharp", sharp), ("flat", flat)):
        plot_correspondence({"PICNN": matrix}, "abcd", tmp_path / f"{name}.png")
    black = [
        (_pixels(tmp_path / f"{name}.png") < 0.03).all(-1).mean() for name in ("sharp", "flat")
    ]
    # Black is probability 0: three quarters of the sharp matrix, none of the flat one.
    assert black[0] > 0.2
    assert black[1] < 0.05


@given(classes=st.integers(1, 6), filters=st.integers(1, 30), seed=st.integers(0, 99))
def test_filters_are_sorted_by_class_then_probability(classes, filters, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(classes, filters, generator=generator)
    order = sort_filters(matrix)
    assert sorted(order.tolist()) == list(range(filters))
    best, owner = matrix[:, order].max(0)
    assert (owner.diff() >= 0).all()
    assert (best.diff() <= 0)[owner.diff() == 0].all()


def test_curves_draw_every_run(tmp_path):
    history = [
        {"epoch": e, "train/a": 1 / (e + 1), "train/loss": 1.0, "val/acc1": e / 5, "val/acc3": 0.2}
        for e in range(5)
    ]
    plot_curves({"one": history}, tmp_path / "one.png")
    plot_curves({"one": history, "two": history}, tmp_path / "two.png")
    one, two = _pixels(tmp_path / "one.png"), _pixels(tmp_path / "two.png")
    assert two.shape[1] > 1.8 * one.shape[1]
    blue = np.array([0x1B, 0x6C, 0xA8]) / 255
    counts = [(np.abs(image - blue).max(-1) < 0.02).sum() for image in (one, two)]
    assert counts[1] > 1.5 * counts[0] > 0


def test_curves_show_terms_below_zero(tmp_path):
    history = [{"epoch": e, "train/a": 1.0, "train/b": -0.1 * e - 0.1} for e in range(5)]
    plot_curves({"one": history, "two": [{"epoch": 0, "train/a": 1.0}]}, tmp_path / "below.png")
    orange = np.array([0xE0, 0x8E, 0x45]) / 255
    drawn = np.abs(_pixels(tmp_path / "below.png") - orange).max(-1) < 0.02
    assert np.ptp(drawn.nonzero()[0]) > 50  # from -0.1 to -0.5, beside the legend's line


@pytest.mark.parametrize("channels", [1, 3])
def test_grad_cam_shows_where_the_heat_is(tmp_path, channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 8, 8, generator=generator).expand(3, channels, 8, 8)
    dark = torch.zeros(3, 8, 8)
    hot = dark.clone()
    hot[:, 2:6, 2:6] = 1
    path = tmp_path / "cam.png"
    warm = []
    for heat in (hot, dark):
        plot_grad_cam(images, {"PICNN": PathwayGradCam(heat, heat, dark)}, "abc", path)
        pixels = _pixels(path)[:, : -_pixels(path).shape[1] // 5]  # without the colour bar
        warm.append(((pixels[..., 0] - pixels[..., 2]) > 0.3).mean())
    assert warm[0] > 0.02
    assert warm[1] == 0


def test_bad_input_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"^matrices\['x'\]: got shape \(3, 4\)"):
        plot_correspondence({"x": torch.zeros(3, 4)}, "ab", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^histories\['x'\]: got no epochs"):
        plot_curves({"x": []}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
