"""What a borrowed GPU is good for, in commands of under 10 minutes each: ``make gpu``.

    python -m benchmarks.gpu PART [--started SECONDS] [--results FOLDER] [--smoke]

Parts: ``parity`` of all backends on the device, the benchmarks ``bench`` and ``bench-more``. Each
step of a part is a process of its own, so that one that fails, or takes too long, costs no other;
it may take its share of what is left of the part's time, all steps to come counting alike. Where a
backend is missing the others run, and the exit status is 1. The results folder gets what each
printed, as it goes, a line a step in ``gpu-report.txt``, and the failures of parity in
``parity-failures.txt``. ``--smoke`` goes through the same steps on the CPU with tiny sizes.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import picnn_fast
from benchmarks import harness

LIMIT_SECONDS = 540  # of a part, the build included: a borrowed machine cuts off at 600
ROOT = Path(__file__).parent.parent
REPORT = "gpu-report.txt"
PARTS = {
    "parity": ("parity",),
    "bench": ("masking", "filter_loss"),
    "bench-more": ("mutual_information", "correlation"),
}


@dataclass(frozen=True)
class Step:
    """A command; ``least``: with fewer seconds left it is not begun."""

    name: str
    command: list[str]
    least: float


def steps(part: str, results: Path, *, smoke: bool) -> list[Step]:
    """What ``part`` consists of."""
    chosen = []
    for name in PARTS[part]:
        if name == "parity":
            # By marker, wherever a test lives; names and short tracebacks for a log that is cut.
            selection = ["-m", "gpu", "-n", "8", "tests"]
            if smoke:
                selection = ["-k", "known_answer", "-n", "2", "tests/reference/test_masking.py"]
            options = ["-v", "--tb=short", "--color=no", "-o", "addopts=--strict-markers"]
            # The thread method ends a process that hangs in the driver too; xdist starts another.
            options += ["--timeout=120", "--timeout-method=thread"]
            # A worker that dies is replaced, but a device that is gone would take every one.
            options += ["--max-worker-restart=16"]
            options += [f"--junitxml={results / 'parity.xml'}"]
            options += [f"--failures={results / 'parity-failures.txt'}"]
            # Eight processes share the cores.
            threads = f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // 8)}"
            command = ["env", threads, sys.executable, "-m", "pytest", *options, *selection]
        else:
            device = "cpu" if smoke else "cuda"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device]
            command += ["--results", str(results), *(["--smoke"] if smoke else [])]
        chosen.append(Step(name, command, 1 if smoke else 30))
    return chosen


def run_step(step: Step, results: Path, seconds: float, environment: dict[str, str]) -> str:
    """ "passed", or how it failed; what it prints goes to ``<name>.txt`` and to the output."""
    with (results / f"{step.name}.txt").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        last = ""

        def copy() -> None:
            nonlocal last
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                text = line.decode(errors="replace")
                last = text.strip() or last
                print(text, end="", flush=True)

        reader = threading.Thread(target=copy)
        reader.start()
        try:
            code = process.wait(timeout=max(0.0, seconds))
            outcome = f"failed, exit {code}" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome = f"stopped, not finished in {seconds:.0f} s"
        finally:
            # Whatever it started goes with it: workers would hold the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
    # Python's and pytest's last line says what it was.
    return f"{outcome}: {last[:200]}" if last and outcome.startswith("failed") else outcome


def run_steps(
    chosen: list[Step], results: Path, deadline: float, environment: dict[str, str]
) -> bool:
    """Every step until ``deadline``, in seconds of ``time.time()``; whether all passed.

    Of the time left a step may take as much as any after it; what it leaves is theirs. A line of
    the report is written, and printed, as each ends.
    """
    results.mkdir(parents=True, exist_ok=True)
    passed = True
    for index, step in enumerate(chosen):
        began = time.time()
        left = max(0.0, deadline - began) / (len(chosen) - index)
        if left < step.least:
            outcome = f"not run, {left:.0f} s are left for it and it needs {step.least:.0f}"
        else:
            try:
                outcome = run_step(step, results, left, environment)
            except Exception as error:
                outcome = f"failed, {type(error).__name__}: {error}"
        passed &= outcome == "passed"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = f"{now} {step.name}: {outcome}; {time.time() - began:.0f} s"
        with (results / REPORT).open("a") as report:
            report.write(line + "\n")
        print(line, flush=True)
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument(
        "--started",
        type=float,
        default=time.time(),
        help="when the command began, build included, in seconds since 1970",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    harness.add_results_option(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART: got {', '.join(sorted(unknown))}, want {', '.join(PARTS)}")
    if not (options.smoke or torch.cuda.is_available()):
        print(f"torch {torch.__version__} finds no CUDA device; want one", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}; {picnn_fast.build_info()}", flush=True)
    missing = {} if options.smoke else harness.missing_backends()
    for name, why in missing.items():
        print(f"backend {name} is missing, the others run: {why}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.smoke:
        # Triton's kernels on the CPU.
        environment.setdefault("TRITON_INTERPRET", "1")
    with tempfile.TemporaryDirectory() as nowhere:
        results = (harness.results_folder(options) or Path(nowhere)).absolute()
        passed = not missing
        began = options.started
        for part in options.parts or PARTS:
            chosen = steps(part, results, smoke=options.smoke)
            passed &= run_steps(chosen, results, began + LIMIT_SECONDS, environment)
            began = time.time()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
