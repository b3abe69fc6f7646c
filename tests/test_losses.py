"""MutualInformationLoss and FilterLoss: values, gradients, corners, and what they remember."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import picnn_fast
from picnn_fast import PartTemplate, functional
from picnn_fast.functional import mutual_information
from picnn_fast.losses import FilterLoss, MutualInformationLoss, PublishedFilterLoss


def batch(samples: int = 40, filters: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    activations = torch.randn(samples, filters, generator=generator)
    return activations + labels[:, None] * torch.rand(filters, generator=generator), labels


def test_the_loss_is_minus_the_information_of_the_best_class_or_of_the_label() -> None:
    activations, labels = batch()
    options: dict[str, Any] = {"estimator": "soft_histogram", "bins": 8}
    per_class = mutual_information(activations, labels, 3, **options)
    loss = MutualInformationLoss(3, bins=8)(activations, labels)
    torch.testing.assert_close(loss, -per_class.amax(0).mean())
    joint = mutual_information(activations, labels, 3, target="label", **options)
    loss = MutualInformationLoss(3, bins=8, objective="label")(activations, labels)
    torch.testing.assert_close(loss, -joint.mean())


def test_a_temperature_leads_from_the_mean_over_classes_to_the_maximum() -> None:
    activations, labels = batch()
    per_class = mutual_information(activations, labels, 3, estimator="soft_histogram", bins=16)

    def loss(temperature: float) -> float:
        return MutualInformationLoss(3, temperature=temperature)(activations, labels).item()

    assert loss(1e-5) == pytest.approx(-per_class.amax(0).mean().item(), abs=1e-4)
    assert loss(1e3) == pytest.approx(-per_class.mean().item(), abs=1e-4)
    assert loss(1e-5) < loss(0.05) < loss(1e3)
    assert loss(1e-38) == pytest.approx(-per_class.amax(0).mean().item(), abs=1e-6)
    assert loss(1e8) == pytest.approx(-per_class.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"objective": "label"}, {"temperature": 0.05}], ids=["max", "label", "soft"]
)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    activations, labels = batch(samples=20, filters=3)
    activations = activations.double()
    # The range is a constant of the backward pass: samples that set it stay where they are.
    ends = torch.stack([activations.amin(0) - 1, activations.amax(0) + 1])
    labels = torch.cat([labels, torch.tensor([0, 1])])
    loss = MutualInformationLoss(3, bins=5, **options)

    def of_inner(inner: Tensor) -> Tensor:
        return loss(torch.cat([inner, ends]), labels)

    assert torch.autograd.gradcheck(of_inner, activations.requires_grad_())


@pytest.mark.parametrize("objective", ["class", "label"])
def test_a_step_of_descent_gains_what_the_gradient_says(objective: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    # Two more samples set the range, a constant of the backward pass.
    ends = torch.tensor([[-20.0], [20.0]], dtype=torch.float64).expand(2, 6)
    labels = torch.arange(62) % 3
    loss = MutualInformationLoss(3, bins=32, objective=objective)

    def of_layer(weight: Tensor) -> Tensor:
        return loss(torch.cat([images @ weight, ends]), labels)

    before = of_layer(weight)
    (gradient,) = torch.autograd.grad(before, weight)
    step = 1e-6
    gain = (before - of_layer(weight - step * gradient)).item()
    assert gain > 0
    assert gain == pytest.approx(step * gradient.square().sum().item(), rel=1e-3)


def test_maps_are_averaged_over_their_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 2
    loss = MutualInformationLoss(2)
    for shape in ((8, 3, 5, 4), (8, 3, 7)):
        maps = torch.randn(shape, generator=generator, requires_grad=True)
        value = loss(maps, labels)
        torch.testing.assert_close(value, loss(maps.flatten(2).mean(-1), labels))
        value.backward()
        assert maps.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast_are_counted_in_single_precision(dtype: torch.dtype) -> None:
    activations, labels = batch()
    half = activations.to(dtype).requires_grad_()
    loss = MutualInformationLoss(3)
    value = loss(half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), labels))
    value.backward()
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(activations, labels)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(activations, labels))
    maps = torch.full((4, 1, 100, 100), 300.0, dtype=torch.float16)  # their sums overflow
    assert loss(maps, torch.arange(4) % 2).isfinite()


@pytest.mark.parametrize("options", [{}, {"objective": "label"}, {"temperature": 0.1}])
@pytest.mark.parametrize("case", ["one sample", "a class missing", "one class", "constant filter"])
def test_corner_cases_of_a_batch_have_finite_gradients(case: str, options: dict[str, Any]) -> None:
    activations, labels = batch()
    classes = 3
    if case == "one sample":
        activations, labels = activations[:1], labels[:1]
    elif case == "a class missing":
        classes = 5
    elif case == "one class":
        labels = torch.zeros_like(labels)
    else:
        activations[:, 2] = -7.3
    activations.requires_grad_()
    loss = MutualInformationLoss(classes, **options)(activations, labels)
    loss.backward()
    assert loss.isfinite()
    assert activations.grad.isfinite().all()
    if case in ("one sample", "one class"):
        assert loss.abs() < 1e-6
    if case == "one sample":
        assert (activations.grad == 0).all()
    if case == "constant filter":
        assert (activations.grad[:, 2] == 0).all()
        assert (activations.grad[:, 1] != 0).any()


def test_nan_makes_the_loss_nan_and_not_an_error() -> None:
    activations, labels = batch()
    activations[3, 1] = math.nan
    assert MutualInformationLoss(3)(activations, labels).isnan()


def test_it_compiles_whole() -> None:
    activations, labels = batch()
    loss = MutualInformationLoss(3, temperature=0.1)
    expected = torch.autograd.grad(loss(activations.requires_grad_(), labels), activations)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(activations, labels), activations)
    torch.testing.assert_close(got, expected)


def test_bad_arguments_are_refused_by_name() -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"num_classes": 0}, ValueError),
        ({"num_classes": 2**31}, ValueError),
        ({"bins": 1}, ValueError),
        ({"bins": 2**24 + 1}, ValueError),
        ({"bins": 8.0}, TypeError),
        ({"objective": "filter"}, ValueError),
        ({"temperature": 0}, ValueError),
        ({"temperature": "low"}, TypeError),
    ]
    for options, error in wrong:
        with pytest.raises(error, match=f"^{next(iter(options))}: got"):
            MutualInformationLoss(**({"num_classes": 3} | options))
    with pytest.raises(ValueError, match=r"^temperature: got 0.1 with objective='label'"):
        MutualInformationLoss(3, objective="label", temperature=0.1)
    activations, labels = batch()
    loss = MutualInformationLoss(3)
    with pytest.raises(ValueError, match=r"^activations: got shape \(40,\)"):
        loss(activations[:, 0], labels)
    with pytest.raises(ValueError, match=r"^activations: got shape \(40, 6, 0, 7\)"):
        loss(torch.ones(40, 6, 0, 7), labels)
    with pytest.raises(TypeError, match=r"^activations: got dtype"):
        loss(activations.long(), labels)
    with pytest.raises(ValueError, match=r"^labels: got values"):
        loss(activations, labels + 1)
    with pytest.raises(ValueError, match=r"^activations: got no sample"):
        loss(activations[:0], labels[:0])


def test_it_is_found_beside_the_models_and_shows_its_options() -> None:
    loss = picnn_fast.losses.MutualInformationLoss(3, bins=8, temperature=0.1)
    assert "num_classes=3, bins=8, objective='class', temperature=0.1" in repr(loss)


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 30 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_the_filter_loss_of_the_batch_is_the_functional_one() -> None:
    loss = FilterLoss(PartTemplate("l2"), num_filters=3)
    x = maps(4, 3, 5, 6)
    torch.testing.assert_close(loss(x), functional.filter_loss(x, PartTemplate("l2")))
    assert loss.log_mean.shape == (3, 0)


def test_running_estimates_are_renewed_in_training_alone() -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator="running", momentum=0.5)
    state = functional.FilterLossState.empty(3, 4, 4, momentum=0.5)
    for batch in (maps(4, 3, 4, 4), 2 * maps(4, 3, 4, 4)):
        expected = functional.filter_loss(batch, PartTemplate(), estimator="running", state=state)
        torch.testing.assert_close(loss(batch), expected)
    torch.testing.assert_close(loss.log_mean, state.log_mean)
    torch.testing.assert_close(loss.log_ratio, state.log_ratio)
    loss.eval()
    loss(3 * maps(4, 3, 4, 4))
    torch.testing.assert_close(loss.log_mean, state.log_mean, rtol=0, atol=0)


def test_a_filter_loss_moves_and_loads_with_what_it_remembers() -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator="running").double()
    x = maps(4, 3, 4, 4, dtype=torch.float64)
    loss(x)
    assert loss.log_mean.dtype == torch.float64
    other = FilterLoss(PartTemplate(), num_filters=3, estimator="running").double()
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(x), loss(x), rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["batch", "running", "target"])
def test_maps_of_another_number_of_filters_are_refused_by_name(estimator: Any) -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator=estimator)
    for channels in (2, 4):
        with pytest.raises(ValueError, match=rf"^x: got {channels} channels .* want 3, num_filter"):
            loss(maps(4, channels, 4, 4))
    assert loss.log_mean.shape == (3, 0)
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 4, 4\), want maps \[B, N, h, w\]"):
        loss(maps(3, 4, 4))
    with pytest.raises(ValueError, match=r"^x: got maps with h = 0"):
        loss(maps(4, 3, 0, 4))


@pytest.mark.parametrize("size", [(5, 5), (2, 8)])
@pytest.mark.parametrize("estimator", ["running", "target"])
def test_maps_of_another_size_than_remembered_are_refused_in_the_users_terms(
    estimator: Any, size: tuple[int, int]
) -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator=estimator)
    loss.eval()(maps(4, 3, 6, 2))  # remembers nothing, so that it is bound to no size
    loss.train()(maps(4, 3, 4, 4))
    before = loss.log_mean.clone()
    message = rf"^x: got maps {size[0]} x {size[1]}, want 4 x 4 as in .* give images of one size"
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            loss.train(mode)(maps(4, 3, *size))
    torch.testing.assert_close(loss.log_mean, before, rtol=0, atol=0)
    other = FilterLoss(PartTemplate(), num_filters=3, estimator=estimator)
    other.load_state_dict(loss.state_dict())
    with pytest.raises(ValueError, match=r"^x: got maps 5 x 6, want 16 positions as in the batch"):
        other(maps(4, 3, 5, 6))


@pytest.mark.parametrize(
    "options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["mean", "exponential"]
)
@pytest.mark.parametrize("estimator", ["running", "target"])
def test_averages_of_the_weights_can_be_begun_before_the_first_batch(
    estimator: Any, options: dict[str, Any]
) -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator=estimator)
    averaged = AveragedModel(copy.deepcopy(loss), use_buffers=True, **options)  # of a copy
    loss(maps(4, 3, 4, 4))
    averaged.update_parameters(loss)
    torch.testing.assert_close(averaged.module.state_dict(), loss.state_dict())
    loss(2 * maps(4, 3, 4, 4))
    averaged.update_parameters(loss)
    assert averaged.module.log_mean.isfinite().all()
    averaged.eval()(maps(4, 3, 4, 4))


def test_averages_can_be_begun_before_estimates_are_loaded() -> None:
    trained = FilterLoss(PartTemplate(), num_filters=3, estimator="running")
    trained(maps(4, 3, 4, 4))
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator="running")
    averaged = AveragedModel(loss, use_buffers=True)
    loss.load_state_dict(trained.state_dict())
    averaged.update_parameters(loss)
    torch.testing.assert_close(averaged.module.state_dict(), trained.state_dict())


def test_copies_learn_apart_and_of_maps_of_any_size() -> None:
    loss = FilterLoss(PartTemplate(), num_filters=3, estimator="running")
    twin, pickled = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    loss(maps(4, 3, 4, 4))
    assert twin.log_mean.isneginf().all()
    assert pickled.log_mean.shape == (3, 0)
    for other in (twin, pickled):
        other(maps(4, 3, 5, 6))
        assert other.log_mean.shape == (3, 31)
    assert loss.log_mean.shape == (3, 17)


def gradient(loss: Callable[[Tensor], Tensor], reentrant: bool | None) -> Tensor:
    x = maps(4, 3, 4, 4).requires_grad_()
    value = loss(x) if reentrant is None else checkpoint(loss, x, use_reentrant=reentrant)
    value.sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["running", "target"])
def test_a_pass_computed_again_is_refused_where_it_would_renew_the_estimates_twice(
    estimator: Any, reentrant: bool
) -> None:
    loss = FilterLoss(PartTemplate(tau=0.1), num_filters=3, estimator=estimator)
    loss(2 * maps(4, 3, 4, 4))
    state = functional.FilterLossState.empty(3, 4, 4)

    def of_the_function(x: Tensor) -> Tensor:
        return functional.filter_loss(x, PartTemplate(), estimator=estimator, state=state)

    for each in (loss, of_the_function):
        with pytest.raises(RuntimeError, match=r"^filter_loss: got computed again in the backward"):
            gradient(each, reentrant)
        if not reentrant:  # the backward pass of a compiled graph would compute again unseen
            torch.compiler.reset()
            compiled = torch.compile(
                lambda x, each=each: checkpoint(each, x, use_reentrant=False),
                fullgraph=True,
                backend="aot_eager",
            )
            with pytest.raises(torch._dynamo.exc.Unsupported, match="Unsafe side effect"):
                compiled(maps(4, 3, 4, 4).requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["batch", "running", "target"])
def test_a_pass_computed_again_has_the_same_gradient_where_nothing_is_renewed(
    estimator: Any, reentrant: bool
) -> None:
    loss = FilterLoss(PartTemplate(tau=0.1), num_filters=3, estimator=estimator)
    loss(2 * maps(4, 3, 4, 4))
    loss.train(estimator == "batch")
    expected = gradient(loss, None)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(loss, reentrant), expected, rtol=0, atol=0)


def test_a_published_loss_computed_again_is_refused_in_training_alone() -> None:
    loss = PublishedFilterLoss(PartTemplate(), num_classes=3)
    labels, category = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 2, 1])

    def of_maps(x: Tensor) -> Tensor:
        return loss(x, labels, category)

    with pytest.raises(RuntimeError, match=r"^PublishedFilterLoss: got computed again"):
        gradient(of_maps, False)
    loss.eval()
    torch.testing.assert_close(gradient(of_maps, False), gradient(of_maps, None))


def test_the_published_filter_loss_counts_the_images_of_each_class() -> None:
    loss = PublishedFilterLoss(PartTemplate(), num_classes=3)
    x, category = maps(4, 2, 4, 4), torch.tensor([0, 2])
    batches = [torch.tensor([0, 0, 0, 1]), torch.tensor([2, 1, 2, 0])]
    shares = [[3 / 4, 0.0], [4 / 8, 2 / 8]]
    for labels, share in zip(batches, shares, strict=True):
        want = functional.published_filter_loss(
            x,
            PartTemplate(),
            labels=labels,
            filter_category=category,
            density=torch.tensor(share),
        )
        torch.testing.assert_close(loss(x, labels, category), want)
    assert loss.counts.tolist() == [4, 2, 2]
    loss.eval()
    loss(x, batches[0], category)
    assert loss.counts.tolist() == [4, 2, 2]
    with pytest.raises(ValueError, match="labels: got values"):
        loss(x, batches[0] + 2, category)


def test_the_published_filter_loss_of_many_classes_takes_them_as_equally_dense() -> None:
    loss = PublishedFilterLoss(PartTemplate(), num_classes=11)
    x, labels, category = maps(4, 2, 4, 4), torch.tensor([0, 0, 0, 7]), torch.tensor([0, 7])
    want = functional.published_filter_loss(
        x,
        PartTemplate(),
        labels=labels,
        filter_category=category,
        density=torch.full((2,), 1 / 11),
    )
    torch.testing.assert_close(loss(x, labels, category), want)
