from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from picnn_fast.backbones import ReceptiveField
from picnn_fast.report import plot_filter_images, plot_peak_heat_map, plot_template_gallery

FIELD = ReceptiveField((12, 12), (4, 4), (2.0, 2.0), (8, 8), (32, 32), (2.0, 2.0))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def pixels(path: Path) -> Any:
    return matplotlib.image.imread(path)[:, :, :3]


def panels(figure: Figure) -> list[Any]:
    return [axis for axis in figure.axes if axis.images]


def test_templates_share_one_scale_about_zero(tmp_path, figures):
    templates = {f"template {i}": torch.full((5, 7), float(i - 3)) for i in range(8)}
    plot_template_gallery(templates, tmp_path / "gallery.png")
    shown = panels(figures[0])
    assert [axis.get_title() for axis in shown] == list(templates)
    for axis, template in zip(shown, templates.values(), strict=True):
        image = axis.images[0]
        assert np.array_equal(image.get_array(), template.numpy())
        assert image.get_clim() == (-4, 4)
    assert pixels(tmp_path / "gallery.png").shape[:2] == (660, 1980)


def test_the_heat_is_where_the_peaks_are(tmp_path, figures):
    images = torch.zeros(2, 3, 20, 40)
    peaks = torch.tensor([30.5, 4.5]).repeat(2, 6, 1)
    peaks[0, 0] = torch.tensor([5.5, 15.5])
    peaks[1] = torch.nan  # no filter fires
    plot_peak_heat_map(images, peaks, tmp_path / "heat.png", radius=2)
    above, below = panels(figures[0])[:2], panels(figures[0])[2:]
    assert len(above) == len(below) == 2
    heat, nothing = (np.asarray(axis.images[0].get_array()) for axis in below)
    assert heat.shape == (20, 40)
    assert heat[4, 30] == heat.max() == 1
    assert heat[15, 5] == pytest.approx(0.2, abs=1e-3)  # one filter, against five
    assert heat[4, 32] == pytest.approx(np.exp(-0.5), abs=1e-3)
    assert (nothing == 0).all()
    warm = pixels(tmp_path / "heat.png")
    assert ((warm[..., 0] - warm[..., 2]) > 0.3).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_filters_images_come_by_peak_with_map_and_field(tmp_path, figures, channels):
    images = torch.arange(5.0)[:, None, None, None].expand(5, channels, 32, 32) / 10
    maps = torch.zeros(5, 4, 8, 8)
    maps[:, 1, 3, 2] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    maps[:, 3, 0, 7] = 1
    plot_filter_images(images, maps, FIELD, [1, 3], tmp_path / "filters.png", columns=3)
    shown = panels(figures[0])
    assert len(shown) == 6
    assert [axis.get_ylabel() for axis in shown] == ["filter 1", "", "", "filter 3", "", ""]
    greys = [float(np.asarray(axis.images[1].get_array()).flat[0]) for axis in shown]
    assert greys == pytest.approx([0.1, 0.3, 0.4, 0, 0.1, 0.2])  # images 1, 3, 4 and 0, 1, 2
    heat = [np.asarray(axis.images[0].get_array()) for axis in shown]
    assert [h.max() for h in heat] == pytest.approx([1, 0.8, 0.6, 1, 1, 1])
    # Position (3, 2) looks about (10, 14), position (0, 7) about (30, 2), clipped to the image.
    for axis, (x, y), box in (
        (shown[0], (10, 14), (4, 8, 12, 12)),
        (shown[3], (30, 2), (24, 0, 8, 8)),
    ):
        circle, whole = axis.patches
        assert circle.get_center() == (x - 0.5, y - 0.5)
        assert circle.get_width() == pytest.approx(max(2.35482 * 2, 4 * 2**0.5))
        assert (whole.get_x() + 0.5, whole.get_y() + 0.5) == box[:2]
        assert (whole.get_width(), whole.get_height()) == box[2:]
        assert axis.images[0].get_extent() == [-0.5, 31.5, 31.5, -0.5]
    drawn = pixels(tmp_path / "filters.png")
    field = np.array([0x39, 0xD0, 0xC8]) / 255
    assert (np.abs(drawn - field).max(-1) < 0.02).sum() > 300


def test_bad_input_is_refused_by_name(tmp_path):
    images, maps = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 8, 8)
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"^templates: got none"):
        plot_template_gallery({}, path)
    with pytest.raises(ValueError, match=r"^templates\['x'\]: got shape \(3,\)"):
        plot_template_gallery({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"^peaks: got shape \(3, 4, 2\)"):
        plot_peak_heat_map(images, torch.zeros(3, 4, 2), path)
    with pytest.raises(ValueError, match=r"^images: got shape \(2, 2, 32, 32\)"):
        plot_peak_heat_map(images[:, :2], torch.zeros(2, 4, 2), path)
    with pytest.raises(ValueError, match=r"^radius: got 0"):
        plot_peak_heat_map(images, torch.zeros(2, 4, 2), path, radius=0)
    with pytest.raises(ValueError, match=r"^images: got shape \(1, 3, 32, 32\)"):
        plot_filter_images(images[:1], maps, FIELD, [0], path)
    with pytest.raises(ValueError, match=r"^filters: got none"):
        plot_filter_images(images, maps, FIELD, [], path)
    with pytest.raises(ValueError, match=r"^filters: got 4"):
        plot_filter_images(images, maps, FIELD, [4], path)
    with pytest.raises(ValueError, match=r"^columns: got 0"):
        plot_filter_images(images, maps, FIELD, [0], path, columns=0)
    assert not list(tmp_path.iterdir())


def test_figures_are_returned_and_images_out_of_range_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, maps = torch.rand(2, 3, 32, 32) - 2, torch.rand(2, 3, 8, 8)
    assert isinstance(plot_template_gallery({"flat": torch.ones(3, 3)}), Figure)
    for draw, *arguments in (
        (plot_peak_heat_map, torch.zeros(2, 1, 2)),
        (plot_filter_images, maps, FIELD, [0]),
    ):
        with pytest.warns(UserWarning, match=r"^images: got values from -2 to -1"):
            figure = draw(images, *arguments)
        assert isinstance(figure, Figure)
    assert not list(tmp_path.iterdir())
