"""Takes the barriers of the CUDA kernels out, one at a time, and asks whether a fibre test notices.

    python -m tests.cuda_on_cpu.barriers [FILE ...]

``barriers.json`` beside this file has the outcome of the files asked so far: for their barriers, in
order, the test that fails first. One whose want no test notices is "not found": it is not needed,
and says so where it stands, or tests are wanting. A vote at a barrier (``__syncthreads_or``) cannot
be taken out alone and is passed over.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda_on_cpu import build

ROOT = Path(__file__).parents[2]
OUTCOME = Path(__file__).with_name("barriers.json")
BARRIER = re.compile(r"^\s*(__syncthreads\(\);|__syncwarp\(\);|Group::wait\(\);)")
# Kernels of a family are tested in its own file, but for those that the executor's tests run.
TESTS = {"masking": ["tests/cuda_on_cpu/test_executor.py", "-k", "masking"]}


def barriers(file: Path) -> list[int]:
    """Numbers of the lines, from 1 on, that are barriers and nothing else."""
    lines = file.read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if BARRIER.match(line)]


def noticed(file: Path, number: int) -> str:
    """The first test that fails without the barrier in that line, or "not found"."""
    names = [path.stem for path in sorted((build.CSRC / "cuda").glob("*.cu"))]
    (family,) = [name for name in names if file.stem == name or file.stem.startswith(f"{name}_")]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(build.CSRC, sources)
        copy = sources / "cuda" / file.name
        lines = copy.read_text().splitlines(keepends=True)
        lines[number - 1] = BARRIER.sub("", lines[number - 1])
        copy.write_text("".join(lines))
        cache = ROOT / "build" / "cuda_on_cpu"
        before = set(cache.glob("*"))
        tests = TESTS.get(family, [f"tests/cuda_on_cpu/test_{family}.py"])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *tests],
            cwd=ROOT,
            env={**os.environ, "PICNN_FAST_FIBRE_SOURCES": str(sources)},
            capture_output=True,
            text=True,
            check=False,
        )
        for path in set(cache.glob("*")) - before:
            path.unlink()
    if done.returncode == 0:
        return "not found"
    if done.returncode < 0:
        return "ends the process"
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, flags=re.MULTILINE)
    if failed is None or "does not compile" in done.stdout:
        raise RuntimeError(f"{file.name}:{number}: the tests do not run:\n{done.stdout[-2000:]}")
    return failed[1]


def main(names: list[str]) -> None:
    files = sorted((build.CSRC / "cuda").glob("*.cu*"))
    outcome: dict[str, list[str]] = json.loads(OUTCOME.read_text()) if names else {}
    for file in files:
        if names and file.name not in names:
            continue
        found = []
        for number in barriers(file):
            found.append(noticed(file, number))
            print(f"{file.name}:{number}: {found[-1]}", flush=True)
        if found:
            outcome[file.name] = found
            OUTCOME.write_text(json.dumps(outcome, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
