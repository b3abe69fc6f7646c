"""The losses of ICCNN against their formulas over pairs, with every matrix written out."""

import pytest
import torch
from torch import Tensor

from picnn_fast.functional import group_class_loss, group_correlation_loss


def pairwise_loss(maps: Tensor, mean: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """-Σ_A Num_A / (Den_A + 1e-5) from the matrix ``[C, C]`` of similarities of each image."""
    within: dict[int, Tensor] = {}
    across: dict[int, Tensor] = {}
    for image in counted.nonzero().flatten().tolist():
        centred = (maps[image] - mean).flatten(1)
        norms = torch.linalg.vector_norm(centred, dim=1).clamp_min(1e-5)
        similarity = centred @ centred.T / (norms[:, None] * norms) + 1
        for group in groups.unique().tolist():
            rows = similarity[groups == group]
            within[group] = within.get(group, 0) + rows[:, groups == group].sum() / len(maps)
            across[group] = across.get(group, 0) + rows.sum() / len(maps)
    return -torch.stack([within[a] / (across[a] + 1e-5) for a in within]).sum()


def pairwise_class_loss(maps: Tensor, groups: Tensor, labels: Tensor) -> Tensor:
    """-Σ_c Num_c / (Den_c + 1e-5) from the matrix ``[B, B]`` of scalar products of images."""
    columns = []
    for group in groups.unique().tolist():
        mine = maps[:, groups == group]
        columns.append(mine.shape[1] * mine.sum((1, 2, 3)) / maps[0].numel())
    v = torch.stack(columns, 1)
    v = v / (v.square().sum(1, keepdim=True).sqrt() + 1e-5)
    products = v @ v.T / len(maps) ** 2
    loss = maps.new_zeros(())
    for label in labels.unique().tolist():
        rows = products[labels == label]
        loss = loss - rows[:, labels == label].sum() / (rows.sum() + 1e-5)
    return loss


def example(batch: int = 4, filters: int = 7) -> tuple[Tensor, Tensor]:
    """Maps after a ReLU and their mean so far, float64."""
    generator = torch.Generator().manual_seed(batch + filters)
    maps = torch.randn(batch, filters, 3, 5, generator=generator, dtype=torch.float64).relu()
    mean = torch.rand(filters, 3, 5, generator=generator, dtype=torch.float64) / 2
    return maps, mean


GROUPS = {
    "several": [0, 2, 1, 2, 2, 0, 1],
    "one": [0] * 7,
    "each its own": [3, 0, 6, 1, 2, 5, 4],
    "some empty": [1, 1, 6, 4, 1, 4, 4],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("counted", [None, [1, 0, 1, 1], [0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_group_loss_and_its_gradient_are_those_over_pairs_of_filters(name, counted, batch):
    maps, mean = example(batch)
    counted = torch.tensor([1] * 4 if counted is None else counted).bool()[-batch:]
    if not counted.any():
        pytest.skip("no image counts")
    groups = torch.tensor(GROUPS[name])
    maps.requires_grad_()
    loss = group_correlation_loss(maps, mean, groups, positive=counted)
    expected = pairwise_loss(maps, mean, groups, counted)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(value, maps)[0] for value in (loss, expected)]
    assert (grads[1].abs().max() > 1e-3) != (name == "one")
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


def test_a_map_that_is_its_mean_is_similar_by_one_to_all_and_itself():
    maps, mean = example()
    groups = torch.tensor(GROUPS["several"])
    maps[:, 3] = mean[3]
    maps[2] = mean
    maps.requires_grad_()
    loss = group_correlation_loss(maps, mean, groups)
    (grad,) = torch.autograd.grad(loss, maps)
    counted = torch.ones(4, dtype=torch.bool)
    expected = pairwise_loss(maps, mean, groups, counted)
    (want,) = torch.autograd.grad(expected, maps)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    # 1 / 1e-5 times the gradient of û.
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-10)
    assert not grad[2].any()


def test_a_batch_that_is_its_own_mean_has_the_loss_of_no_structure_and_no_gradient():
    maps, _ = example(1)
    maps.requires_grad_()
    loss = group_correlation_loss(maps, maps.detach()[0], torch.tensor(GROUPS["several"]))
    assert loss.item() == pytest.approx(-1, abs=1e-5)
    assert not torch.autograd.grad(loss, maps)[0].any()


def test_filters_alike_in_each_group_and_opposite_to_the_others_reach_the_bound():
    pattern = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    maps = torch.stack([pattern, -pattern, pattern, -pattern])[None]
    loss = group_correlation_loss(maps, torch.zeros(4, 1, 2), torch.tensor([0, 1, 0, 1]))
    assert loss.item() == pytest.approx(-2, abs=1e-5)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [2, 2, 2, 2], [0, 1, 2, 4]], ids=str)
def test_the_class_loss_and_its_gradient_are_those_over_pairs_of_images(name, labels):
    maps, _ = example()
    maps.requires_grad_()
    groups, labels = torch.tensor(GROUPS[name]), torch.tensor(labels)
    loss = group_class_loss(maps, groups, labels, 5)
    expected = pairwise_class_loss(maps, groups, labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(value, maps)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
    constant = name == "one" or len(labels.unique()) == 1
    assert (grads[1].abs().max() > 1e-4) != constant


def test_the_class_loss_of_one_image_or_of_none_is_a_constant():
    maps, _ = example()
    groups = torch.tensor(GROUPS["several"])
    one = group_class_loss(maps[:1], groups, torch.tensor([3]), 5)
    assert one.item() == pytest.approx(-1, abs=1e-4)
    assert group_class_loss(maps[:0], groups, torch.tensor([], dtype=torch.int64), 5) == 0
    silent = torch.zeros_like(maps, requires_grad=True)
    loss = group_class_loss(silent, groups, torch.tensor([0, 1, 0, 1]), 5)
    assert loss == 0
    assert torch.autograd.grad(loss, silent)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_class_loss_of_half_types_is_summed_in_float32(dtype):
    maps, _ = example()
    groups, labels = torch.tensor(GROUPS["several"]), torch.tensor([0, 1, 0, 1])
    half = (maps * 300).to(dtype).repeat(1, 1, 20, 20)  # whose sums overflow float16
    loss = group_class_loss(half, groups, labels, 2)
    assert loss.dtype == torch.float32
    expected = pairwise_class_loss(half.double(), groups, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-5)
