"""Options of a run: from Python, flags and YAML, with one-line refusals."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
from torch import nn

from picnn_fast.backbones import BACKBONES
from picnn_fast.data import DATA
from picnn_fast.models import METHODS, make_interpretable
from picnn_fast.training.checkpoint import build_network
from picnn_fast.training.options import GROUPS, ConfigError, Options, build_parser, parse
from picnn_fast.training.run import build_data


def _parse(*arguments):
    values = parse(arguments, prog="picnn-fast train", description="")
    del values["config"]
    return Options(**values)


def _yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_gives_options(tmp_path):
    path = _yaml(
        tmp_path,
        "method: {name: std, mask_at: late}\noptimizer: {lr: 1e-4}\nepochs: 3\n"
        "data:\n  max_shift: 0\nnum_filters:\n",
    )
    options = _parse("--config", str(path))
    assert (options.method["name"], options.method["mask_at"]) == ("std", "late")
    assert (options.optimizer["name"], options.optimizer["lr"]) == ("adamw", 1e-4)
    assert (options.epochs, options.data["max_shift"], options.num_filters) == (3, 0, None)


def test_a_name_alone_stands_for_a_group(tmp_path):
    path = _yaml(tmp_path, "method: icnn\nbackbone: small-cnn\n")
    from_file, from_flags = (
        _parse("--config", str(path)),
        _parse("--method", "icnn", "--backbone=small-cnn"),
    )
    assert from_file == from_flags == Options(method="icnn", backbone={"name": "small-cnn"})


def test_flags_go_over_files_wherever_they_stand(tmp_path):
    path = _yaml(tmp_path, "method: {name: picnn, sampling: gumbel}\nepochs: 3\nseed: 5\n")
    options = _parse("--epochs", "4", "--config", str(path), "--method.initial", "published")
    assert (options.epochs, options.seed) == (4, 5)
    assert (options.method["sampling"], options.method["initial"]) == ("gumbel", "published")


def test_a_flag_that_names_another_method_leaves_out_what_the_file_says_of_one(tmp_path):
    path = _yaml(tmp_path, "method: {name: picnn, sampling: gumbel}\nepochs: 3\n")
    assert _parse("--config", str(path), "--method", "std") == Options(method="std", epochs=3)


def test_a_later_file_goes_over_an_earlier_one(tmp_path):
    first = _yaml(tmp_path, "epochs: 3\nseed: 5\n")
    second = tmp_path / "second.yaml"
    second.write_text("epochs: 4\n")
    options = _parse("--config", str(first), f"--config={second}")
    assert (options.epochs, options.seed) == (4, 5)


def test_empty_yaml_is_all_defaults(tmp_path):
    assert _parse("--config", str(_yaml(tmp_path, ""))) == _parse() == Options()


def test_the_record_of_a_run_is_taken_as_a_file(tmp_path):
    options = Options(method={"name": "icnn", "template": {"norm": "l2"}}, epochs=2)
    record = {"program": "picnn_fast", "kind": "train", "config": options.identity()}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record))
    assert _parse("--config", str(path)) == options


@pytest.mark.parametrize("config", [{"method": "picnn", "epochs": 2}, {"lr": 0.1, "seed": 3}])
def test_the_record_of_an_earlier_version_is_said_to_be_one(tmp_path, config):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"program": "picnn_fast", "kind": "train", "config": config}))
    with pytest.raises(ConfigError, match=r"^config: .*run.json was made by an earlier picnn_fast"):
        _parse("--config", str(path))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"name": "digits"}, "small-resnet"),
        ({"name": "folder", "root": "birds", "image_size": 64}, "small-resnet"),
        ({"name": "folder", "root": "birds", "image_size": 65}, "resnet18"),
        ({"name": "folder", "root": "birds"}, "resnet18"),
        ({"name": "part-animals", "image_size": 32}, "small-resnet"),
        ({"name": "part-animals"}, "resnet18"),
        ({"name": "cub", "root": "birds"}, "resnet18"),
    ],
)
def test_a_backbone_that_is_not_named_goes_by_the_size_of_the_images(data, name, tmp_path):
    options = Options(data=data)
    assert options.backbone == Options(data=data, backbone=name).backbone
    assert Options(data=data, backbone="small-cnn").backbone["name"] == "small-cnn"
    flags = [f"--data.{key}={value}" for key, value in data.items()]
    path = _yaml(tmp_path, json.dumps({"data": data}))
    assert _parse(*flags) == _parse("--config", str(path)) == options
    cut = _parse(*flags, "--backbone.layer", "features.0").backbone
    assert (cut["name"], cut["layer"]) == (name, "features.0")


def test_what_the_backbone_became_is_recorded_and_stays():
    options = Options(data={"name": "folder", "root": "birds", "image_size": 32})
    for record in (options.identity(), options.as_dict()):
        assert record["backbone"]["name"] == "small-resnet"
        record["data"]["image_size"] = 224
        assert Options(**record).backbone["name"] == "small-resnet"


def test_hyphens_are_taken_for_underscores():
    assert _parse("--num-filters", "7", "--batch-size=3") == Options(num_filters=7, batch_size=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"config .*run.yaml: epoch: there is no such option; did you mean 'epochs'"),
        ("batch-size: 3", "batch-size: there is no such option; did you mean 'batch_size'"),
        ("zzz: 3", "zzz: there is no such option; --help lists all there are"),
        ("sampling: gumbel", "sampling: there is no such option; did you mean 'method.sampling'"),
        ("method: {samplng: gumbel}", "did you mean 'method.sampling'"),
        ("method: {name: std, template: {norm: l1}}", "method std has no such option, want .*icnn"),
        ("method: 3", "method: got 3, want a name, or a mapping"),
        ("method: picn", "method: got 'picn', want one of std, .*; did you mean 'picnn'"),
        ("epochs: many", "epochs: got 'many', want an integer"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _parse("--config", str(_yaml(tmp_path, text)))
    assert "\n" not in str(caught.value)


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read '.*none\.yaml': No such file"):
        _parse("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epocs 3", "epocs: there is no such option; did you mean 'epochs'"),
        ("--method picn", "method: got 'picn', want one of .*; did you mean 'picnn'"),
        ("--method.sampling gumble", "got 'gumble', want one of bernoulli, gumbel; did you mean"),
        ("--method std --method.sampling gumbel", "method std has no such option, want .*picnn"),
        ("--method.template.norm l1", "method picnn has no such option, want method icnn"),
        ("--optimizer.momentum 0.9", "optimizer adamw has no such option, want optimizer sgd"),
        ("--data.image_size 8", "data digits has no such option, want data folder or"),
        ("--data folder", "data.root: got nothing, want text"),
        ("--epochs x", "epochs: got 'x', want an integer"),
        ("--num_filters 2.5", "num_filters: got '2.5', want an integer or null"),
        ("--optimizer.lr fast", "optimizer.lr: got 'fast', want a number"),
        ("--epochs", "epochs: got nothing, want an integer"),
        ("--method.sampling", "method.sampling: got nothing, want one of bernoulli, gumbel"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _parse(*flags.split())
    assert "\n" not in str(caught.value)


ICNN = "--method icnn --method.template"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{ICNN}.norm l3", "method.template.norm: got 'l3', want one of l1, l2"),
        (f"{ICNN}.profile cone", "method.template.profile: got 'cone', want one of gradient, unif"),
        (f"{ICNN}.beta x", "method.template.beta: got 'x', want a number or published or null"),
        (f"{ICNN}.tau -1", "method.template.tau: got -1.0, want a number > 0"),
        (f"{ICNN}.gamma 1", "method.template.gamma: got 1.0, want None: it is an option of 'unif"),
        (f"{ICNN} l1", "method.template: got 'l1', want a mapping of norm, profile, .* or null"),
        (
            f"{ICNN}.beta published {ICNN}.profile uniform",
            "method.template.beta: got 'published' w",
        ),
        (f"{ICNN}.nrm l2", "method.template.nrm: there is no .* mean 'method.template.norm'"),
        (f'{ICNN}={{"nrm":"l2"}}', "method.template.nrm: there is no such option; did you mean"),
        (f'{ICNN}={{"norm":"l3"}}', "method.template.norm: got 'l3', want one of l1, l2"),
        (
            "--optimizer.lr.x 3",
            "optimizer.lr.x: there is no such option; did you mean 'optimizer.lr",
        ),
        ("--method.sampling.x 3", "method.sampling.x: there is no such option; did you mean"),
        ("--epochs.x 3", "epochs.x: there is no such option; did you mean 'epochs'"),
        ("--num-filters.x=3", "num_filters.x: there is no such option; did you mean 'num_filters'"),
    ],
)
def test_options_within_an_option_are_refused_by_their_whole_names(flags, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        _parse(*flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "whole"),
    [
        ("lr", "optimizer.lr"),
        ("sampling", "method.sampling"),
        ("max_shift", "data.max_shift"),
        ("image-size", "data.image_size"),  # of other data than the digits
        ("momentum", "method.momentum' or 'optimizer.momentum"),
        ("template.norm", "method.template.norm"),
        ("norm", "method.template.norm"),
        ("weights", "backbone.weights"),
    ],
)
def test_the_last_part_of_an_option_is_told_as_its_whole_name(tmp_path, option, whole):
    message = f"{option.replace('-', '_')}: there is no such option; did you mean '{whole}'"
    with pytest.raises(ConfigError, match=f"^{message}"):
        _parse(f"--{option}", "3")


@pytest.mark.parametrize(
    ("flags", "near"),
    [
        ("--method PICNN", "picnn"),
        ("--method.name Std", "std"),
        ("--backbone ResNet18", "resnet18"),
        ("--data CUB", "cub"),
        ("--optimizer AdamW", "adamw"),
        ("--accelerator CPU", "cpu"),
        ("--method.sampling GUMBEL", "gumbel"),
        ("--Epochs 3", "epochs"),
    ],
)
def test_the_nearest_match_is_found_in_any_case(flags, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        _parse(*flags.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"color_jitter": [0.4, 0.4]}, r"got '\[0.4, 0.4\]', want \[a number, .*\] or null"),
        ({"mean": 3}, r"got '3', want \[a number, a number, a number\]"),
        ({"resize": "big"}, "got 'big', want an integer or null"),
    ],
)
def test_what_an_option_wants_is_said_in_words(given, message):
    (name,) = given
    with pytest.raises(ConfigError, match=f"^data.{name}: {message}$"):
        Options(data={"name": "folder", "root": "x", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": {"name": ["picnn"]}}, r"method: got \['picnn'\], want one of"),
        (
            {"method": {"name": "icnn", "template": {"tau": 0}}},
            "method.template.tau: got 0.0, want",
        ),
        ({"epochs": 0}, "epochs: got 0, want an integer >= 1"),
        ({"epochs": 1.5}, "epochs: got '1.5', want an integer"),
        ({"epochs": True}, "epochs: got 'True', want an integer"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr: got 0.0, want a number > 0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: got nan"),
        ({"method": "cnn"}, "method: got 'cnn', want one of std, picnn, csg, icnn"),
        ({"insert_conv": 3}, "insert_conv: got '3', want true or false"),
        ({"num_filters": 0}, "num_filters: got 0, want an integer >= 1"),
        ({"seed": 2**32}, "seed: got 4294967296, want an integer >= 0 and <= 4294967295"),
        ({"schedule_floor": 1.5}, "schedule_floor: got 1.5, want a number >= 0.0 and <= 1"),
        ({"schedule_factor": 0.0}, "schedule_factor: got 0.0, want a number > 0 and <= 1"),
        ({"schedule_steps": [9, 3]}, "schedule_steps: got \\[9, 3\\], want numbers of epochs >= 1"),
        ({"schedule_steps": "9, 3"}, "schedule_steps: got '9, 3', want \\[an integer, …\\]"),
        ({"mutual_information_weight": -1.0}, "mutual_information_weight: got -1.0, want a number"),
        (
            {"method": {"name": "std", "interpretation_weight": 1.0}},
            "method.interpretation_weight: method std has no",
        ),
    ],
)
def test_bad_values_are_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        Options(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [name for name in METHODS if "insert_kernel" in inspect.signature(METHODS[name]).parameters],
)
def test_the_convolution_inserted_is_as_the_options_say(method):
    kernels = {}
    for kernel in (1, 3):
        network = build_network(Options(method=method, insert_kernel=kernel), 3, 1)
        kernels[kernel] = [m.kernel_size for m in network.features if isinstance(m, nn.Conv2d)]
    assert kernels == {1: [(1, 1)], 3: [(3, 3)]}
    assert Options().insert_kernel == 3
    for options, message in (
        ({"insert_kernel": 2}, r"^insert_kernel: got 2, want 1 or 3$"),
        ({"insert_kernel": 1, "insert_conv": False}, r"^insert_kernel: got 1, want 3: no convol"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_network(Options(method=method, **options), 3, 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_options_of_a_method_are_its_keyword_only_signature(method):
    parameters = inspect.signature(METHODS[method]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in ("in_channels", "insert_kernel", "channel_dim"):  # of the network that a run builds
        keywords.pop(name, None)
    assert {**keywords, "name": method} == Options(method=method).method


def test_options_that_are_replaced_are_checked_again():
    options = Options(method={"name": "picnn", "sampling": "gumbel"})
    assert dataclasses.replace(options, method="std").method["name"] == "std"
    with pytest.raises(ConfigError, match=r"^method\.sampling: got 'none'"):
        dataclasses.replace(options, method={**options.method, "sampling": "none"})


def test_arguments_are_what_the_signature_takes():
    options = Options(method={"name": "icnn", "template": {"norm": "l2", "tau": 0.1}})
    template = options.arguments("method")["template"]
    assert (template.norm, template.profile, template.tau) == ("l2", "gradient", 0.1)
    assert "name" not in options.arguments("method")


def test_options_survive_a_file():
    options = Options(method="icnn", optimizer="adam", epochs=4)
    assert Options(**json.loads(json.dumps(options.as_dict()))) == options


@pytest.mark.parametrize("given", ["images", "images/", "./images", "x/../images", "~/images"])
@pytest.mark.parametrize("data", ["folder", "voc-part", "cub", "animal-part"])
def test_folders_are_kept_by_their_whole_path(monkeypatch, tmp_path, given, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = Options(data={"name": data, "root": given})
    assert options == Options(data={"name": data, "root": str(tmp_path / "images")})
    if data == "animal-part":
        assert options.data["parts"] is None
        parts = Options(data={"name": data, "root": "x", "parts": given}).data["parts"]
        assert parts == options.data["root"]
    monkeypatch.chdir("/")
    assert dataclasses.replace(options).data["root"] == str(tmp_path / "images")


def test_output_is_no_part_of_what_makes_a_run():
    assert Options(output="a").identity() == Options(output="b").identity()
    assert Options(seed=1).identity() != Options(seed=2).identity()


@pytest.mark.parametrize("key", GROUPS)
def test_every_row_of_every_group_can_be_told_its_options(key, capsys):
    for name in GROUPS[key].rows:
        with pytest.raises(SystemExit) as stop:
            _parse(f"--{key}.help", name)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        for option in GROUPS[key].options(name):
            assert f"--{key}.{option}" in out


@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for key in GROUPS for name in GROUPS[key].rows]
)
def test_every_option_of_every_row_has_a_help_that_stands_by_itself(key, name):
    parser = build_parser({key: name}, groups=[key], common=False)
    helps = {a.dest: a.help for a in parser._actions if not a.dest.endswith("help")}
    for option in GROUPS[key].options(name):
        text = helps[f"{key}.{option}"]
        assert text, option
        assert len(text.split()) > 1, text
        # What only a reader of the code could follow.
        assert not re.search(r"``|\b[Ss]ee\b|of (that layer|their choice)", text), text


def test_every_option_of_a_run_has_a_help():
    parser = build_parser({key: next(iter(GROUPS[key].rows)) for key in GROUPS})
    assert [action.dest for action in parser._actions if not action.help] == []


def test_printed_configuration_is_read_back(capsys, tmp_path):
    flags = ("--method", "icnn", "--method.template.norm", "l2", "--epochs", "3")
    with pytest.raises(SystemExit):
        _parse(*flags, "--print_config")
    path = _yaml(tmp_path, capsys.readouterr().out)
    assert _parse("--config", str(path)) == _parse(*flags)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")))
def test_every_recipe_is_taken_with_a_folder(path):
    options = _parse("--config", str(path), "--data.root", "images")
    assert options.data["root"] == str(Path("images").absolute())
    assert path.stem in options.output


def test_a_file_of_weights_is_noted_by_its_whole_path_and_a_name_as_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, noted in (
        ("trained.pth", str(tmp_path / "trained.pth")),
        ("~/trained.pt", "/home/somebody/trained.pt"),
        ("IMAGENET1K_V1", "IMAGENET1K_V1"),
    ):
        options = _parse("--backbone", "resnet18", "--backbone.weights", given)
        assert options.backbone["weights"] == noted
    assert _parse().backbone["weights"] is None


def test_any_network_of_timm_is_taken_by_its_name(capsys):
    options = _parse("--backbone", "timm:convnext_tiny", "--backbone.weights", "DEFAULT")
    assert options.backbone["name"] == "timm:convnext_tiny"
    assert Options(**options.as_dict()) == options
    with pytest.raises(SystemExit):
        _parse("--backbone.help", "timm:convnext_tiny")
    assert "--backbone.weights" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"^backbone: got 'tim:x', want one of auto, .*, or timm:"
    ):
        _parse("--backbone", "tim:x")
    with pytest.raises(ConfigError, match=r"^backbone\.stem: got 'cifr', want one of default, cif"):
        _parse("--backbone.stem", "cifr")


def test_the_published_recipe_is_what_the_authors_code_does():
    folder = Path(__file__).parents[2] / "configs"
    options = _parse("--config", str(folder / "picnn-cifar10-published.yaml"), "--data.root=x")
    assert (options.method["initial"], options.method["inserted_activation"]) == (
        "published",
        "none",
    )
    # The matrix follows the network's rate and decay.
    assert options.method["correspondence_lr"] is None
    assert options.method["correspondence_weight_decay"] is None
    assert options.arguments("data")["color_jitter"] == (0.4, 0.4, 0.4, 0.1)
    assert (options.optimizer["name"], options.optimizer["weight_decay"]) == ("adam", 1e-4)


def test_the_published_recipe_of_iccnn_is_what_the_authors_code_does():
    folder = Path(__file__).parents[2] / "configs"
    words = ("--data.root=x", "--backbone.weights", "trained.pth")
    options = _parse("--config", str(folder / "iccnn-voc-part-published.yaml"), *words)
    assert options.backbone["weights"] == str(Path("trained.pth").absolute())
    assert (options.data["image_size"], options.data["augment"]) == (224, False)
    assert (options.optimizer["name"], options.optimizer["lr"]) == ("adam", 1e-5)
    assert options.optimizer["weight_decay"] == 0.0
    # Of 3001 epochs 100 only group; a fall after every 125 that train.
    assert (options.epochs, options.batch_size) == (3001 - 100, 16)
    assert options.schedule_steps == list(range(125, options.epochs, 125))
    assert (options.schedule, options.schedule_factor) == ("step", 0.6)
    network = make_interpretable(
        options.backbone["name"],
        "iccnn",
        num_classes=6,
        layer=options.backbone["layer"],
        insert_conv=options.insert_conv,
        **options.arguments("method"),
    )
    assert network.num_filters == 256
    assert network.groups.bincount().tolist() == [16] * 16
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert {convolution.padding_mode for convolution in convolutions} == {"replicate"}
    assert (network.correlation_weight, network.class_weight) == (0.1, 0.1)
    assert network.regroup_epochs == 100


def test_the_published_recipe_of_csg_is_what_the_authors_code_does():
    folder = Path(__file__).parents[2] / "configs"
    options = _parse("--config", str(folder / "csg-voc-part-published.yaml"), "--data.root=x")
    backbone, data = options.backbone, options.data
    assert (backbone["name"], options.insert_conv, options.epochs) == ("resnet152", False, 151)
    assert (data["image_size"], data["crop"], data["split"], data["max_shift"]) == (
        128,
        "square",
        "70/30",
        16,
    )
    assert (options.optimizer["name"], options.optimizer["weight_decay"]) == ("adam", 0.0)
    assert (options.schedule, options.schedule_steps) == ("step", [60, 90, 120])
    # Layers have the same names in a smaller network of the family.
    network = make_interpretable(
        "resnet18", "csg", num_classes=6, insert_conv=False, **options.arguments("method")
    )
    assert network.bound == pytest.approx(0.2 * 6 * 512)
    groups = network.optimizers(options.optimizer["lr"])
    rates = {group["name"]: group["lr"] for path in groups.values() for group in path}
    assert rates == {"std": 1e-5, "csg": 1e-3, "gate": 1e-3}
    learnt = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.rpartition(".layer")[2][0] for name in learnt if "layer" in name} == {"3", "4"}
    turns = [network.optimizer_of(epoch, 151) for epoch in range(1, 152)]
    assert (turns.count("csg"), turns[-1]) == (47, "std")


def test_a_method_added_to_the_registry_is_taken_as_it_is(monkeypatch, capsys):
    class Groups(METHODS["std"]):
        """Filters in groups."""

        def __init__(
            self, features, head, num_classes, num_filters, *, in_channels=None, weight=1.0
        ):
            super().__init__(features, head, num_classes, num_filters, in_channels=in_channels)

    monkeypatch.setitem(METHODS, "groups", Groups)
    options = _parse("--method", "groups", "--method.weight", "0.5")
    assert options.method == {"name": "groups", "weight": 0.5}
    with pytest.raises(SystemExit):
        _parse("--method.help", "groups")
    assert "--method.weight" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^method\.weight: method picnn has no .*want method gr"):
        _parse("--method.weight", "0.5")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": {"layer": "layr4"}}, r"backbone\.layer: got 'layr4', did you mean 'layer4'"),
        ({"backbone": {"weights": "NONE"}}, r"backbone\.weights: got 'NONE', want one of 'IMAGE"),
        (
            {"backbone": {"weights": "default"}},
            r"backbone\.weights: got 'default', did you mean 'DEFAULT'\? want one of",
        ),
        (
            {"backbone": {"name": "small-resnet", "weights": "DEFAULT"}},
            r"backbone\.weights: got 'DEFAULT', want None: 'small-resnet' has no trained weights",
        ),
        (
            {"method": {"name": "icnn", "task": "single"}},
            r"method\.task: got 'single' with 7 classes, want --category NAME",
        ),
        ({"method": {"name": "icnn", "mask_scale": -1}}, r"method\.mask_scale: got -1\.0, want"),
        ({"method": {"name": "icnn", "momentum": -1}}, r"method\.momentum: got -1\.0, want"),
    ],
)
def test_what_the_network_refuses_is_told_by_the_option_of_the_run(given, message):
    backbone = {"name": "resnet18"} | given.get("backbone", {})
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        build_network(Options(**given | {"backbone": backbone}), 7, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_trained_weights_on_images_that_are_not_of_colour_ask_for_other_data(channels):
    options = Options(backbone={"name": "resnet18", "weights": "DEFAULT"})
    message = rf"^backbone\.weights: got 'DEFAULT' with images of {channels} .* null, or data of"
    with pytest.raises(ConfigError, match=message):
        build_network(options, 10, channels)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("part-animals", {"train_images": 0}, "train_images: got 0, want an int >= 1"),
        ("part-animals", {"test_images": -1}, "test_images: got -1, want an int >= 1"),
        ("voc-part", {"split_seed": -1}, "split_seed: got -1, want an int >= 0"),
        ("animal-part", {"split_seed": -1}, "split_seed: got -1, want an int >= 0"),
        ("voc-part", {"categories": ["catt"]}, "categories: got 'catt', .*; did you mean 'cat'"),
    ],
)
def test_what_data_refuses_is_told_by_the_option_of_the_run(tmp_path, data, options, message):
    root = {} if data == "part-animals" else {"root": str(tmp_path)}
    with pytest.raises(ConfigError, match=rf"^data\.{message}"):
        build_data(Options(data={"name": data, **root, **options}))


def test_a_folder_is_noted_by_its_whole_path_and_a_url_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, noted in (("shards", str(tmp_path / "shards")), ("https://a/b", "https://a/b")):
        data = {"name": "shards", "root": root, "index": "index.npz"}
        options = Options(data=data)
        assert options.data["root"] == noted
        assert options.data["index"] == str(tmp_path / "index.npz")
        assert options.data["keep"] is None
        # Where they are kept, and how they are read, makes no other data.
        other = Options(data={**data, "index": None, "keep": "kept", "cache": 0.5})
        assert other.data_identity() == options.data_identity()


def test_rows_that_change_under_their_names_are_read_as_they_are_now(monkeypatch):
    def digits(batch_size=64, *, seed=0, shade: int = 3):
        """Digits of another kind.

        Args:
            shade: of the ink.
        """

    assert "shade" not in Options(data="digits").data
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "digits", digits)
        assert Options(data="digits").data == {"name": "digits", "shade": 3}
    assert "shade" not in Options(data="digits").data
    with pytest.raises(ConfigError, match="backbone: got 'mine'"):
        Options(backbone="mine")
    monkeypatch.setitem(BACKBONES, "mine", BACKBONES["small-cnn"])
    assert Options(backbone="mine").backbone["name"] == "mine"
