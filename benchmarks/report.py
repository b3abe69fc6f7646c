"""benchmarks/README.md out of the committed results, and the tables of the main README.

    python -m benchmarks.report

Every benchmark has a ``SECTION``, its prose, in which a line ``<results: GLOB>`` stands for the
command and the tables of each results file that matches.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import (
    bias,
    calls,
    compare,
    correlation,
    evaluation,
    explainer,
    filter_loss,
    harness,
    kernels,
    loading,
    masking,
    mutual_information,
    mutual_information_loss,
    overhead,
    parts,
    scaling,
)

BENCHMARKS = (
    overhead,
    loading,
    calls,
    scaling,
    masking,
    filter_loss,
    correlation,
    compare,
    parts,
    evaluation,
    explainer,
    mutual_information,
    bias,
    mutual_information_loss,
    kernels,
)
README = harness.RESULTS.parent / "README.md"
HEAD = """
# What it costs, and what it is worth

Written by `python -m benchmarks.report` from the results in `benchmarks/results`; each table names
the command that measured it. No figure from a GPU yet: the CUDA and Triton kernels are tested
without one, not measured.
"""


def source(content: dict[str, Any], path: Path) -> str:
    """The command that measured, what it ran on, and the file it wrote."""
    line = f"`{content['command']}`"
    if "machine" in content:
        facts = content["machine"]
        gpu = f", {facts['gpu']}" if "gpu" in facts else ""
        torch = facts["torch"].partition("+")[0]
        line += f", {facts['processor']}, {facts['cores']} cores{gpu}, PyTorch {torch}"
    return f"{line} ([`{path.name}`](results/{path.name})):"


def section(benchmark: Any) -> str:
    """The prose of a benchmark with its tables in it.

    Raises:
        FileNotFoundError: a glob that matches no results.
    """

    def tables(line: re.Match[str]) -> str:
        paths = sorted(harness.RESULTS.glob(line[1]))
        if not paths:
            raise FileNotFoundError(f"{harness.RESULTS / line[1]}: no such results")
        contents = [(json.loads(path.read_text()), path) for path in paths]
        return "\n\n".join(f"{source(c, path)}\n\n{benchmark.report(c)}" for c, path in contents)

    return re.sub(r"^<results: (.+)>$", tables, benchmark.SECTION.strip(), flags=re.MULTILINE)


def pages() -> str:
    """All of benchmarks/README.md."""
    return "\n\n".join([HEAD.strip(), *map(section, BENCHMARKS)]) + "\n"


def costs(machine: str = "amd-epyc-2-cores") -> str:
    """The main README's table: one size of each family, beside PyTorch or scikit-learn."""

    def first(family: str, part: str) -> dict[str, Any]:
        path = harness.RESULTS / f"{family}-{machine}.json"
        entry: dict[str, Any] = json.loads(path.read_text())[part][0]
        return entry

    rows = []
    for name, family, part, plain in (
        ("bernoulli_mask", "masking", "operators", "plain"),
        ("template_mask", "filter_loss", "masks", "plain"),
        ("filter_loss", "filter_loss", "losses", "autograd"),
    ):
        entry = first(family, part)
        median = entry["milliseconds"]["fused"]["median"]
        ratios = (f"{entry['speedup'][name]:.1f}x" for name in (plain, f"{plain}, compiled"))
        shape = entry["shape"].removesuffix(" contiguous")
        rows.append([f"`{name}`", shape, f"{median:.1f} ms", *ratios])
    entry = first("mutual_information", "knn")
    shape = f"{entry['shape']} K={entry['classes']}"
    ratio = f"{entry['speedup']:.0f}x, scikit-learn"
    median = entry["milliseconds"]["whole"]["median"]
    rows.append(["`mutual_information`", shape, f"{median:.1f} ms", ratio, ""])
    header = ["", "size", "picnn_fast", "over plain PyTorch", "over it compiled"]
    return harness.table(header, rows)


def comparison() -> str:
    """The main README's table of methods: the paper's figures, mean and spread over seeds."""
    results = json.loads((harness.RESULTS / f"{compare.NAME}.json").read_text())
    return compare.report(results, compare.PAPERS)


def main() -> None:
    README.write_text(pages(), encoding="utf-8")
    print(f"{comparison()}\n\n{costs()}\n")
    print(f"written to {README}; the tables above belong into the main README")


if __name__ == "__main__":
    main()
