import pytest

from picnn_fast.training.config import (
    ConfigError,
    TrainConfig,
    options,
    read_yaml,
    refuse_unused,
)


def _yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_gives_options(tmp_path):
    path = _yaml(tmp_path, "method: std\nlr: 1e-4\nepochs: 3\naugment: no\nnum_filters:\n")
    config = TrainConfig(**read_yaml(path))
    assert (config.method, config.lr, config.epochs) == ("std", 1e-4, 3)
    assert config.augment is False
    assert config.num_filters is None


def test_yaml_says_none_as_the_command_line_does(tmp_path):
    values = read_yaml(_yaml(tmp_path, "num_filters: none\nnum_workers: none\n"))
    assert values == {"num_filters": None, "num_workers": None}


def test_empty_yaml_is_all_defaults(tmp_path):
    assert TrainConfig(**read_yaml(_yaml(tmp_path, ""))) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown option 'epoch'; did you mean 'epochs'"),
        ("batch-size: 3", "did you mean 'batch_size'"),
        ("zzz: 3", "unknown option 'zzz'; options are output, method"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(_yaml(tmp_path, text))


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, want an integer >= 1"),
        ({"epochs": 1.5}, "epochs: got 1.5, want an integer"),
        ({"epochs": True}, "epochs: got True, want an integer"),
        ({"lr": 0.0}, "lr: got 0.0, want a number > 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"correspondence_lr": float("inf")}, "correspondence_lr: got inf"),
        ({"lr": "fast"}, "lr: got 'fast', want a number"),
        ({"method": "cnn"}, "method: got 'cnn', want one of picnn, icnn, std"),
        ({"augment": "yes"}, "augment: got 'yes', want true or false"),
        ({"num_filters": 0}, "num_filters: got 0, want an integer >= 1"),
        ({"seed": 2**32}, "seed: got 4294967296, want an integer <= 4294967295"),
        (
            {"mutual_information_weight": -1},
            "mutual_information_weight: got -1, want a number >= 0",
        ),
        ({"num_filters": "12"}, "num_filters: got '12', want an integer or none"),
    ],
)
def test_bad_values_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_bad_yaml_is_told_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_yaml(_yaml(tmp_path, "epochs: 3\nlr: ["))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "std", "template": "l1"},
            "template: got 'l1' with method std, want method icnn",
        ),
        ({"filter_loss_weight": 1.0}, "filter_loss_weight: got 1.0 with method picnn, want"),
        ({"tau": 0.1}, "tau: got 0.1 with method picnn, want method icnn"),
        ({"method": "std", "estimator": "batch"}, "estimator: got 'batch' with method std"),
        (
            {"method": "icnn", "normalization": "sigmoid"},
            "normalization: got 'sigmoid' with method icnn, want method picnn or std",
        ),
        ({"method": "icnn", "mask_at": "late"}, "mask_at: got 'late' with method icnn"),
        ({"method": "icnn", "sampling": "gumbel"}, "sampling: got 'gumbel' with method icnn"),
        ({"method": "std", "correspondence_lr": 0.1}, "correspondence_lr: got 0.1 with method std"),
        ({"method": "std", "interpretation_weight": 2.0}, "interpretation_weight: got 2.0 with"),
        ({"method": "std", "interpretation_loss_on": "all"}, "interpretation_loss_on: got 'all'"),
        ({"image_size": 8}, "image_size: got 8 with data digits"),
    ],
)
def test_options_given_that_are_never_used_are_refused(given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        refuse_unused(given)
    # One set of options may still serve several methods.
    assert TrainConfig(**given).as_dict().items() >= given.items()


@pytest.mark.parametrize("method", ["picnn", "icnn", "std"])
def test_options_of_the_method_are_taken_and_none_is_not_given(method):
    given = {
        field.name: field.default
        for field in options()
        if method in field.metadata["methods"] or not field.metadata["methods"]
    }
    refuse_unused({**given, "method": method, "tau": None})


def test_help_names_the_methods_an_option_is_for():
    for field in options():
        if field.metadata["methods"]:
            assert f"({', '.join(field.metadata['methods'])})" in field.metadata["help"]


def test_output_is_no_part_of_what_makes_a_run():
    assert TrainConfig(output="a").identity() == TrainConfig(output="b").identity()
    assert TrainConfig(seed=1).identity() != TrainConfig(seed=2).identity()
