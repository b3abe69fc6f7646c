"""The discriminator as it is deployed: by torch.export and by ONNX, without picnn_fast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from picnn_fast import make_interpretable
from picnn_fast.models import InterpretableNetwork

torchvision = pytest.importorskip("torchvision")

CLASSES = 3


def vit() -> nn.Module:
    """A small one of torchvision's."""
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16)


def timm_vit() -> nn.Module:
    create_model: Callable[..., nn.Module] = pytest.importorskip("timm").create_model
    return create_model("test_vit", img_size=32)


BACKBONES: dict[str, tuple[Any, int]] = {
    "small-resnet": ("small-resnet", 16),
    "resnet18": ("resnet18", 64),
    "mobilenet_v2": ("mobilenet_v2", 64),
    "vit": (vit, 32),
    "timm:test_convnext": ("timm:test_convnext", 64),
    "timm vit": (timm_vit, 32),
}


def build(backbone: str, method: str) -> tuple[InterpretableNetwork, torch.Tensor]:
    if backbone.startswith("timm"):
        pytest.importorskip("timm")
    network, side = BACKBONES[backbone]
    torch.manual_seed(0)
    given = isinstance(network, str)
    channels = {"image_channels": 3} if network == "small-resnet" else {}
    model = make_interpretable(
        network if given else network(),
        method,
        num_classes=CLASSES,
        num_filters=12 if given else None,
        insert_conv=given,
        **channels,
    )
    return model.eval(), torch.randn(4, 3, side, side)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize(
    ("backbone", "method"),
    [*((name, "picnn") for name in BACKBONES), ("small-resnet", "std"), ("small-resnet", "csg")],
)
def test_what_is_exported_is_the_plain_network_with_the_models_logits(
    backbone: str, method: str
) -> None:
    model, images = build(backbone, method)
    with torch.no_grad():
        wanted = model(images).logits
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            model.discriminator(), (images,), dynamic_shapes=({0: batch},)
        )
        torch.testing.assert_close(program.module()(images), wanted)
        torch.testing.assert_close(program.module()(images[:2]), wanted[:2], rtol=1e-4, atol=1e-5)
    assert not [name for name in operators(program) if "picnn" in name]
    assert set(program.state_dict) <= set(model.state_dict())


def test_an_operator_of_ours_would_be_seen_in_the_export() -> None:
    model, images = build("small-resnet", "icnn")
    program = torch.export.export(model.discriminator(), (images,))
    assert [name for name in operators(program) if "picnn" in name]


@pytest.mark.parametrize("backbone", ["small-resnet", "resnet18", "vit"])
def test_onnxruntime_computes_the_same_logits(backbone: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = build(backbone, "picnn")
    batch = torch.export.Dim("batch", min=2)
    program = torch.onnx.export(
        model.discriminator(), (images,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for x in (images, images[:2]):
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            wanted = model(x).logits
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-3, atol=1e-4)
