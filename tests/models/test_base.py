"""Masks, late masking and checks at the door, where filters are drawn by a matrix."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from picnn_fast.models import PICNN, STD, Correspondence, InterpretableNetwork
from picnn_fast.models.masked_head import layers_of, leading_pooling

CLASSES, FILTERS = 3, 6
WITH_A_MATRIX = (PICNN, STD)
AVERAGING = {
    "global average": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "identity first": (nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "nested": (
        nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1)), nn.Flatten()),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    ),
    "several positions": (nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 3)),
    "padded": (
        nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(6, 4, 1),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
}
MAXIMA = {
    "global maximum": (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "maximum, then average": (
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    "dilated": (nn.MaxPool2d(2, dilation=2), nn.Flatten(), nn.Linear(6 * 4, 3)),
}


def build(
    head: tuple[nn.Module, ...] = AVERAGING["global average"],
    method: type[InterpretableNetwork] = PICNN,
    **options: object,
) -> InterpretableNetwork:
    """A float64 network for images [B, 2, 6, 6]; its own copy of the head, with fixed weights."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(2, FILTERS, 3, padding=1), nn.ReLU())
    model = method(features, copy.deepcopy(nn.Sequential(*head)), CLASSES, FILTERS, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.double()


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def forward_and_gradients(model: InterpretableNetwork) -> tuple[object, list[Tensor]]:
    torch.manual_seed(2)
    output = model(images())
    model.loss(output, LABELS).backward()
    return output, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("sampling", ["bernoulli", "gumbel"])
@pytest.mark.parametrize("head", AVERAGING)
def test_late_masking_behind_averages_equals_masking_the_maps(head: str, sampling: str) -> None:
    options = {"sampling": sampling, "interpretation_loss_on": "all"}
    late = build(AVERAGING[head], **options)
    maps = build(AVERAGING[head], mask_at="maps", **options)
    assert late.masked_head.late
    assert not maps.masked_head.late
    output, gradients = forward_and_gradients(late)
    expected, expected_gradients = forward_and_gradients(maps)
    assert 0 < output.mask.mean() < 1
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("sampling", ["bernoulli", "gumbel"])
@pytest.mark.parametrize("head", MAXIMA)
def test_late_masking_behind_maxima_gives_the_same_logits(head: str, sampling: str) -> None:
    late = build(MAXIMA[head], sampling=sampling)
    maps = build(MAXIMA[head], sampling=sampling, mask_at="maps")
    assert late.masked_head.late
    output, _ = forward_and_gradients(late)
    expected, _ = forward_and_gradients(maps)
    assert 0 < output.mask.mean() < 1
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("head", MAXIMA)
def test_late_masking_behind_maxima_has_the_same_gradients_where_no_filter_is_dropped(
    head: str,
) -> None:
    options = {"normalization": "sigmoid", "interpretation_loss_on": "all"}
    late, maps = (build(MAXIMA[head], mask_at=at, **options) for at in ("auto", "maps"))
    with torch.no_grad():
        for model in (late, maps):
            model.correspondence.weight += 10  # probabilities near 1: their gradients stay above 0
    output, gradients = forward_and_gradients(late)
    assert output.mask.min() == 1
    assert late.correspondence.weight.grad.abs().max() > 0
    torch.testing.assert_close(gradients, forward_and_gradients(maps)[1])


@pytest.mark.parametrize("head", [*AVERAGING, *MAXIMA])
def test_gradients_follow_the_straight_through_definition(head: str) -> None:
    model = build((AVERAGING | MAXIMA)[head], interpretation_loss_on="all")
    output, gradients = forward_and_gradients(model)
    parameters = list(model.parameters())

    # z = mask + (p - stop_grad(p)), p = ỹ @ P, ỹ = onehot + (y1 - stop_grad(y1)), on pooled maps.
    layers, count = layers_of(model.head), leading_pooling(model.head)
    pooling, rest = nn.Sequential(*layers[:count]), nn.Sequential(*layers[count:])
    pooled = pooling(model.features(images()))
    logits = rest(pooled)
    y1 = logits.softmax(-1)
    one_hot = nn.functional.one_hot(output.pseudo_label, CLASSES) + y1 - y1.detach()
    p = one_hot @ model.correspondence.weight.softmax(0)
    z = output.mask.detach() + p - p.detach()
    masked_logits = rest(pooled * z[:, :, None, None])
    loss = nn.functional.cross_entropy(logits, LABELS)
    loss = loss + 2 * nn.functional.cross_entropy(masked_logits, LABELS)
    torch.testing.assert_close(gradients, list(torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("method", WITH_A_MATRIX)
@pytest.mark.parametrize("head", [*AVERAGING, *MAXIMA])
def test_head_logits_late_equal_those_of_masked_maps(
    head: str, method: type[InterpretableNetwork]
) -> None:
    model = build((AVERAGING | MAXIMA)[head], method)
    maps = model.filter_maps(images())
    mask = model.class_mask(LABELS, seed=0)
    expected = model.head(maps * mask[:, :, None, None])
    torch.testing.assert_close(model.head_logits(maps, mask), expected)
    torch.testing.assert_close(model.head_logits(maps, mask.bool()), expected)
    torch.testing.assert_close(model.head_logits(maps), model.head(maps))


def test_head_logits_are_differentiable_in_maps_and_mask() -> None:
    model = build(AVERAGING["several positions"])
    maps = model.filter_maps(images(2)).detach().requires_grad_()
    mask = torch.rand(2, FILTERS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.head_logits, (maps, mask))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class Sub(nn.Sequential):
    """A subclass may do anything with its layers."""


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 3)),
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(Squared(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        Sub(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(),
    ],
    ids=lambda head: type(next(iter(head), head)).__name__,
)
def test_late_is_refused_and_auto_falls_back_where_a_head_does_not_start_with_pooling(
    head: nn.Sequential,
) -> None:
    with pytest.raises(ValueError, match=r"mask_at: got 'late'.*pooling"):
        PICNN(nn.Identity(), head, 3, 6, mask_at="late")
    model = PICNN(nn.Identity(), head, 3, 6)
    assert not model.masked_head.late


def test_late_is_refused_where_filters_are_not_axis_1() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="channel_dim=-1"):
        PICNN(nn.Identity(), head, 3, 6, channel_dim=-1, mask_at="late")


def test_pooling_over_other_axes_than_the_maps_have_is_refused() -> None:
    # AdaptiveAvgPool2d would read [B, N, T] as one unbatched image and pool over the filters.
    model = build().float()
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d.*want maps \[B, N\] and 2"):
        model.head_logits(torch.ones(2, FILTERS, 5), torch.ones(2, FILTERS))


def test_a_layer_that_writes_in_place_does_not_reach_the_other_pathway() -> None:
    in_place = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Hardswish(inplace=True), nn.Linear(6, 3))
    copying = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Hardswish(), nn.Linear(6, 3))
    for mask_at in ("late", "maps"):
        actual = forward_and_gradients(build(in_place, mask_at=mask_at))
        expected = forward_and_gradients(build(copying, mask_at=mask_at))
        torch.testing.assert_close(actual, expected)
    first = (nn.Hardswish(inplace=True), *AVERAGING["global average"])
    expected = (nn.Hardswish(), *AVERAGING["global average"])
    torch.testing.assert_close(
        forward_and_gradients(build(first)), forward_and_gradients(build(expected))
    )


def test_class_mask_draws_the_rows_of_the_labels() -> None:
    model = build(normalization="sigmoid")
    rows = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        model.correspondence.weight.copy_(torch.where(rows == 1, 1e4, -1e4))
    mask = model.class_mask(LABELS)
    assert not mask.requires_grad
    torch.testing.assert_close(mask, rows[LABELS].double())
    torch.testing.assert_close(model.class_mask(LABELS.to(torch.uint8)), mask)


@given(seed=st.integers(0, 2**64 - 1))
def test_a_seed_reproduces_the_class_mask(seed: int) -> None:
    model = build()
    torch.testing.assert_close(
        model.class_mask(LABELS, seed=seed), model.class_mask(LABELS, seed=seed)
    )


def test_class_masks_follow_torchs_generator() -> None:
    model = build()
    labels = LABELS.repeat(10)
    torch.manual_seed(5)
    first, second = model.class_mask(labels), model.class_mask(labels)
    torch.manual_seed(5)
    torch.testing.assert_close(model.class_mask(labels), first)
    assert (first != second).any()


def test_normalizations() -> None:
    softmax, sigmoid = build(), build(normalization="sigmoid")
    torch.testing.assert_close(softmax.correspondence().sum(0), torch.ones(FILTERS).double())
    weight = sigmoid.correspondence.weight
    torch.testing.assert_close(sigmoid.correspondence(), 1 / (1 + (-weight).exp()))


def test_the_matrix_starts_uniform_in_0_to_1() -> None:
    torch.manual_seed(0)
    model = PICNN(nn.Identity(), nn.Identity(), num_classes=100, num_filters=1000)
    weight = model.correspondence.weight.detach()
    assert weight.min() >= 0
    assert weight.max() < 1
    counts = torch.histc(weight, bins=10, min=0, max=1) / weight.numel()
    torch.testing.assert_close(counts, torch.full((10,), 0.1), atol=0.005, rtol=0)


def test_std_and_picnn_exchange_state() -> None:
    picnn, std = build(method=PICNN), build(method=STD)
    std.load_state_dict(picnn.state_dict())
    torch.testing.assert_close(std(images()).logits, picnn(images()).logits)
    torch.testing.assert_close(std.ownership(), picnn.ownership())


def test_the_matrix_follows_the_networks_rate_and_decay_unless_it_has_its_own() -> None:
    for own, want in (
        ({}, (0.5, 0.1)),
        ({"correspondence_lr": 0.25}, (0.25, 0.1)),
        ({"correspondence_weight_decay": 0.0}, (0.5, 0.0)),
    ):
        model = build(**own)
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.5), weight_decay=0.1)
        network, matrix = optimizer.param_groups
        assert (network["lr"], network["weight_decay"]) == (0.5, 0.1)
        assert (matrix["lr"], matrix["weight_decay"]) == want
        assert len(matrix["params"]) == 1
        assert matrix["params"][0] is model.correspondence.weight
    (std,) = build(method=STD).parameter_groups(lr=0.5)
    assert len(std["params"]) == len(network["params"])
    with pytest.raises(ValueError, match="correspondence_lr: got -1"):
        build(correspondence_lr=-1)
    with pytest.raises(ValueError, match="lr: got nan"):
        model.parameter_groups(lr=float("nan"))


def test_the_published_start_is_the_softmax_of_uniform_numbers() -> None:
    torch.manual_seed(0)
    uniform = Correspondence(10, 1000).weight
    torch.manual_seed(0)
    published = Correspondence(10, 1000, initial="published")
    torch.testing.assert_close(published.weight, uniform.softmax(0))
    p = published()
    assert p.min() > 0.094
    assert p.max() < 0.11  # softmax of numbers within [0, .3]


def test_without_an_activation_the_inserted_layer_yields_both_signs() -> None:
    head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    for method in WITH_A_MATRIX:
        options = {"in_channels": 4, "inserted_activation": "none"}
        model = method(nn.Conv2d(2, 4, 1), head, 3, 6, **options).double()
        maps = model.filter_maps(images())
        assert maps.min() < 0 < maps.max()
        mask = model.class_mask(LABELS, seed=0)
        torch.testing.assert_close(
            model.head_logits(maps, mask), head(maps * mask[:, :, None, None])
        )
        with pytest.raises(ValueError, match="inserted_activation: got 'none', want 'relu'"):
            method(nn.Identity(), head, 3, 6, inserted_activation="none")


def test_a_head_that_pools_no_more_is_refused_and_other_layers_may_be_exchanged() -> None:
    model = build()
    model.head[2] = nn.Linear(FILTERS, CLASSES).double()
    maps = model.filter_maps(images())
    torch.testing.assert_close(model.head_logits(maps), model.head(maps))
    model.head[0] = nn.Conv2d(FILTERS, FILTERS, 6).double()
    with pytest.raises(ValueError, match="head: got Conv2d where it pooled"):
        model(images())


def test_an_inserted_target_layer_is_a_convolution_and_a_relu() -> None:
    features = nn.Conv2d(2, 4, 1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model = PICNN(features, head, 3, 6, in_channels=4)
    inner, conv, relu = model.features
    assert inner is features
    assert isinstance(relu, nn.ReLU)
    x = images().float()
    expected = nn.functional.conv2d(features(x), conv.weight, conv.bias, padding=1).relu()
    torch.testing.assert_close(model.filter_maps(x), expected)
    assert expected.shape == (8, 6, 6, 6)


@pytest.mark.parametrize("method", WITH_A_MATRIX)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"in_channels": 4, "channel_dim": -1}, ValueError, "in_channels: got 4"),
        ({"channel_dim": 0}, ValueError, "channel_dim: got 0"),
        ({"channel_dim": 1.0}, TypeError, "channel_dim: got float"),
        ({"normalization": "softmax"}, ValueError, "normalization: got 'softmax', want one of"),
        ({"mask_at": "early"}, ValueError, "mask_at: got 'early', want one of"),
    ],
)
def test_bad_options_of_masks_and_matrix_are_refused(
    method: type[InterpretableNetwork],
    wrong: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    good = {
        "features": nn.Identity(),
        "head": nn.Identity(),
        "num_classes": 3,
        "num_filters": 6,
    }
    with pytest.raises(error, match=message):
        method(**(good | wrong))
