"""Methods on a GPU; and, where there is none, whether they would keep to its device.

What every method owes on any device is in ``test_protocol.py`` and ``test_interoperability.py``.
"""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from picnn_fast.data import DATA
from picnn_fast.evaluation import evaluate
from picnn_fast.models import make_interpretable
from tests.models.test_interoperability import (
    LABELS,
    Case,
    assert_near,
    every_case,
    gradients,
    images,
    plain_step,
)

CUDA = torch.device("cuda")


def without_data(model: nn.Module) -> None:
    """Parameters and buffers become tensors without data on a GPU; called in a FakeTensorMode."""
    seen: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is not None and old not in seen:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=CUDA)
                    leaf = isinstance(old, nn.Parameter)
                    seen[old] = nn.Parameter(new, old.requires_grad) if leaf else new
                store[name] = None if old is None else seen[old]


@every_case
def test_a_loss_keeps_to_its_device_and_reads_nothing_back(case: Case) -> None:
    """Tensors without data, on a GPU that there need not be: a number read of one is an error.

    Up to the loss: there is no backward pass on a device that is not there, and an Explainer's
    loss takes one.
    """
    model = case.build()
    plain_step(model)(images(), LABELS)  # the first step may look: an ICCNN makes room for its mean
    with FakeTensorMode():
        without_data(model)
        x = torch.empty(8, 3, 8, 8, dtype=torch.float64, device=CUDA)
        labels = torch.zeros(8, dtype=torch.int64, device=CUDA)
        output = model(x, labels)
        assert output.logits.device.type == "cuda"
        if case.method != "explainer":
            assert model.loss(output, labels).device.type == "cuda"
        model.after_step()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_case
def test_a_step_under_autocast_is_near_one_of_single_precision(
    case: Case, dtype: torch.dtype
) -> None:
    model = case.build().float().to(CUDA)
    plain = copy.deepcopy(model)
    x, y = images().float().to(CUDA), LABELS.to(CUDA)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.manual_seed(0)
    with torch.autocast("cuda", dtype):
        loss = plain_step(model)(x, y)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.manual_seed(0)
    expected = plain_step(plain)(x, y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert_near(gradients(model), gradients(plain), 0.15 if case.method == "explainer" else 0.1)
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@every_case
def test_a_compiled_step_is_the_eager_one(case: Case, mode: str) -> None:
    model = case.build().float().to(CUDA)
    plain = copy.deepcopy(model)
    x, y = images().float().to(CUDA), LABELS.to(CUDA)
    step = torch.compile(plain_step(model), mode=mode)
    with mock.patch.object(torch._inductor.config, "fallback_random", True):
        for seed in range(3):  # of reduce-overhead the third is the first that a graph replays
            for network, run in ((model, step), (plain, plain_step(plain))):
                network.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                torch.manual_seed(seed)
                run(x, y).backward()
            assert_near(gradients(model), gradients(plain), 1e-3)
    torch.compiler.reset()


PARTS = {"batch_size": 5, "image_size": 32, "train_images": 6, "test_images": 60}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("std", "digits", {}),
        ("picnn", "digits", {}),
        ("csg", "digits", {}),
        ("picnn", "part-animals", PARTS),
    ],
)
def test_figures_on_a_gpu_are_those_of_the_cpu(
    method: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data = DATA[name](**options)
    torch.manual_seed(0)
    model = make_interpretable(
        "small-resnet",
        method,
        num_classes=data.num_classes,
        num_filters=20,
        image_channels=data.in_channels,
    )
    expected = evaluate(model, data, intervals=False)
    got = evaluate(model.to(CUDA), data, intervals=False, device=CUDA)
    assert got.keys() == expected.keys()
    assert (name == "digits") == isinstance(expected["location_instability"], str)
    for figure, value in expected.items():
        assert got[figure] == pytest.approx(value, abs=0.02, nan_ok=True), figure
