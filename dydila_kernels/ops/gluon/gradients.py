"""The backward pass of one side, as :mod:`dydila_kernels.ops.gradients` has it, with whole rows in a warp.

With X = dy for phi(Z) and, times -lambda, for phi(Z'), weight w (the row scale, and -lambda times it), s = ReLU(Z) / m,
q = s^(gamma - 1), p = q s, and per row the sum d = p . X,

    dZ = renorm/m gamma w q (X - p v) + w v m/renorm s       v = d / |p|^2
    dgamma = renorm w ln 2 sum p log2(s) (X - p v)           dlambda = -renorm' rowscale d'

dy = X_h M_h^T is made anew per head, 32 channels at a time, and leaves the tensor cores in the layout in which Z and Z'
are loaded and dZ and dZ' stored.  The matrix of the next head is on its way while one is worked on.  Queries know d from
:mod:`dydila_kernels.ops.gluon.dots` and walk over their rows once; keys find it in a walk of their own, in which the powers
serve for dV = Zh M, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Source
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gluon.chunks import (
    CHUNK,
    as_left,
    as_right,
    blocks_for,
    columns,
    copy_matrix,
    fold,
    from_result,
    lines,
    nothing,
    parts,
    place_of,
    pointers,
    product,
    raised,
    result,
    row,
    total,
)
from dydila_kernels.ops.gradients import TableGradients, table_partials
from dydila_kernels.ops.tiles import launch, padded

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def chosen_sum(values, index, OPTIONS: gl.constexpr, WARPS: gl.constexpr):
    """The sum of values (R,) over the rows that chose each entry of a table: (n padded,)."""
    layout: gl.constexpr = result(WARPS)
    option_ids = gl.arange(0, padded(OPTIONS), layout=gl.SliceLayout(0, layout))
    index = gl.convert_layout(index, gl.SliceLayout(1, layout))
    values = gl.convert_layout(values, gl.SliceLayout(1, layout))
    return gl.sum(gl.where(index[:, None] == option_ids[None, :], values[:, None], 0.0), 0)


@gluon.jit
def store_table(out, sums, OPTIONS: gl.constexpr, WARPS: gl.constexpr):
    """sums (n padded,) to the row of this program in out (programs, n)."""
    option_ids = gl.arange(0, padded(OPTIONS), layout=gl.SliceLayout(0, result(WARPS)))
    gl.store(out + gl.program_id(0).to(gl.int64) * OPTIONS + option_ids, sums, mask=option_ids < OPTIONS)


@gluon.jit
def load_lefts(x, active, E: gl.constexpr, WARPS: gl.constexpr):
    """The left operands (R, CHUNK) of the rows of a head, from the pointers x (R, CHUNK) on."""
    lefts = ()
    for c in gl.static_range(0, E, CHUNK):
        lefts = lefts + (as_left(gl.load(x + c, mask=active, other=0.0), WARPS),)
    return lefts


@gluon.jit
def add_products(sums, left, blocks, slot, c, WARPS: gl.constexpr):
    """sums (R, CHUNK), one for each chunk e of the columns, and left (R, CHUNK) times transposed block (e, c)."""
    found = ()
    for e in gl.static_range(len(sums)):
        right = blocks[e].index(slot * len(sums) + c).permute((1, 0)).load(columns(WARPS))
        found = found + (mma_v2(left, as_right(right, WARPS), sums[e]),)
    return found


@gluon.jit
def known_dots(dots, tokens, there, T, H: gl.constexpr, WARPS: gl.constexpr):
    """(R,): the sums over the heads of dots (H, T)."""
    layout: gl.constexpr = result(WARPS)
    heads = gl.arange(0, padded(H), layout=gl.SliceLayout(0, layout))
    tokens = gl.convert_layout(tokens, gl.SliceLayout(1, layout))
    there = gl.convert_layout(there, gl.SliceLayout(1, layout))
    mask = there[:, None] & (heads < H)[None, :]
    found = gl.load(dots + heads.to(gl.int64)[None, :] * T + tokens[:, None], mask=mask, other=0.0)
    return gl.convert_layout(gl.sum(found, 1), row(WARPS))


@gluon.jit
def next_matrix(blocks, step, matrix, E: gl.constexpr, H: gl.constexpr, WARPS: gl.constexpr,
                BY_ROWS: gl.constexpr = False):  # fmt: skip
    """That of the head after the one of a step, on its way."""
    copy_matrix(blocks, (step + 1) % 2, matrix + (step + 1) % H * (E * E), E, WARPS, BY_ROWS)


@gluon.jit
def gluon_gradients_kernel(tokens, segments, tables, stats, scaling, source, transposed, dots, grads, dv,
                          k: gl.constexpr):  # fmt: skip
    """One program for a tile of tokens of one side, all channels.

    transposed (segments, H, e, e): source.matrix with its last two dimensions swapped, and dv (T, d), or None for both;
    dots (2, H, T) float32, the sums of p . dy of each head, or None.  The other arguments as in
    :mod:`dydila_kernels.ops.arguments`.
    """
    R: gl.constexpr = k.BLOCK_N
    WARPS: gl.constexpr = R // 16
    E: gl.constexpr = k.D // k.H
    J: gl.constexpr = E // CHUNK
    H: gl.constexpr = k.H
    place = place_of(segments, R)
    inside = gl.arange(0, R, layout=row(WARPS))
    there = place.first + inside < place.end
    n = place.token + inside
    T = place.T

    # What is known of the rows
    index1 = gl.load(stats.index + n, mask=there, other=0).to(gl.int32)
    index2 = gl.load(stats.index + T + n, mask=there, other=0).to(gl.int32)
    index_d = gl.load(stats.lam_index + n, mask=there, other=0).to(gl.int32)
    inverse1 = gl.load(stats.norms + n, mask=there, other=0.0)
    inverse2 = gl.load(stats.norms + 3 * T + n, mask=there, other=0.0)
    renorm1 = gl.load(stats.norms + T + n, mask=there, other=0.0)
    renorm2 = gl.load(stats.norms + 4 * T + n, mask=there, other=0.0)
    gamma1 = gl.load(tables.gamma + index1).to(gl.float32)
    gamma2 = gl.load(tables.gamma + index2).to(gl.float32)
    neg_lam = -gl.load(tables.lam + index_d).to(gl.float32)
    scale = scaling.fp16_prescale
    if scaling.length_scale is not None:
        scale = scale * gl.load(scaling.length_scale + place.segment)
    active = ((renorm1 != 0.0) | (renorm2 != 0.0))[:, None]

    z = pointers(tokens.z.x, tokens.z.stride_xb, tokens.z.stride_xn, place.image, place.first, WARPS)
    y = pointers(tokens.redundant.x, tokens.redundant.stride_xb, tokens.redundant.stride_xn, place.image, place.first,
                 WARPS)  # fmt: skip
    x = pointers(source.x.x, source.x.stride_xb, source.x.stride_xn, place.image, place.first, WARPS)
    channels = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, lines(WARPS)))
    out = inside[:, None] * k.D + channels[None, :]
    dtype: gl.constexpr = tokens.z.x.dtype.element_ty

    blocks = blocks_for(dtype, E)
    matrix = source.matrix + place.segment * (k.D * E)
    copy_matrix(blocks, 0, matrix, E, WARPS)
    if dv is not None:
        turned = blocks_for(dtype, E)
        transposed += place.segment * (k.D * E)
        copy_matrix(turned, 0, transposed, E, WARPS, True)
    async_copy.commit_group()

    # d, and dV
    if dots is not None:
        d1 = known_dots(dots, n, there, T, H, WARPS)
        d2 = known_dots(dots + H * T, n, there, T, H, WARPS)
    else:
        d1 = nothing(WARPS)
        d2 = nothing(WARPS)
        shift1 = gamma1 * gl.log2(inverse1)
        shift2 = gamma2 * gl.log2(inverse2)
        weight1 = (renorm1 * scale)[:, None]
        weight2 = (renorm2 * neg_lam * scale)[:, None]
        for h in range(0, H):
            async_copy.wait_group(0)
            gl.barrier()
            next_matrix(blocks, h, matrix, E, H, WARPS)
            if dv is not None:
                next_matrix(turned, h, transposed, E, H, WARPS, True)
            async_copy.commit_group()
            lefts = load_lefts(x + h * E, active, E, WARPS)
            found = ()
            if dv is not None:
                for _ in gl.static_range(0, J):
                    found = found + (gl.zeros([R, CHUNK], gl.float32, result(WARPS)),)
            for c in range(0, J):
                z_c = gl.load(z + (h * E + c * CHUNK), mask=active, other=0.0)
                y_c = gl.load(y + (h * E + c * CHUNK), mask=active, other=0.0)
                dy = product(lefts, blocks, h % 2 * J + c, WARPS)
                p1 = raised(z_c, gamma1, shift1)
                p2 = raised(y_c, gamma2, shift2)
                d1 += fold(p1 * dy)
                d2 += fold(p2 * dy)
                if dv is not None:
                    hat = as_left((p1 * weight1 + p2 * weight2).to(dtype), WARPS)
                    found = add_products(found, hat, turned, h % 2, c, WARPS)
            if dv is not None:
                for c in gl.static_range(0, J):
                    at = dv + place.token * k.D + (h * E + c * CHUNK)
                    gl.store(at + out, (from_result(found[c], WARPS) * source.scale).to(dtype), mask=there[:, None])
        d1 = total(d1, WARPS)
        d2 = total(d2, WARPS)
    d1 *= source.scale
    d2 *= source.scale
    dlam = chosen_sum(-renorm2 * scale * d2, index_d, k.N_D, WARPS)
    store_table(grads.dlam, dlam, k.N_D, WARPS)

    # dZ, dZ' and dgamma
    power1 = gl.load(stats.norms + 2 * T + n, mask=there, other=0.0)
    power2 = gl.load(stats.norms + 5 * T + n, mask=there, other=0.0)
    ratio1 = renorm1 * inverse1
    ratio2 = renorm2 * inverse2
    v1 = gl.where(power1 > 0.0, d1 / gl.where(power1 > 0.0, power1, 1.0), 0.0)
    v2 = gl.where(power2 > 0.0, d2 / gl.where(power2 > 0.0, power2, 1.0), 0.0)
    linear1 = (scale * gl.where(ratio1 > 0.0, v1 / gl.where(ratio1 > 0.0, ratio1, 1.0), 0.0))[:, None]
    linear2 = (scale * neg_lam * gl.where(ratio2 > 0.0, v2 / gl.where(ratio2 > 0.0, ratio2, 1.0), 0.0))[:, None]
    # The scale of dy is left to the weights.
    v1 = (v1 / source.scale)[:, None]
    v2 = (v2 / source.scale)[:, None]
    steep1 = (ratio1 * gamma1 * (scale * source.scale))[:, None]
    steep2 = (ratio2 * gamma2 * neg_lam * (scale * source.scale))[:, None]
    e1 = nothing(WARPS)
    e2 = nothing(WARPS)
    dz = grads.dz + place.token * k.D
    dy_out = grads.dz_redundant + place.token * k.D
    walked: gl.constexpr = H if dots is None else 0
    for h in range(0, H):
        async_copy.wait_group(0)
        gl.barrier()
        next_matrix(blocks, walked + h, matrix, E, H, WARPS)
        async_copy.commit_group()
        lefts = load_lefts(x + h * E, active, E, WARPS)
        for c in range(0, J):
            at = h * E + c * CHUNK
            z_c = gl.load(z + at, mask=active, other=0.0)
            y_c = gl.load(y + at, mask=active, other=0.0)
            dy = product(lefts, blocks, (walked + h) % 2 * J + c, WARPS)
            s, log, q = parts(z_c, inverse1, gamma1 - 1.0)
            p = q * s
            rest = dy - p * v1
            gl.store(dz + at + out, (steep1 * (q * rest) + linear1 * s).to(dtype), mask=there[:, None])
            e1 += fold(p * log * rest)
            s, log, q = parts(y_c, inverse2, gamma2 - 1.0)
            p = q * s
            rest = dy - p * v2
            gl.store(dy_out + at + out, (steep2 * (q * rest) + linear2 * s).to(dtype), mask=there[:, None])
            e2 += fold(p * log * rest)
    async_copy.wait_group(0)
    e1 = total(e1, WARPS) * renorm1 * (scale * source.scale * LN2)
    e2 = total(e2, WARPS) * renorm2 * neg_lam * (scale * source.scale * LN2)
    dgamma = chosen_sum(e1, index1, k.N_F, WARPS) + chosen_sum(e2, index2, k.N_F, WARPS)
    store_table(grads.dgamma, dgamma, k.N_F, WARPS)


def gradients(
    context: LaunchContext, side: QKOperand, source: Source, dz: Tensor, dz_redundant: Tensor, *,
    dv: Tensor | None = None, dots: Tensor | None = None,
) -> TableGradients:  # fmt: skip
    """As :func:`dydila_kernels.ops.gradients.gradients`, which says when; ``dots`` (2, H, T) float32 as that kernel has."""
    stage = "gluon_gradients" if dots is None else "gluon_gradients_once"
    config = configs.pick(stage, context.dtype, context.head_dim)
    programs = context.programs(config.block_n)
    grads = table_partials(context, side, programs, dz, dz_redundant)
    launch(
        gluon_gradients_kernel, (programs,), config, tokens=context.tokens(side),
        segments=context.tiles(config.block_n), **context.measured(side), scaling=context.scaling(side), source=source,
        transposed=None if dv is None else source.matrix.mT.contiguous(), dots=dots, grads=grads, dv=dv,
        k=context.constants(config),
    )  # fmt: skip
    assert grads.dlam is not None
    return TableGradients(grads.dgamma.sum(0), grads.dlam.sum(0))
