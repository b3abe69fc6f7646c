"""Mutual information from counts against its formula."""

import numpy as np
import pytest
import torch
from torch import Tensor

from picnn_fast.ops.mutual_information import plug_in
from tests.conftest import Backend


def entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def information(table: np.ndarray, corrected: bool) -> float:
    """H(x) + H(y) - H(x, y) of one table, each entropy with Miller and Madow's term if wanted."""

    def one(counts: np.ndarray) -> float:
        extra = ((counts > 0).sum() - 1) / (2 * counts.sum()) if corrected else 0.0
        return entropy(counts) + extra

    return one(table.sum(1)) + one(table.sum(0)) - one(table)


@pytest.fixture
def counts() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 6, (4, 9, 5), generator=generator)
    counts[0, 3:] = 0
    counts[1, :, 2] = 0  # a class without samples
    counts[2, :, 1:] = 0  # one class alone
    counts[3, 1:] = 0  # a constant filter
    return counts


@pytest.mark.parametrize("bias_correction", [None, "miller_madow"])
def test_plug_in_is_the_difference_of_entropies(backend: Backend, counts, bias_correction):
    corrected = bias_correction is not None
    given = counts.to(backend.device)
    label = plug_in(given, "label", bias_correction).cpu()
    per_class = plug_in(given, "class", bias_correction).cpu()
    assert (label.shape, per_class.shape) == ((4,), (5, 4))
    assert label.dtype == per_class.dtype == torch.float64
    for n, table in enumerate(counts.numpy()):
        assert label[n].item() == pytest.approx(information(table, corrected), abs=1e-13)
        for k in range(5):
            pair = np.stack((table[:, k], table.sum(1) - table[:, k]), 1)
            assert per_class[k, n].item() == pytest.approx(information(pair, corrected), abs=1e-13)


@pytest.mark.parametrize("target", ["class", "label"])
def test_plug_in_of_soft_counts_has_the_gradient_of_its_formula(target):
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64).add_(0.1)
    assert torch.autograd.gradcheck(lambda c: plug_in(c, target), counts.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias_correction", [None, "miller_madow"])
@pytest.mark.parametrize("target", ["class", "label"])
def test_empty_cells_leave_the_gradient_finite(counts, target, bias_correction, dtype):
    soft = counts.to(dtype).requires_grad_()
    value = plug_in(soft, target, bias_correction)
    assert value.dtype == dtype
    exact = plug_in(counts, target, bias_correction)
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), soft)
    assert grad.isfinite().all()
    assert grad.abs().max() < 10


def test_plug_in_of_a_filter_without_samples_is_nan_and_no_other(counts):
    counts[1] = 0
    label = plug_in(counts, "label")
    assert label.isnan().tolist() == [False, True, False, False]
