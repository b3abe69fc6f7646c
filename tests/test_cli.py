import csv
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

import picnn_fast
from picnn_fast import cli
from picnn_fast._version import __version__
from picnn_fast.data import DATA
from picnn_fast.evaluation import FIGURES, TOPICS, default_figures
from picnn_fast.training.options import Options
from tests.processes import as_module, ended, finished, start


def _main(capsys, *arguments):
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


COMMANDS = [
    "demo",
    "train",
    "compare",
    "evaluate",
    "figures",
    "report",
    "explain",
    "convert",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers(capsys, command):
    status, out, _ = _main(capsys, command, "--help")
    assert status == 0
    assert out.startswith(f"usage: picnn-fast {command}")


def test_help_tells_every_option_of_train_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    _, out, _ = _main(capsys, "train", "--help")
    out = " ".join(out.split())
    for field in dataclasses.fields(Options):
        name = field.name if isinstance(getattr(Options(), field.name), dict) is False else None
        flag = f"--{name}" if name else f"--{field.name}.name"
        assert f"{flag} " in out
    for option in ("--method.sampling", "--backbone.weights", "--data.max_shift", "--optimizer.lr"):
        assert f"{option} " in out
    assert "passes over the training images. (type: int, default: 30)" in out


def _written(monkeypatch, encoding, function, *arguments):
    """What a function prints on a terminal of that encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        status = function(*arguments)
    except SystemExit as stop:
        status = stop.code
    return status, stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch, encoding):
    monkeypatch.setitem(
        cli._COMMANDS, "doctor", (lambda arguments: print("é → Δ") or 0, "what ² is")
    )
    assert _written(monkeypatch, encoding, cli.main, ["doctor"]) == (
        0,
        "é → Δ\n".encode(encoding, "backslashreplace").decode(encoding),
    )
    status, out = _written(monkeypatch, encoding, cli.main, ["--help"])
    assert (status, "what ² is" in out or r"what \xb2 is" in out) == (0, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_on_an_ascii_terminal(monkeypatch, command):
    status, out = _written(monkeypatch, "ascii", cli.main, [command, "--help"])
    assert (status, out.startswith(f"usage: picnn-fast {command}")) == (0, True)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_table_holds_every_name_and_number_on_any_terminal(monkeypatch, encoding):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["tau[low]", "x[/y]", "[bold]", ":smile:", "[", "a\\"]
    figures = {
        name: dict.fromkeys(FIGURES, row + 0.125) | {"acc2": f"n/a: [/{row}] is gone"}
        for row, name in enumerate(names)
    }

    def table():
        cli._prepare_streams()
        cli.tables.print_table({k: [v] for k, v in figures.items()}, "Test split of [/x] [red]")

    _, out = _written(monkeypatch, encoding, table)
    assert "Test split of [/x] [red]" in out
    heads = [line for line in out.splitlines() if "[bold]" in line]
    assert len(heads) == 1
    for row, name in enumerate(names):
        assert f" {name} " in out
        assert out.count(f" {row}.125 ") == len(FIGURES) - 1
        assert f"[/{row}] is gone" in " ".join(out.split())


@pytest.mark.parametrize(("columns", "runs"), [(40, 2), (60, 3), (80, 7), (200, 5)])
def test_no_line_of_a_table_is_wider_than_the_terminal_and_nothing_is_cut(
    capsys, monkeypatch, columns, runs
):
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = {
        f"runs/of-a-name-that-is-rather-long-{run}": {
            "acc1": run + 0.125,
            "acc1_interval": [run + 0.0625, run + 0.1875],
            "acc2": run + 0.25,
            "acc2_standard_error": 0.03125,
            "acc2_interval": [run + 0.2, run + 0.3],
        }
        for run in range(runs)
    }
    cli.tables.print_table({k: [v] for k, v in figures.items()}, "Test split")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    for run in range(runs):
        for text in (
            f"{run}.125",
            f"[{run + 0.0625:.3f}, {run + 0.1875:.3f}]",
            f"{run}.250 ± 0.031",
            f"[{run}.200, {run}.300]",
        ):
            assert out.count(f" {text} ") == 1
    words = " ".join(out.split())
    for name in ("acc1", "acc2"):
        assert FIGURES[name].reading in words
    assert "not here" not in words
    assert "not of all" not in words


def test_topics_are_set_apart_and_readings_of_many_figures_are_a_command_away(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    figures = dict.fromkeys(default_figures(), 0.125) | {"density": "n/a: no gate"}
    others = figures | {"density": 0.5, "p": "n/a: none", "activmap_ap30": "n/a: none"}
    cli.tables.print_table({"a": [figures | {"p": "n/a: none"}], "b": [others]}, "Test split")
    out = capsys.readouterr().out
    table, words = out.partition("└")[0], " ".join(out.split())
    shown = [topic for topic, of in TOPICS.items() if {*of} & {*figures} - {"p"}]
    assert table.count("├") == len(shown) - 1
    assert len(out.splitlines()) < len(figures) + 2 * len(TOPICS)
    assert "picnn-fast figures what each of them says" in words
    assert "not here: p (n/a: none)" in words
    assert "not of all: L1-density (n/a: no gate)" in words
    assert "not of all: ActivMap AP30 (n/a: none)" in words


def test_what_lies_just_below_nothing_is_nothing(capsys):
    cli.tables.print_table({"a": [{"s_tp": -0.0001, "s_fn": -0.0}]}, "Test split")
    assert "-0.000" not in capsys.readouterr().out


def test_figures_are_listed_with_their_names_and_readings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    status, out, _ = _main(capsys, "figures")
    words = " ".join(out.split())
    for topic, figures in TOPICS.items():
        assert f"\n{topic}\n" in f"\n{out}"
        for name, figure in figures.items():
            assert f"\n  {name}   " in out
            assert f"{figure.said}. {figure.reading}" in words
    assert out.count("where it is named alone") == len(FIGURES) - len(default_figures())
    assert (status, max(map(len, out.splitlines())) <= 70) == (0, True)
    status, out, _ = _main(capsys, "figures", "mis", "acc1")
    assert (status, " ".join(out.split()).count("Higher is better")) == (0, 2)
    status, _, err = _main(capsys, "figures", "mss")
    assert status == 2
    assert "figures: got 'mss', did you mean 'mis'? want all, or names that" in err
    _, _, err = _main(capsys, "figures", "ece")  # the heading of its row in a table
    assert "figures: got 'ece', did you mean 'calibration_error'? want" in err


def test_differences_are_shown_with_their_sign(capsys):
    apart = {"acc1": 0.25, "acc1_interval": [-0.05, 0.55], "acc3": -0.5, "acc2": "n/a: none"}
    cli.tables.print_table({"b − a": [apart]}, "Differences", notes=False)
    lines = capsys.readouterr().out.splitlines()
    assert any("ACC1 ↑ " in line and "+0.250 [-0.050, +0.550] " in line for line in lines)
    assert any("ACC3 ↓ " in line and " -0.500 " in line for line in lines)
    assert not any("accuracy" in line for line in lines)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["doctor"]])
def test_a_reader_that_stops_reading_ends_the_command_without_a_word(monkeypatch, capfd, arguments):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(arguments) == 141
    assert capfd.readouterr().err == ""


def test_output_that_was_closed_is_no_matter(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert not sys.stdout.isatty()
    sys.stdout.close()


def test_help_of_a_method_tells_its_options_alone(capsys):
    status, out, _ = _main(capsys, "train", "--method.help", "icnn")
    assert (status, "--method.filter_loss_weight" in out, "--epochs" in out) == (0, True, False)


def test_no_command_and_unknown_command_are_refused(capsys):
    assert _main(capsys)[0] == 2
    status, _, err = _main(capsys, "trian")
    assert status == 2
    assert "invalid choice: 'trian'" in err


def test_version(capsys):
    assert _main(capsys, "--version")[1].strip() == f"picnn-fast {__version__}"


def _script(tmp_path, code, *arguments):
    """Code in a file of the name that the command has, run by itself."""
    path = tmp_path / "picnn-fast"
    path.write_text(code)
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_of_the_command_do_not_wait_for_torch(tmp_path, flag):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print({'torch', 'numpy'} & {*sys.modules}))\n"
        "from picnn_fast.cli import main\n"
        "main()\n"
    )
    done = _script(tmp_path, code, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nset()\n")
    assert ("--version" in done.stdout, __version__ in done.stdout) == (
        flag == "--help",
        flag == "--version",
    )


def test_doctor_tells_versions_backends_and_reasons(capsys):
    status, out, _ = _main(capsys, "doctor")
    assert status == 0
    assert torch.__version__.split("+")[0] in out
    for word in ("python", "lightning", "bernoulli_mask", "cpu: ", "reference   available"):
        assert word in out
    if not torch.cuda.is_available():
        assert "cuda        missing: " in out


def test_doctor_lists_every_package_of_train_and_report(capsys):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    listed = {line.split(" ")[0] for line in _main(capsys, "doctor")[1].splitlines()}
    assert {Requirement(text).name for text in extras["train"] + extras["report"]} < listed


def test_doctor_and_help_need_torch_and_numpy_alone(tmp_path):
    code = (
        "import sys\n"
        "for name in ('torchvision', 'lightning', 'torchmetrics', 'sklearn', 'yaml', 'rich',"
        " 'jsonargparse', 'matplotlib', 'captum'): sys.modules[name] = None\n"
        "from picnn_fast.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "assert main(['demo']) == 1\n"
    )
    done = _script(tmp_path, code)
    assert done.returncode == 0, done.stderr
    operators = done.stdout.partition("\noperators\n")[2].splitlines()
    assert {line.split()[0] for line in operators} == {*picnn_fast.build_info()["operators"]}
    assert "is not installed" in done.stderr
    assert "pip install 'picnn_fast[" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", [("-m", "picnn_fast"), ("-mpicnn_fast",)])
def test_module_is_the_command_and_does_not_wait_for_torch_either(module):
    command = [sys.executable, "-X", "importtime", *module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"picnn-fast {__version__}"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "picnn_fast.cli" in imported
    assert not {"torch", "numpy"} & imported


@pytest.mark.parametrize("module", [("-m", "own"), ("own.py",)])
def test_a_module_of_a_users_own_has_the_whole_package(tmp_path, module):
    (tmp_path / "own.py").write_text("import picnn_fast; print('PICNN' in vars(picnn_fast))")
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *module],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"


def test_what_the_command_runs_has_the_whole_package_when_it_asks(tmp_path):
    names = ", ".join(picnn_fast.__all__)
    code = (
        f"from picnn_fast import {names}\n"
        "import picnn_fast\n"
        "assert picnn_fast.losses is losses and picnn_fast.PICNN is PICNN\n"
        "assert not hasattr(picnn_fast, 'no_such_name')\n"
        "print(PICNN.__name__, functional.__name__)\n"
    )
    done = _script(tmp_path, code)
    assert (done.stderr, done.stdout) == ("", "PICNN picnn_fast.functional\n")


def test_flags_override_yaml(capsys, monkeypatch, tmp_path):
    seen = []
    from picnn_fast.training import run

    def train(config, *, overwrite):
        seen.append((config, overwrite))
        return dict.fromkeys(FIGURES, 0.5)

    monkeypatch.setattr(run, "train", train)
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 7\nmethod: std\ndata: {max_shift: 0}\n")
    arguments = ("--config", path, "--epochs", 3, "--num-filters", "null", "--overwrite")
    status, _, _ = _main(capsys, "train", *arguments, "--output", tmp_path / "none")
    assert status == 0
    expected = Options(epochs=3, method="std", data={"max_shift": 0}, output=str(tmp_path / "none"))
    assert seen == [(expected, True)]


@pytest.mark.parametrize("size", [64, 128])
def test_the_backbone_is_told_where_none_was_named(capsys, monkeypatch, tmp_path, size):
    from picnn_fast.training import run

    monkeypatch.setattr(run, "fit", lambda *arguments, **options: dict.fromkeys(FIGURES, 0.5))
    arguments = ("train", "--data", "part-animals", "--data.image_size", size)
    arguments += ("--data.train_images", 12, "--data.test_images", 12, "--accelerator", "cpu")
    status, out, err = _main(capsys, *arguments, "--output", tmp_path / "one")
    name = {64: "small-resnet", 128: "resnet18"}[size]
    assert (status, f"backbone: {name}, by the size of the images" in out) == (0, True), err
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["config"]["backbone"]["name"] == name
    named = (*arguments, "--backbone", name, "--output", tmp_path / "one")
    status, out, _ = _main(capsys, *named)
    assert (status, "complete already" in out, "backbone:" in out) == (0, True, False)
    status, out, _ = _main(capsys, *named, "--overwrite")
    assert (status, "complete already" in out, "backbone:" in out) == (0, False, False)


def test_bad_values_are_refused_by_name(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epoch: 7\n")
    status, _, err = _main(capsys, "train", "--config", path)
    assert (status, "did you mean 'epochs'" in err) == (2, True)
    status, _, err = _main(capsys, "train", "--epochs", "0")
    assert (status, "epochs: got 0, want an integer >= 1" in err) == (2, True)
    status, _, err = _main(capsys, "train", "--optimizer.lr", "fast")
    assert (status, "got 'fast', want a number" in err) == (2, True)
    for value in ("none", "0"):
        # The folder is taken, which would be told next.
        status, _, err = _main(capsys, "demo", "--epochs", value, "--output", tmp_path)
        assert (status, f"epochs: got {value!r}" in err or "epochs: got 0" in err) == (2, True)
    status, _, err = _main(capsys, "demo", "--epocs", "3")
    assert (status, "did you mean 'epochs'" in err) == (2, True)
    status, _, err = _main(capsys, "evaluate", tmp_path)
    assert (status, "holds no last.ckpt" in err) == (1, True)
    output = ("--output", tmp_path / "run")
    folder = ("--data", "folder", "--data.root", tmp_path / "birds")
    status, _, err = _main(capsys, "train", *folder, *output)
    assert (status, "error: data.root: " in err, "birds/train is missing; want" in err) == (
        2,
        True,
        True,
    )
    for command in ("demo", "train"):
        status, _, err = _main(capsys, command, "--seed", 2**32, *output)
        assert (status, "seed: got 4294967296, want" in err) == (2, True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate x --draws 0", "draws: got 0, want an integer >= 1"),
        ("evaluate x --draws -3", "draws: got -3, want an integer >= 1"),
        ("evaluate x --draws many", "draws: got 'many', want an integer"),
        ("evaluate x --drawz 3", "drawz: there is no such option; did you mean 'draws'?"),
        ("evaluate x --epochs 3", "epochs: there is no such option; --help lists all there are"),
        ("evaluate x --image-size 3", "image_size: .* did you mean 'data.image_size'?"),
        ("evaluate x --accelerator CPU", "accelerator: got 'CPU', want .* did you mean 'cpu'?"),
        ("evaluate x --batch-size 1.5", "batch_size: got '1.5', want an integer or null"),
        ("evaluate", "path: got nothing, want a path"),
        ("evaluate x --draws", "draws: got nothing, want an integer"),
        ("demo --draws 3", "draws: there is no such option; --help lists all there are"),
        ("demo --epochs x", "epochs: got 'x', want an integer"),
        ("demo --seed -1", "seed: got -1, want an integer >= 0 and <= 4294967295"),
        (
            "convert a b",
            "source: a holds no last.ckpt; want a checkpoint, or the folder of a run; .*",
        ),
        ("convert a --root x", "target: got nothing, want a path"),
        ("convert a b --rot x", "rot: there is no such option; did you mean 'root'?"),
        ("train --lr 0.1", "lr: there is no such option; did you mean 'optimizer.lr'?"),
    ],
)
def test_bad_options_of_every_command_are_refused_in_one_line(
    capsys, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    status, out, err = _main(capsys, *arguments.split())
    command = arguments.split()[0]
    assert (status, out) == (2, "")
    assert re.fullmatch(f"picnn-fast {command}: error: {message}\n".replace("?", r"\?"), err), err
    assert not list(tmp_path.iterdir())


def test_options_of_another_method_are_refused_from_flags_and_yaml(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: {name: picnn, template: {norm: l2}}\n")
    output = ("--output", tmp_path / "run")
    for arguments in (
        ("--method", "std", "--method.template.norm", "l1"),
        ("--config", path),
    ):
        status, _, err = _main(capsys, "train", *arguments, *output)
        assert (status, "method.template" in err, "want method icnn" in err) == (2, True, True)
        assert err.count("\n") == 1
    status, _, err = _main(capsys, "train", "--config", "", *output)
    assert (status, "error: config: cannot read" in err) == (2, True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["picnn", "icnn", "std"])
def test_a_run_is_repeated_from_its_record(capsys, monkeypatch, tmp_path, method):
    from picnn_fast.training import run

    monkeypatch.setattr(run, "fit", lambda *arguments, **options: dict.fromkeys(FIGURES, 0.5))
    given = ("train", "--method", method, "--optimizer.lr", "1e-5", "--epochs", 3)
    given += ("--accelerator", "cpu")
    assert _main(capsys, *given, "--output", tmp_path / "first")[0] == 0
    record = json.loads((tmp_path / "first" / "run.json").read_text())
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(record["config"]))
    for source in (path, tmp_path / "first" / "run.json"):
        again = ("train", "--config", source, "--overwrite", "--output")
        status, out, err = _main(capsys, *again, tmp_path / "second")
        assert (status, "complete already" in out) == (0, False), err
        second = json.loads((tmp_path / "second" / "run.json").read_text())
        assert second["config"] == record["config"]
    again = ("train", "--config", path, "--output", tmp_path / "first")
    assert "complete already" in _main(capsys, *again)[1]


def test_completion_offers_the_options_of_the_method_typed(tmp_path):
    def offered(line):
        environment = os.environ | {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "9",  # a tab
        }
        (tmp_path / "out").touch()
        done = finished(as_module, ["picnn_fast"], environment=environment)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "out").read_text()

    assert "--method.filter_loss_weight" in offered("picnn-fast train --method icnn --method.f")
    assert "gumbel" in offered("picnn-fast train --method.sampling ")


@pytest.fixture
def one_category(tmp_path):
    """An untrained network that tells cows, and none but these classes of data."""
    from picnn_fast.training import checkpoint, run

    config = Options(
        method={"name": "icnn", "task": "single"},
        backbone="small-cnn",
        data={"name": "part-animals", "image_size": 32, "train_images": 6, "test_images": 12},
        category="cow",
        accelerator="cpu",
    )
    made = run.assemble(config, tmp_path, progress=False)
    path = tmp_path / "last.ckpt"
    content = {"state_dict": made.module.state_dict()}
    saving = checkpoint.SaveOptions(config, made.data)
    saving.on_save_checkpoint(made.trainer, made.module, content)
    torch.save(content, path)
    return path


def test_evaluation_on_other_classes_says_that_they_differ(capsys, one_category):
    arguments = ("evaluate", one_category, "--accelerator", "cpu")
    status, out, _ = _main(capsys, *arguments, "--json")
    assert (status, json.loads(out)["icnn"]["acc1"] >= 0) == (0, True)
    status, _, err = _main(capsys, *arguments, "--data", "digits")
    assert (status, "error: data: digits has other classes (10: 0, 1" in err) == (2, True)
    status, out, _ = _main(capsys, *arguments, "--data.test_images", 6, "--json")
    assert (status, "acc1" in out) == (0, True)
    folder = one_category.parent / "images"
    for split in ("train", "test"):
        for name in ("boat", "car"):
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32)).save(folder / split / name / f"{i}.png")
    status, _, err = _main(capsys, *arguments, "--data", "folder", "--data.root", folder)
    assert status == 2
    assert f"error: data: folder has other classes (2: boat, car) than {one_category}" in err
    assert "was trained on (2: not cow, cow)" in err


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder as of compare, of untrained networks: std and picnn of two seeds each."""
    from picnn_fast.training import checkpoint, run

    folder = tmp_path_factory.mktemp("compared")
    for method in ("picnn", "std"):
        for seed in (0, 1):
            config = Options(
                method=method,
                backbone="small-resnet",
                data={"name": "digits", "max_shift": 0},
                num_filters=20,
                seed=seed,
                accelerator="cpu",
            )
            made = run.assemble(config, folder, progress=False)
            content = {"state_dict": made.module.state_dict()}
            saving = checkpoint.SaveOptions(config, made.data)
            saving.on_save_checkpoint(made.trainer, made.module, content)
            path = folder / f"{method}-{seed}" / "last.ckpt"
            path.parent.mkdir()
            torch.save(content, path)
    return folder


def test_seeds_of_a_method_are_one_column_and_compared_with_the_ordinary_network(
    capsys, tmp_path, compared
):
    arguments = ("evaluate", compared, "--figures", "acc1", "mis", "--resamples", 50)
    arguments += ("--accelerator", "cpu", "--output", tmp_path / "figures")
    status, out, err = _main(capsys, *arguments)
    assert (status, err) == (0, "")
    head, *lines = [line for line in out.splitlines() if "│" in line or "┃" in line]
    assert [name.strip() for name in head.split("┃")[1:-1]] == ["", "picnn", "std"]
    assert " ± " in next(line for line in lines if " ACC1 ↑ " in line)
    assert any("picnn − std" in line for line in lines)
    written = json.loads((tmp_path / "figures" / "metrics.json").read_text())
    assert list(written) == ["picnn-0", "picnn-1", "std-0", "std-1", "picnn − std"]
    for figure in ("acc1", "mis"):
        values = {name: of[figure] for name, of in written.items()}
        mean = (values["picnn-0"] + values["picnn-1"] - values["std-0"] - values["std-1"]) / 2
        assert values["picnn − std"] == pytest.approx(mean)
        low, high = written["picnn − std"][f"{figure}_interval"]
        assert low <= high
    rows = list(csv.DictReader((tmp_path / "figures" / "metrics.csv").open(encoding="utf-8")))
    assert [row["name"] for row in rows] == list(written)
    for row in rows:
        of = written[row["name"]]
        assert [float(row[f"mis{end}"]) for end in ("", "_low", "_high")] == [
            of["mis"],
            *of["mis_interval"],
        ]
    status, out, _ = _main(capsys, *arguments, "--json")
    assert (status, json.loads(out)) == (0, written)


def test_runs_are_measured_side_by_side_and_compared_with_the_first(capsys, compared):
    names = ["picnn-1", "picnn-0", "picnn-1"]  # one of them twice
    arguments = ("evaluate", *(compared / name for name in names), "--accelerator", "cpu")
    arguments += ("--figures", "acc1", "--draws", 1)
    measured = json.loads(_main(capsys, *arguments, "--json")[1])
    assert list(measured) == ["picnn-1", "picnn-0"]  # seeds of one method: nothing to compare
    other = compared / "std-0" / "last.ckpt"
    files = (compared / "picnn-1" / "last.ckpt", compared / "picnn-0", other)
    arguments = ("evaluate", *files, "--accelerator", "cpu", "--figures", "acc1", "--json")
    assert list(json.loads(_main(capsys, *arguments, "--resamples", 0)[1])) == [
        "picnn-1",
        "picnn-0",
        "std-0",
        "picnn − std-0",
    ]


def test_other_test_images_are_not_compared(capsys, one_category, compared):
    files = (compared / "std-0", one_category, "--figures", "acc1", "--accelerator", "cpu")
    status, out, _ = _main(capsys, "evaluate", *files)
    assert (status, "no differences: the runs were measured on other test images" in out) == (
        0,
        True,
    )
    assert " − " not in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--figures", "acc4"), "figures: got 'acc4', did you mean 'acc3'? want all, or names"),
        (("--figures", "mis", "misd"), "figures: got 'misd', did you mean 'mis'? want all, or"),
        (("--resamples", -1), "resamples: got -1, want an integer >= 0"),
        (("--resamples", "many"), "resamples: got 'many', want an integer"),
        (("--output", "{folder}"), "output: got {folder}, which holds a run, want another folder"),
        (("--output", "{file}"), "output: got {file}, which is no folder"),
        (("--output", "{file}/x"), "output: got {file}/x, but {file} is no folder"),
    ],
)
def test_bad_options_of_a_comparison_are_refused_before_anything_is_measured(
    capsys, tmp_path, compared, option, message
):
    (tmp_path / "run.json").write_text("{}")
    names = {"folder": str(tmp_path), "file": str(tmp_path / "run.json")}
    option = [str(word).format(**names) for word in option]
    status, out, err = _main(capsys, "evaluate", compared, *option)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message.format(**names) in err


def test_explain_shows_filters_and_draws_a_picture_of_each_image(capsys, tmp_path, one_category):
    images = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for shade, path in enumerate(images):
        Image.effect_noise((40, 30), 60 + shade).convert("RGB").save(path)
    output = tmp_path / "shown"
    arguments = ("explain", one_category, *images, "--output", output, "--filters", 3)
    status, out, err = _main(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told.keys() == {str(path) for path in images}
    for path in images:
        said = told[str(path)]["icnn"]
        assert said["predicted"] == said["explained"]
        assert len(said["filters"]) == 3
        assert sum(group["filters"] for group in said["groups"]) == 96
        assert Path(said["picture"]) == output / f"{path.stem}-icnn.png"
        assert Image.open(said["picture"]).width > 1000
    status, out, _ = _main(capsys, *arguments, "--target", "not cow")
    assert (status, "the logit of not cow" in out, "without them" in out) == (0, True, True)
    pages = rf"^  picnn-fast explain {one_category} --filter( \d+){{3}}   shows"
    assert re.search(pages, out, re.MULTILINE)
    assert not list(tmp_path.glob("filter_index*"))  # an image is explained without an index


def test_explain_draws_images_of_one_name_beside_each_other(capsys, tmp_path, one_category):
    images = [tmp_path / name for name in ("a/one.png", "b/one.png", "c/ONE.png", "c/one-2.png")]
    for shade, path in enumerate(images):
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 30 + 10 * shade).convert("RGB").save(path)
    output = tmp_path / "shown"
    arguments = ("explain", one_category, *images, images[0], "--output", output, "--json")
    status, out, _ = _main(capsys, *arguments)
    assert status == 0
    told = json.loads(out)
    assert list(told) == [str(path) for path in images]
    pictures = [said["icnn"]["picture"] for said in told.values()]
    assert len({picture.lower() for picture in pictures}) == len(images)
    assert sorted(pictures) == sorted(str(path) for path in output.iterdir())
    assert pictures[0] == str(output / "one-icnn.png")
    assert len({Path(picture).read_bytes() for picture in pictures}) == len(images)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("{run}", "{image}", "--target", "dog"), 2, "target: got 'dog', want one of not cow, cow"),
        (("{run}", "{image}", "--filters", 0), 2, "filters: got 0, want an integer >= 1"),
        (("{run}", "no-image.png"), 1, "image: no-image.png is missing"),
        (("{run}",), 2, "images"),
        (("{run}", "{run}"), 2, "cannot be read as an image"),
    ],
)
def test_explain_refuses_in_a_line(capsys, tmp_path, one_category, arguments, status, message):
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    named = [str(a).format(run=one_category, image=image) for a in arguments]
    got, _, err = _main(capsys, "explain", *named, "--output", tmp_path / "shown")
    assert (got, message in err, err.count("\n")) == (status, True, 1), err
    assert not (tmp_path / "shown").exists()


def test_explain_draws_a_page_of_a_filter_out_of_an_index_that_is_made_once(
    capsys, monkeypatch, tmp_path, one_category
):
    from picnn_fast.training import filter_index

    output = tmp_path / "shown"
    arguments = ("explain", one_category, "--filter", 3, 17, 3, "--output", output)
    status, out, err = _main(capsys, *arguments, "--json", "--accelerator", "cpu")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert list(told) == ["3", "17"]
    for number, by_network in told.items():
        said = by_network["icnn"]
        assert (said["images"], said["split"]) == (12, "test")
        for ranking in ("by_activation", "by_contribution"):
            assert len(said[ranking]) == 9
            values = [seen["value"] for seen in said[ranking]]
            assert values == sorted(values, reverse=True)
            assert {seen["class"] for seen in said[ranking]} <= {"cow", "not cow"}
        assert Path(said["picture"]) == output / f"filter-{number}-icnn.png"
        assert Image.open(said["picture"]).width > 1000

    def passed(*arguments, **named):
        raise AssertionError("a second pass over the images")

    monkeypatch.setattr(filter_index, "filter_index", passed)
    status, out, err = _main(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "icnn, 12 images of the test split" in out
    assert "filter-17-icnn.png: filter 17 on a page" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--filter", 96), "filter: got 96, want one of the 96 of"),
        (("--filter", -1), "filter: got -1, want one of the 96 of"),
        (("--filter", "a"), "filter"),
        (("image.png", "--filter", 1), "images: got 1 beside --filter, want none"),
        (("--filter", 1, "--target", "cow"), "target: got one beside --filter"),
        (("--filter", 1, "--split", "all"), "split"),
    ],
)
def test_explain_refuses_filters_in_a_line(capsys, tmp_path, one_category, arguments, message):
    output = tmp_path / "shown"
    status, _, err = _main(capsys, "explain", one_category, *arguments, "--output", output)
    assert (status, message in err, err.count("\n")) == (2, True, 1), err
    assert not output.exists()
    assert not list(tmp_path.glob("filter_index*"))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module in the working directory, and a trained state dict of its network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "nothing")  # puts the path back afterwards
    name = f"own_{tmp_path.name}".replace("-", "_")
    Path(f"{name}.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    maps = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()\n"
        "    head = nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(48, 10)\n"
        "    return nn.Sequential(*maps, *head)\n"
    )
    torch.manual_seed(0)
    data = DATA["digits"](seed=0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, padding=1),
        torch.nn.BatchNorm2d(12),
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for images, labels in data.train_dataloader():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), "trained.pt")
    yield name, network.eval(), data
    sys.modules.pop(name, None)


def test_a_plain_network_of_ones_own_is_measured_as_it_is(capsys, own_module):
    name, network, data = own_module
    arguments = ("evaluate", "--model", f"{name}:network", "--weights", "trained.pt")
    status, out, err = _main(capsys, *arguments, "--data", "digits", "--json", "--seed", 3)
    assert (status, err) == (0, "")
    ((row, values),) = json.loads(out).items()
    images, labels = (torch.cat(x) for x in zip(*data.test_dataloader(), strict=True))
    logits = network(images)
    assert row == f"{name}:network"
    assert values["acc1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert 0.5 < values["acc1"] < 1
    assert 0 < values["mis"] < 0.4
    again = torch.nn.functional.cross_entropy(logits, labels).item()
    assert values["negative_log_likelihood"] == pytest.approx(again, rel=1e-4)
    status, out, _ = _main(capsys, *arguments, "--data", "digits", "--layer", "1")
    assert status == 0
    assert f"{name}:network, as it is, by 12 filters of layer 1" in out
    repeated = _main(capsys, *arguments, "--data", "digits", "--json", "--seed", 3)[1]
    assert json.loads(repeated)[row] == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "{own}", "runs/train"), "model: got '{own}' beside runs/train, want one of"),
        (("--model", "{own}"), "data: got nothing with --model, want --data NAME"),
        (("--model", "{own}", "--data", "folder"), "data.root: got nothing, want"),
        (("--model", "{own}", "--data.validation", 0), "data: got nothing with --model"),
        (
            ("--model", "{own}", "--data", "digits", "--data.image_size", 3),
            "data.image_size: data digits has no such option, want",
        ),
        (("--model", "null", "--data", "digits"), "model: got null, want the name of a network"),
        (("--model", "resnet18", "--data", "digits"), "data: got images of 1 channel with"),
        (("--model", "{own}s", "--data", "digits"), "did you mean 'network'?"),
        (("runs/train", "--layer", "1"), "layer: got '1' with a run, want it with --model alone"),
        (("runs/train", "--weights", "a.pt"), "weights: got 'a.pt' with a run"),
    ],
)
def test_what_is_no_model_to_measure_is_refused_in_a_line(capsys, own_module, arguments, message):
    own = f"{own_module[0]}:network"
    given = [str(argument).format(own=own) for argument in arguments]
    status, out, err = _main(capsys, "evaluate", *given)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message.format(own=own) in err


def test_images_are_made_as_the_library_says_unless_options_say_otherwise(
    capsys, monkeypatch, tmp_path
):
    timm = pytest.importorskip("timm")
    from picnn_fast.training import plain

    for split in ("train", "test"):
        for name in ("boat", "car"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.effect_noise((90, 80), 50 + i).convert("RGB").save(folder / f"{i}.png")
    made = []

    def seen(model, data, **options):
        made.append(data)
        return measured(model, data, **options)

    measured = plain.plain_network
    monkeypatch.setattr(plain, "plain_network", seen)
    told = dataclasses.replace(
        timm.get_pretrained_cfg("test_resnet"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        input_size=(3, 64, 64),
        crop_pct=0.8,
    )
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: told)
    arguments = ["evaluate", "--model", "timm:test_resnet", "--weights", "random", "--data"]
    arguments += ["folder", "--data.root", tmp_path, "--accelerator", "cpu", "--json"]
    status, out, err = _main(capsys, *arguments)
    assert (status, err) == (0, "")
    assert json.loads(out)["timm:test_resnet"]["acc1"] >= 0
    status, _, _ = _main(capsys, *arguments, "--data.image-size", 96, "--data.std", "[1, 1, 1]")
    assert status == 0
    first, second = (data.test_set[0][0] for data in made)
    assert (first.shape, second.shape) == ((3, 64, 64), (3, 96, 96))
    assert (made[0].mean.flatten().tolist(), made[1].std.flatten().tolist()) == ([0.5] * 3, [1] * 3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--draws", 0), "draws: got 0, want"),
        (("--batch-size", 0), "batch_size: got 0, want"),
        (("--seed", -1), "seed: got -1, want"),
        (("--accelerator", "mps"), "accelerator: got 'mps', but torch finds none here"),
        (("--data.test_images", 0), "data.test_images: got 0, want"),
        (("--data.test_images", 2), "data: got 2 test images, want"),
        (("--data.image_size", 15), "data.image_size: got 15, want"),
        (("--data.num_workers", -1), "data.num_workers: got -1, want"),
        (("--data.sampling", 3), "data.sampling: there is no such option"),
    ],
)
def test_bad_options_of_an_evaluation_are_refused_in_one_line(
    capsys, one_category, option, message
):
    status, out, err = _main(capsys, "evaluate", one_category, *option)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_evaluation_on_images_that_the_network_cannot_take_says_so(
    capsys, monkeypatch, one_category
):
    from picnn_fast.data import part_animals

    @functools.wraps(part_animals)  # whose options it has
    def grey(**options):
        data = part_animals(**options)
        data.test_set = [(image.mean(0, keepdim=True), label) for image, label in data.test_set]
        return data

    monkeypatch.setitem(DATA, "part-animals", grey)
    status, out, err = _main(capsys, "evaluate", one_category, "--accelerator", "cpu")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert f"the network in {one_category} cannot take images of 32 x 32 pixels and 1 ch" in err


def test_demo_trains_both_networks_and_draws(capsys, monkeypatch, tmp_path):
    from picnn_fast.training import demo

    # Few filters: their mutual information takes longer than an epoch.
    small = {**demo.COMMON, "num_filters": 10, "batch_size": 256}
    monkeypatch.setattr(demo, "COMMON", small)
    output = tmp_path / "demo"
    output.mkdir()
    arguments = ("demo", "--output", output, "--epochs", 1)
    status, out, err = _main(capsys, *arguments)
    assert status == 0, err
    assert "complete already" not in out
    assert {p.name for p in output.iterdir()} == {
        "metrics.json",
        "run.json",
        "correspondence.png",
        "curves.png",
        "gradcam.png",
        "report.html",
        "std",
        "picnn",
    }
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics.keys() == {"std", "picnn"}
    assert all(values.keys() >= set(default_figures()) for values in metrics.values())
    assert f"{metrics['picnn']['mis']:.3f}" in out

    status, out, _ = _main(capsys, *arguments)
    assert (status, "complete already. Redo it with --overwrite" in out) == (0, True)
    status, _, err = _main(capsys, *arguments, "--seed", 1)
    assert (status, "seed 0, now 1" in err) == (1, True)

    status, out, _ = _main(capsys, "evaluate", output, "--json", "--accelerator", "cpu")
    assert status == 0
    measured = json.loads(out)
    apart = measured.pop("picnn − std")
    assert measured == metrics
    assert apart["acc1"] == pytest.approx(metrics["picnn"]["acc1"] - metrics["std"]["acc1"])
    status, _, err = _main(capsys, "evaluate", output, "--seed", 2**32)
    assert (status, "seed: got 4294967296, want" in err) == (2, True)
    status, out, _ = _main(capsys, "evaluate", output / "picnn" / "last.ckpt", "--seed", 3)
    assert (status, "picnn" in out) == (0, True)


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    from picnn_fast.training import compare

    def interrupted(*arguments, **options):
        sys.exit(1)  # as Lightning does

    monkeypatch.setattr(compare, "fit", interrupted)
    status, _, err = _main(capsys, "demo", "--output", tmp_path / "demo")
    assert (status, "demo: interrupted; the same command starts anew" in err) == (130, True)
    assert not (tmp_path / "demo").exists()
    assert (tmp_path / ".demo.partial" / "run.json").exists()
    checkpoint = tmp_path / ".demo.partial" / "std" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    status, _, err = _main(capsys, "demo", "--output", tmp_path / "demo")
    assert "interrupted; the same command goes on from the last checkpoint" in err


def test_ctrl_c_before_a_training_promises_nothing(capsys, monkeypatch, tmp_path):
    from picnn_fast.training import run

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_folder", interrupted)
    status, out, err = _main(capsys, "train", "--output", tmp_path / "run")
    assert (status, out, err) == (130, "", "")


def test_divergence_is_told_in_a_line(capsys, monkeypatch, tmp_path):
    from picnn_fast.training import run
    from picnn_fast.training.module import DivergenceError

    def diverge(*arguments, **options):
        raise DivergenceError("train/loss is nan in epoch 1")

    monkeypatch.setattr(run, "fit", diverge)
    status, _, err = _main(capsys, "train", "--output", tmp_path / "run", "--accelerator", "cpu")
    assert (status, err) == (1, "picnn-fast train: error: train/loss is nan in epoch 1\n")


def test_an_image_that_a_network_makes_no_number_of_is_told_in_a_line(
    capsys, monkeypatch, one_category
):
    from picnn_fast.data.part_animals import PartAnimals

    draw = PartAnimals.__getitem__

    def damaged(samples, index):
        sample = draw(samples, index)
        return sample._replace(image=sample.image * torch.nan) if index == 4 else sample

    monkeypatch.setattr(PartAnimals, "__getitem__", damaged)
    status, out, err = _main(capsys, "evaluate", one_category, "--accelerator", "cpu")
    # An older rich ends its progress bar with an empty line.
    assert (status, out.strip(), err.count("\n")) == (2, "", 1), err
    assert "error: activmap_iou: maps or logits of test image 4 are NaN" in err


def test_sigterm_ends_with_its_status_and_says_how_to_go_on(tmp_path):
    output = tmp_path / "run"
    command = ["picnn_fast", "train", "--output", str(output)]
    command += ["--epochs", "1000", "--num-filters", "10", "--accelerator", "cpu"]
    process = start(as_module, (command,), tmp_path, "train")
    checkpoint = tmp_path / ".run.partial" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    done = ended(process, tmp_path, "train")
    err = done.stderr
    assert (done.returncode, "interrupted; the same command goes on" in err) == (143, True)
    assert "Traceback" not in err
    assert checkpoint.exists()
    assert not output.exists()


def test_convert_writes_a_checkpoint_that_evaluate_takes(capsys, tmp_path):
    from picnn_fast.models import PICNN, make_interpretable

    for split, count in (("train", 2), ("test", 3)):
        for name in ("boat", "car"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((16, 16), 80).convert("RGB")
                image.save(tmp_path / "images" / split / name / f"{i}.png")
    network = make_interpretable(
        "resnet18", "picnn", num_classes=2, num_filters=4, inserted_activation="none"
    )
    renamed = {
        "features.0.conv1.": "backbone.0.",
        "features.0.bn1.": "backbone.1.",
        **{f"features.0.layer{i}.": f"backbone.{i + 3}." for i in range(1, 5)},
        "features.1.": "backbone.8.",
        "head.2.": "classifier.1.1.",
        "correspondence.weight": "correlation",
    }
    model = {}
    for name, value in network.state_dict().items():
        prefix = next(prefix for prefix in renamed if name.startswith(prefix))
        model["module." + renamed[prefix] + name.removeprefix(prefix)] = value
    source, target = tmp_path / "theirs.pth", tmp_path / "ours.ckpt"
    torch.save({"optimizer": {}, "model": model, "epoch": 1}, source)
    root = ("--root", tmp_path / "images")
    status, out, err = _main(capsys, "convert", source, target, *root)
    assert (status, "evaluate measures it" in out) == (0, True), err
    small = ("--data.image_size", 32, "--data.resize", 32, "--data.num_workers", 0)
    status, out, err = _main(capsys, "evaluate", target, *small, "--json", "--accelerator", "cpu")
    assert (status, json.loads(out)["picnn"]["acc1"] >= 0) == (0, True), err
    status, _, err = _main(capsys, "convert", source, target, *root)
    assert (status, "target: got" in err, "which exists" in err) == (2, True, True)
    status, _, err = _main(capsys, "convert", tmp_path / "gone", tmp_path / "x.ckpt", *root)
    assert (status, "source: cannot read" in err) == (2, True)
    (tmp_path / "text").write_text("hello")
    status, _, err = _main(capsys, "convert", tmp_path / "text", tmp_path / "x.ckpt", *root)
    assert (status, err.endswith(f"source: {tmp_path}/text is not a PyTorch checkpoint\n")) == (
        2,
        True,
    )
    correlation = {name: value for name, value in model.items() if not name.endswith("relation")}
    for content, message in (
        ([1], "is no checkpoint of PICNN's: it holds no tensors under 'model'; want one"),
        ({"model": correlation}, "is no checkpoint of PICNN's: it lacks correlation; want one"),
        ({"model": {**model, "correlation": torch.ones(2)}}, "its correlation is no matrix"),
        ({"model": model, "args": Path("x")}, "holds pathlib.PosixPath, which could run code"),
    ):
        torch.save(content, tmp_path / "other.pth")
        status, _, err = _main(
            capsys, "convert", tmp_path / "other.pth", tmp_path / "x.ckpt", *root
        )
        assert (status, message in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "x.ckpt").exists()

    folder, again = tmp_path / "folder", tmp_path / "again.ckpt"
    status, out, err = _main(capsys, "convert", target, folder)
    assert (status, "from_pretrained loads it" in out) == (0, True), err
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    card = PICNN.from_pretrained(folder).card
    assert card["class_names"] == ["boat", "car"]
    assert card["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert _main(capsys, "convert", folder, again)[0] == 0
    one, two = (torch.load(path, weights_only=True) for path in (target, again))
    assert one["picnn_fast"] == two["picnn_fast"]
    assert all(
        torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items()
    )
    assert _main(capsys, "convert", source, tmp_path / "theirs", *root)[0] == 0
    network.save_pretrained(tmp_path / "own")
    for arguments, message in (
        ((target, again), "which exists; want a new file or folder"),
        ((target, tmp_path / "x.ckpt"), "want a folder; or, of a file of the authors', --root"),
        ((folder, tmp_path / "x"), "want a file that ends in .ckpt: "),
        ((tmp_path / "own", tmp_path / "x.ckpt"), "tells of no training, want one that picnn-fast"),
        ((source, tmp_path / "x"), "theirs.pth is not one of picnn-fast train; a file of"),
    ):
        status, _, err = _main(capsys, "convert", *arguments)
        assert (status, message in err, err.count("\n")) == (2, True, 1), err


@pytest.fixture
def of_folder(tmp_path, monkeypatch):
    """An untrained network on a folder of images that was named from where it lies."""
    from picnn_fast.training import checkpoint, run

    classes = ("a\x1b[2J", "b\u202e")
    for split in ("train", "test"):
        for name in classes:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), 60 * i).save(
                    tmp_path / "images" / split / name / f"{i}.png"
                )
    monkeypatch.chdir(tmp_path)
    data = {"name": "folder", "root": "images/", "image_size": 32, "num_workers": 0}
    options = Options(data=data, num_filters=8, accelerator="cpu", output="run\x1b[2J")
    made = run.assemble(options, tmp_path, progress=False)
    content = {"state_dict": made.module.state_dict()}
    saving = checkpoint.SaveOptions(options, made.data)
    saving.on_save_checkpoint(made.trainer, made.module, content)
    path = tmp_path / "run\x1b[2J" / "std\x07" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    return path


def test_an_image_is_explained_where_the_data_is_not(capsys, monkeypatch, tmp_path, of_folder):
    """How images are resized and normalised, and the names of classes, are in the checkpoint."""
    foreign = tmp_path / "foreign.jpg"
    Image.effect_noise((70, 50), 80).convert("RGB").save(foreign)
    arguments = ("explain", of_folder, foreign, "--output", tmp_path / "shown", "--json")
    told = []
    for data in (("--data.num_workers", 0), ()):  # with the data, and without
        status, out, err = _main(capsys, *arguments, *data)
        assert (status, err) == (0, "")
        told.append(json.loads(out))
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
    assert told[0] == told[1]
    assert next(iter(told[1][str(foreign)].values()))["predicted"] in ("a\x1b[2J", "b\u202e")
    content = torch.load(of_folder, weights_only=True)
    del content["picnn_fast"]["preprocessing"]  # as of earlier sources
    torch.save(content, of_folder)
    status, _, err = _main(capsys, *arguments)
    assert (status, "--data.root, or another option of --data, says where else" in err) == (2, True)


def test_evaluation_finds_the_data_from_anywhere_and_says_how_to_name_it(
    capsys, monkeypatch, tmp_path, of_folder
):
    monkeypatch.chdir("/")
    arguments = ("evaluate", of_folder, "--accelerator", "cpu", "--json")
    status, out, _ = _main(capsys, *arguments)
    assert (status, "acc1" in out) == (0, True)
    (tmp_path / "images").rename(tmp_path / "moved")
    status, _, err = _main(capsys, *arguments)
    assert status == 2
    assert f"data.root: {tmp_path}/images/train is missing; want" in err
    assert err.endswith("; --data.root, or another option of --data, says where else\n")
    moved = ("--data.root", tmp_path / "moved")
    assert _main(capsys, *arguments, *moved)[0] == 0
    status, _, err = _main(capsys, *arguments, "--data.root", "nowhere")
    assert (status, "says where else" in err) == (2, False)


def test_names_that_would_steer_the_terminal_are_written_out(capsys, tmp_path, of_folder):
    status, out, err = _main(capsys, "evaluate", of_folder.parent.parent, "--accelerator", "cpu")
    assert (status, "std\\x07" in out) == (0, True)
    arguments = ("evaluate", of_folder, "--accelerator", "cpu", "--data", "digits")
    status, more, err = _main(capsys, *arguments)
    assert (status, r"a\x1b[2J, b\u202e" in err) == (2, True)
    status, _, missing = _main(capsys, "evaluate", tmp_path / "\x1b]0;title\x07")
    assert (status, r"\x1b]0;title\x07" in missing) == (1, True)
    assert not {"\x1b", "\x07", "\u202e"} & set(out + more + err + missing)


@pytest.mark.parametrize(
    "text", ["(pid(s) 7) exited unexpectedly", "(pid 7) is killed by signal: Killed. "]
)
def test_a_reading_process_that_is_killed_while_measuring_is_told_in_a_line(
    capsys, monkeypatch, of_folder, text
):
    from picnn_fast import evaluation

    def killed(*arguments, **options):
        raise RuntimeError(f"DataLoader worker {text}")

    monkeypatch.setattr(evaluation, "measure", killed)
    status, _, err = _main(capsys, "evaluate", of_folder, "--accelerator", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "data.num_workers: a process that reads images was killed (7)" in err
