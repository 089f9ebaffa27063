"""What all Gluon kernels share: where a tile lies, what multiplies its Zh, and the ReLU of two channels at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dydila_kernels.ops.tiles import TINY


class Place(NamedTuple):
    """Where the tile of a program lies: its image, int64, and segment, its first token in the image, the end of the
    segment, and the number of its first token among all, int64; T, int64."""

    image: Any
    segment: Any
    first: Any
    end: Any
    token: Any
    T: Any


@gluon.jit
def place_of(segments, R: gl.constexpr):
    """The :class:`Place` of the tile of R tokens of a program of a one-dimensional grid."""
    T = gl.cast(segments.T, gl.int64)
    if segments.table is None:
        tiles = (segments.N + R - 1) // R
        image = (gl.program_id(0) // tiles).to(gl.int64)
        first = (gl.program_id(0) % tiles) * R
        return Place(image, image, first, segments.N, image * segments.N + first, T)
    else:
        entry = segments.table + gl.program_id(0) * 3
        first = gl.load(entry + 1)
        image = gl.cast(0, gl.int64)
        return Place(image, gl.load(entry).to(gl.int64), first, gl.load(entry + 2), first.to(gl.int64), T)


@gluon.jit
def scale_of(scaling, segment):
    """What multiplies Zh, see :class:`Scaling`."""
    scale = scaling.fp16_prescale
    if scaling.length_scale is not None:
        scale = scale * gl.load(scaling.length_scale + segment)
    return scale


@gluon.jit
def inverse_of(x):
    """1/x, and 0 of less than the smallest normal number."""
    return gl.where(x >= TINY, 1.0 / gl.where(x >= TINY, x, 1.0), 0.0)


@gluon.jit
def row_scale_of(renorm, other_renorm, neg_lam, scaling, place, k):
    """What multiplies Zh: of a tile, or (R,) where it is relative to the larger renormalisation."""
    if k.HAS_DENOMINATOR:
        return inverse_of(gl.maximum(renorm, gl.abs(other_renorm * neg_lam)))
    else:
        return scale_of(scaling, place.segment)


RELU = {
    gl.bfloat16: "max.NaN.bf16x2 t, {z}, t; shl.b32 x, t, 16; and.b32 y, t, 0xffff0000;",
    gl.float16: "max.NaN.f16x2 t, {z}, t; mov.b32 {{u, v}}, t; cvt.f32.f16 x, u; cvt.f32.f16 y, v;",
}
"""Assembly: of a word z of two channels x and y, their ReLU in float32; t is 0 before.  NaN stays NaN."""
REGISTERS = "{ .reg .b32 t; .reg .b16 u, v; .reg .f32 x, y; .reg .pred test; mov.b32 t, 0;"
"""What it takes, and begins with."""
