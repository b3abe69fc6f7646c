"""FIGURES, and the loop that walks them over a test split."""

import dataclasses
import time
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from torch.utils.data import TensorDataset
from torchmetrics import Metric

from picnn_fast import evaluation
from picnn_fast.backbones.receptive_field import receptive_field
from picnn_fast.data import DATA, SeededDataModule
from picnn_fast.evaluation import (
    FIGURES,
    Figure,
    NotFiniteError,
    as_csv,
    default_figures,
    differences,
    evaluate,
    figures,
    format_figure,
    format_figures,
    measure,
    read_figures,
)
from picnn_fast.metrics import (
    CalibrationError,
    LocationInstability,
    MeanOverDraws,
    PartInterpretability,
    draw_counts,
)
from picnn_fast.models import make_interpretable
from picnn_fast.models.base import InterpretableNetwork

PERFORMER = {"location_instability_performer", "location_instability_top", "p", "more_errors"}
PARTS = {name for name in FIGURES if name.startswith(("location", "part"))} - PERFORMER
OBJECTS = {"activmap_iou", "activmap_ap30", "cam_iou", "cam_ap30"}


def _animals(**options):
    data = DATA["part-animals"](
        batch_size=5, seed=0, image_size=32, train_images=6, **{"test_images": 12, **options}
    )
    data.setup()
    return data


def _network(classes=6):
    torch.manual_seed(0)
    return make_interpretable("small-cnn", "icnn", num_classes=classes, num_filters=8)


@pytest.fixture(scope="module")
def digits():
    data = DATA["digits"](batch_size=64, seed=0)
    data.setup()
    torch.manual_seed(0)
    return make_interpretable("small-resnet", "picnn", num_classes=10, num_filters=8), data


def test_every_record_is_a_number_or_says_why_not(digits):
    values = evaluate(*digits)
    read_figures(values)
    absent = {name for name in default_figures() if isinstance(values[name], str)}
    # Of a network that is not trained too few are right.
    assert absent == PARTS | PERFORMER | OBJECTS | {"density", "pointing_game"}
    drawn = {"acc2", "acc3", "leakage", "pseudo_label_leakage"}
    assert {name for name in values if name not in FIGURES} == {
        *(f"{name}_standard_error" for name in drawn),
        # Redundancy is of the weights alone, whatever the images.
        *(f"{name}_interval" for name in {*default_figures()} - absent - {"filter_redundancy"}),
    }
    assert values["location_instability"] == "n/a: the data has no part annotations"


def test_an_interval_is_that_of_images_drawn_again(digits):
    """A loop that repeats each image's answer as often as it is drawn."""
    network, data = digits
    right = []
    with torch.no_grad():
        for images, labels in data.test_dataloader():
            right += (network.eval()(images).logits.argmax(1) == labels).tolist()
    found = measure(network, data, figures=["acc1"], resamples=200)
    (counts,) = draw_counts(len(right), 200)
    each = []
    for times in counts.tolist():
        drawn = [r for r, n in zip(right, times, strict=True) for _ in range(n)]
        each.append(sum(drawn) / len(drawn))
    assert found.replicates["acc1"].tolist() == pytest.approx(each)
    assert found.figures["acc1_interval"] == pytest.approx(np.percentile(each, [2.5, 97.5]))
    assert found.images == 360


def test_without_resamples_there_are_no_intervals(digits):
    for values in (
        evaluate(*digits, figures=["acc1", "mis"], intervals=False),
        measure(*digits, figures=["acc1", "mis"], resamples=0).figures,
    ):
        assert list(values) == ["acc1", "mis"]
    with_them = evaluate(*digits, figures=["acc1", "mis"])
    assert [k for k in with_them if k in FIGURES] == ["acc1", "mis"]
    assert values.items() <= with_them.items()


def test_every_part_figure_has_an_interval_that_holds_it():
    values = evaluate(_network(), _animals(test_images=36))
    for name in PARTS:
        low, high = values[f"{name}_interval"]
        assert low <= values[name] <= high


def test_a_figure_of_weights_alone_has_no_interval(digits):
    network = make_interpretable("small-resnet", "csg", num_classes=10, num_filters=8)
    assert list(evaluate(network, digits[1], figures=["density"])) == ["density"]


def test_differences_are_paired_by_image(digits):
    network, data = digits
    torch.manual_seed(1)
    other = make_interpretable("small-resnet", "std", num_classes=10, num_filters=8)
    names = ["acc1", "mis", "density", "p"]
    one, two = (measure(n, data, figures=names, resamples=100) for n in (network, other))
    apart = differences([one], [two])
    assert apart.keys() == {"acc1", "mis", "acc1_interval", "mis_interval"}
    assert apart["acc1"] == one.figures["acc1"] - two.figures["acc1"]
    each = (one.replicates["mis"] - two.replicates["mis"]).tolist()
    assert apart["mis_interval"] == pytest.approx(np.percentile(each, [2.5, 97.5]))
    itself = differences([one, two], [two, one])
    for name in ("acc1", "mis"):
        assert itself[name] == 0
        assert itself[f"{name}_interval"] == [0, 0]
    mean = differences([one, two], [two])
    assert mean["mis"] == pytest.approx(apart["mis"] / 2)
    assert mean["mis_interval"] == pytest.approx([end / 2 for end in apart["mis_interval"]])


def test_figures_of_which_one_costs_much_are_compared_by_the_resamples_that_both_have(digits):
    one = measure(*digits, figures=["acc1"], resamples=100)
    other = measure(*digits, figures=["acc1"], resamples=40)
    assert torch.equal(one.replicates["acc1"][:40], other.replicates["acc1"])
    assert differences([one], [other])["acc1_interval"] == [0, 0]


def test_fewer_resamples_are_drawn_of_what_costs_much(monkeypatch):
    monkeypatch.setattr(LocationInstability, "most_resamples", property(lambda self: 7))
    found = measure(_network(), _animals(test_images=36), resamples=20)
    counts = {name: len(each) for name, each in found.replicates.items()}
    assert {counts[name] for name in PARTS if name.startswith("location")} == {7}
    assert counts["acc1"] == counts["part_interpretability"] == 20
    # Its resamples lie about the figure.
    name = "location_instability"
    assert found.replicates[name].mean().item() == pytest.approx(found.figures[name])


def test_other_images_are_not_compared(digits):
    network, data = digits
    one = measure(network, data, figures=["acc1"])
    same = measure(network, DATA["digits"](batch_size=7, seed=4), figures=["acc1"])
    assert one.split == same.split
    changed = DATA["digits"](batch_size=64)
    images, labels = changed.test_set[:]
    images = images.clone()
    images[5, 0, 3, 3] += 1e-3
    changed.test_set = torch.utils.data.TensorDataset(images, labels)
    other = measure(network, changed, figures=["acc1"])
    assert other.split != one.split
    with pytest.raises(ValueError, match="got 1 and 1 measurements of 2 sets of test images"):
        differences([one], [other])
    with pytest.raises(ValueError, match="got 0 and 1 measurements"):
        differences([], [one])


def test_the_time_of_each_figure_is_told(digits, monkeypatch):
    names = _recorded(monkeypatch)
    slow = dataclasses.replace(
        FIGURES["acc1"],
        update=lambda metric, seen: (time.sleep(0.02), metric.update(seen.logits, seen.labels)),
    )
    monkeypatch.setitem(FIGURES, "slow", slow)
    found = measure(*digits, figures=["slow", "p", *names])
    assert found.seconds.keys() == {"images", "forward", "slow", names[0]}
    assert 0.12 < found.seconds["slow"] < 1
    assert found.seconds["forward"] > 0
    assert "slow" in found.replicates


def test_figures_repeat_with_the_seed_whatever_was_drawn_before(digits):
    torch.manual_seed(1)
    first = evaluate(*digits, seed=3, draws=2)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert evaluate(*digits, seed=3, draws=2) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_mis_of_the_test_split_is_scikit_learns(digits):
    network, data = digits
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        pooled = network.eval().filter_maps(images).mean((2, 3)).double().numpy()
    rows = [
        mutual_info_classif(pooled, labels == c, discrete_features=False, random_state=0)
        for c in range(10)
    ]
    expected = np.stack(rows).max(0).mean()
    assert evaluate(network, data)["mis"] == pytest.approx(expected, abs=1e-6)


def test_calibration_is_of_the_confidence_in_all_test_images(digits):
    network, data = digits
    values = evaluate(network, data, figures=["calibration_error", "negative_log_likelihood"])
    logits = torch.cat([network(images).logits for images, _ in data.test_dataloader()])
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for low in range(15):
        held = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        error += ((predicted == labels).double() - confidence)[held].sum().abs().item() / 360
    assert values["calibration_error"] == pytest.approx(error, abs=1e-6)
    own = probabilities[torch.arange(360), labels]
    assert values["negative_log_likelihood"] == pytest.approx(-own.log().mean().item())


def test_the_interval_of_calibration_takes_off_what_chance_adds():
    """A network that is sure of as much as it is right has the error of chance alone."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=draw)
    logits = 2 * torch.randn(400, 3, generator=draw)
    logits[torch.arange(400), labels] += 4.0  # softmax(2 z), z of a normal about 2 at the label
    data = SeededDataModule(batch_size=64, num_workers=0, seed=0)
    data.num_classes = data.in_channels = 3
    data.class_names = ["a", "b", "c"]
    data.train_set = data.test_set = TensorDataset(logits[:, :, None, None], labels)
    parts = (torch.nn.Identity(), torch.nn.Flatten())
    network = make_interpretable(parts, "std", num_classes=3, num_filters=3, insert_conv=False)
    found = measure(network, data, figures=["calibration_error"])
    error, (low, high) = (found.figures["calibration_error" + end] for end in ("", "_interval"))
    metric = CalibrationError(3)
    metric.update(logits, labels)
    each = torch.cat([metric.replicate(counts) for counts in draw_counts(400, 1000)])
    assert error == pytest.approx(metric.compute().item())
    assert each.mean() > error + 0.01
    ends = (2 * error - each).clamp_min(0).quantile(torch.tensor([0.025, 0.975]).double())
    assert [low, high] == pytest.approx(ends.tolist())
    assert 0 <= low < error


def test_speed_is_measured_where_it_is_asked_for_and_draws_nothing(digits):
    names = ["throughput", "throughput_plain", "overhead"]
    assert not set(names) & set(default_figures())
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    values = evaluate(*digits, figures=names)
    assert torch.equal(torch.rand(3), wanted)
    assert list(values) == names
    ratio = values["throughput_plain"] / values["throughput"]
    assert values["overhead"] == pytest.approx(ratio, rel=0.5)


def test_a_method_without_ownership_has_no_figure_that_needs_it(digits, monkeypatch):
    network, data = digits
    monkeypatch.setattr(type(network), "ownership", InterpretableNetwork.ownership)
    values = evaluate(network, data)
    for name in ("acc2", "acc3", "leakage", "pseudo_label_leakage"):
        assert values[name] == "n/a: PICNN gives no filter to a class"
    assert isinstance(values["acc1"], float)


def test_part_figures_are_the_metrics_of_all_test_images():
    network, data = _network(), _animals()
    values = evaluate(network, data)
    samples = data.part_sets["test"]
    field = receptive_field(network.features, samples.image_size)
    wanted = {
        "location_instability": (LocationInstability, samples.landmark_names, "landmarks"),
        "part_interpretability": (PartInterpretability, samples.part_names, "part_masks"),
    }
    for name, (kind, names, annotation) in wanted.items():
        metric = kind(network.num_filters, len(names), field, num_classes=6)
        with torch.no_grad():
            for batch in data.part_loader("test"):
                maps = network.filter_maps(data.normalise(batch.image))
                metric.update(maps, getattr(batch, annotation), batch.label)
        assert values[name] == metric.compute().item()


def test_filters_that_ignore_the_image_are_measured_beside():
    network, data = _network(), _animals(test_images=24)
    values = evaluate(network, data)
    samples = data.part_sets["test"]
    field = receptive_field(network.features, samples.image_size)
    # A peak at one place, whatever the image: the spread of the landmarks about it alone.
    height, width = field.map_size
    place = torch.zeros(1, 1, height, width)
    place[0, 0, height // 2, width // 2] = 1
    middle = field.peaks(place)[1][0, 0]
    landmarks = torch.stack([samples[i].landmarks for i in range(24)])
    labels = torch.tensor([samples.label(i) for i in range(24)])
    distances = (landmarks - middle).norm(dim=-1)
    spread = torch.stack([distances[labels == c].std(0) for c in range(6)]).nanmean(1)
    diagonal = 32 * 2**0.5
    expected = (spread / diagonal).min().item()
    assert values["location_instability_middle"] == pytest.approx(expected, rel=1e-5)
    assert values["location_instability_random"] > values["location_instability_middle"]


def test_parts_of_one_category_are_measured_on_its_images_alone():
    data = _animals(test_images=18)
    cow = data.class_names.index("cow")
    data.single_out("cow")
    network = _network(2).eval()
    samples = data.part_sets["test"]
    field = receptive_field(network.features, samples.image_size)
    metric = LocationInstability(network.num_filters, len(samples.landmark_names), field)
    with torch.no_grad():
        for batch in data.part_loader("test"):
            cows = batch.label == cow
            if cows.any():
                maps = network.filter_maps(data.normalise(batch.image[cows]))
                metric.update(maps, batch.landmarks[cows])
    assert evaluate(network, data)["location_instability"] == metric.compute().item() > 0


def test_what_too_few_images_cannot_tell_says_so():
    values = evaluate(_network(), _animals(test_images=6))  # one a class
    for name in PARTS - {"part_interpretability"}:
        assert values[name] == "n/a: too few images of it to tell"
    assert isinstance(values["part_interpretability"], float)


def test_a_category_without_test_images_has_no_part_figures():
    data = _animals(test_images=4)
    data.single_out("sheep")
    values = evaluate(_network(2), data)
    assert {values[name] for name in PARTS} == {"n/a: the test split has no image of it"}


def test_maps_too_many_to_keep_are_not_kept(monkeypatch):
    monkeypatch.setattr(figures.parts, "MOST_MAP_BYTES", 1000)
    values = evaluate(_network(), _animals())
    assert values["part_interpretability"].startswith("n/a: the maps of 12 images would take more")
    assert isinstance(values["location_instability"], float)


def test_a_record_added_is_measured_and_shown(digits, monkeypatch):
    class Fixed(torch.nn.Module):
        update_called = True

        def compute(self):
            return torch.tensor(0.25)

    record = dataclasses.replace(
        FIGURES["acc1"], metric=lambda *a: Fixed(), update=lambda metric, seen: None
    )
    monkeypatch.setitem(FIGURES, "quarter", record)
    values = evaluate(*digits)
    assert format_figure(values, "quarter") == "0.250"
    assert read_figures(values) == values
    values["quarter"] = None
    with pytest.raises(ValueError, match="quarter is None, want a number"):
        read_figures(values)


def test_a_figure_that_is_new_is_not_available_of_figures_written_before():
    written = {"acc1": 0.5, "acc2": 0.25, "acc2_standard_error": 0.125, "gone": "whatever"}
    figures = read_figures(written)
    assert {name: figures[name] for name in written} == written
    new = set(default_figures()) - written.keys()
    assert all(figures[name].startswith("n/a: ") for name in new)
    assert format_figure(figures, "mis") == "n/a"


def test_figures_are_written_with_their_standard_error():
    values = {"acc2": 0.5, "acc2_standard_error": 0.0125, "acc3": "n/a: none", "acc1": 1.0}
    assert [format_figure(values, name) for name in ("acc1", "acc2", "acc3", "mis")] == [
        "1.000",
        "0.500 ± 0.013",
        "n/a",
        "n/a",
    ]


def test_figures_of_several_runs_are_written_as_mean_and_standard_deviation():
    runs = [{"acc1": 0.5, "acc3": 0.5}, {"acc1": 0.7, "acc3": "n/a: none"}]
    assert format_figures(runs, "acc1") == "0.600 ± 0.141"
    assert [format_figures(runs, name) for name in ("acc3", "mis")] == ["n/a", "n/a"]
    one = {"acc2": 0.5, "acc2_standard_error": 0.0125}
    assert format_figures([one], "acc2") == "0.500 ± 0.013"


def test_figures_as_csv_are_in_the_order_of_the_tables_with_their_intervals():
    rows = [
        {"method": "a", "mis": 0.25, "acc2": 0.5, "acc2_standard_error": 0.125, "more": 1},
        {"method": "b", "acc2": "n/a: none", "mis": 0.75, "mis_interval": [0.5, 1.0]},
    ]
    assert as_csv(rows, ["method"]) == (
        "method,acc2,acc2_standard_error,mis,mis_low,mis_high\n"
        "a,0.5,0.125,0.25,,\n"
        "b,n/a: none,,0.75,0.5,1.0\n"
    )


def test_the_density_is_that_of_the_gate(digits):
    torch.manual_seed(0)
    network = make_interpretable("small-resnet", "csg", num_classes=10, num_filters=8)
    with torch.no_grad():
        network.gate.copy_(torch.rand(10, 8))
    expected = (network.gate / network.gate.amax(0)).mean().item()
    assert evaluate(network, digits[1])["density"] == pytest.approx(expected, rel=1e-6)
    assert evaluate(*digits)["density"] == "n/a: PICNN has no gate"


class Parts(NamedTuple):
    images: torch.Tensor
    mean: MeanOverDraws


class Recorder(Metric):
    """Notes what it is told, and computes two parts of it."""

    made: ClassVar[list[Metric]] = []

    def __init__(self):
        super().__init__()
        self.prepared, self.updated = [], []
        self.made.append(self)

    def update(self, seen):
        self.updated.append(seen)

    def compute(self):
        brightness = torch.cat([seen.images.mean((1, 2, 3)) for seen in self.updated])
        mean = MeanOverDraws(brightness.mean(), torch.tensor(0.25))
        return Parts(torch.tensor(float(len(brightness))), mean)


def _recorded(monkeypatch, **options):
    """Two figures that are parts of one metric."""
    monkeypatch.setattr(Recorder, "made", [])
    shared = dict(
        FIGURES["mis"].__dict__,
        metric=lambda network, data, draws: Recorder(),
        update=lambda metric, seen: metric.update(seen),
        prepare=lambda metric, seen: metric.prepared.append(seen),
        when="asked",
        **options,
    )
    for part in Parts._fields:
        monkeypatch.setitem(FIGURES, f"recorded_{part}", Figure(**shared | {"part": part}))
    return [f"recorded_{part}" for part in Parts._fields]


def test_figures_of_one_metric_are_its_parts_and_see_each_image_once(digits, monkeypatch):
    network, data = digits
    values = evaluate(network, data, figures=_recorded(monkeypatch))
    images = torch.cat([images for images, _ in data.test_dataloader()])
    assert values == {
        "recorded_images": 360.0,
        "recorded_mean": pytest.approx(images.mean().item()),
        "recorded_mean_standard_error": 0.25,
    }
    (metric,) = Recorder.made
    for told in (metric.prepared, metric.updated):
        assert torch.equal(torch.cat([seen.images for seen in told]), images)


def test_all_images_are_prepared_before_the_first_update(digits, monkeypatch):
    names, order = _recorded(monkeypatch), []
    for name in names:
        figure = dataclasses.replace(
            FIGURES[name],
            prepare=lambda metric, seen: order.append("prepare"),
            update=lambda metric, seen: (order.append("update"), metric.update(seen)),
        )
        monkeypatch.setitem(FIGURES, name, figure)
    evaluate(*digits, figures=names[:1])
    assert order == ["prepare"] * 6 + ["update"] * 6


@pytest.mark.parametrize("most", [1, 7, 100, 359, 360, 1000])
def test_a_figure_of_few_images_sees_as_many_spread_evenly(digits, monkeypatch, most):
    network, data = digits
    values = evaluate(network, data, figures=["acc1", *_recorded(monkeypatch, images=most)])
    images = torch.cat([images for images, _ in data.test_dataloader()])
    want = [i * 360 // min(most, 360) for i in range(min(most, 360))]
    (metric,) = Recorder.made
    for told in (metric.prepared, metric.updated):
        assert torch.equal(torch.cat([seen.images for seen in told]), images[want])
        for seen in told:
            torch.testing.assert_close(seen.maps, network.filter_maps(seen.images))
    assert values["recorded_images"] == len(want)
    assert values["acc1"] == evaluate(network, data, figures=["acc1"])["acc1"]


def test_parts_of_few_images_are_those_of_the_images(monkeypatch):
    data = _animals(test_images=12)
    evaluate(_network(), data, figures=_recorded(monkeypatch, images=5))
    (metric,) = Recorder.made
    samples = [data.part_sets["test"][i * 12 // 5] for i in range(5)]
    parts = [seen.parts for seen in metric.updated]
    for name in ("image", "landmarks", "part_masks", "object_mask"):
        got = torch.cat([getattr(part, name) for part in parts])
        want = torch.stack([getattr(sample, name) for sample in samples])
        assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1))


def test_what_is_asked_for_is_measured_alone_and_only_then(digits, monkeypatch):
    names = _recorded(monkeypatch)
    assert not set(names) & evaluate(*digits).keys()
    assert not set(names) & set(default_figures())
    named = evaluate(*digits, figures=["mis", "acc1"], intervals=False)
    assert list(named) == ["mis", "acc1"]
    with pytest.raises(ValueError, match=r"figures: got 'acc4', want one of .*did you mean 'acc"):
        evaluate(*digits, figures=["acc4"])
    assert read_figures({"acc1": 0.5}).keys() == set(default_figures())


def test_figures_of_one_metric_are_told_alike():
    """Else each would be updated by itself, at twice the cost."""
    for name, figure in FIGURES.items():
        for other in FIGURES.values():
            if other.metric is figure.metric and other.images == figure.images:
                assert (other.update, other.prepare) == (figure.update, figure.prepare), name


def test_a_figure_of_every_epoch_needs_no_pass_of_its_own():
    assert all(f.prepare is None for f in FIGURES.values() if f.when == "epoch")


def test_every_figure_says_how_it_is_read():
    for name, figure in FIGURES.items():
        reading = figure.reading
        assert (reading[0].isupper(), reading.endswith(".")) == (True, True), name
        assert figure.better in reading.lower(), name


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"acc1": "high"},
        dict.fromkeys(FIGURES, True),
        {"acc1": 1.0, "acc1_interval": [1.0]},
    ],
)
def test_what_are_no_figures_is_refused(values):
    with pytest.raises(ValueError, match=r"want (a|two)"):
        read_figures(values)


def test_bad_arguments_are_refused_by_name(digits):
    for options in ({"seed": -1}, {"draws": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: got"):
            evaluate(*digits, **options)
    assert evaluation.pool is not None


def test_masks_that_name_the_class_alone_are_remarked_upon():
    remark = FIGURES["leakage"].remark
    assert remark(0.9) is None
    assert "0.95" in remark(0.95)


def test_a_head_that_reads_which_filters_are_left_leaks_and_one_that_cannot_does_not(digits):
    """Maps all alike: behind a class's own filters they name it, and none by themselves."""
    _, data = digits
    torch.manual_seed(0)
    network = make_interpretable("small-resnet", "picnn", num_classes=10, num_filters=20)
    own = torch.eye(10).repeat_interleave(2, 1)
    for leak in (True, False):
        with torch.no_grad():
            network.correspondence.weight.copy_(200 * own)
            layer = network.head[-1]
            layer.weight.copy_(own if leak else own[0].expand_as(own))
            layer.bias.zero_()
        network.features = ConstantMaps()
        values = evaluate(network, data, draws=1)
        assert values["leakage"] == pytest.approx(1.0 if leak else 0.1, abs=0.01)


class ConstantMaps(torch.nn.Module):
    def forward(self, images):
        return images.new_ones(len(images), 20, 4, 4)


def test_a_network_that_diverged_is_refused():
    network = _network()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    said = "acc1: maps or logits of test image 0 are NaN or infinity, want finite .* diverged"
    with pytest.raises(NotFiniteError, match=said):
        evaluate(network, _animals(test_images=6), figures=["acc1"])


def test_the_first_image_that_a_network_makes_no_number_of_is_named(monkeypatch):
    """Of batches of 5, of each of which a figure of 4 images sees one or two."""
    network, data = _network(), _animals()
    few = dataclasses.replace(FIGURES["mis"], images=4)
    monkeypatch.setitem(FIGURES, "few", few)  # of images 0, 3, 6 and 9
    bright = data.normalise(torch.stack([data.test_set[i][0] for i in range(12)]))[9]
    encode = network.encode

    def fails(images):
        maps, bypass = encode(images)
        seen = (images == bright).flatten(1).all(1)
        return maps.where(~seen[:, None, None, None], torch.inf), bypass

    monkeypatch.setattr(network, "encode", fails)
    with pytest.raises(NotFiniteError, match=r"^few: maps .* of test image 9 are .* weights"):
        evaluate(network, data, figures=["few"])
    images = torch.stack([data.test_set[i][0] for i in range(12)])
    images[7] = torch.nan
    data = SeededDataModule(batch_size=5, num_workers=0, seed=0)
    data.train_set = data.test_set = TensorDataset(images, torch.arange(12) % 6)
    with pytest.raises(NotFiniteError, match=r"^acc1: .* test image 7 .* so is the image itself"):
        evaluate(_network(), data, figures=["acc1"])


def test_the_intervals_of_an_untrained_networks_information_are_about_it():
    found = measure(_network(), _animals(test_images=18), figures=["mis", "mis_miller_madow"])
    for name in ("mis", "mis_miller_madow"):
        assert found.replicates[name].mean().item() == pytest.approx(found.figures[name])
