"""The kernels as operators of torch: ``torch.ops.dydila_kernels.*``, with shapes for tracing and with gradients.

    attention               Eqs. 5-9 (or 10)        :mod:`dydila_kernels.ops.core`
    attention_backward
    route                   Eq. 1, for both routers :mod:`dydila_kernels.ops.projection`
    plan                    which tokens go to which projector, of both sides
    projection              Eq. 2
    projection_backward

``torch.compile`` and ``torch.export`` see these.  An eager call bypasses the dispatcher, which would cost more than a
small kernel takes, to the same functions.

Meta tensors go through the operators too, for shapes.  ``torch.utils.flop_counter.FlopCounterMode`` counts by the
formulas of :mod:`dydila_kernels.ops.flops`; a counter learns them when it is made, so import this module before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dydila_kernels.ops import autograd, core, flops
from dydila_kernels.ops.autograd import INPUTS, SAVED, can_bypass_dispatcher
from dydila_kernels.ops.core import Inputs, SavedForBackward, Settings
from dydila_kernels.ops.projection import Plan
from dydila_kernels.ops.taps import fits
from dydila_kernels.types import Ranks, decision_names

_ATTENTION = """Tensor q, Tensor k, Tensor v, Tensor? q_redundant, Tensor? k_redundant, Tensor gamma, Tensor? lam,
    Tensor kernel_routers, Tensor? differential_routers, Tensor? weight, Tensor? bias, Tensor? cos,
    Tensor? sin"""
_SETTINGS = """Tensor? mask, SymInt[]? cu_seqlens, SymInt[] grids, int num_heads, str normalization, str differential,
    bool straight_through, str? rotary_pairing, bool rotary_gradient"""
_TENSORS = ", ".join(["Tensor"] * SAVED)
_GRADIENTS = ", ".join(["Tensor"] * INPUTS)


def or_empty(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


# Attention ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "dydila_kernels::attention", mutates_args=(), schema=f"({_ATTENTION}, {_SETTINGS}) -> (Tensor, {_TENSORS})"
)
def attention_op(*arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`autograd.attention_forward`."""
    return or_empty(arguments[0], autograd.attention_forward(*arguments))


@torch.library.custom_op(
    "dydila_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ATTENTION}, {_SETTINGS}, "
    f"{', '.join(f'Tensor? {name}' for name in SavedForBackward._fields)}) -> ({_GRADIENTS})",
)
def attention_backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """See :func:`autograd.attention_backward`."""
    return or_empty(grad, autograd.attention_backward(grad, *arguments))


@attention_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:])
    return inputs.q.new_empty(inputs.q.shape), *or_empty(inputs.q, core.empty_saved(inputs, settings))


@attention_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:INPUTS]), Settings(*arguments[INPUTS:-SAVED])
    wanted = [t if settings.differentiates(name) else None for name, t in inputs._asdict().items()]
    return or_empty(grad, [None if t is None else t.new_empty(t.shape) for t in wanted])


torch.library.register_autograd(
    "dydila_kernels::attention",
    autograd.differentiate_attention,
    setup_context=autograd.of_operator(autograd.save_attention),
)


def attention(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> Tensor:
    """Eqs. 5-9 (or 10) for validated arguments: (B, N, d), contiguous."""
    if ranks is None and not can_bypass_dispatcher(inputs.q):
        return attention_op(*inputs, *settings)[0]
    if torch.is_grad_enabled():
        return autograd.Attention.apply(ranks, autograd.are_thirds(*inputs[:3]), *inputs, *settings)
    return autograd.attention_forward(*inputs, *settings, ranks=ranks)[0]


def decisions(inputs: Inputs, settings: Settings) -> dict[str, Tensor]:
    """The decisions of :func:`attention`, (B, N) int8 each, named as in :class:`dydila_kernels.Routing`."""
    function: Callable[..., tuple[Tensor, ...]] = attention_op
    if can_bypass_dispatcher(inputs.q):
        function = autograd.attention_forward
    indices = SavedForBackward(*function(*inputs, *settings)[1:]).indices.unflatten(-1, inputs.q.shape[:2])
    # Of each side, the branches in the order of the rows, then lambda.
    rows = {
        name: (side, row)
        for row, kind in enumerate(("measure_{}", "measure_{}_redundant", "differential_{}"))
        for side, name in enumerate((kind.format("q"), kind.format("k")))
    }
    return {name: indices[rows[name]] for name in decision_names(settings.differential)}


# Routed projection ----------------------------------------------------------------------------------------------------

route_op = torch.library.custom_op(
    "dydila_kernels::route",
    autograd.route_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor[] routers) -> Tensor",
)
plan_op = torch.library.custom_op(
    "dydila_kernels::plan",
    autograd.plan_forward,
    mutates_args=(),
    schema="(Tensor index, int num_options) -> (Tensor, Tensor)",
)
projection_op = torch.library.custom_op(
    "dydila_kernels::projection",
    autograd.projection_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor order, Tensor ends) -> Tensor",
)
projection_backward_op = torch.library.custom_op(
    "dydila_kernels::projection_backward",
    autograd.projection_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor order, Tensor ends) -> (Tensor, Tensor)",
)


@route_op.register_fake
def _(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    return x.new_empty((len(routers), *x.shape[:2]), dtype=torch.int8)


@plan_op.register_fake
def _(index: Tensor, num_options: int) -> tuple[Tensor, Tensor]:
    sides, batch, length = index.shape
    order = index.new_empty((sides, batch * length), dtype=torch.int32)
    return order, index.new_empty((sides, num_options), dtype=torch.int32)


@projection_op.register_fake
def _(x: Tensor, weight: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[2]))


@projection_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


torch.library.register_autograd(
    "dydila_kernels::projection",
    autograd.differentiate_projection,
    setup_context=autograd.save_projection,
)


def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for one or two routers (d, n_P): (routers, B, N) int8."""
    return (autograd.route_forward if can_bypass_dispatcher(x) else route_op)(x, routers)


def plan(index: Tensor, num_options: int) -> list[Plan]:
    """Which tokens go to which projector, of each side: index (sides, B, N) int8 with values in [0, num_options)."""
    order, ends = (autograd.plan_forward if can_bypass_dispatcher(index) else plan_op)(index, num_options)
    return [Plan(*lists) for lists in zip(order.unbind(), ends.unbind(), strict=True)]


def project(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e) and its plan -> (B, N, e), contiguous."""
    if not can_bypass_dispatcher(x):
        return projection_op(x, weight, *plan)
    function = autograd.RoutedProjection.apply if torch.is_grad_enabled() else autograd.projection_forward
    return function(x, weight, *plan)


# Convolution ----------------------------------------------------------------------------------------------------------


def taps(branches: Mapping[str, Tensor], identity: bool) -> Tensor | None:
    """The kernel of Eq. 9 from its branches (d, 1, rows, columns): (d, 1, 3, 3) float32.

    None where a compiler or a mode is to see the sum, and for what the kernel cannot read.
    """
    names, weights = zip(*branches.items(), strict=True)
    if not (can_bypass_dispatcher(weights[0]) and fits(branches)):
        return None
    if torch.is_grad_enabled():
        return autograd.SumOfBranches.apply(names, identity, *weights)
    return autograd.taps_forward(names, identity, weights)


for _name, _formula in flops.FORMULAS.items():
    register_flop_formula(getattr(torch.ops.dydila_kernels, _name))(_formula)
