"""Autograd for the kernels: what is saved of a forward pass, and what the backward pass makes of it.

An eager call applies the functions of this file; ``torch.compile`` and ``torch.export`` see the operators of
:mod:`dydila_kernels.ops.operators`, which register the same gradients.  Second derivatives are not written: asking for
one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from dydila_kernels.ops import backward, core, projection, taps
from dydila_kernels.ops.core import Inputs, SavedForBackward, Settings
from dydila_kernels.precision import autocast_dtype, no_autocast
from dydila_kernels.types import Ranks

INPUTS, SAVED = len(Inputs._fields), len(SavedForBackward._fields)


NOTHING = nullcontext()


def launching_for(t: Tensor) -> AbstractContextManager[Any]:
    """Where the kernels are launched: on the device of ``t``, without autocast and gradients.

    Triton launches on the current device, whatever the tensors are on.
    """
    changes: list[AbstractContextManager[Any]] = []
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        changes.append(torch.cuda.device(t.device))
    if autocast_dtype(t.device) is not None:
        changes.append(no_autocast(t.device))
    if torch.is_grad_enabled():
        changes.append(torch.no_grad())
    if len(changes) <= 1:
        return changes[0] if changes else NOTHING
    stack = ExitStack()
    for change in changes:
        stack.enter_context(change)
    return stack


def can_bypass_dispatcher(t: Tensor) -> bool:
    """Whether numbers are all that is wanted: by no compiler, and no mode such as that of fake tensors or of a counter.

    Of meta tensors shapes are wanted.
    """
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or t.is_meta)


def refuse_second_derivative() -> None:
    """Raises RuntimeError where a backward pass is to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("backend='triton' has no second derivatives (create_graph=True); use backend='torch'")


def of_operator(save: Callable[..., None]) -> Callable[..., None]:
    """As ``save``, for an operator, which returns what is saved."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    return setup_context


# Attention ------------------------------------------------------------------------------------------------------------


def attention_forward(*arguments: Any, ranks: Ranks | None = None) -> tuple[Any, ...]:
    """The output (B, N, d), then :class:`SavedForBackward`.

    ``arguments`` are the fields of :class:`Inputs` and :class:`Settings`; ``ranks`` hold the other tokens.
    """
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:])
    with launching_for(inputs.q):
        out, saved = core.forward(inputs, settings, ranks)
    return out, *saved


def attention_backward(
    grad: Tensor, *arguments: Any, ranks: Ranks | None = None, together: bool = False
) -> tuple[Tensor | None, ...]:
    """:class:`InputGradients`, from the gradient of the output (B, N, d); ``together``: see :func:`backward.backward`.

    ``arguments`` are the fields of :class:`Inputs`, :class:`Settings` and :class:`SavedForBackward`.
    """
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:-SAVED])
    with launching_for(grad):
        saved = SavedForBackward(*arguments[-SAVED:])
        return backward.backward(grad, inputs, settings, saved, ranks, together=together)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves the tensors of ``inputs``, the arguments of :func:`attention_forward`, and all of ``output`` but O."""
    ctx.save_for_backward(*inputs[: INPUTS + 1], *output[1:])
    ctx.settings = inputs[INPUTS + 1 :]
    ctx.set_materialize_grads(False)


def differentiate_attention(
    ctx: Any, grad: Tensor | None, *_: Any, ranks: Ranks | None = None, together: bool = False
) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each argument of :func:`attention_forward`; grad (B, N, d) or None."""
    refuse_second_derivative()
    nothing = (None,) * (1 + len(ctx.settings))
    if grad is None:
        return (None,) * INPUTS + nothing
    saved = ctx.saved_tensors
    arguments = *saved[: INPUTS + 1], *ctx.settings, *saved[INPUTS + 1 :]
    if ranks is not None or can_bypass_dispatcher(grad):
        return *attention_backward(grad, *arguments, ranks=ranks, together=together), *nothing
    found = torch.ops.dydila_kernels.attention_backward(grad, *arguments)
    settings = Settings(saved[INPUTS], *ctx.settings)
    # The operator returns an empty tensor where there is no gradient.
    wanted = [t is not None and settings.differentiates(name) for name, t in zip(Inputs._fields, saved, strict=False)]
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *nothing


def are_thirds(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :mod:`dydila_kernels.thirds` made them of one tensor, whose gradient then is to be whole."""
    node = q.grad_fn
    return type(node).__name__ == "ThirdsBackward" and node is k.grad_fn and node is v.grad_fn


class Attention(torch.autograd.Function):
    """What the dispatcher does with the operator ``attention``, without the dispatcher, and over ranks."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks | None, together: bool, *arguments: Any) -> Tensor:
        output = attention_forward(*arguments, ranks=ranks)
        ctx.ranks, ctx.together = ranks, together
        save_attention(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *differentiate_attention(ctx, grad, ranks=ctx.ranks, together=ctx.together)


# Routed projection ----------------------------------------------------------------------------------------------------


def route_forward(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """x (B, N, d), one or two routers (d, n_P) -> (routers, B, N) int8."""
    with launching_for(x):
        return projection.route(x, routers)


def plan_forward(index: Tensor, num_options: int) -> tuple[Tensor, Tensor]:
    """index (sides, B, N) int8 -> order (sides, T), ends (sides, n_P) int32 of the plans."""
    with launching_for(index):
        return projection.plan(index, num_options)


def projection_forward(x: Tensor, weight: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """x (B, N, d), weight (n_P, d, e), and the fields of its :class:`Plan` -> (B, N, e)."""
    with launching_for(x):
        return projection.project(x, weight, projection.Plan(order, ends))


def projection_backward(grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, from that of the output (B, N, e) and the plan."""
    with launching_for(x):
        plan = projection.Plan(order, ends)
        dx = projection.project_input_gradient(grad, weight, plan)
        return dx, projection.project_weight_gradient(x, grad, plan, weight.dtype)


def save_projection(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Saves x, weight and the plan."""
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def differentiate_projection(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each argument of :func:`projection_forward`; grad (B, N, e) or None."""
    refuse_second_derivative()
    if grad is None:
        return None, None, None, None
    function: Callable[..., tuple[Tensor, Tensor]] = torch.ops.dydila_kernels.projection_backward
    if can_bypass_dispatcher(grad):
        function = projection_backward
    return *function(grad, *ctx.saved_tensors), None, None


class RoutedProjection(torch.autograd.Function):
    """What the dispatcher does with the operator ``projection``, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        output = projection_forward(*arguments)
        save_projection(ctx, arguments, output)
        return output

    backward = staticmethod(differentiate_projection)


# The kernel of the convolution ----------------------------------------------------------------------------------------


def taps_forward(names: Sequence[str], identity: bool, weights: Sequence[Tensor]) -> Tensor:
    """Branches of the convolution (d, 1, rows, columns) by their names -> (d, 1, 3, 3) float32."""
    with launching_for(weights[0]):
        return taps.taps(dict(zip(names, weights, strict=True)), identity)


class SumOfBranches(torch.autograd.Function):
    """:func:`taps_forward` and its gradient."""

    @staticmethod
    def forward(ctx: Any, names: Sequence[str], identity: bool, *weights: Tensor) -> Tensor:
        ctx.branches = [(weight.shape, weight.dtype) for weight in weights]
        ctx.set_materialize_grads(False)
        return taps_forward(names, identity, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (2 + len(ctx.branches))
        return None, None, *taps.taps_gradients(grad, ctx.branches)
