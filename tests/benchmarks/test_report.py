"""benchmarks/README.md is what the committed results give, and the main README quotes them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compare, harness, report
from picnn_fast.training.compare import DEFAULT_METHODS, DEFAULT_SEEDS
from picnn_fast.training.demo import SPREAD

ROOT = report.README.parent.parent
MAIN = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    assert report.README.read_text(encoding="utf-8") == report.pages(), (
        "python -m benchmarks.report writes it anew"
    )


def test_every_committed_result_is_finished_and_shown_with_its_command() -> None:
    page = report.pages()
    for path in harness.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        assert content.get("complete", True), f"{path.name} is not finished"
        assert f"`{content['command']}`" in page
        assert f"(results/{path.name})" in page


def test_what_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", report.pages())
    assert links
    for link in links:
        assert (report.README.parent / link).exists(), link


def test_a_line_of_a_section_becomes_the_tables_of_every_file_that_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"processor": "Abacus", "cores": 3, "torch": "2.15.0+cpu"}
    first = {"command": "count", "machine": machine, "figure": 1}
    second = {"command": "count more", "machine": {**machine, "gpu": "Loom"}, "figure": 2}
    for name, content in (("beads-b", second), ("beads-a", first), ("others", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    family = SimpleNamespace(
        SECTION="\n## Beads\n\n<results: beads-*.json>\n\nAll of them.\n",
        report=lambda content: f"| {content['figure']} |",
    )
    assert report.section(family) == (
        "## Beads\n\n"
        "`count`, Abacus, 3 cores, PyTorch 2.15.0 ([`beads-a.json`](results/beads-a.json)):\n\n"
        "| 1 |\n\n"
        "`count more`, Abacus, 3 cores, Loom, PyTorch 2.15.0"
        " ([`beads-b.json`](results/beads-b.json)):\n\n"
        "| 2 |\n\nAll of them."
    )
    family.SECTION = "<results: none-*.json>"
    with pytest.raises(FileNotFoundError, match="none-"):
        report.section(family)


def test_the_main_readme_shows_the_costs_of_the_committed_results() -> None:
    assert report.costs() in MAIN
    for family in ("masking", "filter_loss", "mutual_information"):
        assert f"benchmarks.{family}" in MAIN


def test_the_main_readme_shows_the_committed_comparison() -> None:
    content = json.loads((harness.RESULTS / f"{compare.NAME}.json").read_text())
    assert {run["method"] for run in content["runs"]} == {*DEFAULT_METHODS}
    assert {run["seed"] for run in content["runs"]} == {*DEFAULT_SEEDS}
    assert report.comparison() in MAIN
    assert "`picnn-fast compare`" in MAIN


def test_the_committed_demo_is_one_of_the_seeds_that_its_spread_is_told_of() -> None:
    shown = json.loads((harness.RESULTS / "demo" / "metrics.json").read_text())
    seeds = json.loads((harness.RESULTS / "demo" / "seeds.json").read_text())
    assert {run["seed"] for run in seeds["runs"]} == {0, 1, 2}
    for method, values in shown.items():
        told = {name: values[name] for name in SPREAD}
        assert told in [{name: run[method][name] for name in SPREAD} for run in seeds["runs"]]
