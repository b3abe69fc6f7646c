"""The benchmark scripts run from end to end where there is no GPU, and write nothing then."""

import json
import math
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

import picnn_fast
from benchmarks import (
    bias,
    calls,
    correlation,
    filter_loss,
    harness,
    masking,
    mutual_information,
    overhead,
)


def test_the_bias_script_runs_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = json.loads((harness.RESULTS / f"{bias.NAME}.json").read_text())
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    bias.main(["--smoke"])
    assert "closed form" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    bias.draw(committed, tmp_path / "bias.png")
    assert [path.name for path in tmp_path.iterdir()] == ["bias.png"]


def test_the_closed_form_agrees_with_known_values() -> None:
    def normals(*means: float, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
        centres = torch.tensor(means, dtype=torch.float64)
        return centres, torch.full_like(centres, deviation)

    # Two levels in Gaussian noise carry half a bit at sigma = 0.97869, the Shannon limit of
    # codes of rate 1/2.
    threshold = bias.closed_form(*normals(-1, 1, deviation=0.97869), "label")
    assert threshold == pytest.approx(0.5 * math.log(2), abs=1e-5)
    assert bias.closed_form(*normals(0, 0, 0, deviation=2), "label") == pytest.approx(0, abs=1e-12)
    apart = normals(0, 100, 200, 300, deviation=1)
    assert bias.closed_form(*apart, "label") == pytest.approx(math.log(4), abs=1e-9)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert bias.closed_form(*apart, "class") == pytest.approx(entropy, abs=1e-9)


def test_every_operator_is_called_beside_a_plain_expression_of_the_same_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = calls.Tiny(torch.device("cpu"))
    ours, plain = tiny.ours(), tiny.plain()
    assert list(ours) == list(plain)
    for name, output in ours.items():
        # A mean over filters where a user wants one, else what is ours.
        assert plain[name]().shape in (output().shape, ())
    threads = torch.get_num_threads()
    calls.main(["--smoke", "--results", str(tmp_path)])
    assert torch.get_num_threads() == threads
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["calls"]
    assert all(row["over_plain"] > 0 for row in rows[: len(ours) + 1])
    assert [row["name"] for row in rows] == [*ours, *tiny.floors()]
    assert torch.equal(tiny.floors()[calls.KERNELS](), ours["template_mask"]())
    assert "| `class_gate` " in capsys.readouterr().out


def test_candidates_are_timed_in_turn() -> None:
    order: list[str] = []
    times = harness.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        device=torch.device("cpu"),
        warmup=1,
    )
    assert "".join(order) == "ab" * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_shuffled_candidates_have_one_turn_a_round_in_orders_that_differ() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    device = torch.device("cpu")
    harness.interleaved(candidates, rounds=6, device=device, warmup=0, shuffled=True)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_ratios_are_medians_over_rounds() -> None:
    times = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 3.0, 2.0]}
    assert harness.ratio(times, "slow", "fast") == 2.0


def test_results_are_written_after_every_measurement_and_name_command_and_machine(
    tmp_path: Path,
) -> None:
    seen = []

    def run(device, *, smoke, measure):
        for count in (1, 2):
            with measure({"late": [0.5] * count}, "late"):
                pass
            (path,) = tmp_path.iterdir()
            seen.append((path, json.loads(path.read_text())))
        return {"late": [0.5] * 3}

    harness.command_line("family", "", run, str, ["--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name == f"family-{harness.machine_name(torch.device('cpu'))}.json"
    assert content["command"] == "python -m benchmarks.family --device cpu"
    assert content["machine"]["torch"] == torch.__version__
    assert "complete" not in content
    assert [len(partial["late"]) for _, partial in seen] == [1, 2]
    assert all(partial["complete"] is False for _, partial in seen)
    assert {earlier for earlier, _ in seen} == {path}


def test_a_measurement_that_fails_costs_no_other_and_is_named_at_the_end(tmp_path: Path) -> None:
    def run(device, *, smoke, measure):
        results = {"late": []}
        with measure(results, "first"):
            raise ValueError("no luck\nat all")
        with measure(results, "second"):
            times = harness.interleaved(
                {"compiled": lambda: None, "triton": lambda: 1 / 0}, 2, device
            )
            results["late"].append(harness.ratio(times, "compiled", "compiled"))
            assert math.isnan(harness.ratio(times, "triton", "compiled"))
            assert math.isnan(harness.summary(times["triton"])["median"])
        return results

    with pytest.raises(SystemExit) as ended:
        harness.command_line("family", "", run, str, ["--results", str(tmp_path)])
    first, second = ended.value.code.splitlines()
    assert first == "failed: first: ValueError: no luck"
    assert second == "failed: second, triton: ZeroDivisionError: division by zero"
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert content["late"] == [1.0]
    assert list(content["errors"]) == ["first", "second, triton"]


@pytest.mark.parametrize("family", [calls, masking, mutual_information, filter_loss, correlation])
def test_a_family_reports_even_if_all_its_measurements_fail(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("no luck")

    monkeypatch.setattr(harness, "interleaved", broken)
    for name in ("bench_memory", "knn_candidates"):
        monkeypatch.setattr(family, name, broken, raising=False)
    with pytest.raises(SystemExit) as ended:
        family.main(["--smoke"])
    lines = ended.value.code.splitlines()
    assert lines
    assert all(line.endswith(": RuntimeError: no luck") for line in lines)
    assert "forward + backward" in capsys.readouterr().out


def test_results_go_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(device, *, smoke, measure):
        return {}

    monkeypatch.setattr(harness, "RESULTS", tmp_path / "default")
    harness.command_line("family", "", run, str, [])
    monkeypatch.setenv(harness.VARIABLE, str(tmp_path / "variable"))
    harness.command_line("family", "", run, str, [])
    harness.command_line("family", "", run, str, ["--results", str(tmp_path / "option")])
    harness.command_line("family", "", run, str, ["--smoke"])
    folders = {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir()}
    assert folders == {"default": 1, "variable": 1, "option": 1}


def test_the_device_sleeps_one_and_a_half_times_as_long_as_the_host_takes_to_launch() -> None:
    assert harness.sleep_cycles(200e-6, 1e9) == pytest.approx(300_000, abs=1)
    longest = int(harness.LONGEST_SLEEP_SECONDS * 1e9)
    assert harness.sleep_cycles(30.0, 1e9) == longest


def test_a_gpu_is_timed_by_its_events_or_by_the_host_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that counts a thousand cycles a millisecond, and works 5 ms a call."""
    work = {"done": 0.0, "queued": 0.0, "sleeps": []}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = work["queued"]

        def synchronize(self) -> None:
            work["done"] = work["queued"]

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    def sleep(cycles: int) -> None:
        work["queued"] += cycles / 1e6
        work["sleeps"].append(cycles)

    def synchronize(device: torch.device) -> None:
        work["done"] = work["queued"]

    def call() -> None:
        work["queued"] += 5e-3
        time.sleep(1e-3)  # launches

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    harness.clock_rate.cache_clear()
    device = torch.device("cuda")
    try:
        assert harness.clock_rate(device) == pytest.approx(1e6)
        work["sleeps"].clear()
        times = harness.interleaved({"call": call}, 3, device, warmup=2)
    finally:
        harness.clock_rate.cache_clear()
    assert times["call"] == pytest.approx([5e-3] * 3)
    assert len(work["sleeps"]) == 3
    assert all(1500 <= cycles <= 20_000 for cycles in work["sleeps"])
    work["sleeps"].clear()
    times = harness.interleaved({"call": call}, 2, device, warmup=1, wall=True)
    assert min(times["call"]) >= 1e-3
    assert work["done"] == work["queued"]
    assert not work["sleeps"]


def test_triton_is_timed_beside_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    calls = {"fused": lambda: None, "plain": lambda: None}
    everywhere = ("reference", "cpp", "triton", "cuda")
    monkeypatch.setattr(picnn_fast, "available_backends", lambda: everywhere)
    candidates, backends = harness.beside_triton(calls, ("fused",), torch.device("cuda"))
    assert list(candidates) == ["fused", "plain", "fused, triton"]
    assert backends == {"fused, triton": "triton"}
    times = {"fused": [2.0, 2.0], "plain": [9.0, 9.0], "fused, triton": [3.0, 3.0]}
    entry = {"shape": "a shape", **harness.triton_ratios(times)}
    assert entry["triton_over_compiled"] == {"fused": 1.5}
    (shown,) = harness.triton_tables("family", [entry])
    assert "| a shape                      | 1.50x |" in shown
    # Where Triton serves by itself there is nothing to set beside it.
    for some in (("reference", "cpp"), ("reference", "triton")):
        monkeypatch.setattr(picnn_fast, "available_backends", lambda some=some: some)
        assert harness.beside_triton(calls, ("fused",), cpu) == (calls, {})


def test_compiled_and_triton_kernels_are_timed_by_the_hosts_clock_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def interleaved(candidates, rounds, device, *, backends, wall):
        seen.update(names=list(candidates), rounds=rounds, backends=backends, wall=wall)
        return {name: [2e-3] * rounds for name in candidates}

    monkeypatch.setattr(harness, "interleaved", interleaved)
    calls = dict.fromkeys(("fused", "plain", "copy", "fused, triton"), lambda: None)
    backends = {"fused, triton": "triton"}
    device = torch.device("cuda")
    effort = harness.Effort.of(7, device, smoke=False)
    entry = harness.wall_times(calls, ("fused",), effort, device, backends)
    assert seen == {
        "names": ["fused", "fused, triton"],
        "rounds": 7,
        "backends": backends,
        "wall": True,
    }
    (shown,) = harness.triton_tables("family", [{"shape": "a shape", **entry}])
    assert "family, wall time" in shown
    assert "| 2.00 ms | 2.00 ms       |" in shown
    # On a CPU the first times are the host's already.
    cpu = torch.device("cpu")
    assert not harness.wall_times(
        calls, ("fused",), harness.Effort.of(7, cpu, smoke=False), cpu, {}
    )


def test_steps_are_measured_over_the_plain_network_and_by_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overhead.main(["--smoke", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (entry,) = content["classes"]
    assert (entry["classes"], entry["filters"]) == (10, 128)
    assert set(entry["milliseconds"]) == {"plain", "std", "picnn"}
    for name in ("std_over_plain", "picnn_over_std", "picnn_over_plain"):
        assert 0 < entry[name]["q1"] <= entry[name]["median"] <= entry[name]["q3"]
    assert set(content["forms"]["speedup"]) == set(overhead.FORMS)
    assert content["forms"]["speedup"]["contiguous"]["median"] == 1
    assert "PICNN over plain" in capsys.readouterr().out


def test_every_method_is_measured_over_the_plain_backbone_and_over_its_target_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overhead.main(["--smoke", "--table", "backbones", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("overhead-backbones-")
    content = json.loads(path.read_text())
    assert content["command"].endswith("--table backbones")
    assert not {"classes", "forms"} & content.keys()
    (entry,) = content["backbones"]
    for phase in ("training", "inference"):
        of = entry[phase]
        assert {"picnn", "csg", "icnn"} <= {*of["over_std"]}
        assert {*of["over_plain"]} == {"std", *of["over_std"]}
        for ratios in (of["over_plain"], of["over_std"]):
            assert all(0 < r["q1"] <= r["median"] <= r["q3"] for r in ratios.values())
    assert {*entry["behind"]["added_to_std"]} == {*entry["training"]["over_std"]}
    shown = capsys.readouterr().out
    assert "| training " in shown
    assert "| added to STD " in shown
    assert "| inference " in shown
