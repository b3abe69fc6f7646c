"""ICCNN equals the published formulas, written out plainly; its groups, moving mean and padding."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from torch import Tensor, nn

from picnn_fast.evaluation import FIGURES
from picnn_fast.models import ICCNN, make_interpretable
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.options import Options
from picnn_fast.training.run import train

CLASSES, FILTERS, GROUPS = 3, 8, 3


def parts(classes: int = CLASSES) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, FILTERS, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FILTERS, classes))
    return features.double(), head.double()


def model(classes: int = CLASSES, **options: Any) -> ICCNN:
    return ICCNN(*parts(classes), classes, FILTERS, **{"groups": GROUPS, **options})


def batches(count: int = 3, classes: int = CLASSES, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 3, 6, 7, generator=generator).double(),
            torch.arange(size) % classes,
        )
        for _ in range(count)
    ]


def groups_of(network: ICCNN) -> list[list[int]]:
    return [(network.groups == g).nonzero().flatten().tolist() for g in range(network.num_groups)]


def plainly(
    network: ICCNN, images: Tensor, labels: Tensor, mean: Tensor, single: bool
) -> dict[str, Tensor]:
    """The published losses about a mean map ``[N, P]``, pair by pair of filters and of images."""
    maps = nn.functional.conv2d(images, network.features[0].weight, network.features[0].bias).relu()
    logits = network.head[2](maps.mean((2, 3)))
    x = maps.flatten(2)
    local = (x - mean) @ (x - mean).transpose(1, 2)  # [B, C, C]
    norms = local.diagonal(dim1=1, dim2=2).sqrt()
    similarity = local / (norms[:, :, None] * norms[:, None]) + 1
    if single:
        similarity = similarity * (labels == 1)[:, None, None]
    correlation = torch.zeros((), dtype=x.dtype)
    for group in groups_of(network):
        rows = similarity[:, group]
        numerator = rows[:, :, group].sum() / len(x)
        correlation = correlation - numerator / (rows.sum() / len(x) + 1e-5)
    terms = {"discrimination": nn.functional.cross_entropy(logits, labels)}
    terms["correlation"] = 0.3 * correlation
    if single:
        return terms
    positions = x.shape[1] * x.shape[2]
    use = [len(group) / positions * x[:, group].sum((1, 2)) for group in groups_of(network)]
    v = torch.stack(use, dim=1)
    v = v / (v.norm(dim=1, keepdim=True) + 1e-5)
    inner = v @ v.T
    loss = torch.zeros((), dtype=x.dtype)
    for c in range(network.num_classes):
        own = (labels == c).to(x.dtype)
        within = (inner * own[:, None] * own).mean()
        loss = loss - within / ((inner * own[:, None]).mean() + 1e-5)
    terms["group_class"] = 0.7 * loss
    return terms


@pytest.mark.parametrize("published_mean", [False, True])
@pytest.mark.parametrize("task", ["softmax", "single"])
def test_losses_and_gradients_are_the_published_ones_pair_by_pair(
    task: Any, published_mean: bool
) -> None:
    single = task == "single"
    classes = 2 if single else CLASSES
    network = model(
        classes,
        task=task,
        correlation_weight=0.3,
        class_weight=0.7,
        published_mean=published_mean,
    )
    network.groups.copy_(torch.tensor([0, 2, 1, 1, 2, 0, 0, 0]))
    mean = None
    for images, labels in batches(classes=classes):
        other = copy.deepcopy(network)
        terms = network.loss_terms(network(images, labels), labels)
        batch = other.filter_maps(images).detach().mean(0)
        mean = batch if mean is None else 0.95 * mean + 0.05 * batch
        about = mean.flatten(1)
        if published_mean:  # kept as [P, C] and read as [C, P]
            about = about.T.contiguous().view(about.shape)
        expected = plainly(other, images, labels, about, single)
        assert list(terms) == list(expected)
        for name, term in terms.items():
            torch.testing.assert_close(term, expected[name], rtol=0, atol=1e-10, msg=name)
        network.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.stack(list(expected.values())).sum().backward()
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


def test_the_moving_mean_is_set_by_the_first_batch_and_moves_by_a_twentieth() -> None:
    network = model()
    expected = None
    for images, labels in batches():
        network.loss_terms(network(images), labels)
        batch = network.filter_maps(images).detach().mean(0)
        expected = batch if expected is None else 0.95 * expected + 0.05 * batch
        torch.testing.assert_close(network.mean, expected)


def test_evaluation_leaves_the_state_as_it_is() -> None:
    network = model().eval()
    ((images, labels),) = batches(1)
    network(images)  # which makes room for the mean
    for _ in range(2):
        before = copy.deepcopy(network.state_dict())
        loss = network.loss(network(images), labels)
        assert loss.isfinite()
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        network.train()
        network.loss(network(images), labels)
        assert network.seen == 1
        network.eval()


def test_a_batch_without_images_does_not_move_the_mean() -> None:
    network = model()
    ((images, labels),) = batches(1)
    network.loss(network(images), labels)
    before = network.mean.clone()
    network.loss_terms(network(images[:0]), labels[:0])
    assert torch.equal(network.mean, before)


def similarity(network: ICCNN, loader: list[tuple[Tensor, Tensor]]) -> np.ndarray[Any, Any]:
    """As the published code takes it, of all features at once."""
    with torch.no_grad():
        features = torch.cat([network.features(images) for images, _ in loader])
    x = features.flatten(2).double().numpy()
    centred = x - x.mean(0)
    covariance = (centred @ centred.transpose(0, 2, 1)).mean(0)
    deviation = np.sqrt(np.diag(covariance))
    found: np.ndarray[Any, Any] = covariance / (np.outer(deviation, deviation) + 1e-5) + 1
    return found


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 0.0), (1.0, 1e5), (0.01, 0.0)],
    ids=["plain", "sums of squares would cancel", "1e-5 counts"],
)
def test_groups_are_those_of_scikit_learn_on_all_features_at_once(
    scale: float, offset: float
) -> None:
    network, loader = model(), [*batches(3), *batches(1, size=2)]
    for parameter in network.features.parameters():
        parameter.data *= scale
    network.features[0].bias.data += offset
    network.begin_epoch(1, images=loader)
    clustering = SpectralClustering(GROUPS, affinity="precomputed", random_state=21)
    expected = clustering.fit_predict(similarity(network, loader))
    assert network.groups.tolist() == expected.tolist()
    assert len(set(expected.tolist())) == GROUPS


class Planted(nn.Module):
    """Maps of nine filters, each a noisy copy of one of the image's three patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(9, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        noise = torch.rand(len(images), 9, *images.shape[2:], generator=generator)
        return self.scale * images[:, PATTERN] + 0.3 * noise


PATTERN = torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2])


def planted_network() -> tuple[ICCNN, list[tuple[Tensor, Tensor]]]:
    """An image of class c has the pattern c alone bright."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(30) % 3
    images = torch.rand(30, 3, 5, 5, generator=generator)
    images = images * (0.2 + 0.8 * nn.functional.one_hot(labels, 3))[:, :, None, None]
    return ICCNN(Planted(), head, 3, 9, groups=3), [(images, labels)]


def test_planted_groups_are_found_and_belong_to_the_class_that_activates_them() -> None:
    network, loader = planted_network()
    torch.testing.assert_close(network.ownership(), torch.full((3, 9), 1 / 3))
    network.begin_epoch(1, images=loader)
    together = network.groups[:, None] == network.groups
    assert torch.equal(together, PATTERN[:, None] == PATTERN)
    ownership = network.ownership()
    torch.testing.assert_close(ownership.sum(0), torch.ones(9))
    assert torch.equal(ownership.argmax(0), PATTERN)
    means = torch.stack(
        [network.filter_maps(loader[0][0])[loader[0][1] == c].mean((0, 2, 3)) for c in range(3)]
    )
    group = means[:, PATTERN == 1].mean(1)
    torch.testing.assert_close(ownership[:, 2], (group / group.sum()).detach())


def test_groups_are_renewed_in_the_first_epochs_and_frozen_after() -> None:
    network, loader = model(regroup_epochs=2), batches()
    calls = []

    def images() -> Any:
        calls.append(1)
        yield from loader

    for epoch in (1, 2):
        network.groups.zero_()
        network.begin_epoch(epoch, images=images())
        assert len(network.groups.unique()) == GROUPS
    assert len(calls) == 2
    network.groups.zero_()
    network.begin_epoch(3, images=images())
    assert network.groups.unique().tolist() == [0]
    assert len(calls) == 2


def test_grouping_looks_in_evaluation_mode_and_leaves_modes_and_gradients_alone() -> None:
    features, head = parts()
    features.append(nn.BatchNorm2d(FILTERS).double())
    network = ICCNN(features, head, CLASSES, FILTERS, groups=GROUPS)
    network.head.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [part.training for part in network.modules()]
    network.begin_epoch(1, images=batches())
    assert [part.training for part in network.modules()] == modes
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed <= {"groups", "response", "mean"}
    assert all(p.grad is None for p in network.parameters())


def test_an_epoch_without_images_to_group_by_is_warned_of_once() -> None:
    network = model(regroup_epochs=2)
    with pytest.warns(UserWarning, match="images: got None in epoch 1, want the training images"):
        network.begin_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.begin_epoch(2)
        model(regroup_epochs=2).begin_epoch(3)


def test_as_many_groups_as_filters_and_a_single_one_need_no_clustering() -> None:
    for groups in (1, FILTERS):
        network = model(groups=groups)
        network.begin_epoch(1, images=batches())
        assert network.groups.tolist() == [i % groups for i in range(FILTERS)]


def test_groups_mean_and_response_are_in_the_state_dict() -> None:
    network, other = model(), model()
    loader = batches()
    network.begin_epoch(1, images=loader)
    network.loss(network(loader[0][0]), loader[0][1])
    other.load_state_dict(network.state_dict())
    for name in ("groups", "mean", "seen", "response"):
        assert torch.equal(getattr(other, name), getattr(network, name)), name
    twin = copy.deepcopy(other)
    losses = [m.loss(m(loader[1][0]), loader[1][1]) for m in (network, other, twin)]
    assert losses[0] == losses[1] == losses[2]


def test_the_loss_is_minus_one_without_structure_and_minus_two_at_best() -> None:
    features = nn.Sequential(nn.Identity())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    network = ICCNN(features, head, 2, 8, groups=4, correlation_weight=1.0)
    labels = torch.tensor([0, 1])
    # Groups of filters that are alike, on two images of opposite sign, whose mean is 0: as one,
    # and as the corners of a tetrahedron, which cancel.
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]])
    for patterns, expected in ((corners[:1].expand(4, 3), -1.0), (corners, -2.0)):
        maps = torch.stack([patterns, -patterns])[:, network.groups].unsqueeze(2)
        network.seen.zero_()
        output = network(maps)
        loss = network.loss_terms(output, labels)["correlation"]
        torch.testing.assert_close(loss.item(), expected, rtol=0, atol=1e-4)


def test_replicate_padding_is_that_of_a_resnet_built_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchvision = pytest.importorskip("torchvision")

    class Replicate(nn.Conv2d):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, padding_mode="replicate")

    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=4).eval()
    with monkeypatch.context() as patch:
        patch.setattr(nn, "Conv2d", Replicate)
        expected = torchvision.models.resnet18(num_classes=4).eval()
    expected.load_state_dict(plain.state_dict())
    networks = {
        padding: make_interpretable(
            copy.deepcopy(plain),
            "iccnn",
            num_classes=4,
            layer="layer3",
            insert_conv=False,
            padding=padding,
        ).eval()
        for padding in ("own", "replicate")
    }
    own, network = networks.values()
    assert network.state_dict().keys() == own.state_dict().keys()
    expected.fc = [m for m in network.head.modules() if isinstance(m, nn.Linear)][-1]
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(network(images).logits, expected(images))
    assert not torch.allclose(network.filter_maps(images), own.filter_maps(images))


def test_figures_by_masks_do_not_apply_though_groups_belong_to_classes() -> None:
    network = model()
    assert network.ownership().shape == (CLASSES, FILTERS)
    for name in ("acc2", "acc3"):
        assert FIGURES[name].needs(network, None) == "ICCNN draws no masks of filters"
    assert FIGURES["acc1"].needs(network, None) is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": 9}, ValueError, "groups: got 9, want at most 8, the filters"),
        ({"groups": 0}, ValueError, "groups: got 0"),
        ({"task": "single"}, ValueError, "num_classes: got 3 with task='single', want 2"),
        ({"padding": "reflect"}, ValueError, "padding: got 'reflect'"),
        ({"correlation_weight": -1.0}, ValueError, "correlation_weight: got -1"),
        ({"regroup_epochs": -1}, ValueError, "regroup_epochs: got -1"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(**options)


def test_images_that_cannot_be_grouped_by_are_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match="images: got none"):
        network.begin_epoch(1, images=[])
    ((images, labels),) = batches(1)
    with pytest.raises(ValueError, match="images: got some of which maps are not finite"):
        network.begin_epoch(1, images=[(images * torch.nan, labels)])
    with pytest.raises(ValueError, match="images: got values in"):
        network.begin_epoch(1, images=[(images, labels + 1)])
    assert all(part.training for part in network.modules())


def test_maps_of_another_size_are_refused_in_the_loss_alone() -> None:
    network = model()
    ((images, labels),) = batches(1)
    network.loss(network(images), labels)
    output = network(images[:, :, :5])
    with pytest.raises(ValueError, match="output: got maps 3 x 5, want 4 x 5 as in the batches"):
        network.loss(output, labels)


def options(folder: Path, **method: Any) -> Options:
    return Options(
        method={"name": "iccnn", "groups": 4, **method},
        backbone="small-cnn",
        data={
            "name": "part-animals",
            "image_size": 32,
            "train_images": 24,
            "test_images": 12,
            "validation": 0,
        },
        batch_size=8,
        epochs=3,
        accelerator="cpu",
        output=str(folder),
    )


def test_a_run_groups_once_an_epoch_by_images_that_are_not_flipped_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = ICCNN._regroup

    def noted(self: ICCNN, images: Any) -> None:
        batches = [(x.clone(), y) for x, y in images]
        seen.append(torch.cat([x for x, _ in batches]))
        original(self, batches)

    monkeypatch.setattr(ICCNN, "_regroup", noted)
    whole = train(options(tmp_path / "whole", regroup_epochs=2), progress=False)
    assert [len(images) for images in seen] == [24, 24]
    assert torch.equal(seen[0], seen[1])
    assert str(whole["acc2"]).startswith("n/a")
    start = InterpretableModule.on_train_epoch_start

    def interrupted(self: InterpretableModule) -> None:
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        start(self)

    second = options(tmp_path / "second", regroup_epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(InterpretableModule, "on_train_epoch_start", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            train(second, progress=False)
    assert train(second, progress=False) == whole
    one, two = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "second")
    )
    assert one["network.mean"].abs().max() > 0
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_run_on_one_category_learns_by_its_images_alone(tmp_path: Path) -> None:
    run = dataclasses.replace(options(tmp_path / "run", task="single"), category="cat", epochs=1)
    assert 0 <= float(train(run, progress=False)["acc1"]) <= 1
    log = next((tmp_path / "run" / "csv").glob("*/metrics.csv")).read_text(encoding="utf-8")
    assert "train/correlation" in log
    assert "group_class" not in log
