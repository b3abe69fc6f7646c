"""Every picture can be drawn into a figure of the user's own."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure, SubFigure

from picnn_fast import report
from picnn_fast.backbones import receptive_field
from picnn_fast.explain import PathwayGradCam, explain_image, filter_index
from picnn_fast.models import make_interpretable
from picnn_fast.report import (
    plot_correspondence,
    plot_curves,
    plot_explanation,
    plot_filter_images,
    plot_filter_page,
    plot_grad_cam,
    plot_peak_heat_map,
    plot_template_gallery,
)
from tests.report.pages import draw


@pytest.fixture(scope="module")
def drawings():
    """Function to arguments."""
    torch.manual_seed(0)
    network = make_interpretable("small-cnn", "icnn", num_classes=3, num_filters=8).eval()
    images = draw(6, 3, 32, 32)
    with torch.no_grad():
        maps = network.filter_maps(images)
    heat = draw(2, 32, 32)
    index = filter_index(network, [(images, torch.arange(6) % 3)], top=3)
    history = [{"epoch": e, "train/a": 1.0, "val/acc1": 0.5} for e in range(2)]
    field = receptive_field(network.features, 32)
    return {
        plot_correspondence: ({"a": torch.eye(3), "b": torch.eye(3)}, "abc"),
        plot_curves: ({"a": history},),
        plot_explanation: (images[0], explain_image(network, images[0]), "abc"),
        plot_filter_images: (images, maps, field, [0, 2]),
        plot_filter_page: (index, 1, dict(enumerate(images)), "abc"),
        plot_grad_cam: (images[:2], {"a": PathwayGradCam(*[heat] * 4)}, "ab"),
        plot_peak_heat_map: (images, 32 * draw(6, 8, 2)),
        plot_template_gallery: ({"a": torch.eye(3)},),
    }


PLOTS = [name for name in report.__all__ if name.startswith("plot_")]


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_takes_the_place_of_axes_and_leaves_the_others(name, drawings):
    function = getattr(report, name)
    arguments = drawings[function]
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 8), layout="constrained")
    try:
        left.plot([0, 1], [0, 1])
        place = function(*arguments, ax=right)
        assert isinstance(place, SubFigure)
        assert figure.axes[0] is left
        assert right not in figure.axes
        alone = function(*arguments)
        assert isinstance(alone, Figure)
        _, *drawn = figure.axes
        assert len(drawn) == len(alone.axes) > 0
        figure.canvas.draw()
        middle = figure.bbox.width / 2
        assert all(axis.bbox.x0 > middle - 50 for axis in drawn)
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        assert (pixels[:, int(middle) :] < 250).any()
    finally:
        plt.close(figure)


def test_axes_that_are_no_cell_and_a_file_beside_axes_are_refused_in_a_line(tmp_path):
    figure = Figure()
    with pytest.raises(ValueError, match=r"^ax: got axes that are no cell of a grid, want"):
        plot_template_gallery({"a": torch.eye(3)}, ax=figure.add_axes((0, 0, 1, 1)))
    with pytest.raises(ValueError, match=r"^path: got .*x.png' beside ax, want one of the two"):
        plot_template_gallery({"a": torch.eye(3)}, tmp_path / "x.png", ax=figure.subplots())
    assert not list(tmp_path.iterdir())
