"""The attention core over blocks: Eqs. 5-8 and 10 from q, k, v, q', k' to the output of the attention.

Images that fit a block are attended whole.  A longer image is walked twice: over its keys, adding up the states,
and over its queries, reading them out.  The backward pass walks the same blocks, runs each again from its inputs with
the routing decisions of the forward and differentiates it on the spot.  Saved for it are the inputs, the decisions
(one byte each) and the states of long images: memory beyond inputs and outputs does not grow with N.

Where :class:`Ranks` share the tokens of the images, each walks its own, and the states, and in the backward pass their
gradients, are summed over the ranks between the two walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import (
    ImageRanges,
    accumulation_dtype,
    all_blocks,
    block_rows,
    differentiable_gradients,
    no_autocast,
    scratch,
    takes_plain_path,
)
from dydila_kernels.torch_backend.linear_attention import readout, states_of, states_pay, whole_attention
from dydila_kernels.torch_backend.tokens import (
    Indices,
    Options,
    Tables,
    Tokens,
    needs_exact_zeros,
    tokens_of,
)
from dydila_kernels.types import Ranks, decision_names

At = tuple[slice, slice]
"""Images and rows of a block."""
INPUTS_OF = {"queries": (0, 3), "keys": (1, 2, 4), "whole": (0, 1, 2, 3, 4)}
"""What a block computes from which of the inputs q, k, v, q', k'."""
_SHARED = ("tokens", "tokens", None, "redundant", "redundant")
PLACES = {"queries": _SHARED, "keys": _SHARED, "whole": ("tokens q", "tokens k", None, "redundant q", "redundant k")}
"""Scratch memory for its own copies of these; the values are only read."""


class Block:
    """A range of rows of some images of a call."""

    def __init__(self, call: Call, kind: str, at: At, scale: Tensor | float, key_scales: list[Tensor]) -> None:
        self.call, self.kind, self.at, self.scale, self.key_scales = call, kind, at, scale, key_scales

    def cut(self) -> list[Tensor | None]:
        """(b, n, d) blocks of q, k, v, q', k', None where this block has no use for it."""
        wanted = INPUTS_OF[self.kind]
        return [None if t is None or i not in wanted else t[self.at] for i, t in enumerate(self.call.inputs)]

    def sides(self, cut: list[Tensor | None], indices: Indices) -> tuple[Tokens | None, Tokens | None, Tensor | None]:
        """Queries, keys and values.  Decisions not found in ``indices`` are taken and put there."""
        call = self.call
        q, k, v, q_redundant, k_redundant = (
            call.load(t, self.at, place) for t, place in zip(cut, PLACES[self.kind], strict=True)
        )
        queries = None if q is None else tokens_of("q", q, q_redundant, call.tables, call.options, indices)
        keys = None if k is None else tokens_of("k", k, k_redundant, call.tables, call.options, indices)
        if keys is not None and self.key_scales:
            keys = keys.divided_by(self.key_scales)
        return queries, keys, v

    def run(self, cut: list[Tensor | None], indices: Indices, states: list[Tensor]) -> list[Tensor]:
        """The output of "queries" and "whole" blocks, the share in the states of "keys" blocks."""
        queries, keys, v = self.sides(cut, indices)
        options, dtype = self.call.options, self.call.like.dtype
        if queries is None:
            assert keys is not None and v is not None
            return states_of(keys, v, self.scale, options)
        if keys is None:
            return [readout(queries, states, options).to(dtype)]
        assert v is not None
        return [whole_attention(queries, keys, v, self.scale, options).to(dtype)]


class Blocks(Protocol):
    """What a call reads a (B, N, d) input through: a tensor, or something that makes a block when it is asked for."""

    def __getitem__(self, at: At, /) -> Tensor: ...


class Call:
    """The arguments of one call.

    ``inputs`` are q, k, v, q', k'; ``like`` is a tensor with their shape, dtype and device.  ``disposable``: a block of
    an input is made for the asking and may be overwritten.  ``ranks``: the tokens are a part of all there are.
    """

    def __init__(
        self,
        options: Options,
        cu_seqlens: Sequence[int] | None,
        mask: Tensor | None,
        inputs: Sequence[Blocks | None],
        tables: Sequence[Tensor | None],
        like: Tensor,
        disposable: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.options, self.cu_seqlens, self.mask, self.inputs, self.ranks = options, cu_seqlens, mask, inputs, ranks
        self.like, self.disposable, self.dtype = like, disposable, accumulation_dtype(like.dtype)
        gamma, lam, *routers = (None if t is None else t.detach().to(self.dtype) for t in tables)
        # Routers multiply from the left, see router_logits: they are laid out for that once.
        kernel_routers, differential_routers = (None if t is None else t.mT.contiguous().mT for t in routers)
        assert gamma is not None and kernel_routers is not None
        exact_zeros = needs_exact_zeros(gamma, options)
        self.tables = Tables(gamma, lam, kernel_routers, differential_routers, exact_zeros)

    def walk(self) -> Iterator[tuple[list[Block], list[Block]]]:
        """Of each image (or several short ones) the blocks of keys and of queries, or no keys and one whole block."""
        for images, ranges in self.blocks():
            scale = self.scale(images, slice(ranges[0].start, ranges[-1].stop))
            key_scales = self.key_scales(images, ranges)
            tokens, dim = ranges[-1].stop - ranges[0].start, self.like.shape[-1]
            # Made blocks are dear: where the states are no detour, keys and queries are not held at the same time.
            detour = self.disposable and states_pay(tokens, dim, self.options.num_heads)
            if len(ranges) == 1 and not detour and self.ranks is None:
                yield [], [Block(self, "whole", (images, ranges[0]), scale, key_scales)]
            else:
                yield (
                    [Block(self, "keys", (images, rows), scale, key_scales) for rows in ranges],
                    [Block(self, "queries", (images, rows), scale, []) for rows in ranges],
                )

    def blocks(self) -> Iterator[ImageRanges]:
        if self.ranks is None:
            yield from all_blocks(self.like, self.cu_seqlens)
            return
        # All images at once: every rank reduces once, though they hold different numbers of tokens.
        batch, length, dim = self.like.shape
        rows = max(1, block_rows(dim, self.like.device) // max(1, batch))
        yield slice(0, batch), [slice(n, min(n + rows, length)) for n in range(0, length, rows)]

    def load(self, block: Tensor | None, at: At, place: str | None = None) -> Tensor | None:
        """In the accumulation dtype, with zeros where the mask has no token.

        Without gradients a ``place`` in scratch memory makes it free to be overwritten.
        """
        if block is None:
            return None
        hidden = None if self.mask is None else ~self.mask[at][..., None]
        if place is None or torch.is_grad_enabled():
            loaded = block.to(self.dtype)
            return loaded if hidden is None else loaded.masked_fill(hidden, 0)
        if not self.disposable or block.dtype != self.dtype:
            block = scratch.take(place, block.shape, self.dtype, block.device).copy_(block)
        return block if hidden is None else block.masked_fill_(hidden, 0)

    def key_scales(self, images: slice, ranges: list[slice]) -> list[Tensor]:
        """Under "denominator", for each map the largest entry of the keys of each image, (b, 1, 1).

        The output does not depend on the scale of the keys: at 1 neither products nor sums over- or underflow.
        """
        if self.options.normalization != "denominator":
            return []
        largest = []
        for source in (self.inputs[1], self.inputs[4]):
            if source is not None:
                blocks = (self.load(source[images, rows], (images, rows)) for rows in ranges)
                peaks = [block.amax((1, 2), keepdim=True) for block in blocks if block is not None]
                largest.append(torch.stack(peaks).amax(0).clamp_min(0))
        if self.options.differential == "token":
            largest = [torch.maximum(*largest)]
        if self.ranks is not None:
            self.ranks.reduce_(largest, "max")
        return [t + (t == 0) for t in largest]

    def scale(self, images: slice, rows: slice) -> Tensor | float:
        """1/count of each image under "length", a number or (b, 1, 1, 1), else 1."""
        if self.options.normalization != "length":
            return 1.0
        if self.ranks is not None:
            length, counts = self.ranks.length, self.ranks.counts
        else:
            length, counts = rows.stop - rows.start, None if self.mask is None else self.mask[images, rows].sum(-1)
        if counts is None:
            return 1.0 / max(1, length)
        return counts.clamp(min=1).to(self.dtype).reciprocal()[:, None, None, None]

    def forward(
        self, emit: Callable[[Block, Tensor], object], decide: Callable[[Block, Indices], object]
    ) -> list[list[Tensor]]:
        """Hands the output of each block to ``emit`` and its routing decisions to ``decide``; returns the states."""

        def run(block: Block, states: list[Tensor]) -> list[Tensor]:
            indices: Indices = {}
            outputs = block.run(block.cut(), indices, states)
            decide(block, indices)
            return outputs

        all_states = []
        for keys, queries in self.walk():
            states: list[Tensor] = []
            for block in keys:
                shares = run(block, [])
                states = [s.add_(share) for s, share in zip(states, shares, strict=True)] if states else shares
            if self.ranks is not None:
                self.ranks.reduce_(states, "sum")
            for block in queries:
                emit(block, run(block, states)[0])
            all_states.append(states)
        return all_states


class Decisions:
    """The routing decisions of all tokens: for each name a (B, N) tensor of the smallest fitting integers."""

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.tensors = dict(zip(names, tensors, strict=True))

    @classmethod
    def of(cls, call: Call) -> Decisions:
        routers = (call.tables.kernel_routers, call.tables.differential_routers)
        most = max(router.shape[-1] for router in routers if router is not None)
        dtype = torch.uint8 if most <= 256 else torch.int32
        names = decision_names(call.options.differential)
        return cls(names, [torch.zeros(call.like.shape[:2], dtype=dtype, device=call.like.device) for _ in names])

    def write(self, block: Block, indices: Indices) -> None:
        for name, index in indices.items():
            self.tensors[name][block.at] = index

    def read(self, block: Block) -> Indices:
        return {name: index[block.at] for name, index in self.tensors.items()}


Slot = tuple[Tensor, Tensor]
"""A leaf of a block and the tensor that its gradient is added to."""


class Attention(torch.autograd.Function):
    """The core, differentiable with respect to all of its tensors: q, k, v, q', k' and the four of :class:`Tables`."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        cu_seqlens: Sequence[int] | None,
        ranks: Ranks | None,
        mask: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        q = tensors[0]
        assert q is not None
        call = Call(options, cu_seqlens, mask, tensors[:5], tensors[5:], q, ranks=ranks)
        out, decisions = torch.empty_like(q, memory_format=torch.contiguous_format), Decisions.of(call)
        states = call.forward(lambda block, tokens: out[block.at].copy_(tokens), decisions.write)
        ctx.options, ctx.cu_seqlens, ctx.ranks = options, cu_seqlens, ranks
        ctx.state_counts = [len(s) for s in states]
        ctx.save_for_backward(mask, *tensors, *decisions.tensors.values(), *chain(*states))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *saved = ctx.saved_tensors
        tensors, rest = saved[:9], iter(saved[9:])
        names = decision_names(ctx.options.differential)
        decisions = Decisions(names, [next(rest) for _ in names])
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            if ctx.ranks is not None:
                raise RuntimeError("tokens on several ranks have no second derivatives (create_graph=True)")

            def plain(*tensors: Tensor | None) -> Tensor:
                return plain_attention(ctx.options, ctx.cu_seqlens, mask, tensors, decisions.tensors)

            return None, None, None, None, *differentiable_gradients(plain, tensors, needed, grad)

        # Detached: a block is differentiated on its own, with respect to leaves cut from these.
        inputs = [None if t is None else t.detach() for t in tensors[:5]]
        call = Call(ctx.options, ctx.cu_seqlens, mask, inputs, tensors[5:], tensors[0], ranks=ctx.ranks)
        totals = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if t is not None and need else None
            for t, need in zip([*inputs, *call.tables[:4]], needed, strict=True)
        ]
        table_slots: list[Slot] = [
            (t.requires_grad_(), total)
            for t, total in zip(call.tables[:4], totals[5:], strict=True)
            if t is not None and total is not None
        ]

        def pull_back(block: Block, state_slots: list[Slot], cotangents: list[Tensor]) -> None:
            """Adds what this block contributes to the totals of the inputs, the tables and the states it reads."""
            slots, cut = state_slots + table_slots, block.cut()
            for i, (t, total) in enumerate(zip(cut, totals[:5], strict=True)):
                if t is not None and total is not None:
                    cut[i] = leaf = t.detach().requires_grad_()
                    slots.append((leaf, total[block.at]))
            with torch.enable_grad():
                outputs = block.run(cut, decisions.read(block), [state for state, _ in state_slots])
            roots = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            if roots and slots:
                gradients = torch.autograd.grad(
                    [o for o, _ in roots], [leaf for leaf, _ in slots], [c for _, c in roots], allow_unused=True
                )
                for (_, total), gradient in zip(slots, gradients, strict=True):
                    if gradient is not None:
                        total += gradient

        with no_autocast(grad.device):
            for (keys, queries), count in zip(call.walk(), ctx.state_counts, strict=True):
                states = [next(rest) for _ in range(count)]
                state_slots = [(s.detach().requires_grad_(), torch.zeros_like(s)) for s in states]
                for block in queries:
                    pull_back(block, state_slots, [grad[block.at]])
                if call.ranks is not None:
                    call.ranks.reduce_([total for _, total in state_slots], "sum")
                for block in keys:
                    pull_back(block, [], [total for _, total in state_slots])

        grads = [None if total is None else total.to(t.dtype) for total, t in zip(totals, tensors, strict=True)]
        return None, None, None, None, *grads


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
        num_heads=options.num_heads,  # the Dynamo of torch 2.9 and older does not follow _asdict()
        normalization=options.normalization,
        router_gradient=options.router_gradient,
        differential=options.differential,
    )
    return out.to(q.dtype)


def dydila_attention(
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """The core for validated arguments.  ``tensors`` are q, k, v, q', k' and the four of :class:`Tables`."""
    tokens = tensors[0]
    assert tokens is not None
    with no_autocast(tokens.device):
        if takes_plain_path(*tensors):
            if ranks is not None:
                raise RuntimeError("tokens on several ranks take no tracer, torch.func or forward-mode AD")
            return plain_attention(options, cu_seqlens, mask, tensors)
        return Attention.apply(options, cu_seqlens, ranks, mask, *tensors)


@torch.no_grad()
def routing_indices(
    *tensors: Tensor | None,
    options: Options,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Indices:
    """The decisions that :func:`dydila_attention` takes for the same arguments, (B, N) each."""
    q = tensors[0]
    assert q is not None
    call = Call(options, cu_seqlens, mask, tensors[:5], tensors[5:], q)
    decisions = Decisions.of(call)
    with no_autocast(q.device):
        for keys, queries in call.walk():
            for block in keys + queries:
                indices: Indices = {}
                block.sides(block.cut(), indices)
                decisions.write(block, indices)
    return decisions.tensors
