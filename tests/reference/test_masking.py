"""The reference against the published Philox vectors, plain Python, and the laws of chance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.reference import masking

WORD = 0xFFFFFFFF
SAMPLES = 100_000
SIGMAS = 5.0  # of a fixed seed: crossed once in two million draws


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's integers, from Salmon et al. 2011, section 3."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def uniform(index: int, seed: int, stream: int, rank: int) -> float:
    """The draw of ``index`` as the package's page on random numbers defines it."""
    seed %= 2**64
    words = philox((index & WORD, index >> 32, stream, rank), (seed & WORD, seed >> 32))
    return (words[0] >> 8) * 2.0**-24


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    assert philox(counter, key) == answer
    assert tuple(masking.philox4x32_10(tensor(*counter), tensor(*key)).tolist()) == answer


@given(
    st.tuples(*[st.integers(0, WORD)] * 4),
    st.tuples(*[st.integers(0, WORD)] * 2),
)
def test_philox_equals_plain_python(counter, key):
    got = masking.philox4x32_10(tensor(*counter), tensor(*key))
    assert tuple(got.tolist()) == philox(counter, key)


def test_philox_broadcasts_the_key_over_counters():
    counters = torch.arange(24).view(2, 3, 4)
    got = masking.philox4x32_10(counters, tensor(5, 6))
    assert got.shape == (2, 3, 4)
    for row, counter in zip(got.view(-1, 4).tolist(), counters.view(-1, 4).tolist(), strict=True):
        assert tuple(row) == philox(tuple(counter), (5, 6))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("index", [0, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3])
def test_draws_use_both_words_of_index_and_seed(index, seed):
    for stream, rank in ((0, 0), (1, 0), (0, 3), (1, WORD)):
        bits = masking.random_24_bits(tensor(index), tensor(seed), stream, rank)
        assert bits.item() * 2.0**-24 == uniform(index, seed, stream, rank)


@pytest.mark.parametrize(("seed", "rank"), [(0, 0), (-5, 1), (2**62 + 3, WORD)])
def test_mask_and_label_follow_their_definition(seed, rank):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator)
    correspondence = torch.rand(4, 6, generator=generator)
    features = torch.ones(9, 6, 2)
    masked, mask, label = masking.bernoulli_mask(
        features, logits, correspondence, tensor(seed), rank
    )
    for b in range(9):
        weights = masking.softmax_weights(logits)[b].tolist()
        threshold = int(uniform(b, seed, 1, rank) * 2**24) * sum(weights) // 2**24
        expected = next(k for k in range(4) if sum(weights[: k + 1]) > threshold)
        assert label[b] == expected
        for i in range(6):
            kept = uniform(b * 6 + i, seed, 0, rank) < correspondence[expected, i].item()
            assert mask[b, i] == float(kept)
            assert masked[b, i].tolist() == [float(kept)] * 2


def test_a_filter_is_kept_exactly_when_u_is_below_p():
    index, seed = torch.arange(2000), tensor(11)
    bits = masking.random_24_bits(index, seed, masking.FILTER_STREAM, 0)
    assert bits.min() >= 0
    assert bits.max() < 2**24
    u = bits.double() * 2.0**-24
    for dtype in (torch.float32, torch.float64):
        exact = u.to(dtype)
        assert torch.equal(exact.double(), u)
        above = torch.nextafter(exact, torch.ones((), dtype=dtype))
        assert not masking.draw_filters(exact.view(20, 100), seed, 0).any()
        assert masking.draw_filters(above.view(20, 100), seed, 0).all()
    assert not masking.draw_filters(torch.zeros(20, 100), seed, 0).any()
    assert masking.draw_filters(torch.ones(20, 100), seed, 0).all()


def test_filters_are_kept_as_often_as_their_probability_says():
    p = torch.tensor([0.0, 1e-3, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0])
    frequency = masking.draw_filters(p.expand(SAMPLES, -1), tensor(2), 0).double().mean(0)
    deviation = (p.double() * (1 - p.double()) / SAMPLES).sqrt()
    assert ((frequency - p).abs() <= SIGMAS * deviation + 1e-9).all()
    assert frequency[0] == 0
    assert frequency[-1] == 1


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_pseudo_labels_are_drawn_as_often_as_softmax_says(classes, scale):
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(classes)) * scale
    labels = masking.draw_labels(logits.expand(SAMPLES, -1), tensor(3), 0)
    observed = labels.bincount(minlength=classes).double()
    expected = logits.double().softmax(-1) * SAMPLES
    assert expected.min() > 20
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = classes - 1
    assert abs(chi_square - freedom) < SIGMAS * math.sqrt(2 * freedom) + 10


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten()))).abs()[0, 1].item()


def test_draws_of_samples_filters_streams_ranks_and_seeds_are_independent():
    bound = SIGMAS / math.sqrt(SAMPLES)
    index = torch.arange(SAMPLES)

    def draws(stream: int = 0, rank: int = 0, seed: int = 9) -> torch.Tensor:
        return masking.random_24_bits(index, tensor(seed), stream, rank).double()

    base = draws()
    filters = 8
    per_filter = base.view(-1, filters).T
    between_filters = torch.corrcoef(per_filter).fill_diagonal_(0).abs().max().item()
    assert between_filters < bound * math.sqrt(filters)
    assert correlation(base[:-1], base[1:]) < bound
    assert correlation(per_filter[:, :-1], per_filter[:, 1:]) < bound * 1.01
    for other in (draws(stream=1), draws(rank=1), draws(seed=10), draws(seed=9 + 2**32)):
        assert correlation(base, other) < bound
        assert (base == other).sum() <= 2  # 100000 chances in 2**24


def test_softmax_weights_are_the_exponentials_in_units_of_2_to_minus_30():
    x = torch.linspace(-20.99, 0, 20_001)
    weights = masking.softmax_weights(torch.cat((x[-1:], x))[None])[0, 1:].double()
    exact = x.double().exp() * 2**30
    # Float32 keeps 24 bits of the exponential; the shift then rounds down to an integer.
    assert ((weights - exact).abs() <= exact * 4 * 2.0**-24 + 1).all()
    assert masking.softmax_weights(torch.zeros(1, 3)).tolist() == [[2**30] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_softmax_weights_agree_with_softmax_in_float64(dtype, scale):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 37, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    weights = masking.softmax_weights(logits).double()
    got = weights / weights.sum(-1, keepdim=True)
    assert (got - logits.double().softmax(-1)).abs().max() < 1e-6


def test_softmax_weights_vanish_for_far_classes_and_rows_without_a_distribution():
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [[0, -21.5, -1e30], [0, -inf, 0], [nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf]]
    )
    weights = masking.softmax_weights(logits)
    assert weights.tolist() == [[2**30, 0, 0], [2**30, 0, 2**30], [0] * 3, [0] * 3, [0] * 3]


def test_softmax_weights_do_not_overflow_at_the_ends_of_the_dtype():
    for dtype in (torch.float32, torch.float64):
        top = torch.finfo(dtype).max
        logits = torch.tensor([[top, -top], [-top, -top], [top, top]], dtype=dtype)
        one = 2**30
        assert masking.softmax_weights(logits).tolist() == [[one, 0], [one, one], [one, one]]


def test_the_label_threshold_is_exact_for_any_total():
    # bits * total / 2**24 in two halves, at sums of up to a thousand classes.
    logits = torch.zeros(4096, 1000)
    labels = masking.draw_labels(logits, tensor(4), 0)
    bits = masking.random_24_bits(torch.arange(4096), tensor(4), masking.LABEL_STREAM, 0)
    expected = [b * (1000 << 30) // 2**24 >> 30 for b in bits.tolist()]
    assert labels.tolist() == expected


def test_backward_is_the_derivative_of_the_product():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(features * mask[..., None], (features, mask), grad)
    got = masking.masking_backward(grad, features.detach(), mask.detach())
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
