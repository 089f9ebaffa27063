"""What the walks of :mod:`dydila_kernels.ops.gluon.gradients` take, on its way by cp.async while other is worked on.

Steps go through the chunks of all heads, and through all heads once more in a second walk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dydila_kernels.ops.gluon.chunks import (
    CHUNK,
    as_left,
    async_load,
    barrier,
    blocks_for,
    chunks_of,
    copy_matrix,
    in_head,
    lines,
    pointers,
    product,
)

HELD = gl.constexpr(2)
"""Chunks of a head at most of which the left operands are read anew for each chunk: they would take registers."""


@gluon.constexpr_function
def slots_for(head_dim, once):
    """Heads in shared memory at a time: two, as far as the programs leave room that the registers do."""
    return 2 if head_dim <= (64 if once else 96) else 1


class Stream(NamedTuple):
    """What a walk takes: pointers (R, CHUNK) to the first channels of Z, Z' and x, and one to the matrices (H, e,
    STRIDE) of the segment; shared memory for two chunks of Z and Z', and for :func:`slots_for` heads of x and matrices.

    Where dy is given, it is in the place of x, a chunk at a time, and there is no matrix.
    """

    z: Any
    y: Any
    x: Any
    matrix: Any
    z_slots: Any
    y_slots: Any
    x_slots: Any
    blocks: Any


@gluon.jit
def stream_of(tokens, source, place, E: gl.constexpr, STRIDE: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
              WARPS: gl.constexpr):  # fmt: skip
    """Of the tile of a program; nothing is on its way yet."""
    dtype: gl.constexpr = tokens.z.x.dtype.element_ty
    shape: gl.constexpr = [2, 16 * WARPS, CHUNK]
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    heads: gl.constexpr = [SLOTS, 16 * WARPS, CHUNK]
    x_slots = ()
    if source.x is None:
        x = pointers(source.given, 0, D, place.image, place.token, WARPS)
        x_slots += (gl.allocate_shared_memory(dtype, shape, layout),)
        matrix, blocks = (), ()
    else:
        x = pointers(source.x.x, source.x.stride_xb, source.x.stride_xn, place.image, place.first, WARPS)
        for _ in gl.static_range(chunks_of(E)):
            x_slots += (gl.allocate_shared_memory(dtype, heads, layout),)
        matrix = source.matrix + place.segment * (D * STRIDE)
        blocks = blocks_for(dtype, E, SLOTS)
    return Stream(
        pointers(tokens.z.x, tokens.z.stride_xb, tokens.z.stride_xn, place.image, place.first, WARPS),
        pointers(tokens.redundant.x, tokens.redundant.stride_xb, tokens.redundant.stride_xn, place.image, place.first,
                 WARPS),
        x, matrix, gl.allocate_shared_memory(dtype, shape, layout), gl.allocate_shared_memory(dtype, shape, layout),
        x_slots, blocks,
    )  # fmt: skip


@gluon.jit
def slot_of(stream, head):
    """Where x and the matrix of a head lie."""
    return head % stream.x_slots[0].shape[0]


@gluon.jit
def fetch_chunk(stream, step, active, E: gl.constexpr, H: gl.constexpr, WARPS: gl.constexpr):
    """Z and Z' of a step: chunk step mod J of head step / J, heads counted on and on."""
    J: gl.constexpr = chunks_of(E)
    at = step // J % H * E + step % J * CHUNK
    mask = in_head(active, step % J, E, WARPS)
    async_load(stream.z_slots.index(step % 2), stream.z + at, mask=mask)
    async_load(stream.y_slots.index(step % 2), stream.y + at, mask=mask)
    if len(stream.blocks) == 0:
        async_load(stream.x_slots[0].index(step % 2), stream.x + at, mask=mask)


@gluon.jit
def fetch_head(stream, head, active, E: gl.constexpr, STRIDE: gl.constexpr, H: gl.constexpr, WARPS: gl.constexpr):
    """x and the matrix of a head; nothing where dy is given."""
    if len(stream.blocks) > 0:
        h = head % H
        for c in gl.static_range(chunks_of(E)):
            x = stream.x + (h * E + c * CHUNK)
            async_load(stream.x_slots[c].index(slot_of(stream, head)), x, mask=in_head(active, c, E, WARPS))
        copy_matrix(stream.blocks, slot_of(stream, head), stream.matrix + h * (E * STRIDE), E, STRIDE, WARPS)


@gluon.jit
def begin(stream, head, active, E: gl.constexpr, STRIDE: gl.constexpr, H: gl.constexpr, WARPS: gl.constexpr):
    """The next head is on its way, if there is room for two."""
    if stream.x_slots[0].shape[0] == 2:
        fetch_head(stream, head + 1, active, E, STRIDE, H, WARPS)


@gluon.jit
def end(stream, head, active, E: gl.constexpr, STRIDE: gl.constexpr, H: gl.constexpr, WARPS: gl.constexpr):
    """The next head is there."""
    if stream.x_slots[0].shape[0] == 1 and len(stream.blocks) > 0:
        fetch_head(stream, head + 1, active, E, STRIDE, H, WARPS)
        async_copy.commit_group()
        wait()


@gluon.jit
def lefts_of(stream, head, PLACED: gl.constexpr, E: gl.constexpr, WARPS: gl.constexpr):
    """The left operands x of a head; nothing where dy is given."""
    lefts = ()
    if len(stream.blocks) > 0:
        for j in gl.static_range(chunks_of(E)):
            lefts += (as_left(arrived(stream.x_slots[j], slot_of(stream, head), WARPS), PLACED, WARPS),)
    return lefts


@gluon.jit
def dy_of(stream, lefts, head, c, PLACED: gl.constexpr, E: gl.constexpr, WARPS: gl.constexpr):
    """dy (R, CHUNK) of chunk c of a head, but for its scale; lefts: :func:`lefts_of`."""
    J: gl.constexpr = chunks_of(E)
    if len(stream.blocks) == 0:
        return arrived(stream.x_slots[0], (head * J + c) % 2, WARPS).to(gl.float32)
    else:
        if J <= HELD:
            lefts = lefts_of(stream, head, PLACED, E, WARPS)
        return product(lefts, stream.blocks, slot_of(stream, head) * J + c, PLACED, WARPS)


@gluon.jit
def wait():
    """For all that is on its way."""
    async_copy.wait_group(0)
    barrier()


@gluon.jit
def arrived(slots, slot, WARPS: gl.constexpr):
    """(R, CHUNK) of a slot, as lines: each lane has what it fetched itself."""
    return slots.index(slot).load(lines(WARPS))
