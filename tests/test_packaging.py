"""The package as users get it: wheel from an sdist, editable, and without a compiler."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import ninja
import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import picnn_fast
import picnn_fast.triton_kernels

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    ".pre-commit-config.yaml",
    "mkdocs.yml",
)

PROBE = """
import importlib.util, json, torch, picnn_fast, picnn_fast.triton_kernels
F = picnn_fast.functional
masked, mask, label = F.bernoulli_mask(
    torch.ones(4, 6, 3, 3), torch.zeros(4, 5), torch.full((5, 6), 0.5), seed=1)
print(json.dumps({
    "file": picnn_fast.__file__,
    "backends": picnn_fast.available_backends(),
    "serving": picnn_fast.build_info()["operators"]["bernoulli_mask"]["cpu"],
    "top_level": importlib.util.find_spec("triton_kernels") is not None,
    "extension": picnn_fast.build_info()["backends"]["cpp"],
    "mask": mask.int().tolist(),
}))
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PICNN_FAST_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a fresh clone would have them."""
    copy = tmp_path_factory.mktemp("source") / "picnn_fast"
    copy.mkdir()
    for name in ("csrc", "picnn_fast", "triton_kernels", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", *PAGES):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    _run(
        *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder),
        source,
        cwd=folder,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def plain_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel made where there is no compiler, and what the installation said."""
    return _wheel(source, tmp_path_factory.mktemp("plain"), CXX="/nowhere/c++")


def _wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    log = _run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
        *("-w", folder, source),
        cwd=folder,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, log


def _probe(wheel: Path, folder: Path) -> dict[str, object]:
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S and the environment's packages by path: its editable install stays out.
    paths = os.pathsep.join([str(site), str(Path(torch.__file__).parent.parent)])
    printed = _run(sys.executable, "-S", "-c", PROBE, cwd=folder, PYTHONPATH=paths)
    facts: dict[str, object] = json.loads(printed.strip().splitlines()[-1])
    assert str(facts["file"]).startswith(str(site))
    return facts


def test_a_wheel_from_the_sdist_brings_the_compiled_core_and_no_top_level_triton_kernels(
    sdist: Path, tmp_path: Path
) -> None:
    # Compiling takes most of the time, and the build in place has compiled the same files.
    with tarfile.open(sdist) as archive:
        sources = {
            member.name.partition("/")[2]: file.read()
            for member in archive
            if "/csrc/" in member.name and (file := archive.extractfile(member))
        }
    here = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources == {str(path.relative_to(ROOT)): path.read_bytes() for path in here}
    built = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\nfor output do :; done\n"
        f'case $output in cpu_*.o) cp "{built}/$output" . && exit;; esac\n'
        f'exec {os.environ.get("CXX", "c++")} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    wheel, _ = _wheel(sdist, tmp_path, CXX=str(compiler))
    names = zipfile.ZipFile(wheel).namelist()
    assert "picnn_fast/triton_kernels/masking.py" in names
    assert not [name for name in names if name.startswith("triton_kernels")]
    assert [name for name in names if name.startswith("picnn_fast/_C")]
    facts = _probe(wheel, tmp_path)
    assert facts["serving"] == "cpp"
    assert facts["extension"] is None
    assert facts["top_level"] is False


def test_without_a_compiler_the_install_succeeds_and_says_what_it_left_out(
    plain_wheel: tuple[Path, str], tmp_path: Path
) -> None:
    wheel, log = plain_wheel
    assert wheel.name.endswith("py3-none-any.whl")
    assert "no C++ compiler found" in log
    facts = _probe(wheel, tmp_path)
    assert facts["serving"] == "reference"
    assert "no C++ compiler" in str(facts["extension"])
    arguments = (torch.ones(4, 6, 3, 3), torch.zeros(4, 5), torch.full((5, 6), 0.5))
    mask = picnn_fast.functional.bernoulli_mask(*arguments, seed=1)[1]
    assert facts["mask"] == mask.int().tolist()


@pytest.mark.parametrize("compiler", [True, False])
def test_make_builds_again_what_was_removed(compiler: bool, tmp_path: Path) -> None:
    """But nothing where there was no compiler to build it with."""
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    core = tmp_path / "picnn_fast/_C.mine.so"
    core.parent.mkdir()
    (core.parent / "_C.another.so").touch()  # of another Python
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    built = f"touch {core}" if compiler else ":"
    python.write_text(
        '#!/bin/sh\n[ "$1" != -c ] || echo .mine.so\n'
        f'[ "$1" != setup.py ] || {{ {built}; echo "$*" >> calls; }}\n'
    )
    python.chmod(0o755)
    (tmp_path / ".venv/.packages").touch()

    def builds() -> int:
        subprocess.run(["make", "-s", "build"], cwd=tmp_path, check=True)
        return len((tmp_path / "calls").read_text().splitlines())

    assert (builds(), builds()) == (1, 1)
    core.unlink(missing_ok=True)
    assert builds() == (2 if compiler else 1)
    (tmp_path / ".venv/.built").write_text("")  # which names none
    assert (builds(), builds()) == (3, 3) if compiler else (2, 2)


def test_the_sdist_brings_the_licence_and_what_the_readme_links_to(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*PAGES, "picnn_fast/py.typed", "docs/start.md"} <= names


def test_a_wheel_says_whose_it_is_what_it_is_and_that_it_is_typed(
    plain_wheel: tuple[Path, str],
) -> None:
    with zipfile.ZipFile(plain_wheel[0]) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        text = archive.read(licence).decode()
    assert "picnn_fast/py.typed" in names
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The picnn_fast authors"
    assert metadata["Keywords"]
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    # No address that is not there.
    assert metadata["Home-page"] is None
    assert metadata.get_all("Project-URL") is None


def test_the_citation_names_this_version_its_licence_and_the_papers() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == picnn_fast.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    papers = citation["references"]
    assert len({paper["title"] for paper in papers}) == 5
    for paper in papers:
        assert paper["authors"]
        assert paper["year"] in range(2018, 2025)
        assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.findall(r"^## (.+)$", text, re.MULTILINE)[0]
    assert picnn_fast.__version__ in latest


def test_this_editable_install_finds_the_triton_kernels_in_the_source_tree() -> None:
    assert Path(picnn_fast.__file__).parent.parent == ROOT
    assert Path(picnn_fast.triton_kernels.__file__).parent == ROOT / "triton_kernels"


def test_every_requirement_is_tested_at_its_lower_bound() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    extras = project["optional-dependencies"]
    required = settings["build-system"]["requires"] + project["dependencies"]
    for extra in ("train", "report", "timm", "attacks", "docs"):
        required += extras[extra]
    claimed = {}
    for requirement in map(Requirement, required):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement}: want one lower bound"
        claimed[requirement.name] = Version(bound.version)
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    tested = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert tested.pop("triton"), "it comes with torch"
    for name in ("onnx", "onnxruntime", "onnxscript", "protobuf"):
        assert tested.pop(name), "what the tests use, as far as it goes with the rest"
    assert tested == claimed


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("picnn_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_behind_a_launcher_and_with_options_is_the_one_that_builds(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = _program(tmp_path / "two words" / "ccache", 'exec "$@"')
    compiler = _program(tmp_path / "g++", 'echo "g++ 1.2"')
    monkeypatch.setenv("PICNN_FAST_CUDA", "0")
    monkeypatch.setenv("CXX", f"'{launcher}' {compiler} -m64")
    assert build.find_compiler() == [launcher, compiler, "-m64"]
    assert build.host_compiler(build.find_compiler()) == compiler
    assert len(build.extensions()) == 1
    lines = build.ninja_file().splitlines()
    assert f"cxx = '{launcher}' {compiler} -m64" in lines
    assert any('"g++ 1.2"' in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo no licence >&2; exit 3", "fails with status 3: no licence"),
        ("exit 0", "fails with status 0"),
        (None, "does not run: Exec format error"),
    ],
)
def test_a_broken_nvcc_is_told_in_a_line_and_left_out_unless_asked_for(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str | None,
    message: str,
) -> None:
    nvcc = Path(_program(tmp_path / "bin" / "nvcc", text or ""))
    if text is None:
        nvcc.write_bytes(b"\x7fELF")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("PICNN_FAST_CUDA", raising=False)
    found, reason = build.find_nvcc()
    assert found is None
    assert reason.startswith(f"{nvcc} --version {message}")
    monkeypatch.setenv("PICNN_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=message):
        build.find_nvcc()


def test_a_broken_compiler_is_told_in_a_line(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", _program(tmp_path / "g++", "exit 1"))
    with pytest.raises(SystemExit, match=r"CXX=.*g\+\+ --version fails with status 1"):
        build.extensions()
    # One that was not asked for is none: on some systems c++ tells how to install it.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    assert build.extensions() == []


def _compiled_in_place(objects: list[str]) -> bool:
    """Whether the build in place has compiled these for Hopper from what the sources are now, where
    a warning was an error."""
    folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
    rules = folder / "build.ninja"
    text = rules.read_text() if rules.exists() else ""
    if not ("code=sm_90" in text and "all-warnings" in text and f"build {objects[0]}:" in text):
        return False
    return "no work to do" in _run(Path(ninja.BIN_DIR) / "ninja", "-n", *objects, cwd=folder)


def test_cuda_kernels_compile_for_hopper_without_a_warning(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rules of setup.py itself, so that what compiles here compiles there.
    monkeypatch.setenv("PICNN_FAST_CUDA", "1")
    monkeypatch.setenv("PICNN_FAST_WERROR", "1")
    monkeypatch.setattr(build, "CUDA_ARCHITECTURES", ("90",))
    try:
        nvcc, _ = build.find_nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    objects = [f"cuda_{source.stem}.o" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    assert objects
    if _compiled_in_place(objects):
        return
    # Kept from run to run, ninja compiles what has changed: a source, one of our headers, a flag.
    # The headers of others it does not follow: their versions name the folder.
    version = re.search(r"V([\d.]+)", build.version_line([nvcc]))
    assert version is not None
    folder = ROOT / "build" / f"hopper-cuda-{version[1]}-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # Neither half of the device compiler optimises, which takes most of the time.
    rules, flags = build.ninja_file(), " -Xcicc -O0 -Xptxas -O0"
    assert rules.count("$nvcc_flags") == 1
    (folder / "build.ninja").write_text(rules.replace("$nvcc_flags", "$nvcc_flags" + flags))
    _run(Path(ninja.BIN_DIR) / "ninja", *objects, cwd=folder)
    assert all((folder / name).exists() for name in objects)
