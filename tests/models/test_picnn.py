"""The PICNN model: its loss, where gradients go, and the ways a training loop may run it."""

import pytest
import torch
from torch import Tensor, nn

from picnn_fast.models import PICNN
from picnn_fast.models.picnn import PICNNOutput
from picnn_fast.models.std import STDOutput

LABELS = torch.tensor([0, 1, 2, 0])


def small(**options: object) -> PICNN:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return PICNN(features, head, num_classes=3, num_filters=6, in_channels=5, **options)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> list[float]:
    """Per sample, by the formula, in Python floats."""
    losses = []
    for row, label in zip(logits.double().exp().tolist(), labels.tolist(), strict=True):
        losses.append(-torch.tensor(row[label] / sum(row)).log().item())
    return losses


@pytest.mark.parametrize("weight", [0.0, 2.0, 3.5])
@pytest.mark.parametrize("pseudo_label", [[0, 1, 2, 0], [0, 2, 1, 0], [1, 1, 1, 1], [1, 2, 0, 2]])
def test_loss_conventions_by_hand(pseudo_label: list[int], weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, masked_logits = torch.randn(2, 4, 3, generator=generator).double()
    output = PICNNOutput(
        logits, masked_logits, torch.ones(4, 6), torch.tensor(pseudo_label), torch.ones(4, 6, 1, 1)
    )
    plain = negative_log_likelihood(logits, LABELS)
    masked = negative_log_likelihood(masked_logits, LABELS)
    right = [
        loss
        for loss, drawn, label in zip(masked, pseudo_label, LABELS.tolist(), strict=True)
        if drawn == label
    ]
    expected = {
        "all": weight * sum(masked) / 4,
        "correct": weight * sum(right) / len(right) if right else 0.0,
    }
    for convention, interpretation in expected.items():
        model = small(interpretation_loss_on=convention, interpretation_weight=weight)
        terms = model.loss_terms(output, LABELS)
        assert list(terms) == ["discrimination", "interpretation"]
        assert terms["discrimination"].item() == pytest.approx(sum(plain) / 4, rel=1e-6)
        assert terms["interpretation"].item() == pytest.approx(interpretation, rel=1e-6)
        total = model.loss(output, LABELS).item()
        assert total == pytest.approx(sum(plain) / 4 + interpretation, rel=1e-6)


def plainly(model: PICNN, drawn: PICNNOutput, assignment: Tensor | None) -> Tensor:
    """Equations 1 to 10 of the paper on the pseudo-labels and masks that were drawn.

    ``assignment`` is the Gumbel-softmax of P, which takes the place of Bernoulli draws (table 4).
    """
    conv, inserted, linear = model.features[0][0], model.features[1], model.head[2]
    x = nn.functional.conv2d(images().double(), conv.weight, conv.bias, padding=1).relu()
    h = nn.functional.conv2d(x, inserted.weight, inserted.bias, padding=1)
    h = h.relu() if len(model.features) == 3 else h
    w = model.correspondence.weight
    p = w.exp() / w.exp().sum(0) if model.correspondence.normalization != "sigmoid" else w.sigmoid()
    logits = linear(h.mean((2, 3)))
    y1 = logits.exp() / logits.exp().sum(1, keepdim=True)
    pseudo = torch.eye(3).double()[drawn.pseudo_label] + y1 - y1.detach()
    if assignment is None:
        chance = pseudo @ p
        z = drawn.mask.detach() + chance - chance.detach()
    else:
        z = pseudo @ assignment
    masked = linear((h * z[:, :, None, None]).mean((2, 3)))
    own = [-masked[b].log_softmax(0)[y] for b, y in enumerate(LABELS.tolist())]
    if model.interpretation_loss_on == "correct":
        own = [own[b] for b in range(4) if drawn.pseudo_label[b] == LABELS[b]]
    loss = sum(-logits[b].log_softmax(0)[y] for b, y in enumerate(LABELS.tolist())) / 4
    return loss + (2 * sum(own) / len(own) if own else 0)


def assert_equal_to(model: PICNN, drawn: PICNNOutput, expected: Tensor) -> None:
    """Loss and gradients."""
    loss = model.loss(drawn, LABELS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("mask_at", ["maps", "late"])
@pytest.mark.parametrize("on", ["correct", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "sigmoid"},
        {"initial": "published", "inserted_activation": "none"},
    ],
    ids=["ours", "sigmoid", "published"],
)
def test_loss_and_gradients_are_those_of_the_paper(options: dict, on: str, mask_at: str) -> None:
    model = small(interpretation_loss_on=on, mask_at=mask_at, **options).double()
    torch.manual_seed(1)
    drawn = model(images().double())
    assert {*drawn.mask.detach().flatten().tolist()} == {0.0, 1.0}
    assert 0 < (drawn.pseudo_label == LABELS).sum() < 4
    assert_equal_to(model, drawn, plainly(model, drawn, None))


@pytest.mark.parametrize("on", ["correct", "all"])
def test_with_gumbel_loss_and_gradients_are_those_of_the_ablation(
    monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    model = small(sampling="gumbel", interpretation_loss_on=on).double()
    noise = torch.rand(3, 6, generator=torch.Generator().manual_seed(2)).double() + 0.1
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(noise))
    torch.manual_seed(1)
    drawn = model(images().double())
    assert 0 < (drawn.pseudo_label == LABELS).sum() < 4
    # One assignment for the whole batch, soft: softmax of (log P + Gumbel noise) / 0.01.
    p = model.correspondence.weight.softmax(0)
    scores = (p.log() - noise.log()) / 0.01
    scores = scores - scores.max(0).values
    assignment = scores.exp() / scores.exp().sum(0)
    rows = assignment[drawn.pseudo_label]
    torch.testing.assert_close(drawn.mask, rows, rtol=0, atol=1e-12)
    assert_equal_to(model, drawn, plainly(model, drawn, assignment))


def test_the_matrix_starts_uniform_or_as_published() -> None:
    uniform = small().correspondence.weight
    torch.manual_seed(0)
    published = small(initial="published").correspondence.weight
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # The same numbers: P is then the softmax of their softmax.
    torch.testing.assert_close(published, uniform.exp() / uniform.exp().sum(0))


def test_defaults_are_the_published_ones() -> None:
    model = small()
    assert model.interpretation_weight == 2
    assert model.interpretation_loss_on == "correct"
    assert model.sampling == "bernoulli"
    assert model.correspondence.normalization == "class_softmax"


def test_no_right_pseudo_label_gives_zero_gradients_not_missing_ones() -> None:
    model = small()
    output = model(images())
    labels = (output.pseudo_label + 1) % 3
    interpretation = model.loss_terms(output, labels)["interpretation"]
    assert interpretation.item() == 0
    interpretation.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


@pytest.mark.parametrize("sampling", ["bernoulli", "gumbel"])
def test_gradients_reach_the_matrix_the_classifier_and_the_features(sampling: str) -> None:
    model = small(sampling=sampling, interpretation_loss_on="all")
    model.loss(model(images()), LABELS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    # The interpretation pathway alone reaches them too.
    model.zero_grad()
    model.loss_terms(model(images()), LABELS)["interpretation"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_pathways_are_the_head_on_all_and_on_the_drawn_filters() -> None:
    model = small()
    output = model(images())
    maps = model.filter_maps(images())
    torch.testing.assert_close(output.logits, model.head(maps))
    masked = model.head(maps * output.mask[:, :, None, None])
    torch.testing.assert_close(output.masked_logits, masked)
    assert set(output.mask.detach().unique().tolist()) <= {0.0, 1.0}
    assert output.pseudo_label.shape == (4,)


def test_every_step_moves_a_filter_to_the_class_it_speaks_for() -> None:
    """Whatever masks are drawn, where the classifier is certain and filters see their own class."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(20)
    x = nn.functional.one_hot(labels, 3).double()[:, :, None, None].expand(60, 3, 4, 4)
    own = torch.eye(3).repeat_interleave(2, 1).bool()  # two filters a class
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model = PICNN(nn.Conv2d(3, 6, 1), head, num_classes=3, num_filters=6).double()
    with torch.no_grad():
        model.features.weight.copy_(own.T[:, :, None, None])
        head[2].weight.copy_(15 * own)
        for layer in (model.features, head[2]):
            layer.bias.zero_()
    _, group = model.parameter_groups(lr=0.02)
    optimizer = torch.optim.Adam([group])
    for _ in range(20):
        before = model.ownership()
        output = model(x)
        assert torch.equal(output.pseudo_label, labels)
        optimizer.zero_grad()
        model.loss(output, labels).backward()
        optimizer.step()
        moved = model.ownership() - before
        assert (moved[own] > 0).all()
        assert (moved[~own] < 0).all()


@pytest.mark.parametrize("sampling", ["bernoulli", "gumbel"])
def test_manual_seed_reproduces_a_step(sampling: str) -> None:
    model = small(sampling=sampling)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(images().repeat(8, 1, 1, 1)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert (outputs[0].mask != outputs[2].mask).any()


@pytest.mark.parametrize("mask_at", ["maps", "late"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, mask_at: str) -> None:
    model = small(mask_at=mask_at, interpretation_loss_on="all")
    with torch.autocast("cpu", dtype=dtype):
        output = model(images())
        loss = model.loss(output, LABELS)
    assert output.logits.dtype == output.masked_logits.dtype == output.mask.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert model.correspondence.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        output.logits.float(), model.head_logits(model.filter_maps(images())), atol=0.02, rtol=0.02
    )


def test_a_bfloat16_model_has_probabilities_and_steps() -> None:
    model = small().bfloat16()
    assert model.correspondence().dtype == torch.float32
    model.loss(model(images().bfloat16()), LABELS).backward()
    assert model.correspondence.weight.grad.isfinite().all()


class Tokens(nn.Module):
    """Patches to tokens [B, T, N], as the last block of a vision transformer yields them."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().flatten(2).transpose(1, 2)


class MeanOverTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


@pytest.mark.parametrize("sampling", ["bernoulli", "gumbel"])
def test_tokens_of_a_vision_transformer(sampling: str) -> None:
    conv, linear = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 3)
    tokens = PICNN(
        Tokens(conv),
        nn.Sequential(MeanOverTokens(), linear),
        3,
        6,
        channel_dim=-1,
        sampling=sampling,
        interpretation_loss_on="all",
    )
    maps = PICNN(
        nn.Sequential(conv, nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear),
        3,
        6,
        sampling=sampling,
        interpretation_loss_on="all",
    )
    maps.correspondence.weight = tokens.correspondence.weight
    assert not tokens.masked_head.late
    assert tokens.filter_maps(images()).shape == (4, 4, 6)
    gradients = []
    for model in (tokens, maps):
        torch.manual_seed(0)
        model.zero_grad()
        model.output = model(images())
        model.loss(model.output, LABELS).backward()
        gradients.append([conv.weight.grad, linear.weight.grad, model.correspondence.weight.grad])
    torch.testing.assert_close(tokens.output[:4], maps.output[:4])
    torch.testing.assert_close(*gradients)
    mask = tokens.class_mask(LABELS, seed=0)
    torch.testing.assert_close(
        tokens.head_logits(tokens.filter_maps(images()), mask),
        maps.head_logits(maps.filter_maps(images()), mask),
    )


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sampling": "argmax"}, ValueError, "sampling: got 'argmax', want one of"),
        ({"interpretation_loss_on": "none"}, ValueError, "interpretation_loss_on: got 'none'"),
        ({"interpretation_weight": -1}, ValueError, "interpretation_weight: got -1"),
        ({"interpretation_weight": float("inf")}, ValueError, "interpretation_weight: got inf"),
        ({"interpretation_weight": "2"}, TypeError, "interpretation_weight: got str"),
        ({"sampling": "gumbel", "normalization": "sigmoid"}, ValueError, "normalization: got"),
    ],
)
def test_bad_options_are_refused(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small(**wrong)


def test_the_output_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="output: got STDOutput, want a PICNNOutput"):
        small().loss(STDOutput(torch.zeros(4, 3), torch.zeros(4, 6, 1, 1)), LABELS)
