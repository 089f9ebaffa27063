"""The kernels as operators of torch: ``torch.ops.dydila_kernels.*``, with shapes for tracing and with gradients.

    attention               Eqs. 5-9 (or 10)        :mod:`dydila_kernels.ops.core`
    attention_backward
    route                   Eq. 1, for both routers :mod:`dydila_kernels.ops.projection`
    projection              Eq. 2
    projection_backward

``torch.compile`` and ``torch.export`` see these.  An eager call goes around the dispatcher, which would cost more than
a small kernel takes, to the same functions.  Second derivatives are not written: asking for one is an error.

Meta tensors go through the operators too, for shapes.  ``torch.utils.flop_counter.FlopCounterMode`` counts by the
formulas of :mod:`dydila_kernels.ops.flops`; a counter learns them when it is made, so import this module before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dydila_kernels.ops import core, flops, projection
from dydila_kernels.ops.core import Inputs, Kept, Settings
from dydila_kernels.types import Ranks

INPUTS, KEPT = len(Inputs._fields), len(Kept._fields)

_ATTENTION = """Tensor q, Tensor k, Tensor v, Tensor? q_redundant, Tensor? k_redundant, Tensor gamma, Tensor? lam,
    Tensor kernel_routers, Tensor? differential_routers, Tensor? weight, Tensor? bias"""
_SETTINGS = """Tensor? mask, SymInt[]? cu_seqlens, SymInt[] grids, int num_heads, str normalization, str differential,
    bool straight_through"""
_TENSORS = ", ".join(["Tensor"] * KEPT)
_GRADIENTS = ", ".join(["Tensor"] * INPUTS)


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(t.device) if t.is_cuda and t.device.index != torch.cuda.current_device() else nullcontext()


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """The kernels choose their dtypes themselves."""
    kind = t.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def around_dispatcher(t: Tensor) -> bool:
    """Whether numbers are all that is wanted: by no compiler, and no mode such as that of fake tensors or of a counter.

    Of meta tensors shapes are wanted.
    """
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or t.is_meta)


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("backend='triton' has no second derivatives (create_graph=True); use backend='torch'")


def or_empty(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


# Attention ------------------------------------------------------------------------------------------------------------


def attend(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, then :class:`Kept`.  ``arguments`` are the fields of :class:`Inputs` and :class:`Settings`."""
    return attend_over(None, *arguments)


def attend_over(ranks: Ranks | None, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:])
    with on_device_of(inputs.q), without_autocast(inputs.q), torch.no_grad():
        out, kept = core.attend(inputs, settings, ranks)
    return out, *kept


def pull_back(grad: Tensor, *arguments: Any, ranks: Ranks | None = None) -> tuple[Tensor | None, ...]:
    """:class:`Gradients`.  ``arguments`` are the fields of :class:`Inputs`, :class:`Settings` and :class:`Kept`."""
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:-KEPT])
    with on_device_of(grad), without_autocast(grad), torch.no_grad():
        return core.pull_back(grad, inputs, settings, Kept(*arguments[-KEPT:]), ranks)


attention_op = torch.library.custom_op(
    "dydila_kernels::attention", attend, mutates_args=(), schema=f"({_ATTENTION}, {_SETTINGS}) -> (Tensor, {_TENSORS})"
)


@torch.library.custom_op(
    "dydila_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ATTENTION}, {_SETTINGS}, {', '.join(f'Tensor {name}' for name in Kept._fields)}) "
    f"-> ({_GRADIENTS})",
)
def attention_backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return or_empty(grad, pull_back(grad, *arguments))


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:])
    return inputs.q.new_empty(inputs.q.shape), *core.empty_kept(inputs, settings)


@attention_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:-KEPT])
    wanted = [t if settings.straight_through or "routers" not in name else None for name, t in inputs._asdict().items()]
    return or_empty(grad, [None if t is None else t.new_empty(t.shape) for t in wanted])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:INPUTS], inputs[INPUTS], *output[1:])
    ctx.settings = inputs[INPUTS + 1 :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any, ranks: Ranks | None = None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    saved = ctx.saved_tensors
    inputs, mask, kept = saved[:INPUTS], saved[INPUTS], saved[INPUTS + 1 :]
    nothing = (None,) * (1 + len(ctx.settings))
    if grad is None:
        return (None,) * INPUTS + nothing
    function: Callable[..., tuple[Tensor | None, ...]] = attention_backward_op
    if ranks is not None or around_dispatcher(grad):
        function = partial(pull_back, ranks=ranks)
    found = function(grad, *inputs, mask, *ctx.settings, *kept)
    routers = (Inputs._fields.index("kernel_routers"), Inputs._fields.index("differential_routers"))
    trained = ctx.settings[-1]
    found = tuple(
        None if t is None or (i in routers and not trained) else g
        for i, (t, g) in enumerate(zip(inputs, found, strict=True))
    )
    return found + nothing


torch.library.register_autograd("dydila_kernels::attention", _differentiate, setup_context=_keep)


class Attention(torch.autograd.Function):
    """What the dispatcher does with ``attention``, without the dispatcher."""

    forward = staticmethod(attend)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)  # type: ignore[assignment]


class AttentionOverRanks(torch.autograd.Function):
    """As :class:`Attention`, with tokens on several ranks, which no operator knows of."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *arguments: Any) -> tuple[Tensor, ...]:
        output = attend_over(ranks, *arguments)
        ctx.ranks = ranks
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(ctx, grad, ranks=ctx.ranks)


def dydila_attention(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> Tensor:
    """Eqs. 5-9 (or 10) for validated arguments: (B, N, d), contiguous."""
    if ranks is not None:
        return AttentionOverRanks.apply(ranks, *inputs, *settings)[0]
    if around_dispatcher(inputs.q):
        return Attention.apply(*inputs, *settings)[0]
    return attention_op(*inputs, *settings)[0]


def routing_indices(inputs: Inputs, settings: Settings) -> dict[str, Tensor]:
    """The decisions of :func:`dydila_attention`, (B, N) int8 each, named as in :class:`dydila_kernels.Routing`."""
    function: Callable[..., tuple[Tensor, ...]] = attend if around_dispatcher(inputs.q) else attention_op
    kept = Kept(*function(*inputs, *settings)[1:])
    indices = kept.indices.unflatten(-1, inputs.q.shape[:2])
    names = (
        ["measure_{}"] if settings.differential == "off" else ["measure_{}", "measure_{}_redundant", "differential_{}"]
    )
    found = {name.format(side): indices[i, j] for j, name in enumerate(names) for i, side in enumerate("qk")}
    if settings.differential == "map":
        del found["differential_k"]
    return found


# Routed projection ----------------------------------------------------------------------------------------------------


def _route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    with on_device_of(x), without_autocast(x), torch.no_grad():
        return projection.route(x, routers)


def _project(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the plan, see :class:`dydila_kernels.ops.projection.Plan`."""
    with on_device_of(x), without_autocast(x), torch.no_grad():
        plan = projection.plan(index, len(weight))
        return projection.project(x, weight, plan), *plan


def _pull_back_projection(
    grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    with on_device_of(x), without_autocast(x), torch.no_grad():
        plan = projection.Plan(order, ends)
        dx = projection.project_input_gradient(grad, weight, plan)
        return dx, projection.project_weight_gradient(x, grad, plan, weight.dtype)


route_op = torch.library.custom_op(
    "dydila_kernels::route", _route, mutates_args=(), schema="(Tensor x, Tensor[] routers) -> Tensor"
)
projection_op = torch.library.custom_op(
    "dydila_kernels::projection",
    _project,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor index) -> (Tensor, Tensor, Tensor)",
)
projection_backward_op = torch.library.custom_op(
    "dydila_kernels::projection_backward",
    _pull_back_projection,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor order, Tensor ends) -> (Tensor, Tensor)",
)


@route_op.register_fake
def _(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    return x.new_empty((len(routers), *x.shape[:2]), dtype=torch.int8)


@projection_op.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    order = index.new_empty(index.numel(), dtype=torch.int32)
    return x.new_empty((*x.shape[:2], weight.shape[2])), order, index.new_empty(len(weight), dtype=torch.int32)


@projection_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_projection(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_projection(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    if grad is None:
        return None, None, None
    function = _pull_back_projection if around_dispatcher(grad) else projection_backward_op
    return *function(grad, *ctx.saved_tensors), None


torch.library.register_autograd("dydila_kernels::projection", _differentiate_projection, setup_context=_keep_projection)


class RoutedProjection(torch.autograd.Function):
    """What the dispatcher does with ``projection``, without the dispatcher."""

    forward = staticmethod(_project)
    setup_context = staticmethod(_keep_projection)
    backward = staticmethod(_differentiate_projection)


def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for one or two routers (d, n_P): (routers, B, N) int8."""
    return (_route if around_dispatcher(x) else route_op)(x, routers)


def routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e), index (B, N) int8 -> (B, N, e), contiguous."""
    return (RoutedProjection.apply if around_dispatcher(x) else projection_op)(x, weight, index)[0]


for _name, _formula in flops.FORMULAS.items():
    register_flop_formula(getattr(torch.ops.dydila_kernels, _name))(_formula)
