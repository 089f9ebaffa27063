"""Eqs. 5-8 for tokens of one side, queries or keys: route, measure, route again, subtract.

For a row Z of d channels with largest entry m > 0 and s = ReLU(Z) / m, p = s^gamma:

    phi(Z) = p (m |s| / |p|) = p renorm           Eq. 5        f = argmax(Z R_F), gamma = table[f]      Eq. 6
    Zh = phi(Z) - lambda phi(Z')                  Eq. 8        l = argmax([phi(Z), phi(Z')] R_D)        Eq. 7

so that after two passes over a row five numbers say all there is to know of it: f, 1/m, renorm, |p|^2 and, of the pair,
l.  They are what is saved of the forward pass; every other kernel makes Zh anew from Z, Z' and them.

Shapes: Z, Z' (B, N, d) of any strides but 1 along the channels; T = B N, and per row of one side, for each of its
branches (two, or one where there is no Z')

    indices      (branches + 1, T) int8      f of each branch, then l
    statistics   (branches, 3, T) float32    1/m, renorm, |p|^2; all zero for a row without a positive entry or masked
    slopes       (branches, T, n_F), (T, n_D) float32    softmax_j (table_j - mean): d table[index] / d logits_j under
                                                         "straight_through"; otherwise None

In the kernels a tile has R tokens and C channels, and ``k`` are its :class:`Constants`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs, forms
from dydila_kernels.ops.arguments import Denominator
from dydila_kernels.ops.branches import (
    RowStats,
    branch_pointers,
    difference_of,
    inverse_denominator,
    load_neg_lam,
    load_row_stats,
    powers_of,
    reciprocal,
    relu_and_power,
    store_options,
    summed_terms,
    weigh,
)
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.tiles import (
    TINY,
    first_largest,
    fold_dot,
    fold_max,
    launch,
    padded,
    quotient,
    root,
    router_dot,
    row_dot,
    tile_mask,
    tile_of_program,
)


@triton.jit
def differential_dot(p, router, acc, PRECISE: tl.constexpr, ROUTER_PRECISION: tl.constexpr):
    """acc + p router for powers p (R, C) float32: on bf16 tensor cores to 2^-16, or to float32 where PRECISE."""
    router = router.to(tl.float32)
    if PRECISE:
        acc = tl.dot(p, router, acc, input_precision=ROUTER_PRECISION)
    else:
        high, router_high = p.to(tl.bfloat16), router.to(tl.bfloat16)
        low, router_low = (
            (p - high.to(tl.float32)).to(tl.bfloat16),
            (router - router_high.to(tl.float32)).to(tl.bfloat16),
        )
        acc = tl.dot(low, router_high, acc)
        acc = tl.dot(high, router_low, acc)
        acc = tl.dot(high, router_high, acc)
    return acc


@triton.jit
def load_router(router, c, option_ids, D: tl.constexpr, NUM_OPTIONS: tl.constexpr):
    """Rows c (C,) of a router (D, NUM_OPTIONS), zero outside."""
    mask = (c < D)[:, None] & (option_ids < NUM_OPTIONS)[None, :]
    return tl.load(router + c[:, None] * NUM_OPTIONS + option_ids[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_slopes(logits, table, NUM_OPTIONS: tl.constexpr, FAST: tl.constexpr):
    """softmax_j (table_j - mean), (R, n): the derivative of table[argmax] by logits_j (R, n), straight through."""
    option_ids = tl.arange(0, logits.shape[1])
    table = tl.load(table + option_ids, mask=option_ids < NUM_OPTIONS, other=0.0).to(tl.float32)[None, :]
    logits = tl.where((option_ids < NUM_OPTIONS)[None, :], logits, float("-inf"))
    probs = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = quotient(probs, tl.sum(probs, axis=1)[:, None], FAST)
    return probs * (table - row_dot(probs, tl.broadcast_to(table, probs.shape))[:, None])


@triton.jit
def measure_branch(row_ptrs, router, differential_router, gamma_table, index_out, norms_out, slopes_out, tile,
                   active_rows, k):  # fmt: skip
    """Routes and measures the rows of one branch (Eqs. 5-6) in two passes over chunks of channels; saves the result.

    row_ptrs (R, 1); router (d, n_F); differential_router (d, n_D), this branch's half, or None; index_out (T,),
    norms_out (3, T), slopes_out (T, n_F) or None.  Returns :class:`RowStats` and phi(Z) R_D (R, n_D padded).
    """
    columns = tl.arange(0, k.BLOCK_D)
    option_ids = tl.arange(0, padded(k.N_F))
    logits = tl.zeros((row_ptrs.shape[0], padded(k.N_F)), tl.float32)
    largest = tl.zeros((row_ptrs.shape[0], k.BLOCK_D // 8), tl.float32)
    for c in range(0, k.D, k.BLOCK_D):
        mask = tile_mask(active_rows, c + columns, k.D, k.BLOCK_D)
        z = tl.load(row_ptrs + (c + columns)[None, :], mask=mask, other=0.0)
        router_rows = load_router(router, c + columns, option_ids, k.D, k.N_F)
        logits = router_dot(z, router_rows, logits, k.ROUTER_PRECISION)
        largest = tl.maximum(largest, fold_max(z.to(tl.float32)))
    index = first_largest(logits, k.N_F)
    gamma = tl.load(gamma_table + index).to(tl.float32)
    m = tl.max(largest, axis=1)
    nonzero = m >= TINY
    inv_max = reciprocal(m, k.FAST)

    option_ids = tl.arange(0, padded(k.N_D))
    differential = tl.zeros((row_ptrs.shape[0], padded(k.N_D)), tl.float32)
    squares = tl.zeros((row_ptrs.shape[0], k.BLOCK_D // 8), tl.float32)
    powers = tl.zeros((row_ptrs.shape[0], k.BLOCK_D // 8), tl.float32)
    for c in range(0, k.D, k.BLOCK_D):
        mask = tile_mask(active_rows, c + columns, k.D, k.BLOCK_D)
        z = tl.load(row_ptrs + (c + columns)[None, :], mask=mask, other=0.0)
        s, p = relu_and_power(z, inv_max, gamma, k.FAST)
        squares += fold_dot(s, s)
        powers += fold_dot(p, p)
        if differential_router is not None:
            router_rows = load_router(differential_router, c + columns, option_ids, k.D, k.N_D)
            differential = differential_dot(p, router_rows, differential, z.dtype != tl.bfloat16, k.ROUTER_PRECISION)
    power = tl.sum(powers, axis=1)
    nonzero |= power != power  # a maximum passes over NaN; the row shall not
    ratio = quotient(tl.sum(squares, axis=1), tl.where(nonzero, power, 1.0), k.FAST)
    renorm = tl.where(nonzero, m * root(ratio, k.FAST), 0.0)

    tl.store(index_out + tile.token_ids, index.to(tl.int8), mask=tile.row_mask)
    tl.store(norms_out + tile.token_ids, inv_max, mask=tile.row_mask)
    tl.store(norms_out + tile.T + tile.token_ids, renorm, mask=tile.row_mask)
    tl.store(norms_out + 2 * tile.T + tile.token_ids, tl.where(nonzero, power, 0.0), mask=tile.row_mask)
    if slopes_out is not None:
        store_options(slopes_out, softmax_slopes(logits, gamma_table, k.N_F, k.FAST), tile, k.N_F)
    return RowStats(inv_max, gamma, renorm), differential * renorm[:, None]


@triton.jit
def decide(row_ptrs, mask, tables, routers, stats, slopes, tile, k):
    """:class:`RowStats` of each branch and -lambda (R,), decided and saved to ``stats`` and ``slopes``."""
    active_rows = tile.row_mask
    if mask is not None:
        active_rows = tile.row_mask & (tl.load(mask + tile.token_ids, mask=tile.row_mask, other=0) != 0)
    first, differential = measure_branch(row_ptrs[0], routers.kernel, routers.differential, tables.gamma, stats.index,
                                         stats.norms, slopes.kernel, tile, active_rows, k)  # fmt: skip
    neg_lam = tl.full(tile.token_ids.shape, 1.0, tl.float32)
    if len(row_ptrs) == 1:
        return (first,), neg_lam
    else:
        second, other = measure_branch(row_ptrs[1], routers.kernel_redundant,
                                       None if routers.differential is None else routers.differential + k.D * k.N_D,
                                       tables.gamma, stats.index + tile.T, stats.norms + 3 * tile.T,
                                       None if slopes.kernel is None else slopes.kernel + tile.T * k.N_F, tile,
                                       active_rows, k)  # fmt: skip
        if routers.differential is not None:
            differential += other
            index = first_largest(differential, k.N_D)
            neg_lam = -tl.load(tables.lam + index).to(tl.float32)
            tl.store(stats.lam_index + tile.token_ids, index.to(tl.int8), mask=tile.row_mask)
            if slopes.differential is not None:
                found = softmax_slopes(differential, tables.lam, k.N_D, k.FAST)
                store_options(slopes.differential, found, tile, k.N_D)
        return (first, second), neg_lam


@triton.jit
def branches_of(tokens, tables, routers, stats, slopes, scaling, tile, k, DECIDE: tl.constexpr):
    """The branches of a tile, and which rows (R,) are there and not all zero: DECIDE, or load what was decided."""
    row_ptrs = branch_pointers(tokens, tile)
    if DECIDE:
        row_stats, neg_lam = decide(row_ptrs, tokens.mask, tables, routers, stats, slopes, tile, k)
    else:
        row_stats = load_row_stats(row_ptrs, stats, tables, tile)
        neg_lam = load_neg_lam(stats, tables, tile)
    branches, nonzero_rows, _ = weigh(row_ptrs, row_stats, neg_lam, scaling, tile.segment, k)
    return branches, tile.row_mask & nonzero_rows


@triton.jit
def write_tokens(out, denominator, branches, tile, active_rows, k):
    """Writes Zh to out (T, d), or None; under "denominator" that over the denominator, for queries.

    With denominator.sums (programs, d) also the sums of the denominator terms of this tile, each token's times
    denominator.weights where given.
    """
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    for h in range(0, k.H):
        inverse = tl.full(tile.token_ids.shape, 1.0, tl.float32)
        if denominator.vector is not None:
            inverse = inverse_denominator(denominator, h, branches, tile, active_rows, k)
        for c in range(0, E, k.BLOCK_D):
            columns = h * E + c + chunk
            powers = powers_of(branches, columns, tile_mask(active_rows, c + chunk, E, k.BLOCK_D), k.FAST)
            if out is not None:
                y = (difference_of(powers, branches) * inverse[:, None]).to(out.dtype.element_ty)
                store_mask = tile_mask(tile.row_mask, c + chunk, E, k.BLOCK_D)
                tl.store(out + tile.token_ids[:, None] * k.D + columns[None, :], y, mask=store_mask)
            if denominator.sums is not None:
                terms = summed_terms(powers, branches, denominator, h, tile, k)
                sums = denominator.sums + tl.program_id(0).to(tl.int64) * k.D + columns
                tl.store(sums, tl.sum(terms, axis=0), mask=c + chunk < E)


@triton.jit
def tokens_kernel(tokens, segments, tables, routers, stats, slopes, scaling, denominator, out, k: tl.constexpr,
                  DECIDE: tl.constexpr):  # fmt: skip
    """One program for a tile of tokens: DECIDE (route and measure), or load what was decided; then write Zh.

    out (T, d) or None; the other arguments as in :mod:`dydila_kernels.ops.arguments`.
    """
    tile = tile_of_program(segments, k.BLOCK_N)
    branches, active_rows = branches_of(tokens, tables, routers, stats, slopes, scaling, tile, k, DECIDE)
    if out is not None or denominator.sums is not None:
        write_tokens(out, denominator, branches, tile, active_rows, k)


def tokens(
    context: LaunchContext,
    side: QKOperand,
    *,
    decide: bool,
    out: Tensor | None = None,
    sums: bool = False,
    weights: Tensor | None = None,
    means: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor | None:
    """Routes and measures one side, where ``decide``, and writes Zh to ``out`` (B, N, d) contiguous, where given.

    Under "denominator" ``means`` (segments, d) and ``inverse`` (T, H), written, are those of queries; with ``sums`` it
    returns the mean denominator term (segments, d) float32, each token's times ``weights`` (T, H) where given.
    """
    if forms.why_not_gluon_tokens(context, side, decide=decide, divide=inverse is not None) is None:
        from dydila_kernels.ops.gluon.tokens import tokens as gluon_tokens

        return gluon_tokens(context, side, out, sums=sums, means=means, inverse=inverse)
    config = configs.pick("tokens", context.dtype, context.dim)
    programs = context.programs(config.block_n)
    partials = torch.empty(programs, context.dim, device=context.device, dtype=torch.float32) if sums else None
    launch(
        tokens_kernel, (programs,), config, tokens=context.tokens(side, masked=decide),
        segments=context.tiles(config.block_n), **context.measured(side), **context.deciding(side, decide),
        scaling=context.scaling(side), denominator=Denominator(means, inverse, weights, partials), out=out,
        k=context.constants(config, side.has_denominator),
    )  # fmt: skip
    return None if partials is None else context.mean_of(partials, config.block_n)
