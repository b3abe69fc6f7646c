"""Everything a borrowed GPU is good for, in one call under 10 minutes: ``make gpu``.

    python -m benchmarks.gpu [--smoke]

The benchmarks, written to ``benchmarks/results``, then parity of all backends on the device.
``--smoke`` goes through the same steps on the CPU with tiny sizes and writes nothing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

import picnn_fast
from benchmarks import filter_loss, masking, mutual_information

LIMIT_SECONDS = 570
ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    device = "cpu" if options.smoke else "cuda"
    if not options.smoke:
        missing = {name: why for name, why in picnn_fast.build_info()["backends"].items() if why}
        if missing:
            print(f"a GPU with every backend is wanted; missing here: {missing}", file=sys.stderr)
            return 2
    started = time.monotonic()
    print(f"torch {torch.__version__} on {device}; {picnn_fast.build_info()}", flush=True)
    # First what cannot be had elsewhere; then parity, in the time that is left.
    for family in (masking, mutual_information, filter_loss):
        family.main(["--device", device, *(["--smoke"] if options.smoke else [])])
    print(f"benchmarks: {time.monotonic() - started:.0f} s", flush=True)
    selection = ["-m", "gpu", "tests/ops"]
    if options.smoke:
        selection = ["-k", "known_answer", "tests/reference"]
    command = [sys.executable, "-m", "pytest", *selection]
    try:
        parity = subprocess.run(
            command, cwd=ROOT, timeout=LIMIT_SECONDS - (time.monotonic() - started)
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"parity: not finished within {LIMIT_SECONDS} s of the start", file=sys.stderr)
        parity = 1
    print(f"parity: exit {parity}, {time.monotonic() - started:.0f} s in all")
    return parity


if __name__ == "__main__":
    sys.exit(main())
