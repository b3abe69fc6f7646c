"""README, CONTRIBUTING and docs: their Python runs, and what they name is there."""

import dataclasses
import inspect
import pkgutil
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import picnn_fast
from picnn_fast import backends
from picnn_fast.backbones import BACKBONES
from picnn_fast.data import DATA, PartDataModule
from picnn_fast.evaluation import FIGURES
from picnn_fast.models import METHODS
from picnn_fast.training.options import parse

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TICK = "✓"


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example registers is gone afterwards."""
    before = [(table, dict(table)) for table in (METHODS, BACKBONES, DATA, FIGURES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in blocks if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_the_pages_run(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in _blocks(page, "python"):
        torch.manual_seed(0)
        exec(compile(block, page.name, "exec"), namespace)


def test_the_readme_and_every_recipe_of_a_registry_have_a_python_block():
    assert len(_blocks(ROOT / "README.md", "python")) == 1
    recipes = "".join(_blocks(ROOT / "CONTRIBUTING.md", "python"))
    for name in ("METHODS", "BACKBONES", "DATA", "FIGURES"):
        assert re.search(rf"^{name}\[", recipes, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_training_commands_of_the_pages_have_options_that_there_are(page):
    # Commands without a language, long ones over several lines.
    for block in _blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            command, *words = shlex.split(line, comments=True) or [""]
            if command == "picnn-fast" and words[0] == "train" and "--method.help" not in words:
                words = [str(ROOT / w) if w.startswith("configs/") else w for w in words[1:]]
                parse(words, prog="picnn-fast train", description="")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 130


def _table() -> dict[str, dict[str, tuple[bool, bool, bool]]]:
    """The README's table: group to name to ticks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## What there is")[2].partition("\n## ")[0]
    rows: dict[str, dict[str, tuple[bool, bool, bool]]] = {}
    group = ""
    for line in section.strip().partition("\n\n")[0].splitlines()[2:]:
        first, names, *ticks = (cell.strip() for cell in line.strip("|").split("|"))
        assert {*ticks} <= {TICK, ""}
        group = first or group
        classes, parts, at_hand = (tick == TICK for tick in ticks)
        for name in re.findall("`([^`]+)`", names):
            rows.setdefault(group, {})[name] = (classes, parts, at_hand)
    return rows


def test_the_readme_lists_every_method_backbone_and_data_set_with_its_ticks():
    table = _table()
    assert table["methods"].keys() == METHODS.keys()
    for name, method in METHODS.items():
        # Parts are what a template masks, or what a group of filters shows.
        parts = not {"template", "groups"}.isdisjoint(inspect.signature(method).parameters)
        assert table["methods"][name] == (name != "std", parts, False), name
    # "vgg11, … and each with _bn"
    suffix = table["backbones"].pop("_bn")
    batch_norm = {
        f"{name}_bn": ticks
        for name, ticks in table["backbones"].items()
        if name.startswith("vgg") and ticks == suffix
    }
    backbones = table["backbones"] | batch_norm
    assert backbones.keys() == BACKBONES.keys()
    for name, row in BACKBONES.items():
        weights = "weights" in inspect.signature(row.build).parameters
        maps = name != "vit_b_16"  # tokens have no places to measure parts by
        assert backbones[name] == (True, maps, weights), name
    assert table["data sets"].keys() == DATA.keys()
    for name, build in DATA.items():
        kind = inspect.signature(build).return_annotation
        parts = kind is PartDataModule
        at_hand = "root" not in inspect.signature(build).parameters
        assert table["data sets"][name] == (True, parts, at_hand), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_pages_name_are_there(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", prose)
    folders = "picnn_fast|tests|csrc|benchmarks|docs|triton_kernels|configs|examples"
    names = re.findall(rf"`((?:{folders})(?:/[\w.<>]+)*)`", prose)
    for name in names:
        assert (ROOT / name.replace("<family>", "masking")).exists(), name
    for link in links:
        generated = page.parent.name == "docs" and (ROOT / link).exists()
        assert generated or (page.parent / link).exists(), link


def test_what_contributing_says_of_a_backend_is_in_the_code():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.partition("## A backend")[2].partition("\n## ")[0]
    fields = {field.name for field in dataclasses.fields(backends.Backend)}
    assert fields <= {*re.findall(r"`(\w+)`", recipe)}
    assert picnn_fast.build_info()["backends"].keys() == {*backends.BACKENDS}


def test_a_family_has_one_name_in_every_room():
    families = {path.stem for path in (ROOT / "picnn_fast/reference").glob("[!_]*.py")}
    assert families
    for family in families:
        for room in (
            f"picnn_fast/ops/{family}.py",
            f"csrc/cpu/{family}.cpp",
            f"csrc/cuda/{family}.cu",
            f"triton_kernels/{family}.py",
            f"tests/reference/test_{family}.py",
            f"tests/ops/test_{family}_parity.py",
        ):
            assert (ROOT / room).exists(), room


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = " ".join(re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)).split()
    shown = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, "help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = re.findall(r"^([a-z-]+) — .+$", shown, re.MULTILINE)
    assert {*named} == {*phony} - {"again", "oldest-python"}
    assert len(named) == len({*named})


def _mkdocs(text: str) -> set[str]:
    """Pages that mkdocs.yml lists."""
    return set(re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE))


def test_the_documentation_lists_every_page_and_every_public_module():
    listed = _mkdocs((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages <= listed
    assert all((ROOT / page).exists() for page in listed - pages)
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    shown = {
        name.split(".")[1] for name in re.findall(r"^::: (picnn_fast\.\w+)", text, re.MULTILINE)
    }
    # What a user imports; the rest is called by it, or by the command.
    inner = {
        "__main__",
        "_C",
        "_extras",
        "_files",
        "_terminal",
        "_version",
        "checks",
        "cli",
        "ops",
        "reference",
        "triton_kernels",
    }
    modules = {module.name for module in pkgutil.iter_modules(picnn_fast.__path__)}
    assert shown == modules - inner


def test_what_runs_before_a_commit_is_what_make_lint_runs():
    (recipe,) = re.findall(
        r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    lint = {line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()}
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = config["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    hooks = {hook["entry"] for hook in local["hooks"]}
    # The files to format are those of the commit there, and all of them here.
    assert {line.partition(" $$(")[0] for line in lint} == hooks
