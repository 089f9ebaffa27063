"""The interpreter, as corrected by tests/interpreter.py, computes what a GPU computes."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
import triton.language as tl

from dydila_kernels.ops.tiles import first_largest, router_dot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def dot_kernel(A, B, C, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    a = tl.load(A + tile)
    b = tl.load(B + tile)
    tl.store(C + tile, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def router_dot_kernel(Z, R, C):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    acc = tl.zeros((16, 16), tl.float32)
    tl.store(C + tile, router_dot(tl.load(Z + tile), tl.load(R + tile), acc, "ieee"))


@triton.jit
def convert_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    tl.store(Y + i, x.to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(X, Y, SUM, LARGER, IS_LESS):
    i = tl.arange(0, 16)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    tl.store(SUM + i, x + y)
    tl.store(LARGER + i, tl.maximum(x, y))
    tl.store(IS_LESS + i, (x < y).to(tl.int8))


@triton.jit
def add_up(x, bound):
    total = tl.zeros((16,), tl.int32)
    for j in range(1, bound, 2):
        total += x + j
    return total


@triton.jit
def range_kernel(BOUNDS, Y, n):
    i = tl.arange(0, 16)
    tl.store(Y + i, add_up(i, n) + add_up(i, tl.load(BOUNDS)))


@triton.jit
def choose_kernel(X, FIRST, COUNT, NUM_OPTIONS: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(X + i[:, None] * 16 + i[None, :])
    first = first_largest(x, NUM_OPTIONS)
    tl.store(FIRST + i, first)
    tl.store(COUNT + i, tl.cumsum(first, axis=0))


@triton.jit
def logarithm_kernel(X, Y):
    i = tl.arange(0, 16)
    tl.store(Y + i, tl.exp2(0.5 * tl.log2(tl.load(X + i))))


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_of_half_precision(dtype: torch.dtype) -> None:
    a, b, c = floats(16, 16, dtype=dtype), floats(16, 16, dtype=dtype), floats(16, 16)
    dot_kernel[(1,)](a, b, c, "ieee")
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_dot_of_float32(precision: str) -> None:
    a, b, c = floats(16, 16), floats(16, 16), floats(16, 16)
    dot_kernel[(1,)](a, b, c, precision)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_router_dot_is_exact_to_float32() -> None:
    z, router, c = floats(16, 16, dtype=torch.bfloat16), floats(16, 16), floats(16, 16)
    router_dot_kernel[(1,)](z, router, c)
    torch.testing.assert_close(c.double(), z.double() @ router.double(), rtol=1e-6, atol=2e-6)


def all_kinds_of_floats() -> torch.Tensor:
    """Around each tie of bf16, both zeros, subnormals, the largest values, infinities, NaN with any payload."""
    high = torch.randint(0, 2**16, (20_000, 1), dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    special = torch.tensor([0, 0x80000000, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF])
    bits = torch.cat([(high + low).flatten(), special])
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32).to(DEVICE)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_conversions_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    x = all_kinds_of_floats().to(source)
    y = torch.empty_like(x, dtype=target)
    convert_kernel[(1,)](x, y, len(x), triton.next_power_of_2(len(x)))
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_of_bf16() -> None:
    x, y = floats(16, dtype=torch.bfloat16), floats(16, dtype=torch.bfloat16)
    total, larger, is_less = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    arithmetic_kernel[(1,)](x, y, total, larger, is_less)
    assert torch.equal(total, x + y)
    assert torch.equal(larger, torch.maximum(x, y))
    assert torch.equal(is_less.bool(), x < y)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_loops_with_run_time_bounds(n: int) -> None:
    y = torch.empty(16, dtype=torch.int32, device=DEVICE)
    range_kernel[(1,)](torch.tensor([n], device=DEVICE), y, n)
    i = torch.arange(16, device=DEVICE)
    assert torch.equal(y, sum((2 * (i + j) for j in range(1, n, 2)), start=0 * i).int())


def test_ties_go_to_the_lowest_index_and_running_sums() -> None:
    x = torch.randint(0, 3, (16, 16), device=DEVICE).float()
    x[:, 9:] = 5.0  # beyond the options: must not be taken
    first, count = torch.empty(16, dtype=torch.int32, device=DEVICE), torch.empty(16, dtype=torch.int32, device=DEVICE)
    choose_kernel[(1,)](x, first, count, 9)
    expected = torch.tensor([row.index(max(row)) for row in x[:, :9].tolist()], dtype=torch.int32, device=DEVICE)
    assert torch.equal(first, expected)
    assert torch.equal(count, expected.cumsum(0, dtype=torch.int32))


def test_logarithm_of_zero_is_silent() -> None:
    x = torch.arange(16, dtype=torch.float32, device=DEVICE)
    y = torch.empty_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logarithm_kernel[(1,)](x, y)
    torch.testing.assert_close(y, x.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_poisoned_memory(poisoned: None, dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(3), like.new_empty((2, 2))):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int8) == 127).all()
    assert (torch.zeros(1).new_empty(3, dtype=torch.int64) == 2**63 - 1).all()
