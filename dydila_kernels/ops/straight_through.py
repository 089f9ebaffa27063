"""The backward pass of one side whose routers are trained, straight through; see :mod:`gradients` for the rest of it.

A chosen entry passes its gradient on to the logits by the slopes that :mod:`tokens` saves, and these to the tokens:

    dlogits_F = slopes_F dgamma,   dlogits_D = slopes_D dlambda,   dZ += dlogits_F R_F^T,   [G, G'] += dlogits_D R_D^T

dlambda comes before c, and c before dgamma and dZ: three walks over a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Denominator, Routers, Slopes, Source
from dydila_kernels.ops.branches import reciprocal, store_options
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gradients import (
    LN2,
    TableGradients,
    chosen_sum,
    first_walk,
    gradient_of_phi,
    incoming,
    lambda_gradient,
    last_walk,
    load_operand,
    load_tile,
    places_of,
    power_parts,
    stage_of,
    store_table,
)
from dydila_kernels.ops.linear_attention import write_readout
from dydila_kernels.ops.tiles import launch, padded, row_dot, tile_mask


@triton.jit
def load_options(x, tile, row_mask, NUM_OPTIONS: tl.constexpr):
    """The rows of x (T, n) as (R, n padded), zero outside."""
    option_ids = tl.arange(0, padded(NUM_OPTIONS))
    mask = row_mask[:, None] & (option_ids < NUM_OPTIONS)[None, :]
    return tl.load(x + tile.token_ids[:, None] * NUM_OPTIONS + option_ids[None, :], mask=mask, other=0.0)


@triton.jit
def logit_gradients(slopes, out, values, tile, active_rows, NUM_OPTIONS: tl.constexpr):
    """dlogits (R, n padded) = slopes (T, n) times the gradient of what they chose (R,), saved in out (T, n)."""
    dlogits = load_options(slopes, tile, active_rows, NUM_OPTIONS) * values[:, None]
    store_options(out, dlogits, tile, NUM_OPTIONS)
    return dlogits


@triton.jit
def branch_sums(sums, branch, g, columns, mask, FAST: tl.constexpr):
    """The sums (R,) of p G, p log2(s) G and p^2 log2(s), plus those of another tile (R, C)."""
    s, log, q = power_parts(branch, columns, mask, FAST)
    p = q * s
    return sums[0] + row_dot(p, g), sums[1] + row_dot(p * log, g), sums[2] + row_dot(p * p, log)


@triton.jit
def second_walk(branches, source, denominator, routers, dlogits, tile, active_rows, k):
    """:func:`branch_sums` of the first branch and of the second, G with what the differential logits pass on."""
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    zero = tl.zeros(tile.token_ids.shape, tl.float32)
    sums1, sums2 = (zero, zero, zero), (zero, zero, zero)
    for h in range(0, k.H):
        x = load_operand(source, h, tile, active_rows, E)
        for c in range(0, E, k.BLOCK_D):
            dy, u = incoming(x, source, denominator, h, c + chunk, tile, active_rows, k)
            columns, col_mask = h * E + c + chunk, c + chunk < E
            mask = tile_mask(active_rows, c + chunk, E, k.BLOCK_D)
            g = gradient_of_phi(dy, u, branches[0], dlogits, routers.differential, columns, col_mask, k)
            sums1 = branch_sums(sums1, branches[0], g, columns, mask, k.FAST)
            if len(branches) == 2:
                second = None if routers.differential is None else routers.differential + k.D * k.N_D
                g = gradient_of_phi(dy, u, branches[1], dlogits, second, columns, col_mask, k)
                sums2 = branch_sums(sums2, branches[1], g, columns, mask, k.FAST)
    return sums1, sums2


@triton.jit
def gamma_gradient(sums, branch, squares, tile, active_rows, FAST: tl.constexpr):
    """dgamma (R,) from :func:`branch_sums` and squares (T,), |p|^2."""
    power = tl.load(squares + tile.token_ids, mask=active_rows, other=0.0)
    return branch.stats.renorm * LN2 * (sums[1] - sums[0] * reciprocal(power, FAST) * sums[2])


@triton.jit
def straight_through_kernel(tokens, segments, tables, routers, stats, slopes, scaling, source, denominator, grads,
                            dlogits, k: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """As :func:`gradients_kernel`, with what the routers pass on.

    dlogits: :class:`Slopes`, where the gradients of the logits go; that of the differential router is read where
    slopes.differential is None and it is given.
    """
    tile, branches, active_rows, neg_lam, row_scale = load_tile(tokens, segments, tables, stats, scaling, k)
    differential = None
    if grads.dlam is not None:
        sums = first_walk(branches, source, denominator, tile, active_rows, k)
        dlambda = lambda_gradient(sums, branches, neg_lam, row_scale)
        store_table(grads.dlam, chosen_sum(dlambda, stats.lam_index, tile, active_rows, k.N_D), k.N_D)
        if slopes.differential is not None:
            differential = logit_gradients(slopes.differential, dlogits.differential, dlambda, tile, active_rows, k.N_D)
    if dlogits.differential is not None and slopes.differential is None:
        differential = load_options(dlogits.differential, tile, active_rows, k.N_D)

    sums1, sums2 = second_walk(branches, source, denominator, routers, differential, tile, active_rows, k)
    dgamma = gamma_gradient(sums1, branches[0], stats.norms + 2 * tile.T, tile, active_rows, k.FAST)
    first = logit_gradients(slopes.kernel, dlogits.kernel, dgamma, tile, active_rows, k.N_F)
    second = None
    if len(branches) == 2:
        dgamma = gamma_gradient(sums2, branches[1], stats.norms + 5 * tile.T, tile, active_rows, k.FAST)
        second = logit_gradients(slopes.kernel + tile.T * k.N_F, dlogits.kernel + tile.T * k.N_F, dgamma, tile,
                                 active_rows, k.N_F)  # fmt: skip

    last_walk(grads, stats, sums1[0], sums2[0], branches, source, denominator, routers, first, second, differential,
              tile, active_rows, k)  # fmt: skip
    if grads.dv is not None:
        matrix = source.matrix + tile.segment * (k.D * (k.D // k.H))
        nothing = Denominator(None, None, None, None)
        write_readout(grads.dv, grads.stride, matrix, source.scale, nothing, branches, tile, active_rows, k, ADD)


def straight_through_gradients(
    context: LaunchContext,
    side: QKOperand,
    source: Source,
    denominator: Denominator,
    dz: Tensor,
    dz_redundant: Tensor | None,
    *,
    dv: Tensor | None = None,
    add: bool = False,
    differential_logits: Tensor | None = None,
) -> TableGradients:
    """As :func:`gradients`, with the gradients of the logits.

    ``differential_logits`` (T, n_D): those of the differential router, where another call of this function found them.
    """
    assert side.slopes is not None
    config = configs.pick(stage_of(source, side), context.dtype, context.head_dim)
    programs, k = context.programs(config.block_n), context.constants(config, side.has_denominator)
    grads = places_of(context, side, programs, dz, dz_redundant, dv)
    logits = torch.empty_like(side.slopes)
    if side.differential_slopes is not None:
        differential_logits = torch.empty_like(side.differential_slopes)
    launch(
        straight_through_kernel, (programs,), config, tokens=context.tokens(side),
        segments=context.tiles(config.block_n), **context.measured(side),
        routers=Routers(*side.routers, side.differential_router), slopes=Slopes(side.slopes, side.differential_slopes),
        scaling=context.scaling(side), source=source, denominator=denominator, grads=grads,
        dlogits=Slopes(logits, differential_logits), k=k, ADD=add,
    )  # fmt: skip
    dlam = None if grads.dlam is None else grads.dlam.sum(0)
    return TableGradients(grads.dgamma.sum(0), dlam, logits, differential_logits)
