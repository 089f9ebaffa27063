"""Eqs. 1-2: each token times the projector that its router chose.

    u_t = argmax(x_t R)                              route      R (d, n_P), ties to the lowest index
    y_t = x_t W[u_t]                                 project    W (n_P, d, e)
    dx_t = dy_t W[u_t]^T                             project_input_gradient
    dW[u] = sum over t with u_t = u of x_t^T dy_t    project_weight_gradient

A plan lists the tokens of each projector, in their order; those of both sides, for Q' and K', are made together.  The
products then run group by group over tiles of that list: rows are gathered as they are read and scattered as they are
written, so the work is that of one projection whatever n_P is.

How the tokens of a projector fill tiles is known to the GPU only.  The host launches a bound, min(T, T // rows + n_P)
for T tokens: each of the at most n_P projectors leaves one tile partly filled, and no tile is empty.  Each program
finds its tile from the n_P list ends (``find_tile``), and the programs of the bound that find none return at once.

In this file T = B N, and a tensor of tokens is (T, channels) with any row stride; row addresses are int64.  Strides
depend on the widths of the model, not on B or N: as constants they tell the compiler how far loads are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops.arguments import constant
from dydila_kernels.ops.configs import Config, pick
from dydila_kernels.ops.tiles import ceil_div, check_tokens, first_largest, launch, numerics, padded, router_dot


def token_rows(x: Tensor) -> Tensor:
    """(B, N, c) -> (T, c) with contiguous channels: a view where the strides allow it, else a copy."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


# Eq. 1 ----------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Constants of a kernel: products of D and E channels in blocks of BLOCK_N tokens, BLOCK_D channels, BLOCK_K deep.

    NUM_OPTIONS: n_P.  PRECISION: of the products, see :func:`numerics`.
    """

    D: int
    E: int
    NUM_OPTIONS: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_K: int
    PRECISION: str


class Rows(NamedTuple):
    """x (T, channels), its rows stride_xn apart, a constant."""

    x: Any
    stride_xn: Any


def rows_argument(x: Tensor) -> Rows:
    """The argument for x (T, channels)."""
    return Rows(x, constant(x.stride(0)))


def blocks(config: Config, d: int, e: int, num_options: int, precision: str) -> Blocks:
    """The constants of a launch."""
    return Blocks(d, e, num_options, config.block_n, config.block_d, config.block_k, precision)


@triton.jit
def route_kernel(tokens, router1, router2, index, length, k: tl.constexpr):
    """One program decides for BLOCK_N tokens.

    tokens: :class:`Rows` (T, D); router1 (D, n_P), router2 the same or None; index (routers, T) int8; length: T.
    """
    token_ids = tl.program_id(0) * k.BLOCK_N + tl.arange(0, k.BLOCK_N)
    row_mask = token_ids < length
    token_ids = token_ids.to(tl.int64)
    option_ids = tl.arange(0, padded(k.NUM_OPTIONS))
    logits1 = tl.zeros((token_ids.shape[0], option_ids.shape[0]), tl.float32)
    logits2 = tl.zeros((token_ids.shape[0], option_ids.shape[0]), tl.float32)
    for start in tl.range(0, k.D, k.BLOCK_D):
        columns = start + tl.arange(0, k.BLOCK_D)
        col_mask = columns < k.D
        pointers = tokens.x + token_ids[:, None] * tokens.stride_xn + columns[None, :]
        x = tl.load(pointers, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        entries = columns[:, None] * k.NUM_OPTIONS + option_ids[None, :]
        mask = col_mask[:, None] & (option_ids < k.NUM_OPTIONS)[None, :]
        logits1 = router_dot(x, tl.load(router1 + entries, mask=mask, other=0.0), logits1, k.PRECISION)
        if router2 is not None:
            logits2 = router_dot(x, tl.load(router2 + entries, mask=mask, other=0.0), logits2, k.PRECISION)
    tl.store(index + token_ids, first_largest(logits1, k.NUM_OPTIONS).to(tl.int8), mask=row_mask)
    if router2 is not None:
        tl.store(index + length + token_ids, first_largest(logits2, k.NUM_OPTIONS).to(tl.int8), mask=row_mask)


def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for one or two routers (d, n_P) in one pass over x (B, N, d): (routers, B, N) int8."""
    rows, (d, num_options) = token_rows(x), routers[0].shape
    length = rows.shape[0]
    check_tokens(length)
    first, second = routers[0].contiguous(), routers[1].contiguous() if len(routers) == 2 else None
    index = x.new_empty((len(routers), *x.shape[:2]), dtype=torch.int8)
    config = pick("route", x.dtype, num_options)
    launch(
        route_kernel, (ceil_div(length, config.block_n),), config,
        tokens=rows_argument(rows), router1=first, router2=second, index=index, length=length,
        k=blocks(config, d, 0, num_options, numerics(x.dtype)["ROUTER_PRECISION"]),
    )  # fmt: skip
    return index


# The plan: a stable counting sort -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which tokens of a side go to which projector.

    order: (T,) int32, the tokens of projector 0, then those of 1, and so on, each list in ascending order.
    ends: (n_P,) int32, where in ``order`` the list of each projector ends.
    """

    order: Tensor
    ends: Tensor


@triton.jit
def count_kernel(index, counts, length, NUM_OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How often each option occurs in each block of tokens; one program a block and side.

    index (sides, T) integers; counts (sides, NUM_OPTIONS, blocks) int32.
    """
    block, blocks, side = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    token_ids = block * BLOCK_N + tl.arange(0, BLOCK_N)
    chosen = tl.load(index + side.to(tl.int64) * length + token_ids, mask=token_ids < length, other=-1)
    for u in tl.range(0, NUM_OPTIONS):
        tl.store(counts + (side * NUM_OPTIONS + u) * blocks + block, tl.sum((chosen == u).to(tl.int32)))


@triton.jit
def rank_kernel(index, counts, order, ends, length, NUM_OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes each token of a block and side to its place in the list of its projector.

    index (sides, T) integers; counts (sides, NUM_OPTIONS, blocks) int32, those of :func:`count_kernel`, which each
    program adds up by itself; order (sides, T) and ends (sides, NUM_OPTIONS) int32.
    """
    block, blocks, side = tl.program_id(0), tl.cdiv(length, BLOCK_N), tl.program_id(1)
    token_ids = block * BLOCK_N + tl.arange(0, BLOCK_N)
    before = side.to(tl.int64) * length
    chosen = tl.load(index + before + token_ids, mask=token_ids < length, other=-1)
    option_ids = tl.arange(0, padded(NUM_OPTIONS))
    exists = option_ids < NUM_OPTIONS
    rows = counts + (side * NUM_OPTIONS + option_ids) * blocks
    total = tl.zeros((option_ids.shape[0],), tl.int32)
    earlier = tl.zeros((option_ids.shape[0],), tl.int32)
    for first in tl.range(0, blocks, 64):
        others = first + tl.arange(0, 64)
        mask = exists[:, None] & (others < blocks)[None, :]
        count = tl.load(rows[:, None] + others[None, :], mask=mask, other=0)
        total += tl.sum(count, 1)
        earlier += tl.sum(tl.where((others < block)[None, :], count, 0), 1)
    stops = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + side * NUM_OPTIONS + option_ids, stops, mask=exists)
    for u in tl.range(0, NUM_OPTIONS):
        hit = (chosen == u).to(tl.int32)
        start = tl.sum(tl.where(option_ids == u, stops - total + earlier, 0))
        place = start + tl.cumsum(hit, 0) - 1
        tl.store(order + before + place, token_ids, mask=hit != 0)


def plan(index: Tensor, num_options: int) -> tuple[Tensor, Tensor]:
    """The plans for index (sides, B, N) with values in [0, num_options), made on its device without waiting for it.

    Returns:
        The order (sides, T) and the ends (sides, n_P) of the :class:`Plan` of each side.
    """
    index = index.contiguous()
    sides, length = index.shape[0], index[0].numel()
    order = index.new_empty((sides, length), dtype=torch.int32)
    if not length:
        return order, index.new_zeros((sides, num_options), dtype=torch.int32)
    ends = index.new_empty((sides, num_options), dtype=torch.int32)
    config = pick("plan", index.dtype)
    blocks = ceil_div(length, config.block_n)
    counts = index.new_empty((sides, num_options, blocks), dtype=torch.int32)
    sizes = {"length": length, "NUM_OPTIONS": num_options, "BLOCK_N": config.block_n}
    launch(count_kernel, (blocks, sides), config, index=index, counts=counts, **sizes)
    launch(rank_kernel, (blocks, sides), config, index=index, counts=counts, order=order, ends=ends, **sizes)
    return order, ends


@triton.jit
def lists(ends, NUM_OPTIONS: tl.constexpr):
    """The projectors, and where the list of each begins and ends; those that pad a power of two have empty lists."""
    u = tl.arange(0, padded(NUM_OPTIONS))
    begins = tl.load(ends + u - 1, mask=(u > 0) & (u < NUM_OPTIONS), other=0)
    return u, begins, tl.load(ends + u, mask=u < NUM_OPTIONS, other=0)


@triton.jit
def find_tile(ends, tile, size, NUM_OPTIONS: tl.constexpr):
    """The projector of a tile, and where in the order it starts and ends; start >= end where there is no such tile.

    A tile is ``size`` tokens of one projector, or what is left of them; tiles are numbered along the order.
    """
    u, begins, stops = lists(ends, NUM_OPTIONS)
    upto = tl.cumsum(tl.cdiv(stops - begins, size), 0)
    projector = tl.sum((upto <= tile).to(tl.int32))
    first = tl.max(tl.where(u < projector, upto, 0))
    start = tl.sum(tl.where(u == projector, begins, 0)) + (tile - first) * size
    end = tl.minimum(start + size, tl.sum(tl.where(u == projector, stops, 0)))
    return projector, start, end


# Eq. 2 and its gradient with respect to x -----------------------------------------------------------------------------


class Weight(NamedTuple):
    """weight (n_P, D, E) with its strides, constants."""

    w: Any
    stride_wp: Any
    stride_wd: Any
    stride_we: Any


@triton.jit
def project_kernel(tokens, weight, y, order, ends, k: tl.constexpr):
    """One program: BLOCK_N tokens of one projector by BLOCK_D channels of y[order] = x[order] weight[u].

    tokens: :class:`Rows` (T, D); weight: :class:`Weight`; y (T, E) contiguous; order (T,), ends (n_P,) int32.

    The column blocks of a tile are neighbours in the grid, so its tokens come from memory once; the weight of a
    projector, which neighbouring tiles share, stays in the L2 cache.
    """
    column_blocks: tl.constexpr = (k.E + k.BLOCK_D - 1) // k.BLOCK_D
    u, start, end = find_tile(ends, tl.program_id(0) // column_blocks, k.BLOCK_N, k.NUM_OPTIONS)
    if start >= end:
        return
    places = start + tl.arange(0, k.BLOCK_N)
    row_mask = places < end
    token_ids = tl.load(order + places, mask=row_mask, other=0).to(tl.int64)
    columns = tl.program_id(0) % column_blocks * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    col_mask = columns < k.E
    row_ptrs = tokens.x + token_ids[:, None] * tokens.stride_xn
    weight_columns = weight.w + u.to(tl.int64) * weight.stride_wp + columns.to(tl.int64)[None, :] * weight.stride_we
    acc = tl.zeros((token_ids.shape[0], columns.shape[0]), tl.float32)
    for first in tl.range(0, k.D, k.BLOCK_K):
        inputs = first + tl.arange(0, k.BLOCK_K)
        input_mask = inputs < k.D
        x = tl.load(row_ptrs + inputs[None, :], mask=row_mask[:, None] & input_mask[None, :], other=0.0)
        pointers = weight_columns + inputs.to(tl.int64)[:, None] * weight.stride_wd
        w = tl.load(pointers, mask=input_mask[:, None] & col_mask[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=k.PRECISION)
    out = y + token_ids[:, None] * k.E + columns[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


def project(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e) -> (B, N, e) contiguous, in the dtype of x."""
    return grouped_product(x, weight if weight.stride(2) == 1 else weight.contiguous(), plan)


def project_input_gradient(grad: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """grad (B, N, e), weight (n_P, d, e) -> dx (B, N, d): the same product with every projector transposed."""
    return grouped_product(grad, (weight if weight.stride(2) == 1 else weight.contiguous()).transpose(1, 2), plan)


def grouped_product(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """x (B, N, d), weight (n_P, d, e) of any strides -> (B, N, e) contiguous, in the dtype of x."""
    rows, (num_options, d, e) = token_rows(x), weight.shape
    y, length = x.new_empty((*x.shape[:2], e)), rows.shape[0]
    config = pick("projection", x.dtype, e)
    bound = min(length, length // config.block_n + num_options)
    launch(
        project_kernel, (bound * ceil_div(e, config.block_d),), config,
        tokens=rows_argument(rows), weight=Weight(weight, *map(constant, weight.stride())), y=y, order=plan.order,
        ends=plan.ends, k=blocks(config, d, e, num_options, numerics(x.dtype)["PRECISION"]),
    )  # fmt: skip
    return y


# The gradient with respect to the weight ------------------------------------------------------------------------------


@triton.jit
def weight_gradient_kernel(tokens, grads, partials, order, ends, tile_size, k: tl.constexpr):
    """One program: BLOCK_D x BLOCK_D entries of partials[tile], the sum of x^T dy over the tokens of a tile.

    tokens (T, D), grads (T, E): :class:`Rows`; partials (tiles, D, E) float32; order (T,), ends (n_P,) int32.  Tiles
    are long here: ``tile_size`` tokens, taken BLOCK_N at a time.
    """
    d_blocks: tl.constexpr = (k.D + k.BLOCK_D - 1) // k.BLOCK_D
    e_blocks: tl.constexpr = (k.E + k.BLOCK_D - 1) // k.BLOCK_D
    tile = tl.program_id(0) // (d_blocks * e_blocks)
    block = tl.program_id(0) % (d_blocks * e_blocks)
    _, start, end = find_tile(ends, tile, tile_size, k.NUM_OPTIONS)
    if start >= end:
        return
    inputs = block // e_blocks * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    outputs = block % e_blocks * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    acc = tl.zeros((inputs.shape[0], outputs.shape[0]), tl.float32)
    for first in tl.range(start, end, k.BLOCK_N):
        places = first + tl.arange(0, k.BLOCK_N)
        row_mask = (places < end)[:, None]
        token_ids = tl.load(order + places, mask=places < end, other=0).to(tl.int64)[:, None]
        pointers = tokens.x + token_ids * tokens.stride_xn + inputs[None, :]
        x = tl.load(pointers, mask=row_mask & (inputs < k.D)[None, :], other=0.0)
        pointers = grads.x + token_ids * grads.stride_xn + outputs[None, :]
        grad = tl.load(pointers, mask=row_mask & (outputs < k.E)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), grad, acc, input_precision=k.PRECISION)
    part = partials + tile.to(tl.int64) * k.D * k.E + inputs[:, None] * k.E + outputs[None, :]
    tl.store(part, acc, mask=(inputs < k.D)[:, None] & (outputs < k.E)[None, :])


@triton.jit
def sum_partials_kernel(partials, dweight, ends, tile_size, SIZE: tl.constexpr, NUM_OPTIONS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """partials (tiles, SIZE) float32 -> dweight (n_P, SIZE): the tiles of each projector, added in their order."""
    projector = tl.program_id(1)
    u, begins, stops = lists(ends, NUM_OPTIONS)
    count = tl.cdiv(stops - begins, tile_size)
    first = tl.sum(tl.where(u < projector, count, 0))
    last = first + tl.sum(tl.where(u == projector, count, 0))
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = partials + first.to(tl.int64) * SIZE + entries
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(first, last):
        acc += tl.load(part, mask=entries < SIZE, other=0.0)
        part += SIZE
    out = dweight + projector.to(tl.int64) * SIZE + entries
    tl.store(out, acc.to(dweight.dtype.element_ty), mask=entries < SIZE)


PROGRAMS = 256
"""Programs that the weight gradient aims at: two for each of 128 multiprocessors.  Not the true number of the device,
so that the order of summation, and with it the last bit, is the same on all."""

SHORTEST = 256
"""The fewest tokens of its tiles, as long as the product of one tile costs more than writing and adding its part."""


def project_weight_gradient(x: Tensor, grad: Tensor, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (B, N, d), grad (B, N, e) -> dweight (n_P, d, e) of ``dtype``; zero for a projector without a token.

    Each tile has a partial sum, and together they take no more than max(PROGRAMS BLOCK_D^2, d e) + n_P d e numbers,
    however the tokens are spread.
    """
    x_rows, grad_rows, num_options = token_rows(x), token_rows(grad), plan.ends.shape[0]
    (length, d), e = x_rows.shape, grad.shape[2]
    dweight = x.new_empty((num_options, d, e), dtype=dtype)
    if not length:
        return dweight.zero_()
    config = pick("projection_weight", x.dtype, max(d, e))
    columns = ceil_div(d, config.block_d) * ceil_div(e, config.block_d)
    tile_size = max(SHORTEST, ceil_div(length, max(1, PROGRAMS // columns)))
    bound = min(length, length // tile_size + num_options)
    partials = x.new_empty((bound, d, e), dtype=torch.float32)
    launch(
        weight_gradient_kernel, (bound * columns,), config,
        tokens=rows_argument(x_rows), grads=rows_argument(grad_rows), partials=partials, order=plan.order,
        ends=plan.ends, tile_size=tile_size, k=blocks(config, d, e, num_options, numerics(x.dtype)["PRECISION"]),
    )  # fmt: skip
    config = pick("projection_sum", partials.dtype)
    launch(
        sum_partials_kernel, (ceil_div(d * e, config.block_d), num_options), config,
        partials=partials, dweight=dweight, ends=plan.ends, tile_size=tile_size, SIZE=d * e, NUM_OPTIONS=num_options,
        BLOCK=config.block_d,
    )  # fmt: skip
    return dweight
