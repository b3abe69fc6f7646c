import itertools
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from picnn_fast.evaluation import FIGURES
from picnn_fast.explain import PathwayGradCam
from picnn_fast.report import (
    plot_correspondence,
    plot_curves,
    plot_grad_cam,
    plot_template_gallery,
)
from picnn_fast.report.figures import sort_filters
from picnn_fast.report.style import displayed


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


@pytest.mark.parametrize("classes", [3, 100])
def test_colours_reach_the_highest_probability_of_many_classes(classes):
    flat = torch.full((classes, 2 * classes), 1 / classes)
    sharp = torch.eye(classes)
    names = [str(i) for i in range(classes)]
    shown = {}
    for matrices in ({"flat": flat}, {"sharp": sharp}, {"flat": flat, "sharp": sharp}):
        figure = plot_correspondence(matrices, names)
        images = [axis.images[0] for axis in figure.axes if axis.images]
        for title, image in zip(matrices, images, strict=True):
            shown.setdefault(title, []).append(image.get_clim())
    assert shown["flat"] == [pytest.approx((0, 1 / classes))] * 2
    assert shown["sharp"] == [(0, 1)] * 2


def test_probabilities_that_are_high_share_one_scale_from_0_to_1():
    matrices = {"high": torch.full((2, 3), 0.6), "sure": torch.eye(2, 3), "none": torch.zeros(2, 3)}
    figure = plot_correspondence(matrices, "ab")
    assert [axis.images[0].get_clim() for axis in figure.axes if axis.images] == [(0, 1)] * 3
    assert len(figure.axes) == 4  # and one bar


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


def _curves(runs, terms=1, figures=("acc1", "acc2", "acc3"), **options):
    values = {f"train/{i}": 1.0 for i in range(terms)}
    logged = [f"val/{name}" for name in figures]
    history = [{"epoch": e, **values, **dict.fromkeys(logged, e / 4)} for e in range(3)]
    return plot_curves({f"run {i}": history for i in range(runs)}, **options)


HEADINGS = {name: f"{figure.heading}, {figure.meaning}" for name, figure in FIGURES.items()}


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_the_legend_of_the_curves_is_whole(runs):
    figure = _curves(runs, headings=HEADINGS)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, (width, height) = legend.get_window_extent(), figure.bbox.size
    assert (box.x0 >= 0, box.x1 <= width, box.y0 >= 0, box.y1 <= height) == (True,) * 4
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [HEADINGS[name] for name in ("acc1", "acc2", "acc3")]


def test_the_legend_tells_what_any_run_has():
    plain = [{"epoch": 0, "train/a": 1.0, "val/acc1": 0.5}]
    figure = plot_curves({"plain": plain, "more": [{**plain[0], "val/acc3": 0.25}]})
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text[:4] for text in texts] == ["ACC1", "ACC3"]


def test_every_figure_that_is_logged_is_drawn_under_its_heading_or_its_name():
    headings = {"mis": "MIS, nats", "of_nobody": "not logged", "acc1": "ACC1"}
    figure = _curves(2, figures=("acc1", "edges", "mis", "bars"), headings=headings)
    wanted = ["MIS, nats", "ACC1", "BARS", "EDGES"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == wanted
    for axis in figure.axes[:2]:
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert list(lines) == wanted
        assert all(list(line.get_ydata()) == [0, 0.25, 0.5] for line in lines.values())


def test_a_figure_looks_the_same_in_every_run_and_twelve_are_told_apart():
    names = [f"figure_{i:02}" for i in range(12)]
    lines = _curves(1, figures=names).axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == len(lines) == 12
    headings = {name: name for name in names}
    (alone,) = _curves(1, figures=names[3:4], headings=headings).axes[0].get_lines()
    for look in ("get_color", "get_linestyle", "get_linewidth"):
        assert getattr(alone, look)() == getattr(lines[3], look)()


@pytest.mark.parametrize(("value", "low", "high"), [(0.5, 0, 1.02), (2.5, None, 2.5)])
def test_figures_that_are_no_shares_are_whole_in_the_picture(value, low, high):
    history = [{"epoch": e, "train/a": 1.0, "val/acc1": 0.5, "val/mis": value} for e in range(2)]
    bottom, top = plot_curves({"run": history}).axes[0].get_ylim()
    assert bottom == low if low is not None else bottom <= 0.5
    assert top >= high


def test_what_belongs_to_classes_is_called_no_probability():
    for matrices in ({"gate": torch.eye(3)}, {"gate": torch.eye(3), "flat": torch.ones(3, 3) / 3}):
        figure = plot_correspondence(matrices, "abc")
        texts = " ".join(text.get_text() for text in figure.findobj(Text))
        assert "probab" not in texts
        assert "share" in texts


def test_curves_that_lie_on_each_other_are_all_seen(tmp_path):
    figure = _curves(1)
    figure.savefig(tmp_path / "same.png")
    height = round(figure.axes[0].get_window_extent().y1)
    drawn = _pixels(tmp_path / "same.png")[-height:]  # without the legend
    for colour in ("1b6ca8", "2e9e5b", "d1495b"):
        wanted = np.array(list(bytes.fromhex(colour))) / 255
        assert (np.abs(drawn - wanted).max(-1) < 0.02).sum() > 100


@pytest.mark.parametrize("terms", [3, 9])
def test_curves_are_told_apart_without_colours(terms):
    accuracy, loss = _curves(1, terms).axes[:2]
    lines = accuracy.get_lines()
    assert len({line.get_linestyle() for line in lines}) == len(lines) == 3
    lines = loss.get_lines()
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == len(lines) == terms
    dashes = [line.get_linestyle() for line in lines]
    assert all(one != other for one, other in itertools.pairwise(dashes))


def test_epochs_are_whole_numbers():
    figure = _curves(1)
    figure.draw_without_rendering()
    assert all(tick == int(tick) for tick in figure.axes[1].get_xticks())


@pytest.mark.parametrize("name", ["$x_$", "a$b$c", "$100", "[red]", r"\frac"])
def test_names_are_shown_as_they_are(name):
    dark = torch.zeros(1, 8, 8)
    for figure, count in (
        (plot_correspondence({name: torch.eye(1)}, [name]), 2),
        (plot_curves({name: [{"epoch": 0, "train/a": 0.5}]}), 1),
        (plot_grad_cam(dark[None], {name: PathwayGradCam(dark, dark, dark, dark)}, [name]), 2),
        (plot_template_gallery({name: torch.ones(2, 2)}), 1),
    ):
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_text() == name]
        assert not any(text.get_parse_math() for text in texts)
        assert len(texts) >= count


def test_figures_are_returned_and_written_only_where_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dark = torch.zeros(1, 8, 8)
    cam = {"PICNN": PathwayGradCam(dark, dark, dark, dark)}
    for draw, *arguments in (
        (plot_correspondence, {"PICNN": torch.eye(3)}, "abc"),
        (plot_curves, {"PICNN": [{"epoch": 0, "val/acc1": 0.5}]}),
        (plot_grad_cam, torch.rand(1, 1, 8, 8), cam, "a"),
    ):
        assert isinstance(draw(*arguments), Figure)
        assert not list(tmp_path.iterdir())
        assert isinstance(draw(*arguments, tmp_path / "figure.png"), Figure)
        (tmp_path / "figure.png").unlink()
    with pytest.raises(ValueError, match="'nothing' is not supported"):
        draw(*arguments, tmp_path / "figure.nothing")
    draw(*arguments, tmp_path / "figure")
    # Neither half a picture nor what it is written in first.
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


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
        plot_grad_cam(images, {"PICNN": PathwayGradCam(heat, heat, dark, dark)}, "abc", path)
        pixels = _pixels(path)[:, : -_pixels(path).shape[1] // 5]  # without the colour bar
        warm.append(((pixels[..., 0] - pixels[..., 2]) > 0.3).mean())
    assert warm[0] > 0.02
    assert warm[1] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_images_out_of_range_are_told_and_shown_whole(channels):
    images = torch.rand(2, channels, 4, 5, generator=torch.Generator().manual_seed(0))
    lowest, highest = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    wanted = ((images - lowest) / (highest - lowest)).movedim(1, -1).squeeze(-1)
    for normalised in ((images - 0.45) / 0.22, 255 * images, images - 1):
        with pytest.warns(UserWarning, match=r"^images: got values from .*want \[0, 1\]"):
            shown = torch.from_numpy(np.stack(displayed(normalised)))
        torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-5)


def test_the_warning_of_images_out_of_range_names_the_callers_line():
    dark = torch.zeros(1, 4, 5)
    with pytest.warns(UserWarning, match=r"^images: got") as told:
        plot_grad_cam(dark[None] - 1, {"PICNN": PathwayGradCam(dark, dark, dark, dark)}, "a")
    assert told[0].filename == __file__


def test_images_within_range_are_shown_as_they_are():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([-0.01, 1.02])  # as resizing may leave it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = displayed(images)
    assert np.array_equal(np.stack(shown), images.clamp(0, 1).movedim(1, -1).numpy())


def test_bad_input_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"^matrices\['x'\]: got shape \(3, 4\)"):
        plot_correspondence({"x": torch.zeros(3, 4)}, "ab", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^histories\['x'\]: got no epochs"):
        plot_curves({"x": []}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^matrices: got none"):
        plot_correspondence({}, "ab", tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^histories: got none"):
        plot_curves({}, tmp_path / "x.png")
    for images, error, message in (
        (torch.zeros(2, 1, 4, 4), ValueError, "labels: got 1 names, want 2"),
        (torch.zeros(1, 2, 4, 4), ValueError, r"images: got shape \(1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "images: got"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            plot_grad_cam(images, {}, "a", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
