"""The attention core in blocks of rows: Eqs. 5-8 and 10 from q, k, v, q', k' to the output of the attention.

An image is walked twice: over its keys, adding up the states, and over its queries, reading them out.  Only where an
image has so few tokens that (Q K^T) V is cheaper is a block of whole images attended at once.

Under "denominator" the output does not depend on the scale of the keys.  Each block of keys is divided by its largest
entry, so that neither products nor sums over- or underflow, and states that are added up are brought to one scale.

Where :class:`dydila_kernels.types.Ranks` share the tokens of the images, each walks its own, and the states are summed
over the ranks between the two walks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dydila_kernels.precision import accumulation_dtype
from dydila_kernels.torch_backend.blocks import ImageRanges, Workspace, all_blocks, block_rows
from dydila_kernels.torch_backend.linear_attention import readout, states_of, states_pay, whole_attention
from dydila_kernels.torch_backend.tokens import Indices, Tables, Tokens, needs_exact_zeros, tokens_of
from dydila_kernels.types import Options, Ranks, decision_names

At = tuple[slice, slice]
"""Images and rows of a block."""
INPUTS_OF = {"queries": (0, 3, 5, 6), "keys": (1, 2, 4, 5, 6), "whole": (0, 1, 2, 3, 4, 5, 6)}
"""What a block computes from which of the inputs q, k, v, q', k', cos, sin."""


class Block:
    """A range of rows of some images of a call.

    ``key_scales`` (b, 1, 1), of each map under "denominator": what its keys are divided by, or None for their largest
    entries.
    """

    def __init__(self, call: BlockwiseForward, kind: str, at: At, scale: Tensor | float) -> None:
        self.call, self.kind, self.at, self.scale = call, kind, at, scale
        self.key_scales: list[Tensor] | None = None

    def cut(self) -> list[Tensor | None]:
        """Blocks of q, k, v, q', k' (b, n, d), cos and sin (b, n, e), None where this block has no use for it."""
        wanted = INPUTS_OF[self.kind]
        return [None if t is None or i not in wanted else t[self.at] for i, t in enumerate(self.call.inputs)]

    def loaded(self, cut: list[Tensor | None]) -> list[Tensor | None]:
        """The same in the accumulation dtype, with zeros where the mask has no token."""
        return [self.call.load(t, self.at) for t in cut]

    def sides(self, cut: list[Tensor | None], indices: Indices) -> tuple[Tokens | None, Tokens | None, Tensor | None]:
        """Queries, keys and values.  Decisions not found in ``indices`` are taken and put there."""
        call = self.call
        q, k, v, q_redundant, k_redundant, cos, sin = self.loaded(cut)
        places = ("queries", "keys") if self.kind == "whole" else ("side", "side")  # of one side at a time
        queries = None if q is None else self.tokens("q", q, q_redundant, indices, places[0])
        keys = None if k is None else self.tokens("k", k, k_redundant, indices, places[1])
        if keys is not None and call.options.normalization == "denominator":
            if self.key_scales is None:
                self.key_scales = keys.largest()
            keys = keys.divided_by([scale + (scale == 0) for scale in self.key_scales])
        if cos is not None and sin is not None:
            queries, keys = (t and t.rotated(cos, sin, call.options) for t in (queries, keys))
        return queries, keys, v

    def tokens(self, side: str, z: Tensor, redundant: Tensor | None, indices: Indices, place: str) -> Tokens:
        call = self.call
        return tokens_of(side, z, redundant, call.tables, call.options, indices, call.memory, place, call.disposable)

    def run(self, cut: list[Tensor | None], indices: Indices, states: list[Tensor]) -> list[Tensor]:
        """The output of "queries" and "whole" blocks, what "keys" blocks add to the states."""
        queries, keys, v = self.sides(cut, indices)
        options, memory, dtype = self.call.options, self.call.memory, self.call.like.dtype
        if queries is None:
            assert keys is not None and v is not None
            return states_of(keys, v, self.scale, options)
        if keys is None:
            return [readout(queries, states, options, memory).to(dtype)]
        assert v is not None
        return [whole_attention(queries, keys, v, self.scale, options).to(dtype)]


class States:
    """The states of some images while the blocks of their keys are walked, and the scales of their keys."""

    def __init__(self, states: Iterable[Tensor] = (), key_scales: Iterable[Tensor] = ()) -> None:
        self.states, self.key_scales = list(states), list(key_scales)

    def add(self, partials: list[Tensor], key_scales: list[Tensor] | None) -> None:
        if not self.states:
            self.states, self.key_scales = partials, key_scales or []
        elif not key_scales:
            self.states = [s.add_(p) for s, p in zip(self.states, partials, strict=True)]
        else:
            common = [torch.maximum(s, t) for s, t in zip(self.key_scales, key_scales, strict=True)]
            mine, others = self.at_scale(common), rescaled(partials, key_scales, common)
            self.states, self.key_scales = [s.add_(p) for s, p in zip(mine, others, strict=True)], common

    def at_scale(self, common: list[Tensor]) -> list[Tensor]:
        return rescaled(self.states, self.key_scales, common)

    def reduce(self, ranks: Ranks) -> None:
        """Sums them over the ranks."""
        if self.key_scales:
            common = [scale.clone() for scale in self.key_scales]
            ranks.reduce_(common, "max")
            self.states, self.key_scales = self.at_scale(common), common
        ranks.reduce_(self.states, "sum")


def rescaled(states: list[Tensor], scales: list[Tensor], common: list[Tensor]) -> list[Tensor]:
    """States of keys that were divided by ``scales`` (b, 1, 1) as those of keys divided by ``common``, no less."""
    factors = [scale / (c + (c == 0)) for scale, c in zip(scales, common, strict=True)]
    products = [s * f[..., None] for s, f in zip(states, factors, strict=False)]
    return products + [s * f for s, f in zip(states[len(factors) :], factors, strict=True)]


def pack(states: Sequence[States], like: Tensor) -> Tensor:
    """The states of all images as one tensor (elements,)."""
    parts = [t.flatten() for total in states for t in total.states + total.key_scales]
    return torch.cat(parts) if parts else like.new_empty(0)


def unpack(flat: Tensor, images: int, options: Options, dim: int) -> tuple[States, Tensor]:
    """The states of the first so many images in what :func:`pack` made, and the rest of it."""
    shapes, maps = state_shapes(images, options, dim)
    parts = flat.split([*map(math.prod, shapes), len(flat) - images * state_elements(options, dim)])
    tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]
    counts = len(shapes) - (maps if options.normalization == "denominator" else 0)
    return States(tensors[:counts], tensors[counts:]), parts[-1]


def state_shapes(images: int, options: Options, dim: int) -> tuple[list[tuple[int, ...]], int]:
    """Those of the tensors of :class:`States`, and the number of maps."""
    maps, width = 2 if options.differential == "map" else 1, dim // options.num_heads
    shapes: list[tuple[int, ...]] = [(images, options.num_heads, width, width)] * maps
    if options.normalization == "denominator":
        shapes += [(images, 1, dim)] * maps + [(images, 1, 1)] * maps
    return shapes, maps


def state_elements(options: Options, dim: int) -> int:
    """Of the states of one image in what :func:`pack` makes."""
    return sum(map(math.prod, state_shapes(1, options, dim)[0]))


class Blocks(Protocol):
    """What a call reads a (B, N, d) input through: a tensor, or something that makes a block when it is asked for."""

    def __getitem__(self, at: At, /) -> Tensor: ...


class BlockwiseForward:
    """The arguments of one call, and how it is walked.

    ``tokens`` are q, k, v, q', k', whole or made block by block; and cos and sin (B, N, e) of rotary embeddings, or
    None twice.  ``tables`` are the other four of :class:`dydila_kernels.types.CoreInputs`; ``like`` is a tensor
    (B, N, d) of the shape, dtype and device of the tokens.  The blocks compute in ``memory``, and without gradients in
    the place of ``disposable`` blocks of the tokens.  With ``ranks`` the tokens are a part of all there are.
    """

    def __init__(
        self,
        options: Options,
        mask: Tensor | None,
        cu_seqlens: Sequence[int] | None,
        tokens: Sequence[Blocks | None],
        tables: Sequence[Tensor | None],
        like: Tensor,
        memory: Workspace,
        ranks: Ranks | None = None,
        *,
        disposable: bool = False,
    ) -> None:
        self.options, self.cu_seqlens, self.mask, self.inputs, self.ranks = options, cu_seqlens, mask, tokens, ranks
        self.like, self.memory, self.disposable, self.dtype = like, memory, disposable, accumulation_dtype(like.dtype)
        gamma, lam, *routers = (None if t is None else t.detach().to(self.dtype) for t in tables)
        # Routers multiply from the left, see parts_of_logits: they are laid out for that once.
        kernel_routers, differential_routers = (None if t is None else t.mT.contiguous().mT for t in routers)
        assert gamma is not None and kernel_routers is not None
        exact_zeros = needs_exact_zeros(gamma, options)
        self.tables = Tables(gamma, lam, kernel_routers, differential_routers, exact_zeros)

    def walk(self) -> Iterator[tuple[list[Block], list[Block]]]:
        """Of each image (or several short ones) the blocks of keys and of queries, or no keys and one whole block."""
        for images, ranges in self.blocks():
            scale = self.scale(images, slice(ranges[0].start, ranges[-1].stop))
            tokens, dim = ranges[-1].stop - ranges[0].start, self.like.shape[-1]
            if len(ranges) == 1 and self.ranks is None and not states_pay(tokens, dim, self.options.num_heads):
                yield [], [Block(self, "whole", (images, ranges[0]), scale)]
            else:
                yield (
                    [Block(self, "keys", (images, rows), scale) for rows in ranges],
                    [Block(self, "queries", (images, rows), scale) for rows in ranges],
                )

    def blocks(self) -> Iterator[ImageRanges]:
        if self.ranks is None:
            yield from all_blocks(self.like, self.cu_seqlens)
            return
        batch, length, dim = self.like.shape
        # All images at once: every rank reduces once, though they hold different numbers of tokens.
        rows = max(1, block_rows(dim, self.like.device) // max(1, batch))
        yield slice(0, batch), [slice(n, min(n + rows, length)) for n in range(0, length, rows)]

    def load(self, block: Tensor | None, at: At) -> Tensor | None:
        """In the accumulation dtype, with zeros where the mask has no token."""
        if block is None:
            return None
        block = block.to(self.dtype)
        return block if self.mask is None else block.masked_fill(~self.mask[at][..., None], 0)

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
    ) -> list[States]:
        """Hands the output of each block to ``emit`` and its routing decisions to ``decide``; returns the states."""

        def run(block: Block, states: list[Tensor]) -> list[Tensor]:
            indices: Indices = {}
            outputs = block.run(block.cut(), indices, states)
            decide(block, indices)
            return outputs

        all_states = []
        for keys, queries in self.walk():
            total = States()
            for block in keys:
                total.add(run(block, []), block.key_scales)
            if self.ranks is not None:
                total.reduce(self.ranks)
            for block in queries:
                emit(block, run(block, total.states)[0])
            all_states.append(total)
        return all_states


class Decisions:
    """The routing decisions of all tokens: for each name a (B, N) tensor of the smallest fitting integers."""

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.tensors = dict(zip(names, tensors, strict=True))

    @classmethod
    def of(cls, call: BlockwiseForward) -> Decisions:
        dtype = decision_dtype(call.tables.kernel_routers, call.tables.differential_routers)
        names = decision_names(call.options.differential)
        return cls(names, [torch.zeros(call.like.shape[:2], dtype=dtype, device=call.like.device) for _ in names])

    def write(self, block: Block, indices: Indices) -> None:
        for name, index in indices.items():
            self.tensors[name][block.at] = index

    def read(self, block: Block) -> Indices:
        return {name: index[block.at] for name, index in self.tensors.items()}


def decision_dtype(*routers: Tensor | None) -> torch.dtype:
    """The smallest that holds what these routers, (..., choices), choose."""
    return torch.uint8 if max(router.shape[-1] for router in routers if router is not None) <= 256 else torch.int32
