"""The attention core over blocks: Eqs. 5-8 and 10 from q, k, v, q', k' to the output of the attention.

Images that fit a block are attended whole.  A longer image is walked twice: over its keys, adding up the states,
and over its queries, reading them out.  The backward pass walks the same blocks, runs each again from its inputs with
the routing decisions of the forward and differentiates it on the spot.  Saved for it are the inputs, the decisions
(one byte each) and the states of long images: memory beyond inputs and outputs does not grow with N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import accumulation_dtype, all_blocks, no_autocast, takes_plain_path
from dydila_kernels.torch_backend.linear_attention import readout, states_of, whole_attention
from dydila_kernels.torch_backend.tokens import Indices, Options, Tables, Tokens, index_names, tokens_of

INPUTS_OF = {"queries": (0, 3), "keys": (1, 2, 4), "whole": (0, 1, 2, 3, 4)}
"""What a block computes from which of the inputs q, k, v, q', k'."""


class Block:
    """A range of rows of some images of a call."""

    def __init__(self, call: Call, kind: str, images: slice, rows: slice, scale: Tensor | float) -> None:
        self.call, self.kind, self.at, self.scale = call, kind, (images, rows), scale
        #: (b, n, d) blocks of q, k, v, q', k', None where this block has no use for it
        self.cut = [
            None if t is None or i not in INPUTS_OF[kind] else t[self.at] for i, t in enumerate(call.inputs)
        ]

    def sides(self, indices: Indices) -> tuple[Tokens | None, Tokens | None, Tensor | None]:
        """Queries, keys and values.  Decisions not found in ``indices`` are taken and put there."""
        call = self.call
        q, k, v, q_redundant, k_redundant = (self.load(t) for t in self.cut)
        queries = None if q is None else tokens_of("q", q, q_redundant, call.tables, call.options, indices)
        keys = None if k is None else tokens_of("k", k, k_redundant, call.tables, call.options, indices)
        return queries, keys, v

    def run(self, indices: Indices, states: list[Tensor]) -> list[Tensor]:
        """The output of "queries" and "whole" blocks, the share in the states of "keys" blocks."""
        queries, keys, v = self.sides(indices)
        options, dtype = self.call.options, self.call.tokens.dtype
        if queries is None:
            assert keys is not None and v is not None
            return states_of(keys, v, self.scale, options)
        if keys is None:
            return [readout(queries, states, options).to(dtype)]
        assert v is not None
        return [whole_attention(queries, keys, v, self.scale, options).to(dtype)]

    def load(self, block: Tensor | None) -> Tensor | None:
        """In the accumulation dtype, with zeros where the mask has no token."""
        if block is None:
            return None
        block = block.to(self.call.dtype)
        return block if self.call.mask is None else block.masked_fill(~self.call.mask[self.at][..., None], 0)


    def store(self, indices: Indices, decided: Indices) -> None:
        for name, index in indices.items():
            decided[name][self.at] = index


class Call:
    """The arguments of one call.  ``tensors`` are q, k, v, q', k' and the four of :class:`Tables`."""

    def __init__(
        self, options: Options, cu_seqlens: Sequence[int] | None, mask: Tensor | None, tensors: Sequence[Tensor | None]
    ) -> None:
        self.options, self.cu_seqlens, self.mask = options, cu_seqlens, mask
        # Detached: a block is differentiated on its own, with respect to leaves cut from these.
        self.inputs = [None if t is None else t.detach() for t in tensors[:5]]
        assert self.inputs[0] is not None
        self.tokens = self.inputs[0]
        self.dtype = accumulation_dtype(self.tokens.dtype)
        self.tables = Tables(*(None if t is None else t.detach().to(self.dtype) for t in tensors[5:]))  # type: ignore[arg-type]

    def walk(self) -> Iterator[tuple[list[Block], list[Block]]]:
        """Image after image (or several short ones): its blocks of keys, then its blocks of queries, or one whole block."""
        for images, ranges in all_blocks(self.tokens, self.cu_seqlens):
            scale = self.scale(images, slice(ranges[0].start, ranges[-1].stop))
            if len(ranges) == 1:
                yield [], [Block(self, "whole", images, ranges[0], scale)]
            else:
                yield (
                    [Block(self, "keys", images, rows, scale) for rows in ranges],
                    [Block(self, "queries", images, rows, scale) for rows in ranges],
                )

    def scale(self, images: slice, rows: slice) -> Tensor | float:
        """1/count of each image under "length", a number or (b, 1, 1, 1), else 1."""
        if self.options.normalization != "length":
            return 1.0
        if self.mask is None:
            return 1.0 / (rows.stop - rows.start)
        return self.mask[images, rows].sum(-1).clamp(min=1).to(self.dtype).reciprocal()[:, None, None, None]

    def empty_indices(self) -> Indices:
        """A (B, N) tensor for each routing decision."""
        routers = (self.tables.kernel_routers, self.tables.differential_routers)
        most = max(router.shape[-1] for router in routers if router is not None)
        dtype = torch.uint8 if most <= 256 else torch.int32
        return {
            name: torch.zeros(self.tokens.shape[:2], dtype=dtype, device=self.tokens.device)
            for name in index_names(self.options.differential)
        }


class Attention(torch.autograd.Function):
    """The core, differentiable with respect to all of its tensors: q, k, v, q', k' and the four of :class:`Tables`."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, cu_seqlens: Sequence[int] | None, mask: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        call = Call(options, cu_seqlens, mask, tensors)
        out = torch.zeros_like(call.tokens, memory_format=torch.contiguous_format)
        decided, all_states = call.empty_indices(), []

        def run(block: Block, states: list[Tensor]) -> list[Tensor]:
            indices: Indices = {}
            outputs = block.run(indices, states)
            block.store(indices, decided)
            return outputs

        for keys, queries in call.walk():
            states: list[Tensor] = []
            for block in keys:
                shares = run(block, [])
                states = [s.add_(share) for s, share in zip(states, shares, strict=True)] if states else shares
            for block in queries:
                out[block.at] = run(block, states)[0]
            all_states.append(states)

        ctx.options, ctx.cu_seqlens = options, cu_seqlens
        ctx.state_counts = [len(states) for states in all_states]
        ctx.save_for_backward(mask, *tensors, *decided.values(), *(s for states in all_states for s in states))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        tensors, saved = saved[:9], iter(saved[9:])
        decided = {name: next(saved) for name in index_names(ctx.options.differential)}
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            # A second derivative is wanted: one differentiable expression of the inputs themselves.
            out = plain_attention(ctx.options, ctx.cu_seqlens, mask, tensors, decided)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
            return None, None, None, *(next(grads) if need else None for need in needed)

        call = Call(ctx.options, ctx.cu_seqlens, mask, tensors)
        totals = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if t is not None and need else None
            for t, need in zip([*call.inputs, *call.tables], needed, strict=True)
        ]
        table_slots = [(t.requires_grad_(), total) for t, total in zip(call.tables, totals[5:], strict=True) if total is not None]

        def pull_back(block: Block, state_slots: list[Slot], cotangents: list[Tensor]) -> None:
            """Adds what this block contributes to the totals of the inputs, the tables and the states it reads."""
            slots = state_slots + table_slots
            for i, (t, total) in enumerate(zip(block.cut, totals[:5], strict=True)):
                if t is not None and total is not None:
                    block.cut[i] = leaf = t.detach().requires_grad_()
                    slots.append((leaf, total[block.at]))
            with torch.enable_grad():
                outputs = block.run(
                    {name: index[block.at] for name, index in decided.items()}, [state for state, _ in state_slots]
                )
            roots = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            if roots and slots:
                found = torch.autograd.grad(
                    [o for o, _ in roots], [leaf for leaf, _ in slots], [c for _, c in roots], allow_unused=True
                )
                for (_, total), gradient in zip(slots, found, strict=True):
                    if gradient is not None:
                        total += gradient

        with no_autocast(grad.device):
            for (keys, queries), count in zip(call.walk(), ctx.state_counts, strict=True):
                states = [next(saved) for _ in range(count)]
                state_slots = [(s.detach().requires_grad_(), torch.zeros_like(s)) for s in states]
                for block in queries:
                    pull_back(block, state_slots, [grad[block.at]])
                for block in keys:
                    pull_back(block, [], [total for _, total in state_slots])

        inputs = [None if total is None else total.to(t.dtype) for total, t in zip(totals, tensors, strict=True)]
        return None, None, None, *inputs


Slot = tuple[Tensor, Tensor]
"""A leaf of a block and the tensor that its gradient is added to."""


def plain_attention(
    options: Options,
    cu_seqlens: Sequence[int] | None,
    mask: Tensor | None,
    tensors: Sequence[Tensor | None],
    indices: Indices | None = None,
) -> Tensor:
    """The reference equations in the accumulation dtype, in one piece."""
    q = tensors[0]
    assert q is not None
    dtype = accumulation_dtype(q.dtype)
    q_, k, v, q_redundant, k_redundant, gamma, lam, kernel_routers, differential_routers = (
        None if t is None else t.to(dtype) for t in tensors
    )
    assert q_ is not None and k is not None and v is not None and gamma is not None and kernel_routers is not None
    out = reference.dydila_attention(
        q_,
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
        indices=None if indices is None else {name: index.long() for name, index in indices.items()},
        **options._asdict(),
    )
    return out.to(q.dtype)


def dydila_attention(
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """The core for validated arguments.  ``tensors`` are q, k, v, q', k' and the four of :class:`Tables`."""
    tokens = tensors[0]
    assert tokens is not None
    with no_autocast(tokens.device):
        if takes_plain_path(*tensors):
            return plain_attention(options, cu_seqlens, mask, tensors)
        return Attention.apply(options, cu_seqlens, mask, *tensors)


@torch.no_grad()
def routing_indices(
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Indices:
    """The decisions that :func:`dydila_attention` takes for the same arguments, (B, N) each."""
    call = Call(options, cu_seqlens, mask, tensors)
    decided = call.empty_indices()
    with no_autocast(call.tokens.device):
        for keys, queries in call.walk():
            for block in keys + queries:
                indices: Indices = {}
                block.sides(indices)
                block.store(indices, decided)
    return decided
