import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from picnn_fast import cli
from picnn_fast.evaluation import FIGURES
from picnn_fast.models import METHODS
from picnn_fast.report.html import render
from picnn_fast.training import checkpoint, filter_index, run, run_folder, summary
from picnn_fast.training.options import Options
from picnn_fast.training.run_folder import RunFolder, write_json
from picnn_fast.training.summary import summarise, write_report

DIGITS = {"num_filters": 10, "accelerator": "cpu", "batch_size": 256}


def make(folder, method="picnn", seed=0, figures=True, **changes):
    """The folder of a run that was not trained: checkpoint, logs, figures."""
    options = Options(method=method, seed=seed, **{"data": "digits", **DIGITS, **changes})
    made = run.assemble(options, folder, progress=False)
    content = {"state_dict": made.module.state_dict()}
    saving = checkpoint.SaveOptions(options, made.data)
    saving.on_save_checkpoint(made.trainer, made.module, content)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "last.ckpt")
    (folder / "csv" / "version_0").mkdir(parents=True, exist_ok=True)
    log = "epoch,step,train/loss,val/acc1\n0,1,2.0,0.5\n1,2,1.0,0.75\n"
    (folder / "csv" / "version_0" / "metrics.csv").write_text(log)
    if figures:
        values = {**dict.fromkeys(FIGURES, "n/a: not here"), "acc1": 0.5 + 0.1 * seed, "mis": 0.25}
        write_json(folder / "metrics.json", {made.options.method["name"]: values})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a comparison: two seeds of PICNN and of an ICCNN."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    with RunFolder(folder, "compare", {"seed": 0}).writing() as work:
        for method in ("picnn", "iccnn"):
            for seed in (0, 1):
                make(work / f"{method}-{seed}", method, seed, num_filters=None)
    return folder


@pytest.fixture(scope="module")
def told(runs):
    return summarise([runs], images=3)


def _cells(report, heading):
    (row,) = [row for row in report.figures if row.heading == heading]
    return dict(zip(report.names, row.cells, strict=True))


def test_seeds_of_a_comparison_are_one_column(told):
    assert told.names == ["iccnn", "picnn"]
    cells = _cells(told, "ACC1")
    assert (cells["picnn"].text, cells["picnn"].detail) == ("0.550", "± 0.071 over 2 seeds")
    assert [len(told.histories[name]) for name in told.names] == [2, 2]
    assert told.histories["picnn"][0][1] == {
        "epoch": 1.0,
        "step": 2.0,
        "train/loss": 1.0,
        "val/acc1": 0.75,
    }


def test_what_no_network_has_is_told_once_with_its_reason(told):
    headings = [heading for group in told.missing.values() for heading in group]
    assert "ACC2" in told.missing["not here"]
    assert "leakage pseudo" in told.missing["not here"]
    assert not {*headings} & {row.heading for row in told.figures}
    assert len(headings) + len(told.figures) == len(FIGURES)


def test_what_a_network_lacks_is_a_reason_and_no_picture(told):
    iccnn, picnn = told.networks
    assert iccnn.grad_cam == "ICCNN draws no masks of filters"
    assert [row.heading for row in picnn.grad_cam.rows] == ["0", "1", "2"] or (
        len({row.heading for row in picnn.grad_cam.rows}) == 3
    )
    assert all(len(row.pictures) == 5 for row in picnn.grad_cam.rows)
    assert picnn.ownership.shape == (10, 128)


def test_the_summary_says_what_was_trained_on_what_and_measured(told):
    trained, figures = told.summary
    assert trained.startswith(
        "Four networks were trained on the backbone small-resnet, with 128 filters in the target"
        " layer, for 30 epochs: iccnn and picnn, several seeds of each. They learned from"
    )
    assert "1,295 images of digits in 10 classes" in trained
    assert "measured on 360 that took no part" in trained
    assert "ACC1, accuracy by all filters: iccnn 0.550 and picnn 0.550" in figures


def test_the_record_of_a_run_is_its_provenance(told, runs):
    pairs = told.provenance[str(runs)]
    noted = json.loads((runs / "run.json").read_text())["provenance"]
    assert pairs["command"] == noted["command"]
    assert pairs["torch"] == torch.__version__.partition("+")[0]
    assert pairs["started"] <= pairs["finished"]
    assert told.provenance["Options of picnn"]["seed"] == "0, 1"
    assert told.provenance["Options of picnn"]["method.name"] == "picnn"


def test_the_best_of_a_figure_is_marked_unless_all_are_equal(tmp_path):
    better, worse = make(tmp_path / "b", seed=2), make(tmp_path / "a", "std", seed=1)
    report = summarise([worse, better], images=1, filters=0)
    assert report.names == ["STD (a)", "PICNN (b)"]
    assert [cell.best for cell in _cells(report, "ACC1").values()] == [False, True]
    assert [cell.best for cell in _cells(report, "MIS").values()] == [False, False]


@pytest.mark.parametrize(
    ("low", "better", "marked"),
    [(0.75, "higher", True), (0.65, "higher", False), (0.75, "lower", True)],
)
def test_a_best_whose_interval_another_reaches_into_is_not_marked(tmp_path, low, better, marked):
    runs = [
        [{"acc1": 0.6, "acc1_interval": [0.5, 0.7]}],
        [{"acc1": 0.8, "acc1_interval": [low, 0.9]}],
        [{"acc1": "n/a: none"}],
    ]
    spans = [summary._span(run, "acc1") for run in runs]
    cells = [summary._cell(run, "acc1") for run in runs]
    assert [cell.detail for cell in cells] == ["[0.500, 0.700]", f"[{low:.3f}, 0.900]", "none"]
    shown = summary._with_best(cells, spans, better)
    wanted = [False, marked, False] if better == "higher" else [marked, False, False]
    assert [cell.best for cell in shown] == wanted


def test_several_seeds_reach_as_far_as_their_standard_deviation():
    runs = [{"acc1": 0.5}, {"acc1": 0.7}]
    value, low, high = summary._span(runs, "acc1")
    assert (value, low, high) == pytest.approx((0.6, 0.6 - 0.02**0.5, 0.6 + 0.02**0.5))
    assert summary._span([*runs, {"acc1": "n/a: none"}], "acc1") is None
    assert summary._span([], "acc1") is None


def test_runs_that_differ_in_the_seed_alone_are_one_column_wherever_they_lie(tmp_path):
    report = summarise([make(tmp_path / str(seed), seed=seed) for seed in (0, 1)], images=1)
    assert report.names == ["PICNN (0)"]
    assert _cells(report, "ACC1")["PICNN (0)"].detail == "± 0.071 over 2 seeds"


def test_a_checkpoint_alone_has_a_report_that_says_what_is_missing(tmp_path):
    make(tmp_path / "run", figures=False)
    shutil.move(tmp_path / "run" / "last.ckpt", tmp_path / "alone.ckpt")
    path = write_report([tmp_path / "alone.ckpt"], images=1)
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert "no figure was measured of these runs" in text
    assert "these folders hold no logs" in text


def test_data_that_is_gone_costs_its_pictures_alone(tmp_path, monkeypatch):
    folder = make(tmp_path / "run")

    def gone(options):
        raise run.ConfigError("data.root: x is missing")

    monkeypatch.setattr(summary, "build_data", gone)
    report = summarise([folder])
    assert report.networks[0].grad_cam == "the data cannot be read (data.root: x is missing)"
    assert "its images are not here" in report.summary[0]
    assert _cells(report, "ACC1")["PICNN"].text == "0.500"


def test_a_run_that_diverged_has_a_page_that_says_so(tmp_path):
    folder = make(tmp_path / "run", epochs=1)
    with open(folder / "csv" / "version_0" / "metrics.csv", "a") as log:
        log.write("2,3,nan,0.1\n3,4,nan,0.1\n")
    report = summarise([folder], images=1, filters=1)
    assert report.summary[0].startswith("One network was trained")
    assert "with 10 filters in the target layer, for 1 epoch." in report.summary[0]
    assert report.summary[-1] == (
        "The training of PICNN diverged: its loss was NaN or infinity from epoch 3."
    )
    assert not isinstance(report.networks[0].grad_cam, str)
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    for values in saved["state_dict"].values():
        if values.is_floating_point():
            values.fill_(torch.nan)
    torch.save(saved, folder / "last.ckpt")
    report = summarise([folder], images=1, filters=1)
    assert report.summary[-1].endswith("from epoch 3 and its weights are NaN or infinity.")
    (network,) = report.networks
    pictures = ("ownership", "grad_cam", "confusion", "filters", "peaks", "localisation")
    assert {getattr(network, name) for name in pictures} == {"its weights are NaN or infinity"}
    assert "diverged: its loss was NaN or infinity from epoch 3" in render(report)


def test_an_older_report_is_replaced_by_a_whole_one_alone(tmp_path, monkeypatch):
    folder = make(tmp_path / "run")
    (folder / "report.html").write_text("old")

    def full(handle):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            write_report([folder], images=1, filters=0)
    assert (folder / "report.html").read_text() == "old"
    write_report([folder], images=1)
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_the_command_writes_where_it_is_told_and_says_so(tmp_path, capsys):
    folder = make(tmp_path / "run")
    output = tmp_path / "pages" / "page.html"
    assert cli.main(["report", str(folder), "--output", str(output), "--images", "2"]) == 0
    assert f"{output}: open it in a browser" in capsys.readouterr().out
    assert output.stat().st_size < 10_000_000
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "holds no last.ckpt; want a checkpoint" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--images", "0"]) == 2
    assert "images: got 0, want an integer >= 1" in capsys.readouterr().err


def test_pixels_are_shown_as_before_they_were_normalised(tmp_path):
    data = {"name": "part-animals", "image_size": 32, "train_images": 6, "test_images": 12}
    folder = make(tmp_path / "run", backbone="small-cnn", data=data)
    trained = summary._read(folder / "last.ckpt", folder)
    shown = summary._Data().shown(trained, 3)
    module = run.build_data(trained.options)
    raw = torch.stack([module.test_set[i][0] for i in range(12)])
    for image, taken in zip(shown.images, shown.taken, strict=True):
        assert (raw - image).abs().amax((1, 2, 3)).min() < 1e-5
        torch.testing.assert_close(module.normalise(image[None])[0], taken)
    assert len(set(shown.labels.tolist())) == 3


def _index(owner, owned, information):
    """What ``_standing`` reads of an index."""
    return SimpleNamespace(
        owner=torch.tensor(owner),
        owned=torch.tensor(owned),
        mutual_information=torch.tensor(information),
        num_filters=len(owner),
        num_classes=len(information),
    )


def test_a_filter_that_stands_for_the_class_is_shown_or_else_the_one_that_tells_most():
    index = _index([0, 0, 1, -1], [0.6, 0.9, 0.4, 0.0], [[0.5, 0.1, 0.1, 0], [0.2, 0.9, 0.3, 0.4]])
    assert summary._standing(index, 2) == [1, 3]  # 1 is taken, and no share of class 1 is half
    assert summary._standing(index, 1) == [1]
    assert len(set(summary._standing(index, 9))) == 4


def test_filters_are_looked_at_once_and_only_where_asked(tmp_path, monkeypatch):
    folder = make(tmp_path / "run")
    first = summarise([folder], images=1, filters=2).networks[0].filters
    assert [row.above.partition(" stands")[0][:6] for row in first.rows[::2]] == ["Filter"] * 2
    monkeypatch.setattr(filter_index, "filter_index", None)  # a second pass would fail
    again = summarise([folder], images=1, filters=2).networks[0].filters
    assert [row.above for row in again.rows] == [row.above for row in first.rows]
    assert summarise([folder], images=1, filters=0).networks[0].filters == (
        "no filters were asked for"
    )


def test_the_class_without_whose_filters_it_is_measured_is_each_of_few(tmp_path):
    report = summarise([make(tmp_path / "a"), make(tmp_path / "b", "std")], images=1, filters=0)
    picnn, std = (network.confusion for network in report.networks)
    assert list(picnn.without) == list(std.without) == list(range(10))
    assert picnn.complete.sum() == 360
    assert picnn.said == "A class's filters are those of which it keeps more than half."
    assert std.said == "A class's filters are the tenth that its images activate most."
    assert set(std.removed.values()) == {1}  # of ten filters


def test_objects_are_localised_where_the_data_has_their_masks(tmp_path):
    data = {"name": "part-animals", "image_size": 32, "train_images": 6, "test_images": 12}
    folders = [make(tmp_path / "a", backbone="small-cnn", data=data), make(tmp_path / "b")]
    animals, digits = summarise(folders, images=2, filters=0).networks
    assert [len(row.pictures) for row in animals.localisation.rows] == [3, 3]
    assert digits.localisation == "the data has no masks of objects"


def test_pictures_are_of_the_first_networks_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "_MOST_PICTURED", 1)
    folders = [make(tmp_path / name, method) for name, method in (("a", "picnn"), ("b", "std"))]
    first, second = summarise(folders, images=1, filters=0).networks
    assert not isinstance(first.peaks, str)
    assert second.peaks == second.confusion == "pictures are of the first 1 networks alone"
    assert second.ownership.shape == (10, 10)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"explainer"}))
def test_every_method_has_a_page(tmp_path, method):
    data = {"name": "part-animals", "image_size": 32, "train_images": 6, "test_images": 12}
    folder = make(tmp_path / "run", method, backbone="small-cnn", data=data, num_filters=12)
    (network,) = summarise([folder], images=2, filters=2).networks
    ingredients = dataclasses.asdict(network)
    reasons = {name for name, value in ingredients.items() if isinstance(value, str)}
    wanted = {"name", "ownership_meaning"} | ({"grad_cam"} if method == "iccnn" else set())
    assert reasons == wanted


def test_an_explainer_has_a_page_on_the_run_it_explains(tmp_path):
    data = {"name": "part-animals", "image_size": 32, "train_images": 6, "test_images": 12}
    of = make(tmp_path / "of", "std", backbone="small-cnn", data=data, num_filters=12)
    explainer = {"name": "explainer", "performer": str(of)}
    folder = make(tmp_path / "run", explainer, data=data, num_filters=None)
    path = write_report([folder], images=2, filters=2)
    assert "Explainer gives no filter to a class" in path.read_text()


def test_figures_of_other_data_are_not_ranked(tmp_path):
    data = {"name": "digits", "max_shift": 0}
    folders = [make(tmp_path / "a", seed=1), make(tmp_path / "b", "std", data=data)]
    report = summarise(folders, images=1, filters=0)
    assert not any(cell.best for row in report.figures for cell in row.cells)
    assert report.summary[-1].endswith("so that their figures do not compare.")


def test_options_are_told_apart_by_more_than_the_seed():
    one = Options(seed=0, data="digits")
    other = dataclasses.replace(one, seed=1, output="elsewhere")
    assert summary._without_seed(one) == summary._without_seed(other)
    assert summary._without_seed(one) != summary._without_seed(dataclasses.replace(one, epochs=2))
