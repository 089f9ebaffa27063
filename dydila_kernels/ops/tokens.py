"""Eqs. 5-8 for tokens of one side, queries or keys: route, measure, route again, subtract.

For a row Z of d channels with largest entry m > 0 and s = ReLU(Z) / m, p = s^gamma:

    phi(Z) = p (m |s| / |p|) = p scale            Eq. 5        f = argmax(Z R_F), gamma = table[f]      Eq. 6
    Zh = phi(Z) - lambda phi(Z')                  Eq. 8        l = argmax([phi(Z), phi(Z')] R_D)        Eq. 7

so that after two passes over a row five numbers say all there is to know of it: f, 1/m, scale, |p|^2 and, of the pair,
l.  They are what is kept of the forward pass; every other kernel makes Zh anew from Z, Z' and them.

Shapes: Z, Z' (B, N, d) of any strides but 1 along the channels; T = B N, and per row of one side, for each of its maps
(two, or one where there is no Z')

    indices      (maps + 1, T) int8      f of each map, then l
    statistics   (maps, 3, T) float32    1/m, scale, |p|^2; all zero for a row without a positive entry or masked out
    slopes       (maps, T, n_F), (T, n_D) float32    softmax_j (table_j - mean): d table[index] / d logits_j under
                                                     "straight_through"; otherwise None
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.call import Call, Side
from dydila_kernels.ops.tiles import (
    TINY,
    first_largest,
    fold_dot,
    fold_max,
    launch,
    log2,
    numerics,
    padded,
    product,
    quotient,
    root,
    router_dot,
    row_dot,
    rows_of_program,
    within,
)


@triton.jit
def unit_of(z, inverse):
    """s = ReLU(z) / m of a tile (R, C); NaN stays NaN."""
    return tl.maximum(z.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL) * inverse[:, None]


@triton.jit
def unit_and_power(z, inverse, gamma, FAST: tl.constexpr):
    """s = ReLU(z) / m and p = s^gamma of a tile (R, C).  Entries below the smallest normal number count as zeros."""
    s = unit_of(z, inverse)
    p = tl.where(s < TINY, 0.0, tl.exp2(gamma[:, None] * log2(s, FAST)))
    return s, p


# A "map" in the kernels is (pointers to the rows (R, 1), 1/m, gamma, scale, share, mass share), all but the first (R,);
# ``maps`` are two of them, or one where there is no Z'.  Zh is the sum over the maps of share times phi, the minus of
# Eq. 8 being in the share; the absolute mass is that of mass share times phi.


@triton.jit
def row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2):
    """Pointers (R, 1) to the rows n (R,) of each map."""
    rows = Z1 + (image * batch1 + n * row1)[:, None]
    if Z2 is None:
        return (rows,)
    else:
        return rows, Z2 + (image * batch2 + n * row2)[:, None]


@triton.jit
def power_of(a_map, columns, mask, FAST: tl.constexpr):
    z = tl.load(a_map[0] + columns[None, :], mask=mask, other=0.0)
    return unit_and_power(z, a_map[1], a_map[2], FAST)[1]


@triton.jit
def powers_of(maps, columns, mask, FAST: tl.constexpr):
    """p of each map for a tile of channels ``columns`` (C,)."""
    if len(maps) == 1:
        return (power_of(maps[0], columns, mask, FAST),)
    else:
        return power_of(maps[0], columns, mask, FAST), power_of(maps[1], columns, mask, FAST)


@triton.jit
def difference_of(powers, maps):
    """Zh of a tile (R, C): the bracket of Eq. 8."""
    y = powers[0] * (maps[0][3] * maps[0][4])[:, None]
    if len(maps) == 2:
        y += powers[1] * (maps[1][3] * maps[1][4])[:, None]
    return y


@triton.jit
def mass_of(powers, maps):
    """The absolute mass phi(Z) + |lambda| phi(Z') of a tile (R, C), without lambda where there is one map."""
    y = product(powers[0], (maps[0][3] * maps[0][5])[:, None])
    if len(maps) == 2:
        y += powers[1] * (maps[1][3] * maps[1][5])[:, None]
    return y


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1/x, and 0 where x is nothing to speak of: of less than the smallest normal number it would be infinite."""
    return tl.where(x >= TINY, quotient(1.0, tl.where(x >= TINY, x, 1.0), FAST), 0.0)


@triton.jit
def weighted(rows, measured, factor, FACTORS, segment, unit, RELATIVE: tl.constexpr, FAST: tl.constexpr):
    """The maps, which rows (R,) are not all zero, and ``extra`` (R,); ``measured`` is (1/m, gamma, scale) of each map.

    A map's share in Zh is extra, that of the last one extra (-lambda).
    unit: a constant that keeps float16 in range.  FACTORS (segments,) float32 or None.  RELATIVE: shares relative to
    the larger scale, for "denominator", whose result does not depend on the scale of a query.
    """
    inverse, gamma, scale = measured[0]
    extra = tl.full(scale.shape, 1.0, tl.float32) * unit
    if FACTORS is not None:
        extra *= tl.load(FACTORS + segment)
    if len(measured) == 1:
        if RELATIVE:
            extra = reciprocal(scale, FAST)
        return ((rows[0], inverse, gamma, scale, extra * factor, extra),), scale != 0, extra
    else:
        inverse2, gamma2, scale2 = measured[1]
        if RELATIVE:
            extra = reciprocal(tl.maximum(scale, tl.abs(scale2 * factor)), FAST)
        first = (rows[0], inverse, gamma, scale, extra, extra)
        second = (rows[1], inverse2, gamma2, scale2, extra * factor, extra * tl.abs(factor))
        return (first, second), (scale != 0) | (scale2 != 0), extra


@triton.jit
def load_map(INDEX, STATS, GAMMA, r, inside, T):
    """1/m, gamma and scale of rows r (R,) of one map."""
    gamma = tl.load(GAMMA + tl.load(INDEX + r, mask=inside, other=0).to(tl.int32)).to(tl.float32)
    inverse = tl.load(STATS + r, mask=inside, other=0.0)
    scale = tl.load(STATS + T + r, mask=inside, other=0.0)
    return inverse, gamma, scale


@triton.jit
def load_per_head(IN, h, r, live, H: tl.constexpr):
    """IN[r, h] (R,) of IN (T, H)."""
    return tl.load(IN + r * H + h, mask=live, other=0.0)


@triton.jit
def load_factor(CHOICE, LAM, r, inside):
    """-lambda of rows r (R,); 1 where there is no choice of one."""
    if CHOICE is None:
        return tl.full(r.shape, 1.0, tl.float32)
    else:
        return -tl.load(LAM + tl.load(CHOICE + r, mask=inside, other=0).to(tl.int32)).to(tl.float32)


@triton.jit
def load_measured(rows, INDEX, STATS, GAMMA, r, inside, T):
    """(1/m, gamma, scale) of each map, from what the forward pass kept."""
    first = load_map(INDEX, STATS, GAMMA, r, inside, T)
    if len(rows) == 1:
        return (first,)
    else:
        return first, load_map(INDEX + T, STATS + 3 * T, GAMMA, r, inside, T)


@triton.jit
def differential_dot(p, router, acc, PRECISE: tl.constexpr, ROUTER: tl.constexpr):
    """acc + p router for powers p (R, C) float32: on bf16 tensor cores to 2^-16, or to float32 where PRECISE."""
    router = router.to(tl.float32)
    if PRECISE:
        acc = tl.dot(p, router, acc, input_precision=ROUTER)
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
def load_router(ROUTER, c, choices, D: tl.constexpr, CHOICES: tl.constexpr):
    """Rows c (C,) of a router (D, CHOICES), zero outside."""
    mask = (c < D)[:, None] & (choices < CHOICES)[None, :]
    return tl.load(ROUTER + c[:, None] * CHOICES + choices[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_slopes(logits, TABLE, CHOICES: tl.constexpr, FAST: tl.constexpr):
    """softmax_j (table_j - mean): the derivative of table[argmax] with respect to logits_j, straight through."""
    choices = tl.arange(0, logits.shape[1])
    table = tl.load(TABLE + choices, mask=choices < CHOICES, other=0.0).to(tl.float32)[None, :]
    logits = tl.where((choices < CHOICES)[None, :], logits, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    shares *= quotient(1.0, tl.sum(shares, axis=1), FAST)[:, None]
    return shares * (table - row_dot(shares, tl.broadcast_to(table, shares.shape))[:, None])


@triton.jit
def store_choices(OUT, values, r, inside, CHOICES: tl.constexpr):
    """values (R, padded) to the rows r of OUT (T, CHOICES)."""
    choices = tl.arange(0, values.shape[1])
    mask = inside[:, None] & (choices < CHOICES)[None, :]
    tl.store(OUT + r[:, None] * CHOICES + choices[None, :], values, mask=mask)


@triton.jit
def measure_rows(rows, ROUTER_F, ROUTER_D, GAMMA, INDEX, STATS, SLOPES, r, inside, live, T, D: tl.constexpr,
                 N_F: tl.constexpr, N_D: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                 ROUTER: tl.constexpr):  # fmt: skip
    """Routes and measures rows of one map (Eqs. 5-6) in two passes over chunks of channels, and keeps the result.

    rows (R, 1) pointers; ROUTER_F (d, n_F); ROUTER_D (d, n_D), this map's half, or None.
    Returns (1/m, gamma, scale) and phi(Z) R_D (R, n_D padded).
    """
    columns = tl.arange(0, COLUMNS)
    choices = tl.arange(0, padded(N_F))
    logits = tl.zeros((rows.shape[0], padded(N_F)), tl.float32)
    largest = tl.zeros((rows.shape[0], COLUMNS // 8), tl.float32)
    for c in range(0, D, COLUMNS):
        z = tl.load(rows + (c + columns)[None, :], mask=within(live, c + columns, D, COLUMNS), other=0.0)
        logits = router_dot(z, load_router(ROUTER_F, c + columns, choices, D, N_F), logits, ROUTER)
        largest = tl.maximum(largest, fold_max(z.to(tl.float32)))
    index = first_largest(logits, N_F)
    gamma = tl.load(GAMMA + index).to(tl.float32)
    m = tl.max(largest, axis=1)
    alive = m >= TINY
    inverse = reciprocal(m, FAST)

    choices = tl.arange(0, padded(N_D))
    differential = tl.zeros((rows.shape[0], padded(N_D)), tl.float32)
    squares = tl.zeros((rows.shape[0], COLUMNS // 8), tl.float32)
    powers = tl.zeros((rows.shape[0], COLUMNS // 8), tl.float32)
    for c in range(0, D, COLUMNS):
        z = tl.load(rows + (c + columns)[None, :], mask=within(live, c + columns, D, COLUMNS), other=0.0)
        s, p = unit_and_power(z, inverse, gamma, FAST)
        squares += fold_dot(s, s)
        powers += fold_dot(p, p)
        if ROUTER_D is not None:
            router = load_router(ROUTER_D, c + columns, choices, D, N_D)
            differential = differential_dot(p, router, differential, z.dtype != tl.bfloat16, ROUTER)
    power = tl.sum(powers, axis=1)
    alive |= power != power  # a maximum passes over NaN; the row shall not
    scale = tl.where(alive, m * root(quotient(tl.sum(squares, axis=1), tl.where(alive, power, 1.0), FAST), FAST), 0.0)

    tl.store(INDEX + r, index.to(tl.int8), mask=inside)
    tl.store(STATS + r, inverse, mask=inside)
    tl.store(STATS + T + r, scale, mask=inside)
    tl.store(STATS + 2 * T + r, tl.where(alive, power, 0.0), mask=inside)
    if SLOPES is not None:
        store_choices(SLOPES, softmax_slopes(logits, GAMMA, N_F, FAST), r, inside, N_F)
    return (inverse, gamma, scale), differential * scale[:, None]


@triton.jit
def decide_rows(rows, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES, SLOPES_D, r, inside,
                T, D: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                ROUTER: tl.constexpr):  # fmt: skip
    """(1/m, gamma, scale) of each map and -lambda, decided and kept.  MASK (T,) bool, ROUTER_D (2d, n_D), or None."""
    live = inside
    if MASK is not None:
        live = inside & (tl.load(MASK + r, mask=inside, other=0) != 0)
    first, differential = measure_rows(rows[0], ROUTER1, ROUTER_D, GAMMA, INDEX, STATS, SLOPES, r, inside, live, T,
                                       D, N_F, N_D, COLUMNS, FAST, ROUTER)  # fmt: skip
    factor = tl.full(r.shape, 1.0, tl.float32)
    if len(rows) == 1:
        return (first,), factor
    else:
        second, other = measure_rows(rows[1], ROUTER2, None if ROUTER_D is None else ROUTER_D + D * N_D, GAMMA,
                                     INDEX + T, STATS + 3 * T, None if SLOPES is None else SLOPES + T * N_F,
                                     r, inside, live, T, D, N_F, N_D, COLUMNS, FAST, ROUTER)  # fmt: skip
        if ROUTER_D is not None:
            differential += other
            choice = first_largest(differential, N_D)
            factor = -tl.load(LAM + choice).to(tl.float32)
            tl.store(CHOICE + r, choice.to(tl.int8), mask=inside)
            if SLOPES_D is not None:
                store_choices(SLOPES_D, softmax_slopes(differential, LAM, N_D, FAST), r, inside, N_D)
        return (first, second), factor


@triton.jit
def measured_rows(rows, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES, SLOPES_D, FACTORS,
                  segment, r, inside, T, unit, D: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr,
                  DECIDE: tl.constexpr, RELATIVE: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                  ROUTER: tl.constexpr):  # fmt: skip
    """The maps of rows, and which are inside and not all zero: DECIDE, or load what was decided."""
    if DECIDE:
        measured, factor = decide_rows(rows, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS,
                                       SLOPES, SLOPES_D, r, inside, T, D, N_F, N_D, COLUMNS, FAST, ROUTER)  # fmt: skip
    else:
        measured = load_measured(rows, INDEX, STATS, GAMMA, r, inside, T)
        factor = load_factor(CHOICE, LAM, r, inside)
    maps, alive, _ = weighted(rows, measured, factor, FACTORS, segment, unit, RELATIVE, FAST)
    return maps, inside & alive


@triton.jit
def write_rows(OUT, SUMS, MASS_WEIGHTS, MEANS, INVERSE_MASS, maps, segment, r, inside, live, D: tl.constexpr,
               H: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Writes Zh to OUT (T, d), or None.

    Under "denominator" also the mass of this tile to SUMS (programs, d) float32, each token's times MASS_WEIGHTS (T, H)
    float32 where given; of queries 1/mass per head to INVERSE_MASS (T, H) float32, from the mean mass of the keys MEANS
    (segments, d) float32, and Zh is times that.
    """
    E: tl.constexpr = D // H
    columns = tl.arange(0, COLUMNS)
    for h in range(0, H):
        inverse = tl.full(r.shape, 1.0, tl.float32)
        if MEANS is not None:
            mass = tl.zeros((r.shape[0], COLUMNS // 8), tl.float32)
            for c in range(0, E, COLUMNS):
                at = h * E + c + columns
                powers = powers_of(maps, at, within(live, c + columns, E, COLUMNS), FAST)
                mean = tl.load(MEANS + segment * D + at, mask=c + columns < E, other=0.0)
                mass += fold_dot(mass_of(powers, maps), tl.broadcast_to(mean[None, :], powers[0].shape))
            inverse = reciprocal(tl.sum(mass, axis=1), FAST)
            tl.store(INVERSE_MASS + r * H + h, inverse, mask=inside)
        for c in range(0, E, COLUMNS):
            at = h * E + c + columns
            powers = powers_of(maps, at, within(live, c + columns, E, COLUMNS), FAST)
            if OUT is not None:
                y = (difference_of(powers, maps) * inverse[:, None]).to(OUT.dtype.element_ty)
                tl.store(OUT + r[:, None] * D + at[None, :], y, mask=within(inside, c + columns, E, COLUMNS))
            if SUMS is not None:
                mass = mass_of(powers, maps)
                if MASS_WEIGHTS is not None:
                    mass = product(mass, load_per_head(MASS_WEIGHTS, h, r, inside, H)[:, None])
                total = tl.sum(mass, axis=0)
                tl.store(SUMS + tl.program_id(0).to(tl.int64) * D + at, total, mask=c + columns < E)


@triton.jit
def tokens_kernel(Z1, Z2, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES, SLOPES_D,
                  FACTORS, TILES, OUT, SUMS, MASS_WEIGHTS, MEANS, INVERSE_MASS, N, T, unit, batch1, row1, batch2, row2,
                  D: tl.constexpr, H: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr, DECIDE: tl.constexpr,
                  RELATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                  ROUTER: tl.constexpr):  # fmt: skip
    """One program for a tile of ROWS tokens: DECIDE (route and measure), or load what was decided; then write Zh.

    Z1, Z2 (B, N, d) with strides batch1, row1 and batch2, row2, Z2 None where there is one map; ROUTER1, ROUTER2
    (d, n_F), ROUTER_D (2d, n_D) or None; GAMMA (n_F,), LAM (n_D,); MASK (T,) bool or None; INDEX (maps, T), CHOICE (T,)
    or None, STATS (maps, 3, T), SLOPES (maps, T, n_F), SLOPES_D (T, n_D) as at the top of this file; OUT (T, d) or
    None; SUMS, MASS_WEIGHTS, MEANS, INVERSE_MASS as in :func:`write_rows`; FACTORS as in :func:`weighted`; TILES as in
    :func:`rows_of_program`.
    """
    image, segment, n, inside = rows_of_program(TILES, N, ROWS)
    r, T = image * N + n, tl.cast(T, tl.int64)
    rows = row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2)
    maps, live = measured_rows(rows, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES,
                               SLOPES_D, FACTORS, segment, r, inside, T, unit, D, N_F, N_D, DECIDE, RELATIVE, COLUMNS,
                               FAST, ROUTER)  # fmt: skip
    if OUT is not None or SUMS is not None:
        write_rows(OUT, SUMS, MASS_WEIGHTS, MEANS, INVERSE_MASS, maps, segment, r, inside, live, D, H, COLUMNS, FAST)


def tokens(
    call: Call,
    side: Side,
    *,
    decide: bool,
    out: Tensor | None = None,
    sums: bool = False,
    mass_weights: Tensor | None = None,
    means: Tensor | None = None,
    inverse_mass: Tensor | None = None,
) -> Tensor | None:
    """Routes and measures one side, where ``decide``, and writes Zh to ``out`` (B, N, d) contiguous, where given.

    ``sums``: returns the mean mass (segments, d) float32.  The other arguments as in :func:`write_rows`.
    """
    config = configs.pick("tokens", call.dtype, call.dim)
    programs = call.programs(config.rows)
    shares = torch.empty(programs, call.dim, device=call.device, dtype=torch.float32) if sums else None
    constants = numerics(call.dtype)
    launch(
        tokens_kernel, (programs,), config, **call.arguments(side), **call.deciding(side, decide),
        TILES=call.tiles(config.rows), OUT=out, SUMS=shares, MASS_WEIGHTS=mass_weights, MEANS=means,
        INVERSE_MASS=inverse_mass, ROWS=config.rows, COLUMNS=config.columns, FAST=constants["FAST"],
        ROUTER=constants["ROUTER"],
    )  # fmt: skip
    if shares is None:
        return None
    if call.bounds is None:
        return shares.view(call.batch, programs // max(1, call.batch), call.dim).sum(1) * call.scale
    counts = [-(-(stop - start) // config.rows) for start, stop in zip(call.bounds[:-1], call.bounds[1:], strict=True)]
    return torch.stack([part.sum(0) for part in shares.split(counts)]) * call.scale
