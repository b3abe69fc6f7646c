"""Operator definitions and the choice of backend; nothing outside ``ops/`` knows of backends.

The schema of each operator is defined once, here, with the PyTorch reference as its default
implementation; the compiled kernels (``picnn_fast._C``) and the Triton kernels register themselves
on top for the device types they serve, and PyTorch's dispatcher chooses.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import register_decomposition

NAMESPACE = "picnn_fast"
BACKENDS = ("reference", "cpp", "triton", "cuda")

library = torch.library.Library(NAMESPACE, "DEF")
_references: dict[str, Callable[..., Any]] = {}
# Operators with a Triton kernel, and the module that holds it.
_triton_family: dict[str, str] = {}
_triton_serves: set[str] = set()
# The forced backend, what keeps it registered, and the operators it has kernels for.
_override: tuple[str, torch.library.Library, frozenset[str]] | None = None


def define(
    family: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
    triton: bool = True,
) -> None:
    """Define ``picnn_fast::<schema>`` with its reference implementation and shape function.

    ``autograd``: what a call does where gradients are recorded; it calls the operator again below
    autograd (``below_autograd``). ``decomposition``: the operator in PyTorch's own, for exporters
    that know no others; sizes may be symbols there. ``triton``: whether the family's Triton module
    has a kernel.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if autograd is not None:
        library.impl(name, autograd, "Autograd")
    if decomposition is not None:
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        register_decomposition(overload)(decomposition)
        # Shapes alone are still told by ``fake``, not by tracing the decomposition.
        register_decomposition(overload, type="meta")(fake)
    _references[name] = reference
    if triton:
        _triton_family[name] = family


# Inside an autograd.Function the dispatcher would come to the operator's autograd kernel again.
below_autograd = torch._C._AutoDispatchBelowAutograd


def operators() -> tuple[str, ...]:
    """Names of the operators defined so far."""
    return tuple(_references)


extension: Any = None
extension_error: str | None = "not loaded yet"


def load_extension() -> None:
    """Import the compiled kernels, which register themselves; once all operators are defined."""
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


def _triton_status() -> str | None:
    """None where Triton kernels can run, else the reason why not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed: {error}"
    if torch.cuda.is_available() or _triton_interpreted():
        return None
    return "no CUDA device, and TRITON_INTERPRET=1 is not set"


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _status(backend: str) -> str | None:
    """None where ``backend`` can serve, else the reason why not."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return extension_error
    if backend == "triton":
        return _triton_status()
    if extension_error is not None:
        return extension_error
    if not extension.build_info()["cuda"]:
        return f"the extension was built without CUDA: {extension.build_info()['cuda_reason']}"
    if not torch.cuda.is_available():
        return "no CUDA device, or a CPU-only build of torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the compiled CUDA kernels need compute capability 8.0 or newer"
    return None


def available_backends() -> tuple[str, ...]:
    """Backends that can serve operators in this process, slowest first."""
    return tuple(name for name in BACKENDS if _status(name) is None)


def serving(device_type: str, operator: str) -> str:
    """Which backend serves ``operator`` for tensors on ``device_type`` ("cpu" or "cuda")."""
    key = device_type.upper()
    if _override is not None and operator in _override[2] and key in _device_keys(_override[0]):
        return _override[0]
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
        "backends": {name: _status(name) for name in BACKENDS},
        "operators": {
            operator: {device: serving(device, operator) for device in devices}
            for operator in operators()
        },
    }


def _triton_kernels() -> dict[str, Callable[..., Any]]:
    """Every operator's Triton kernel; the modules are imported when one is first called."""

    def kernel(name: str, family: str) -> Callable[..., Any]:
        def call(first: torch.Tensor, *others: Any) -> Any:
            module = importlib.import_module(f"{NAMESPACE}.triton_kernels.{family}")
            with torch.cuda.device_of(first):  # Triton launches on the current device
                return getattr(module, name)(first, *others)

        return call

    return {name: kernel(name, family) for name, family in _triton_family.items()}


def register_triton_for_cuda() -> None:
    """Let Triton serve CUDA tensors where no compiled kernel does; once all operators are there.

    By what torch was built with: asking for a device on import would spoil a later fork.
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    for name, kernel in _triton_kernels().items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
            library.impl(name, kernel, "CUDA")
            _triton_serves.add(name)


def _device_keys(backend: str) -> tuple[str, ...]:
    """Dispatch keys whose tensors ``backend`` can take."""
    if backend == "reference":
        return ("CPU", "CUDA")
    if backend == "cpp":
        return ("CPU",)
    if backend == "cuda":
        return ("CUDA",)
    return ("CPU",) if _triton_interpreted() else ("CUDA",)


def override_kernels(
    kernels: dict[str, Callable[..., Any]], keys: tuple[str, ...]
) -> torch.library.Library:
    """Put Python ``kernels`` above what is registered, until the library is destroyed."""
    override = torch.library.Library(NAMESPACE, "IMPL")
    for name, kernel in kernels.items():
        for key in keys:
            override.impl(name, kernel, key, allow_override=True)
    return override


def _install(backend: str | None) -> None:
    global _override
    kernels: dict[str, Callable[..., Any]] = {}
    if backend == "reference":
        kernels = _references
    elif backend == "triton":
        kernels = _triton_kernels()
    if _override is not None:
        _override[1]._destroy()
        _override = None
    # "cpp" and "cuda" are what the dispatcher chooses by itself once nothing lies on top.
    if backend is not None and kernels:
        override = override_kernels(kernels, _device_keys(backend))
        _override = (backend, override, frozenset(kernels))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator on the devices it serves, process-wide.

    Meant for tests and benchmarks. Tensors on other devices keep their usual backend.

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
    reason = _status(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    previous = None if _override is None else _override[0]
    _install(name)
    try:
        yield
    finally:
        _install(previous)
