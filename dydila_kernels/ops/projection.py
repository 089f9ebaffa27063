"""Eqs. 1-2: each token times the projector that its router chose.

    u_t = argmax(x_t R)                              route      R (d, n_P), ties to the lowest index
    y_t = x_t W[u_t]                                 project    W (n_P, d, e)
    dx_t = dy_t W[u_t]^T                             project_input_gradient
    dW[u] = sum over t with u_t = u of x_t^T dy_t    project_weight_gradient

A plan lists the tokens of each projector, in their order.  The products then run group by group over tiles of that
list: rows are gathered as they are read and scattered as they are written, so the work is that of one projection
whatever n_P is.

How the tokens of a projector fill tiles is known to the GPU only.  The host launches a bound, min(T, T // rows + n_P)
for T tokens: each of the at most n_P projectors leaves one tile partly filled, and no tile is empty.  Each program
finds its tile from the n_P list ends (``find_tile``), and the programs of the bound that find none return at once.

In this file T = B N, and a tensor of tokens is (T, channels) with any row stride; row addresses are int64.  Strides
depend on the widths of the model, not on B or N: as constants they tell the compiler how far loads are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops.configs import pick
from dydila_kernels.ops.tiles import check_rows, first_largest, launch, numerics, padded, router_dot


def token_rows(x: Tensor) -> Tensor:
    """(B, N, c) -> (T, c) with channels side by side: a view where the strides allow it, else a copy."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


# Eq. 1 ----------------------------------------------------------------------------------------------------------------


@triton.jit
def route_kernel(X, ROUTER1, ROUTER2, INDEX, length, X_ROW: tl.constexpr, D: tl.constexpr, CHOICES: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUTER: tl.constexpr):  # fmt: skip
    """One program decides for ROWS tokens.

    X (T, D) with row stride X_ROW; ROUTER1 (D, CHOICES), ROUTER2 the same or None; INDEX (routers, T) int8.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < length
    rows = rows.to(tl.int64)
    choices = tl.arange(0, padded(CHOICES))
    logits1 = tl.zeros((ROWS, padded(CHOICES)), tl.float32)
    logits2 = tl.zeros((ROWS, padded(CHOICES)), tl.float32)
    for start in tl.range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < D
        x = tl.load(X + rows[:, None] * X_ROW + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        entries = columns[:, None] * CHOICES + choices[None, :]
        real = inside[:, None] & (choices < CHOICES)[None, :]
        logits1 = router_dot(x, tl.load(ROUTER1 + entries, mask=real, other=0.0), logits1, ROUTER)
        if ROUTER2 is not None:
            logits2 = router_dot(x, tl.load(ROUTER2 + entries, mask=real, other=0.0), logits2, ROUTER)
    tl.store(INDEX + rows, first_largest(logits1, CHOICES).to(tl.int8), mask=live)
    if ROUTER2 is not None:
        tl.store(INDEX + length + rows, first_largest(logits2, CHOICES).to(tl.int8), mask=live)


def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1 for one or two routers (d, n_P) in one pass over x (B, N, d): (routers, B, N) int8."""
    rows, (d, choices) = token_rows(x), routers[0].shape
    check_rows(len(rows))
    first, second = routers[0].contiguous(), routers[1].contiguous() if len(routers) == 2 else None
    index = x.new_empty((len(routers), *x.shape[:2]), dtype=torch.int8)
    config = pick("route", x.dtype, choices)
    launch(
        route_kernel, (triton.cdiv(len(rows), config.rows),), config,
        X=rows, ROUTER1=first, ROUTER2=second, INDEX=index, length=len(rows), X_ROW=rows.stride(0), D=d,
        CHOICES=choices, ROWS=config.rows, COLUMNS=config.columns, ROUTER=numerics(x.dtype)["ROUTER"],
    )  # fmt: skip
    return index


# The plan: a stable counting sort -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which tokens go to which projector.

    order: (T,) int32, the tokens of projector 0, then those of 1, and so on, each list in ascending order.
    ends: (n_P,) int32, where in ``order`` the list of each projector ends.
    """

    order: Tensor
    ends: Tensor


@triton.jit
def count_kernel(INDEX, COUNTS, length, CHOICES: tl.constexpr, ROWS: tl.constexpr):
    """INDEX (T,) integers -> COUNTS (CHOICES, blocks) int32: how often each occurs in each block of ROWS tokens."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    index = tl.load(INDEX + rows, mask=rows < length, other=-1)
    for u in tl.range(0, CHOICES):
        tl.store(COUNTS + u * blocks + block, tl.sum((index == u).to(tl.int32)))


@triton.jit
def rank_kernel(INDEX, UPTO, ORDER, ENDS, length, CHOICES: tl.constexpr, ROWS: tl.constexpr):
    """Writes each token of a block to its place in the list of its projector.

    INDEX (T,) integers; UPTO (CHOICES, blocks) int32, the running sum of the counts; ORDER (T,),
    ENDS (CHOICES,) int32.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    index = tl.load(INDEX + rows, mask=rows < length, other=-1)
    for u in tl.range(0, CHOICES):
        hit = (index == u).to(tl.int32)
        end = tl.load(UPTO + u * blocks + block)
        place = end - tl.sum(hit) + tl.cumsum(hit, 0) - 1
        tl.store(ORDER + place, rows, mask=hit != 0)
        tl.store(ENDS + u, end, mask=block == blocks - 1)


def plan(index: Tensor, choices: int) -> Plan:
    """The plan for index (B, N) with values in [0, choices), made on its device without waiting for it."""
    index = index.flatten()
    length = len(index)
    order = index.new_empty(length, dtype=torch.int32)
    if not length:
        return Plan(order, index.new_zeros(choices, dtype=torch.int32))
    ends = index.new_empty(choices, dtype=torch.int32)
    config = pick("plan", index.dtype)
    blocks = triton.cdiv(length, config.rows)
    counts = index.new_empty(choices * blocks, dtype=torch.int32)
    launch(
        count_kernel, (blocks,), config,
        INDEX=index, COUNTS=counts, length=length, CHOICES=choices, ROWS=config.rows,
    )  # fmt: skip
    launch(
        rank_kernel, (blocks,), config,
        INDEX=index, UPTO=counts.cumsum(0, dtype=torch.int32), ORDER=order, ENDS=ends, length=length, CHOICES=choices,
        ROWS=config.rows,
    )  # fmt: skip
    return Plan(order, ends)


@triton.jit
def lists(ENDS, CHOICES: tl.constexpr):
    """The projectors, and where the list of each begins and ends; those that pad a power of two have empty lists."""
    u = tl.arange(0, padded(CHOICES))
    begins = tl.load(ENDS + u - 1, mask=(u > 0) & (u < CHOICES), other=0)
    return u, begins, tl.load(ENDS + u, mask=u < CHOICES, other=0)


@triton.jit
def find_tile(ENDS, tile, rows, CHOICES: tl.constexpr):
    """The projector of a tile, and where in ORDER it starts and ends; start >= end where there is no such tile.

    A tile is ``rows`` tokens of one projector, or what is left of them; tiles are numbered along ORDER.
    """
    u, begins, ends = lists(ENDS, CHOICES)
    upto = tl.cumsum(tl.cdiv(ends - begins, rows), 0)
    projector = tl.sum((upto <= tile).to(tl.int32))
    first = tl.max(tl.where(u < projector, upto, 0))
    start = tl.sum(tl.where(u == projector, begins, 0)) + (tile - first) * rows
    end = tl.minimum(start + rows, tl.sum(tl.where(u == projector, ends, 0)))
    return projector, start, end


# Eq. 2 and its gradient with respect to x -----------------------------------------------------------------------------


@triton.jit
def project_kernel(X, WEIGHT, Y, ORDER, ENDS, steps, X_ROW: tl.constexpr, WEIGHT_CHOICE: tl.constexpr,
                   WEIGHT_IN: tl.constexpr, WEIGHT_OUT: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                   CHOICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One program: ROWS tokens of one projector by COLUMNS channels of Y[order] = X[order] WEIGHT[u].

    X (T, D) with row stride X_ROW; WEIGHT (CHOICES, D, E) with strides WEIGHT_CHOICE, WEIGHT_IN, WEIGHT_OUT;
    Y (T, E) contiguous; ORDER (T,), ENDS (CHOICES,) int32.  ``steps`` = ceil(D / DEPTH) is a run-time value, lest
    ptxas unroll the loop: on sm_90 that takes 147 registers instead of 119, and halves the programs that fit.

    The column blocks of a tile are neighbours in the grid, so its tokens come from memory once; the weight of a
    projector, which neighbouring tiles share, stays in the L2 cache.
    """
    column_blocks: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    u, start, end = find_tile(ENDS, tl.program_id(0) // column_blocks, ROWS, CHOICES)
    if start >= end:
        return
    places = start + tl.arange(0, ROWS)
    live = places < end
    rows = tl.load(ORDER + places, mask=live, other=0).to(tl.int64)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    outputs = columns < E
    x_rows = X + rows[:, None] * X_ROW
    weight_columns = WEIGHT + u.to(tl.int64) * WEIGHT_CHOICE + columns.to(tl.int64)[None, :] * WEIGHT_OUT
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, steps):
        inputs = step * DEPTH + tl.arange(0, DEPTH)
        inside = inputs < D
        x = tl.load(x_rows + inputs[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        weight = weight_columns + inputs.to(tl.int64)[:, None] * WEIGHT_IN
        w = tl.load(weight, mask=inside[:, None] & outputs[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    y = Y + rows[:, None] * E + columns[None, :]
    tl.store(y, acc.to(Y.dtype.element_ty), mask=live[:, None] & outputs[None, :])


def project(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e) -> (B, N, e) contiguous, in the dtype of x."""
    return grouped_product(x, weight if weight.stride(2) == 1 else weight.contiguous(), plan)


def project_input_gradient(grad: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """grad (B, N, e), weight (n_P, d, e) -> dx (B, N, d): the same product with every projector transposed."""
    return grouped_product(grad, (weight if weight.stride(2) == 1 else weight.contiguous()).transpose(1, 2), plan)


def grouped_product(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    rows, (choices, d, e) = token_rows(x), weight.shape
    y = x.new_empty((*x.shape[:2], e))
    config = pick("projection", x.dtype, e)
    bound = min(len(rows), len(rows) // config.rows + choices)
    launch(
        project_kernel, (bound * triton.cdiv(e, config.columns),), config,
        X=rows, WEIGHT=weight, Y=y, ORDER=plan.order, ENDS=plan.ends, steps=triton.cdiv(d, config.depth),
        X_ROW=rows.stride(0), WEIGHT_CHOICE=weight.stride(0), WEIGHT_IN=weight.stride(1), WEIGHT_OUT=weight.stride(2),
        D=d, E=e, CHOICES=choices, ROWS=config.rows, COLUMNS=config.columns, DEPTH=config.depth,
        PRECISION=numerics(x.dtype)["PRECISION"],
    )  # fmt: skip
    return y


# The gradient with respect to the weight ------------------------------------------------------------------------------


@triton.jit
def weight_gradient_kernel(X, GRAD, PARTS, ORDER, ENDS, tile_rows, X_ROW: tl.constexpr, GRAD_ROW: tl.constexpr,
                           D: tl.constexpr, E: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
                           COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One program: COLUMNS x COLUMNS entries of PARTS[tile], the sum of x^T dy over the tokens of a tile.

    X (T, D), GRAD (T, E) with row strides X_ROW, GRAD_ROW; PARTS (tiles, D, E) float32; ORDER (T,), ENDS (CHOICES,)
    int32.  Tiles are long here: ``tile_rows`` tokens, taken ROWS at a time.
    """
    d_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    e_blocks: tl.constexpr = (E + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // (d_blocks * e_blocks)
    block = tl.program_id(0) % (d_blocks * e_blocks)
    _, start, end = find_tile(ENDS, tile, tile_rows, CHOICES)
    if start >= end:
        return
    inputs = block // e_blocks * COLUMNS + tl.arange(0, COLUMNS)
    outputs = block % e_blocks * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for first in tl.range(start, end, ROWS):
        places = first + tl.arange(0, ROWS)
        live = (places < end)[:, None]
        rows = tl.load(ORDER + places, mask=places < end, other=0).to(tl.int64)[:, None]
        x = tl.load(X + rows * X_ROW + inputs[None, :], mask=live & (inputs < D)[None, :], other=0.0)
        grad = tl.load(GRAD + rows * GRAD_ROW + outputs[None, :], mask=live & (outputs < E)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), grad, acc, input_precision=PRECISION)
    part = PARTS + tile.to(tl.int64) * D * E + inputs[:, None] * E + outputs[None, :]
    tl.store(part, acc, mask=(inputs < D)[:, None] & (outputs < E)[None, :])


@triton.jit
def sum_parts_kernel(PARTS, DWEIGHT, ENDS, tile_rows, SIZE: tl.constexpr, CHOICES: tl.constexpr,
                     COLUMNS: tl.constexpr):  # fmt: skip
    """PARTS (tiles, SIZE) float32 -> DWEIGHT (CHOICES, SIZE): the tiles of each projector, added in their order."""
    projector = tl.program_id(1)
    u, begins, ends = lists(ENDS, CHOICES)
    count = tl.cdiv(ends - begins, tile_rows)
    first = tl.sum(tl.where(u < projector, count, 0))
    last = first + tl.sum(tl.where(u == projector, count, 0))
    entries = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = PARTS + first.to(tl.int64) * SIZE + entries
    acc = tl.zeros((COLUMNS,), tl.float32)
    for _ in tl.range(first, last):
        acc += tl.load(part, mask=entries < SIZE, other=0.0)
        part += SIZE
    dweight = DWEIGHT + projector.to(tl.int64) * SIZE + entries
    tl.store(dweight, acc.to(DWEIGHT.dtype.element_ty), mask=entries < SIZE)


PROGRAMS = 256
"""Programs that the weight gradient aims at: two for each of 128 multiprocessors.  Not the true number of the device,
so that the order of summation, and with it the last bit, is the same on all."""

SHORTEST = 256
"""The fewest tokens of its tiles, as long as the product of one tile costs more than writing and adding its part."""


def project_weight_gradient(x: Tensor, grad: Tensor, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (B, N, d), grad (B, N, e) -> dweight (n_P, d, e) of ``dtype``; zero for a projector without a token.

    Each tile has a part of its own, and together they take no more than max(PROGRAMS COLUMNS^2, d e) + n_P d e numbers,
    however the tokens are spread.
    """
    x_rows, grad_rows, choices = token_rows(x), token_rows(grad), len(plan.ends)
    (length, d), e = x_rows.shape, grad.shape[2]
    dweight = x.new_empty((choices, d, e), dtype=dtype)
    if not length:
        return dweight.zero_()
    config = pick("projection_weight", x.dtype, max(d, e))
    blocks = triton.cdiv(d, config.columns) * triton.cdiv(e, config.columns)
    tile_rows = max(SHORTEST, triton.cdiv(length, max(1, PROGRAMS // blocks)))
    bound = min(length, length // tile_rows + choices)
    parts = x.new_empty((bound, d, e), dtype=torch.float32)
    launch(
        weight_gradient_kernel, (bound * blocks,), config,
        X=x_rows, GRAD=grad_rows, PARTS=parts, ORDER=plan.order, ENDS=plan.ends, tile_rows=tile_rows,
        X_ROW=x_rows.stride(0), GRAD_ROW=grad_rows.stride(0), D=d, E=e, CHOICES=choices, ROWS=config.rows,
        COLUMNS=config.columns, PRECISION=numerics(x.dtype)["PRECISION"],
    )  # fmt: skip
    config = pick("projection_sum", parts.dtype)
    launch(
        sum_parts_kernel, (triton.cdiv(d * e, config.columns), choices), config,
        PARTS=parts, DWEIGHT=dweight, ENDS=plan.ends, tile_rows=tile_rows, SIZE=d * e, CHOICES=choices,
        COLUMNS=config.columns,
    )  # fmt: skip
    return dweight
