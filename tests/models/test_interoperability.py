"""Every method under what else PyTorch offers to training: the loss and gradients of plain eager.

A method that is added to the registry is tested here without a test being written. What one cannot
do is in ``REFUSED`` or ``DIFFERS``; the table of docs/interoperability.md is made of both.
"""

import contextlib
import copy
import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from picnn_fast import PartTemplate
from picnn_fast.models import METHODS, InterpretableNetwork, make_interpretable
from tests.ranks import run_ranks

CLASSES, FILTERS, RANKS, EPOCHS = 3, 6, 2, (1, 2)
LABELS = torch.tensor([0, 2, 1, 2, 0, 1, 1, 0])
PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"

_ICNN = {"template": PartTemplate(tau=0.1), "filter_loss_weight": 0.1}
# Options with which a method does all that it does within two epochs, where not by default.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "picnn": {"": {}, "gumbel": {"sampling": "gumbel", "mask_at": "maps"}},
    "csg": {"": {"start": 0, "period": 2, "bound": float(FILTERS), "penalty_weight": 0.1}},
    "icnn": {
        "": _ICNN,
        "running": _ICNN | {"estimator": "running"},
        "target": _ICNN | {"estimator": "target"},
        "published": _ICNN | {"estimator": "published", "learn_beta": True, "center": "mass"},
    },
}

FEATURES = (
    "torch.compile, one graph",
    "autocast, bfloat16",
    "autocast, float16, GradScaler",
    "channels_last",
    "DistributedDataParallel",
    "FSDP2 (fully_shard)",
    "FSDP2, bfloat16",
    "FSDP2, gradient accumulation",
    "FSDP2, channels_last",
    "FSDP2, torch.compile",
    "gradient accumulation",
    "checkpointed features",
    "checkpointed forward",
    "checkpointed loss",
    "checkpointed loss, compiled",
    "moving averages of weights",
    "state_dict",
    "copy.deepcopy",
    "pickle",
    "CUDA graphs",
)
# Why a method does otherwise; a table's footnote each.
TWICE = (
    "Refused: what the loss remembers of the batches would be renewed twice. Take the loss out of"
    " the checkpointed part."
)
FORWARD_TWICE = (
    "Refused: the forward pass renews the means of its norm layers, which it would do twice."
)
TRACED = "With `torch._dynamo.config.trace_autograd_ops = True`."
OWN_BATCH = (
    "The mean of the losses of the parts, each with what it drew or estimated from its own part,"
    " which is not the loss of the whole batch."
)
REFUSED = {
    ("iccnn", "checkpointed loss"): (TWICE, r"^ICCNN.loss_terms: got computed again"),
    ("iccnn", "checkpointed loss, compiled"): (TWICE, "Mutating a variable from outside the scope"),
    ("explainer", "checkpointed forward"): (
        FORWARD_TWICE,
        r"^Explainer.forward: got computed again",
    ),
    ("explainer", "checkpointed loss"): (FORWARD_TWICE, r"^Explainer.forward: got computed again"),
    ("explainer", "checkpointed loss, compiled"): (
        FORWARD_TWICE,
        "Mutating a variable from outside the scope",
    ),
    ("icnn", "checkpointed loss"): (TWICE, r"^ICNN.loss_terms: got computed again"),
    ("icnn", "checkpointed loss, compiled"): (TWICE, "Mutating a variable from outside the scope"),
}
NO_GPU_YET = "To be tried: its test wants a GPU."
BROKEN_GRAPH = (
    "No: FSDP2 breaks the graph where it gathers a layer, and lambda is made of gradients within"
    " it. With `trace_autograd_ops` torch gives other gradients without a word."
)
DIFFERS = {
    **{(method, "CUDA graphs"): NO_GPU_YET for method in METHODS},
    ("picnn", "gradient accumulation"): OWN_BATCH,
    ("icnn", "gradient accumulation"): OWN_BATCH,
    ("iccnn", "gradient accumulation"): OWN_BATCH,
    ("explainer", "gradient accumulation"): OWN_BATCH,
    ("explainer", "torch.compile, one graph"): TRACED,
    ("explainer", "FSDP2, torch.compile"): BROKEN_GRAPH,
}


class Case(NamedTuple):
    method: str
    variant: str = ""

    def build(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> Any:
        """In double precision; no batch norm, whose statistics are of a batch."""
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(3, FILTERS, 3, padding=1), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * FILTERS, CLASSES))
        takes_more = "in_channels" in inspect.signature(METHODS[self.method]).parameters
        target: dict[str, Any] = {"in_channels": FILTERS} if takes_more else {"insert_conv": False}
        options = OPTIONS.get(self.method, {}).get(self.variant, {})
        return make_interpretable(
            (wrap(features), head),
            self.method,
            num_classes=CLASSES,
            num_filters=FILTERS,
            **target,
            **options,
        ).double()


CASES = [Case(method, variant) for method in METHODS for variant in OPTIONS.get(method, {"": {}})]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))


def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


Step = Callable[[Tensor, Tensor], Tensor]


class Trained(NamedTuple):
    losses: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def begin(model: Any, epoch: int) -> None:
    model.begin_epoch(epoch, 1, images=[(images(), LABELS)])


def plain_step(model: Any) -> Step:
    return lambda x, y: model.loss(model(x, y), y)


def train(
    model: InterpretableNetwork,
    step: Step | None = None,
    *,
    epochs: tuple[int, ...] = EPOCHS,
    x: Tensor | None = None,
    after: Callable[[], None] = lambda: None,
) -> Trained:
    """A step an epoch: the losses, the last gradients and what is in the end."""
    step = plain_step(model) if step is None else step
    x = images().to(next(model.parameters()).dtype) if x is None else x
    optimizer = torch.optim.SGD(model.parameter_groups(0.1))
    losses = []
    for epoch in epochs:
        begin(model, epoch)
        torch.manual_seed(epoch)
        optimizer.zero_grad()
        loss = step(x, LABELS)
        loss.backward()
        optimizer.step()
        model.after_step()
        after()
        losses.append(loss.detach())
    return Trained(losses, gradients(model), dict(model.state_dict()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all that the method trains: an Explainer leaves its performer as it is."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {name: p.grad.clone() for name, p in trained.items()}


def assert_same(got: Trained, expected: Trained) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """By the norm of the difference of all over that of what is expected."""
    assert got.keys() == expected.keys()
    difference, norm = (
        torch.cat([value.flatten() for value in values]).norm()
        for values in ([got[n] - expected[n] for n in expected], expected.values())
    )
    assert difference < bound * norm


@contextlib.contextmanager
def refused(case: Case, feature: str) -> Iterator[bool]:
    """Whether the method refuses, which is then waited for."""
    if (case.method, feature) not in REFUSED:
        yield False
        return
    _, message = REFUSED[case.method, feature]
    with pytest.raises(Exception, match=message):
        yield True


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """What an Explainer wants of the compiler, for its weights are made of gradients."""
    config: Any = torch._dynamo.config
    # Not by monkeypatch, whose undoing deletes the setting, which then is hidden for good.
    with config.patch(trace_autograd_ops=True):
        yield


@every_case
def test_a_compiled_step_is_one_graph_for_all_epochs_and_that_of_eager(case: Case) -> None:
    torch.compiler.reset()
    model = case.build()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(plain_step(model), fullgraph=True, backend=counter)
    assert_same(train(model, step, epochs=(1, 2, 3)), train(case.build(), epochs=(1, 2, 3)))
    # What a method remembers of the batches is made in the first step.
    remembers = case.variant in ("running", "target") or case.method in ("iccnn", "explainer")
    assert counter.frame_count <= (2 if remembers else 1)


def test_a_step_compiled_by_inductor_is_that_of_eager() -> None:
    torch.compiler.reset()
    case = Case("picnn")
    model = case.build()
    with mock.patch.object(torch._inductor.config, "fallback_random", True):
        got = train(model, torch.compile(plain_step(model), fullgraph=True))
    assert_same(got, train(case.build()))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_a_loss_of_single_precision_near_that_of_eager(
    case: Case, dtype: torch.dtype
) -> None:
    model, plain = case.build().float(), case.build().float()
    scale = 1024.0 if dtype == torch.float16 else 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    optimizers = [torch.optim.SGD(network.parameter_groups(0.1)) for network in (model, plain)]
    for epoch in EPOCHS:
        for network in (model, plain):
            begin(network, epoch)
            network.zero_grad()
        torch.manual_seed(epoch)
        with torch.autocast("cpu", dtype):
            loss = plain_step(model)(images().float(), LABELS)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizers[0])
        torch.manual_seed(epoch)
        expected = plain_step(plain)(images().float(), LABELS)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
        # An Explainer weighs its filter losses by a ratio of gradients, each rounded.
        assert_near(gradients(model), gradients(plain), 0.15 if case.method == "explainer" else 0.1)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
        for network in (model, plain):
            network.after_step()
    assert scaler.get_scale() == scale  # no step was left out


@every_case
def test_channels_last_gives_the_same(case: Case) -> None:
    model = case.build().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    assert model.filter_maps(x).is_contiguous(memory_format=torch.channels_last)
    assert_same(train(model, x=x), train(case.build()))


@every_case
def test_accumulated_gradients_are_those_of_the_parts(case: Case) -> None:
    """Two forward passes, then one backward pass: what is remembered in between spoils neither."""
    model, apart, whole = case.build(), case.build(), case.build()
    for network in (model, apart, whole):
        begin(network, 2)
    halves = list(zip(images().chunk(2), LABELS.chunk(2), strict=True))
    torch.manual_seed(1)
    sum(plain_step(model)(x, y) / 2 for x, y in halves).backward()
    torch.manual_seed(1)
    for x, y in halves:
        (plain_step(apart)(x, y) / 2).backward()
    torch.testing.assert_close(gradients(model), gradients(apart), rtol=1e-10, atol=1e-10)
    if (case.method, "gradient accumulation") not in DIFFERS:
        plain_step(whole)(images(), LABELS).backward()
        torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-10, atol=1e-10)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.passes = 0

    def forward(self, x: Tensor) -> Any:
        def counted(x: Tensor) -> Any:
            self.passes += torch.is_grad_enabled()  # not where images are looked at beforehand
            return self.inner(x)

        return checkpoint(counted, x, use_reentrant=False)


@every_case
def test_features_that_are_checkpointed_give_the_same(case: Case) -> None:
    model = case.build(wrap=Checkpointed)
    got, expected = train(model), train(case.build())
    (wrapped,) = (module for module in model.modules() if isinstance(module, Checkpointed))
    frozen = not any(p.requires_grad for p in wrapped.parameters())
    assert wrapped.passes == (1 if frozen else 2) * len(EPOCHS)
    for tensors in (got.gradients, got.state):
        for name in [*tensors]:
            tensors[name.replace("inner.", "")] = tensors.pop(name)
    assert_same(got, expected)


@every_case
def test_a_forward_pass_that_is_checkpointed_gives_the_same_or_is_refused(case: Case) -> None:
    model = case.build()

    def step(x: Tensor, y: Tensor) -> Tensor:
        return model.loss(checkpoint(model, x, y, use_reentrant=False), y)

    with refused(case, "checkpointed forward") as wanted:
        got = train(model, step)
    if not wanted:
        assert_same(got, train(case.build()))


@every_case
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_checkpointed_gives_the_same_or_is_refused(
    case: Case, compiled: bool
) -> None:
    torch.compiler.reset()
    model = case.build()

    def step(x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(plain_step(model), x, y, use_reentrant=False)

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    with refused(case, "checkpointed loss" + ", compiled" * compiled) as wanted:
        got = train(model, step)
    if not wanted:
        assert_same(got, train(case.build()))
    elif not compiled:  # Nothing is renewed in evaluation.
        plain = copy.deepcopy(model.eval())
        assert_same(train(model, step), train(plain))


@every_case
def test_moving_averages_can_be_begun_at_once_and_leave_training_alone(case: Case) -> None:
    model = case.build()
    averages = [
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    ]
    states = []

    def after() -> None:
        for averaged in averages:
            averaged.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))

    assert_same(train(model, after=after), train(case.build()))
    first, last = states
    for averaged in averages:
        for name, parameter in averaged.module.named_parameters():
            torch.testing.assert_close(parameter, 0.9 * first[name] + 0.1 * last[name])
    for name, buffer in averages[0].module.named_buffers():  # those of the last step
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0)
    for averaged in averages:
        plain = case.build()
        plain.load_state_dict(averaged.module.state_dict())
        losses = []
        for network in (averaged.module, plain):
            torch.manual_seed(1)
            losses.append(plain_step(network.eval())(images(), LABELS))
        assert losses[0].isfinite()
        torch.testing.assert_close(*losses)


def restored(case: Case, model: InterpretableNetwork) -> InterpretableNetwork:
    other = case.build()
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    other.load_state_dict(model.state_dict())
    return other


COPIES: dict[str, Callable[[Case, Any], Any]] = {
    "state_dict": restored,
    "copy.deepcopy": lambda case, model: copy.deepcopy(model),
    "pickle": lambda case, model: pickle.loads(pickle.dumps(model)),
}


@every_case
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_between_steps_goes_on_alike_and_apart(case: Case, way: str) -> None:
    model = case.build()
    train(model, epochs=(1,))
    twin = COPIES[way](case, model)
    before = copy.deepcopy(model.state_dict())
    got = train(twin, epochs=(2, 3))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert_same(got, train(model, epochs=(2, 3)))


@pytest.mark.gpu
@every_case
def test_a_captured_step_replays_as_eager(case: Case) -> None:
    device = torch.device("cuda")
    model = case.build().to(device)
    x, y = images().to(device), LABELS.to(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            plain_step(model)(x, y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    plain = copy.deepcopy(model)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = plain_step(model)(x, y)
        loss.backward()
    for epoch in EPOCHS:
        for network in (model, plain):
            begin(network, epoch)
        torch.manual_seed(epoch)
        graph.replay()
        torch.manual_seed(epoch)
        plain.zero_grad()
        expected = plain_step(plain)(x, y)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(model), gradients(plain))
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


# What else is asked of a step under FSDP2, whose layers are compiled in a few cases: it takes long.
STRATEGIES = ("ddp", "fsdp", "fsdp accumulated", "fsdp bfloat16", "fsdp channels_last")
COMPILED = "fsdp compiled"
COMPILED_CASES = [
    case
    for case in CASES
    if not case.variant and (case.method, "FSDP2, torch.compile") not in DIFFERS
]


def step_of(model: Any, network: Any, strategy: str) -> Step:
    """Of this model, by what DistributedDataParallel made of it."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        if strategy == "fsdp bfloat16":
            with torch.autocast("cpu", torch.bfloat16):
                return model.loss(network(x.float(), y), y)
        if strategy == "fsdp channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if strategy == "fsdp accumulated":
            first, second = zip(x.chunk(2), y.chunk(2), strict=True)
            # Before the next pass forward: FSDP2 lets go of what two passes in a row would need.
            (model.loss(network(*first), first[1]) / 2).backward()
            return model.loss(network(*second), second[1]) / 2
        return model.loss(network(x, y), y)

    return step


def built(case: Case, strategy: str) -> Any:
    model = case.build()
    return model.float() if strategy == "fsdp bfloat16" else model


def mean_over_ranks(case: Case, strategy: str) -> list[Trained]:
    """What every rank should come to: the gradients are the means of the ranks' own.

    Each forward pass begins with the buffers of rank 0 in DistributedDataParallel.
    """
    models = [built(case, strategy) for _ in range(RANKS)]
    optimizers = [torch.optim.SGD(model.parameter_groups(0.1)) for model in models]
    losses: list[list[Tensor]] = [[] for _ in models]
    for epoch in EPOCHS:
        for rank, model in enumerate(models):
            begin(model, epoch)
            if rank == 0:
                start = copy.deepcopy(dict(model.named_buffers()))
            elif strategy == "ddp":
                for name, buffer in model.named_buffers():
                    buffer.copy_(start[name])
            torch.manual_seed(epoch)
            model.zero_grad()
            with mock.patch.object(dist, "get_rank", lambda rank=rank: rank):
                loss = step_of(model, model, strategy)(*share(rank))
            loss.backward()
            losses[rank].append(loss.detach())
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            if not parameters[0].requires_grad:
                continue
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for p in parameters:
                p.grad.copy_(mean)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            model.after_step()
    return [
        Trained(losses[rank], gradients(model), dict(model.state_dict()))
        for rank, model in enumerate(models)
    ]


def share(rank: int) -> tuple[Tensor, Tensor]:
    return images().chunk(RANKS)[rank], LABELS.chunk(RANKS)[rank]


def sharded(model: Any) -> InterpretableNetwork:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    network: InterpretableNetwork = model
    return network


def gathered(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
        for name, value in values.items()
    }


def trained_over_ranks(case: Case, strategy: str, rank: int) -> None:
    model = built(case, strategy)
    model = model if strategy == "ddp" else sharded(model)
    network: Any = nn.parallel.DistributedDataParallel(model) if strategy == "ddp" else model
    x, y = share(rank)
    step = step_of(model, network, strategy)
    if strategy == COMPILED:
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager")
    losses, gradients, state = train(model, lambda *_: step(x, y))
    expected = mean_over_ranks(case, strategy)[rank]
    bound = 2e-5 if strategy == "fsdp bfloat16" else 1e-10
    got = Trained(losses, gathered(gradients), gathered(state))
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)
    if strategy not in ("ddp", "fsdp"):
        return
    # What evaluation asks of it, on the weights as they are now.
    plain = case.build()
    plain.load_state_dict(expected.state)
    seen = []
    for one in (model.eval(), plain.eval()):
        maps, bypass = one.encode(x)
        mask = None if one.ownership() is None else one.class_mask(y, seed=0)
        seen.append([one.head_logits(maps, mask, bypass=bypass), *one.logged().values()])
    torch.testing.assert_close(*seen)


def draws_of_ranks_apart(rank: int, folder: Path) -> None:
    """The same images and the same seed on every rank; in one of the steps rank 1 is always wrong,
    and must still take part in the reduction."""
    model = Case("picnn").build()
    network = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(7)
    first = network(images())
    torch.save((first.mask.detach(), first.pseudo_label), folder / f"drawn{rank}.pt")
    labels = (first.pseudo_label + 1) % CLASSES if rank == 1 else LABELS
    terms = model.loss_terms(first, labels)
    assert (terms["interpretation"].item() == 0) == (rank == 1)
    sum(terms.values()).backward()
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    every = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(every, mine)
    torch.testing.assert_close(*every, rtol=0, atol=0)


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    errors: dict[str, str] = {}
    try:
        draws_of_ranks_apart(rank, folder)
        for case in CASES:
            for strategy in (*STRATEGIES, *([COMPILED] if case in COMPILED_CASES else [])):
                errors[f"{case} {strategy}"] = ""
                try:
                    trained_over_ranks(case, strategy, rank)
                except Exception:
                    errors[f"{case} {strategy}"] = traceback.format_exc()
        torch.save(errors, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """One launch for all methods and strategies: what went wrong by rank, and where files are."""
    if not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(__file__, folder, RANKS)


@every_case
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_learn_by_the_mean_of_their_gradients(
    case: Case, strategy: str, ranks: tuple[Path, list[dict[str, str]]]
) -> None:
    for errors in ranks[1]:
        assert not errors[f"{case} {strategy}"], errors[f"{case} {strategy}"]


@pytest.mark.parametrize("case", COMPILED_CASES, ids=lambda case: case.method)
def test_ranks_that_compile_learn_by_the_same_mean(
    case: Case, ranks: tuple[Path, list[dict[str, str]]]
) -> None:
    for errors in ranks[1]:
        assert not errors[f"{case} {COMPILED}"], errors[f"{case} {COMPILED}"]


def test_ranks_seeded_alike_draw_different_masks(
    ranks: tuple[Path, list[dict[str, str]]],
) -> None:
    drawn = [torch.load(ranks[0] / f"drawn{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert all((a != b).any() for a, b in zip(*drawn, strict=True))


def table() -> str:
    """Feature by method, a footnote for each way to do otherwise."""
    notes: list[str] = []
    rows = []
    for feature in FEATURES:
        cells = []
        for method in METHODS:
            why = REFUSED.get((method, feature), (DIFFERS.get((method, feature)),))[0]
            if why is not None and why not in notes:
                notes.append(why)
            cells.append("yes" if why is None else f"({notes.index(why) + 1})")
        rows.append(f"| {feature} | {' | '.join(cells)} |")
    head = [f"| | {' | '.join(f'`{method}`' for method in METHODS)} |", "|---" * (1 + len(METHODS))]
    return "\n".join(
        [*head[:1], head[1] + "|", *rows, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    )


def test_the_page_has_the_table_of_these_tests() -> None:
    assert {feature for _, feature in (*REFUSED, *DIFFERS)} <= {*FEATURES}
    assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
