"""Kernels for a GPU keep what they work with in registers.

Triton's as they are compiled here, and CUDA's by the committed table of ``benchmarks/kernels.py``.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, kernels
from tests.triton_kernels.conftest import Compiled

ROOT = Path(__file__).parents[2]
# CUDA kernels whose launches ask for no dynamic shared memory.
STATIC = {"sum_groups"}
# Kernels that spill, and why they may; float64 is for checks, not for speed.
SPILLS = {
    ("CUDA", "count_neighbors"): "sm_80 alone; a search waits for memory, so many warps come first",
    ("CUDA", "resident_filter"): "64 sums a thread; on sm_90 none in the loop of products",
    ("CUDA", "scale_channels_last"): "a draw of labels that are checked, beside 8 maps a thread",
    ("Triton", "backward_kernel"): "float64",
    ("Triton", "columns_kernel"): "float64",
    ("Triton", "filters_kernel"): "two scalars, of tables that are not dense",
    ("Triton", "gradient_kernel"): "of the filter loss: a tile of 64 x 256 sums",
    ("Triton", "mask_kernel"): "a few scalars, and tiles of 4,096 positions",
    ("Triton", "peaks_kernel"): "tiles of 4,096 positions",
    ("Triton", "sums_kernel"): "float64, and two scalars of others",
}


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((harness.RESULTS / f"{kernels.NAME}.json").read_text())[
        "kernels"
    ]
    return rows


def test_the_table_has_every_kernel_for_both_architectures(table: list[dict[str, Any]]) -> None:
    cuda = {
        name
        for file in (ROOT / "csrc/cuda").glob("*.cu*")
        for name in re.findall(
            r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(",
            file.read_text(),
        )
    }
    triton = {
        name
        for file in (ROOT / "triton_kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), flags=re.MULTILINE)
    }
    wanted = {("CUDA", name) for name in cuda} | {("Triton", name) for name in triton}
    for architecture in ("sm_80", "sm_90"):
        got = {(r["backend"], r["kernel"]) for r in table if r["architecture"] == architecture}
        assert got == wanted, f"python -m benchmarks.kernels writes it anew: {got ^ wanted}"


def test_no_kernel_spills_but_those_named(table: list[dict[str, Any]]) -> None:
    spilling = {(row["backend"], row["kernel"]) for row in table if row["spilled"]}
    assert spilling <= SPILLS.keys()


def test_arrays_of_a_kernel_leave_the_shared_memory_that_a_launch_takes_unasked(
    table: list[dict[str, Any]],
) -> None:
    """A device counts both; the executor knows dynamic memory alone."""
    source = (ROOT / "csrc/cuda/launch.h").read_text()
    everything, unasked = (
        int(re.findall(rf"size_t {name} = (\d+) << 10;", source)[0]) << 10
        for name in ("kShared", "kSharedUnasked")
    )
    arrays = {row["kernel"]: row["shared"] for row in table if row["backend"] == "CUDA"}
    crowded = {name for name, size in arrays.items() if size + unasked > everything}
    assert crowded == STATIC


def test_no_kernel_of_triton_spills_but_those_named(compiled: Compiled) -> None:
    records = [record for family in compiled.values() for record in family]
    spilling = {("Triton", record["kernel"]) for record in records if record["spilled"]}
    assert spilling <= SPILLS.keys()


def test_a_row_sums_up_variants_and_the_report_divides_what_differs() -> None:
    def record(architecture: str, kind: str, registers: int, spilled: int) -> dict[str, Any]:
        return {
            "family": "beads", "kernel": "count", "type": kind, "architecture": architecture,
            "registers": registers, "spilled": spilled, "shared": 64,
        }  # fmt: skip

    records = [
        record("80", "float32", 30, 0),
        record("80", "float64", 40, 8),
        record("80", "float64", 50, 24),
        record("90", "float32", 30, 0),
        record("90", "float64", 50, 0),
    ]
    rows = kernels.summed_up(records, "CUDA")
    assert [row["registers"] for row in rows] == [[30, 50], [30, 50]]
    assert [row["spilled"] for row in rows] == [{"float64": 24}, {}]
    assert [row["variants"] for row in rows] == [3, 2]
    compilers = {"nvcc": "1", "triton": "2"}
    line = kernels.report({"compilers": compilers, "kernels": rows}).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["CUDA", "beads", "`count`", "2", "30 to 50", "24 (float64) / 0", "64"]


def test_what_nvcc_says_becomes_a_record_a_kernel_type_and_architecture(tmp_path: Path) -> None:
    build = kernels.setup_module()
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        pytest.skip(reason)
    source = tmp_path / "beads.cu"
    source.write_text(
        "template <typename T> __global__ void sum(T* x) {\n"
        "  __shared__ T all[32];\n"
        "  all[threadIdx.x] = x[threadIdx.x];\n"
        "  __syncthreads();\n"
        "  x[threadIdx.x] = all[31 - threadIdx.x];\n"
        "}\n"
        "template __global__ void sum<float>(float*);\n"
        "template __global__ void sum<double>(double*);\n"
    )
    records = list(kernels.cuda_records(source, build, nvcc))
    told = {(r["family"], r["kernel"], r["type"], r["architecture"]): r["shared"] for r in records}
    assert told == {
        ("beads", "sum", kind, architecture): size
        for kind, size in (("float32", 128), ("float64", 256))
        for architecture in kernels.ARCHITECTURES
    }
    assert all(record["registers"] > 0 and record["spilled"] == 0 for record in records)
