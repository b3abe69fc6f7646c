"""The report in a browser without a window: it answers, and fits both sizes of screen."""

import base64
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from picnn_fast.report.html import render
from tests.report.pages import HOSTILE, hostile, network, report

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver"),
    pytest.mark.timeout(240),
]
LAPTOP, PHONE = (1366, 768), (390, 844)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "plain": report(),
        "hostile": hostile(),
        "classes": report(networks=[network(classes=1000, filters=3000)]),
    }
    paths = {}
    for name, content in made.items():
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(render(content), encoding="utf-8")
    return paths


def look(browser, path, size=LAPTOP, scheme="light"):
    """Open a page at a size, and have every chart of it drawn."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    prefer(browser, scheme)
    browser.get(path.as_uri())
    # The driver may take the page before for the one asked for.
    whole = "return document.readyState === 'complete' && location.href === arguments[0]"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(whole, path.as_uri()))
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    for chart in browser.find_elements(By.CSS_SELECTOR, ".chart"):
        WebDriverWait(browser, 60).until(lambda _, chart=chart: drawn(browser, chart))
    browser.execute_script("window.scrollTo({top: 0, behavior: 'instant'})")


def drawn(browser, chart):
    """Whether a chart is there; those above it, once drawn, may have moved it out of sight."""
    browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", chart)
    return chart.find_elements(By.CSS_SELECTOR, ".main-svg")


def prefer(browser, scheme):
    """Dark or light, and no motion, for which tests would have to wait."""
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser")]


def heat_map(browser):
    """The first heat map, its form and its answer."""
    box = browser.find_element(By.CSS_SELECTOR, ".matrix")
    parts = [box.find_element(By.CSS_SELECTOR, name) for name in (".map", "form", "output")]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", parts[1])
    return parts


def field(form, name):
    return form.find_element(By.NAME, name)


def columns(browser, chart):
    return browser.execute_script("return arguments[0].data[0].x", chart)


def hovered(browser):
    return WebDriverWait(browser, 20).until(
        lambda _: " ".join(
            text.text for text in browser.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext")
        )
    )


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("plain", LAPTOP, "dark"),
        ("plain", PHONE, "light"),
        ("hostile", PHONE, "dark"),
        ("classes", LAPTOP, "light"),
        ("classes", PHONE, "light"),
    ],
)
def test_no_page_complains_or_is_wider_than_the_screen(browser, pages, name, size, scheme):
    look(browser, pages[name], size, scheme)
    assert complaints(browser) == []
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]


def test_nothing_is_fetched(browser, pages):
    browser.get_log("performance")
    look(browser, pages["plain"])
    sent = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert len([message for message in sent if '"url":"http' in message]) == 0


def test_the_heat_map_tells_filter_class_and_share_under_the_pointer(browser, pages):
    look(browser, pages["plain"])
    chart, _, _ = heat_map(browser)
    plot = chart.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(browser).move_to_element(plot).perform()
    told = hovered(browser)
    assert "filter" in told
    assert "class" in told
    assert "share 0." in told


def test_the_arrow_keys_move_over_the_heat_map(browser, pages):
    look(browser, pages["plain"])
    chart, _, output = heat_map(browser)
    first = columns(browser, chart)[1]
    chart.send_keys(Keys.ARROW_RIGHT)
    assert output.text == f"Filter {first}, class class 0: 0.900."
    assert f"filter {first}" in hovered(browser)
    chart.send_keys(Keys.ARROW_DOWN)
    assert output.text == f"Filter {first}, class class 1: 0.050."


def test_filters_are_sorted_by_class_number_or_share(browser, pages):
    look(browser, pages["plain"])
    chart, form, _ = heat_map(browser)
    assert columns(browser, chart) == [str(i) for c in range(3) for i in range(c, 12, 3)]
    Select(field(form, "order")).select_by_value("number")
    assert columns(browser, chart) == [str(i) for i in range(12)]
    Select(field(form, "class")).select_by_visible_text("class 2")
    Select(field(form, "order")).select_by_value("share")
    assert set(columns(browser, chart)[:4]) == {"2", "5", "8", "11"}


def test_a_filter_and_a_class_are_found(browser, pages):
    look(browser, pages["plain"])
    chart, form, output = heat_map(browser)
    field(form, "filter").send_keys("7")
    assert output.text.startswith("Filter 7 belongs most to class 1 (0.900), class 0 (0.050)")
    assert len(browser.execute_script("return arguments[0].layout.shapes", chart)) == 1
    field(form, "filter").send_keys("7")
    assert output.text == "There is no filter 77."
    field(form, "filter").clear()
    Select(field(form, "class")).select_by_visible_text("class 2")
    assert "Class class 2 keeps most of 4 filters, of 4 more than half" in output.text


def test_a_thousand_classes_are_read_forty_at_a_time(browser, pages):
    look(browser, pages["classes"])
    chart, form, output = heat_map(browser)
    rows = "return arguments[0].data[0].y"
    assert browser.execute_script(rows, chart) == [f"class {i}" for i in range(40)]
    field(form, "on").click()
    assert browser.execute_script(rows, chart)[0] == "class 40"
    Select(field(form, "class")).select_by_visible_text("class 700")
    shown = browser.execute_script(rows, chart)
    assert "class 700" in shown
    assert len(shown) == 40
    assert set(columns(browser, chart)) >= {"700", "1700", "2700"}
    field(form, "filter").send_keys("333")
    assert "class 333" in browser.execute_script(rows, chart)
    assert output.text.startswith("Filter 333 belongs most to class 333 (0.900)")


def test_the_class_whose_filters_are_removed_is_chosen(browser, pages):
    look(browser, pages["plain"])
    box = browser.find_element(By.CSS_SELECTOR, "[data-confusion]")
    output = box.find_element(By.TAG_NAME, "output")
    charts = box.find_elements(By.CSS_SELECTOR, ".chart")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    assert output.text.startswith("Without 2 filters of class class 0, 8% of its images")

    def row():
        cells = "return Array.from(arguments[0].data[0].z[2], (z) => z.toFixed(2))"
        return [browser.execute_script(cells, chart) for chart in charts]

    assert row() == [["0.08", "0.08", "0.83"]] * 2
    Select(field(box, "choice")).select_by_visible_text("class 2")
    assert output.text.startswith("Without 2 filters of class class 2, 8% of its images")
    assert row() == [["0.08", "0.08", "0.83"], ["0.83", "0.08", "0.08"]]


def test_hostile_names_are_shown_as_they_are(browser, pages):
    look(browser, pages["hostile"])
    chart, form, output = heat_map(browser)
    Select(field(form, "class")).select_by_index(1)
    assert f"Class {HOSTILE[0]} keeps most" in output.text
    ticks = [t.text for t in chart.find_elements(By.CSS_SELECTOR, ".ytick text")]
    assert ticks[0] == HOSTILE[0][:15] + "…"
    assert not browser.find_elements(By.CSS_SELECTOR, "main b, main tspan[style*='bold']")
    assert browser.title == HOSTILE[0]


def test_everything_that_answers_is_reached_by_the_keyboard_and_seen(browser, pages):
    look(browser, pages["plain"])
    browser.refresh()
    reached = []
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        name = element.get_attribute("name") or element.get_attribute("class") or element.tag_name
        if element.tag_name == "body":
            break
        outline = element.value_of_css_property("outline-style")
        reached.append((name, outline))
    names = [name for name, _ in reached]
    for wanted in ("skip", "class", "filter", "order", "scroll", "summary", "a"):
        assert wanted in names, wanted
    assert any("map" in name.split() for name in names)
    assert all(outline not in ("none", "") for _, outline in reached)


def luminance(colour):
    channels = [int(value) / 255 for value in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_by_4_5_to_1_and_lines_by_3_to_1(browser, pages, scheme):
    look(browser, pages["plain"], scheme=scheme)
    colours = browser.execute_script(
        """
        const probe = document.createElement("i");
        document.body.append(probe);
        const tones = [0, 1, 2, 3, 4, 5].map((i) => `tone-${i}`);
        const names = ["page", "ink", "quiet", "accent", ...tones];
        const read = (name) => {
          probe.style.color = `var(--${name})`;
          return getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3);
        };
        const found = Object.fromEntries(names.map((name) => [name, read(name)]));
        probe.remove();
        return found;
        """
    )
    behind = luminance(colours.pop("page"))
    for name, colour in colours.items():
        low, high = sorted((behind, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= (3 if name.startswith("tone") else 4.5), name


def test_charts_follow_when_the_scheme_changes(browser, pages):
    look(browser, pages["plain"])
    line = "return document.getElementById('curve-1').data[0].line.color"
    light = browser.execute_script(line)
    prefer(browser, "dark")
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(line) != light)


def test_the_page_looks_like_something(browser, pages):
    look(browser, pages["plain"])
    browser.execute_script("document.querySelector('#matrix').scrollIntoView()")
    shot = base64.b64decode(browser.get_screenshot_as_base64())
    assert len(shot) > 20_000  # an empty page has less than half of it
