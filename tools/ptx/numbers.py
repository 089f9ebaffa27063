"""Number formats and the arithmetic that numpy lacks, bit for bit as the PTX manual has it.

Functions take and return arrays; names of PTX instructions mean what they mean there.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import F16, F32, F64, I32, I64, SIGNED, U16, U32, U64, UNSIGNED, Array

SMALLEST_NORMAL = F32(2.0**-126)


def ftz(x: Array) -> Array:
    """float32 with subnormal numbers as zeros of their sign."""
    small = np.abs(x) < SMALLEST_NORMAL
    return np.where(small, np.copysign(F32(0), x), x) if small.any() else x


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a b + c; the product is exact in float64, the sum is rounded there first and so, rarely, twice."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def to_bf16(x: Array) -> Array:
    """float32 -> bits, to nearest even."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    nan = np.isnan(x)
    return np.where(nan, U16(0x7FFF), rounded) if nan.any() else rounded


def to_bf16_towards_zero(x: Array) -> Array:
    return (x.view(U32) >> U32(16)).astype(U16)


def from_bf16(x: Array) -> Array:
    return (x.astype(U32) << U32(16)).view(F32)


def to_f16(x: Array) -> Array:
    return x.astype(F16).view(U16)


def from_f16(x: Array) -> Array:
    return x.view(F16).astype(F32)


def to_tf32(x: Array) -> Array:
    """Bits of float32 rounded to nearest, ties away from zero."""
    special = (x & U32(0x7F800000)) == U32(0x7F800000)
    return np.where(special, x, (x + U32(0x1000)) & U32(0xFFFFE000))


def from_tf32(x: Array) -> Array:
    """As tensor cores read float32: without the low 13 bits; float64."""
    return (x & U32(0xFFFFE000)).view(F32).astype(F64)


def truncate(x: Array) -> Array:
    """float64 -> float32 toward zero."""
    rounded = x.astype(F32)
    bits = rounded.view(U32)
    too_far = (np.abs(rounded.astype(F64)) > np.abs(x)) & np.isfinite(x)
    return np.where(too_far, bits - U32(1), bits).view(F32)


def div_int(a: Array, b: Array) -> Array:
    """Toward zero; all bits set for a division by zero."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), quotient)


def rem_int(a: Array, b: Array) -> Array:
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    found: Array = a - div_int(a, b) * b
    return found


def mul_hi(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype == U32:
        return ((a.astype(U64) * b.astype(U64)) >> U64(32)).astype(U32)
    if a.dtype == I32:
        return ((a.astype(I64) * b.astype(I64)) >> I64(32)).astype(I32)
    high = [((int(x) * int(y)) >> 64) & (2**64 - 1) for x, y in zip(a, b, strict=True)]
    return np.array(high, dtype=U64).view(a.dtype)


def popc(x: Array) -> Array:
    return np.bitwise_count(x).astype(U32)


def clz(x: Array) -> Array:
    """Leading zeros."""
    bits = x.dtype.itemsize * 8
    found = np.full(len(x), bits, U32)
    for i in range(bits):
        found = np.where((x >> x.dtype.type(i)) & x.dtype.type(1) != 0, U32(bits - 1 - i), found)
    return found


def brev(x: Array) -> Array:
    """The bits in the opposite order."""
    found = np.zeros_like(x)
    for i in range(32):
        found |= ((x >> U32(i)) & U32(1)) << U32(31 - i)
    return found


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of a and b, or their signs."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    found = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> U32(4 * i)) & U32(15)
        byte = (both >> ((choice & U32(7)).astype(U64) * U64(8))) & U64(0xFF)
        sign = np.where(byte & U64(0x80) != 0, U64(0xFF), U64(0))
        byte = np.where(choice & U32(8) != 0, sign, byte)
        found |= byte.astype(U32) << U32(8 * i)
    return found


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits, by its table of eight."""
    found = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def bfe(a: Array, start: Array, length: Array) -> Array:
    """A field of bits of a, with its sign where a is signed."""
    bits = a.dtype.itemsize * 8
    at, size = (start & U32(0xFF)).astype(I64), (length & U32(0xFF)).astype(I64)
    if a.dtype.kind == "u":
        field = a.astype(U64) >> np.minimum(at, 63).astype(U64)
        mask = np.where(size >= bits, U64(2**bits - 1), (U64(1) << np.minimum(size, 63).astype(U64)) - U64(1))
        unsigned: Array = (field & mask).astype(UNSIGNED[bits])
        return unsigned
    at = np.minimum(at, bits - 1)
    size = np.minimum(size, bits - at)
    value = (a.astype(I64) >> at) & ((I64(1) << size) - I64(1))
    top = I64(1) << np.maximum(size - 1, 0)
    return np.where(size > 0, (value ^ top) - top, 0).astype(SIGNED[bits])


def funnel_shift(low: Array, high: Array, amount: Array, left: bool, wrap: bool) -> Array:
    """The upper half of (high, low) shifted left, or the lower half of it shifted right."""
    amount = (amount & U32(31) if wrap else np.minimum(amount, U32(32))).astype(U64)
    both = low.astype(U64) | (high.astype(U64) << U64(32))
    return ((both << amount) >> U64(32)).astype(U32) if left else (both >> amount).astype(U32)


def integer_of(x: Array, rounding: str, bits: int, signed: bool) -> Array:
    """A float as an integer; NaN is 0, what is out of range the nearest integer there is."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(F64))
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if bits == 64:
        most = 2**63 - 1024  # the largest that float64 holds
    found: Array = np.clip(np.nan_to_num(whole, nan=0.0), least, most).astype((SIGNED if signed else UNSIGNED)[bits])
    return found
