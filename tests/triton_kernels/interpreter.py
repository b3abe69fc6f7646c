"""Triton's interpreter in half its time: what it looks up anew at every call is looked up once."""

import functools
import inspect
from typing import Any


@functools.cache
def quicken() -> None:
    """Wherever kernels are interpreted in this process; nothing where Triton is not installed."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ModuleNotFoundError:
        return

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, value in inspect.getmembers(package) if tl.core.is_builtin(value)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not where an outer function replaced it already
                interpreter._patch_attr(package, name, member, builder, scope)

    of_numbers = functools.cache(of_anything := interpreter._get_np_dtype)

    def numpy_dtype(dtype: Any) -> Any:
        element = dtype.scalar
        return (of_anything if element.is_ptr() else of_numbers)(element)

    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """A kernel at each launch, which undoes it; what kernels call, at its first call."""
        called = function in interpreter.InterpretedFunction.rewritten_fn
        return None if called else patch(function)

    interpreter._patch_lang = patch_once
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = numpy_dtype
