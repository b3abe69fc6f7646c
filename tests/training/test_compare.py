"""Methods side by side: what differs between the runs, how a comparison goes on, and its files."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest

from picnn_fast import cli
from picnn_fast.evaluation import FIGURES, default_figures
from picnn_fast.models import METHODS
from picnn_fast.training import compare as module
from picnn_fast.training.compare import RECIPES, VARIANTS, compare, compare_folder, methods_on
from picnn_fast.training.demo import demo_options
from picnn_fast.training.options import ConfigError, Options
from picnn_fast.training.run_folder import RunFolderError


@pytest.fixture
def options(tmp_path):
    return Options(
        output=str(tmp_path / "runs"), epochs=1, batch_size=512, num_filters=10, accelerator="cpu"
    )


@pytest.fixture
def trained(monkeypatch):
    """Folders of the networks that were trained, which takes no time."""
    folders = []

    def fit(run, *, progress):
        folder = Path(run.trainer.default_root_dir)
        folder.mkdir(exist_ok=True)
        (folder / "last.ckpt").touch()
        folders.append(folder.name)
        figures = dict.fromkeys(FIGURES, float(run.options.seed))
        if run.options.method["name"] != "csg":
            figures["density"] = "n/a: no gate"
        return figures

    monkeypatch.setattr(module, "fit", fit)
    return folders


def test_interrupted_comparison_goes_on_and_a_complete_one_is_read_back(
    options, monkeypatch, tmp_path
):
    methods = methods_on("digits", ["std", "csg"])
    lines = []
    with monkeypatch.context() as patch:
        fit = module.fit

        def power_cut(run, *, progress):
            if run.options.method["name"] == "csg":
                raise KeyboardInterrupt
            return fit(run, progress=progress)

        patch.setattr(module, "fit", power_cut)
        with pytest.raises(KeyboardInterrupt):
            compare(options, methods, [3], say=lines.append)
    output = tmp_path / "runs"
    assert not output.exists()
    lines.clear()
    with pytest.warns(UserWarning, match="did not become sparse"):
        figures = compare(options, methods, [3], say=lines.append)
    assert lines[0] == "std, seed 3 (1 of 2): trained before"
    assert lines[1] == "csg, seed 3 (2 of 2): 1 epoch on 1,295 images"
    assert {name: len(runs) for name, runs in figures.items()} == {"std": 1, "csg": 1}
    assert 0 < figures["csg"][0]["density"] <= 1
    assert figures["std"][0]["density"] == "n/a: STD has no gate"
    monkeypatch.setattr(module, "assemble", None)
    assert compare(options, methods, [3], say=lines.append) == figures

    runs = json.loads((output / "metrics.json").read_text())["runs"]
    assert [(run.pop("method"), run.pop("seed")) for run in runs] == [("std", 3), ("csg", 3)]
    assert runs == [figures["std"][0], figures["csg"][0]]
    with open(output / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [("std", "3"), ("csg", "3")]
    for row, run in zip(rows, runs, strict=True):
        ends = {key: run.pop(key) for key in [*run] if key.endswith("_interval")}
        assert ends.keys() >= {"acc1_interval", "mis_interval"}
        for key, (low, high) in ends.items():
            name = key.removesuffix("_interval")
            run |= {f"{name}_low": low, f"{name}_high": high}
        assert {key: str(value) for key, value in run.items()}.items() <= row.items()
    order = [key for key in rows[0] if key in FIGURES]
    assert order == default_figures()


def test_more_methods_and_seeds_go_on_and_fewer_are_refused(options, trained):
    both = methods_on("digits", ["std", "picnn"])
    std = {"std": both["std"]}
    compare(options, std, [0], progress=False)
    assert not compare_folder(options, both, [0, 1]).complete()
    figures = compare(options, both, [0, 1], progress=False)
    assert trained == ["std-0", "picnn-0", "std-1", "picnn-1"]
    assert [run["acc1"] for run in figures["picnn"]] == [0.0, 1.0]
    with pytest.raises(RunFolderError, match=r"other options: runs\.picnn-0"):
        compare(options, std, [0], progress=False)
    with pytest.raises(RunFolderError, match="epochs 1, now 2"):
        compare(dataclasses.replace(options, epochs=2), both, [0, 1], progress=False)
    other = {**both, "picnn": {**both["picnn"], "correspondence_lr": 0.3}}
    with pytest.raises(RunFolderError, match=r"correspondence_lr 0\.1, now 0\.3"):
        compare(options, other, [0, 1], progress=False)
    compare(options, std, [0], overwrite=True, progress=False)
    assert trained[4:] == ["std-0"]


def test_a_folder_of_another_command_is_refused(options, trained, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    record = {"program": "picnn_fast", "kind": "train", "overwrite": False, "config": {}}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="a train run, not a compare run"):
        compare(options, methods_on("digits", ["std"]), [0])


def test_options_that_are_new_since_a_comparison_count_as_having_had_their_default(
    options, trained, tmp_path
):
    methods = methods_on("digits", ["std", "csg"])
    figures = compare(options, methods, [0], progress=False)
    path = tmp_path / "runs" / "run.json"
    record = json.loads(path.read_text())
    del record["config"]["schedule_factor"], record["config"]["runs"]["csg-0"]["method"]["start"]
    path.write_text(json.dumps(record))
    methods["csg"]["start"] = 10  # its default
    assert compare(options, {"std": methods["std"]} | methods, [0], progress=False) == figures
    assert trained == ["std-0", "csg-0"]


def test_networks_differ_in_method_and_seed_alone(options):
    methods = methods_on("digits", [*METHODS, *VARIANTS])
    runs = module._runs(options, methods, [0, 1])
    assert len(runs) == 2 * len(methods)
    for (name, seed), run in runs.items():
        assert run.seed == seed
        assert run.method.items() >= methods[name].items()
        own = {"method": run.method, "seed": seed, "output": run.output}
        assert dataclasses.replace(options, **own) == run
    assert len({run.output for run in runs.values()}) == len(runs)


def test_on_digits_it_trains_the_networks_of_the_demo(tmp_path):
    output = str(tmp_path)
    options = Options(**RECIPES["digits"].common, output=output)
    methods = methods_on("digits", ["std", "picnn"])
    for (name, _), run in module._runs(options, methods, [0]).items():
        demo = demo_options(output, seed=0, epochs=30)[name]
        assert dataclasses.replace(run, output=demo.output) == demo


def test_a_variant_is_a_method_with_options_and_has_a_row_of_its_own():
    assert methods_on("folder", ["picnn", "picnn-gumbel"]) == {
        "picnn": {"name": "picnn"},
        "picnn-gumbel": {"name": "picnn", "sampling": "gumbel"},
    }
    rates = {m["correspondence_lr"] for m in methods_on("digits", ["picnn", *VARIANTS]).values()}
    assert rates == {0.1}
    assert not VARIANTS.keys() & METHODS.keys()
    with pytest.raises(ConfigError, match="methods: got 'picn', did you mean 'picnn'"):
        methods_on("digits", ["std", "picn"])


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_no_seed_or_one_twice_is_refused(options, seeds):
    with pytest.raises(ConfigError, match="want at least one of each, and no seed twice"):
        compare(options, methods_on("digits", ["std"]), seeds)


def test_several_devices_are_refused(options):
    several = dataclasses.replace(options, devices=2)
    with pytest.raises(ConfigError, match="devices: got 2, want 1"):
        compare(several, methods_on("digits", ["std"]), [0])


def _main(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_has_mean_and_spread_of_each_method(capsys, monkeypatch, trained, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    given = ("compare", "--num-filters", 10, "--accelerator", "cpu", "--output", tmp_path / "runs")
    status, out, err = _main(capsys, *given, "--methods", "std", "csg", "--seeds", 1, 2)
    assert (status, err) == (0, "")
    assert trained == ["std-1", "csg-1", "std-2", "csg-2"]
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert all(
        cell == " 1.500 ± 0.707 " for _, *cells in rows for cell in cells if "n/a" not in cell
    )
    assert [name.strip() for name, std, csg in rows if "n/a" in std] == ["L1-density ↓"]
    assert not any("n/a" in csg for _, _, csg in rows)
    assert "(n/a: no gate)" in out
    record = json.loads((tmp_path / "runs" / "run.json").read_text())["config"]
    assert record["data"]["max_shift"] == 0
    assert record["runs"]["csg-2"]["method"]["gate_lr"] == 0.03
    status, out, _ = _main(capsys, *given, "--methods", "std", "csg", "--seeds", 1, 2)
    assert (status, "complete already" in out) == (0, True)
    status, _, err = _main(capsys, *given, "--methods", "std", "--seeds", 1, "--epochs", 3)
    assert (status, "holds a complete run with other options" in err) == (1, True)


def test_a_figure_that_no_network_has_takes_no_column(capsys, trained, tmp_path):
    given = ("--num-filters", 10, "--accelerator", "cpu", "--output", tmp_path / "runs")
    status, out, _ = _main(capsys, "compare", *given, "--methods", "std", "--seeds", 1)
    assert status == 0
    assert "L1-density" not in out.partition("└")[0]
    assert "not here: L1-density (n/a: no gate)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "pic"], "methods: got 'pic', want one of std, .*did you mean 'picnn'"),
        (["--methods", "std", "--seeds", "x"], "seeds: got 'x', want an integer"),
        (["--seeds"], "seeds: got nothing, want an integer"),
        (["--seeds", "1", "1"], "no seed twice"),
        (["--method", "std"], "did you mean 'methods'"),
        (["--devices", "2"], "devices: there is no such option"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, words, message):
    status, out, err = _main(capsys, "compare", *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_methods_and_seeds_of_a_file_are_lists(capsys, tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("seeds: 3\n")
    status, _, err = _main(capsys, "compare", "--config", path)
    assert (status, "seeds: got 3, want a list" in err) == (2, True)


def test_what_suits_the_digits_is_taken_on_them_alone(capsys):
    shown = []
    for words in ((), ("--data", "part-animals"), ("--data.max_shift", "1")):
        with pytest.raises(SystemExit):
            cli.main(["compare", *words, "--print_config"])
        out = capsys.readouterr().out
        shown.append(("weight_decay: 0.0\n" in out, "max_shift: 0\n" in out))
    assert shown == [(True, True), (False, False), (True, False)]
