"""The backward pass of one side, queries or keys: from the gradient of Zh to those of Z, Z', gamma and lambda.

With the notation of :mod:`dydila_kernels.ops.tokens`, G = dL/dphi(Z), c = p . G and t = G - p c / |p|^2 per row,

    dZ = (renorm/m) gamma (p/s) t + c / (|p|^2 renorm/m) s      where Z > 0,          renorm/m = |s| / |p|
    dgamma = renorm ln 2 sum p log2(s) t

so the scale of the row appears in dgamma alone.  From dy = dL/dZh: G = dy for phi(Z), -lambda dy for phi(Z'), and
dlambda = -phi(Z') . dy.  "denominator" adds the gradient u of its terms: G += u and |lambda| u, dlambda += sign(lambda)
phi(Z') . u.

dy is read, or made anew as X M^T per head: dO S^T for queries, V dS^T for keys.  The kernel walks over its rows twice,
for the sums over a row and then for dZ.  Where routers are trained, :mod:`straight_through` has a third walk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs, forms
from dydila_kernels.ops.arguments import Denominator, Gradients, Routers, Scaling, Source, constant, strided
from dydila_kernels.ops.branches import (
    branch_pointers,
    difference_of,
    load_neg_lam,
    load_per_head,
    load_row_stats,
    powers_of,
    reciprocal,
    relu_scaled,
    weigh,
)
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.linear_attention import write_readout
from dydila_kernels.ops.tiles import TINY, launch, log2, padded, row_dot, row_pointers, tile_mask, tile_of_program

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_operand(source, h, tile, active_rows, E: tl.constexpr):
    """x_h (R, e padded) of source.x, with which the chunks of dy are products; None where dy is given."""
    if source.x is None:
        return None
    else:
        across = tl.arange(0, padded(E))
        pointers = row_pointers(source.x, tile) + h * E + across[None, :]
        return tl.load(pointers, mask=tile_mask(active_rows, across, E, padded(E)), other=0.0)


@triton.jit
def incoming(x, source, denominator, h, columns, tile, active_rows, k):
    """dy and u (R, C) of ``columns`` (C,) of head h; u is None without a denominator.  x: the operand of the head."""
    E: tl.constexpr = k.D // k.H
    if source.given is not None:
        mask = tile_mask(active_rows, columns, E, k.BLOCK_D)
        pointers = source.given + (tile.token_ids * k.H + h)[:, None] * E + columns[None, :]
        dy = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        across = tl.arange(0, padded(E))
        matrix = source.matrix + tile.segment * (k.D * E) + (h * E + columns[None, :]) * E + across[:, None]
        matrix = tl.load(matrix, mask=(across < E)[:, None] & (columns < E)[None, :], other=0.0)
        dy = tl.dot(x, matrix, input_precision=k.PRECISION)
    dy *= source.scale
    if denominator.inverse is not None:
        dy *= load_per_head(denominator.inverse, h, tile, active_rows, k.H)[:, None]
    if denominator.vector is None:
        return dy, None
    else:
        vector = denominator.vector + tile.segment * k.D + h * E + columns
        u = tl.load(vector, mask=columns < E, other=0.0)[None, :]
        if denominator.weights is None:
            return dy, tl.where(active_rows[:, None], u, 0.0)
        else:
            return dy, u * load_per_head(denominator.weights, h, tile, active_rows, k.H)[:, None]


@triton.jit
def pass_on(acc, dlogits, router, columns, col_mask, NUM_OPTIONS: tl.constexpr, PRECISION: tl.constexpr):
    """acc (R, C) + dlogits router^T: what the logits (R, n) of router (d, n) pass on to channels ``columns`` (C,)."""
    option_ids = tl.arange(0, padded(NUM_OPTIONS))
    mask = (option_ids < NUM_OPTIONS)[:, None] & col_mask[None, :]
    rows = tl.load(router + columns[None, :] * NUM_OPTIONS + option_ids[:, None], mask=mask, other=0.0).to(tl.float32)
    return tl.dot(dlogits, rows, acc, input_precision=PRECISION)


@triton.jit
def gradient_of_phi(dy, u, branch, dlogits, router, columns, col_mask, k):
    """G (R, C) of one branch; dlogits (R, n_D padded) of router (d, n_D), or None."""
    g = dy * branch.weight[:, None]
    if u is not None:
        g += u * branch.abs_weight[:, None]
    if dlogits is not None:
        g = pass_on(g, dlogits, router, columns, col_mask, k.N_D, k.PRECISION)
    return g


@triton.jit
def power_parts(branch, columns, mask, FAST: tl.constexpr):
    """s, log2 s and q = p/s = s^(gamma - 1) of a tile (R, C) of one branch; q is zero where s is."""
    s = relu_scaled(tl.load(branch.row_ptrs + columns[None, :], mask=mask, other=0.0), branch.stats.inv_max)
    log = log2(tl.maximum(s, TINY), FAST)
    return s, log, tl.where(s < TINY, 0.0, tl.exp2((branch.stats.gamma - 1.0)[:, None] * log))


@triton.jit
def load_tile(tokens, segments, tables, stats, scaling, k):
    """The tile, its branches, which rows are there and not all zero, -lambda and the row scale (R,)."""
    tile = tile_of_program(segments, k.BLOCK_N)
    row_ptrs = branch_pointers(tokens, tile)
    row_stats = load_row_stats(row_ptrs, stats, tables, tile)
    neg_lam = load_neg_lam(stats, tables, tile)
    branches, nonzero_rows, row_scale = weigh(row_ptrs, row_stats, neg_lam, scaling, tile.segment, k)
    return tile, branches, tile.row_mask & nonzero_rows, neg_lam, row_scale


@triton.jit
def first_walk(branches, source, denominator, tile, active_rows, k):
    """The sums (R,) of p . dy and p . u of the first branch, then of the second."""
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    zero = tl.zeros(tile.token_ids.shape, tl.float32)
    dy1, dy2, u1, u2 = zero, zero, zero, zero
    for h in range(0, k.H):
        x = load_operand(source, h, tile, active_rows, E)
        for c in range(0, E, k.BLOCK_D):
            dy, u = incoming(x, source, denominator, h, c + chunk, tile, active_rows, k)
            mask = tile_mask(active_rows, c + chunk, E, k.BLOCK_D)
            powers = powers_of(branches, h * E + c + chunk, mask, k.FAST)
            dy1 += row_dot(powers[0], dy)
            if len(branches) == 2:
                dy2 += row_dot(powers[1], dy)
            if u is not None:
                u1 += row_dot(powers[0], u)
                if len(branches) == 2:
                    u2 += row_dot(powers[1], u)
    return dy1, u1, dy2, u2


@triton.jit
def lambda_gradient(sums, branches, neg_lam, row_scale):
    """dlambda (R,) from the sums of :func:`first_walk`; lambda belongs to the last branch."""
    dy1, _, dy2, u2 = sums
    if len(branches) == 1:
        return -branches[0].stats.renorm * row_scale * dy1
    else:
        sign = tl.where(neg_lam > 0, 1.0, tl.where(neg_lam < 0, -1.0, 0.0))
        return -branches[1].stats.renorm * row_scale * (dy2 + sign * u2)


@triton.jit
def chosen_sum(values, index, tile, row_mask, NUM_OPTIONS: tl.constexpr):
    """The sum of values (R,) over the rows that chose each entry of a table: (n padded,)."""
    option_ids = tl.arange(0, padded(NUM_OPTIONS))
    chosen = tl.load(index + tile.token_ids, mask=row_mask, other=0).to(tl.int32)
    hit = (chosen[:, None] == option_ids[None, :]) & row_mask[:, None]
    return tl.sum(tl.where(hit, values[:, None], 0.0), axis=0)


@triton.jit
def store_table(out, sums, NUM_OPTIONS: tl.constexpr):
    """sums (n padded,) to the row of this program in out (programs, n)."""
    option_ids = tl.arange(0, padded(NUM_OPTIONS))
    row = out + tl.program_id(0).to(tl.int64) * NUM_OPTIONS
    tl.store(row + option_ids, sums, mask=option_ids < NUM_OPTIONS)


@triton.jit
def store_gradient(out, stride, total, branch, c, squares, g, dlogits, router, tile, columns, col_mask, active_rows, k):
    """Writes dZ of a tile (R, C) of one branch; returns the sum (R,) of p log2(s) t, plus that of other tiles.

    out (T, d), its rows ``stride`` apart, a constant; squares (T,), |p|^2; dlogits (R, n_F padded) of router (d, n_F),
    or None.
    """
    s, log, q = power_parts(branch, columns, active_rows[:, None] & col_mask[None, :], k.FAST)
    power = tl.load(squares + tile.token_ids, mask=active_rows, other=0.0)
    ratio = branch.stats.renorm * branch.stats.inv_max
    t = q * (g - (q * s) * (c * reciprocal(power, k.FAST))[:, None])
    dz = (ratio * branch.stats.gamma)[:, None] * t + (c * reciprocal(power * ratio, k.FAST))[:, None] * s
    if dlogits is not None:
        dz = pass_on(dz, dlogits, router, columns, col_mask, k.N_F, k.PRECISION)
    dz = tl.where(active_rows[:, None], dz, 0.0).to(out.dtype.element_ty)
    tl.store(
        out + tile.token_ids[:, None] * stride + columns[None, :], dz, mask=tile.row_mask[:, None] & col_mask[None, :]
    )
    return total + row_dot(s * log, t)


@triton.jit
def last_walk(grads, stats, c1, c2, branches, source, denominator, routers, dlogits1, dlogits2, dlogits_d, tile,
              active_rows, k):  # fmt: skip
    """Writes dZ and dZ', and dgamma; c1 and c2 (R,) are c of the branches.

    dlogits1, dlogits2, dlogits_d (R, n padded): of the two kernel routers and of the differential router, or None.
    """
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    zero = tl.zeros(tile.token_ids.shape, tl.float32)
    total1, total2 = zero, zero
    for h in range(0, k.H):
        x = load_operand(source, h, tile, active_rows, E)
        for c in range(0, E, k.BLOCK_D):
            dy, u = incoming(x, source, denominator, h, c + chunk, tile, active_rows, k)
            columns, col_mask = h * E + c + chunk, c + chunk < E
            g = gradient_of_phi(dy, u, branches[0], dlogits_d, routers.differential, columns, col_mask, k)
            total1 = store_gradient(grads.dz, grads.stride, total1, branches[0], c1, stats.norms + 2 * tile.T, g,
                                    dlogits1, routers.kernel, tile, columns, col_mask, active_rows, k)  # fmt: skip
            if len(branches) == 2:
                second = None if routers.differential is None else routers.differential + k.D * k.N_D
                g = gradient_of_phi(dy, u, branches[1], dlogits_d, second, columns, col_mask, k)
                total2 = store_gradient(grads.dz_redundant, grads.stride, total2, branches[1], c2,
                                        stats.norms + 5 * tile.T, g, dlogits2, routers.kernel_redundant, tile, columns,
                                        col_mask, active_rows, k)  # fmt: skip
    dgamma = chosen_sum(branches[0].stats.renorm * LN2 * total1, stats.index, tile, active_rows, k.N_F)
    if len(branches) == 2:
        total2 *= branches[1].stats.renorm * LN2
        dgamma += chosen_sum(total2, stats.index + tile.T, tile, active_rows, k.N_F)
    store_table(grads.dgamma, dgamma, k.N_F)


@triton.jit
def denominator_gradient_kernel(tokens, segments, tables, stats, scaling, source, denominator, out, k: tl.constexpr):
    """out (T, H) = the gradient of the denominators of queries, -(Zh_h . dy_h) / denominator.

    The arguments as in :func:`gradients_kernel`.
    """
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    tile, branches, active_rows, _, _ = load_tile(tokens, segments, tables, stats, scaling, k)
    for h in range(0, k.H):
        x = load_operand(source, h, tile, active_rows, E)
        total = tl.zeros(tile.token_ids.shape, tl.float32)
        for c in range(0, E, k.BLOCK_D):
            dy = incoming(x, source, denominator, h, c + chunk, tile, active_rows, k)[0]
            mask = tile_mask(active_rows, c + chunk, E, k.BLOCK_D)
            powers = powers_of(branches, h * E + c + chunk, mask, k.FAST)
            total += row_dot(difference_of(powers, branches), dy)
        inverse = load_per_head(denominator.inverse, h, tile, active_rows, k.H)
        tl.store(out + tile.token_ids * k.H + h, -total * inverse, mask=tile.row_mask)


@triton.jit
def gradients_kernel(tokens, segments, tables, stats, scaling, source, denominator, grads, k: tl.constexpr,
                     ADD: tl.constexpr):  # fmt: skip
    """One program for a tile of tokens of one side, all channels.

    grads.dv, where given: source.scale Zh matrix, plus what ADD finds there.  The arguments are as in
    :mod:`dydila_kernels.ops.arguments`.
    """
    tile, branches, active_rows, neg_lam, row_scale = load_tile(tokens, segments, tables, stats, scaling, k)
    sums = first_walk(branches, source, denominator, tile, active_rows, k)
    c1 = branches[0].weight * sums[0] + branches[0].abs_weight * sums[1]
    c2 = tl.zeros(tile.token_ids.shape, tl.float32)
    if len(branches) == 2:
        c2 = branches[1].weight * sums[2] + branches[1].abs_weight * sums[3]
    if grads.dlam is not None:
        dlambda = lambda_gradient(sums, branches, neg_lam, row_scale)
        store_table(grads.dlam, chosen_sum(dlambda, stats.lam_index, tile, active_rows, k.N_D), k.N_D)
    last_walk(grads, stats, c1, c2, branches, source, denominator, Routers(None, None, None), None, None, None, tile,
              active_rows, k)  # fmt: skip
    if grads.dv is not None:
        matrix = source.matrix + tile.segment * (k.D * (k.D // k.H))
        nothing = Denominator(None, None, None, None)
        write_readout(grads.dv, grads.stride, matrix, source.scale, nothing, branches, tile, active_rows, k, ADD)


def source_of(
    context: LaunchContext, *, x: Tensor | None = None, matrix: Tensor | None = None, given: Tensor | None = None
) -> Source:
    """Where the gradient of Zh comes from: x (B, N, d) and matrix (segments, H, e, e), or ``given`` (B, N, d)."""
    # A product of torch's is already in scale, but for what float16 was scaled down by.
    scale = context.output_scale if given is None else 1.0 / context.fp16_prescale
    return Source(None if x is None else strided(x), matrix, given, scale)


class TableGradients(NamedTuple):
    """float32: of gamma (n_F,), of lambda (n_D,), and straight through of the logits.

    logits (branches, T, n_F) and differential_logits (T, n_D), or None.
    """

    gamma: Tensor
    lam: Tensor | None
    logits: Tensor | None = None
    differential_logits: Tensor | None = None


def stage_of(source: Source, side: QKOperand) -> str:
    """The name of the launch configuration."""
    if side.slopes is not None:
        return "routed_gradients"
    return "gradients" if source.given is None else "given_gradients"


def denominator_gradient(context: LaunchContext, side: QKOperand, source: Source, denominator: Denominator) -> Tensor:
    """(T, H) float32, see :func:`denominator_gradient_kernel`; ``denominator`` needs its inverse."""
    config = configs.pick(stage_of(source, side), context.dtype, context.head_dim)
    out = torch.empty(context.num_tokens, context.heads, device=context.device, dtype=torch.float32)
    launch(
        denominator_gradient_kernel, (context.programs(config.block_n),), config, tokens=context.tokens(side),
        segments=context.tiles(config.block_n), **context.measured(side),
        scaling=Scaling(1.0, None), source=source, denominator=Denominator(inverse=denominator.inverse),
        out=out, k=context.constants(config, has_denominator=True),
    )  # fmt: skip
    return out


def gradients(
    context: LaunchContext,
    side: QKOperand,
    source: Source,
    denominator: Denominator,
    dz: Tensor,
    dz_redundant: Tensor | None,
    *,
    dv: Tensor | None = None,
    add: bool = False,
    dots: Tensor | None = None,
) -> TableGradients:
    """Writes the gradients of the tokens to ``dz`` and ``dz_redundant`` (B, N, d), and returns the others.

    Like ``dv`` they have rows of one stride, one token after the other.

    ``dv`` (B, N, d), where given, is written or added to: the readout of ``side``.  ``dots``: see
    :mod:`dydila_kernels.ops.gluon.dots`, or None.
    """
    if forms.why_not_gluon_gradients(context, side, source, add) is None:
        from dydila_kernels.ops.gluon.gradients import gradients as gluon_gradients

        assert dz_redundant is not None
        return gluon_gradients(context, side, source, denominator, dz, dz_redundant, dv=dv, dots=dots)
    config = configs.pick(stage_of(source, side), context.dtype, context.head_dim)
    programs, k = context.programs(config.block_n), context.constants(config, side.has_denominator)
    grads = places_of(context, side, programs, dz, dz_redundant, dv)
    launch(
        gradients_kernel, (programs,), config, tokens=context.tokens(side), segments=context.tiles(config.block_n),
        **context.measured(side), scaling=context.scaling(side), source=source, denominator=denominator, grads=grads,
        k=k, ADD=add,
    )  # fmt: skip
    return TableGradients(grads.dgamma.sum(0), None if grads.dlam is None else grads.dlam.sum(0))


def places_of(
    context: LaunchContext, side: QKOperand, programs: int, dz: Tensor, dz_redundant: Tensor | None, dv: Tensor | None
) -> Gradients:
    """Where the kernel puts its gradients, with a row of each table for each program."""

    def empty(length: int) -> Tensor:
        return torch.empty(programs, length, device=context.device, dtype=torch.float32)

    assert all(t is None or t.stride(1) == dz.stride(1) for t in (dz_redundant, dv))
    dlam = None if side.lam_index is None or context.lam is None else empty(context.lambdas)
    return Gradients(dz, dz_redundant, dv, constant(dz.stride(1)), empty(context.gammas), dlam)
