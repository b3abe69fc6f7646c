"""The picture of an explained image."""

import pytest
import torch
from matplotlib.text import Text

from picnn_fast.explain import explain_image
from picnn_fast.models import make_interpretable
from picnn_fast.report import plot_explanation

NAMES = ["ant", "bee", "$c$"]


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    network = make_interpretable("small-resnet", num_classes=3, num_filters=9).eval()
    image = torch.rand(1, 8, 8)
    return image, explain_image(network, image)


def _texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_the_filters_that_add_most_are_shown_with_what_they_add(seen, tmp_path):
    image, explanation = seen
    figure = plot_explanation(image, explanation, NAMES, tmp_path / "shown.png", filters=4)
    assert (tmp_path / "shown.png").stat().st_size > 10_000
    texts = _texts(figure)
    for i in explanation.contributions.argsort(descending=True)[:4].tolist():
        value = f"{explanation.contributions[i]:+.2f}"
        assert any(t.startswith(f"filter {i},") and t.endswith(value) for t in texts), (i, texts)
    assert sum(text.startswith("filter ") for text in texts) == 4


def test_bars_tell_what_the_filters_of_each_class_add_and_what_is_left_without_them(seen):
    image, explanation = seen
    figure = plot_explanation(image, explanation, NAMES)
    bars = [patch.get_width() for patch in figure.axes[-1].patches]
    assert bars == pytest.approx([group.contribution for group in explanation.groups])
    texts = _texts(figure)
    for group in explanation.groups:
        assert f"class {NAMES[group.owner]}, {len(group.filters)} filters" in texts
        left = group.logits_without.softmax(0)
        assert f"without: {NAMES[int(left.argmax())]} ({left.max():.2f})" in texts


def test_maps_of_tokens_are_not_shown_and_bars_are(seen):
    image, explanation = seen
    tokens = explanation._replace(maps=explanation.maps.flatten(1).T)
    figure = plot_explanation(image, tokens, NAMES, channel_dim=-1)
    assert not any(text.startswith("filter ") for text in _texts(figure))
    assert len(figure.axes[-1].patches) == len(explanation.groups)


def test_wrong_arguments_are_refused_by_name(seen):
    image, explanation = seen
    with pytest.raises(ValueError, match="class_names: got 2 names, want 3"):
        plot_explanation(image, explanation, NAMES[:2])
    with pytest.raises(ValueError, match=r"image: got .*, want \[C, H, W\]"):
        plot_explanation(image[0], explanation, NAMES)
    with pytest.raises(ValueError, match="filters: got 0"):
        plot_explanation(image, explanation, NAMES, filters=0)
