"""Which backend serves, how one is forced, and what a missing one says."""

import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import picnn_fast
from picnn_fast import backends
from tests import conftest
from tests.conftest import (
    BACKENDS,
    GPU_BACKENDS,
    IN_CI,
    REQUIRED,
    Backend,
    Unavailable,
    expected_server,
    fibre_kernels,
    serve,
)

OPERATORS = {
    "bernoulli_mask",
    "bernoulli_parameters_backward",
    "class_gate",
    "draw_filters",
    "draw_labels",
    "filter_loss",
    "filter_loss_running",
    "group_correlation",
    "group_correlation_backward",
    "histogram_information",
    "histogram_information_backward",
    "histogram_update",
    "knn_mutual_information",
    "map_peaks",
    "mask_channels",
    "masking_backward",
    "soft_histogram",
    "soft_histogram_backward",
    "sums_by_label",
    "template_mask",
    "template_mask_backward",
}


def call() -> torch.Tensor:
    return picnn_fast.functional.class_gate(
        torch.ones(1, 2, 3, 3), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    )


def replace(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Change the record of a backend until the test ends."""
    changed = dataclasses.replace(backends.BACKENDS[name], **fields)
    monkeypatch.setitem(backends.BACKENDS, name, changed)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reference operators that ran since, in order."""
    names: list[str] = []

    def spy(name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            names.append(name)
            return function(*arguments)

        return run

    reference = backends.BACKENDS["reference"]
    wrapped = {name: spy(name, function) for name, function in reference.kernels().items()}
    replace(monkeypatch, "reference", kernels=lambda: wrapped)
    return names


def test_the_masking_operators_are_defined_with_a_schema():
    assert set(backends.operators()) >= OPERATORS
    for name in backends.operators():
        assert str(getattr(torch.ops.picnn_fast, name).default._schema).startswith("picnn_fast::")


def test_build_info_names_every_backend_and_operator():
    info = picnn_fast.build_info()
    assert set(info["backends"]) == {"reference", "cpp", "triton", "cuda"}
    assert info["backends"]["reference"] is None
    for name, reason in info["backends"].items():
        assert (name in picnn_fast.available_backends()) == (reason is None)
        assert reason is None or len(reason) > 10
    assert set(info["operators"]) >= OPERATORS
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    for serving in info["operators"].values():
        assert set(serving) == devices
        assert set(serving.values()) <= set(info["backends"])
    assert (info["extension"] is None) == (info["backends"]["cpp"] is not None)


def test_the_cpu_is_served_by_compiled_kernels_where_there_are_any():
    expected = "cpp" if backends.extension is not None else "reference"
    for name in backends.operators():
        assert backends.serving("cpu", name) == expected


def test_a_forced_backend_serves_every_operator_and_leaves(backend: Backend):
    if backend.name == "cuda-fibres":
        pytest.skip("installed by the tests, not by name")
    name = backend.name.removesuffix("-gpu").partition("-")[0]
    kind = backend.device.type
    with picnn_fast.use_backend(name):
        expected = dict.fromkeys(OPERATORS, expected_server(backend))
        assert {o: backends.serving(kind, o) for o in backends.operators()} == expected
        serving = picnn_fast.build_info()["operators"]
        assert {operator: by[kind] for operator, by in serving.items()} == expected


def test_the_forced_reference_really_runs(calls):
    before = backends.serving("cpu", "mask_channels")
    with picnn_fast.use_backend("reference"):
        call()
        assert calls == ["class_gate"]
    assert backends.serving("cpu", "mask_channels") == before
    call()
    assert calls == ["class_gate"]


def test_forced_backends_nest_and_come_back(calls, cpp: Backend):
    with picnn_fast.use_backend("reference"):
        with picnn_fast.use_backend("cpp"):
            assert backends.serving("cpu", "mask_channels") == "cpp"
            call()
            assert calls == []
            with picnn_fast.use_backend("reference"):
                call()
                assert len(calls) == 1
            call()
            assert len(calls) == 1
        assert backends.serving("cpu", "mask_channels") == "reference"
        call()
        assert len(calls) == 2
    assert backends.serving("cpu", "mask_channels") == "cpp"


def test_of_contexts_left_in_another_order_the_last_entered_is_in_charge(calls, cpp: Backend):
    first, second = picnn_fast.use_backend("reference"), picnn_fast.use_backend("cpp")
    with contextlib.ExitStack() as rest:
        rest.enter_context(second)
        with contextlib.ExitStack() as early:
            early.enter_context(first)
            rest.enter_context(picnn_fast.use_backend("cpp"))
        # The reference is left, and cpp, entered after it, is not.
        assert backends.serving("cpu", "mask_channels") == "cpp"
        with contextlib.ExitStack() as early:
            early.enter_context(picnn_fast.use_backend("cpp"))
            rest.enter_context(picnn_fast.use_backend("reference"))
        assert backends.serving("cpu", "mask_channels") == "reference"
        call()
    assert calls == ["class_gate"]
    assert backends.serving("cpu", "mask_channels") == "cpp"


def test_threads_that_force_backends_leave_none_behind(cpp: Backend):
    want, wrong = call(), []

    def switch(name: str) -> None:
        for _ in range(20):
            with picnn_fast.use_backend(name):
                if not torch.equal(call(), want):
                    wrong.append(name)

    threads = [threading.Thread(target=switch, args=[name]) for name in ("cpp", "reference") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert backends.serving("cpu", "mask_channels") == "cpp"


def test_a_forced_backend_leaves_after_an_exception(calls):
    before = backends.serving("cpu", "mask_channels")
    with pytest.raises(KeyError, match="mine"), picnn_fast.use_backend("reference"):
        raise KeyError("mine")
    assert backends.serving("cpu", "mask_channels") == before
    with picnn_fast.use_backend("reference"):
        with pytest.raises(KeyError), picnn_fast.use_backend("reference"):
            raise KeyError("mine")
        call()
    assert calls == ["class_gate"]


def test_a_backend_that_fails_to_install_leaves_the_current_one_in_charge(monkeypatch, calls):
    def broken() -> Any:
        raise ImportError("kernels are missing")

    replace(monkeypatch, "triton", kernels=broken, missing=lambda: None)
    with picnn_fast.use_backend("reference"):
        with (
            pytest.raises(ImportError, match="kernels are missing"),
            picnn_fast.use_backend("triton"),
        ):
            pytest.fail("the body must not run")
        assert backends.serving("cpu", "mask_channels") == "reference"
        call()
        assert calls == ["class_gate"]


def test_forcing_outlives_a_decorated_call(calls):
    @picnn_fast.use_backend("reference")
    def decorated() -> torch.Tensor:
        return call()

    before = backends.serving("cpu", "mask_channels")
    decorated()
    decorated()
    assert calls == ["class_gate"] * 2
    assert backends.serving("cpu", "mask_channels") == before


@pytest.mark.parametrize("name", ["cuDNN", "", "CPP", None])
def test_an_unknown_backend_is_refused_by_name(name):
    message = r"^name: got .*reference, cpp, triton, cuda"
    with pytest.raises(ValueError, match=message), picnn_fast.use_backend(name):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
def test_an_unavailable_backend_says_why(monkeypatch, name):
    replace(monkeypatch, name, missing=lambda: "it rained")
    message = f"backend '{name}' is not available: it rained"
    with pytest.raises(RuntimeError, match=message), picnn_fast.use_backend(name):
        pytest.fail("the body must not run")


def test_cuda_says_what_is_missing(monkeypatch):
    class Built:
        def __init__(self, cuda: bool) -> None:
            self.cuda = cuda

        def build_info(self) -> dict[str, Any]:
            return {"cuda": self.cuda, "cuda_reason": "" if self.cuda else "nvcc was not found"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "no compiler")
    assert backends.build_info()["backends"]["cuda"] == "no compiler"
    assert backends.build_info()["backends"]["cpp"] == "no compiler"
    monkeypatch.setattr(backends, "extension_error", None)
    monkeypatch.setattr(backends, "extension", Built(cuda=False))
    assert "nvcc was not found" in backends.build_info()["backends"]["cuda"]
    monkeypatch.setattr(backends, "extension", Built(cuda=True))
    assert "no CUDA device" in backends.build_info()["backends"]["cuda"]


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if importlib.util.find_spec("triton") is None:
        assert "triton is not installed" in backends.build_info()["backends"]["triton"]
        return
    assert "TRITON_INTERPRET=1" in backends.build_info()["backends"]["triton"]
    monkeypatch.setitem(sys.modules, "triton", None)  # makes the import fail
    assert "triton is not installed" in backends.build_info()["backends"]["triton"]


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extension_the_reference_serves_and_says_so():
    out = python(
        """
import sys
sys.modules["picnn_fast._C"] = None  # as where nothing was compiled
import torch, picnn_fast
info = picnn_fast.build_info()
print(info["extension"], info["operators"]["mask_channels"]["cpu"], picnn_fast.available_backends())
print(info["backends"]["cpp"])
print(picnn_fast.functional.class_gate(torch.ones(1, 1), torch.ones(1, 1) / 2,
                                       torch.tensor([0])).item())
try:
    with picnn_fast.use_backend("cpp"):
        pass
except RuntimeError as error:
    print(error)
"""
    ).splitlines()
    assert out[0].startswith("None reference ('reference',")
    assert "picnn_fast._C" in out[1]
    assert out[2] == "0.5"
    assert f"backend 'cpp' is not available: {out[1]}" in out[3]


def test_importing_the_package_needs_torch_and_numpy_alone():
    out = python(
        """
import sys
import picnn_fast
heavy = ("lightning", "torchvision", "torchmetrics", "sklearn", "matplotlib", "captum", "triton",
         "yaml", "rich")
print([name for name in heavy if name in sys.modules])
"""
    )
    assert out.strip() == "[]"


def test_the_instruction_set_is_chosen_by_the_environment():
    if backends.extension is None:
        pytest.skip(f"{backends.extension_error}")
    show = "import picnn_fast; print(picnn_fast.build_info()['extension']['cpu_capability'])"
    names = backends.extension.build_info()["cpu_capabilities"]
    assert python(show, PICNN_FAST_CPU_CAPABILITY="default").strip() == "default"
    assert python(show, PICNN_FAST_CPU_CAPABILITY="").strip() == names[-1]


def test_a_missing_backend_fails_in_ci_and_skips_elsewhere(monkeypatch):
    def missing(name: str) -> Any:
        raise conftest.Unavailable("not built")
        yield

    class Request:
        param = "cpp"

    monkeypatch.setattr(conftest, "serve", missing)
    fixture = conftest.backend.__wrapped__ if hasattr(conftest.backend, "__wrapped__") else None
    assert fixture is not None
    monkeypatch.setattr(conftest, "IN_CI", False)
    with pytest.raises(pytest.skip.Exception, match="not built"):
        next(fixture(Request()))
    monkeypatch.setattr(conftest, "IN_CI", True)
    with pytest.raises(pytest.fail.Exception, match="CI must run backend 'cpp': not built"):
        next(fixture(Request()))
    Request.param = "cpp-avx512"  # a matter of the processor
    with pytest.raises(pytest.skip.Exception):
        next(fixture(Request()))


def test_the_named_backend_serves_every_operator(backend: Backend):
    if backend.name == "cuda-fibres":
        assert set(fibre_kernels()) == set(backends.operators())
        return
    for operator in backends.operators():
        served_by = expected_server(backend)
        assert backends.serving(backend.device.type, operator) == served_by
        overridden = served_by in ("reference", "triton")
        assert overridden or torch._C._dispatch_has_kernel_for_dispatch_key(
            f"picnn_fast::{operator}", backend.device.type.upper()
        )


@pytest.mark.skipif(not IN_CI, reason="a developer's machine may lack a backend")
@pytest.mark.parametrize("name", REQUIRED)
def test_ci_runs_every_backend(name: str):
    try:
        for backend in serve(name):
            assert backend.name == name
    except Unavailable as error:
        pytest.fail(f"CI must run backend {name!r}: {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_gpu_backends_are_tested_where_there_is_a_gpu(name: str):
    assert name in [entry.values[0] for entry in BACKENDS if not isinstance(entry, str)]


def test_instruction_sets_are_listed_switched_and_refused_by_name():
    core = backends.extension
    if core is None:
        pytest.skip(f"{backends.extension_error}")
    names = core.build_info()["cpu_capabilities"]
    assert names[0] == "default"
    before = core.build_info()["cpu_capability"]
    try:
        for name in names:
            core.set_cpu_capability(name)
            assert core.build_info()["cpu_capability"] == name
            assert core.set_cpu_capability(name) == name
        with pytest.raises(ValueError, match="sse9"):
            core.set_cpu_capability("sse9")
    finally:
        core.set_cpu_capability(before)
