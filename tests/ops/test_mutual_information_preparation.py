"""How activations are prepared for nearest neighbours: as scikit-learn does, bit for bit."""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.feature_selection import _mutual_info, mutual_info_classif

from picnn_fast import backends
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
    monkeypatch.setattr(family, "_CACHED", 2**13)
    tracemalloc.start()
    try:
        blocks = list(family.prepare(x, 1))  # of torch's memory, which is not traced
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(torch.cat(blocks), whole)
    assert peak < 6 * 8 * 2**13 < x.numel() * 8 / 4


def test_compiled_noise_is_numpys_bit_for_bit(cpp, threads):
    """Any column first, any number of threads, and words left over from a draw before."""
    for seed, samples, columns, first, count in (
        (0, 1000, 7, 2, 5),
        (2**32 - 1, 3, 1, 0, 1),
        (1, 1, 1, 0, 1),
        (2, 700, 513, 0, 513),
        (3, 9001, 65, 10, 20),
    ):
        state = np.random.RandomState(seed)
        state.randint(2**32, size=seed % 5, dtype=np.uint32)
        _, key, position, *_ = state.get_state(legacy=True)
        noise = state.standard_normal((samples, columns))[:, first : first + count].T
        weights = np.random.RandomState(9).rand(count)
        start = np.random.RandomState(8).rand(count, samples)
        for number in (1, 2, 5):
            threads(number)
            values = start.copy()
            backends.extension.add_legacy_normal(key, position, columns, first, weights, values)
            assert np.array_equal(values, start + weights[:, None] * noise)


def test_numpy_draws_where_the_compiled_core_does_not_as_it_does(monkeypatch):
    x = activations(501, 6)
    (expected,) = family.prepare(x, 3)
    monkeypatch.setattr(family, "_compiled_noise_is_numpys", lambda: False)
    (got,) = family.prepare(x, 3)
    assert torch.equal(got, expected)


def test_a_compiled_core_that_draws_otherwise_is_not_used(monkeypatch):
    assert family._compiled_noise_is_numpys.__wrapped__() == (backends.extension is not None)

    class Other:
        @staticmethod
        def add_legacy_normal(key, position, columns, first, weights, values):
            values += 1

    monkeypatch.setattr(backends, "extension", Other)
    assert not family._compiled_noise_is_numpys.__wrapped__()


def test_noise_of_another_shape_is_refused(cpp):
    key = np.zeros(624, np.uint32)
    with pytest.raises(ValueError, match="do not fit"):
        backends.extension.add_legacy_normal(key, 624, 3, 2, np.ones(2), np.zeros((2, 4)))
