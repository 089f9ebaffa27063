"""The layer without gradients, block by block, on the torch backend.

A block's projections, attention, convolution and output projection follow each other while it is in the caches.  Of
the tensors between x and y only V, which the convolution needs around a block, is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydila_kernels.functional import choose_backend
from dydila_kernels.torch_backend import (
    At,
    Block,
    Call,
    Grid,
    Options,
    accumulation_dtype,
    autocast_dtype,
    depthwise_block,
    takes_plain_path,
)

if TYPE_CHECKING:
    from dydila_kernels.attention import DyDiLAttention


def applies(attn: DyDiLAttention, x: Tensor) -> bool:
    """Whether nothing needs the tensors in between: no gradient, transform, autocast or replaced ``qkv``."""
    if torch.is_grad_enabled() or takes_plain_path(x) or autocast_dtype(x.device) is not None:
        return False
    # Blocks multiply by the rows of qkv.weight that they need; other modules, hooks and quantised weights want a call.
    qkv = attn.qkv
    plain = type(qkv) is nn.Linear and type(qkv.weight) in (nn.Parameter, Tensor)
    hooked = qkv._forward_hooks or qkv._forward_pre_hooks
    return plain and not hooked and choose_backend(attn.backend, x.device, x.dtype) == "torch"


class Made:
    """A (B, N, d) tensor of which a block is made when it is asked for."""

    def __init__(self, make: Callable[[At], Tensor]) -> None:
        self.make = make

    def __getitem__(self, at: At, /) -> Tensor:
        return self.make(at)


def attend(
    attn: DyDiLAttention, x: Tensor, mask: Tensor | None, grids: Sequence[Grid], cu_seqlens: Sequence[int] | None
) -> Tensor:
    """Eqs. 1-9 and the output projection for checked arguments: x (B, N, d), zero where the mask has no token."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    values = torch.empty_like(y) if attn.dwc is not None else None
    weights = attn.qkv.weight.chunk(3)
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)

    def linear(part: int, at: At) -> Tensor:
        return F.linear(x[at], weights[part], biases[part])

    def value(at: At) -> Tensor:
        v = linear(2, at)
        if mask is not None:
            v = v.masked_fill(~mask[at][..., None], 0)
        if values is not None:
            values[at] = v  # a block of keys comes before the queries whose convolution needs it
        return v

    projected: list[Callable[[At], Tensor] | None] = [partial(linear, 0), partial(linear, 1), value, None, None]
    if attn.projection_q is not None and attn.projection_k is not None:
        q_redundant, k_redundant = attn.projection_q, attn.projection_k
        routed = [lambda at: q_redundant(x[at]), lambda at: k_redundant(x[at])]
        projected = [*projected[:3], *routed] if attn.differential is not None else [*routed, value, None, None]

    kernel: tuple[Tensor, Tensor | None] | None = None
    if attn.dwc is not None:
        dtype = accumulation_dtype(x.dtype)
        weight, bias = attn.dwc.fused_weight()
        kernel = weight.to(dtype), None if bias is None else bias.to(dtype)

    def finish(block: Block, tokens: Tensor) -> None:
        if values is not None and kernel is not None:
            depthwise_block(tokens, values, *kernel, grids, *block.at)
        y[block.at] = attn.proj(tokens)

    arguments = attn._core_arguments()
    call = Call(
        Options(**{name: arguments[name] for name in Options._fields}),
        cu_seqlens,
        mask,
        [None if make is None else Made(make) for make in projected],
        [arguments[name] for name in ("gamma", "lam", "kernel_routers", "differential_routers")],
        x,
        disposable=True,
    )
    call.forward(finish, lambda block, indices: None)
    return y
