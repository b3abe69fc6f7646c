"""Triton kernels of the masking family, beyond the parity suite in tests/ops."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "triton_kernels" / "masking.py"


def test_every_kernel_compiles_for_hopper_in_every_dtype(
    compiled: dict[str, list[list[str]]],
) -> None:
    text = KERNELS.read_text()
    kernels = [
        line.removeprefix("def ").split("(")[0] for line in text.splitlines() if "_kernel(" in line
    ]
    assert {line[0] for line in compiled["masking"]} == {
        name for name in kernels if name.isidentifier()
    }
    for name in ("bernoulli_kernel", "channels_kernel", "backward_kernel"):
        types = {line[1] for line in compiled["masking"] if line[0] == name}
        assert types == {"*fp32", "*fp64", "*bf16", "*fp16"}, name


def test_no_fused_multiply_add_where_labels_are_drawn(compiled: dict[str, list[list[str]]]) -> None:
    """One rounds once where the reference rounds twice: now and then another label."""
    fused = [int(line[-1]) for line in compiled["masking"] if line[0] == "pseudo_label_kernel"]
    assert fused
    assert not any(fused)
    # The count sees them where they are allowed.
    assert any(int(line[-1]) for line in compiled["masking"] if line[0] == "backward_kernel")


def test_launcher_forbids_fused_multiply_adds_for_labels() -> None:
    launch = KERNELS.read_text().split("pseudo_label_kernel[")[1].split("\n        )")[0]
    assert "enable_fp_fusion=False" in launch
