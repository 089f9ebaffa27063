"""What every kernel does with a tile of tokens of one side: load what is known of its rows, make powers and Zh of them.

With the notation of :mod:`dydila_kernels.ops.tokens`; a tile has R tokens and C channels, and ``k`` are its
:class:`Constants`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dydila_kernels.ops.configs import LARGEST_HEAD
from dydila_kernels.ops.tiles import TINY, log2, product, quotient, row_dot, row_pointers, tile_mask

UNROLLED = tl.constexpr(LARGEST_HEAD)


class RowStats(NamedTuple):
    """Of the rows (R,) of one branch, float32: 1/m, gamma, and m |s| / |p|."""

    inv_max: Any
    gamma: Any
    renorm: Any


class Branch(NamedTuple):
    """Z or Z' of a tile: pointers (R, 1) to its rows, their statistics, and two weights (R,) float32.

    Zh is the sum over the branches of weight phi, the minus of Eq. 8 being in the weight; the denominator term is that
    of abs_weight phi.
    """

    row_ptrs: Any
    stats: Any
    weight: Any
    abs_weight: Any


@triton.jit
def relu_scaled(z, inv_max):
    """s = ReLU(z) / m of a tile (R, C); NaN stays NaN."""
    return tl.maximum(z.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL) * inv_max[:, None]


@triton.jit
def relu_and_power(z, inv_max, gamma, FAST: tl.constexpr):
    """s = ReLU(z) / m and p = s^gamma of a tile (R, C).  Entries below the smallest normal number count as zeros."""
    s = relu_scaled(z, inv_max)
    p = tl.where(s < TINY, 0.0, tl.exp2(gamma[:, None] * log2(s, FAST)))
    return s, p


@triton.jit
def branch_pointers(tokens, tile):
    """Pointers (R, 1) to the rows of a tile, for each branch."""
    first = row_pointers(tokens.z, tile)
    if tokens.redundant is None:
        return (first,)
    else:
        return first, row_pointers(tokens.redundant, tile)


@triton.jit
def power_of(branch, columns, mask, FAST: tl.constexpr):
    """p of one branch for a tile of channels ``columns`` (C,)."""
    z = tl.load(branch.row_ptrs + columns[None, :], mask=mask, other=0.0)
    return relu_and_power(z, branch.stats.inv_max, branch.stats.gamma, FAST)[1]


@triton.jit
def powers_of(branches, columns, mask, FAST: tl.constexpr):
    """p of each branch for a tile of channels ``columns`` (C,)."""
    if len(branches) == 1:
        return (power_of(branches[0], columns, mask, FAST),)
    else:
        return power_of(branches[0], columns, mask, FAST), power_of(branches[1], columns, mask, FAST)


@triton.jit
def difference_of(powers, branches):
    """Zh of a tile (R, C): the bracket of Eq. 8."""
    y = powers[0] * (branches[0].stats.renorm * branches[0].weight)[:, None]
    if len(branches) == 2:
        y += powers[1] * (branches[1].stats.renorm * branches[1].weight)[:, None]
    return y


@triton.jit
def denominator_terms(powers, branches):
    """phi(Z) + |lambda| phi(Z') of a tile (R, C), without lambda where there is one branch."""
    y = powers[0] * (branches[0].stats.renorm * branches[0].abs_weight)[:, None]
    if len(branches) == 2:
        y += powers[1] * (branches[1].stats.renorm * branches[1].abs_weight)[:, None]
    return y


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1/x, and 0 where x is nothing to speak of: of less than the smallest normal number it would be infinite."""
    return tl.where(x >= TINY, quotient(1.0, tl.where(x >= TINY, x, 1.0), FAST), 0.0)


@triton.jit
def weigh(row_ptrs, stats, neg_lam, scaling, segment, k):
    """The branches, which rows (R,) are not all zero, and row_scale (R,), what multiplies Zh.

    row_ptrs and stats of each branch; neg_lam (R,), -lambda; scaling, see :class:`Scaling`.
    """
    row_scale = tl.full(stats[0].renorm.shape, 1.0, tl.float32) * scaling.fp16_prescale
    if scaling.length_scale is not None:
        row_scale *= tl.load(scaling.length_scale + segment)
    if len(stats) == 1:
        if k.HAS_DENOMINATOR:
            row_scale = reciprocal(stats[0].renorm, k.FAST)
        branch = Branch(row_ptrs[0], stats[0], row_scale * neg_lam, row_scale)
        return (branch,), stats[0].renorm != 0, row_scale
    else:
        if k.HAS_DENOMINATOR:
            row_scale = reciprocal(tl.maximum(stats[0].renorm, tl.abs(stats[1].renorm * neg_lam)), k.FAST)
        first = Branch(row_ptrs[0], stats[0], row_scale, row_scale)
        second = Branch(row_ptrs[1], stats[1], row_scale * neg_lam, row_scale * tl.abs(neg_lam))
        return (first, second), (stats[0].renorm != 0) | (stats[1].renorm != 0), row_scale


@triton.jit
def load_branch_stats(index, norms, gamma, tile):
    """:class:`RowStats` of a tile, for one branch: index (T,), norms (3, T), gamma (n_F,)."""
    chosen = tl.load(index + tile.token_ids, mask=tile.row_mask, other=0).to(tl.int32)
    gamma = tl.load(gamma + chosen).to(tl.float32)
    inv_max = tl.load(norms + tile.token_ids, mask=tile.row_mask, other=0.0)
    renorm = tl.load(norms + tile.T + tile.token_ids, mask=tile.row_mask, other=0.0)
    return RowStats(inv_max, gamma, renorm)


@triton.jit
def load_row_stats(row_ptrs, stats, tables, tile):
    """:class:`RowStats` of a tile for each branch, from what the forward pass saved."""
    first = load_branch_stats(stats.index, stats.norms, tables.gamma, tile)
    if len(row_ptrs) == 1:
        return (first,)
    else:
        return first, load_branch_stats(stats.index + tile.T, stats.norms + 3 * tile.T, tables.gamma, tile)


@triton.jit
def load_neg_lam(stats, tables, tile):
    """-lambda of a tile (R,); 1 where there is no lambda."""
    if stats.lam_index is None:
        return tl.full(tile.token_ids.shape, 1.0, tl.float32)
    else:
        chosen = tl.load(stats.lam_index + tile.token_ids, mask=tile.row_mask, other=0).to(tl.int32)
        return -tl.load(tables.lam + chosen).to(tl.float32)


@triton.jit
def load_per_head(x, h, tile, row_mask, H: tl.constexpr):
    """x[token, h] (R,) of x (T, H)."""
    return tl.load(x + tile.token_ids * H + h, mask=row_mask, other=0.0)


@triton.jit
def summed_terms(powers, branches, denominator, h, tile, k):
    """:func:`denominator_terms` times denominator.weights, where given, rounded as they enter a sum over tokens."""
    terms = denominator_terms(powers, branches)
    if denominator.weights is not None:
        terms = product(terms, load_per_head(denominator.weights, h, tile, tile.row_mask, k.H)[:, None])
    elif len(branches) == 1:  # of two they are no product, but a sum
        terms = product(terms, 1.0)
    return terms


@triton.jit
def denominator_dot(denominator, h, c, branches, tile, active_rows, k):
    """(R,): the denominator terms of the BLOCK_D channels from c on of head h, times denominator.vector."""
    E: tl.constexpr = k.D // k.H
    chunk = c + tl.arange(0, k.BLOCK_D)
    powers = powers_of(branches, h * E + chunk, tile_mask(active_rows, chunk, E, k.BLOCK_D), k.FAST)
    mean = tl.load(denominator.vector + tile.segment * k.D + h * E + chunk, mask=chunk < E, other=0.0)
    return row_dot(denominator_terms(powers, branches), tl.broadcast_to(mean[None, :], powers[0].shape))


@triton.jit
def inverse_denominator(denominator, h, branches, tile, active_rows, k):
    """1 / (the denominator terms of head h of the queries . denominator.vector), (R,); saved in denominator.inverse."""
    E: tl.constexpr = k.D // k.H
    BLOCK_D: tl.constexpr = k.BLOCK_D
    total = tl.zeros(tile.token_ids.shape, tl.float32)
    # The few chunks of a head that a readout takes, in one piece: a loop around them would keep its own registers.
    if E <= UNROLLED:
        for c in tl.static_range(0, E, BLOCK_D):
            total += denominator_dot(denominator, h, c, branches, tile, active_rows, k)
    else:
        for c in range(0, E, BLOCK_D):
            total += denominator_dot(denominator, h, c, branches, tile, active_rows, k)
    inverse = reciprocal(total, k.FAST)
    tl.store(denominator.inverse + tile.token_ids * k.H + h, inverse, mask=tile.row_mask)
    return inverse


@triton.jit
def store_options(out, values, tile, NUM_OPTIONS: tl.constexpr):
    """values (R, padded) to the rows of out (T, NUM_OPTIONS)."""
    option_ids = tl.arange(0, values.shape[1])
    mask = tile.row_mask[:, None] & (option_ids < NUM_OPTIONS)[None, :]
    tl.store(out + tile.token_ids[:, None] * NUM_OPTIONS + option_ids[None, :], values, mask=mask)
