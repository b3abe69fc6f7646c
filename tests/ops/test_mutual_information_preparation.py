"""How activations are prepared for nearest neighbours: as scikit-learn does, bit for bit."""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.feature_selection import _mutual_info, mutual_info_classif

from picnn_fast.ops import mutual_information as family


def sklearn_columns(monkeypatch, x: np.ndarray, random_state: int) -> np.ndarray:
    """The columns ``[N, M]`` that scikit-learn estimates from, as ``mutual_info_classif`` does."""
    columns = []

    def record(column, *_):
        columns.append(column.copy())
        return 0.0

    monkeypatch.setattr(_mutual_info, "_compute_mi", record)
    y = np.arange(len(x)) % 2
    mutual_info_classif(x, y, discrete_features=False, random_state=random_state)
    return np.stack(columns)


def activations(samples: int, filters: int) -> torch.Tensor:
    """After a ReLU, with a constant, a zero and a nearly constant filter where there are four."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, filters, generator=generator, dtype=torch.float64).relu() * 37
    if filters >= 4:
        x[:, 1] = 1e6
        x[:, 2] = 0
        x[:, 3] = 3 + 1e-15 * x[:, 0]
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 1), (130, 7), (20_011, 1), (20_011, 70)])
def test_columns_are_prepared_as_scikit_learn_does_bit_for_bit(monkeypatch, size, dtype):
    x = activations(*size).to(dtype).nan_to_num(posinf=1e4)
    exact = x if dtype != torch.bfloat16 else x.float()  # which numpy does not know
    expected = sklearn_columns(monkeypatch, exact.numpy(), random_state=3)
    (whole,) = family.prepare(x, 3)
    assert np.array_equal(whole.numpy(), expected)
    monkeypatch.setattr(family, "_SMALL", 0)
    blocks = list(family.prepare(x, 3))
    assert np.array_equal(torch.cat(blocks).numpy(), expected)
    assert all(block.dtype == torch.float64 and block.is_contiguous() for block in blocks)
    budget = max(8 * size[0], x.numel() * x.element_size())
    assert max(block.numel() * 8 for block in blocks) <= budget


def test_columns_do_not_depend_on_the_layout_of_the_activations(monkeypatch):
    x = activations(501, 6)
    expected = sklearn_columns(monkeypatch, np.asfortranarray(x.numpy()), random_state=0)
    padded = torch.full((501, 12), torch.nan, dtype=torch.float64)
    padded[:, ::2] = x
    for strided in (x, x.T.contiguous().T, padded[:, ::2]):
        assert np.array_equal(torch.cat(list(family.prepare(strided, 0))).numpy(), expected)


def test_preparation_holds_little_beside_a_block(monkeypatch):
    x = activations(4001, 60)
    (whole,) = family.prepare(x, 1)
    monkeypatch.setattr(family, "_SMALL", 0)
    monkeypatch.setattr(family, "_CHUNK", 2**13)
    tracemalloc.start()
    try:
        blocks = list(family.prepare(x, 1))  # of torch's memory, which is not traced
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(torch.cat(blocks), whole)
    assert peak < 6 * 8 * 2**13 < x.numel() * 8 / 4
