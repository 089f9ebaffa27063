"""Q, K, V as the thirds of what the projection ``qkv`` makes, whose gradient nobody has to put together.

The kernels write the gradients of tokens as the tokens lie: those of thirds side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blocks import takes_plain_path


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
    """The tensor (.., n d) that these n (.., d) are the parts of, a view; or None, where they are not."""
    first, width = parts[0], parts[0].shape[-1]
    storage, place, strides = first.untyped_storage().data_ptr(), first.storage_offset(), first.stride()
    if strides[-1] != 1 or any(stride < width * len(parts) for stride in strides[:-1]):
        return None
    for i, part in enumerate(parts):
        if part.dtype != first.dtype or part.shape != first.shape or part.stride() != strides:
            return None
        if part.storage_offset() != place + i * width or part.untyped_storage().data_ptr() != storage:
            return None
    return first.as_strided((*first.shape[:-1], width * len(parts)), strides, place)
