"""What the Gluon kernels share: which thread holds what, the power of Eq. 5 in machine words, sums over rows.

A warp has 16 whole rows.  In the layout of the left operand of ``mma.sync`` (``operand``), with 8 channels a step, lane
l has of rows l / 4 and l / 4 + 8 the channels 8 (l mod 4) to 8 (l mod 4) + 7, and those plus 32: loads of 16 bytes go
straight into operands of the tensor cores, and a sum over a row is one over four lanes.  In the layout of their results
(``result``) the same lane has of the same rows the columns 2 (l mod 4), 2 (l mod 4) + 1, and those plus 8, 16, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TINY = gl.constexpr(torch.finfo(torch.float32).tiny)
STEP = gl.constexpr(64)
"""Channels that a program works on at a time."""


@gluon.constexpr_function
def result(warps):
    """(16 warps, columns): of ``mma.sync``, the rows of a tile over the warps."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def operand(warps, side, width=8):
    """The left (0) or right (1) operand; ``width`` channels next to each other are those of one lane."""
    return gl.DotOperandLayout(side, result(warps), width)


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
def place_of(segments, tile, R: gl.constexpr):
    """The :class:`Place` of a tile of R tokens."""
    T = gl.cast(segments.T, gl.int64)
    if segments.table is None:
        tiles = (segments.N + R - 1) // R
        image = (tile // tiles).to(gl.int64)
        first = (tile % tiles) * R
        return Place(image, image, first, segments.N, image * segments.N + first, T)
    else:
        entry = segments.table + tile * 3
        first = gl.load(entry + 1)
        image = gl.cast(0, gl.int64)
        return Place(image, gl.load(entry).to(gl.int64), first, gl.load(entry + 2), first.to(gl.int64), T)


@gluon.jit
def pointers(strided, place, R: gl.constexpr, layout: gl.constexpr, COLUMNS: gl.constexpr):
    """Pointers (R, COLUMNS) to the first channels of the rows of a tile."""
    rows = gl.arange(0, R, layout=gl.SliceLayout(1, layout)).to(gl.int64)
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    start = strided.x + (place.image * strided.stride_xb + place.first.to(gl.int64) * strided.stride_xn)
    return start + rows[:, None] * strided.stride_xn + columns[None, :]


@gluon.jit
def rows_there(mask, place, R: gl.constexpr, layout: gl.constexpr):
    """(R,): which rows of a tile there are, and which of them count, by ``mask`` (T,) or None."""
    rows = gl.arange(0, R, layout=layout)
    there = place.first + rows < place.end
    if mask is None:
        return there, there
    else:
        return there, there & (gl.load(mask + place.token + rows, mask=there, other=0) != 0)


@gluon.jit
def load(pointers, active, MASKED: gl.constexpr):
    """What the pointers (R, C) point to; MASKED: zeros in the rows that are not ``active`` (R,)."""
    if MASKED:
        return gl.load(pointers, mask=active[:, None], other=0.0)
    else:
        return gl.load(pointers)


# Two channels at a time -----------------------------------------------------------------------------------------------

PACKED = {
    gl.bfloat16: "max.NaN.bf16x2 t, {z}, t; shl.b32 x, t, 16; and.b32 y, t, 0xffff0000;",
    gl.float16: "max.NaN.f16x2 t, {z}, t; mov.b32 {{u, v}}, t; cvt.f32.f16 x, u; cvt.f32.f16 y, v;",
}
"""Of two packed channels z: x and y, their ReLU in float32; t is 0 before.  NaN stays NaN."""


@gluon.constexpr_function
def measuring(dtype, positive):
    """Assembly: s = ReLU(z) / m twice, p = s^gamma twice, p in f16; from z, 1/m twice, gamma twice.

    Results below the smallest normal number are zeros (ftz), and log2 0 = -inf: so 0^gamma = 0 for gamma > 0
    (``positive``), and is made so for others.
    """
    powers = ""
    for p, s, gamma in (("$2", "$0", "$8"), ("$3", "$1", "$9")):
        powers += f"lg2.approx.ftz.f32 x, {s}; mul.ftz.f32 x, x, {gamma}; ex2.approx.ftz.f32 {p}, x;"
        powers += "" if positive else f"setp.eq.f32 zero, {s}, 0f00000000; selp.f32 {p}, 0f00000000, {p}, zero;"
    return (
        "{ .reg .b32 t; .reg .b16 u, v; .reg .f32 x, y; .reg .pred zero; mov.b32 t, 0;"
        + PACKED[dtype].format(z="$5")
        + "mul.ftz.f32 $0, x, $6; mul.ftz.f32 $1, y, $7;"
        + powers
        + "cvt.rn.f16x2.f32 $4, $3, $2; }"
    )


@gluon.constexpr_function
def raising(dtype, positive):
    """Assembly: p twice, from z, gamma twice, and twice gamma log2 1/m, or 1/m where not ``positive``."""
    powers = ""
    for p, r, gamma, scale in (("$0", "x", "$3", "$5"), ("$1", "y", "$4", "$6")):
        if positive:
            powers += f"lg2.approx.ftz.f32 {r}, {r}; fma.rn.ftz.f32 {r}, {r}, {gamma}, {scale};"
            powers += f"ex2.approx.ftz.f32 {p}, {r};"
        else:
            powers += f"mul.ftz.f32 {r}, {r}, {scale}; setp.eq.f32 zero, {r}, 0f00000000;"
            powers += f"lg2.approx.ftz.f32 {r}, {r}; mul.ftz.f32 {r}, {r}, {gamma};"
            powers += f"ex2.approx.ftz.f32 {r}, {r}; selp.f32 {p}, 0f00000000, {r}, zero;"
    return (
        "{ .reg .b32 t; .reg .b16 u, v; .reg .f32 x, y; .reg .pred zero; mov.b32 t, 0;"
        + PACKED[dtype].format(z="$2")
        + powers
        + "}"
    )


@gluon.jit
def measured(z, inv_max, gamma, POSITIVE: gl.constexpr):
    """s, p (R, C) float32 and p in float16, of z (R, C), 1/m and gamma (R, 1)."""
    return gl.inline_asm_elementwise(
        measuring(z.dtype, POSITIVE), "=&r,=&r,=&r,=&r,=r,r,r,r,r,r", [z, inv_max, gamma],
        dtype=(gl.float32, gl.float32, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def raised(z, gamma, shift, POSITIVE: gl.constexpr):
    """p (R, C) float32, of z (R, C), gamma (R, 1) and what :func:`shift_of` says (R, 1)."""
    return gl.inline_asm_elementwise(
        raising(z.dtype, POSITIVE), "=&r,=&r,r,r,r,r,r", [z, gamma, shift], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def shift_of(inv_max, gamma, POSITIVE: gl.constexpr):
    """What :func:`raised` takes of a row: p = 2^(gamma log2 r - gamma log2 m)."""
    if POSITIVE:
        return gl.where(inv_max > 0.0, gamma * gl.log2(gl.where(inv_max > 0.0, inv_max, 1.0)), 0.0)
    else:
        return inv_max


@gluon.constexpr_function
def larger_of(dtype):
    return f"max.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'} $0, $1, $2;"


@gluon.jit
def larger(x, y):
    """The larger of each two of x and y (R, C) of 16 bits, passing over NaN."""
    return gl.inline_asm_elementwise(larger_of(x.dtype), "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def fold(x):
    """(R, C) in the layout of an operand -> (R, 4): the sums of what a lane has of each row."""
    x = gl.reshape(x, (x.shape[0], x.shape[1] // STEP, 2, 4, STEP // 8))
    return gl.sum(gl.sum(gl.sum(x, 4), 2), 1)


@gluon.jit
def first_largest(logits, CHOICES: gl.constexpr):
    """(R, n) -> (R,) int32, the lowest index of the largest of the first CHOICES columns; among NaN, some choice."""
    layout: gl.constexpr = logits.type.layout
    columns = gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    logits = gl.where(columns < CHOICES, logits, float("-inf"))
    best = gl.max(logits, 1)
    return gl.minimum(gl.min(gl.where(logits == best[:, None], columns, logits.shape[1]), 1), CHOICES - 1)
