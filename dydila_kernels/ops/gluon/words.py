"""Two channels in a word, in machine words: what the Gluon kernels of tokens do with them, without a layout.

With the notation of :mod:`dydila_kernels.ops.tokens`: of a row s = ReLU(z) / m and p = s^gamma.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dydila_kernels.ops.gluon.common import REGISTERS, RELU

HALVES = {
    gl.bfloat16: ("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&f,=f,r"),
    gl.float16: ("{ .reg .b16 u, v; mov.b32 {u, v}, $2; cvt.f32.f16 $0, u; cvt.f32.f16 $1, v; }", "=f,=f,r"),
    gl.float32: ("mov.b64 {$0, $1}, $2;", "=f,=f,l"),
}
"""Assembly, and its operands: of a word of two numbers of a dtype both in float32."""


@gluon.constexpr_function
def packing(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == gl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@gluon.constexpr_function
def unpacking(dtype, part):
    return HALVES[dtype][part]


@gluon.jit
def packed(low, high, dtype: gl.constexpr):
    """Two float32 as a word of two numbers of a dtype."""
    if dtype == gl.float32:
        return gl.inline_asm_elementwise(
            "mov.b64 $0, {$1, $2};", "=l,f,f", [low, high], dtype=gl.int64, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(packing(dtype), "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def operands(low, high, dtype: gl.constexpr):
    """As :func:`packed`, for a product: of float32 tensor cores take 11 bits, and would cut off the others."""
    if dtype == gl.float32:
        low = gl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [low], gl.float32, is_pure=True, pack=1)
        high = gl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [high], gl.float32, is_pure=True, pack=1)
    return packed(low, high, dtype)


@gluon.jit
def halves(words, dtype: gl.constexpr):
    """Words of two numbers of a dtype -> both in float32."""
    return gl.inline_asm_elementwise(
        unpacking(dtype, 0), unpacking(dtype, 1), [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


ROOT = gl.constexpr(8)
"""By how much the exponents of roots of powers are raised: float16 then has powers from 2^-44 to 2^16 whole."""


@gluon.constexpr_function
def measuring(dtype, terms):
    """Assembly: s s + s' s', p p + p' p', both p = s^gamma in f16, what that lacks, and both p once more; from z, 1/m,
    gamma.

    Once more: where ``terms``, in a form that holds tiny powers, too, see :func:`scaled`; otherwise in f16.
    Results below the smallest normal number are zeros (ftz); 0^gamma is made zero, whatever gamma.
    """
    roots = terms and dtype == gl.float16
    powers = ""
    for p, s, root in (("p", "x", "a"), ("q", "y", "b")):
        powers += f"lg2.approx.ftz.f32 {p}, {s}; mul.ftz.f32 {p}, {p}, $7; setp.eq.f32 test, {s}, 0f00000000;"
        if roots:
            # sqrt(p) 2^8, and p.
            powers += f"fma.rn.ftz.f32 {p}, {p}, 0f3f000000, 0f41000000; ex2.approx.ftz.f32 {p}, {p};"
            powers += f"selp.f32 {root}, 0f00000000, {p}, test;"
            powers += f"mul.ftz.f32 {p}, {root}, {root}; mul.ftz.f32 {p}, {p}, 0f37800000;"
        else:
            powers += f"ex2.approx.ftz.f32 {p}, {p}; selp.f32 {p}, 0f00000000, {p}, test;"
    ratios = "mul.ftz.f32 x, x, $6; mul.ftz.f32 y, y, $6;"
    squares = "mul.f32 $0, x, x; fma.rn.f32 $0, y, y, $0; mul.f32 $1, p, p; fma.rn.f32 $1, q, q, $1;"
    rounded = "cvt.rn.f16x2.f32 $2, q, p;"
    if roots:
        rounded += "cvt.rn.f16x2.f32 $4, b, a;"
    else:
        rounded += "cvt.rn.bf16x2.f32 $4, q, p;" if terms else "mov.b32 $4, $2;"
    # 11 leading bits, by a product with 2^13 + 1: from the word itself ptxas would keep both halves for later.
    lacking = "".join(
        f"mul.rn.f32 x, {p}, 0f46000400; sub.rn.f32 y, x, {p}; sub.rn.f32 x, x, y; sub.rn.f32 {p}, {p}, x;"
        for p in ("p", "q")
    )
    lacking += "cvt.rn.f16x2.f32 $3, q, p; }"
    more = ".reg .f32 p, q, a, b;"
    return REGISTERS + more + RELU[dtype].format(z="$5") + ratios + powers + squares + rounded + lacking


@gluon.jit
def measured(words, inv_max, gamma, dtype: gl.constexpr, TERMS: gl.constexpr):
    """Words (R, C) of z, 1/m and gamma (R, 1) -> float32 sums of the squares of both s and of both p; words of p in
    float16, of what these lack, and of p once more, see :func:`measuring`."""
    return gl.inline_asm_elementwise(
        measuring(dtype, TERMS), "=&f,=&f,=&r,=&r,=&r,r,f,f", [words, inv_max, gamma],
        dtype=(gl.float32, gl.float32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def scaled(words, weight, dtype: gl.constexpr, TERMS: gl.constexpr):
    """Both p of words that :func:`measured` gave once more, times weight (R, 1), in float32.

    Under TERMS all of a head may be tiny beside the largest power of a row, and its denominator shall be exact, too.
    bfloat16 has the range; of float16 tokens the words are roots of p, times 2^8.
    """
    if TERMS and dtype == gl.float16:
        low, high = halves(words, gl.float16)
        weight *= 0.5 ** (2 * ROOT)
        return low * low * weight, high * high * weight
    else:
        low, high = halves(words, gl.bfloat16 if TERMS else gl.float16)
        return low * weight, high * weight


LARGER = {gl.bfloat16: "max.bf16x2 $0, $1, $2;", gl.float16: "max.f16x2 $0, $1, $2;"}


@gluon.constexpr_function
def larger_of(dtype):
    return LARGER[dtype]


@gluon.jit
def larger_bf16(x, y):
    """The larger of each two channels of words, passing over NaN."""
    return gl.inline_asm_elementwise(larger_of(gl.bfloat16), "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def larger_fp16(x, y):
    return gl.inline_asm_elementwise(larger_of(gl.float16), "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def larger(x, y, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        return larger_bf16(x, y)
    else:
        return larger_fp16(x, y)


@gluon.constexpr_function
def rectifying(dtype):
    return REGISTERS + RELU[dtype].format(z="$2") + "mov.f32 $0, x; mov.f32 $1, y; }"


@gluon.jit
def rectified(words, dtype: gl.constexpr):
    """The ReLU of both channels of words, float32."""
    return gl.inline_asm_elementwise(
        rectifying(dtype), "=&f,=&f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
