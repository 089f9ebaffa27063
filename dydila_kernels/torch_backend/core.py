"""Eqs. 5-8 and 10 as one function with gradients, over the blocks of :mod:`dydila_kernels.torch_backend.blockwise`.

The backward pass walks the same blocks, runs each again from its inputs with the routing decisions of the forward and
differentiates it on the spot.  Saved for it are the inputs, the decisions (one byte each) and the states of long
images: memory beyond inputs and outputs does not grow with N.  Where ranks share the tokens, the gradients of the
states are summed over them between the two walks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.precision import accumulation_dtype, no_autocast
from dydila_kernels.torch_backend.backward import Backward
from dydila_kernels.torch_backend.blocks import differentiable_gradients, takes_plain_path, workspace
from dydila_kernels.torch_backend.blockwise import At, BlockwiseForward, Decisions, pack
from dydila_kernels.torch_backend.depthwise import depthwise
from dydila_kernels.torch_backend.tokens import Indices
from dydila_kernels.types import Convolution, CoreInputs, Options, Ranks, decision_names

INPUTS = 5
"""The first fields of :class:`CoreInputs` are tokens, the others tables."""
TOKENS = INPUTS + 2
"""What a call is cut from: those tokens, and cos and sin of the rotary embeddings."""


class Attention(torch.autograd.Function):
    """The core, differentiable with respect to all tensors: the fields of :class:`CoreInputs`, and after the tokens
    among them cos and sin (B, N, e), or None twice.  The options hold no tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        cu_seqlens: Sequence[int] | None,
        ranks: Ranks | None,
        mask: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        like = tensors[0]
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        with workspace() as memory:
            call = BlockwiseForward(options, mask, cu_seqlens, tensors[:TOKENS], tensors[TOKENS:], like, memory, ranks)
            decisions = Decisions.of(call)
            totals = call.forward(lambda block, tokens: out[block.at].copy_(tokens), decisions.write)
        ctx.options, ctx.cu_seqlens, ctx.ranks = options, cu_seqlens, ranks
        ctx.save_for_backward(mask, *tensors, *decisions.tensors.values(), pack(totals, call.tables.gamma))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        fields = len(CoreInputs._fields) + 2
        tensors, taken, states = saved[:fields], saved[fields:-1], saved[-1]
        decisions = Decisions(decision_names(ctx.options.differential), taken)
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            if ctx.ranks is not None:
                raise RuntimeError("tokens on several ranks have no second derivatives (create_graph=True)")

            def plain(*tensors: Any) -> Tensor:
                inputs, rotary = CoreInputs(*tensors[:INPUTS], *tensors[TOKENS:]), tensors[INPUTS:TOKENS]
                options = ctx.options if rotary[0] is None else ctx.options._replace(rotary=rotary)
                return plain_attention(inputs, options, mask, ctx.cu_seqlens, decisions.tensors)

            return None, None, None, None, *differentiable_gradients(plain, tensors, needed, grad)

        tokens: list[Tensor | None] = [None if t is None else t.detach() for t in tensors[:TOKENS]]
        totals: list[Tensor | None] = [
            # Rows of the tokens are written once, by one block.
            (torch.empty_like if i < INPUTS else torch.zeros_like)(t, memory_format=torch.contiguous_format)
            if need and t is not None
            else None
            for i, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        with workspace() as memory, no_autocast(grad.device):
            call = BlockwiseForward(
                ctx.options, mask, ctx.cu_seqlens, tokens, tensors[TOKENS:], tensors[0], memory, ctx.ranks
            )
            tables = [None if t is None else t.to(call.dtype) for t in totals[TOKENS:]]
            receivers = [
                None if t is None else partial(write if i < INPUTS else add, t) for i, t in enumerate(totals[:TOKENS])
            ]
            Backward(call, decisions, receivers, tables).run(states, grad)
        totals[TOKENS:] = tables
        grads = [None if total is None else total.to(t.dtype) for total, t in zip(totals, saved[:fields], strict=True)]
        return None, None, None, None, *grads


def write(total: Tensor, at: At, gradient: Tensor) -> None:
    total[at] = gradient


def add(total: Tensor, at: At, gradient: Tensor) -> None:
    total[at] += gradient


def plain_attention(
    inputs: CoreInputs,
    options: Options,
    mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
    indices: Indices | None = None,
) -> Tensor:
    """The reference equations in the accumulation dtype, in one piece."""
    dtype = accumulation_dtype(inputs.q.dtype)
    tensors: Any = inputs
    cast: list[Any] = [None if t is None else t.to(dtype) for t in tensors]
    q, k, v, q_redundant, k_redundant, gamma, lam, kernel_routers, differential_routers = cast
    rotary = options.rotary and (options.rotary[0].to(dtype), options.rotary[1].to(dtype))
    out = reference.dydila_attention(
        q,
        k,
        v,
        q_redundant,
        k_redundant,
        gamma=gamma,
        lam=lam,
        kernel_routers=kernel_routers,
        differential_routers=differential_routers,
        mask=mask,
        cu_seqlens=cu_seqlens,
        rotary=rotary,
        rotary_pairing=options.rotary_pairing,
        indices=None if indices is None else {name: index.long() for name, index in indices.items()},
        num_heads=options.num_heads,  # the Dynamo of torch 2.9 and older does not follow _asdict()
        normalization=options.normalization,
        router_gradient=options.router_gradient,
        differential=options.differential,
    )
    return out.to(inputs.q.dtype)


def attend(
    inputs: CoreInputs,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    convolution: Convolution | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Eqs. 5-8 (or 10), and with ``convolution`` Eq. 9, for validated arguments: (B, N, d), contiguous.

    mask (B, N) bool: tokens without are not attended to and their values count as zero.  Raises RuntimeError where
    ``ranks`` meet a tracer, torch.func or forward-mode AD.
    """
    v, rotary = inputs.v, options.rotary or (None, None)
    with no_autocast(v.device):
        if takes_plain_path(*inputs, *rotary):
            if ranks is not None:
                raise RuntimeError("tokens on several ranks take no tracer, torch.func or forward-mode AD")
            out = plain_attention(inputs, options, mask, cu_seqlens)
        else:
            choices = options._replace(rotary=None)
            out = Attention.apply(choices, cu_seqlens, ranks, mask, *inputs[:INPUTS], *rotary, *inputs[INPUTS:])
    if convolution is None:
        return out
    if type(out) is not Tensor:  # what torch wraps is a view, and not to be written into
        out = out.clone()
    return depthwise(out, v if mask is None else v.masked_fill(~mask[..., None], 0), convolution)


@torch.no_grad()
def decisions(
    inputs: CoreInputs,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Indices:
    """The routing decisions that :func:`attend` takes for the same arguments, (B, N) integers each."""
    q = inputs.q
    with no_autocast(q.device), workspace() as memory:
        tokens, tables = (*inputs[:INPUTS], None, None), inputs[INPUTS:]
        call = BlockwiseForward(options, mask, cu_seqlens, tokens, tables, q, memory)
        taken = Decisions.of(call)
        for keys, queries in call.walk():
            for block in keys + queries:
                indices: Indices = {}
                block.sides(block.cut(), indices)
                taken.write(block, indices)
    return taken.tensors
