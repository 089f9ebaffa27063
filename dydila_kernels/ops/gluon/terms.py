"""Denominator terms M = phi(Z) + |lambda| phi(Z') of the tokens of a tile, two channels a word, see :mod:`rows`.

Of keys a program has the sum over its tokens.  Of queries it has the products with the mean term of the keys, whose sum
over the channels of a head is the denominator: summed over :func:`part_width` channels, which lie in one head and warp.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dydila_kernels.ops.gluon.rows import R, fold, words_of
from dydila_kernels.ops.gluon.words import halves, packed
from dydila_kernels.ops.tiles import part_width


@gluon.jit
def word_columns(c: gl.constexpr, WARPS: gl.constexpr):
    """(16 W,): the words of chunk c in a row."""
    return c * 16 * WARPS + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(0, words_of(WARPS)))


@gluon.jit
def load_pairs(vector, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Both channels (1, 16 W) of the words of chunk c of ``vector`` (d,) float32; zeros outside."""
    words = word_columns(c, WARPS)
    pairs = vector.to(gl.pointer_type(gl.int64)) + words
    found = gl.load(pairs, mask=words < D // 2, other=0)
    low, high = halves(found, gl.float32)
    return low[None, :], high[None, :]


@gluon.jit
def store_sums(vector, low, high, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """The sums over the tokens of both channels (R, 16 W) of the words of chunk c, to ``vector`` (d,) float32."""
    found = packed(gl.sum(low, 0), gl.sum(high, 0), gl.float32)
    words = word_columns(c, WARPS)
    gl.store(vector.to(gl.pointer_type(gl.int64)) + words, found, mask=words < D // 2)


@gluon.jit
def dots_of(low, high, mean, c: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """(R, 4 W): of both channels (R, 16 W) of the words of chunk c the products with ``mean`` (d,), summed over what a
    lane has of each row."""
    mean_low, mean_high = load_pairs(mean, c, D, WARPS)
    return fold(low * mean_low + high * mean_high, WARPS)


@gluon.jit
def store_parts(out, dots, place, c: gl.constexpr, k, WARPS: gl.constexpr):
    """The sums of dots (R, 4 W) over :func:`part_width` channels, to ``out`` (d / width, T)."""
    WIDTH: gl.constexpr = part_width(k.D // k.H)
    PARTS: gl.constexpr = 32 * WARPS // WIDTH
    dots = gl.sum(gl.reshape(dots, (R, PARTS, WIDTH // 8)), 2)
    rows = gl.arange(0, R, layout=gl.SliceLayout(1, dots.type.layout))
    part = c * PARTS + gl.arange(0, PARTS, layout=gl.SliceLayout(0, dots.type.layout))
    at = out + part.to(gl.int64)[None, :] * place.T + (place.token + rows)[:, None]
    gl.store(at, dots, mask=(place.first + rows < place.end)[:, None] & (part < k.D // WIDTH)[None, :])
