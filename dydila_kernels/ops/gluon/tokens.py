"""Eqs. 5-8 with whole rows in a warp: what :mod:`dydila_kernels.ops.tokens` does, with the same results.

Three walks over the rows: the first routes and finds the largest entry, the second makes powers and measures, the third,
where Zh is wanted, makes it.  The second walk over Z and the first over Z' are one loop, so that one waits for special
functions while the other waits for memory.

The routers come prepared (:class:`PreparedRouters`), in the order of the operands of tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from dydila_kernels.ops import configs
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gluon.rows import (
    STEP,
    TINY,
    first_largest,
    fold,
    larger,
    load,
    measured,
    operand,
    place_of,
    pointers,
    raised,
    result,
    rows_there,
    shift_of,
)
from dydila_kernels.ops.tiles import launch, padded


class PreparedRouters(NamedTuple):
    """kernel (2, parts, n_F, d), of Z and Z', in the dtype of the tokens; differential (2, 2, n_D, d) float16.

    Each is the sum of its parts, the smallest first, times a power of two.
    """

    kernel: Any
    differential: Any


@triton.jit
def prepare_kernel(router, out, COUNT: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """out[i] (PARTS, N, D) = router[i] (D, N), split, for i < COUNT; one program for BLOCK rows.

    Times a power of two that makes the largest entry of all of them at most 2^13, in float16.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, padded(N))
    scale = tl.full((), 1.0, tl.float32)
    if out.dtype.element_ty == tl.float16:
        largest = tl.zeros((BLOCK, padded(N)), tl.float32)
        for c in range(0, COUNT * D, BLOCK):
            mask = (c + rows < COUNT * D)[:, None] & (columns < N)[None, :]
            x = tl.load(router + (c + rows)[:, None] * N + columns[None, :], mask=mask, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        bits = tl.max(largest).to(tl.int32, bitcast=True) >> 23
        scale = (tl.minimum(tl.maximum(267 - bits, 1), 254) << 23).to(tl.float32, bitcast=True)
    c = tl.program_id(0) * BLOCK + rows
    i, c = c // D, c % D
    mask = (i < COUNT)[:, None] & (columns < N)[None, :]
    x = tl.load(router + (tl.program_id(0) * BLOCK + rows)[:, None] * N + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32) * scale
    for part in tl.static_range(PARTS):
        y = x.to(out.dtype.element_ty)
        x -= y.to(tl.float32)
        at = out + ((i * PARTS + PARTS - 1 - part)[:, None] * N + columns[None, :]) * D + c[:, None]
        tl.store(at, y, mask=mask)


class Logits(NamedTuple):
    """Of the first walk over a branch: its logits (R, n) and the largest entries (R, STEP) so far."""

    logits: Any
    most: Any


@gluon.jit
def router_pointers(router, D: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr):
    """Pointers (STEP, n padded) to the first channels of a part; columns that are none repeat the last."""
    layout: gl.constexpr = operand(WARPS, 1)
    channels = gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
    options = gl.minimum(gl.arange(0, padded(N), layout=gl.SliceLayout(0, layout)), N - 1)
    return router + (options[None, :] * D + channels[:, None])


@gluon.jit
def route(z, router, logits, D: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr):
    """logits + z times the parts of a router, whose pointers are given for the channels of z."""
    for part in gl.static_range(PARTS):
        logits = mma_v2(z, gl.load(router + part * N * D), logits)
    return logits


@gluon.jit
def chosen(logits, most, table, active, k, WARPS: gl.constexpr, MASKED: gl.constexpr):
    """Of the first walk: the index, gamma and m (R,), in the layout of results."""
    rows: gl.constexpr = gl.SliceLayout(1, result(WARPS))
    index = first_largest(logits, k.N_F)
    if MASKED:
        index = gl.where(active, index, 0)
    gamma = gl.load(table + index).to(gl.float32)
    m = gl.convert_layout(gl.max(most, 1).to(gl.float32), rows)
    return index, gamma, m


@gluon.jit
def inverse_of(m):
    """1/m (R,), and 0 of less than the smallest normal number."""
    return gl.where(m >= TINY, 1.0 / gl.where(m >= TINY, m, 1.0), 0.0)


@gluon.jit
def renorm_of(m, squares, powers):
    """m |s| / |p| (R,) and |p|^2, both 0 for a row without positive entry; a maximum passes over NaN, a row shall not."""
    nonzero = (m >= TINY) | (powers != powers)
    ratio = squares / gl.where(nonzero, powers, 1.0)
    return gl.where(nonzero, m * gl.sqrt(ratio), 0.0), gl.where(nonzero, powers, 0.0)


@gluon.jit
def in_rows(x, WARPS: gl.constexpr):
    """(R,) from the layout of results to (R, 1) in that of left operands."""
    return gl.convert_layout(x, gl.SliceLayout(1, operand(WARPS, 0)))[:, None]


@gluon.jit
def summed(x, WARPS: gl.constexpr):
    """(R, 4) of :func:`fold` -> (R,), in the layout of results."""
    return gl.convert_layout(gl.sum(x, 1), gl.SliceLayout(1, result(WARPS)))


class Measured(NamedTuple):
    """Of the rows (R,) of a branch: gamma, 1/m, renorm."""

    gamma: Any
    inv_max: Any
    renorm: Any


@gluon.jit
def walk(tokens, tables, routers, stats, place, there, active, k, WARPS: gl.constexpr, MASKED: gl.constexpr,
         POSITIVE: gl.constexpr):  # fmt: skip
    """Routes and measures a tile and saves what is decided; returns :class:`Measured` of both branches and lambda (R,).

    there, active (R,), in the layout of results.
    """
    R: gl.constexpr = 16 * WARPS
    PARTS: gl.constexpr = 3 if tokens.z.x.dtype.element_ty == gl.bfloat16 else 2
    left: gl.constexpr = operand(WARPS, 0)
    active_left = gl.convert_layout(active, gl.SliceLayout(1, left))
    z = pointers(tokens.z, place, R, left, STEP)
    y = pointers(tokens.redundant, place, R, left, STEP)
    kernel = router_pointers(routers.kernel, k.D, k.N_F, WARPS)
    differential = router_pointers(routers.differential, k.D, k.N_D, WARPS)

    logits = gl.zeros([R, padded(k.N_F)], gl.float32, result(WARPS))
    most = gl.zeros([R, STEP], tokens.z.x.dtype.element_ty, left)
    for c in range(0, k.D, STEP):
        block = load(z + c, active_left, MASKED)
        logits = route(block, kernel + c, logits, k.D, k.N_F, PARTS)
        most = larger(most, block)
    index, gamma, m = chosen(logits, most, tables.gamma, active, k, WARPS, MASKED)
    inv_max = inverse_of(m)
    gamma_left, inv_left = in_rows(gamma, WARPS), in_rows(inv_max, WARPS)

    logits = gl.zeros([R, padded(k.N_F)], gl.float32, result(WARPS))
    most = gl.zeros([R, STEP], tokens.z.x.dtype.element_ty, left)
    dots = gl.zeros([R, padded(k.N_D)], gl.float32, result(WARPS))
    squares = fold(gl.zeros([R, STEP], gl.float32, left))
    powers = fold(gl.zeros([R, STEP], gl.float32, left))
    for c in range(0, k.D, STEP):
        block = load(z + c, active_left, MASKED)
        other = load(y + c, active_left, MASKED)
        logits = route(other, kernel + PARTS * k.N_F * k.D + c, logits, k.D, k.N_F, PARTS)
        most = larger(most, other)
        s, p, half = measured(block, inv_left, gamma_left, POSITIVE)
        squares += fold(s * s)
        powers += fold(p * p)
        dots = route(half, differential + c, dots, k.D, k.N_D, 2)
    other_index, other_gamma, other_m = chosen(logits, most, tables.gamma, active, k, WARPS, MASKED)
    other_inv = inverse_of(other_m)
    renorm, norm = renorm_of(m, summed(squares, WARPS), summed(powers, WARPS))
    dots *= renorm[:, None]

    gamma_left, inv_left = in_rows(other_gamma, WARPS), in_rows(other_inv, WARPS)
    other_dots = gl.zeros([R, padded(k.N_D)], gl.float32, result(WARPS))
    squares = fold(gl.zeros([R, STEP], gl.float32, left))
    powers = fold(gl.zeros([R, STEP], gl.float32, left))
    for c in range(0, k.D, STEP):
        other = load(y + c, active_left, MASKED)
        s, p, half = measured(other, inv_left, gamma_left, POSITIVE)
        squares += fold(s * s)
        powers += fold(p * p)
        other_dots = route(half, differential + 2 * k.N_D * k.D + c, other_dots, k.D, k.N_D, 2)
    other_renorm, other_norm = renorm_of(other_m, summed(squares, WARPS), summed(powers, WARPS))
    choice = first_largest(dots + other_dots * other_renorm[:, None], k.N_D)
    lam = gl.load(tables.lam + choice).to(gl.float32)

    n = place.token + gl.arange(0, R, layout=gl.SliceLayout(1, result(WARPS)))
    gl.store(stats.index + n, index.to(gl.int8), mask=there)
    gl.store(stats.index + place.T + n, other_index.to(gl.int8), mask=there)
    gl.store(stats.lam_index + n, choice.to(gl.int8), mask=there)
    gl.store(stats.norms + n, inv_max, mask=there)
    gl.store(stats.norms + place.T + n, renorm, mask=there)
    gl.store(stats.norms + 2 * place.T + n, norm, mask=there)
    gl.store(stats.norms + 3 * place.T + n, other_inv, mask=there)
    gl.store(stats.norms + 4 * place.T + n, other_renorm, mask=there)
    gl.store(stats.norms + 5 * place.T + n, other_norm, mask=there)
    return Measured(gamma, inv_max, renorm), Measured(other_gamma, other_inv, other_renorm), lam


@gluon.jit
def is_positive(table, N: gl.constexpr):
    """Whether all of the entries (N,) of a table are."""
    entries = gl.minimum(gl.arange(0, padded(N), layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), N - 1)
    return gl.min(gl.load(table + entries).to(gl.float32), 0) > 0.0


@gluon.jit
def write(out, tokens, first, second, lam, scale, place, active, k, WARPS: gl.constexpr, MASKED: gl.constexpr,
          POSITIVE: gl.constexpr):  # fmt: skip
    """The third walk: Zh of a tile to out (T, d), times scale; first, second: :class:`Measured`."""
    R: gl.constexpr = 16 * WARPS
    left: gl.constexpr = operand(WARPS, 0)
    rows: gl.constexpr = gl.SliceLayout(1, left)
    active_left = gl.convert_layout(active, rows)
    z = pointers(tokens.z, place, R, left, STEP)
    y = pointers(tokens.redundant, place, R, left, STEP)
    at = (place.token + gl.arange(0, R, layout=rows))[:, None] * k.D + gl.arange(0, STEP, layout=gl.SliceLayout(0, left))[None, :]
    gamma, shift = in_rows(first.gamma, WARPS), in_rows(shift_of(first.inv_max, first.gamma, POSITIVE), WARPS)
    weight = in_rows(first.renorm * scale, WARPS)
    other_gamma, other_shift = in_rows(second.gamma, WARPS), in_rows(shift_of(second.inv_max, second.gamma, POSITIVE), WARPS)
    other_weight = in_rows(-lam * second.renorm * scale, WARPS)
    for c in range(0, k.D, STEP):
        p = raised(load(z + c, active_left, MASKED), gamma, shift, POSITIVE) * weight
        p += raised(load(y + c, active_left, MASKED), other_gamma, other_shift, POSITIVE) * other_weight
        if MASKED:
            gl.store(out + at + c, p.to(out.dtype.element_ty), mask=(place.first + gl.arange(0, R, layout=rows) < place.end)[:, None])
        else:
            gl.store(out + at + c, p.to(out.dtype.element_ty))


@gluon.jit
def scale_of(scaling, segment):
    """What multiplies Zh, see :class:`Scaling`."""
    scale = scaling.fp16_prescale
    if scaling.length_scale is not None:
        scale *= gl.load(scaling.length_scale + segment)
    return scale


@gluon.jit
def tokens_tile(tokens, tables, routers, stats, scaling, out, place, k, WARPS: gl.constexpr, MASKED: gl.constexpr,
                POSITIVE: gl.constexpr):  # fmt: skip
    there, active = rows_there(tokens.mask, place, 16 * WARPS, gl.SliceLayout(1, result(WARPS)))
    first, second, lam = walk(tokens, tables, routers, stats, place, there, active, k, WARPS, MASKED, POSITIVE)
    if out is not None:
        scale = scale_of(scaling, place.segment)
        write(out, tokens, first, second, lam, scale, place, active, k, WARPS, MASKED, POSITIVE)


@gluon.jit
def gluon_tokens_kernel(tokens, segments, tables, routers, stats, scaling, out, k: gl.constexpr,
                        MASKED: gl.constexpr):  # fmt: skip
    """One program for a tile of 16 tokens a warp: routes and measures them, then writes Zh to out (T, d), or None."""
    WARPS: gl.constexpr = gl.num_warps()
    place = place_of(segments, gl.program_id(0), 16 * WARPS)
    if is_positive(tables.gamma, k.N_F):
        tokens_tile(tokens, tables, routers, stats, scaling, out, place, k, WARPS, MASKED, True)
    else:
        tokens_tile(tokens, tables, routers, stats, scaling, out, place, k, WARPS, MASKED, False)


def prepared(context: LaunchContext, side: QKOperand) -> PreparedRouters:
    """The routers of a side, in one launch each for those of Eq. 6 and of Eq. 7."""
    first, second = side.routers
    assert second is not None and side.differential_router is not None
    d, parts = context.dim, 3 if context.dtype == torch.bfloat16 else 2
    n_f, n_d = first.shape[-1], side.differential_router.shape[-1]
    kernel = torch.empty(2, parts, n_f, d, device=context.device, dtype=context.dtype)
    differential = torch.empty(2, 2, n_d, d, device=context.device, dtype=torch.float16)
    config = configs.pick("prepare", context.dtype)
    for router, out, count in ((first, kernel[0], 1), (second, kernel[1], 1), (side.differential_router, differential, 2)):
        launch(prepare_kernel, (triton.cdiv(count * d, config.block_n),), config, router=router, out=out, COUNT=count,
               D=d, N=router.shape[-1], PARTS=out.shape[-3], BLOCK=config.block_n)  # fmt: skip
    return PreparedRouters(kernel, differential)


def is_ragged(context: LaunchContext, rows: int) -> bool:
    """Whether a tile may have rows that do not count."""
    return context.mask is not None or context.bounds is not None or context.length % rows != 0


def tokens(context: LaunchContext, side: QKOperand, out: Tensor | None) -> None:
    """Routes and measures one side, and writes Zh to ``out`` (B, N, d) contiguous, where given."""
    config = configs.pick("gluon_tokens", context.dtype, context.dim)
    launch(
        gluon_tokens_kernel, (context.programs(config.block_n),), config, tokens=context.tokens(side, masked=True),
        segments=context.tiles(config.block_n), **context.measured(side), routers=prepared(context, side),
        scaling=context.scaling(side), out=out, k=context.constants(config),
        MASKED=is_ragged(context, config.block_n),
    )  # fmt: skip
