"""A borrowed GPU is not wasted: each step alone, reports as they come, tests that stand apart."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, harness
from tests import processes
from tests.benchmarks import on_a_gpu
from tests.conftest import FailureJournal
from tests.processes import as_module, finished

ROOT = Path(gpu.__file__).parent.parent


def python(name: str, code: str, least: float = 0.0) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], least)


def run(steps: list[gpu.Step], folder: Path, seconds: float) -> tuple[bool, list[str]]:
    passed = gpu.run_steps(steps, folder, time.time() + seconds, dict(os.environ))
    lines = (folder / gpu.REPORT).read_text().splitlines()
    return passed, [line.split(" ", 1)[1] for line in lines]


def test_a_step_that_fails_costs_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    absent = gpu.Step("absent", [str(tmp_path / "nothing")], 0)
    steps = [python("bad", "raise ValueError('no luck')"), absent, python("good", "print('here')")]
    passed, lines = run(steps, tmp_path, 60)
    assert not passed
    bad, absent_line, good = lines
    assert bad.startswith("bad: failed, exit 1: ValueError: no luck; ")
    assert absent_line.startswith("absent: failed, FileNotFoundError")
    assert good.startswith("good: passed; ")
    assert "no luck" in (tmp_path / "bad.txt").read_text()
    assert (tmp_path / "good.txt").read_text() == "here\n"
    assert "here" in capfd.readouterr().out


def test_a_step_over_its_limit_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    steps = [python("slow", code), python("next", "print('here')"), python("late", "", 60)]
    began = time.monotonic()
    passed, lines = run(steps, tmp_path, 9)
    assert time.monotonic() - began < 60
    assert not passed
    # A third of the time, so that two more are not starved.
    assert lines[0].startswith("slow: stopped, not finished in 3 s; ")
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    assert lines[1].startswith("next: passed; ")
    # What it would need is not left: it is reported, not begun.
    assert lines[2].startswith("late: not run, ")
    assert not (tmp_path / "late.txt").exists()


def test_the_time_limit_counts_from_the_start_that_is_passed_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long_ago = str(time.time() - gpu.LIMIT_SECONDS - 5)
    arguments = ["bench", "--smoke", "--started", long_ago, "--results", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert [path.name for path in tmp_path.iterdir()] == [gpu.REPORT]
    report = (tmp_path / gpu.REPORT).read_text()
    assert [line.split(" ", 1)[1] for line in report.splitlines()] == [
        "masking: not run, 0 s are left for it and it needs 1; 0 s",
        "filter_loss: not run, 0 s are left for it and it needs 1; 0 s",
    ]


def test_every_part_has_a_time_limit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "steps", lambda part, *_, **__: [python(part, "", 1)])
    long_ago = str(time.time() - gpu.LIMIT_SECONDS)
    assert gpu.main(["--smoke", "--started", long_ago, "--results", str(tmp_path)]) == 1
    report = (tmp_path / gpu.REPORT).read_text()
    outcomes = dict(line.split(" ", 1)[1].split(": ", 1) for line in report.splitlines())
    assert list(outcomes) == list(gpu.PARTS)
    assert outcomes.pop("parity").startswith("not run, ")
    assert all(outcome.startswith("passed; ") for outcome in outcomes.values())


def forked(step: gpu.Step, results: Path, *_: object) -> str:
    """What the step's command does, its Python and PyTorch not started anew."""
    module = step.command.index("-m") + 1
    done = finished(as_module, step.command[module:])
    (results / f"{step.name}.txt").write_text(done.stdout + done.stderr)
    return f"failed, exit {done.returncode}" if done.returncode else "passed"


def test_parity_runs_in_parallel_and_reports_names_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu, "run_step", forked)
    assert gpu.main(["parity", "--smoke", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "parity.txt").read_text()
    assert "[gw1]" in text
    assert "PASSED tests/reference/test_masking.py::" in text
    assert 'failures="0"' in (tmp_path / "parity.xml").read_text()
    assert " parity: passed; " in (tmp_path / gpu.REPORT).read_text()


def test_on_a_gpu_parity_comes_first_and_takes_every_test_with_the_marker(tmp_path: Path) -> None:
    assert next(iter(gpu.PARTS)) == "parity"
    (step,) = gpu.steps("parity", tmp_path, smoke=False)
    assert step.command[-5:] == ["-m", "gpu", "-n", "8", "tests"]
    assert any(option.startswith("--timeout=") for option in step.command)
    assert any(option.startswith("--max-worker-restart=") for option in step.command)
    assert f"--failures={tmp_path / 'parity-failures.txt'}" in step.command
    for part in ("bench", "bench-more"):
        for step in gpu.steps(part, tmp_path, smoke=False):
            assert step.command[-4:] == ["--device", "cuda", "--results", str(tmp_path)]


def in_this_process(step: gpu.Step, *_: object) -> str:
    """What the step's command does, without starting Python and PyTorch anew."""
    _, flag, module, *arguments = step.command
    assert flag == "-m"
    importlib.import_module(module).main(arguments)
    return "passed"


@pytest.mark.parametrize("part", ["bench", "bench-more"])
def test_the_benchmarks_go_through_all_their_steps_on_the_cpu(
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "run_step", in_this_process)
    contexts = {"spawn": processes.context}
    get_context = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing,
        "get_context",
        lambda method=None: contexts.get(method) or get_context(method),
    )
    assert gpu.main([part, "--smoke", "--results", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    titles = {
        "bench": (
            "bernoulli_mask, forward",
            "bernoulli_mask, Triton over compiled",
            "class_gate, forward",
            "class_gate, Triton over compiled",
            "class_gate, wall time",
            "late masking, Triton over compiled",
            "late masking, wall time",
            "training step",
            "template_mask, forward",
            "template_mask, Triton over compiled",
            "filter_loss, forward",
            "filter_loss, Triton over compiled",
            "filter_loss, wall time",
            "| over direct |",
        ),
        "bench-more": (
            "mutual_information, knn",
            "knn, Triton over compiled",
            "peak memory",
            "histogram_update, Triton over compiled",
            "group_correlation_loss, forward",
            "group_correlation_loss, Triton over compiled",
            "soft_histogram, forward",
            "soft_histogram, Triton over compiled",
            "soft_histogram, wall time",
        ),
    }
    for title in titles[part]:
        assert title in printed
    for family in gpu.PARTS[part]:
        (path,) = tmp_path.glob(f"{family}-*.json")
        content = json.loads(path.read_text())
        assert content.get("complete", True)
        assert "errors" not in content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_script_refuses_a_machine_without_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capfd.readouterr().err


def test_where_a_backend_is_missing_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.picnn_fast, "build_info", lambda: {"backends": {"cuda": "not built"}})
    monkeypatch.setattr(gpu, "steps", lambda part, *_, **__: [python(part, "")])
    assert gpu.main(["bench", "--results", str(tmp_path)]) == 1
    assert "backend cuda is missing, the others run: not built" in capfd.readouterr().err
    assert " bench: passed; " in (tmp_path / gpu.REPORT).read_text()


@pytest.mark.parametrize("builds", [True, False])
def test_a_core_that_does_not_build_keeps_nothing_else_from_running(
    builds: bool, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "picnn_fast").mkdir()
    (tmp_path / "picnn_fast/_C.mine.so").touch()
    another = tmp_path / "picnn_fast/_C.another.so"  # of another Python
    another.touch()
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(
        '#!/bin/sh\n[ "$1" != -c ] || { echo .mine.so; exit; }\n'
        'echo "CXX=$CXX CUDA=$PICNN_FAST_CUDA $*" >> calls\n'
        f'[ "$1" != setup.py ] || exit {0 if builds else 1}\n'
    )
    interpreter.chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if n not in ("CXX", "PICNN_FAST_CUDA")}
    subprocess.run(
        ["make", "gpu-parity", f"PYTHON={interpreter}"], cwd=tmp_path, env=environment, check=True
    )
    build, install, script = (tmp_path / "calls").read_text().splitlines()
    assert build == "CXX= CUDA=1 setup.py build_ext --inplace"
    assert install.startswith(("CXX= CUDA=1" if builds else "CXX=none CUDA=") + " -m pip install")
    assert script.startswith("CXX= CUDA= -m benchmarks.gpu parity --started ")
    assert list((tmp_path / "picnn_fast").iterdir()) == [another]


def test_smoke_writes_nothing_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "PARTS", {"parity": ()})
    assert gpu.main(["--smoke"]) == 0
    assert not list(tmp_path.iterdir())


def test_gpu_tests_are_found_wherever_they_live_without_captum(tmp_path: Path) -> None:
    # What uses Captum, and the folders of kernels: importing all tests takes most of a minute.
    places = ["tests/explain", "tests/ops", "tests/triton_kernels"]
    options = ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = finished(
        on_a_gpu.run_pytest,
        ["--collect-only", "-q", "-m", "gpu", *places, *options],
        environment=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found = {line.rsplit("::", 1)[0] for line in done.stdout.splitlines() if "::" in line}
    families = ("correlation", "filter_loss", "histogram", "mutual_information", "templates")
    assert {f"tests/triton_kernels/test_{family}.py" for family in families} <= found
    assert {f"tests/ops/test_{family}_parity.py" for family in families} <= found


# Stand-ins: every process would import PyTorch.
LOST = """
import sys
import types

asserted = []


def synchronize(device=None):
    if asserted:
        raise RuntimeError("CUDA error: device-side assert triggered")


cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, device=object)
sys.modules["picnn_fast"] = types.SimpleNamespace(backends=None)
from tests.conftest import (  # noqa: E402, F401
    pytest_addoption,
    pytest_configure,
    pytest_runtest_call,
    pytest_runtest_logfinish,
)
"""
TESTS = """
import pytest
from conftest import asserted

pytestmark = pytest.mark.gpu


def test_a():
    pass


def test_b():
    asserted.append(True)


def test_c():
    pass
"""


@pytest.mark.parametrize("parallel", [True, False])
def test_an_error_of_the_gpu_falls_on_its_test_and_its_process_runs_no_other(
    parallel: bool, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(LOST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-v", *(["-n", "1"] if parallel else [])),
            *("--tb=short", "--failures=results/failures.txt", "."),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    printed = done.stdout + done.stderr
    assert "test_it.py::test_b ended this process's use of the GPU" in printed
    assert "device-side assert triggered" in printed
    assert "test_a" in printed
    journal = (tmp_path / "results/failures.txt").read_text()
    assert "FAILED test_it.py::test_b (call)\n" in journal
    assert "device-side assert triggered" in journal
    assert "test_it.py::test_a" not in journal
    if parallel:
        # A worker in its place runs what was left.
        assert "PASSED test_it.py::test_c" in printed
        assert "FAILED test_it.py::test_b" in printed
        assert "FAILED test_it.py::test_c" not in printed
    else:
        assert "test_it.py::test_c" not in printed


def test_a_failure_is_in_the_journal_at_once(tmp_path: Path) -> None:
    path = tmp_path / "failures.txt"
    journal = FailureJournal(path)
    location = ("test_it.py", 1, "test")
    for outcome in ("passed", "skipped"):
        journal.pytest_runtest_logreport(
            pytest.TestReport(f"test_it.py::{outcome}", location, {}, outcome, None, "call")
        )
    assert not path.exists()
    journal.pytest_runtest_logreport(
        pytest.TestReport("test_it.py::bad", location, {}, "failed", "no luck", "setup")
    )
    assert path.read_text() == "FAILED test_it.py::bad (setup)\nno luck\n\n"
    journal.pytest_collectreport(pytest.CollectReport("test_other.py", "failed", "no module", []))
    assert path.read_text().endswith("FAILED test_other.py (collection)\nno module\n\n")
