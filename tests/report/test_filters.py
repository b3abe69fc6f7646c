"""The page of one filter."""

import pytest
import torch
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.text import Text

from picnn_fast.explain import filter_index
from picnn_fast.models import make_interpretable
from picnn_fast.report import plot_filter_page

NAMES, PARTS = ["ant", "bee", "$c$"], ["head", "$tail$"]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    network = make_interpretable("small-cnn", "picnn", num_classes=3, num_filters=8)
    images, labels = torch.rand(14, 3, 32, 32), torch.arange(14) % 3
    masks = torch.rand(14, 2, 32, 32) < 0.5
    return filter_index(network, [(images, labels, masks)], top=11), dict(enumerate(images))


def _page(made, number=5, **change):
    index, images = made
    arguments = {"images": images, "class_names": NAMES, "part_names": PARTS, **change}
    return plot_filter_page(index, number, **arguments)


def _texts(axes):
    return [text.get_text() for axis in axes for text in axis.findobj(Text) if text.get_text()]


def test_both_rankings_are_shown_in_order_in_the_colours_of_the_images(made, tmp_path):
    index, images = made
    figure = _page(made, path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 22
    rankings = ((index.by_activation, ""), (index.by_contribution, "+"))
    for row, (ranking, sign) in enumerate(rankings):
        for place in range(11):
            axis = shown[11 * row + place]
            pixels = images[int(ranking.images[5, place])].movedim(0, -1).numpy()
            assert (axis.images[0].get_array() == pixels).all()
            label, guess = (int(x[5, place]) for x in (ranking.labels, ranking.predicted))
            name = NAMES[label] if label == guess else f"{NAMES[label]} → {NAMES[guess]}"
            value = f"{ranking.values[5, place].item():{sign}.3g}"
            assert axis.get_title() == f"{name}\n{value}"


def test_a_box_ends_where_the_field_does_and_is_open_where_it_goes_beyond_the_image(made):
    index, _ = made
    shown = [axis for axis in _page(made).axes if axis.images]
    for place, axis in enumerate(shown[:11]):
        box = index.by_activation.boxes[5, place] - 0.5
        (drawn,) = [p for p in axis.patches if type(p) is Rectangle]
        (circle,) = [p for p in axis.patches if isinstance(p, Ellipse)]
        x0, y0, x1, y1 = drawn.get_bbox().extents
        assert (x1 - x0, y1 - y0) == index.field.size[::-1]
        visible = torch.tensor([x0, y0, x1, y1]).clamp(-0.5, 31.5)
        assert visible.tolist() == box.tolist()
        assert circle.center == ((x0 + x1) / 2, (y0 + y1) / 2)
        assert (axis.get_xlim(), axis.get_ylim()) == ((-0.5, 31.5), (31.5, -0.5))


def test_bars_are_shares_of_classes_and_parts_and_what_the_filter_tells(made):
    index, _ = made
    shares, parts, information, near = [axis for axis in _page(made).axes if not axis.images]
    ticks = [text.get_text() for text in shares.get_yticklabels()]
    for container, ranking in zip(
        shares.containers, (index.by_activation, index.by_contribution), strict=True
    ):
        wanted = ranking.shares(3)[5]
        bars = [patch.get_width() for patch in container]
        assert bars == pytest.approx([wanted[NAMES.index(name)].item() for name in ticks])
    for container, ranking in zip(
        parts.containers, (index.by_activation, index.by_contribution), strict=True
    ):
        order = [PARTS.index(text.get_text()) for text in parts.get_yticklabels()]
        wanted = ranking.parts[5].float().mean(0)[order]
        assert [patch.get_width() for patch in container] == pytest.approx(wanted.tolist())
    told = index.mutual_information[:, 5].sort(descending=True).values.tolist()
    assert [patch.get_width() for patch in information.patches] == pytest.approx(told)
    assert [text.get_text() for text in near.get_yticklabels()] == [
        f"filter {i}" for i in index.neighbours[5].tolist()
    ]
    widths = [patch.get_width() for patch in near.patches]
    assert widths == pytest.approx(index.correlations[5].tolist())


def test_bars_of_both_rankings_are_told_apart_without_colour(made):
    fired, used = next(axis for axis in _page(made).axes if not axis.images).containers
    greys = [
        0.3 * r + 0.59 * g + 0.11 * b
        for r, g, b, _ in (fired[0].get_facecolor(), used[0].get_facecolor())
    ]
    assert abs(greys[0] - greys[1]) > 0.3
    assert (fired[0].get_hatch(), used[0].get_hatch()) == (None, "///")


def test_it_says_which_class_the_filter_stands_for(made):
    index, _ = made
    owner, owned = int(index.owner[5]), float(index.owned[5])
    (heading,) = (t for t in _page(made).findobj(Text) if t.get_text().startswith("filter 5"))
    assert heading.get_text().startswith(f"filter 5 stands for {NAMES[owner]} ({owned:.2f})")
    nobody = index._replace(owner=torch.full_like(index.owner, -1))
    (heading,) = (
        t
        for t in _page((nobody, made[1])).findobj(Text)
        if t.get_text().startswith("filter 5 stands")
    )
    assert heading.get_text().startswith("filter 5 stands for no class")


def test_without_fields_no_box_is_drawn_and_it_says_so(made):
    index, images = made
    figure = _page((index._replace(field=None, without_field="a reason"), images))
    assert not any(axis.patches for axis in figure.axes if axis.images)
    assert any("may depend on the whole image" in t.get_text() for t in figure.findobj(Text))


def test_of_a_constant_filter_it_says_so(made):
    index, images = made
    for constant in (False, True):
        flags = torch.full_like(index.constant, constant)
        (heading,) = (
            t
            for t in _page((index._replace(constant=flags), images)).findobj(Text)
            if t.get_text().startswith("filter 5 stands")
        )
        assert ("the same in all of them" in heading.get_text()) == constant


def test_a_single_filter_has_no_neighbours(made):
    index, images = made
    alone = index._replace(
        neighbours=index.neighbours[:, :0], correlations=index.correlations[:, :0]
    )
    assert not _page((alone, images)).axes[-1].patches


def test_without_contributions_that_add_up_it_says_to_first_order(made):
    index, images = made
    texts = [t.get_text() for t in _page((index._replace(exact=False), images)).findobj(Text)]
    assert any(text.startswith("adds, to first order, most") for text in texts)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"number": 8}, ValueError, "number: got 8, want an int >= 0 and below 8"),
        ({"number": 1.0}, TypeError, "number: got float"),
        ({"class_names": NAMES[:2]}, ValueError, "class_names: got 2 names, want 3"),
        ({"part_names": []}, ValueError, "part_names: got 0 names, want 2"),
        ({"images": {}}, ValueError, r"images: got no image \d+, want all of"),
        (
            {"images": dict.fromkeys(range(14), torch.rand(3, 32, 30))},
            ValueError,
            r"images\[\d+\]: got shape \(3, 32, 30\), want \[C, 32, 32\]",
        ),
        (
            {"images": dict.fromkeys(range(14), torch.ones(3, 32, 32, dtype=torch.uint8))},
            TypeError,
            r"images\[\d+\]: got dtype",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(made, change, error, text):
    with pytest.raises(error, match=text):
        _page(made, **change)
