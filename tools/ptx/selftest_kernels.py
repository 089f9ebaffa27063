"""Small kernels for the self-test, some wrong on purpose."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def copy(X, Y, N, EXTRA: tl.constexpr, B: tl.constexpr):
    """Reads EXTRA elements too many."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(Y + i, tl.load(X + i, mask=i < N + EXTRA, other=0), mask=i < N)


@triton.jit
def everyone_writes(X, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y + i, tl.load(X + i) + tl.program_id(0))


@triton.jit
def mirror_in_place(X, B: tl.constexpr, BARRIER: tl.constexpr):
    """X reversed, plus 1."""
    i = tl.arange(0, B)
    x = tl.load(X + i)
    tl.store(X + i, x + 1)
    if BARRIER:
        tl.debug_barrier()
    y = tl.load(X + B - 1 - i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(X + i, y)


@triton.jit
def softmax(X, Y, N, B: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    x = tl.load(X + r * N + i, mask=i < N, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(Y + r * N + i, (e / tl.sum(e, axis=0)).to(Y.dtype.element_ty), mask=i < N)


@triton.jit
def matmul(A, B, C, M, N, K, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(A + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(B + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(C + m[:, None] * N + n[None, :], acc.to(C.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_transposed(A, B, C, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a = tl.load(A + k[:, None] * BM + m[None, :])
    b = tl.load(B + n[:, None] * BK + k[None, :])
    tl.store(C + m[:, None] * BN + n[None, :], tl.dot(tl.trans(a), tl.trans(b), input_precision=PRECISION))


@triton.jit
def arithmetic(X, INTEGERS, Y, OUT, N, B: tl.constexpr):
    i = tl.arange(0, B)
    x, k = tl.load(X + i), tl.load(INTEGERS + i)
    y = tl.where(x > 0, libdevice.fast_log2f(x), tl.exp2(x)) + tl.sqrt(tl.abs(x)) / (1 + x * x)
    y = tl.where(k % 3 == 1, -y, y) + (k // 7).to(tl.float32) + tl.cumsum(x, axis=0)
    total = k * 0
    for j in range(0, N):
        total += (k * 5 - j) % (j + 2)
    largest = tl.argmax(tl.reshape(x, (B // 16, 16)), axis=1, tie_break_left=True)
    tl.store(Y + i, y)
    tl.store(OUT + i, total + (k.to(tl.int8)).to(tl.int32))
    tl.store(OUT + B + tl.arange(0, B // 16), largest)


@triton.jit
def uneven_loop(LENGTHS, Y, B: tl.constexpr):
    """Programs that loop a different number of times, over a barrier in each step."""
    n = tl.load(LENGTHS + tl.program_id(0))
    i = tl.arange(0, B)
    x = i.to(tl.float32) + tl.program_id(0)
    for j in range(0, n):
        x = x + tl.sum(x, axis=0) * 0.001 + j
    tl.store(Y + tl.program_id(0) * B + i, x)
