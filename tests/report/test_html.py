import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from picnn_fast.explain import PathwayGradCam
from picnn_fast.report import html
from picnn_fast.report.galleries import grad_cam_gallery
from picnn_fast.report.html import render
from picnn_fast.report.interactive import confusion_chart, curves_chart, matrix_chart, shortened
from tests.report.pages import HOSTILE, draw, hostile, network, report


class Page(HTMLParser):
    """What a browser would make of a page: elements, text, and what scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.scripts, self._within = [], "", [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text += " " if tag in ("th", "td", "p", "div") else ""
        if tag in ("script", "style"):
            self._within = tag
            if tag == "script":
                self.scripts.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self._within = None if tag == self._within else self._within

    def handle_data(self, data):
        if self._within == "script":
            self.scripts[-1][1] += data
        elif self._within is None:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page():
    return Page(render(report()))


def test_a_page_fetches_nothing_and_forbids_it(page):
    sources = [a[key] for _, a in page.elements for key in ("src", "href", "srcset") if key in a]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not page.all("link") + page.all("iframe") + page.all("object")
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    style = re.search(r"<style>(.*?)</style>", render(report()), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_in_the_page_once_and_the_page_stays_small(page):
    assert sum("plotly.js v" in text for _, text in page.scripts) == 1
    assert len(render(report()).encode()) < 6_000_000


def test_names_from_the_data_are_text_wherever_they_stand():
    text = render(hostile())
    page = Page(text)
    # Plotly and the page's own are the only code, and the rest is data.
    code = [content for attributes, content in page.scripts if not attributes]
    assert len(code) == 2
    assert not any("alert(" in content for content in code[1:])
    assert {a["type"] for a, _ in page.scripts if a} == {"application/json"}
    assert not page.all("b")
    assert not [key for _, a in page.elements for key in a if key.startswith("on")]
    for name in HOSTILE:
        assert name in page.text
        assert name not in text
    assert [a["aria-label"] for a in page.all("form")][:1] == [
        f"Search and order of the matrix of {HOSTILE[1]}"
    ]


def test_what_cannot_be_had_says_why_in_its_place():
    without = dataclasses.replace(network(), ownership="no filter", grad_cam="no <captum>")
    text = Page(render(report(networks=[without], histories={}, figures=[], provenance={}))).text
    for reason in ("no filter", "no <captum>", "hold no logs", "no figure was measured"):
        assert re.search(rf"Not here: [^.]*{reason}", text), reason
    assert "matrix-1" not in text
    empty = Page(render(report(networks=[], histories={})))
    assert "no network could be read" in empty.text
    assert not [a for a in empty.all("div") if "chart" in a.get("class", "")]


def test_every_picture_and_chart_says_what_it_shows_in_words(page):
    assert all(len(a["alt"]) > 10 for a in page.all("img"))
    charts = [a for a in page.all("div") if "chart" in a.get("class", "")]
    assert len(charts) >= 4
    assert all(a["role"] in ("img", "group") and len(a["aria-label"]) > 10 for a in charts)
    alts = [a["alt"] for a in page.all("img")]
    assert "Test image of class class 0" in alts
    assert any("as many at random: at most" in alt for alt in alts)


def test_the_table_tells_values_intervals_and_reasons(page):
    text = " ".join(page.text.split())
    told = "how to read itChance is a third. 0.994 (best) [0.981, 1.000]"
    assert f"ACC1 ↑ accuracy by all filters {told}" in text
    assert "n/a STD has none" in text
    assert "no performer p, Δ error" in text


def test_curves_are_a_table_too():
    text = " ".join(Page(render(report())).text.split())
    assert "ACC1 as a table epoch PICNN STD 1 0 0 2 0.25 0.25 3 0.5 0.5 4 0.75 0.75" in text


def _numbers(text):
    return np.frombuffer(base64.b64decode(text), "<u2")


def _matrix(chart):
    """The matrix that the page can tell, from what is kept of it."""
    classes, filters = len(chart["classes"]), len(chart["order"])
    index, share = (_numbers(chart[key]).reshape(filters, -1) for key in ("index", "share"))
    told = np.zeros((filters, classes))
    np.put_along_axis(told, index, share * chart["scale"] / 65535, 1)
    return torch.from_numpy(told.T).float()


@pytest.mark.parametrize("top", [1.0, 0.01])
def test_the_page_holds_every_share_of_a_matrix_that_fits(top):
    shares = top * draw(7, 30)
    chart = matrix_chart(shares, "abcdefg", 10**6)
    torch.testing.assert_close(_matrix(chart), shares, rtol=0, atol=chart["scale"] / 65535)
    assert chart["kept"] == 7
    assert chart["overview"] is None


def test_filters_are_counted_by_the_class_that_keeps_most():
    shares = torch.tensor([[0.9, 0.2, 0.4, 0.0], [0.1, 0.8, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    chart = matrix_chart(shares, "abc", 10**6)
    assert (chart["most"], chart["half"]) == ([2, 1, 0], [1, 1, 0])
    assert chart["owner"] == [0, 1, 0, -1]


def test_a_matrix_of_1000_classes_is_bounded_and_keeps_what_matters():
    classes, filters = 1000, 12_800
    owner = torch.arange(filters) % classes
    shares = 0.001 * draw(classes, filters)
    shares[owner, torch.arange(filters)] = 0.95
    chart = matrix_chart(shares, [f"n{i:08}" for i in range(classes)], 1_800_000)
    told = _matrix(chart)
    assert (chart["window"], 4 <= chart["kept"] < classes) == (40, True)
    torch.testing.assert_close(told.max(0).values, shares.max(0).values, rtol=0, atol=2e-5)
    assert torch.equal(told.argmax(0), owner)
    (overview,) = chart["overview"]["data"]
    assert overview["z"]["shape"] == "120, 240"
    page = render(report(networks=[network(classes=classes, filters=filters)] * 1))
    assert len(page.encode()) < 9_000_000


def test_the_overview_shows_the_highest_share_of_every_block():
    shares = torch.zeros(130, 500)
    shares[17, 33] = 0.7
    chart = matrix_chart(shares, [str(i) for i in range(130)], 10**6)
    z = chart["overview"]["data"][0]["z"]
    values = np.frombuffer(base64.b64decode(z["bdata"]), z["dtype"])
    assert values.max() == np.float32(0.7)
    assert (values > 0).sum() == 1


def test_names_that_come_twice_stay_two_rows():
    assert matrix_chart(torch.eye(3), ["a", "a", "b"], 10**6)["classes"] == ["a", "a (2)", "b"]


def test_a_matrix_that_does_not_fit_its_names_is_refused_in_a_line():
    for shares in (torch.zeros(2, 5), torch.zeros(3, 0), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"^shares: got shape .* want \[classes, filters\]"):
            matrix_chart(shares, "abc", 10**6)


def test_a_removal_is_told_with_and_without_in_numbers():
    complete = torch.tensor([[8, 2, 0], [0, 10, 0], [1, 0, 9]])
    without = torch.tensor([[1, 9, 0], [0, 10, 0], [0, 1, 9]])
    chart = confusion_chart(complete, {0: without}, {0: 4}, "abc")
    (choice,) = chart["choices"]
    assert choice["said"] == (
        "Without 4 filters of class a, 10% of its images are told right (80% with all filters), and"
        " 95% of all others (95%)."
    )
    assert (chart["complete"], choice["without"]) == (complete.tolist(), without.tolist())
    assert choice["rows"] == choice["columns"] == ["a", "b", "c"]


def test_a_class_without_filters_loses_none():
    same = 5 * torch.eye(3)
    (choice,) = confusion_chart(same, {1: same}, {1: 0}, "abc")["choices"]
    assert choice["said"] == "No filter is class b's own: nothing is removed."


def test_pictures_shrink_until_the_page_is_small_enough(monkeypatch):
    sizes, most = [], 10**8
    for _ in range(2):
        monkeypatch.setattr(html, "_MOST_BYTES", most)
        whole = render(report(histories={}))
        most = len(whole.encode())
        page = Page(whole)
        sizes.append(_pixels(page, "Test image of class class 0", first=True).shape[0])
    assert sizes[0] == 160 > sizes[1]


def test_of_many_classes_the_one_removed_and_those_that_change_are_shown():
    complete = 10 * torch.eye(1000, dtype=torch.int64)
    without = complete.clone()
    without[700] = 0
    without[700, 3] = 10
    without[5, 5], without[5, 6] = 8, 2
    chart = confusion_chart(complete, {700: without}, {700: 12}, [f"n{i}" for i in range(1000)])
    (choice,) = chart["choices"]
    assert len(choice["rows"]) == 40
    assert {"n5", "n700"} <= set(choice["rows"])
    assert choice["columns"][-1] == "960 others"
    row = choice["rows"].index("n700")
    assert sum(choice["complete"][row]) == sum(choice["without"][row]) == 10


def test_matrices_of_another_size_than_the_names_are_refused_in_a_line():
    with pytest.raises(ValueError, match=r"^without: got shape \(2, 2\), want \(3, 3\)"):
        confusion_chart(torch.eye(3), {0: torch.eye(2)}, {0: 1}, "abc")
    with pytest.raises(ValueError, match=r"^without: got no class"):
        confusion_chart(torch.eye(3), {}, {}, "abc")


def test_lines_are_told_apart_by_dashes_and_markers():
    lines = {f"run {i}": [{1: 0.5, 2: 0.25}] for i in range(6)}
    traces = curves_chart(lines, "ACC1")["data"]
    assert len({trace["line"]["dash"] for trace in traces}) == 6
    assert len({trace["marker"]["symbol"] for trace in traces}) == 6
    assert [trace["y"] for trace in traces] == [[0.5, 0.25]] * 6


def test_seeds_of_a_run_look_alike_and_are_named_once():
    traces = curves_chart({"a": [{1: 0.5}, {1: 0.6}], "b": [{1: 2.0}]}, "x")["data"]
    assert [trace["showlegend"] for trace in traces] == [True, False, True]
    assert traces[0]["line"] == traces[1]["line"] != traces[2]["line"]
    with pytest.raises(ValueError, match=r"^lines: got no value"):
        curves_chart({"a": [{}]}, "x")


@pytest.mark.parametrize(("values", "kind"), [((0.1, 3.0), "log"), ((-0.1, 3.0), "linear")])
def test_losses_are_on_a_logarithmic_axis_where_they_can_be(values, kind):
    chart = curves_chart({"a": [dict(enumerate(values, 1))]}, "loss", logarithmic=True)
    assert chart["layout"]["yaxis"]["type"] == kind


@pytest.mark.parametrize(("size", "most"), [(5, 9), (100, 9), (31, 30), (2, 2)])
def test_a_shortened_list_keeps_both_ends(size, most):
    some = shortened(range(size), most)
    assert (some[0], some[-1], len(some)) == (0, size - 1, min(size, most))
    assert some == sorted(set(some))


def _pixels(page, alt, *, first=False):
    sources = [a["src"] for a in page.all("img") if a["alt"] == alt]
    source, *others = sources
    assert first or not others
    file = io.BytesIO(base64.b64decode(source.partition(",")[2]))
    return np.asarray(Image.open(file).convert("RGB")).astype(float) / 255


def test_pictures_keep_the_images_colours_and_heat_is_bright():
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0] = 1.0  # red
    dark, hot = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    gallery = grad_cam_gallery(images, PathwayGradCam(hot, hot / 2, dark, dark), "a", "b")
    page = Page(render(report(networks=[dataclasses.replace(network(), grad_cam=gallery)])))
    shown = _pixels(page, "Test image of class a")
    assert shown.shape == (160, 160, 3)
    assert np.allclose(shown.mean((0, 1)), [1, 0, 0], atol=0.03)
    assert "taken for b" in page.text
    names = {"all filters": 100, "the class's filters": 50, "all the others": 0}
    light = [
        _pixels(
            page,
            f"Grad-CAM of class a through {name}: at most {share}% of the row's highest value",
        ).mean()
        for name, share in names.items()
    ]
    assert light[0] > light[1] + 0.1 > light[2] + 0.2
