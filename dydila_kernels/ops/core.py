"""Eqs. 5-9 on a GPU: which kernels run in which order; :mod:`backward` has the backward pass.

Three forms.  "written", where :mod:`forms` says so: Zh is written once, in the memory of the output.

    forward     tokens(K)  written_state(K, V)  tokens(Q)  written_readout(Q)
    backward    that of the others

Where float16 has not the range ("denominator") what is written has memory of its own, in float32.

The others by the width e = d/H of a head (:data:`LARGEST_HEAD`), see :func:`is_fused`.  "fused": Zh lives in registers
only.

    forward     tokens(K)  state(K, V)  readout(Q), which routes and measures as it goes
    backward    state(Q, dO)  gradients(Q)  gradients(K), which writes dV too

"gemm": Zh is written once and torch multiplies.  With rotary embeddings :mod:`rotary` turns it in between, and in the
backward pass turns its gradient back.

    forward     tokens(K)  [gemm]  tokens(Q)  [gemm]
    backward    tokens(Q)  tokens(K)  [gemms]  gradients(Q)  gradients(K)

The convolution of Eq. 9 comes after them in all forms, and so do its gradients, see :mod:`depthwise`.

Saved for the backward pass are the inputs and :class:`SavedForBackward`.  Everything runs on the current device without
waiting for it, in a fixed order, and without float atomics.  Where ranks share the tokens, they sum what is summed over
tokens: the states and their gradients, each before it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dydila_kernels.ops import depthwise, forms, gemm
from dydila_kernels.ops.arguments import contiguous_channels
from dydila_kernels.ops.configs import LARGEST_HEAD, pick
from dydila_kernels.ops.context import LaunchContext, QKOperand, Rotary
from dydila_kernels.ops.linear_attention import readout, state, written_readout, written_state
from dydila_kernels.ops.rotary import rotate
from dydila_kernels.ops.tiles import power_of_two
from dydila_kernels.ops.tokens import tokens
from dydila_kernels.types import Ranks


class Inputs(NamedTuple):
    """The tensors of a call: :class:`CoreInputs`, and weight (9, d), bias (d,) float32 of Eq. 9, or None.

    cos, sin (B, N, e) of any floating dtype, or None.
    """

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
    cos: Tensor | None
    sin: Tensor | None


class Settings(NamedTuple):
    """The other arguments; ``grids`` are (start, rows, columns) of each, in one flat list.

    ``rotary_pairing`` is None without rotary embeddings; ``rotary_gradient``: whether their tables get a gradient.
    """

    mask: Tensor | None
    cu_seqlens: Sequence[int] | None
    grids: Sequence[int]
    num_heads: int
    normalization: str
    differential: str
    straight_through: bool
    rotary_pairing: str | None
    rotary_gradient: bool

    @property
    def products(self) -> int:
        """Of queries with keys and values: two for Eq. 10, else one."""
        return 2 if self.differential == "map" else 1

    @property
    def has_denominator(self) -> bool:
        return self.normalization == "denominator"

    def differentiates(self, name: str) -> bool:
        """Whether the backward pass finds the gradient of this field of :class:`Inputs`, if it is given."""
        if name in ("kernel_routers", "differential_routers"):
            return self.straight_through
        return self.rotary_gradient if name in ("cos", "sin") else True


class SavedForBackward(NamedTuple):
    """What the forward pass saves, for both sides (first index) and branches; None where there is no such thing, for
    which the operators have an empty tensor.

    indices (2, branches + 1, T) int8, without the last where nothing is subtracted; statistics (2, branches, 3, T);
    slopes (2, branches, T, n_F), differential_slopes (2, T, n_D); states, see :func:`states_of`, in the working dtype;
    means (products, segments, d) and inverse (products, T, H) under "denominator", see :class:`Denominator`.  All
    float32 but where said.
    """

    indices: Tensor
    statistics: Tensor
    slopes: Tensor | None
    differential_slopes: Tensor | None
    states: Tensor
    means: Tensor | None
    inverse: Tensor | None

    def denominator(self, product: int, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
        """Of a product the mean terms of the keys (segments, d) and the inverse denominators (T, H), or None."""
        if not settings.has_denominator:
            return None, None
        assert self.means is not None and self.inverse is not None
        return self.means[product], self.inverse[product]


def is_fused(dim: int, settings: Settings) -> bool:
    """Whether heads are narrow enough for a state in registers; rotary embeddings turn what is written."""
    return settings.rotary_pairing is None and dim // settings.num_heads <= LARGEST_HEAD


def describe(dim: int, num_heads: int, dtype: torch.dtype) -> str:
    """How tokens of d channels in H heads run, in words."""
    e = dim // num_heads
    if e > LARGEST_HEAD:
        how = f"heads of {e} > {LARGEST_HEAD}: tokens written once, then GEMMs, in the order (Q K^T) V below N = {e}"
    else:
        columns = pick("readout", dtype, e).block_d
        made = -(-e // columns) * columns
        how = f"heads of {e}: fused kernels, {columns} channels at a time"
        if made > e:
            how += f" ({made - e} of {made} are padding), results of {power_of_two(e)}"
    if dim * dtype.itemsize % 16:
        how += f"; rows of {dim * dtype.itemsize} bytes are no multiple of 16, so loads are narrow and slow"
    return how


def context_of(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> LaunchContext:
    """What the launches of this call have in common."""
    rotary = None
    if inputs.cos is not None and inputs.sin is not None and settings.rotary_pairing is not None:
        rotary = Rotary(contiguous_channels(inputs.cos), contiguous_channels(inputs.sin), settings.rotary_pairing)
    return LaunchContext(
        inputs.q, inputs.gamma.contiguous(), inputs.lam if inputs.lam is None else inputs.lam.contiguous(),
        settings.mask, settings.cu_seqlens, settings.grids, settings.num_heads, settings.normalization, ranks,
        rotary,
    )  # fmt: skip


def empty_saved(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> SavedForBackward:
    """Memory for what is saved.  Sizes may be symbols: no decision is taken on them."""
    batch, length, dim = inputs.q.shape
    bounds, heads, products = settings.cu_seqlens, settings.num_heads, settings.products
    count, e = batch * length, dim // heads
    segments, longest = batch, length
    if bounds is not None:
        segments = len(bounds) - 1
        longest = max([stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)])
    # A state for each segment, or none where scores pay.
    states = segments if is_fused(dim, settings) or ranks is not None else segments * torch.sym_min(1, longest // e)
    branches = 1 if inputs.q_redundant is None else 2
    trained, n_d = settings.straight_through, 0 if inputs.lam is None else inputs.lam.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return inputs.q.new_empty(shape, dtype=dtype)

    return SavedForBackward(
        new(2, branches + (settings.differential != "off"), count, dtype=torch.int8),
        new(2, branches, 3, count),
        new(2, branches, count, inputs.gamma.shape[0]) if trained else None,
        new(2, count, n_d) if trained and n_d else None,
        new(products * states * heads * e * e + spare(dim, settings), dtype=working_dtype(inputs, settings)),
        new(products, segments, dim) if settings.has_denominator else None,
        new(products, count, heads) if settings.has_denominator else None,
    )


def working_dtype(inputs: Inputs, settings: Settings) -> torch.dtype:
    """That of the tokens; but float16 has not the range of denominators."""
    wide = inputs.q.dtype == torch.float16 and settings.has_denominator
    return torch.float32 if wide else inputs.q.dtype


def widened(inputs: Inputs, settings: Settings) -> Inputs:
    """The inputs with tokens in the working dtype."""
    dtype = working_dtype(inputs, settings)
    tokens = [None if t is None else t.to(dtype) for t in inputs[:5]]
    return Inputs(*tokens, *inputs[5:])  # type: ignore[arg-type,call-arg]


def spare(dim: int, settings: Settings) -> int:
    """Numbers at the end of the states: torch compiles a size of 0 or 1 anew, as theirs would be when N is below e."""
    return 0 if is_fused(dim, settings) else 2


def states_of(context: LaunchContext, saved: SavedForBackward, settings: Settings) -> Tensor:
    """(products, segments, H, e, e), a view; without segments where scores pay."""
    unused = spare(context.dim, settings)
    states = saved.states[:-unused] if unused else saved.states
    return states.view(settings.products, -1, context.heads, context.head_dim, context.head_dim)


def operands_of(
    context: LaunchContext, inputs: Inputs, settings: Settings, saved: SavedForBackward
) -> tuple[QKOperand, QKOperand]:
    """Queries and keys."""
    routers = inputs.kernel_routers.contiguous().unbind()
    differential = [] if inputs.differential_routers is None else inputs.differential_routers.contiguous().unbind()
    indices, statistics = saved.indices.unbind(), saved.statistics.unbind()
    slopes = saved.slopes if settings.straight_through else None
    differential_slopes = saved.differential_slopes if settings.straight_through else None
    operands = []
    for i, (z, redundant) in enumerate(((inputs.q, inputs.q_redundant), (inputs.k, inputs.k_redundant))):
        router = differential[i] if i < len(differential) else None
        operands.append(
            QKOperand(
                contiguous_channels(z),
                None if redundant is None else contiguous_channels(redundant),
                (routers[i], None if redundant is None else routers[2 + i]),
                router,
                indices[i],
                None if router is None else indices[i][-1],
                statistics[i],
                None if slopes is None else slopes[i],
                None if router is None or differential_slopes is None else differential_slopes[i],
                has_denominator=i == 0 and settings.has_denominator,
                length_scale=context.length_scale if i == 0 else None,
            )
        )
    return operands[0], operands[1]


# Forward --------------------------------------------------------------------------------------------------------------


def forward(inputs: Inputs, settings: Settings, ranks: Ranks | None = None) -> tuple[Tensor, SavedForBackward]:
    """The output (B, N, d), contiguous, in the dtype of q, and what the backward pass needs."""
    context = context_of(inputs, settings, ranks)
    saved = empty_saved(inputs, settings, ranks)
    sides = operands_of(context, inputs, settings, saved)
    if working_dtype(inputs, settings) != inputs.q.dtype and not takes_written(context, settings, sides):
        out, saved = forward(widened(inputs, settings), settings, ranks)
        return out.to(inputs.q.dtype), saved
    q, k = sides
    out = torch.empty(inputs.q.shape, dtype=context.dtype, device=context.device)
    if spare(context.dim, settings):
        saved.states[-spare(context.dim, settings) :].zero_()
    shaped = saved._replace(states=states_of(context, saved, settings))
    product = fused_product if is_fused(context.dim, settings) else gemm_product
    v = contiguous_channels(inputs.v)
    if settings.differential == "map":
        # Eq. 10: the products of the two branches, the second added to the first.  The keys choose no lambda.
        saved.indices[1, -1].zero_()
        if saved.differential_slopes is not None:
            saved.differential_slopes[1:].zero_()
        tokens(context, q, decide=True)
        tokens(context, k, decide=True)
        (q1, q2), (k1, k2) = q.branches(), k.branches()
        product(context, settings, shaped, 0, q1, k1, v, out, decide=False, add=False)
        product(context, settings, shaped, 1, q2, k2, v, out, decide=False, add=True)
    else:
        product(context, settings, shaped, 0, q, k, v, out, decide=True, add=False)
    if inputs.weight is not None:
        depthwise.depthwise(out, v, inputs.weight, inputs.bias, context.geometry, context.mask)
    return out, saved


def takes_written(context: LaunchContext, settings: Settings, sides: tuple[QKOperand, QKOperand]) -> bool:
    """Whether :func:`written_product` makes the product of these sides.  Those of Eq. 10 are routed before."""
    if settings.differential == "map" or not is_fused(context.dim, settings):
        return False
    return are_in_gluon(context, *sides)


def are_in_gluon(
    context: LaunchContext, q: QKOperand, k: QKOperand, *, decide: bool = True, divide: bool = False
) -> bool:
    """Whether the tokens of both sides take the Gluon form; ``divide``: whether Qh is to be over its denominators."""
    reason = forms.why_not_gluon_tokens(context, k, decide=decide)
    return reason is None and forms.why_not_gluon_tokens(context, q, decide=decide, divide=divide) is None


def fused_product(
    context: LaunchContext, settings: Settings, saved: SavedForBackward, i: int, q: QKOperand, k: QKOperand, v: Tensor,
    out: Tensor, *, decide: bool, add: bool,
) -> None:  # fmt: skip
    """Product i: writes O (B, N, d) to ``out`` or adds it."""
    if takes_written(context, settings, (q, k)):
        written_product(context, saved, i, q, k, v, out)
        return
    if decide:
        tokens(context, k, decide=True)
    total, means = state(context, k, v, sums=settings.has_denominator)
    context.sum_over_ranks(total, means)
    saved.states[i] = total
    if means is not None and saved.means is not None:
        saved.means[i] = means
    means, inverse = saved.denominator(i, settings)
    readout(context, q, saved.states[i], out, decide=decide, add=add, means=means, inverse=inverse)


def written_product(
    context: LaunchContext, saved: SavedForBackward, i: int, q: QKOperand, k: QKOperand, v: Tensor, out: Tensor
) -> None:
    """As :func:`fused_product`, where each power is made once: ``out`` holds Kh, then Qh, then O.

    Where float16 has not the range, Kh and Qh are in memory of their own, in the working dtype.
    """
    from dydila_kernels.ops.gluon.routers import prepared
    from dydila_kernels.ops.gluon.tokens import tokens as gluon_tokens

    written = out if out.dtype == saved.states.dtype else torch.empty_like(out, dtype=saved.states.dtype)
    q, k = prepared(context, (q, k))
    means = gluon_tokens(context, k, written, sums=q.has_denominator)
    total = written_state(context, k, written, v)
    context.sum_over_ranks(total, means)
    state = saved.states[i].copy_(total)
    if means is not None and saved.means is not None:
        saved.means[i] = means
    parts = gluon_tokens(context, q, written, means=means)
    written_readout(context, written, state, out, parts, None if saved.inverse is None else saved.inverse[i])


def gemm_product(
    context: LaunchContext, settings: Settings, saved: SavedForBackward, i: int, q: QKOperand, k: QKOperand, v: Tensor,
    out: Tensor, *, decide: bool, add: bool,
) -> None:  # fmt: skip
    """As :func:`fused_product`."""
    if are_in_gluon(context, q, k, decide=decide, divide=settings.has_denominator):
        from dydila_kernels.ops.gluon.routers import prepared

        q, k = prepared(context, (q, k))
    values = zero_where_masked(context, v)
    # Until it is known, the output has room for the keys.
    q_hat, k_hat = torch.empty_like(out), torch.empty_like(out) if add else out
    means = tokens(context, k, decide=decide, out=k_hat, sums=settings.has_denominator)
    rotate(context, k_hat)
    if not context.by_scores:
        gemm.state(context, k_hat, values, saved.states[i])
        context.sum_over_ranks(saved.states[i], means)
    if means is not None and saved.means is not None:
        saved.means[i] = means
    means, inverse = saved.denominator(i, settings)
    tokens(context, q, decide=decide, out=q_hat, means=means, inverse=inverse)
    rotate(context, q_hat)
    if context.by_scores:
        gemm.scores(context, q_hat, k_hat, values, out, add=add)
    else:
        gemm.readout(context, out, q_hat, saved.states[i], scale=context.output_scale, add=add)


def zero_where_masked(context: LaunchContext, t: Tensor) -> Tensor:
    """A GEMM multiplies what masked tokens hold by zero, and that may be NaN."""
    return t if context.mask is None else t.masked_fill(~context.mask[..., None], 0)
