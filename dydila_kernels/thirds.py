"""Q, K, V as the thirds of what the projection ``qkv`` makes, whose gradient nobody has to put together.

The kernels write the gradients of such thirds side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels.checks import is_plain
from dydila_kernels.linear import linear
from dydila_kernels.torch_backend.blocks import takes_plain_path


class Thirds(torch.autograd.Function):
    """qkv (B, N, 3d) -> Q, K, V (B, N, d), views."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return qkv.chunk(3, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None
        parts = [torch.zeros_like(given[0]) if grad is None else grad for grad in grads]
        whole = None if torch.is_grad_enabled() else joined(parts)
        return torch.cat(parts, -1) if whole is None else whole


def thirds(qkv: Tensor) -> tuple[Tensor, ...]:
    """``qkv.chunk(3, -1)``, whose gradient is not copied where those of the parts lie side by side."""
    known = type(qkv) is Tensor and qkv.requires_grad and torch.is_grad_enabled() and not takes_plain_path(qkv)
    return Thirds.apply(qkv) if known else qkv.chunk(3, -1)


def thirds_of(qkv: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Q, K, V (B, N, d) of x (B, N, d).  What is hooked or replaced may want a gradient in memory of its own."""
    tokens = linear(qkv, x)
    return thirds(tokens) if tokens.requires_grad and is_plain(qkv, nn.Linear) else tokens.chunk(3, -1)


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor (.., n d) whose parts (.., d) these are, in their memory; None where they do not lie side by side."""
    first, width = parts[0], parts[0].shape[-1]
    storage, place, strides = first.untyped_storage().data_ptr(), first.storage_offset(), first.stride()
    if strides[-1] != 1 or any(stride < width * len(parts) for stride in strides[:-1]):
        return None
    for i, part in enumerate(parts):
        if part.dtype != first.dtype or part.shape != first.shape or part.stride() != strides:
            return None
        if part.storage_offset() != place + i * width or part.untyped_storage().data_ptr() != storage:
            return None
    # No view, whose base would know of its changes.
    return first.new_empty(0).set_(first.untyped_storage(), place, (*first.shape[:-1], width * len(parts)), strides)
