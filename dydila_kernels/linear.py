"""The shared projections ``qkv`` and ``proj``: a product, where calling the module is no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels import torch_backend
from dydila_kernels.checks import is_plain
from dydila_kernels.precision import autocast_dtype
from dydila_kernels.torch_backend.blocks import takes_plain_path


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for x (B, N, d)."""
    # (Elsewhere than on a CPU the product is the module's own.)
    other = x.device.type != "cpu" or torch.compiler.is_compiling() or autocast_dtype(x.device) is not None
    if not other and isinstance(module, nn.Linear) and is_plain(module, nn.Linear):
        return torch_backend.linear(x, module.weight, module.bias)
    out: Tensor = module(x)
    return out


class Thirds(torch.autograd.Function):
    """qkv (B, N, 3d) -> Q, K, V (B, N, d), views."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.chunk(3, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = None if torch.is_grad_enabled() else side_by_side(grads)
        return torch.cat(grads, -1) if whole is None else whole


def thirds(qkv: Tensor) -> tuple[Tensor, ...]:
    """``qkv.chunk(3, -1)``, whose gradient is not copied where those of the parts lie side by side."""
    known = type(qkv) is Tensor and qkv.requires_grad and torch.is_grad_enabled() and not takes_plain_path(qkv)
    return Thirds.apply(qkv) if known else qkv.chunk(3, -1)


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor (.., 3d) that these (.., d) are the thirds of, a view; or None, where they are not."""
    first, *others = parts
    width, place, strides = first.shape[-1], first.storage_offset(), first.stride()
    if strides[-1] != 1 or any(stride < width * len(parts) for stride in strides[:-1]):
        return None
    for i, part in enumerate(others, 1):
        same = part.stride() == strides and part.dtype == first.dtype
        if not same or part.data_ptr() != first.data_ptr() + i * width * first.element_size():
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    return first.as_strided((*first.shape[:-1], width * len(parts)), strides, place)
