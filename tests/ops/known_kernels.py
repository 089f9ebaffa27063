"""Kernels whose speed on an H100 is known, for ``test_prediction.py``, which predicts them in another process.

The known figures are those that their authors and others publish; they are of an H100 SXM with 3.35 TB/s, the model's
memory is that of an H200, so what is bound by memory is compared with the bandwidth that the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.offline.compiling import TARGETS, compiled, nvidia, record
from benchmarks.offline.prediction.launches import prediction_of
from benchmarks.offline.prediction.machine import H200
from dydila_kernels.ops.configs import Config
from dydila_kernels.ops.tiles import launch


@triton.jit
def copy_kernel(X, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def softmax_kernel(X, OUT, C: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, C)
    x = tl.load(X + at).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + at, (x / tl.sum(x, 0)).to(OUT.dtype.element_ty))


@triton.jit
def matmul_kernel(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    across = tl.cdiv(N, BN)
    m, n = tl.program_id(0) // across, tl.program_id(0) % across
    rm, rn, rk = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    a = A + rm[:, None] * K + rk[None, :]
    b = B + rk[:, None] * N + rn[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(a), tl.load(b), acc)
        a += BK
        b += BK * N
    tl.store(C + rm[:, None] * N + rn[None, :], acc.to(tl.bfloat16))


@triton.jit
def attention_kernel(Q, K, V, OUT, scale, L: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    base = tl.program_id(1) * L * E
    m, e, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, E), tl.arange(0, BN)
    q = tl.load(Q + base + m[:, None] * E + e[None, :])
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.full((BM,), 1.0, tl.float32)
    acc = tl.zeros((BM, E), tl.float32)
    for start in range(0, L, BN):
        scores = tl.dot(q, tl.load(K + base + (start + n)[None, :] * E + e[:, None]))
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new[:, None])
        alpha = tl.exp2(largest - new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.bfloat16), tl.load(V + base + (start + n)[:, None] * E + e[None, :]), acc * alpha[:, None])
        largest = new
    tl.store(OUT + base + m[:, None] * E + e[None, :], (acc / total[:, None]).to(tl.bfloat16))


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def copy(n: int = 2**27) -> None:
    launch(copy_kernel, (n // 1024,), Config(1, 1024, 4), X=empty(n), OUT=empty(n), n=n, BLOCK=1024)


def softmax(rows: int = 32768, columns: int = 4096) -> None:
    x, out = empty(rows, columns), empty(rows, columns)
    launch(softmax_kernel, (rows,), Config(1, columns, 4), X=x, OUT=out, C=columns)


def matmul(m: int = 8192, columns: int = 256, warps: int = 8) -> None:
    launch(
        matmul_kernel, (m // 128 * (m // columns),), Config(128, columns, warps, 3), A=empty(m, m), B=empty(m, m),
        C=empty(m, m), M=m, N=m, K=m, BM=128, BN=columns, BK=64,
    )  # fmt: skip


def attention(e: int, heads: int, columns: int, warps: int, length: int = 16384) -> None:
    q, k, v, out = (empty(heads, length, e) for _ in range(4))
    launch(
        attention_kernel, (length // 128, heads), Config(128, columns, warps, 3), Q=q, K=k, V=v, OUT=out, scale=1.0,
        L=length, E=e, BM=128, BN=columns,
    )  # fmt: skip


CALLS: dict[str, tuple[Callable[[], None], float]] = {
    "copy": (copy, 0),
    "softmax": (softmax, 0),
    "matmul 128": (lambda: matmul(columns=128, warps=4), 2 * 8192**3),
    "matmul 256": (matmul, 2 * 8192**3),
    "attention 64": (lambda: attention(64, 32, 128, 4), 4 * 32 * 16384**2 * 64),
    "attention 128": (lambda: attention(128, 16, 64, 8), 4 * 16 * 16384**2 * 128),
}
"""A call, and its floating-point operations where these are what counts."""


def predict() -> dict[str, dict[str, Any]]:
    """Of each call the microseconds, those for its bytes at the bandwidth of the model, and TFLOP/s."""
    found = {}
    for name, (call, operations) in CALLS.items():
        (job,) = record(call, {}, "sm_90", TARGETS["sm_90"])
        assert job.launch is not None
        kernel = compiled(job)
        p = prediction_of(kernel, nvidia(kernel.asm["cubin"])["registers"], job.config["num_warps"], job.launch, H200)
        found[name] = {"us": p.microseconds, "floor": p.floor, "tflops": operations / p.microseconds / 1e6,
                       "binds": p.binds, "loops": p.loops, "instructions": p.instructions}  # fmt: skip
    return found
