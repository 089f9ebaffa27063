"""Eqs. 5-9 on a GPU: which kernels run in which order, forward and backward.

Two forms, by the width e = d/H of a head (:data:`LARGEST_HEAD`).  "fused": Zh lives in registers only.

    forward     tokens(K)  state(K, V)  readout(Q), which routes and measures as it goes
    backward    state(Q, dO)  gradients(Q)  gradients(K), which writes dV too

"gemm": Zh is written once and torch multiplies.

    forward     tokens(K)  [gemm]  tokens(Q)  [gemm]
    backward    tokens(Q)  tokens(K)  [gemms]  gradients(Q)  gradients(K)

Kept for the backward pass are the inputs and :class:`Kept`.  Everything runs on the current device without waiting for
it, in a fixed order, and without float atomics.  Where ranks share the tokens, they sum what is summed over tokens:
the states and their gradients, each before it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydila_kernels.ops import depthwise, gemm
from dydila_kernels.ops.call import Call, Side
from dydila_kernels.ops.configs import LARGEST_HEAD, pick
from dydila_kernels.ops.gradients import Incoming, TableGradients, gradients, mass_gradient
from dydila_kernels.ops.linear_attention import correlation, readout, state
from dydila_kernels.ops.tiles import power_of_two
from dydila_kernels.ops.tokens import tokens
from dydila_kernels.types import Ranks


class Inputs(NamedTuple):
    """The tensors of a call, see :func:`dydila_kernels.dydila_attention`, and weight (9, d), bias (d,) of Eq. 9."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_redundant: Tensor | None
    k_redundant: Tensor | None
    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Settings(NamedTuple):
    """The other arguments; ``grids`` are (start, rows, columns) of each, in one flat list."""

    mask: Tensor | None
    cu_seqlens: Sequence[int] | None
    grids: Sequence[int]
    num_heads: int
    normalization: str
    differential: str
    straight_through: bool


class Kept(NamedTuple):
    """What the forward pass keeps, for both sides (first index) and maps; empty where there is no such thing.

    indices (2, maps + 1, T) int8, without the last where nothing is subtracted; statistics (2, maps, 3, T); slopes
    (2, maps, T, n_F), differential_slopes (2, T, n_D); states, see :func:`states_of`, in the working dtype;
    means (products, segments, d) and inverse_mass (products, T, H) under "denominator".  All float32 but where said.
    Products: two for Eq. 10, else one.
    """

    indices: Tensor
    statistics: Tensor
    slopes: Tensor
    differential_slopes: Tensor
    states: Tensor
    means: Tensor
    inverse_mass: Tensor


def is_fused(dim: int, num_heads: int) -> bool:
    return dim // num_heads <= LARGEST_HEAD


def describe(dim: int, num_heads: int, dtype: torch.dtype) -> str:
    """How tokens of d channels in H heads run, in words."""
    e = dim // num_heads
    if not is_fused(dim, num_heads):
        how = f"heads of {e} > {LARGEST_HEAD}: tokens written once, then GEMMs, in the order (Q K^T) V below N = {e}"
    else:
        columns = pick("readout", dtype, e).columns
        made = -(-e // columns) * columns
        how = f"heads of {e}: fused kernels, {columns} channels at a time"
        if made > e:
            how += f" ({made - e} of {made} are padding), results of {power_of_two(e)}"
    if dim * dtype.itemsize % 16:
        how += f"; rows of {dim * dtype.itemsize} bytes are no multiple of 16, so loads are narrow and slow"
    return how


def call_of(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> Call:
    return Call(
        inputs.q, inputs.gamma.contiguous(), inputs.lam if inputs.lam is None else inputs.lam.contiguous(),
        settings.mask, settings.cu_seqlens, settings.grids, settings.num_heads, settings.normalization, ranks,
    )  # fmt: skip


def empty_kept(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> Kept:
    """Memory for what is kept.  Sizes may be symbols: no decision is taken on them."""
    batch, length, dim = inputs.q.shape
    bounds, heads = settings.cu_seqlens, settings.num_heads
    rows, e = batch * length, dim // heads
    segments, longest = batch, length
    if bounds is not None:
        segments = len(bounds) - 1
        longest = max([stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)])
    # A state for each segment, or none where scores pay.
    states = segments if is_fused(dim, heads) or ranks is not None else segments * torch.sym_min(1, longest // e)
    maps = 1 if inputs.q_redundant is None else 2
    products = 2 if settings.differential == "map" else 1
    relative, trained = settings.normalization == "denominator", settings.straight_through
    n_d = 0 if inputs.lam is None else len(inputs.lam)

    def new(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return inputs.q.new_empty(shape if wanted else (0,), dtype=dtype)

    return Kept(
        new(2, maps + (settings.differential != "off"), rows, dtype=torch.int8),
        new(2, maps, 3, rows),
        new(2, maps, rows, len(inputs.gamma), wanted=trained),
        new(2, rows, n_d, wanted=trained and n_d > 0),
        new(products * states * heads * e * e + spare(dim, heads), dtype=working_dtype(inputs, settings)),
        new(products, segments, dim, wanted=relative),
        new(products, rows, heads, wanted=relative),
    )


def working_dtype(inputs: Inputs, settings: Settings) -> torch.dtype:
    """That of the tokens; but float16 has not the range of 1/mass, by which "denominator" divides."""
    wide = inputs.q.dtype == torch.float16 and settings.normalization == "denominator"
    return torch.float32 if wide else inputs.q.dtype


def widened(inputs: Inputs, settings: Settings) -> Inputs:
    """The inputs with tokens in the working dtype."""
    dtype = working_dtype(inputs, settings)
    tokens = [None if t is None else t.to(dtype) for t in inputs[:5]]
    return Inputs(*tokens, *inputs[5:])  # type: ignore[arg-type,call-arg]


def spare(dim: int, num_heads: int) -> int:
    """Numbers at the end of the states: torch compiles a size of 0 or 1 anew, as theirs would be when N is below e."""
    return 0 if is_fused(dim, num_heads) else 2


def states_of(call: Call, kept: Kept, settings: Settings) -> Tensor:
    """(products, segments, H, e, e), a view; without segments where scores pay."""
    products = 2 if settings.differential == "map" else 1
    states = kept.states[: len(kept.states) - spare(call.dim, call.heads)]
    return states.view(products, -1, call.heads, call.head_dim, call.head_dim)


def sides_of(call: Call, inputs: Inputs, settings: Settings, kept: Kept) -> tuple[Side, Side]:
    """Queries and keys."""
    maps = 1 if inputs.q_redundant is None else 2
    routed = {"token": 2, "map": 1, "off": 0}[settings.differential]
    trained = settings.straight_through
    sides = []
    for i, (z, redundant) in enumerate(((inputs.q, inputs.q_redundant), (inputs.k, inputs.k_redundant))):
        router = inputs.differential_routers[i].contiguous() if i < routed else None  # type: ignore[index]
        sides.append(
            Side(
                beside(z),
                None if redundant is None else beside(redundant),
                (
                    inputs.kernel_routers[i].contiguous(),
                    inputs.kernel_routers[2 + i].contiguous() if maps == 2 else None,
                ),
                router,
                kept.indices[i, :maps],
                None if router is None else kept.indices[i, maps],
                kept.statistics[i],
                kept.slopes[i] if trained else None,
                kept.differential_slopes[i] if trained and router is not None else None,
                relative=i == 0 and settings.normalization == "denominator",
                factors=call.factors if i == 0 else None,
            )
        )
    return sides[0], sides[1]


def beside(tokens: Tensor) -> Tensor:
    """With channels beside each other, at the price of a copy where they are not."""
    return tokens if tokens.stride(-1) == 1 or tokens.shape[-1] == 1 else tokens.contiguous()


def attend(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> tuple[Tensor, Kept]:
    """The output (B, N, d), contiguous, and what the backward pass needs."""
    if working_dtype(inputs, settings) != inputs.q.dtype:
        out, kept = attend(widened(inputs, settings), settings, ranks)
        return out.to(inputs.q.dtype), kept
    call = call_of(inputs, settings, ranks)
    kept = empty_kept(inputs, settings, ranks)
    out = torch.empty(inputs.q.shape, dtype=call.dtype, device=call.device)
    q, k = sides_of(call, inputs, settings, kept)
    shaped = kept._replace(states=states_of(call, kept, settings))
    if spare(call.dim, call.heads):
        kept.states[-spare(call.dim, call.heads) :].zero_()
    v, weight = beside(inputs.v), inputs.weight
    if settings.differential == "map":
        # The keys choose no lambda.
        kept.indices[1, -1].zero_()
        kept.differential_slopes[1:].zero_()
        tokens(call, q, decide=True)
        tokens(call, k, decide=True)
        pairs, decide = list(zip(q.maps(), k.maps(), strict=True)), False
    else:
        pairs, decide = [(q, k)], True
    forward = attend_fused if is_fused(call.dim, call.heads) else attend_by_gemm
    for i, (queries, keys) in enumerate(pairs):
        last = i == len(pairs) - 1
        forward(call, queries, keys, v, out, shaped, i, decide, weight if last else None, inputs.bias)
    return out, kept


def attend_fused(
    call: Call, q: Side, k: Side, v: Tensor, out: Tensor, kept: Kept, i: int, decide: bool, weight: Tensor | None,
    bias: Tensor | None,
) -> None:  # fmt: skip
    relative = call.normalization == "denominator"
    if decide:
        tokens(call, k, decide=True)
    total, means = state(call, k, v, sums=relative)
    call.sum_over_ranks(total, means)
    kept.states[i] = total
    if means is not None:
        kept.means[i] = means
    means, inverse_mass = masses_of(kept, i, relative)
    readout(
        call, q, kept.states[i], out, decide=decide, add=i > 0, means=means, inverse_mass=inverse_mass, values=v,
        weight=weight, bias=bias,
    )  # fmt: skip


def attend_by_gemm(
    call: Call, q: Side, k: Side, v: Tensor, out: Tensor, kept: Kept, i: int, decide: bool, weight: Tensor | None,
    bias: Tensor | None,
) -> None:  # fmt: skip
    relative, values = call.normalization == "denominator", zero_where_masked(call, v)
    # Until it is known, the output has room for the keys.
    q_hat, k_hat = torch.empty_like(out), out if i == 0 else torch.empty_like(out)
    means = tokens(call, k, decide=decide, out=k_hat, sums=relative)
    if not gemm.pays_scores(call):
        gemm.state(call, k_hat, values, kept.states[i])
        call.sum_over_ranks(kept.states[i], means)
    if means is not None:
        kept.means[i] = means
    means, inverse_mass = masses_of(kept, i, relative)
    tokens(call, q, decide=decide, out=q_hat, means=means, inverse_mass=inverse_mass)
    if gemm.pays_scores(call):
        gemm.scores(call, q_hat, k_hat, values, out, add=i > 0)
    else:
        gemm.readout(call, out, q_hat, kept.states[i], scale=call.rescale, add=i > 0)
    if weight is not None:
        depthwise.depthwise(out, v, weight.t(), bias, call.geometry, call.mask)


def masses_of(kept: Kept, i: int, relative: bool) -> tuple[Tensor | None, Tensor | None]:
    """Under "denominator" the mean mass of the keys of product i, and the inverse mass of its queries."""
    return (kept.means[i], kept.inverse_mass[i]) if relative else (None, None)


class Gradients(NamedTuple):
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


def pull_back(grad: Tensor, inputs: Inputs, settings: Settings, kept: Kept, ranks: Ranks | None = None) -> Gradients:
    """The gradients, from that of the output."""
    if working_dtype(inputs, settings) != inputs.q.dtype:
        wide = widened(inputs, settings)
        found = pull_back(grad.to(wide.q.dtype), wide, settings, kept, ranks)
        narrow = [None if t is None else t.to(inputs.q.dtype) for t in found[:5]]
        return Gradients(*narrow, *found[5:])  # type: ignore[arg-type,call-arg]
    call = call_of(inputs, settings, ranks)
    q, k = sides_of(call, inputs, settings, kept)
    grad, v = beside(grad), beside(inputs.v)
    dq, dk, dv, dq_redundant, dk_redundant = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs[:5]
    )
    assert dq is not None and dk is not None and dv is not None
    backward = pull_back_fused if is_fused(call.dim, call.heads) else pull_back_by_gemm
    shaped = kept._replace(states=states_of(call, kept, settings))
    whole, weight = (call, v, grad, shaped), inputs.weight
    if settings.differential == "map":
        assert dq_redundant is not None and dk_redundant is not None
        (q1, q2), (k1, k2) = q.maps(), k.maps()
        # The second map first: it is the one to find the gradient of lambda, and of the logits of its router.
        second = backward(*whole, 1, q2, k2, (dq_redundant, None), (dk_redundant, None), dv, False, None, None)
        routed = second[0].differential_logits
        first = backward(*whole, 0, q1, k1, (dq, None), (dk, None), dv, True, weight, routed)
        tables = [first, second]
    else:
        tables = [backward(*whole, 0, q, k, (dq, dq_redundant), (dk, dk_redundant), dv, False, weight, None)]

    dgamma = torch.stack([side.gamma for pair in tables for side in pair]).sum(0)
    dlams = [side.lam for pair in tables for side in pair if side.lam is not None]
    dlam = None if inputs.lam is None else torch.stack(dlams).sum(0).to(inputs.lam.dtype)
    routers = router_gradients(call, (q, k), tables, inputs) if settings.straight_through else (None, None)
    dweight = dbias = None
    if weight is not None:
        dweight, dbias = depthwise.depthwise_weight_gradient(v, grad, call.geometry, call.mask)
        dweight, dbias = dweight.t().contiguous(), dbias.clone()  # neither a view, as an operator must return them
    return Gradients(
        dq, dk, dv, dq_redundant, dk_redundant, dgamma.to(inputs.gamma.dtype), dlam, routers[0], routers[1], dweight,
        None if inputs.bias is None else dbias,
    )  # fmt: skip


Pair = tuple[Tensor, Tensor | None]
"""Gradients of tokens and redundancy."""
Tables = tuple[TableGradients, TableGradients]
"""Of queries and keys."""


def pull_back_fused(
    call: Call, v: Tensor, grad: Tensor, kept: Kept, i: int, q: Side, k: Side, dq: Pair, dk: Pair, dv: Tensor,
    add: bool, weight: Tensor | None, routed: Tensor | None,
) -> Tables:  # fmt: skip
    """Both sides of product i: writes dq and dk, writes or ``add``s to dv.

    ``routed`` are the gradients of the logits of Eq. 7's router where they are known.
    """
    relative = call.normalization == "denominator"
    means, inverse_mass = masses_of(kept, i, relative)
    source = Incoming(grad, kept.states[i], inverse_mass=inverse_mass, mass_vector=means)
    if relative:
        source = source._replace(mass_weights=mass_gradient(call, q, source))
    total, mass = state(
        call, q, grad, inverse_mass=source.inverse_mass, sums=relative, mass_weights=source.mass_weights
    )
    call.sum_over_ranks(total, mass)
    queries = gradients(call, q, source, *dq, differential_logits=routed)
    source = Incoming(v, total.to(call.dtype), mass_vector=mass)
    return queries, gradients(call, k, source, *dk, dx=dv, add=add, grad=grad, weight=weight)


def pull_back_by_gemm(
    call: Call, v: Tensor, grad: Tensor, kept: Kept, i: int, q: Side, k: Side, dq: Pair, dk: Pair, dv: Tensor,
    add: bool, weight: Tensor | None, routed: Tensor | None,
) -> Tables:  # fmt: skip
    """As :func:`pull_back_fused`.  Until they are known, dq and dk have room for Qh and Kh and for their gradients."""
    relative, natural = call.normalization == "denominator", call.rescale * call.unit
    means, inverse_mass = masses_of(kept, i, relative)
    tokens(call, q, decide=False, out=dq[0], means=means, inverse_mass=inverse_mass)
    tokens(call, k, decide=False, out=dk[0])
    values, incoming = zero_where_masked(call, v), zero_where_masked(call, grad)
    if gemm.pays_scores(call):
        dq_hat, dk_hat = (torch.empty_like(z) if other is None else other for z, other in (dq, dk))
        gemm.scores_gradient(call, dq[0], dk[0], values, incoming, dq_hat, dk_hat, dv, natural, add)
    else:
        dq_hat, dk_hat = dq[0], dk[0]
        dstate = torch.empty_like(kept.states[i])
        gemm.state(call, dq_hat, incoming, dstate)
        call.sum_over_ranks(dstate)
        gemm.readout(call, dq_hat, incoming, kept.states[i], transposed=True, scale=natural)
        gemm.readout(call, dv, dk_hat, dstate, scale=call.rescale, add=add)
        gemm.readout(call, dk_hat, values, dstate, transposed=True, scale=natural)
    if weight is not None:
        depthwise.depthwise_input_gradient(dv, grad, weight.t(), call.geometry, call.mask)
    source, mass = Incoming(given=dq_hat, inverse_mass=inverse_mass, mass_vector=means), None
    if relative:
        source = source._replace(mass_weights=mass_gradient(call, q, source))
        mass = tokens(call, q, decide=False, sums=True, mass_weights=source.mass_weights)
        call.sum_over_ranks(mass)
    queries = gradients(call, q, source, *dq, differential_logits=routed)
    return queries, gradients(call, k, Incoming(given=dk_hat, mass_vector=mass), *dk)


def zero_where_masked(call: Call, t: Tensor) -> Tensor:
    """A GEMM multiplies what masked tokens hold by zero, and that may be NaN."""
    return t if call.mask is None else t.masked_fill(~call.mask[..., None], 0)


def router_gradients(
    call: Call, sides: tuple[Side, Side], tables: list[Tables], inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """Straight through: those of the kernel routers and of the differential routers, from those of their logits."""
    # Dense whatever the strides of the routers, as the operator's fake says.
    dkernel, ddifferential = (
        None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (inputs.kernel_routers, inputs.differential_routers)
    )
    assert dkernel is not None
    for i, side in enumerate(sides):
        singles = [side] if side.redundant is None else side.maps()
        logits = torch.cat([pair[i].logits for pair in tables])  # type: ignore[misc]
        for m, single in enumerate(singles):
            dkernel[2 * m + i] = correlation(call, single._replace(choice=None), logits[m], raw=True)
        routed = tables[-1][i].differential_logits
        if routed is not None and ddifferential is not None:
            parts = [correlation(call, single._replace(choice=None), routed, raw=False) for single in singles]
            ddifferential[i] = torch.cat(parts)
    return dkernel, ddifferential
