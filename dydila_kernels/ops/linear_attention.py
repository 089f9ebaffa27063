"""Eqs. 8 and 10: the state of the keys and its readout by the queries, per head of e = d/H channels.

    S_h = state_scale sum_n Kh_nh^T V_nh    (segments, H, e, e)        O_nh = output_scale Qh_nh S_h

Kh and Qh are made anew in registers from the tokens and what :mod:`dydila_kernels.ops.tokens` saves of them.  The sum
over the N tokens of a segment is split over programs, whose float32 partial sums are added in a fixed order.

Under "denominator" O_nh is divided by (phi(Q) + |lambda| phi(Q'))_nh . means_h with the mean denominator terms of the
keys, means = state_scale sum_n (phi(K) + |lambda| phi(K'))_n; what divides multiplies Qh before it is rounded for the
product.

The same two kernels serve the backward pass: dS is the state of the queries and dO, dV the readout of the keys from dS.
For e > 128, where a state does not fit the registers of a program, the products are GEMMs (:mod:`gemm`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Denominator, Scaling, Tokens, constant, strided
from dydila_kernels.ops.branches import (
    branch_pointers,
    difference_of,
    inverse_denominator,
    load_neg_lam,
    load_per_head,
    load_row_stats,
    powers_of,
    reciprocal,
    summed_terms,
    weigh,
)
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.tiles import (
    Tile,
    ceil_div,
    launch,
    operand,
    padded,
    part_width,
    pin,
    row_pointers,
    tile_mask,
    tile_of_program,
)
from dydila_kernels.ops.tokens import branches_of


class Values(NamedTuple):
    """x (B, N, H x WIDTH) with its strides; stride_xh, a constant, is 0 where all heads share WIDTH columns.

    Of a variable Triton knows only whether it is a multiple of 16: heads of 72 would be loaded two bytes at a time.
    """

    x: Any
    stride_xb: Any
    stride_xn: Any
    stride_xh: Any


@triton.jit
def state_kernel(tokens, values, segments, tables, stats, scaling, denominator, partials, state_scale, SPLITS,
                 k: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr):  # fmt: skip
    """partials[segment, split, h] = state_scale sum over the split of Zh_h^T V_h; one program for BLOCK_D rows of each.

    values, see :class:`Values`; segments.table are bounds; partials (segments, SPLITS, H, e, WIDTH) float32; Zh is
    times denominator.inverse where given, and denominator.sums (segments, SPLITS, d) are written where given, each
    token's terms times denominator.weights where given.  RAW: Z itself in the place of Zh.

    A program makes BLOCK_D channels of Zh only: no channel is made twice, and the registers hold few.
    """
    E: tl.constexpr = k.D // k.H
    chunks: tl.constexpr = (E + k.BLOCK_D - 1) // k.BLOCK_D
    columns = (tl.program_id(0) % chunks) * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    h = (tl.program_id(0) // chunks) % k.H
    split = (tl.program_id(0) // (chunks * k.H)) % SPLITS
    T = tl.cast(segments.T, tl.int64)
    segment = (tl.program_id(0) // (chunks * k.H * SPLITS)).to(tl.int64)
    image, first, end = segment, 0, segments.N
    if segments.table is not None:
        image = segment * 0
        first, end = tl.load(segments.table + segment), tl.load(segments.table + segment + 1)
    tokens_per_split = tl.cdiv(tl.cdiv(end - first, SPLITS), k.BLOCK_N) * k.BLOCK_N
    first += split * tokens_per_split
    end = tl.minimum(first + tokens_per_split, end)

    across = tl.arange(0, padded(WIDTH))
    acc = tl.zeros((columns.shape[0], across.shape[0]), tl.float32)
    total = tl.zeros(columns.shape, tl.float32)
    for start in range(first, end, k.BLOCK_N):
        n = (start + tl.arange(0, k.BLOCK_N)).to(tl.int64)
        tile = Tile(image, segment, n, image * segments.N + n, n < end, segments.N, T)
        row_ptrs = branch_pointers(tokens, tile)
        row_stats, neg_lam = load_row_stats(row_ptrs, stats, tables, tile), load_neg_lam(stats, tables, tile)
        branches, nonzero_rows, _ = weigh(row_ptrs, row_stats, neg_lam, scaling, segment, k)
        active_rows = tile.row_mask & nonzero_rows
        x = values.x + (image * values.stride_xb + n * values.stride_xn + h * values.stride_xh)[:, None]
        x = tl.load(x + across[None, :], mask=tile_mask(active_rows, across, WIDTH, padded(WIDTH)), other=0.0)
        mask = tile_mask(active_rows, columns, E, k.BLOCK_D)
        if RAW:
            y = tl.load(row_ptrs[0] + (h * E + columns)[None, :], mask=mask, other=0.0)
            if y.dtype == tl.float32:
                x = x.to(tl.float32)
        else:
            powers = powers_of(branches, h * E + columns, mask, k.FAST)
            y = difference_of(powers, branches)
            if denominator.inverse is not None:
                y *= load_per_head(denominator.inverse, h, tile, tile.row_mask, k.H)[:, None]
            if denominator.sums is not None:
                total += tl.sum(summed_terms(powers, branches, denominator, h, tile, k), axis=0)
            y = pin(y)
        acc = tl.dot(tl.trans(y.to(x.dtype)), x, acc, input_precision=k.PRECISION)

    part = segment * SPLITS + split
    out = partials + ((part * k.H + h) * E + columns[:, None]) * WIDTH + across[None, :]
    tl.store(out, acc * state_scale, mask=tile_mask(columns < E, across, WIDTH, padded(WIDTH)))
    if denominator.sums is not None:
        tl.store(denominator.sums + part * k.D + h * E + columns, total * state_scale, mask=columns < E)


@triton.jit
def head_product(branches, matrix, inverse, h, active_rows, k):
    """Zh_h matrix_h (R, e padded), for matrix (H, e, e); Zh is times inverse (R,) where given.

    Zh is made BLOCK_D channels at a time: 72 are 5 x 16 and not 128, and the registers hold few of them.
    """
    E: tl.constexpr = k.D // k.H
    chunk = tl.arange(0, k.BLOCK_D)
    across = tl.arange(0, padded(E))
    acc = tl.zeros((active_rows.shape[0], padded(E)), tl.float32)
    BLOCK_D: tl.constexpr = k.BLOCK_D
    for c in tl.static_range(0, E, BLOCK_D):
        powers = powers_of(branches, h * E + c + chunk, tile_mask(active_rows, c + chunk, E, k.BLOCK_D), k.FAST)
        y = difference_of(powers, branches)
        if inverse is not None:
            y *= inverse[:, None]
        block = matrix + (h * E + c + chunk[:, None]) * E + across[None, :]
        block = tl.load(block, mask=tile_mask(c + chunk < E, across, E, padded(E)), other=0.0)
        acc = tl.dot(pin(y).to(block.dtype), block, acc, input_precision=k.PRECISION)
    return acc


@triton.jit
def write_readout(out, stride, matrix, output_scale, denominator, branches, tile, active_rows, k, ADD: tl.constexpr):
    """Writes output_scale Zh_h matrix_h of a tile to out (T, d), head by head, plus what ADD finds there.

    The rows of out are ``stride`` apart, a constant; matrix (H, e, e).
    """
    E: tl.constexpr = k.D // k.H
    across = tl.arange(0, padded(E))
    store_mask = tile_mask(tile.row_mask, across, E, padded(E))
    for h in range(0, k.H):
        inverse = None
        if denominator.vector is not None:
            inverse = inverse_denominator(denominator, h, branches, tile, active_rows, k)
        acc = head_product(branches, matrix, inverse, h, active_rows, k)
        acc *= output_scale
        at = out + tile.token_ids[:, None] * stride + h * E + across[None, :]
        if ADD:
            acc += tl.load(at, mask=store_mask, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out.dtype.element_ty), mask=store_mask)


@triton.jit
def readout_kernel(tokens, segments, tables, routers, stats, slopes, scaling, denominator, state, output_scale, out,
                   k: tl.constexpr, DECIDE: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """One program for a tile of queries, all heads: DECIDE as in :func:`tokens_kernel`, O_h = output_scale Qh_h S_h.

    state (segments, H, e, e) in the dtype of the tokens; out (T, d), to which ADD adds; the other arguments as in
    :mod:`dydila_kernels.ops.arguments`.
    """
    tile = tile_of_program(segments, k.BLOCK_N)
    branches, active_rows = branches_of(tokens, tables, routers, stats, slopes, scaling, tile, k, DECIDE)
    matrix = state + tile.segment * (k.D * (k.D // k.H))
    write_readout(out, k.D, matrix, output_scale, denominator, branches, tile, active_rows, k, ADD)


@triton.jit
def whole_inverse(denominator, h, tile, k):
    """1 / (the denominators of head h), (R,), whose parts denominator.sums has; saved in denominator.inverse."""
    E: tl.constexpr = k.D // k.H
    PARTS: tl.constexpr = E // part_width(E)
    parts = tl.arange(0, padded(PARTS, 1))
    at = denominator.sums + (h * PARTS + parts).to(tl.int64)[None, :] * tile.T + tile.token_ids[:, None]
    found = tl.load(at, mask=tile_mask(tile.row_mask, parts, PARTS, padded(PARTS, 1)), other=0.0)
    inverse = reciprocal(tl.sum(found, axis=1), k.FAST)
    tl.store(denominator.inverse + tile.token_ids * k.H + h, inverse, mask=tile.row_mask)
    return inverse


@triton.jit
def product_kernel(tokens, segments, state, output_scale, denominator, out, k: tl.constexpr):
    """One program for a tile of queries and a head: O_h = output_scale Qh_h S_h of Qh, tokens.z (B, N, d).

    state (segments, H, e, e) in the dtype of Qh; out (T, d), which may be the memory of Qh.  O_h is over the
    denominators, where denominator.sums is given.
    """
    E: tl.constexpr = k.D // k.H
    BLOCK_D: tl.constexpr = k.BLOCK_D
    tile = tile_of_program(segments, k.BLOCK_N)
    h = tl.program_id(1)
    row_ptrs = row_pointers(tokens.z, tile) + h * E
    chunk = tl.arange(0, k.BLOCK_D)
    across = tl.arange(0, padded(E))
    acc = tl.zeros((tile.n.shape[0], padded(E)), tl.float32)
    for c in tl.static_range(0, E, BLOCK_D):
        x = tl.load(row_ptrs + c + chunk[None, :], mask=tile_mask(tile.row_mask, c + chunk, E, k.BLOCK_D), other=0.0)
        block = state + ((tile.segment * k.H + h) * E + c + chunk[:, None]) * E + across[None, :]
        block = tl.load(block, mask=tile_mask(c + chunk < E, across, E, padded(E)), other=0.0)
        acc = tl.dot(x, operand(block), acc, input_precision=k.PRECISION)
    acc *= output_scale
    if denominator.sums is not None:
        acc *= whole_inverse(denominator, h, tile, k)[:, None]
    mask = tile_mask(tile.row_mask, across, E, padded(E))
    out += tile.token_ids[:, None] * k.D + h * E + across[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


def state(
    context: LaunchContext,
    side: QKOperand,
    values: Tensor,
    *,
    inverse: Tensor | None = None,
    sums: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """state_scale Zh^T values per head, (segments, H, e, e) float32; with ``sums`` the mean terms (segments, d).

    values (B, N, d); ``inverse`` and ``weights`` (T, H) float32 as in :func:`state_kernel`.
    """
    e = context.head_dim
    splits = context.splits(configs.pick("state", context.dtype, e).block_n)
    partials = values.new_empty((context.segments, splits, context.dim), dtype=torch.float32) if sums else None
    found = partial_states(
        context, side, Values(*strided(values), constant(e)), splits, width=e, head_dim=e, raw=False,
        has_denominator=side.has_denominator, scaling=context.scaling(side), state_scale=context.state_scale,
        denominator=Denominator(inverse=inverse, weights=weights, sums=partials),
    )  # fmt: skip
    return found.sum(1), None if partials is None else partials.sum(1)


def written_state(context: LaunchContext, side: QKOperand, written: Tensor, values: Tensor) -> Tensor:
    """:func:`state` from ``written``, the Zh of a side (B, N, d); no values are read of rows that are all zero."""
    e = context.head_dim
    splits = context.splits(configs.pick("written_state", written.dtype, e).block_n)
    return partial_states(
        context, side._replace(tokens=written, redundant=written), Values(*strided(values), constant(e)), splits,
        width=e, head_dim=e, raw=True, has_denominator=False, scaling=context.scaling(side),
        state_scale=context.state_scale, denominator=Denominator(), stage="written_state",
    ).sum(1)  # fmt: skip


def written_readout(
    context: LaunchContext, written: Tensor, state: Tensor, out: Tensor, parts: Tensor | None, inverse: Tensor | None
) -> None:
    """Writes O (B, N, d) to ``out``, contiguous; ``written``, which may be it, are Qh, state (segments, H, e, e) in
    their dtype.

    Under "denominator" ``parts`` of the denominators, see :func:`part_width`, and ``inverse`` (T, H), written.
    """
    config = configs.pick("product", written.dtype, context.head_dim)
    launch(
        product_kernel, (context.programs(config.block_n), context.heads), config,
        tokens=Tokens(strided(written), None, None), segments=context.tiles(config.block_n), state=state,
        output_scale=context.output_scale, denominator=Denominator(inverse=inverse, sums=parts),
        out=out, k=context.constants(config),
    )  # fmt: skip


def correlation(context: LaunchContext, side: QKOperand, values: Tensor, raw: bool) -> Tensor:
    """(d, n) float32: the sum over all T rows of phi(Z)^T values, or Z^T values where ``raw``, values (T, n) float32.

    ``side`` is one branch without lambda.  The heads here are only parts of the d channels.
    """
    width, e = values.shape[1], largest_divisor(context.dim, configs.LARGEST_HEAD)
    splits = context.splits(configs.pick("state", torch.float32, e).block_n)
    values = values.view(context.batch, context.length, width)
    found = partial_states(
        context, side, Values(*strided(values), constant(0)), splits, width=width, head_dim=e, raw=raw,
        has_denominator=False, scaling=Scaling(1.0, None), state_scale=1.0, denominator=Denominator(),
    )  # fmt: skip
    return found.sum((0, 1)).view(context.dim, width)


def partial_states(
    context: LaunchContext, side: QKOperand, values: Values, splits: int, *, width: int, head_dim: int, raw: bool,
    has_denominator: bool, stage: str = "state", **arguments: Any,
) -> Tensor:  # fmt: skip
    """The partial sums (segments, splits, H, e, width) float32 of :func:`state_kernel`, for e = ``head_dim``."""
    heads = context.dim // head_dim
    config = configs.pick(stage, side.tokens.dtype if stage == "written_state" else values.x.dtype, head_dim)
    partials = values.x.new_empty((context.segments, splits, heads, head_dim, width), dtype=torch.float32)
    launch(
        state_kernel, (context.segments * splits * heads * ceil_div(head_dim, config.block_d),), config,
        tokens=context.tokens(side), values=values, segments=context.whole_segments(), **context.measured(side),
        **arguments, partials=partials, SPLITS=splits, k=context.constants(config, has_denominator, heads),
        WIDTH=width, RAW=raw,
    )  # fmt: skip
    return partials


def readout(
    context: LaunchContext,
    side: QKOperand,
    state: Tensor,
    out: Tensor,
    *,
    decide: bool,
    add: bool = False,
    means: Tensor | None = None,
    inverse: Tensor | None = None,
) -> None:
    """Writes O (B, N, d) to ``out``, contiguous, or adds it.

    state (segments, H, e, e) in the dtype of the tokens; under "denominator" ``means`` (segments, d) are those of the
    keys, and ``inverse`` (T, H), written, that of the queries, all float32.
    """
    config = configs.pick("readout", context.dtype, context.head_dim)
    launch(
        readout_kernel, (context.programs(config.block_n),), config, tokens=context.tokens(side, masked=decide),
        segments=context.tiles(config.block_n), **context.measured(side), **context.deciding(side, decide),
        scaling=context.scaling(side), denominator=Denominator(means, inverse), state=state,
        output_scale=context.output_scale, out=out, k=context.constants(config, side.has_denominator), ADD=add,
    )  # fmt: skip


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most ``most``."""
    return next(e for e in range(min(n, most), 0, -1) if n % e == 0)
