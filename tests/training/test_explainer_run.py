"""Training runs of an Explainer: from a performer's run, and without it once they are done."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from picnn_fast.cli import main
from picnn_fast.evaluation import evaluate
from picnn_fast.models import Explainer
from picnn_fast.training.checkpoint import load_checkpoint
from picnn_fast.training.module import InterpretableModule
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run import assemble, build_data, read_history, train

DATA = {
    "name": "part-animals",
    "image_size": 32,
    "train_images": 24,
    "test_images": 12,
    "validation": 0,
}


def _options(tmp_path, **given):
    common = {"data": DATA, "batch_size": 8, "accelerator": "cpu"}
    return Options(**{**common, "output": str(tmp_path / "run"), **given})


@pytest.fixture(scope="module")
def performer(tmp_path_factory):
    """The folder of an ordinary network's run."""
    folder = tmp_path_factory.mktemp("performer")
    options = _options(folder, method="std", backbone="small-vgg", insert_conv=False, epochs=1)
    train(options, progress=False)
    return folder / "run"


def _explainer(tmp_path, performer, *, backbone="auto", **given):
    method = {"name": "explainer", "performer": str(performer), "template": {"tau": 1.0}}
    optimizer = {"name": "adam", "lr": 1e-3}
    given = {"epochs": 2, "optimizer": optimizer, **given}
    return _options(tmp_path, method=method, backbone=backbone, **given)


def test_a_run_explains_the_network_of_another_and_needs_it_no_more(performer, tmp_path, capsys):
    gone = tmp_path / "performer"
    shutil.copytree(performer, gone)
    flags = ["--method", "explainer", "--method.performer", str(gone), "--epochs", "2"]
    flags += [f"--data.{name}={value}" for name, value in DATA.items() if name != "name"]
    flags += ["--data", "part-animals", "--batch_size", "8", "--accelerator", "cpu"]
    assert main(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"Explainer over {gone}: 64 filters" in said
    assert "Δ error" in said
    shutil.rmtree(gone)
    assert main(["evaluate", str(tmp_path / "run"), "--accelerator", "cpu"]) == 0
    (figures,) = json.loads((tmp_path / "run" / "metrics.json").read_text()).values()
    network, options, names = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert type(network) is Explainer
    assert len(names) == 6
    assert evaluate(network, build_data(options), seed=0) == figures
    for name in ("p", "more_errors", "location_instability"):
        assert isinstance(figures[name], float), name
    for name in ("location_instability_performer", "location_instability_top"):
        assert 0 < figures[name] < 0.5
    assert figures["p"] != 0.5
    module = InterpretableModule.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert isinstance(module.network, Explainer)
    history = read_history(tmp_path / "run")
    terms = {"reconstruction", "interpretable", "filter_loss"}
    assert all({f"train/{term}" for term in terms} | {"method/p"} <= row.keys() for row in history)


def test_figures_that_want_a_performer_are_not_in_the_table_of_other_networks(performer, capsys):
    assert main(["evaluate", str(performer), "--accelerator", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "location instab." in said
    table = said[: said.index("└")]
    assert not any(heading in table for heading in ("performer", "top conv", "Δ error"))
    assert said.count("(n/a: no performer)") == 1
    (figures,) = json.loads((performer / "metrics.json").read_text()).values()
    assert figures["p"] == "n/a: no performer"


def test_the_performer_in_the_checkpoint_is_that_of_the_run(performer, tmp_path):
    train(_explainer(tmp_path, performer), progress=False)
    network, options, _ = load_checkpoint(tmp_path / "run" / "last.ckpt")
    own = load_checkpoint(performer / "last.ckpt")[0]
    x = torch.rand(4, 3, 32, 32)
    told = network.performer()
    torch.testing.assert_close(told.rest(told.top(told.target(x))), own(x).logits)
    assert options.backbone["name"] == "auto"
    figures, data = evaluate(network, build_data(options)), build_data(options)
    expected = evaluate(own, data)
    assert figures["location_instability_top"] == expected["location_instability"]
    assert figures["more_errors"] == pytest.approx(expected["acc1"] - figures["acc1"], abs=1e-6)
    for name in ("p", "more_errors", "location_instability_top", "location_instability_performer"):
        assert expected[name] == "n/a: no performer"


def test_a_run_that_goes_on_is_the_run_never_interrupted(performer, tmp_path):
    constant = {"schedule": "constant"}
    whole = train(_explainer(tmp_path, performer, **constant), progress=False)
    part = _explainer(tmp_path / "part", performer, **constant)
    train(dataclasses.replace(part, epochs=1), progress=False)
    assert train(part, progress=False) == whole
    networks = [load_checkpoint(p / "run" / "last.ckpt")[0] for p in (tmp_path, tmp_path / "part")]
    for a, b in zip(*(n.state_dict().values() for n in networks), strict=True):
        assert torch.equal(a, b)


def test_one_category_is_explained_by_its_images(tmp_path):
    train(
        _options(
            tmp_path / "performer",
            method="std",
            backbone="small-cnn",
            category="cat",
            epochs=1,
        ),
        progress=False,
    )
    options = _explainer(tmp_path, tmp_path / "performer" / "run", category="cat", epochs=1)
    options = dataclasses.replace(options, method={**options.method, "task": "single"})
    figures = train(options, progress=False)
    assert isinstance(figures["location_instability_top"], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": "small-cnn"},
            r"backbone: got 'small-cnn', want 'small-vgg', as of .*, or none",
        ),
        ({"data": {**DATA, "name": "digits"}}, "data: got other classes"),
        ({"category": "cat"}, r"data: got other classes \(2: other, cat|data: got other classes"),
        ({"backbone": {"name": "auto", "layer": "nowhere"}}, r"backbone\.layer: got 'nowhere'"),
        ({"insert_kernel": 1}, r"insert_kernel: method 'explainer' has no such option"),
    ],
)
def test_what_does_not_fit_the_performer_is_refused_in_a_line(performer, tmp_path, change, message):
    if change.get("data", DATA)["name"] == "digits":
        change = {"data": "digits"}
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        assemble(_explainer(tmp_path, performer, **change), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_performer_that_is_not_there_is_refused_in_a_line(tmp_path):
    for path, message in (
        (None, r"method\.performer: got null, want the folder of a run"),
        (tmp_path / "nowhere", r"method\.performer: .*nowhere holds no last\.ckpt"),
        (__file__, r"method\.performer: .* is not one of picnn-fast train"),
    ):
        options = _explainer(tmp_path, path) if path else _options(tmp_path, method="explainer")
        with pytest.raises(ConfigError, match=f"^{message}") as caught:
            assemble(options, tmp_path)
        assert "\n" not in str(caught.value)


def test_the_target_layer_can_be_chosen(performer, tmp_path):
    backbone = {"name": "auto", "layer": "features.6"}
    run = assemble(_explainer(tmp_path, performer, backbone=backbone), tmp_path)
    told = run.network.performer()
    layers = [module for module in told.top if isinstance(module, nn.Conv2d)]
    assert len(layers) == 2
