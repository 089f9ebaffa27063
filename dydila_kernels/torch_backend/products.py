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
TILE = 32
"""Rows of which a group of rows had better be a multiple: oneDNN compiles for each new size, in half a millisecond."""

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
    """``out = left right + bias``: (n, k), (k, m), out (n, m), bias (m,)."""
    if takes_onednn(left, left.numel() * right.shape[1]):
        return out.copy_(onednn(left, right, bias))
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``out += left right``: (n, k), (k, m), out (n, m)."""
    if takes_onednn(left, left.numel() * right.shape[1]):
        return out.add_(onednn(left, right))
    return torch.addmm(out, left, right, out=out)  # FlopCounterMode does not know addmm_


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right: (n, k), (k, m) -> (n, m)."""
    return onednn(left, right) if takes_onednn(left, left.numel() * right.shape[1]) else left @ right


def onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right + bias: (n, k), (k, m), bias (m,) -> (n, m)."""
    linear, count = torch.ops.mkldnn._linear_pointwise, -(-left.shape[1] // LONGEST)
    total: Tensor | None = None
    for part, weight in zip(left.tensor_split(count, 1), right.T.tensor_split(count, 1), strict=True):
        part, weight = dense(part), dense(weight)
        if total is None:
            total = linear(part, weight, bias, "none", [], "")
        else:
            total = linear.binary(part, total, weight, None, "add")
    assert total is not None
    return total


def dense(matrix: Tensor) -> Tensor:
    """As it is where rows or columns lie one after the other; of others oneDNN takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class LinearProduct(torch.autograd.Function):
    """``F.linear`` of x (..., d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x.flatten(0, -2), weight.T, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows, needed = ctx.saved_tensors, grad.flatten(0, -2), ctx.needs_input_grad
        multiplied = torch.matmul if torch.is_grad_enabled() else product  # a second derivative is torch's
        return (
            multiplied(rows, weight).view(x.shape) if needed[0] else None,
            multiplied(rows.T, x.flatten(0, -2)) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x (..., d), outside of autocast."""
    fast = takes_onednn(x, x.numel() * len(weight)) and weight.dtype == x.dtype and weight.device == x.device
    if fast and type(x) is Tensor and not takes_plain_path(x, weight):
        return LinearProduct.apply(x, weight, bias)
    return F.linear(x, weight, bias)
