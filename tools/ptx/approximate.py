"""Instructions that are not exact, wrong by up to the error that the PTX manual documents for them.

Each result is moved within its bound by a hash of the operand: the same operand gives the same error always, as in
hardware, and neighbours have nothing to do with each other.  Results that float32 holds exactly stay exact.
:data:`SHARE` scales all errors: 1 for the documented bounds, 0 for none.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import F32, F64, U32, Array

SHARE = 1.0
EX2, LG2, RCP, SQRT, RSQRT, DIV_FULL = 2.0**-22.5, 2.0**-22, 2.0**-24, 2.0**-24, 2.0**-23, 2.0**-23
"""Relative errors; that of lg2 is absolute between 0.5 and 2."""


def hashed(bits: Array) -> Array:
    """uint32 -> float64 in [-SHARE, SHARE]."""
    h = bits * U32(2654435761)
    h ^= h >> U32(15)
    h = h * U32(2246822519)
    h ^= h >> U32(13)
    return SHARE * (h.astype(F64) * (2.0 / 4294967295.0) - 1.0)


def moved(y: Array, bits: Array, bound: float, exact: Array | None = None) -> Array:
    """float64 -> float32, with a relative error up to ``bound`` where not ``exact``."""
    if exact is None:
        exact = y.astype(F32).astype(F64) == y
    return np.where(exact, y, y * (1 + hashed(bits) * bound)).astype(F32)


def ex2(x: Array) -> Array:
    return moved(np.exp2(x.astype(F64)), x.view(U32), EX2, exact=np.floor(x) == x)


def lg2(x: Array) -> Array:
    y = np.log2(x.astype(F64))
    exact = np.floor(y) == y
    absolute = (y + hashed(x.view(U32)) * LG2).astype(F32)
    return np.where((x > 0.5) & (x < 2) & ~exact, absolute, moved(y, x.view(U32), LG2, exact))


def rcp(x: Array) -> Array:
    return moved(1.0 / x.astype(F64), x.view(U32), RCP)


def sqrt(x: Array) -> Array:
    return moved(np.sqrt(x.astype(F64)), x.view(U32), SQRT)


def rsqrt(x: Array) -> Array:
    return moved(1.0 / np.sqrt(x.astype(F64)), x.view(U32), RSQRT)


def div_full(a: Array, b: Array) -> Array:
    """0 for 2^126 < |b| < 2^128."""
    y = moved(a.astype(F64) / b.astype(F64), a.view(U32) ^ b.view(U32), DIV_FULL)
    large = (np.abs(b) > F32(2.0**126)) & np.isfinite(b)
    return np.where(large, F32(0) * y, y) if large.any() else y
