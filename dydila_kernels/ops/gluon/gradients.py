"""The backward pass of one side, as :mod:`dydila_kernels.ops.gradients` has it, with whole rows in a warp.

Let X be dy for phi(Z) and Z' alike, or under "denominator" dy + u and dy - sign(lambda) u; w the row scale, and of Z'
that times -lambda: so G = w X.  With s = ReLU(Z) / m, q = s^(gamma - 1), p = q s, and per row d = p . X, v = d / |p|^2,

    dZ = (renorm/m) gamma w q (X - p v) + w v / (renorm/m) s        dgamma = renorm w ln 2 sum p log2(s) (X - p v)

and dlambda = -renorm' rowscale d'.

dy is read, or made anew per head as x_h M_h^T, 32 channels at a time: it leaves the tensor cores in the layout in which
Z and Z' are loaded and dZ and dZ' stored.  The next chunk, and the x and matrix of the next head, are on their way
(cp.async) while one is worked on.  Queries know d from :mod:`dydila_kernels.ops.gluon.dots` and walk over their rows
once; keys find it in a walk of their own, in which the powers serve for dV = Zh M, too.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Denominator, Source
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.gluon.chunks import (
    CHUNK,
    add_products,
    as_left,
    chunks_of,
    fold,
    from_result,
    in_head,
    lines,
    nothing,
    parts,
    raised,
    result,
    row,
    total,
)
from dydila_kernels.ops.gluon.common import place_of, row_scale_of
from dydila_kernels.ops.gluon.stream import (
    arrived,
    begin,
    dy_of,
    end,
    fetch_chunk,
    fetch_head,
    lefts_of,
    slot_of,
    slots_for,
    stream_of,
    wait,
)
from dydila_kernels.ops.gradients import TableGradients, places_of
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
def incoming(dy, source, denominator, h, c, place, there, sign, k, WARPS: gl.constexpr):
    """X (R, CHUNK) of Z and of Z', but for ``unit``, of chunk c of head h; sign (R,): that of -lambda."""
    if denominator.vector is None:
        return dy, dy
    else:
        channels = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, lines(WARPS)))
        n = (place.token + gl.arange(0, k.BLOCK_N, layout=row(WARPS))) * k.H + h
        E: gl.constexpr = k.D // k.H
        u = denominator.vector + place.segment * k.D + (h * E + c * CHUNK) + channels
        u = gl.load(u, mask=c * CHUNK + channels < E, other=0.0)[None, :]
        dy *= source.scale
        if denominator.inverse is not None:
            dy *= gl.load(denominator.inverse + n, mask=there, other=0.0)[:, None]
        if denominator.weights is not None:
            u = u * gl.load(denominator.weights + n, mask=there, other=0.0)[:, None]
        return dy + u, dy + sign[:, None] * u


@gluon.jit
def store_gradient(out, z, inverse, gamma, x, v, steep, linear, mask):
    """Stores the gradient of a chunk z (R, CHUNK) of a branch; returns its part of the sum in dgamma, folded."""
    s, log, q = parts(z, inverse, gamma - 1.0)
    p = q * s
    rest = x - p * v
    gl.store(out, (steep * (q * rest) + linear * s).to(z.dtype), mask=mask)
    return fold(p * log * rest)


@gluon.jit
def gluon_gradients_kernel(tokens, segments, tables, stats, scaling, source, denominator, dots, grads,
                           k: gl.constexpr):  # fmt: skip
    """One program for a tile of tokens of one side, all channels.

    Where grads.dv is given, source.matrix is (segments, H, e, J CHUNK), with the columns of each of the J chunks in
    the order of :func:`place`; dots (2, H, T) float32, the sums of p . dy of each head, or None.  The other arguments
    as in :mod:`dydila_kernels.ops.arguments`.
    """
    R: gl.constexpr = k.BLOCK_N
    WARPS: gl.constexpr = R // 16
    E: gl.constexpr = k.D // k.H
    J: gl.constexpr = chunks_of(E)
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
    scale = row_scale_of(renorm1, renorm2, neg_lam, scaling, place, k)
    sign = gl.where(neg_lam > 0.0, 1.0, gl.where(neg_lam < 0.0, -1.0, 0.0))
    # The scale of dy is left to the weights, where there is nothing beside it.
    unit = source.scale if denominator.vector is None else 1.0
    PLACED: gl.constexpr = grads.dv is not None
    STRIDE: gl.constexpr = J * CHUNK if PLACED else E
    active = ((renorm1 != 0.0) | (renorm2 != 0.0))[:, None]

    channels = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, lines(WARPS)))
    out = inside[:, None] * grads.stride + channels[None, :]
    first = place.token * grads.stride
    dtype: gl.constexpr = tokens.z.x.dtype.element_ty
    stream = stream_of(tokens, source, place, E, STRIDE, k.D, slots_for(E, dots is not None), WARPS)
    fetch_chunk(stream, 0, active, E, H, WARPS)
    fetch_head(stream, 0, active, E, STRIDE, H, WARPS)
    async_copy.commit_group()
    wait()

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
            found = ()
            if grads.dv is not None:
                for _ in gl.static_range(0, J):
                    found += (gl.zeros([R, CHUNK], gl.float32, result(WARPS)),)
            begin(stream, h, active, E, STRIDE, H, WARPS)
            lefts = lefts_of(stream, h, PLACED, E, WARPS)
            for c in range(0, J):
                step = h * J + c
                fetch_chunk(stream, step + 1, active, E, H, WARPS)
                async_copy.commit_group()
                dy = dy_of(stream, lefts, h, c, PLACED, E, WARPS)
                p1 = raised(arrived(stream.z_slots, step % 2, WARPS), gamma1, shift1)
                p2 = raised(arrived(stream.y_slots, step % 2, WARPS), gamma2, shift2)
                x1, x2 = incoming(dy, source, denominator, h, c, place, there, sign, k, WARPS)
                d1 += fold(p1 * x1)
                d2 += fold(p2 * x2)
                if grads.dv is not None:
                    hat = as_left((p1 * weight1 + p2 * weight2).to(dtype), True, WARPS)
                    found = add_products(found, hat, stream.blocks, slot_of(stream, h) * J + c, WARPS)
                wait()
            end(stream, h, active, E, STRIDE, H, WARPS)
            if grads.dv is not None:
                for c in gl.static_range(0, J):
                    at = grads.dv + first + (h * E + c * CHUNK)
                    gl.store(
                        at + out,
                        (from_result(found[c], WARPS) * source.scale).to(dtype),
                        mask=in_head(there[:, None], c, E, WARPS),
                    )
        d1 = total(d1, WARPS)
        d2 = total(d2, WARPS)
    d1 *= unit
    d2 *= unit
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
    v1 = (v1 / unit)[:, None]
    v2 = (v2 / unit)[:, None]
    steep1 = (ratio1 * gamma1 * (scale * unit))[:, None]
    steep2 = (ratio2 * gamma2 * neg_lam * (scale * unit))[:, None]
    e1 = nothing(WARPS)
    e2 = nothing(WARPS)
    dz = grads.dz + first
    dz_redundant = grads.dz_redundant + first
    walked: gl.constexpr = H if dots is None else 0
    for h in range(0, H):
        head = walked + h
        begin(stream, head, active, E, STRIDE, H, WARPS)
        lefts = lefts_of(stream, head, PLACED, E, WARPS)
        for c in range(0, J):
            step = head * J + c
            fetch_chunk(stream, step + 1, active, E, H, WARPS)
            async_copy.commit_group()
            at = h * E + c * CHUNK
            dy = dy_of(stream, lefts, head, c, PLACED, E, WARPS)
            x1, x2 = incoming(dy, source, denominator, h, c, place, there, sign, k, WARPS)
            mask = in_head(there[:, None], c, E, WARPS)
            z = arrived(stream.z_slots, step % 2, WARPS)
            e1 += store_gradient(dz + at + out, z, inverse1, gamma1, x1, v1, steep1, linear1, mask)
            z = arrived(stream.y_slots, step % 2, WARPS)
            e2 += store_gradient(dz_redundant + at + out, z, inverse2, gamma2, x2, v2, steep2, linear2, mask)
            wait()
        end(stream, head, active, E, STRIDE, H, WARPS)
    e1 = total(e1, WARPS) * renorm1 * (scale * unit * LN2)
    e2 = total(e2, WARPS) * renorm2 * neg_lam * (scale * unit * LN2)
    dgamma = chosen_sum(e1, index1, k.N_F, WARPS) + chosen_sum(e2, index2, k.N_F, WARPS)
    store_table(grads.dgamma, dgamma, k.N_F, WARPS)


def stage_of(source: Source, denominator: Denominator, dots: Tensor | None) -> str:
    """The name of the launch configuration."""
    if source.x is None:
        return "gluon_given_gradients"
    if denominator.vector is not None:
        return "gluon_gradients_of_terms"
    return "gluon_gradients" if dots is None else "gluon_gradients_once"


def gradients(
    context: LaunchContext, side: QKOperand, source: Source, denominator: Denominator, dz: Tensor,
    dz_redundant: Tensor, *, dv: Tensor | None = None, dots: Tensor | None = None,
) -> TableGradients:  # fmt: skip
    """As :func:`dydila_kernels.ops.gradients.gradients`, which says when."""
    config = configs.pick(stage_of(source, denominator, dots), context.dtype, context.head_dim)
    programs = context.programs(config.block_n)
    grads = places_of(context, side, programs, dz, dz_redundant, dv)
    launch(
        gluon_gradients_kernel, (programs,), config, tokens=context.tokens(side),
        segments=context.tiles(config.block_n), **context.measured(side), scaling=context.scaling(side), source=source,
        denominator=denominator, dots=dots, grads=grads, k=context.constants(config, side.has_denominator),
    )  # fmt: skip
    assert grads.dlam is not None
    return TableGradients(grads.dgamma.sum(0), grads.dlam.sum(0))
