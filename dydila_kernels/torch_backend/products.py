"""Matrix products: by torch, or on a CPU with AVX-512 by oneDNN itself.

For float32 torch asks MKL, which leaves AVX-512 unused on AMD's processors; oneDNN, which is in torch as well, does not
ask who made the processor, and takes half the time there.  ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dydila_kernels.torch_backend.blocks import takes_plain_path

SMALLEST = 2**23
"""Multiplications from which on oneDNN is faster, for all that it takes 9 microseconds to call it."""
LONGEST = 384
"""Products that oneDNN is to add up one after the other.  MKL begins anew after 192, and so rounds less, to 0.7 of the
error; shorter sums than these would cost a tenth of the speed."""
TILE, MOST = 32, 1024
"""Rows that oneDNN gets: multiples of the one, no more than the other.  For each number it compiles anew, in half a
millisecond, and keeps up to two megabytes; torch multiplies the few rows that are left, which groups of rows avoid."""

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def takes_onednn(like: Tensor, multiplications: int) -> bool:
    """Whether a product of so many multiplications of tensors such as this is oneDNN's."""
    return (
        HAS_ONEDNN
        and multiplications >= SMALLEST
        and like.dtype == torch.float32
        and like.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._len_torch_dispatch_stack()  # where a mode looks on, it is to see what it knows
    )


def group_tile(rows: Tensor, weight: Tensor) -> int:
    """Of what groups of rows (m, k) are to be multiples, one for each of the matrices (n, k, l) of ``weight``."""
    return TILE if takes_onednn(rows, len(rows) * weight[0].numel() // len(weight)) else 1


def multiply(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out = left right + bias``: (n, k), (k, m), out (n, m), bias (m,), or ``out`` itself."""
    take = by_onednn if takes_onednn(left, left.numel() * right.shape[1]) else by_torch
    return take(left, right, out, bias)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``out += left right``: (n, k), (k, m), out (n, m)."""
    return multiply(left, right, out, out)


def by_torch(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None) -> Tensor:
    """``out = left right + start``, which may be ``out``."""
    if start is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(start, left, right, out=out)  # FlopCounterMode does not know addmm_


def by_onednn(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None) -> Tensor:
    """The same: whole tiles by oneDNN, and what is left of either length by torch."""
    adds, (n, k) = start is out, left.shape
    depth = k - k % TILE
    rows = n - n % TILE if depth else 0
    # What lies by columns, as a weight's gradient has it, would be copied if it were cut; its n is the model's width.
    most = MOST if left.is_contiguous() else n
    for first in range(0, rows, most):
        strip = slice(first, min(first + most, rows))
        product, there = onednn(left[strip, :depth], right[:depth], None if adds else start), out[strip]
        if depth < k:
            by_torch(left[strip, depth:], right[depth:], product, product)
        there.add_(product) if adds else there.copy_(product)
    if rows < n:
        rest = out[rows:]
        by_torch(left[rows:], right, rest, rest if adds else start)
    return out


def onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right + bias: (n, k), (k, m), bias (m,) -> (n, m)."""
    linear = torch.ops.mkldnn._linear_pointwise
    first, *others = zip(left.split(LONGEST, 1), right.T.split(LONGEST, 1), strict=True)
    total: Tensor = linear(*map(dense, first), bias, "none", [], "")
    for part, weight in others:
        total = linear.binary(dense(part), total, dense(weight), None, "add")
    return total


def dense(matrix: Tensor) -> Tensor:
    """As it is where rows or columns lie one after the other; of others oneDNN takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class LinearProduct(torch.autograd.Function):
    """``F.linear`` of x (..., d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, -2)
        return multiply(rows, weight.T, x.new_empty(len(rows), len(weight)), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows, needed = ctx.saved_tensors, grad.flatten(0, -2), ctx.needs_input_grad

        def product(left: Tensor, right: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return left @ right  # for a second derivative
            return multiply(left, right, left.new_empty(len(left), right.shape[1]))

        return (
            product(rows, weight).view(x.shape) if needed[0] else None,
            product(rows.T, x.flatten(0, -2)) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x (..., d), outside of autocast."""
    fast = takes_onednn(x, x.numel() * len(weight)) and weight.dtype == x.dtype and weight.device == x.device
    if fast and type(x) is Tensor and not takes_plain_path(x, weight):
        return LinearProduct.apply(x, weight, bias)
    return F.linear(x, weight, bias)
