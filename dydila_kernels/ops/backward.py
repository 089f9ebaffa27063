"""The backward pass of :mod:`dydila_kernels.ops.core`: from the gradient of the output to those of all inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from dydila_kernels.ops import core, depthwise, forms, gemm
from dydila_kernels.ops.arguments import Denominator, Source, contiguous_channels
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.core import Inputs, SavedForBackward, Settings, zero_where_masked
from dydila_kernels.ops.gradients import TableGradients, denominator_gradient, gradients, source_of
from dydila_kernels.ops.linear_attention import correlation, state
from dydila_kernels.ops.rotary import add_table_gradients, rotate
from dydila_kernels.ops.straight_through import straight_through_gradients
from dydila_kernels.ops.tokens import tokens
from dydila_kernels.types import Ranks


class InputGradients(NamedTuple):
    """Of each of :class:`Inputs`, in its dtype; None where there is no such input."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_redundant: Tensor | None
    k_redundant: Tensor | None
    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor | None
    differential_routers: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


Pair = tuple[Tensor, Tensor | None]
"""Gradients of tokens and redundancy, (B, N, d)."""
SideTables = tuple[TableGradients, TableGradients]
"""Of queries and keys."""


class Product(NamedTuple):
    """What the gradients of a product of queries, keys and values need: v and the incoming gradient (B, N, d).

    ``dtables``: where those of cos and sin are added, (B, N, e) float32 each; empty where none are wanted.
    """

    context: LaunchContext
    settings: Settings
    saved: SavedForBackward
    v: Tensor
    grad: Tensor
    dtables: Sequence[Tensor]


def backward(
    grad: Tensor, inputs: Inputs, settings: Settings, saved: SavedForBackward, ranks: Ranks | None = None, *,
    together: bool = False,
) -> InputGradients:  # fmt: skip
    """The gradients, from that of the output (B, N, d).

    Those of the tokens lie side by side, (B, N, 5d), where they are to be ``together``: those of q, k, v then are that
    of the projection that they are thirds of, without a copy.
    """
    if core.working_dtype(inputs, settings) != inputs.q.dtype:
        wide = core.widened(inputs, settings)
        found = backward(grad.to(wide.q.dtype), wide, settings, saved, ranks)  # cast anew, none would lie together
        narrow = [None if t is None else t.to(inputs.q.dtype) for t in found[:5]]
        return InputGradients(*narrow, *found[5:])  # type: ignore[arg-type,call-arg]
    context = core.context_of(inputs, settings, ranks)
    q, k = core.operands_of(context, inputs, settings, saved)
    grad, v = contiguous_channels(grad), contiguous_channels(inputs.v)
    dq, dk, dv, dq_redundant, dk_redundant = empty_gradients(inputs, together)
    assert dq is not None and dk is not None and dv is not None
    backward_of = fused_backward if core.is_fused(context.dim, settings) else gemm_backward
    shaped = saved._replace(states=core.states_of(context, saved, settings))
    learned = (context.rotary.cos, context.rotary.sin) if context.rotary and settings.rotary_gradient else ()
    dtables = [t.new_zeros(t.shape, dtype=torch.float32) for t in learned]
    whole = Product(context, settings, shaped, v, grad, dtables)
    if settings.differential == "map":
        assert dq_redundant is not None and dk_redundant is not None
        (q1, q2), (k1, k2) = q.branches(), k.branches()
        # The second branch first: it is the one to find the gradient of lambda, and of the logits of its router.
        second = backward_of(whole, 1, q2, k2, (dq_redundant, None), (dk_redundant, None), dv)
        first = backward_of(
            whole, 0, q1, k1, (dq, None), (dk, None), dv, add=True,
            differential_logits=second[0].differential_logits,
        )  # fmt: skip
        tables = [first, second]
    else:
        tables = [backward_of(whole, 0, q, k, (dq, dq_redundant), (dk, dk_redundant), dv)]

    dgamma = reduce(torch.add, [side.gamma for pair in tables for side in pair])
    dlam = None
    if inputs.lam is not None:
        dlams = [side.lam for pair in tables for side in pair if side.lam is not None]
        dlam = reduce(torch.add, dlams).to(inputs.lam.dtype)
    routers = router_gradients(context, (q, k), tables, inputs) if settings.straight_through else (None, None)
    dweight = dbias = None
    if inputs.weight is not None:
        dweight, dbias = depthwise.depthwise_gradients(
            dv, v, grad, inputs.weight, context.geometry, context.mask, has_bias=inputs.bias is not None
        )
    dcos, dsin = [total.to(t.dtype) for total, t in zip(dtables, learned, strict=True)] or (None, None)
    return InputGradients(
        dq, dk, dv, dq_redundant, dk_redundant, dgamma.to(inputs.gamma.dtype), dlam, routers[0], routers[1], dweight,
        dbias, dcos, dsin,
    )  # fmt: skip


def empty_gradients(inputs: Inputs, together: bool) -> list[Tensor | None]:
    """Memory for those of the tokens, (B, N, d) each."""
    given = [t for t in inputs[:5] if t is not None]
    if together:
        batch, length, dim = inputs.q.shape
        made = iter(inputs.q.new_empty(batch, length, len(given) * dim).chunk(len(given), -1))
    else:
        made = iter([torch.empty_like(t, memory_format=torch.contiguous_format) for t in given])
    return [None if t is None else next(made) for t in inputs[:5]]


def fused_backward(
    whole: Product, i: int, q: QKOperand, k: QKOperand, dq: Pair, dk: Pair, dv: Tensor, *, add: bool = False,
    differential_logits: Tensor | None = None,
) -> SideTables:  # fmt: skip
    """Both sides of product i: writes dq and dk, writes or ``add``s to dv.

    ``differential_logits`` (T, n_D): their gradients where they are known.
    """
    context, settings, saved, v, grad, _ = whole
    means, inverse = saved.denominator(i, settings)
    source, denominator = source_of(context, x=grad, matrix=saved.states[i]), Denominator(means, inverse)
    if settings.has_denominator:
        denominator = denominator._replace(weights=denominator_gradient(context, q, source, denominator))
    dots, values = None, source_of(context, x=v)
    keys_in_gluon = forms.why_not_gluon_gradients(context, k, values, add) is None
    if keys_in_gluon and forms.why_not_gluon_dots(context, q, source, denominator) is None:
        from dydila_kernels.ops.gluon.dots import dots as gluon_dots

        (total, dots), dmeans = gluon_dots(context, q, grad, saved.states[i]), None
    else:
        total, dmeans = state(
            context, q, grad, inverse=denominator.inverse, sums=settings.has_denominator, weights=denominator.weights
        )
    context.sum_over_ranks(total, dmeans)
    queries = side_gradients(context, q, source, denominator, dq, differential_logits=differential_logits, dots=dots)
    matrix = total.to(context.dtype)
    values = values._replace(matrix=placed(matrix) if keys_in_gluon and dots is None else matrix)
    keys = side_gradients(context, k, values, Denominator(dmeans), dk, dv=dv, add=add)
    return queries, keys


def placed(matrix: Tensor) -> Tensor:
    """(.., e) with the columns of each 32 in the order that the Gluon form takes, zeros at the end of the last."""
    whole = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % 32))
    return whole.unflatten(-1, (-1, 4, 4, 2)).transpose(-3, -2).flatten(-4).contiguous()


def room_of(t: Tensor) -> Tensor:
    """Contiguous memory of the shape of t: its own, if that is contiguous."""
    return t if t.is_contiguous() else t.new_empty(t.shape)


def gemm_backward(
    whole: Product, i: int, q: QKOperand, k: QKOperand, dq: Pair, dk: Pair, dv: Tensor, *, add: bool = False,
    differential_logits: Tensor | None = None,
) -> SideTables:  # fmt: skip
    """As :func:`fused_backward`.  Until they are known, contiguous gradients have room for Qh and Kh and for theirs."""
    context, settings, saved, v, grad, dtables = whole
    natural = context.output_scale * context.fp16_prescale
    means, inverse = saved.denominator(i, settings)
    q_hat, k_hat = room_of(dq[0]), room_of(dk[0])
    tokens(context, q, decide=False, out=q_hat, means=means, inverse=inverse)
    tokens(context, k, decide=False, out=k_hat)
    rotate(context, q_hat)
    rotate(context, k_hat)
    values, incoming = zero_where_masked(context, v), zero_where_masked(context, grad)
    if context.by_scores:
        dq_hat, dk_hat = (torch.empty_like(q_hat) if other is None else room_of(other) for _, other in (dq, dk))
        gemm.scores_gradient(context, q_hat, k_hat, values, incoming, dq_hat, dk_hat, dv, natural, add)
    else:
        dq_hat, dk_hat = q_hat, k_hat  # which each product needs no more
        dstate = torch.empty_like(saved.states[i])
        gemm.state(context, dq_hat, incoming, dstate)
        context.sum_over_ranks(dstate)
        gemm.readout(context, dq_hat, incoming, saved.states[i], transposed=True, scale=natural)
        gemm.readout(context, dv, dk_hat, dstate, scale=context.output_scale, add=add)
        gemm.readout(context, dk_hat, values, dstate, transposed=True, scale=natural)
    if dtables:
        hat = torch.empty_like(q_hat)
        tokens(context, q, decide=False, out=hat, means=means, inverse=inverse)
        add_table_gradients(context, hat, dq_hat, dtables)
        tokens(context, k, decide=False, out=hat)
        add_table_gradients(context, hat, dk_hat, dtables)
    rotate(context, dq_hat, transposed=True)
    rotate(context, dk_hat, transposed=True)
    source, denominator, dmeans = source_of(context, given=dq_hat), Denominator(means, inverse), None
    if settings.has_denominator:
        denominator = denominator._replace(weights=denominator_gradient(context, q, source, denominator))
        dmeans = tokens(context, q, decide=False, sums=True, weights=denominator.weights)
        context.sum_over_ranks(dmeans)
    queries = side_gradients(context, q, source, denominator, dq, differential_logits=differential_logits)
    return queries, side_gradients(context, k, source_of(context, given=dk_hat), Denominator(dmeans), dk)


def side_gradients(
    context: LaunchContext, side: QKOperand, source: Source, denominator: Denominator, dz: Pair, *,
    dv: Tensor | None = None, add: bool = False, differential_logits: Tensor | None = None, dots: Tensor | None = None,
) -> TableGradients:  # fmt: skip
    """Of one side, by the kernel that its routers need."""
    if side.slopes is None:
        return gradients(context, side, source, denominator, *dz, dv=dv, add=add, dots=dots)
    return straight_through_gradients(
        context, side, source, denominator, *dz, dv=dv, add=add, differential_logits=differential_logits
    )  # fmt: skip


def router_gradients(
    context: LaunchContext, sides: tuple[QKOperand, QKOperand], tables: list[SideTables], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """Straight through: those of the kernel routers and of the differential routers, from those of their logits."""
    # Dense whatever the strides of the routers, as the operator's fake says.
    dkernel, ddifferential = (
        None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (inputs.kernel_routers, inputs.differential_routers)
    )
    assert dkernel is not None
    for i, side in enumerate(sides):
        branches = [side] if side.redundant is None else side.branches()
        branches = [branch._replace(lam_index=None) for branch in branches]
        logits = torch.cat([pair[i].logits for pair in tables])  # type: ignore[misc]
        for b, branch in enumerate(branches):
            dkernel[2 * b + i] = correlation(context, branch, logits[b], raw=True)
        routed = tables[-1][i].differential_logits
        if routed is not None and ddifferential is not None:
            ddifferential[i] = torch.cat([correlation(context, branch, routed, raw=False) for branch in branches])
    return dkernel, ddifferential
