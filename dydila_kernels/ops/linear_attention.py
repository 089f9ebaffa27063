"""Eqs. 8 and 10: the state of the keys and its readout by the queries, per head of e = d/H channels.

    S_h = scale sum_n Kh_nh^T V_nh        (segments, H, e, e)        O_nh = rescale Qh_nh S_h

Kh and Qh are made anew in registers from the tokens and what :mod:`dydila_kernels.ops.tokens` keeps of them.  The sum
over the N tokens of a segment is split over programs, whose float32 partial sums are added in a fixed order.

Under "denominator" O_nh is divided by mass_nh = (phi(Q) + |lambda| phi(Q'))_nh . means_h with the mean mass of the keys
means = scale sum_n (phi(K) + |lambda| phi(K'))_n; 1/mass multiplies Qh before it is rounded for the product.

The same two kernels serve the backward pass: dS is the state of the queries and dO, dV the readout of the keys from dS.
For e > 128, where a state does not fit the registers of a program, the products are GEMMs (:mod:`gemm`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.call import Call, Side
from dydila_kernels.ops.depthwise import convolve_tile
from dydila_kernels.ops.tiles import launch, numerics, padded, pin, product, row_dot, rows_of_program, within
from dydila_kernels.ops.tokens import (
    difference_of,
    load_factor,
    load_measured,
    load_per_head,
    mass_of,
    measured_rows,
    powers_of,
    reciprocal,
    row_pointers,
    weighted,
)


@triton.jit
def state_kernel(Z1, Z2, VALUES, INDEX, CHOICE, STATS, GAMMA, LAM, FACTORS, BOUNDS, INVERSE_MASS, MASS_WEIGHTS,
                 PARTIAL, SUMS, N, T, SPLITS, unit, scale, batch1, row1, batch2, row2, values_batch, values_row,
                 values_head, D: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, RELATIVE: tl.constexpr,
                 RAW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """PARTIAL[segment, split, h] = scale sum over the split of Zh_h^T VALUES_h; one program for COLUMNS rows of each.

    Z1, Z2, INDEX, CHOICE, STATS, GAMMA, LAM, FACTORS as in :func:`tokens_kernel`; VALUES (B, N, H x WIDTH) with strides
    values_batch, values_row, values_head (0: all heads share WIDTH columns); BOUNDS (segments + 1,) int32 of a packed
    row or None; INVERSE_MASS (T, H) multiplies Zh, or None; PARTIAL (segments, SPLITS, H, e, WIDTH) float32;
    SUMS (segments, SPLITS, d) float32 or None: the mass, each token's times MASS_WEIGHTS (T, H) where given.
    RAW: Z itself in the place of Zh.

    A program makes COLUMNS channels of Zh only: no channel is made twice, and the registers hold few.
    """
    E: tl.constexpr = D // H
    chunks: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    columns = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    h = (tl.program_id(0) // chunks) % H
    split = (tl.program_id(0) // (chunks * H)) % SPLITS
    T = tl.cast(T, tl.int64)
    segment = (tl.program_id(0) // (chunks * H * SPLITS)).to(tl.int64)
    image, first, end = segment, 0, N
    if BOUNDS is not None:
        image = segment * 0
        first, end = tl.load(BOUNDS + segment), tl.load(BOUNDS + segment + 1)
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), ROWS) * ROWS
    first += split * share
    end = tl.minimum(first + share, end)

    across = tl.arange(0, padded(WIDTH))
    acc = tl.zeros((COLUMNS, padded(WIDTH)), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, end, ROWS):
        n = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = n < end
        r = image * N + n
        rows = row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2)
        measured = load_measured(rows, INDEX, STATS, GAMMA, r, inside, T)
        maps, alive, _ = weighted(rows, measured, load_factor(CHOICE, LAM, r, inside), FACTORS, segment, unit, RELATIVE,
                                  FAST)  # fmt: skip
        live = inside & alive
        x = VALUES + (image * values_batch + n * values_row + h * values_head)[:, None] + across[None, :]
        x = tl.load(x, mask=within(live, across, WIDTH, padded(WIDTH)), other=0.0)
        mask = within(live, columns, E, COLUMNS)
        if RAW:
            y = tl.load(rows[0] + (h * E + columns)[None, :], mask=mask, other=0.0)
        else:
            powers = powers_of(maps, h * E + columns, mask, FAST)
            y = difference_of(powers, maps)
            if INVERSE_MASS is not None:
                y *= load_per_head(INVERSE_MASS, h, r, inside, H)[:, None]
            if SUMS is not None:
                mass = mass_of(powers, maps)
                if MASS_WEIGHTS is not None:
                    mass = product(mass, load_per_head(MASS_WEIGHTS, h, r, inside, H)[:, None])
                total += tl.sum(mass, axis=0)
            y = pin(y)
        acc = tl.dot(tl.trans(y.to(x.dtype)), x, acc, input_precision=PRECISION)

    part = segment * SPLITS + split
    out = PARTIAL + ((part * H + h) * E + columns[:, None]) * WIDTH + across[None, :]
    tl.store(out, acc * scale, mask=within(columns < E, across, WIDTH, padded(WIDTH)))
    if SUMS is not None:
        tl.store(SUMS + part * D + h * E + columns, total * scale, mask=columns < E)


@triton.jit
def head_product(maps, MATRIX, MEANS, INVERSE_MASS, h, r, inside, live, E: tl.constexpr, H: tl.constexpr,
                 COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Zh_h MATRIX_h (R, e padded), for MATRIX (H, e, e); with MEANS (d,) divided by the mass, whose inverse is kept.

    Zh is made COLUMNS channels at a time: 72 are 5 x 16 and not 128, and the registers hold few of them.
    """
    chunk = tl.arange(0, COLUMNS)
    across = tl.arange(0, padded(E))
    inverse = tl.full(live.shape, 1.0, tl.float32)
    if MEANS is not None:
        mass = tl.zeros(live.shape, tl.float32)
        for c in tl.static_range(0, E, COLUMNS):
            powers = powers_of(maps, h * E + c + chunk, within(live, c + chunk, E, COLUMNS), FAST)
            means = tl.load(MEANS + h * E + c + chunk, mask=c + chunk < E, other=0.0)
            mass += row_dot(mass_of(powers, maps), tl.broadcast_to(means[None, :], powers[0].shape))
        inverse = reciprocal(mass, FAST)
        tl.store(INVERSE_MASS + r * H + h, inverse, mask=inside)
    acc = tl.zeros((live.shape[0], padded(E)), tl.float32)
    for c in tl.static_range(0, E, COLUMNS):
        powers = powers_of(maps, h * E + c + chunk, within(live, c + chunk, E, COLUMNS), FAST)
        y = difference_of(powers, maps)
        if MEANS is not None:
            y *= inverse[:, None]
        matrix = MATRIX + (h * E + c + chunk[:, None]) * E + across[None, :]
        matrix = tl.load(matrix, mask=within(c + chunk < E, across, E, padded(E)), other=0.0)
        acc = tl.dot(pin(y).to(matrix.dtype), matrix, acc, input_precision=PRECISION)
    return acc


@triton.jit
def write_convolved(OUT, X, MASK, WEIGHT, BIAS, GRIDS, image, segment, n, r, inside, batch, row, grid_start, grid_rows,
                    grid_columns, N, D: tl.constexpr, ADD: tl.constexpr, MIRRORED: tl.constexpr,
                    COLUMNS: tl.constexpr):  # fmt: skip
    """Writes DWC(X), see :func:`convolve_tile`, of a tile of rows to OUT (T, d), plus what ADD finds there.

    The grid is that of the segment in GRIDS, or the one given.
    """
    if GRIDS is not None:
        grid_start = tl.load(GRIDS + segment * 3)
        grid_rows = tl.load(GRIDS + segment * 3 + 1)
        grid_columns = tl.load(GRIDS + segment * 3 + 2)
    mask = None if MASK is None else MASK + image * N
    for c in range(0, D, COLUMNS):
        columns = c + tl.arange(0, COLUMNS)
        y = convolve_tile(X + image * batch, mask, WEIGHT, BIAS, n, inside, columns, columns < D, row, grid_start,
                          grid_rows, grid_columns, MIRRORED, weight_stride_d=1, weight_stride_t=D)  # fmt: skip
        at = OUT + r[:, None] * D + columns[None, :]
        there = within(inside, columns, D, COLUMNS)
        if ADD:
            y += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, y.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def write_readout(OUT, maps, STATE, MEANS, INVERSE_MASS, X, MASK, WEIGHT, BIAS, GRIDS, image, segment, n, r, inside,
                  live, rescale, x_batch, x_row, grid_start, grid_rows, grid_columns, N, D: tl.constexpr,
                  H: tl.constexpr, ADD: tl.constexpr, MIRRORED: tl.constexpr, COLUMNS: tl.constexpr,
                  FAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Writes rescale Zh_h STATE_h of a tile to OUT (T, d), head by head, plus what ADD finds there, plus DWC(X)."""
    E: tl.constexpr = D // H
    if WEIGHT is not None:
        # Through OUT, which this program alone reads and writes and which stays in the caches: with the convolution
        # of a head beside its product the registers would hold neither.
        write_convolved(OUT, X, MASK, WEIGHT, BIAS, GRIDS, image, segment, n, r, inside, x_batch, x_row, grid_start,
                        grid_rows, grid_columns, N, D, ADD, MIRRORED, COLUMNS)  # fmt: skip
        tl.debug_barrier()
    across = tl.arange(0, padded(E))
    there = within(inside, across, E, padded(E))
    for h in range(0, H):
        acc = head_product(maps, STATE, MEANS, INVERSE_MASS, h, r, inside, live, E, H, COLUMNS, FAST, PRECISION)
        acc *= rescale
        at = OUT + r[:, None] * D + h * E + across[None, :]
        if ADD or WEIGHT is not None:
            acc += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, acc.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def readout_kernel(Z1, Z2, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES, SLOPES_D,
                   FACTORS, TILES, STATE, MEANS, INVERSE_MASS, OUT, X, WEIGHT, BIAS, GRIDS, N, T, unit, rescale,
                   batch1, row1, batch2, row2, x_batch, x_row, grid_start, grid_rows, grid_columns, D: tl.constexpr,
                   H: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr, DECIDE: tl.constexpr, RELATIVE: tl.constexpr,
                   ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
                   PRECISION: tl.constexpr, ROUTER: tl.constexpr):  # fmt: skip
    """One program for a tile of ROWS queries, all heads: DECIDE as in :func:`tokens_kernel`, O_h = rescale Qh_h S_h.

    STATE (segments, H, e, e) in the dtype of the tokens; MEANS (segments, d) and INVERSE_MASS (T, H) float32, or None;
    OUT (T, d), to which ADD adds; the convolution of X (B, N, d), with strides x_batch and x_row, by WEIGHT (9, d) and
    BIAS (d,) float32, or None; GRIDS (segments, 3) int32 or None; the other arguments as in :func:`tokens_kernel`.
    """
    image, segment, n, inside = rows_of_program(TILES, N, ROWS)
    r, T = image * N + n, tl.cast(T, tl.int64)
    rows = row_pointers(Z1, Z2, image, n, batch1, row1, batch2, row2)
    maps, live = measured_rows(rows, MASK, ROUTER1, ROUTER2, ROUTER_D, GAMMA, LAM, INDEX, CHOICE, STATS, SLOPES,
                               SLOPES_D, FACTORS, segment, r, inside, T, unit, D, N_F, N_D, DECIDE, RELATIVE, COLUMNS,
                               FAST, ROUTER)  # fmt: skip
    means = None if MEANS is None else MEANS + segment * D
    write_readout(OUT, maps, STATE + segment * (D * (D // H)), means, INVERSE_MASS, X, MASK, WEIGHT, BIAS, GRIDS, image,
                  segment, n, r, inside, live, rescale, x_batch, x_row, grid_start, grid_rows, grid_columns,
                  N, D, H, ADD, False, COLUMNS, FAST, PRECISION)  # fmt: skip


def state(
    call: Call,
    side: Side,
    values: Tensor,
    *,
    inverse_mass: Tensor | None = None,
    sums: bool = False,
    mass_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """scale Zh^T values per head, (segments, H, e, e) float32, and with ``sums`` the mean mass (segments, d).

    values (B, N, d); the other arguments as in :func:`state_kernel`.
    """
    e, rows = call.head_dim, configs.pick("state", call.dtype, call.head_dim).rows
    splits = call.splits(rows)
    shares = values.new_empty((call.segments, splits, call.dim), dtype=torch.float32) if sums else None
    partial = _states(
        call, side, values, splits, width=e, head_stride=e, raw=False, FACTORS=side.factors, RELATIVE=side.relative,
        unit=call.unit, scale=call.scale, INVERSE_MASS=inverse_mass, MASS_WEIGHTS=mass_weights, SUMS=shares,
    )  # fmt: skip
    return partial.sum(1), None if shares is None else shares.sum(1)


def correlation(call: Call, side: Side, values: Tensor, raw: bool) -> Tensor:
    """(d, n) float32: the sum over all T rows of phi(Z)^T values, or Z^T values where ``raw``, values (T, n) float32.

    ``side`` is one map without lambda.  The heads here are only parts of the d channels.
    """
    width, e = values.shape[1], largest_divisor(call.dim, configs.LARGEST_HEAD)
    splits = call.splits(configs.pick("state", torch.float32, e).rows)
    values = values.view(call.batch, call.length, width)
    partial = _states(
        call, side, values, splits, width=width, head_stride=0, raw=raw, head_dim=e, FACTORS=None, RELATIVE=False,
        unit=1.0, scale=1.0, INVERSE_MASS=None, MASS_WEIGHTS=None, SUMS=None,
    )  # fmt: skip
    return partial.sum((0, 1)).view(call.dim, width)


def _states(
    call: Call, side: Side, values: Tensor, splits: int, *, width: int, head_stride: int, raw: bool,
    head_dim: int | None = None, **arguments: Any,
) -> Tensor:  # fmt: skip
    """The partial sums (segments, splits, H, e, width) of :func:`state_kernel`."""
    e = call.head_dim if head_dim is None else head_dim
    heads = call.dim // e
    config, constants = configs.pick("state", values.dtype, e), numerics(call.dtype)
    partial = values.new_empty((call.segments, splits, heads, e, width), dtype=torch.float32)
    launch(
        state_kernel, (call.segments * splits * heads * triton.cdiv(e, config.columns),), config,
        **{**call.arguments(side), "H": heads},
        **arguments, VALUES=values, values_batch=values.stride(0), values_row=values.stride(1),
        values_head=head_stride, BOUNDS=call.bounds_table(), PARTIAL=partial, SPLITS=splits, WIDTH=width, RAW=raw,
        ROWS=config.rows, COLUMNS=config.columns, FAST=constants["FAST"], PRECISION=constants["PRECISION"],
    )  # fmt: skip
    return partial


def readout(
    call: Call,
    side: Side,
    state: Tensor,
    out: Tensor,
    *,
    decide: bool,
    add: bool = False,
    means: Tensor | None = None,
    inverse_mass: Tensor | None = None,
    values: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Writes O (B, N, d) to ``out``, contiguous; with a convolution ``weight`` (9, d) also DWC(values).

    The other arguments as in :func:`readout_kernel`.
    """
    config = configs.pick("readout", call.dtype, call.head_dim)
    x = side.tokens if values is None else values
    convolution = call.convolution(values, weight)
    deciding = call.deciding(side, decide)
    launch(
        readout_kernel, (call.programs(config.rows),), config, **call.arguments(side),
        **{**deciding, "MASK": call.mask if decide or convolution["WEIGHT"] is not None else None},
        TILES=call.tiles(config.rows), STATE=state, MEANS=means, INVERSE_MASS=inverse_mass, OUT=out, X=x, BIAS=bias,
        **convolution, x_batch=x.stride(0), x_row=x.stride(1), rescale=call.rescale, ADD=add, ROWS=config.rows,
        COLUMNS=config.columns, **numerics(call.dtype),
    )  # fmt: skip


def largest_divisor(n: int, most: int) -> int:
    return next(e for e in range(min(n, most), 0, -1) if n % e == 0)
