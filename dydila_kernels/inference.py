"""The layer without gradients, block by block, on the torch backend.

A block's projections, attention, convolution and output projection follow each other while it is in the caches.  No
tensor between x and y is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dydila_kernels.torch_backend import (
    At,
    Block,
    Call,
    Grid,
    Options,
    ValueBlocks,
    accumulation_dtype,
    autocast_dtype,
    choices_of_two,
    project_block,
    scratch,
    states_pay,
    takes_plain_path,
)

if TYPE_CHECKING:
    from dydila_kernels.attention import DyDiLAttention
    from dydila_kernels.projection import DynamicProjection


def applies(attn: DyDiLAttention, x: Tensor) -> bool:
    """Whether nothing needs the tensors in between: no gradient, transform, autocast or replaced projection."""
    if torch.is_grad_enabled() or autocast_dtype(x.device) is not None or takes_plain_path(x):
        return False
    if attn._backend(x) == "triton":
        return False
    if attn.normalization == "denominator":  # whose scale of the keys takes a pass of its own over all of them
        return False
    # Hooks, and layers other than a plain nn.Linear, expect one call with all of the tokens.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in attn.modules() if m is not attn)
    return is_plain(attn.qkv) and is_plain(attn.proj) and not hooked


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is a matrix product with its weight: not replaced, parametrised or quantised."""
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``F.linear`` of a block x (b, n, d) into a block of a contiguous tensor."""
    rows, columns = x.flatten(0, 1), out.view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.T, out=columns)
    else:
        torch.addmm(bias, rows, weight.T, out=columns)


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
    dtype = accumulation_dtype(x.dtype)
    weights = attn.qkv.weight.chunk(3)
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)

    def place(name: str, side: str, at: At) -> Tensor:
        # Only where the states do not pay is a block of keys held together with its queries (Call.walk).
        rows = x[at]
        shared = states_pay(rows.shape[1], attn.dim, attn.num_heads)
        return scratch.take(name if shared else f"{name} {side}", rows.shape, rows.dtype, rows.device)

    def linear(part: int, side: str, at: At) -> Tensor:
        out = place("tokens", side, at)
        linear_into(out, x[at], weights[part], biases[part])
        return out

    def value(at: At) -> Tensor:
        v = place("values", "v", at) if values is None else values.take(*at)
        linear_into(v, x[at], weights[2], biases[2])
        if mask is not None:
            v.masked_fill_(~mask[at][..., None], 0)
        if values is not None:
            values.convolve(at[1])
        return v

    def routed(projection: DynamicProjection, side: str, at: At) -> Tensor:
        # Asked for twice, first for one side and then for the other.
        where = at[0].start, at[1].start
        if where not in choices:
            choices[where] = dict(zip("qk", choices_of_two(x[at].to(dtype), routers), strict=True))
        out, index = place("redundant", side, at), choices[where].pop(side)
        project_block(out, x[at], projection.weight, index)
        return out

    projected: list[Callable[[At], Tensor] | None] = [
        partial(linear, 0, "q"),
        partial(linear, 1, "k"),
        value,
        None,
        None,
    ]
    choices: dict[tuple[int, int], dict[str, Tensor]] = {}
    if attn.projection_q is not None and attn.projection_k is not None:
        routers = torch.cat([attn.projection_q.router, attn.projection_k.router], 1).to(dtype).mT.contiguous().mT
        redundant = [partial(routed, attn.projection_q, "q"), partial(routed, attn.projection_k, "k")]
        projected = [*projected[:3], *redundant] if attn.differential is not None else [*redundant, value, None, None]

    # Keys, and with them the values, come before the queries of an image: until the output takes its place, y holds
    # the convolution.
    values: ValueBlocks | None = None
    if attn.dwc is not None:
        weight, bias = attn.dwc.fused_weight()
        values = ValueBlocks(y, weight.to(dtype), None if bias is None else bias.to(dtype), grids)

    def finish(block: Block, tokens: Tensor) -> None:
        if values is not None:
            tokens.add_(y[block.at])
        linear_into(y[block.at], tokens, attn.proj.weight, attn.proj.bias)

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
