"""make_interpretable: every kind of backbone, and every way to ask for the wrong thing."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from picnn_fast.models import METHODS, PICNN, STD, make_interpretable

torchvision = pytest.importorskip("torchvision")


def pair(num_filters: int = 6) -> tuple[nn.Module, nn.Module]:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_filters, 3))
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU()), head


@pytest.mark.parametrize(("method", "kind"), [("picnn", PICNN), ("std", STD)])
def test_a_name_makes_a_model_with_a_late_mask(method: str, kind: type[nn.Module]) -> None:
    model = make_interpretable("small-resnet", method, num_classes=10)
    assert type(model) is kind
    assert model.num_filters == 128
    assert model.masked_head.late
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    output = model(images)
    model.loss(output, labels).backward()
    assert output.logits.shape == (2, 10)
    assert model.filter_maps(images).shape[1] == 128


@pytest.mark.parametrize(
    ("backbone", "classes", "filters"),
    [
        ("small-resnet", 6, 77),
        ("small-resnet", 10, 128),
        ("small-resnet", 40, 512),  # 12.8 a class, and four times its channels
        ("small-resnet", 41, 512),
        ("resnet18", 100, 1280),
        ("resnet18", 1000, 2048),
    ],
)
def test_filters_default_to_12_8_a_class_and_at_most_four_times_the_channels(
    backbone: str, classes: int, filters: int
) -> None:
    with torch.device("meta"):
        for method in ("picnn", "std"):
            model = make_interpretable(backbone, method, num_classes=classes)
            assert model.num_filters == filters
        model = make_interpretable(backbone, "icnn", num_classes=classes)
        assert model.num_filters == model.features.conv.in_channels


class Plain(STD):
    """A method with the signature of ``InterpretableNetwork``."""

    def __init__(self, features, head, num_classes, num_filters) -> None:
        super().__init__(features, head, num_classes, num_filters)


class Few(STD):
    filters_per_class = 2.6


class AsManyAsTheBackbone(STD):
    filters_per_class = None


def test_the_default_number_of_filters_is_the_methods_own(monkeypatch) -> None:
    for kind, filters in ((Few, 8), (AsManyAsTheBackbone, 128)):
        monkeypatch.setitem(METHODS, "own", kind)
        model = make_interpretable("small-resnet", "own", num_classes=3)
        assert model.num_filters == filters
        assert model(torch.ones(1, 1, 8, 8)).maps.shape[1] == filters
        model = make_interpretable("small-resnet", "own", num_classes=3, insert_conv=False)
        assert model.num_filters == 128


def test_a_method_without_in_channels_takes_the_backbones_own_maps_alone(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "plain", Plain)
    for backbone, options in (("small-resnet", {}), (pair(), {"num_filters": 6})):
        model = make_interpretable(backbone, "plain", num_classes=3, insert_conv=False, **options)
        assert type(model) is Plain
        images = torch.ones(2, 1 if backbone == "small-resnet" else 2, 8, 8)
        assert model(images).logits.shape == (2, 3)
        for more in ({}, {"in_channels": 6}, {"insert_kernel": 3}):
            with pytest.raises(ValueError, match=r"^insert_conv: got True, want False: .*'plain'"):
                make_interpretable(backbone, "plain", num_classes=3, **options, **more)


@pytest.mark.parametrize(
    "method",
    [name for name in METHODS if "insert_kernel" in inspect.signature(METHODS[name]).parameters],
)
def test_the_inserted_convolution_has_the_kernel_asked_for_and_keeps_the_size(method: str) -> None:
    weights = {}
    for kernel in (1, 3):
        options = {"num_classes": 3, "num_filters": 6, "in_channels": 6}
        if kernel != 3:
            options["insert_kernel"] = kernel
        model = make_interpretable(pair(), method, **options)
        (_, inserted) = (m for m in model.features.modules() if isinstance(m, nn.Conv2d))
        assert inserted.kernel_size == (kernel, kernel)
        assert model.filter_maps(torch.randn(2, 2, 8, 5)).shape == (2, 6, 6, 3)
        weights[kernel] = inserted.weight.numel()
    assert weights[3] == 9 * weights[1]
    build = METHODS[method]
    for kernel in (1, 3):  # without the factory
        build(*pair(), 3, 6, in_channels=6, insert_kernel=kernel)
    with pytest.raises(ValueError, match=r"^insert_kernel: got 2, want 1 or 3$"):
        build(*pair(), 3, 6, in_channels=6, insert_kernel=2)
    with pytest.raises(ValueError, match=r"^insert_kernel: got 1, want 3: no convolution is ins"):
        build(*pair(), 3, 6, insert_kernel=1)


def test_a_single_class_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"^num_classes: got 1, want at least 2 to tell apart"):
        make_interpretable("small-resnet", num_classes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_interpretable("small-resnet", num_classes=2)


def test_resnet18_trains_a_step_at_64_pixels() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    model = make_interpretable(network, num_classes=4)
    assert model.num_filters == 51
    assert model.features[0].layer1 is network.layer1
    assert isinstance(model.features[1], nn.Conv2d)
    output = model(torch.randn(4, 3, 64, 64))
    model.loss(output, torch.arange(4)).backward()
    assert output.logits.shape == output.masked_logits.shape == (4, 4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_without_insertion_the_backbones_own_maps_are_the_target() -> None:
    network = torchvision.models.resnet18()
    model = make_interpretable(network, num_classes=4, insert_conv=False)
    assert model.num_filters == 512
    assert model.features.layer4 is network.layer4
    model = make_interpretable("small-resnet", num_classes=4, insert_conv=False)
    assert model.filter_maps(torch.ones(1, 1, 8, 8)).shape[1] == model.num_filters
    with pytest.raises(ValueError, match="num_filters: got 100 with insert_conv=False, want 512"):
        make_interpretable(network, num_classes=4, num_filters=100, insert_conv=False)


def test_a_pair_with_and_without_insertion() -> None:
    images = torch.randn(2, 2, 8, 8)
    model = make_interpretable(pair(), num_classes=3, num_filters=6, insert_conv=False)
    assert model(images).logits.shape == (2, 3)
    model = make_interpretable(pair(20), num_classes=3, num_filters=20, in_channels=6)
    assert model.filter_maps(images).shape == (2, 20, 6, 6)
    model = make_interpretable(pair(24), num_classes=3, in_channels=6)
    assert model(images).mask.shape == (2, 24)  # four times six, for 38 would be more


def test_options_reach_the_model() -> None:
    model = make_interpretable(
        "small-resnet", "picnn", num_classes=3, image_channels=3, mask_at="maps", sampling="gumbel"
    )
    assert (model.masked_head.late, model.sampling) == (False, "gumbel")
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)


def test_the_model_is_made_on_the_device_of_the_backbone() -> None:
    features, head = pair()
    features.to("meta")
    model = make_interpretable((features, head), num_classes=3, num_filters=6, insert_conv=False)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("backbone", "options", "error", "message"),
    [
        ("small-resnet", {"method": "qqqq"}, ValueError, "method: got 'qqqq', want one of 'std'"),
        ("resnet19", {}, ValueError, r"backbone: got 'resnet19', did you mean 'resnet1.'\? want"),
        ("small-resnet", {"method": "pcinn"}, ValueError, r"method: got 'pcinn', did you mean 'pi"),
        (nn.Linear(2, 3), {}, TypeError, "backbone: got Linear, want a name.*layer="),
        ((1, 2, 3), {}, TypeError, "backbone: got tuple"),
        ((nn.Identity(), "head"), {"in_channels": 2}, TypeError, "head: got str"),
        (("features", nn.Identity()), {"in_channels": 2}, TypeError, "features: got str"),
        ("small-resnet", {"num_classes": 0}, ValueError, "num_classes: got 0"),
        ("small-resnet", {"num_filters": 0}, ValueError, "num_filters: got 0"),
        ("small-resnet", {"insert_kernel": 2}, ValueError, "insert_kernel: got 2, want 1 or 3"),
        ("small-resnet", {"insert_kernel": 0}, ValueError, "insert_kernel: got 0"),
        ("small-resnet", {"insert_kernel": "1"}, TypeError, "insert_kernel: got str"),
        (
            "small-resnet",
            {"insert_kernel": 1, "insert_conv": False},
            ValueError,
            "insert_kernel: got 1, want 3: no convolution",
        ),
        (pair(), {"in_channels": "6"}, TypeError, "in_channels: got str"),
        ("small-resnet", {"in_channels": 1}, ValueError, "in_channels: got 1.*image_channels"),
        ("small-resnet", {"image_channels": 0}, ValueError, "image_channels: got 0"),
        ("small-resnet", {"weights": "DEFAULT"}, ValueError, "weights: got 'DEFAULT', want None"),
        (pair(), {}, ValueError, "in_channels: got None"),
        (pair(), {"insert_conv": False}, ValueError, "num_filters: got None"),
        (pair(), {"insert_conv": False, "in_channels": 6}, ValueError, "in_channels: got 6"),
        (pair(), {"in_channels": 6, "image_channels": 3}, ValueError, "image_channels: got 3"),
        (pair(), {"in_channels": 6, "weights": "x"}, ValueError, "weights: got 'x'"),
        (pair(), {"in_channels": 6, "layer": "0"}, ValueError, "layer: got '0' with a pair"),
        ("small-resnet", {"sampler": "x"}, TypeError, "sampler: method 'picnn' has no such option"),
        (
            "small-resnet",
            {"method": "std", "sampling": "gumbel"},
            TypeError,
            "sampling: method 'std'",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(
    backbone: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_interpretable(backbone, **({"num_classes": 3} | options))


def test_models_import_torch_alone_and_say_what_is_missing() -> None:
    script = """
import sys
for name in ("torchvision", "torchmetrics", "lightning", "sklearn", "rich", "matplotlib", "captum"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from picnn_fast.models import make_interpretable
make_interpretable("small-resnet", num_classes=2)
for missing in ("make_interpretable('resnet18', num_classes=2)", "import picnn_fast.metrics"):
    try:
        exec(missing)
    except ImportError as error:
        assert "pip install 'picnn_fast[train]'" in str(error), error
    else:
        raise SystemExit(f"{missing}: no ImportError")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
