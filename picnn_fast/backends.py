"""Which kernels serve an operator: the PyTorch reference, compiled ones or Triton's.

Each operator is defined once (``ops.define``) with the reference as its default implementation; the
compiled kernels (``picnn_fast._C``) and Triton's register on top for the devices that they serve,
and PyTorch's dispatcher chooses.
"""

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "picnn_fast"

library = torch.library.Library(NAMESPACE, "DEF")

Kernels = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Operator:
    """What ``ops.define`` was told of one."""

    family: str
    reference: Callable[..., Any]


_operators: dict[str, Operator] = {}
_triton_serves: set[str] = set()


def add_operator(name: str, operator: Operator) -> None:
    """Make ``name``, whose schema ``library`` has, known to every backend."""
    library.impl(name, operator.reference, "CompositeExplicitAutograd")
    _operators[name] = operator


def operators() -> tuple[str, ...]:
    """Names of the operators defined so far."""
    return tuple(_operators)


extension: Any = None
extension_error: str | None = "not loaded yet"


def _load_extension() -> None:
    """Import the compiled kernels, which register themselves."""
    global extension, extension_error
    name = f"{NAMESPACE}._C"
    try:
        extension, extension_error = importlib.import_module(name), None
    except ModuleNotFoundError as error:
        extension_error = (
            f"{name} was not built: no C++ compiler was found at installation; reinstall with one"
            if error.name == name
            else str(error)
        )
    except ImportError as error:
        extension_error = f"{name} does not load: {error}"


def _cuda_missing() -> str | None:
    if extension_error is not None:
        return extension_error
    if not extension.build_info()["cuda"]:
        return f"the extension was built without CUDA: {extension.build_info()['cuda_reason']}"
    if not torch.cuda.is_available():
        return "no CUDA device, or a CPU-only build of torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the compiled CUDA kernels need compute capability 8.0 or newer"
    return None


def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed: {error}"
    if torch.cuda.is_available() or _triton_interpreted():
        return None
    return "no CUDA device, and TRITON_INTERPRET=1 is not set"


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_kernels() -> Kernels:
    """Every operator's Triton kernel; the modules are imported when one is first called."""

    def kernel(name: str, family: str) -> Callable[..., Any]:
        def call(first: torch.Tensor, *others: Any) -> Any:
            module = importlib.import_module(f"{NAMESPACE}.triton_kernels.{family}")
            with torch.cuda.device_of(first):  # Triton launches on the current device
                return getattr(module, name)(first, *others)

        return call

    return {name: kernel(name, one.family) for name, one in _operators.items()}


def _register_triton_for_cuda() -> None:
    """Let Triton serve CUDA tensors where no compiled kernel does.

    By what torch was built with: asking for a device on import would spoil a later fork.
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    for name, kernel in _triton_kernels().items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
            library.impl(name, kernel, "CUDA")
            _triton_serves.add(name)


def load() -> None:
    """Register compiled and Triton kernels; once, when all operators are defined."""
    _load_extension()
    _register_triton_for_cuda()


@dataclass(frozen=True)
class Backend:
    """Kernels of one kind.

    Args:
        missing: why it cannot serve in this process; None where it can.
        dispatch_keys: of the tensors it takes, one a kind of device.
        kernels: by operator, what ``use_backend`` puts on top. None of a backend whose kernels
            register themselves when they are loaded: the dispatcher chooses them where nothing is.
    """

    name: str
    missing: Callable[[], str | None]
    dispatch_keys: Callable[[], tuple[str, ...]]
    kernels: Callable[[], Kernels] = dict


# By speed, slowest first.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "reference",
            missing=lambda: None,
            dispatch_keys=lambda: ("CPU", "CUDA"),
            kernels=lambda: {name: one.reference for name, one in _operators.items()},
        ),
        Backend("cpp", missing=lambda: extension_error, dispatch_keys=lambda: ("CPU",)),
        Backend(
            "triton",
            missing=_triton_missing,
            dispatch_keys=lambda: ("CPU",) if _triton_interpreted() else ("CUDA",),
            kernels=_triton_kernels,
        ),
        Backend("cuda", missing=_cuda_missing, dispatch_keys=lambda: ("CUDA",)),
    )
}


def available_backends() -> tuple[str, ...]:
    """Backends that can serve operators in this process, slowest first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.missing() is None)


def serving(device_type: str, operator: str) -> str:
    """Which backend serves ``operator`` for tensors on ``device_type`` ("cpu" or "cuda")."""
    key = device_type.upper()
    forced = _forced[-1] if _forced else None
    if forced is not None and operator in forced.kernels and key in forced.backend.dispatch_keys():
        return forced.backend.name
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key):
        if key == "CPU":
            return "cpp"
        return "triton" if operator in _triton_serves else "cuda"
    return "reference"


def build_info() -> dict[str, Any]:
    """What was compiled, which backend serves which operator, and why any backend is missing.

    Returns:
        A dictionary with ``extension`` (facts of the compiled core, or None), ``backends``
        (backend to None or the reason it is missing) and ``operators`` (operator to
        ``{"cpu": backend, "cuda": backend}``; without a CUDA device, "cpu" alone).
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "extension": None if extension is None else extension.build_info(),
        "backends": {name: backend.missing() for name, backend in BACKENDS.items()},
        "operators": {
            operator: {device: serving(device, operator) for device in devices}
            for operator in operators()
        },
    }


def override_kernels(kernels: Kernels, keys: tuple[str, ...]) -> torch.library.Library:
    """Put Python ``kernels`` above what is registered, until the library is destroyed."""
    override = torch.library.Library(NAMESPACE, "IMPL")
    for name, kernel in kernels.items():
        for key in keys:
            override.impl(name, kernel, key, allow_override=True)
    return override


@dataclass(eq=False)
class _Forced:
    """A ``use_backend`` that is not left yet."""

    backend: Backend
    kernels: Kernels


_lock = threading.Lock()
# The last one is in charge; ``_on_top`` keeps its kernels registered.
_forced: list[_Forced] = []
_on_top: torch.library.Library | None = None


def _put_last_in_charge() -> None:
    global _on_top
    if _on_top is not None:
        _on_top._destroy()
        _on_top = None
    if _forced and _forced[-1].kernels:
        _on_top = override_kernels(_forced[-1].kernels, _forced[-1].backend.dispatch_keys())


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator on the devices it serves, process-wide.

    Meant for tests and benchmarks. Tensors on other devices keep their usual backend. Of several
    contexts, in whatever thread, the one entered last that is not left yet is in charge.

    Args:
        name: "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot serve here; the message says why.

    Example:
        >>> import torch, picnn_fast
        >>> with picnn_fast.use_backend("reference"):
        ...     masked = picnn_fast.functional.class_gate(
        ...         torch.ones(1, 2, 3, 3), torch.eye(2), torch.tensor([0]))
        >>> masked.sum((0, 2, 3)).tolist()
        [9.0, 0.0]
    """
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    reason = backend.missing()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    mine = _Forced(backend, backend.kernels())
    with _lock:
        _forced.append(mine)
        _put_last_in_charge()
    try:
        yield
    finally:
        with _lock:
            last = _forced[-1] is mine
            _forced.remove(mine)
            if last:
                _put_last_in_charge()
