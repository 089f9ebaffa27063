"""The gradient of the state and what the gradients of the queries need of a first walk, in one pass.

    D_h = state_scale sum_n Qh_nh^T dO_nh            dots = (p . dy_h, p' . dy_h)        dy_h = dO_h S_h^T

per head and token, before any scale: the sums over the heads are the d of :mod:`dydila_kernels.ops.gluon.gradients`.  A
program has one head and a part of the tokens of a segment; of these the next tile is on its way (cp.async) while one is
worked on.  A warp has 16 tokens, makes their Zh once and leaves them in shared memory for the product over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import strided
from dydila_kernels.ops.context import LaunchContext, QKOperand, processors
from dydila_kernels.ops.gluon.chunks import (
    CHUNK,
    as_left,
    async_load,
    barrier,
    blocks_for,
    chunks_of,
    copy_matrix,
    fold,
    in_head,
    lines,
    nothing,
    place,
    pointers,
    product,
    raised,
    row,
    total,
)
from dydila_kernels.ops.gluon.common import scale_of
from dydila_kernels.ops.tiles import launch


@gluon.constexpr_function
def state_layout(warps):
    """Of ``mma.sync``: (CHUNK, CHUNK) of a state, 16 rows a warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[2, warps // 2], instr_shape=[16, 8])


@gluon.jit
def copy_tile(slots, slot, z, y, x, mask, E: gl.constexpr, WARPS: gl.constexpr):
    """Z, Z' and dO of a tile on their way to a slot; z, y, x: pointers (R, CHUNK)."""
    J: gl.constexpr = chunks_of(E)
    for c in gl.static_range(0, J):
        inside = in_head(mask, c, E, WARPS)
        async_load(slots[0].index(slot * J + c), z + c * CHUNK, mask=inside)
        async_load(slots[1].index(slot * J + c), y + c * CHUNK, mask=inside)
        async_load(slots[2].index(slot * J + c), x + c * CHUNK, mask=inside)
    async_copy.commit_group()


@gluon.jit
def load_facts(stats, first, end, token, T, R: gl.constexpr, WARPS: gl.constexpr):
    """What is saved of the rows of a tile, first of Z, then of Z' (2 R,): index, lam_index, 1/m, renorm."""
    i = gl.arange(0, 2 * R, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    there = first + i % R < end
    n = token + (first + i % R)
    branch = (i // R).to(gl.int64) * T
    return (
        gl.load(stats.index + branch + n, mask=there, other=0),
        gl.load(stats.lam_index + n, mask=there, other=0),
        gl.load(stats.norms + 3 * branch + n, mask=there, other=0.0),
        gl.load(stats.norms + 3 * branch + T + n, mask=there, other=0.0),
    )


@gluon.jit
def store_factors(factors, slot, facts, tables, scale, R: gl.constexpr, WARPS: gl.constexpr):
    """gamma, gamma log2 1/m and the weight of p in Zh of each row of a tile, to shared memory (6, 2 R)."""
    index, lam_index, inverse, renorm = facts
    second = gl.arange(0, 2 * R, layout=gl.BlockedLayout([1], [32], [WARPS], [0])) >= R
    gamma = gl.load(tables.gamma + index.to(gl.int32)).to(gl.float32)
    lam = gl.load(tables.lam + lam_index.to(gl.int32)).to(gl.float32)
    factors.index(3 * slot).store(gamma)
    factors.index(3 * slot + 1).store(gamma * gl.log2(inverse))
    factors.index(3 * slot + 2).store(renorm * gl.where(second, -lam, 1.0) * scale)


@gluon.jit
def rows_of(factors, number, branch: gl.constexpr, R: gl.constexpr, WARPS: gl.constexpr):
    return factors.index(number).slice(branch * R, R).load(row(WARPS))


@gluon.jit
def mask_of(tokens, first, end, token, R: gl.constexpr, WARPS: gl.constexpr):
    """(R, 1): which rows of a tile there are and count."""
    rows = first + gl.arange(0, R, layout=row(WARPS))
    there = rows < end
    if tokens.mask is not None:
        there = there & (gl.load(tokens.mask + token + rows, mask=there, other=0) != 0)
    return there[:, None]


@gluon.jit
def gluon_dots_kernel(tokens, x, matrix, segments, tables, stats, scaling, dots, partials, state_scale, SPLITS,
                      k: gl.constexpr):  # fmt: skip
    """partials (segments, SPLITS, H, e, J CHUNK) of D, the columns of each of J chunks in the order of :func:`place`,
    those beyond e zero; dots (2, H, T).  Both are float32.

    x is that of dO; matrix (segments, H, e, e), S; segments.table are bounds.
    """
    R: gl.constexpr = k.BLOCK_N
    WARPS: gl.constexpr = R // 16
    E: gl.constexpr = k.D // k.H
    J: gl.constexpr = chunks_of(E)
    H: gl.constexpr = k.H
    h = gl.program_id(0) % H
    split = gl.program_id(0) // H % SPLITS
    T = gl.cast(segments.T, gl.int64)
    segment = (gl.program_id(0) // (H * SPLITS)).to(gl.int64)
    if segments.table is None:
        image = segment
        first = 0
        end = segments.N
    else:
        image = segment * 0
        first = gl.load(segments.table + segment)
        end = gl.load(segments.table + segment + 1)
    share = (end - first + SPLITS - 1) // SPLITS
    share = (share + R - 1) // R * R
    first = first + split * share
    end = gl.minimum(first + share, end)
    token = image * segments.N
    scale = scale_of(scaling, segment)

    dtype: gl.constexpr = tokens.z.x.dtype.element_ty
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    turned: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    # Zh takes the place of Z.
    slots = (
        gl.allocate_shared_memory(dtype, [2 * J, R, CHUNK], turned),
        gl.allocate_shared_memory(dtype, [2 * J, R, CHUNK], plain),
        gl.allocate_shared_memory(dtype, [2 * J, R, CHUNK], turned),
    )
    blocks = blocks_for(dtype, E, 1)
    factors = gl.allocate_shared_memory(gl.float32, [6, 2 * R], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    z = pointers(tokens.z.x + h * E, tokens.z.stride_xb, tokens.z.stride_xn, image, first, WARPS)
    y = pointers(
        tokens.redundant.x + h * E, tokens.redundant.stride_xb, tokens.redundant.stride_xn, image, first, WARPS
    )
    w = pointers(x.x + h * E, x.stride_xb, x.stride_xn, image, first, WARPS)
    copy_matrix(blocks, 0, matrix + (segment * H + h) * (E * E), E, E, WARPS)
    copy_tile(slots, 0, z, y, w, mask_of(tokens, first, end, token, R, WARPS), E, WARPS)
    store_factors(factors, 0, load_facts(stats, first, end, token, T, R, WARPS), tables, scale, R, WARPS)
    facts = load_facts(stats, first + R, end, token, T, R, WARPS)

    layout: gl.constexpr = state_layout(WARPS)
    acc = ()
    for _ in gl.static_range(0, J * J):
        acc += (gl.zeros([CHUNK, CHUNK], gl.float32, layout),)
    inside = gl.arange(0, R, layout=row(WARPS))
    slot = 0
    for start in range(first, end, R):
        async_copy.wait_group(0)
        barrier()
        z += R * tokens.z.stride_xn
        y += R * tokens.redundant.stride_xn
        w += R * x.stride_xn
        copy_tile(slots, 1 - slot, z, y, w, mask_of(tokens, start + R, end, token, R, WARPS), E, WARPS)
        gamma1 = rows_of(factors, 3 * slot, 0, R, WARPS)
        gamma2 = rows_of(factors, 3 * slot, 1, R, WARPS)
        shift1 = rows_of(factors, 3 * slot + 1, 0, R, WARPS)
        shift2 = rows_of(factors, 3 * slot + 1, 1, R, WARPS)
        weight1 = rows_of(factors, 3 * slot + 2, 0, R, WARPS)[:, None]
        weight2 = rows_of(factors, 3 * slot + 2, 1, R, WARPS)[:, None]
        lefts = ()
        for c in gl.static_range(0, J):
            lefts += (as_left(slots[2].index(slot * J + c).load(lines(WARPS)), False, WARPS),)
        d1 = nothing(WARPS)
        d2 = nothing(WARPS)
        for c in range(0, J):
            dy = product(lefts, blocks, c, False, WARPS)
            p1 = raised(slots[0].index(slot * J + c).load(lines(WARPS)), gamma1, shift1)
            p2 = raised(slots[1].index(slot * J + c).load(lines(WARPS)), gamma2, shift2)
            d1 += fold(p1 * dy)
            d2 += fold(p2 * dy)
            slots[0].index(slot * J + c).store((p1 * weight1 + p2 * weight2).to(dtype))
        there = start + inside < end
        at = dots + h * T + (token + (start + inside))
        gl.store(at, total(d1, WARPS), mask=there)
        gl.store(at + H * T, total(d2, WARPS), mask=there)
        store_factors(factors, 1 - slot, facts, tables, scale, R, WARPS)
        for n in gl.static_range(0, R, CHUNK):
            summed = ()
            values = ()
            for c in gl.static_range(0, J):
                hat = slots[0].index(slot * J + c).slice(n, CHUNK, dim=0).permute((1, 0))
                summed += (hat.load(gl.DotOperandLayout(0, layout, 2)),)
                value = slots[2].index(slot * J + c).slice(n, CHUNK, dim=0)
                values += (value.load(gl.DotOperandLayout(1, layout, 2)),)
            found = ()
            for i in gl.static_range(0, J):
                for j in gl.static_range(0, J):
                    found += (mma_v2(summed[i], values[j], acc[i * J + j]),)
            acc = found
        # Last of all, where the next loop waits anyway.
        facts = load_facts(stats, start + 2 * R, end, token, T, R, WARPS)
        slot = 1 - slot
    async_copy.wait_group(0)
    out = partials + ((segment * SPLITS + split) * H + h) * (E * J * CHUNK)
    rows = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))[:, None]
    columns = place(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout)))[None, :]
    for i in gl.static_range(0, J):
        for j in gl.static_range(0, J):
            at = out + (i * CHUNK + rows) * (J * CHUNK) + (j * CHUNK + columns)
            gl.store(at, acc[i * J + j] * state_scale, mask=rows < E - i * CHUNK)


def dots(context: LaunchContext, side: QKOperand, grad: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the state (segments, H, e, J 32), see :func:`placed`, and the dot products (2, H, T), float32.

    grad (B, N, d), that of the output; matrix (segments, H, e, e), the state, in the dtype of the tokens.
    """
    e = context.head_dim
    config = configs.pick("gluon_dots", context.dtype, e)
    splits = splits_of(context, config.block_n)
    found = torch.empty(2, context.heads, context.num_tokens, device=context.device, dtype=torch.float32)
    columns = -(-e // 32) * 32
    shape = context.segments, splits, context.heads, e, columns
    partials = torch.empty(shape, device=context.device, dtype=torch.float32)
    launch(
        gluon_dots_kernel, (context.segments * splits * context.heads,), config,
        tokens=context.tokens(side, masked=True), x=strided(grad), matrix=matrix, segments=context.whole_segments(),
        **context.measured(side), scaling=context.scaling(side), dots=found, partials=partials,
        state_scale=context.state_scale, SPLITS=splits, k=context.constants(config),
    )  # fmt: skip
    return partials.sum(1), found


def splits_of(context: LaunchContext, block_n: int) -> int:
    """Programs that share the tokens of a segment: three fit on a multiprocessor, and none shall wait for a second
    round; each has four tiles."""
    fit = 3 * processors(context.device) // 2
    return max(1, min(fit // (context.segments * context.heads), context.longest // (4 * block_n)))
