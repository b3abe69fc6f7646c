"""Triton kernels of the masking family, beyond the parity suite in tests/ops."""

from pathlib import Path

import pytest

from tests.triton_kernels.conftest import Compiled, types

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "triton_kernels" / "masking.py"


def test_every_kernel_compiles_for_hopper_in_every_dtype(
    compiled: Compiled,
) -> None:
    text = KERNELS.read_text()
    kernels = [
        line.removeprefix("def ").split("(")[0] for line in text.splitlines() if "_kernel(" in line
    ]
    records = compiled["masking"]
    assert {record["kernel"] for record in records} == {
        name for name in kernels if name.isidentifier()
    }
    for name in ("bernoulli_kernel", "channels_kernel", "backward_kernel"):
        of_maps = types(records, name, "features")
        assert of_maps == {"float32", "float64", "bfloat16", "float16"}, name


def test_no_fused_multiply_add_where_labels_are_drawn(compiled: Compiled) -> None:
    """One rounds once where the reference rounds twice: now and then another label."""

    def fused(name: str) -> list[int]:
        return [r["fused"] for r in compiled["masking"] if r["kernel"] == name]

    assert fused("pseudo_label_kernel")
    assert not any(fused("pseudo_label_kernel"))
    # The count sees them where they are allowed.
    assert any(fused("backward_kernel"))


def test_launcher_forbids_fused_multiply_adds_for_labels() -> None:
    launch = KERNELS.read_text().split("pseudo_label_kernel[")[1].split("\n        )")[0]
    assert "enable_fp_fusion=False" in launch
