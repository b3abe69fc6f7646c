"""Whole networks of the libraries by name, and how their images are made."""

import sys
from pathlib import Path

import pytest
import torch

from picnn_fast.backbones import classifier, preprocessing

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["resnet18", "timm:test_resnet"])
def test_a_name_builds_the_whole_network_with_so_many_classes(name: str) -> None:
    network = classifier(name, num_classes=4, image_channels=1, weights=None).eval()
    assert network(torch.randn(1, 1, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_loaded_classifier_and_all(tmp_path: Path, suffix: str) -> None:
    trained = timm.create_model("test_resnet", num_classes=4).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": trained.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(trained.state_dict(), path)
    network = classifier("timm:test_resnet", num_classes=4, weights=str(path)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), trained(images))
    with pytest.raises(ValueError, match=r"^weights: .* fc\.weight \(4, 96\), want \(7, 96\)"):
        classifier("timm:test_resnet", num_classes=7, weights=str(path))


def test_unknown_names_and_weights_are_refused_in_a_line() -> None:
    cases = [
        ("resnet_18", "DEFAULT", r"^model: got 'resnet_18', did you mean 'resnet18'\? want 'timm:"),
        ("fcn_resnet50", "DEFAULT", r"^model: got 'fcn_resnet50',"),  # it labels pixels
        ("timm:resnet5", "DEFAULT", r"^backbone: got 'timm:resnet5', did you mean 'timm:resnet50'"),
        ("resnet18", "IMAGENET1K_V9", r"^weights: got 'IMAGENET1K_V9', did you mean"),
        ("resnet18", "no.pth", r"^weights: got 'no\.pth', want a file that is there$"),
    ]
    for name, weights, message in cases:
        with pytest.raises(ValueError, match=message):
            classifier(name, num_classes=2, weights=weights)


def test_the_libraries_tell_how_images_are_made() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preprocessing("resnet50") == (224, 232, *imagenet)
    assert preprocessing("resnet50", "IMAGENET1K_V1") == (224, 256, *imagenet)
    assert preprocessing("resnet50", None) == preprocessing("resnet50", "my.pth")
    assert preprocessing("inception_v3")[:2] == (299, 342)
    half = (0.5,) * 3
    told = preprocessing("timm:vit_base_patch16_224", "augreg_in21k_ft_in1k")
    assert told == (224, 248, half, half)
    for name, weights in (("resnet50", "V9"), ("no", "DEFAULT"), ("timm:resnet50", "no")):
        assert preprocessing(name, weights) is None


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is not installed; it comes with: pip install"):
        preprocessing("timm:resnet50")
