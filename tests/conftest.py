"""What every test may use: one ``backend`` fixture, GPU tests that find their machine."""

import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads it when a kernel is decorated, so before any import of a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from picnn_fast import backends  # noqa: E402
from tests.triton_kernels.interpreter import quicken  # noqa: E402

IN_CI = os.environ.get("CI") == "true"
# Benchmarks that a test runs write where the test says.
os.environ.pop("PICNN_FAST_RESULTS", None)
# Backends a run of the continuous build must not skip.
REQUIRED = ("reference", "cpp", "triton-gpu" if HAS_GPU else "triton", "cuda-fibres")

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("tests")


@dataclass(frozen=True)
class Backend:
    """A backend that serves every operator while the test runs, for tensors on ``device``."""

    name: str
    device: torch.device

    @property
    def slow(self) -> bool:
        """Kernels run one element or one thread at a time: keep the sizes small."""
        return self.name in ("triton", "cuda-fibres")


def expected_server(backend: Backend) -> str:
    """The only name ``backends.serving`` may give while ``backend`` is forced."""
    return backend.name.removesuffix("-gpu").partition("-")[0]


class Unavailable(Exception):
    """Why a backend cannot serve here."""


@functools.cache
def fibre_kernels() -> dict[str, Callable[..., Any]]:
    """The CUDA kernel bodies compiled for the CPU, their threads run as fibres."""
    try:
        build = importlib.import_module("tests.cuda_on_cpu.build")
    except ModuleNotFoundError as error:
        raise Unavailable(str(error)) from error
    if build.compiler() is None:
        raise Unavailable("no C++ compiler to build the CUDA bodies for the CPU")
    kernels: dict[str, Callable[..., Any]] = build.load()
    return kernels


def _serve_cpp(capability: str | None) -> Iterator[None]:
    if importlib.util.find_spec("picnn_fast._C") is None:
        raise Unavailable("picnn_fast._C is not installed")
    # Installed but not loading is a failure, not a reason to skip.
    assert backends.extension is not None, backends.extension_error
    if capability is None:
        with backends.use_backend("cpp"):
            yield
        return
    runnable = backends.extension.build_info()["cpu_capabilities"]
    if capability not in runnable:
        raise Unavailable(f"this build and processor run {', '.join(runnable)}")
    previous = backends.extension.set_cpu_capability(capability)
    try:
        with backends.use_backend("cpp"):
            yield
    finally:
        backends.extension.set_cpu_capability(previous)


def _serve_fibres() -> Iterator[None]:
    override = backends.override_kernels(fibre_kernels(), ("CPU",))
    try:
        yield
    finally:
        override._destroy()


def _serve_registered(name: str) -> Iterator[None]:
    reason = backends.build_info()["backends"][name]
    if name == "triton" and importlib.util.find_spec("picnn_fast.triton_kernels") is None:
        reason = "picnn_fast.triton_kernels is not installed"
    if reason is not None:
        raise Unavailable(reason)
    if name == "triton":
        quicken()
    with backends.use_backend(name):
        yield


def serve(name: str) -> Iterator[Backend]:
    """Put backend ``name`` in charge until the generator closes; Unavailable says why it cannot."""
    device = torch.device("cuda" if name == "cuda" or name.endswith("-gpu") else "cpu")
    if name == "cpp" or name.startswith("cpp-"):
        serving = _serve_cpp(name.partition("-")[2] or None)
    elif name == "cuda-fibres":
        serving = _serve_fibres()
    elif name == "triton" and HAS_GPU:
        raise Unavailable("Triton compiles for the GPU of this machine: see triton-gpu")
    else:
        serving = _serve_registered(name.removesuffix("-gpu"))
    for _ in serving:
        yield Backend(name, device)


GPU_BACKENDS = ("reference-gpu", "triton-gpu", "cuda")
# Those of a GPU are no cases where there is none, and Triton's is the interpreter only there.
BACKENDS = (
    "reference",
    "cpp",
    "cuda-fibres",
    *(
        [pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS]
        if HAS_GPU
        else ["triton"]
    ),
)


def other_instruction_sets() -> list[str]:
    """Backends of those that build and processor have, but for the one that "cpp" itself runs."""
    if backends.extension is None:
        return []
    info = backends.extension.build_info()
    return [f"cpp-{name}" for name in info["cpu_capabilities"] if name != info["cpu_capability"]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, serving all operators. Skips where one is missing, but not in CI."""
    try:
        yield from serve(request.param)
    except Unavailable as error:
        if IN_CI and request.param in REQUIRED:
            pytest.fail(f"CI must run backend {request.param!r}: {error}")
        pytest.skip(f"backend {request.param!r}: {error}")


@pytest.fixture
def cpp() -> Iterator[Backend]:
    """The compiled CPU kernels, for tests too long for every backend."""
    try:
        yield from serve("cpp")
    except Unavailable as error:
        if IN_CI:
            pytest.fail(f"CI must run backend 'cpp': {error}")
        pytest.skip(f"backend 'cpp': {error}")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` sets the number of threads of the process until the test ends."""
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)


# What comes with the extras; a test file that needs one that is missing is skipped, but not in CI.
OPTIONAL = frozenset(
    {
        "captum",
        "h5py",
        "jinja2",
        "lightning",
        "matplotlib",
        "onnxruntime",
        "onnxscript",
        "PIL",
        "plotly",
        "rich",
        "safetensors",
        "scipy",
        "selenium",
        "sklearn",
        "tensorboard",
        "timm",
        "torchmetrics",
        "torchvision",
        "yaml",
    }
)


def missing_package(error: BaseException | None) -> str | None:
    """The optional package for want of which an import failed, if that is why."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in OPTIONAL:
            return package
        error = error.__cause__ or error.__context__
    return None


class Module(pytest.Module):
    """A test file, which an optional package that is missing does not keep others from running."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            package = missing_package(error)
            if package is None or IN_CI:
                raise
            pytest.skip(f"{package} is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = Module.from_parent(parent, path=module_path)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and not marker.kwargs.get("else_cpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What is there now stays: garbage is looked for in what tests make."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some bindings complain at the end of what is still there


class FailureJournal:
    """Appends name and traceback of each test to a file as it fails: a run that is killed keeps
    them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(report, report.when or "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._write(report, "collection")

    def _write(self, report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"FAILED {report.nodeid} ({when})\n{report.longreprtext}\n\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, help="a file that gets each failure as it comes")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # looking for garbage in all that is imported takes a quarter of importing it
    path = config.getoption("--failures")
    # The controller of several processes gets the reports of all, those that crash included.
    if path is not None and not hasattr(config, "workerinput"):
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(FailureJournal(path))


# What ended this process's use of the GPU: after a device-side assert every call fails.
_gpu_lost: str | None = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What goes wrong on a GPU comes to light later; here at the end of the test that did it."""
    global _gpu_lost
    if not (HAS_GPU and item.get_closest_marker("gpu")):
        return (yield)
    try:
        result = yield
        torch.cuda.synchronize()
        return result
    except Exception as failure:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            _gpu_lost = f"{item.nodeid} ended this process's use of the GPU: {error}"
            failure.add_note(_gpu_lost)
        raise


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Once the report is out, a process whose GPU is lost runs no other test."""
    if _gpu_lost is None:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Another worker takes its place, and the tests that were left to it.
        print(f"\n{_gpu_lost}; its worker ends here", file=sys.__stderr__, flush=True)
        os._exit(1)
    pytest.exit(_gpu_lost, returncode=1)
