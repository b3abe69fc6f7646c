"""An operator in one call: schema, reference, shape function and derivative."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from picnn_fast import backends

# Inside an autograd.Function the dispatcher would come to the operator's autograd kernel again.
# The guard of PyTorch's for it costs three times as much.
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_transforms_active = torch._C._are_functorch_transforms_active
_function_mode = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
# Of Dynamo alone: other ways to trace have a mode or a tensor of their own.
_compiling = torch.compiler.is_dynamo_compiling
# What nothing but autograd looks at on the way to an operator; any other class may intercept it.
_ORDINARY = frozenset({Tensor, torch.nn.Parameter, int, float, bool, type(None)})
# Whether a transform of torch.func calls an operator for the next one further out.
_called_by_inner = ContextVar("_called_by_inner", default=False)


def _below_autograd(function: Callable[..., Any], *arguments: Any) -> Any:
    excluded = _is_excluded(_AUTOGRAD)
    try:
        _exclude(_AUTOGRAD, True)
        return function(*arguments)
    finally:
        _exclude(_AUTOGRAD, excluded)


def may_be_differentiated(value: Tensor) -> bool:
    """Whether a call with ``value`` is recorded, as far as its caller can tell."""
    # A vmap hides whether what it maps over is.
    return torch.is_grad_enabled() and (value.requires_grad or _transforms_active())


def define(
    family: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    constants: Sequence[int] = (),
    decomposition: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``picnn_fast::<schema>`` with its reference implementation and shape function.

    Reverse mode works under ``torch.func`` as well; ``vmap`` calls the operator sample by sample.
    Forward mode is refused.

    Args:
        setup_context: ``(ctx, inputs, output)``, as of ``torch.autograd.Function``: what backward
            needs goes into ``ctx.save_for_backward``.
        backward: ``(ctx, saved, *grads)`` with the saved tensors, and a gradient, or None, for each
            output, but not None for all. Returns the gradients of the first inputs; the others get
            none. Gradients are recorded while it runs (``torch.is_grad_enabled``) where the caller
            may differentiate what it returns. None: the operator's result refuses to be
            differentiated, in one line.
        constants: places of outputs that backward alone differentiates, not the caller.
        decomposition: the operator in PyTorch's own, for exporters that know no others; sizes may
            be symbols there.

    Returns:
        The operator for a public function to call: ``torch.ops.picnn_fast.<name>``, without the
        dispatcher's two ways through Python where autograd alone is to be asked, which cost a call
        on small tensors a tenth. ``constants`` may be differentiable there.
    """
    name = schema.split("(", 1)[0]
    backends.library.define(schema)
    backends.add_operator(name, backends.Operator(family, reference))
    torch.library.register_fake(f"{backends.NAMESPACE}::{name}", fake, lib=backends.library)
    overload = getattr(getattr(torch.ops, backends.NAMESPACE), name).default
    if decomposition is not None:
        register_decomposition(overload)(decomposition)
        # Shapes alone are still told by ``fake``, not by tracing the decomposition.
        register_decomposition(overload, type="meta")(fake)
    if overload._schema.is_mutable:
        direct: Callable[..., Any] = overload
        return direct
    apply, recorded = _recorded(overload, setup_context, backward)
    if constants:
        recorded = _with_constants(recorded, constants)
    backends.library.impl(name, recorded, "Autograd")
    for key in ("AutogradOther", "AutogradNestedTensor"):  # which _AUTOGRAD does not include
        backends.library.impl(name, torch.library.fallthrough_kernel, key)
    return _direct(overload, apply)


def _direct(overload: torch._ops.OpOverload, apply: Callable[..., Any]) -> Callable[..., Any]:
    """``overload``, by ``apply`` or its kernels at once where no one else is to see the call."""

    kernel = overload._op

    def call(*arguments: Any) -> Any:
        if (
            _compiling()
            or _transforms_active()
            or _function_mode()
            or _dispatch_modes()
            or _tracing_state() is not None
        ):
            return overload(*arguments)
        for value in arguments:
            if type(value) not in _ORDINARY:
                return overload(*arguments)
        if _grad_enabled():
            return apply(*arguments)
        if forward_ad._current_level >= 0:
            return overload(*arguments)
        return _below_autograd(kernel, *arguments)

    return call


def _recorded(
    operator: torch._ops.OpOverload,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator where gradients are recorded: outside of transforms, and anywhere."""
    name = operator._schema.name.partition("::")[2]
    nothing = (None,) * len(operator._schema.arguments)
    kernel = operator._op  # without a Python call more

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _below_autograd(kernel, *arguments)
        ctx.materialize_grads = False
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    def no_derivative(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{name}: got its result to differentiate, want a constant: no derivative of it is"
            " offered"
        )

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert backward is not None
        if grads[0] is None and all(grad is None for grad in grads):
            return nothing
        # Before the guard: activation checkpointing computes them again, and records gradients.
        saved = ctx.saved_tensors
        # Dynamo, which compiles backward passes, too, has no word for keys that are left out.
        if _grad_enabled() or _transforms_active() or _compiling():
            found = backward(ctx, saved, *grads)
        else:
            found = _below_autograd(backward, ctx, saved, *grads)
        return found + nothing[len(found) :]

    def refuse(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            f"{name}: got forward-mode differentiation, want reverse mode: no other is offered"
        )

    def make(forward: Callable[..., Any]) -> Any:
        # Not of autograd.Function, whose ``apply`` binds arguments by their names, at three times
        # the dispatcher's cost, and sorts out the transforms of torch.func, as the dispatcher has.
        derivative = no_derivative if backward is None else differentiate
        members = {"forward": forward, "backward": derivative, "jvp": refuse}
        members["_compiled_autograd_key"] = torch.autograd.Function._compiled_autograd_key
        return type(
            "".join(map(str.capitalize, name.split("_"))),
            (_SingleLevelFunction,),
            {key: staticmethod(member) for key, member in members.items()},
        )

    apply = make(forward).apply

    def call(*arguments: Any) -> Any:
        if not _transforms_active():
            return apply(*arguments)
        recording = torch.is_grad_enabled()

        def within(ctx: Any, *arguments: Any) -> Any:
            # Transforms further out record as the caller does; ``apply`` has turned it off.
            outside = _called_by_inner.set(True)
            try:
                with torch.set_grad_enabled(recording), _set_fwd_grad_enabled(True):
                    return forward(ctx, *arguments)
            finally:
                _called_by_inner.reset(outside)

        with enable_single_level_autograd_function():
            return make(within).apply(*arguments)

    return apply, call


def _with_constants(function: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    def call(*arguments: Any) -> tuple[Any, ...]:
        outputs = list(function(*arguments))
        if not _called_by_inner.get():
            for place in places:
                outputs[place] = outputs[place].detach()
        return tuple(outputs)

    return call
