"""What every method of METHODS owes to training loops, metrics and pictures, on a few backbones.

A method that is added to the registry is tested here without a test being written; so is the
example of one in CONTRIBUTING.md.
"""

import copy
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from picnn_fast.models import METHODS, InterpretableNetwork, make_interpretable

CLASSES = 3
LABELS = torch.tensor([0, 2, 1, 2, 0])


def pair() -> tuple[nn.Module, nn.Module]:
    features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    return features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def plain_pair() -> dict[str, Any]:
    return {"backbone": pair(), "num_filters": 6, "insert_conv": False}


def inserted_pair() -> dict[str, Any]:
    return {"backbone": pair(), "num_filters": 6, "in_channels": 6}


def small_network() -> dict[str, Any]:
    return {"backbone": "small-resnet", "image_channels": 3, "num_filters": 12}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.act, self.fc = nn.ReLU(), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.left(images) + self.right(images))
        return self.fc(maps.mean((2, 3)))


def any_network() -> dict[str, Any]:
    return {"backbone": Branches(), "layer": "act", "num_filters": 6}


def part_network() -> dict[str, Any]:
    return {"backbone": "small-cnn", "num_filters": 10}


BACKBONES: tuple[Callable[[], dict[str, Any]], ...] = (
    plain_pair,
    inserted_pair,
    small_network,
    any_network,
    part_network,
)


RECIPES = Path(__file__).parents[2] / "CONTRIBUTING.md"


def example() -> type[InterpretableNetwork]:
    """The method of CONTRIBUTING.md, which it registers as "groups"."""
    blocks = re.findall(r"^```python\n(.*?)^```", RECIPES.read_text(encoding="utf-8"), re.S | re.M)
    (block,) = (block for block in blocks if 'METHODS["groups"]' in block)
    assert sum(bool(line.strip()) for line in block.splitlines()) < 40
    # A module by that name, which the compiler of older versions of torch looks up.
    module = sys.modules.setdefault("recipes", types.ModuleType("recipes"))
    exec(compile(block, RECIPES.name, "exec"), vars(module))
    kind: type[InterpretableNetwork] = METHODS.pop("groups")
    return kind


@pytest.fixture(params=[*METHODS, "groups"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in METHODS:
        monkeypatch.setitem(METHODS, request.param, example())
    return str(request.param)


@pytest.fixture(params=BACKBONES, ids=lambda backbone: backbone.__name__)
def backbone(request: pytest.FixtureRequest) -> Callable[[], dict[str, Any]]:
    made: Callable[[], dict[str, Any]] = request.param
    return made


@pytest.fixture
def build(
    backbone: Callable[[], dict[str, Any]], method: str
) -> Callable[..., InterpretableNetwork]:
    def make(**options: Any) -> InterpretableNetwork:
        torch.manual_seed(0)
        return make_interpretable(method=method, num_classes=CLASSES, **(backbone() | options))

    return make


def images(batch: int = 5) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def run(model: InterpretableNetwork, x: Tensor | None = None) -> Any:
    torch.manual_seed(2)
    return model(images() if x is None else x, LABELS)


def trained(model: InterpretableNetwork) -> InterpretableNetwork:
    """After a loss, which moves what a method keeps of the images."""
    model.begin_epoch(1, 3, images=[(images(), LABELS)])
    model.loss(run(model), LABELS).backward()
    model.after_step()
    return model


def head_logits(model: InterpretableNetwork, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The head's logits on the maps of images, and on what reaches it past the filters."""
    maps, bypass = model.encode(x)
    return model.head_logits(maps, mask, bypass=bypass)


def learnt(model: InterpretableNetwork) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_output_is_a_named_tuple_with_logits_and_maps(build) -> None:
    model = build().eval()
    output = run(model)
    assert isinstance(output, tuple)
    assert output.logits.shape == (5, CLASSES)
    torch.testing.assert_close(output.maps, model.filter_maps(images()))
    assert output.maps.shape[model.channel_dim] == model.num_filters
    torch.testing.assert_close(model.encode(images())[0], output.maps)
    torch.testing.assert_close(head_logits(model, images()), output.logits)


def test_a_step_reaches_every_parameter_and_the_loss_is_the_sum_of_its_terms(build) -> None:
    model, other = build(), build()
    for network in (model, other):
        network.begin_epoch(1, 3, images=[(images(), LABELS)])
    terms = other.loss_terms(run(other), LABELS)
    assert all(term.ndim == 0 and term.isfinite() for term in terms.values())
    loss = model.loss(run(model), LABELS)
    torch.testing.assert_close(loss, sum(terms.values()))
    loss.backward()
    assert learnt(model)
    for name, parameter in learnt(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_parameter_that_learns_is_in_one_named_group(build) -> None:
    model = build()
    groups = model.parameter_groups(0.25)
    assert groups[0]["name"] == "network"
    assert groups[0]["lr"] == 0.25
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in learnt(model).values()}
    torch.optim.SGD(groups)
    with pytest.raises(ValueError, match="lr: got -1"):
        model.parameter_groups(-1)


def test_a_step_and_an_epoch_are_told_and_counted_from_one(build) -> None:
    model = build()
    for epoch in (1, 2, 7):
        model.begin_epoch(epoch, 4, images=[(images(), LABELS)])
        model.begin_epoch(epoch, images=iter([(images(), LABELS)]))  # an epoch of unknown length
    model.after_step()
    with pytest.raises(ValueError, match="epoch: got 0"):
        model.begin_epoch(0, 4)
    with pytest.raises(ValueError, match="batches: got 0"):
        model.begin_epoch(1, 0)


def test_a_schedule_is_in_the_state_dict(build) -> None:
    model, other = build(), build()
    model.begin_epoch(5, 4, images=[(images(), LABELS)])
    model.loss(run(model), LABELS)
    other.load_state_dict(model.state_dict())
    losses = [network.loss(run(network), LABELS) for network in (model, other)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_filters_belong_to_classes_or_to_none(build) -> None:
    model = build()
    model.loss(run(model), LABELS)
    ownership = model.ownership()
    if ownership is None:
        with pytest.raises(ValueError, match="class_mask"):
            model.class_mask(LABELS)
        return
    assert ownership.shape == (CLASSES, model.num_filters)
    assert not ownership.requires_grad
    assert ownership.min() >= 0
    assert ownership.max() <= 1
    mask = model.class_mask(LABELS, seed=3)
    assert mask.shape == (5, model.num_filters)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(model.class_mask(LABELS, seed=3), mask)
    # What belongs to a class for certain is kept, what never does is dropped.
    sure = ownership[LABELS]
    assert (mask[sure == 1] == 1).all()
    assert (mask[sure == 0] == 0).all()


def test_masks_keep_filters_as_often_as_they_belong_to_the_class(method: str) -> None:
    model = make_interpretable(method=method, num_classes=CLASSES, **plain_pair())
    p = model.ownership()
    if p is None:
        pytest.skip("filters belong to no class")
    draws = 20_000
    for label in range(CLASSES):
        mask = model.class_mask(torch.full((draws,), label), seed=label)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        error = (mask.mean(0) - p[label]).abs()
        assert (error <= 5 * (p[label] * (1 - p[label]) / draws).sqrt()).all()


def test_masked_logits_are_those_of_masked_maps(build) -> None:
    model = build().eval()
    maps, bypass = model.encode(images())
    mask = torch.rand(5, model.num_filters, generator=torch.Generator().manual_seed(3)).round()
    past = () if bypass is None else (bypass,)
    expected = model.head(maps * mask[:, :, None, None], *past)
    torch.testing.assert_close(head_logits(model, images(), mask), expected)


@pytest.mark.parametrize(
    "first",
    [
        nn.LeakyReLU(0.5, inplace=True),
        nn.SiLU(inplace=True),
        nn.Hardswish(inplace=True),
        nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.ReLU6(inplace=True)),
        nn.Sequential(nn.AlphaDropout(0.5), nn.ReLU6(inplace=True)),
        nn.Dropout(0.5, inplace=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_head_that_writes_in_place_leaves_the_maps_alone(method: str, first: nn.Module) -> None:
    features, head = pair()
    head = nn.Sequential(copy.deepcopy(first), *head)
    model = make_interpretable(
        (features, head), method, num_classes=CLASSES, num_filters=6, insert_conv=False
    )
    for training in (True, False):  # in evaluation dropout hands on what it was given
        model.train(training)
        maps, bypass = model.encode(images() - 0.5)
        before = maps.clone()
        model.head_logits(maps, bypass=bypass)
        torch.testing.assert_close(maps, before, rtol=0, atol=0)
        torch.testing.assert_close(run(model, images() - 0.5).maps, before, rtol=0, atol=0)


class Silent(nn.Module):
    """Writes in place and has no attribute that says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_a_head_that_writes_in_place_without_saying_so_is_refused_or_given_a_copy(
    method: str,
) -> None:
    features, layers = pair()
    pooling, *rest = layers
    for head in (nn.Sequential(pooling, Silent(), *rest), nn.Sequential(Silent(), *layers)):
        model = make_interpretable(
            (features, head), method, num_classes=CLASSES, num_filters=6, insert_conv=False
        )
        if model.head is not head:
            pytest.skip("its head is one of its own")
        with torch.no_grad(), pytest.raises(ValueError, match="head: modifies its input in place"):
            run(model)
    # Where nothing can tell, it is given a copy.
    for mode in (torch.inference_mode, torch.no_grad):
        logits = model.head_logits
        if mode is torch.no_grad:
            logits = torch.compile(logits, backend="eager")
        with mode():
            maps = model.filter_maps(images())
            before = maps.clone()
            torch.testing.assert_close(logits(maps), head[1:](2 * before))
            torch.testing.assert_close(maps, before, rtol=0, atol=0)


def test_the_discriminator_is_the_plain_network(build) -> None:
    model = build().eval()
    network = model.discriminator()
    torch.testing.assert_close(network(images()), run(model).logits)
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in network.named_parameters())


def test_no_images_pass(build) -> None:
    model = build().eval()
    assert model(images(0)).logits.shape == (0, CLASSES)
    if model.ownership() is not None:
        mask = model.class_mask(LABELS[:0])
        assert head_logits(model, images(0), mask).shape == (0, CLASSES)


def test_wrong_labels_and_outputs_of_other_methods_are_refused(build) -> None:
    model = build()
    output = run(model)
    for labels, error in (
        (LABELS[:3], ValueError),
        (LABELS + 1, ValueError),
        (LABELS[:, None], ValueError),
        (LABELS.double(), TypeError),
        (LABELS.tolist(), TypeError),
    ):
        with pytest.raises(error, match="labels: got"):
            model.loss(output, labels)
    with pytest.raises(ValueError, match="output: got tuple, want a"):
        model.loss_terms((output.logits, output.maps), LABELS)
    with pytest.raises(ValueError, match=r"^output: got Tensor, want a .*forward yields$"):
        model.loss(output.logits, LABELS)
    if model.ownership() is not None:
        for labels, error in (
            (LABELS - 1, ValueError),
            (LABELS[:, None], ValueError),
            (LABELS.double(), TypeError),
            ([0], TypeError),
        ):
            with pytest.raises(error, match="labels: got"):
                model.class_mask(labels)
    with pytest.raises(TypeError, match="mask: got list"):
        head_logits(model, images(), [1.0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_maps_and_logits_that_disagree_are_named(method: str) -> None:
    def build(features: nn.Module, *head: nn.Module) -> InterpretableNetwork:
        return make_interpretable(
            (features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)),
            method,
            num_classes=CLASSES,
            num_filters=6,
            insert_conv=False,
        )

    model = build(nn.Identity(), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"num_filters: got 6, .* yield 4.*in_channels=4"):
        model.filter_maps(torch.ones(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"num_filters: got 6, .* yield 4.*in_channels=4"):
        model(torch.ones(2, 4, 5, 5), LABELS[:2])
    with pytest.raises(ValueError, match=r"head: yielded \(2, 6\).*want logits \(2, 3\)"):
        model(torch.ones(2, 6, 5, 5), LABELS[:2])
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 5\)"):
        model.head_logits(torch.ones(2, 6, 5, 5), torch.ones(2, 5))
    # Where a layer follows the features, it is the first to see the maps.
    with pytest.raises(TypeError, match=r"^(features: yielded|x: got) tuple, want a "):
        build(Pair(), nn.Linear(6, 6))(torch.ones(2, 6, 5, 5), LABELS[:2])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: got 0, want an int >= 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes: got float"),
        ({"num_filters": True}, TypeError, "num_filters: got bool"),
        ({"num_filters": 0}, ValueError, "num_filters: got 0, want an int >= 1"),
        ({"features": "resnet"}, TypeError, "features: got str"),
        ({"head": None}, TypeError, "head: got NoneType"),
        ({"in_channels": 0}, ValueError, "in_channels: got 0"),
    ],
)
def test_bad_arguments_are_refused(
    method: str, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    features, head = pair()
    good = {"features": features, "head": head, "num_classes": CLASSES, "num_filters": 6}
    with pytest.raises(error, match=f"^{message}"):
        METHODS[method](**(good | wrong))


def test_its_options_are_keywords_with_defaults_that_the_docstring_explains(method: str) -> None:
    kind = METHODS[method]
    options = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    text = inspect.getdoc(kind) or ""
    for name, parameter in options.items():
        assert parameter.default is not parameter.empty, name
        assert re.search(rf"\b{name}\b", text), f"{method} does not explain {name}"
    with pytest.raises(TypeError, match="wrong: method"):
        make_interpretable(method=method, num_classes=CLASSES, wrong=1, **plain_pair())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_says_where_it_comes_from(method: str) -> None:
    module = Path(inspect.getfile(METHODS[method]))
    assert module.name == f"{method}.py"
    assert "Source:" in (inspect.getdoc(METHODS[method]) or "")


def test_maps_of_a_single_position_are_warned_of_once(method: str) -> None:
    features, head = pair()
    features.append(nn.AdaptiveAvgPool2d((1, 2)))
    model = make_interpretable(
        (features, head), method, num_classes=CLASSES, num_filters=6, insert_conv=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    features[-1] = nn.AdaptiveAvgPool2d(1)
    with pytest.warns(UserWarning, match=r"^features: yield maps 1 x 1: with a single position"):
        run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)


def test_the_discriminator_has_the_mode_of_the_network_and_can_be_traced(method: str) -> None:
    model = make_interpretable(method=method, num_classes=CLASSES, **inserted_pair())
    assert model.discriminator().training
    network = model.eval().discriminator()
    assert not network.training
    traced = torch.fx.symbolic_trace(network)
    torch.testing.assert_close(traced(images()), network(images()))


def test_an_option_that_is_true_or_false_is_nothing_else(method: str) -> None:
    known = inspect.signature(METHODS[method]).parameters.values()
    for name in ["insert_conv", *(option.name for option in known if option.annotation is bool)]:
        with pytest.raises(TypeError, match=rf"^{name}: got 'no', want True or False$"):
            make_interpretable(
                method=method, num_classes=CLASSES, **(inserted_pair() | {name: "no"})
            )


def test_a_saved_network_is_loaded_as_it_was(build, backbone, tmp_path) -> None:
    model = trained(build()).eval()
    model.save_pretrained(tmp_path, class_names=["a", "b", "c"])
    made = backbone()
    given = {} if isinstance(made["backbone"], str) else {"backbone": made["backbone"]}
    loaded = InterpretableNetwork.from_pretrained(tmp_path, **given)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.card["class_names"] == ["a", "b", "c"]
    assert repr(loaded) == repr(model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    assert torch.equal(run(loaded).logits, run(model).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (
        tmp_path / "config.json"
    ).read_text()
