"""Eq. 8, the readout by the queries, with whole rows in a warp: O_h = output_scale Qh_h S_h.

The walks of :mod:`dydila_kernels.ops.gluon.tokens`, of which the third multiplies what it makes of a head.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from dydila_kernels.ops import configs
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gluon.rows import STEP, load, operand, place_of, pointers, raised, result, rows_there, shift_of
from dydila_kernels.ops.gluon.tokens import in_rows, is_positive, is_ragged, prepared, scale_of, walk
from dydila_kernels.ops.tiles import launch


@gluon.jit
def write_readout(out, matrix, output_scale, tokens, first, second, lam, scale, place, there, active, k,
                  WARPS: gl.constexpr, MASKED: gl.constexpr, POSITIVE: gl.constexpr):  # fmt: skip
    """The third walk: O of a tile to out (T, d); matrix (H, e, e), transposed; first, second: :class:`Measured`."""
    R: gl.constexpr = 16 * WARPS
    E: gl.constexpr = k.D // k.H
    left: gl.constexpr = operand(WARPS, 0)
    right: gl.constexpr = operand(WARPS, 1)
    rows: gl.constexpr = gl.SliceLayout(1, result(WARPS))
    active_left = gl.convert_layout(active, gl.SliceLayout(1, left))
    z = pointers(tokens.z, place, R, left, STEP)
    y = pointers(tokens.redundant, place, R, left, STEP)
    gamma, shift = in_rows(first.gamma, WARPS), in_rows(shift_of(first.inv_max, first.gamma, POSITIVE), WARPS)
    weight = in_rows(first.renorm * scale, WARPS)
    other_gamma = in_rows(second.gamma, WARPS)
    other_shift = in_rows(shift_of(second.inv_max, second.gamma, POSITIVE), WARPS)
    other_weight = in_rows(-lam * second.renorm * scale, WARPS)
    channels = gl.arange(0, STEP, layout=gl.SliceLayout(1, right))[:, None]
    across = gl.arange(0, E, layout=gl.SliceLayout(0, right))[None, :]
    block = matrix + place.segment * (k.D * E) + across * E + channels
    at = (place.token + gl.arange(0, R, layout=rows))[:, None] * k.D
    at += gl.arange(0, E, layout=gl.SliceLayout(0, result(WARPS)))[None, :]
    for c in range(0, k.D, STEP):
        p = raised(load(z + c, active_left, MASKED), gamma, shift, POSITIVE) * weight
        p += raised(load(y + c, active_left, MASKED), other_gamma, other_shift, POSITIVE) * other_weight
        o = gl.zeros([R, E], gl.float32, result(WARPS))
        o = mma_v2(p.to(matrix.dtype.element_ty), gl.load(block + c * E), o) * output_scale
        if MASKED:
            gl.store(out + at + c, o.to(out.dtype.element_ty), mask=there[:, None])
        else:
            gl.store(out + at + c, o.to(out.dtype.element_ty))


@gluon.jit
def readout_tile(tokens, tables, routers, stats, scaling, matrix, output_scale, out, place, k, WARPS: gl.constexpr,
                 MASKED: gl.constexpr, POSITIVE: gl.constexpr):  # fmt: skip
    there, active = rows_there(tokens.mask, place, 16 * WARPS, gl.SliceLayout(1, result(WARPS)))
    first, second, lam = walk(tokens, tables, routers, stats, place, there, active, k, WARPS, MASKED, POSITIVE)
    scale = scale_of(scaling, place.segment)
    write_readout(out, matrix, output_scale, tokens, first, second, lam, scale, place, there, active, k, WARPS, MASKED,
                  POSITIVE)  # fmt: skip


@gluon.jit
def gluon_readout_kernel(tokens, segments, tables, routers, stats, scaling, matrix, output_scale, out,
                         k: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """One program for a tile of 16 queries a warp, all heads.

    matrix (segments, H, e, e): the states, transposed, in the dtype of the tokens; out (T, d).
    """
    WARPS: gl.constexpr = gl.num_warps()
    place = place_of(segments, gl.program_id(0), 16 * WARPS)
    if is_positive(tables.gamma, k.N_F):
        readout_tile(tokens, tables, routers, stats, scaling, matrix, output_scale, out, place, k, WARPS, MASKED, True)
    else:
        readout_tile(tokens, tables, routers, stats, scaling, matrix, output_scale, out, place, k, WARPS, MASKED, False)


def readout(context: LaunchContext, side: QKOperand, state: Tensor, out: Tensor) -> None:
    """Routes and measures the queries and writes O (B, N, d) to ``out``; state (segments, H, e, e)."""
    config = configs.pick("gluon_readout", context.dtype, context.head_dim)
    launch(
        gluon_readout_kernel, (context.programs(config.block_n),), config, tokens=context.tokens(side, masked=True),
        segments=context.tiles(config.block_n), **context.measured(side), routers=prepared(context, side),
        scaling=context.scaling(side), matrix=state.transpose(-1, -2).contiguous(),
        output_scale=context.output_scale, out=out, k=context.constants(config),
        MASKED=is_ragged(context, config.block_n),
    )  # fmt: skip
