"""The scripts of ``examples`` run as they are, on a few images, and say what they measured."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from picnn_fast.metrics import MutualInformationScore
from picnn_fast.training.options import Options
from picnn_fast.training.run import train
from tests.data.trees import PARTS, cub_tree

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def _run(name, *words):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([str(word) for word in words])


def _folder(root, sizes):
    """Images of noise, brighter the later the class."""
    draw = np.random.default_rng(0)
    for place, (name, count) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 100, (40, 48, 3), np.uint8) + np.uint8(70 * place)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def _line(text, begins):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(begins)]
    return line


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path, capsys):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    said = ast.get_docstring(ast.parse(text))
    assert f"python examples/{path.name}" in said
    with pytest.raises(SystemExit) as left:
        _run(path.stem, "--help")
    assert left.value.code == 0
    assert said.splitlines()[0] in capsys.readouterr().out


def test_the_documentation_lists_every_example():
    text = (FOLDER.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    listed = re.findall(r"^## `examples/(\w+)\.py`$", text, re.MULTILINE)
    assert sorted(listed) == [path.stem for path in EXAMPLES]


def test_a_network_of_timm_is_trained_and_measured_by_pathway(capsys):
    pytest.importorskip("timm")
    words = ("--network", "test_resnet", "--epochs", 2, "--batch_size", 128, "--lr", 0.01)
    _run("own_training_loop_timm", *words)
    text = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch \d/2  loss ([\d.]+)$", text, re.M)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for heading in ("ACC1", "ACC2", "ACC3", "MIS"):
        assert re.match(rf" *{heading} +[\d.]+", _line(text, heading))
    filters = re.findall(
        r"^ +(\d+) of 128 filters are drawn most often for \w+$", text, re.MULTILINE
    )
    assert len(filters) == 10  # digits
    assert sum(map(int, filters)) == 128


def test_a_folder_of_images_is_trained_on_too(tmp_path, capsys):
    pytest.importorskip("timm")
    root = _folder(tmp_path / "images", {"dark": 12, "light": 12})
    words = ("--root", root, "--network", "test_resnet", "--epochs", 1, "--image_size", 32)
    _run("own_training_loop_timm", *words)
    assert "filters are drawn most often for light" in capsys.readouterr().out


def test_mis_is_that_of_the_layer_of_a_torchvision_network(tmp_path, capsys):
    root = _folder(tmp_path / "images", {"dark": 9, "light": 9, "white": 9})
    torch.manual_seed(3)
    network = torchvision.models.resnet18(num_classes=7)  # other classes than those measured
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    words = ("--layer", "layer1", "--image_size", 32, "--batch_size", 5)
    _run("mis_of_torchvision", root, *words, "--weights", tmp_path / "weights.pth")
    text = capsys.readouterr().out

    shown = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(
        crop_size=32, resize_size=32
    )
    images = torchvision.datasets.ImageFolder(root, shown)
    pooled = []
    network.layer1.register_forward_hook(lambda *seen: pooled.append(seen[2].mean((2, 3))))
    with torch.no_grad():
        network.eval()(torch.stack([image for image, _ in images]))
    metric = MutualInformationScore(3)
    metric.update(pooled[0], torch.tensor(images.targets))

    def number(pattern):
        return float(re.search(pattern, text, re.MULTILINE)[1])

    assert "resnet18, layer layer1: 64 filters\n27 images of 3 classes\n" in text
    assert number(r"^MIS ([\d.]+) nats") == pytest.approx(metric.compute().item(), abs=6e-4)
    assert number(r"^ +([\d.]+) with labels shuffled") < number(r"^MIS ([\d.]+)") - 0.1
    third = -math.log(1 / 3) / 3 - math.log(2 / 3) * 2 / 3
    assert number(r"^ +([\d.]+) is all there is") == pytest.approx(third, abs=6e-4)
    for name, row in zip(images.classes, metric.matrix(), strict=True):
        told = float(re.match(rf" *{name}  \d+ \(([\d.]+)\)", _line(text, name))[1])
        assert told == pytest.approx(row.max().item(), abs=6e-4)


def test_a_random_network_is_measured_with_a_warning(tmp_path, capsys):
    root = _folder(tmp_path / "images", {"dark": 8, "light": 8})
    with pytest.warns(UserWarning, match="no --weights: what follows is of random filters"):
        _run("mis_of_torchvision", root, "--network", "alexnet", "--image_size", 64)
    assert "alexnet, layer features.-2: 256 filters" in capsys.readouterr().out
    root = cub_tree(tmp_path / "cub")
    with pytest.warns(UserWarning, match="no --weights: what follows is of random filters"):
        _run("parts_cub", root, "--network", "resnet18", "--image_size", 64)
    text = capsys.readouterr().out
    assert "512 filters on 8 birds of the test split" in text
    assert re.match(r" *location instab\. +0\.\d{3}", _line(text, "location instab."))
    for heading in ("… of the middle", "… at random"):
        assert re.match(rf" *{heading} +0\.\d{{3}}", _line(text, heading))
    assert _line(text, "part interpr.").endswith("n/a")
    assert "n/a: the data has no parts" in text


def test_parts_of_a_run_are_those_of_its_evaluation(tmp_path, capsys):
    root = cub_tree(tmp_path / "cub")
    options = Options(
        method="icnn",
        backbone="small-cnn",
        data={"name": "cub", "root": str(root), "image_size": 32, "validation": 0.0},
        batch_size=6,
        epochs=1,
        accelerator="cpu",
        output=str(tmp_path / "run"),
    )
    measured = train(options, progress=False)
    words = ("--run", tmp_path / "run" / "last.ckpt", "--image_size", 32)
    _run("parts_cub", root, *words, "--landmarks", *PARTS)
    line = _line(capsys.readouterr().out, "location instab.")
    assert line.split() == ["location", "instab.", f"{measured['location_instability']:.3f}"]
