"""The attention core in blocks of rows: Eqs. 5-8 and 10 from q, k, v, q', k' to the output of the attention.

Images that fit a block are attended whole.  A longer image is walked twice: over its keys, adding up the states,
and over its queries, reading them out.

Where :class:`dydila_kernels.types.Ranks` share the tokens of the images, each walks its own, and the states are summed
over the ranks between the two walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
_SHARED = ("tokens", "tokens", None, "redundant", "redundant", None, None)
WORKSPACE_NAMES = {
    "queries": _SHARED,
    "keys": _SHARED,
    "whole": ("tokens q", "tokens k", None, "redundant q", "redundant k", None, None),
}
"""Where a block has its own copies of these in the workspace; the values are only read."""


class Block:
    """A range of rows of some images of a call."""

    def __init__(
        self, call: BlockwiseForward, kind: str, at: At, scale: Tensor | float, key_scales: list[Tensor]
    ) -> None:
        self.call, self.kind, self.at, self.scale, self.key_scales = call, kind, at, scale, key_scales

    def cut(self) -> list[Tensor | None]:
        """Blocks of q, k, v, q', k' (b, n, d), cos and sin (b, n, e), None where this block has no use for it."""
        wanted = INPUTS_OF[self.kind]
        return [None if t is None or i not in wanted else t[self.at] for i, t in enumerate(self.call.inputs)]

    def sides(self, cut: list[Tensor | None], indices: Indices) -> tuple[Tokens | None, Tokens | None, Tensor | None]:
        """Queries, keys and values.  Decisions not found in ``indices`` are taken and put there."""
        call = self.call
        q, k, v, q_redundant, k_redundant, cos, sin = (
            call.load(t, self.at, name) for t, name in zip(cut, WORKSPACE_NAMES[self.kind], strict=True)
        )
        shared = (call.tables, call.options, indices, call.workspace is not None)
        queries = None if q is None else tokens_of("q", q, q_redundant, *shared)
        keys = None if k is None else tokens_of("k", k, k_redundant, *shared)
        if keys is not None and self.key_scales:
            keys = keys.divided_by(self.key_scales)
        if cos is not None and sin is not None:
            queries, keys = (t and t.rotated(cos, sin, call.options) for t in (queries, keys))
        return queries, keys, v

    def run(self, cut: list[Tensor | None], indices: Indices, states: list[Tensor]) -> list[Tensor]:
        """The output of "queries" and "whole" blocks, what "keys" blocks add to the states."""
        queries, keys, v = self.sides(cut, indices)
        options, workspace, dtype = self.call.options, self.call.workspace, self.call.like.dtype
        if queries is None:
            assert keys is not None and v is not None
            return states_of(keys, v, self.scale, options)
        if keys is None:
            return [readout(queries, states, options, workspace).to(dtype)]
        assert v is not None
        return [whole_attention(queries, keys, v, self.scale, options, workspace).to(dtype)]


class Blocks(Protocol):
    """What a call reads a (B, N, d) input through: a tensor, or something that makes a block when it is asked for."""

    def __getitem__(self, at: At, /) -> Tensor: ...


class BlockwiseForward:
    """The arguments of one call, and how it is walked.

    ``tokens`` are q, k, v, q', k', whole or made block by block where ``lazy``: then a block may be overwritten; and
    cos and sin (B, N, e) of rotary embeddings, or None twice.
    ``tables`` are the other four of :class:`dydila_kernels.types.CoreInputs`; ``like`` is a tensor (B, N, d) of the
    shape, dtype and device of the tokens.  A ``workspace`` makes the blocks compute in it, without gradients.  With
    ``ranks`` the tokens are a part of all there are.
    """

    def __init__(
        self,
        options: Options,
        mask: Tensor | None,
        cu_seqlens: Sequence[int] | None,
        tokens: Sequence[Blocks | None],
        tables: Sequence[Tensor | None],
        like: Tensor,
        *,
        workspace: Workspace | None = None,
        lazy: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.options, self.cu_seqlens, self.mask, self.inputs, self.ranks = options, cu_seqlens, mask, tokens, ranks
        self.like, self.workspace, self.lazy, self.dtype = like, workspace, lazy, accumulation_dtype(like.dtype)
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
            key_scales = self.key_scales(images, ranges)
            tokens, dim = ranges[-1].stop - ranges[0].start, self.like.shape[-1]
            # Lazily made blocks are expensive, so unless the quadratic form is cheaper, keys and queries are processed
            # in separate passes.
            separate = self.lazy and states_pay(tokens, dim, self.options.num_heads)
            if len(ranges) == 1 and not separate and self.ranks is None:
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

    def load(self, block: Tensor | None, at: At, name: str | None = None) -> Tensor | None:
        """In the accumulation dtype, with zeros where the mask has no token.

        With a workspace a ``name`` in it makes the result free to be overwritten.
        """
        if block is None:
            return None
        hidden = None if self.mask is None else ~self.mask[at][..., None]
        if name is None or self.workspace is None:
            loaded = block.to(self.dtype)
            return loaded if hidden is None else loaded.masked_fill(hidden, 0)
        if not self.lazy or block.dtype != self.dtype:
            block = self.workspace.take(name, block.shape, self.dtype, block.device).copy_(block)
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
                partials = run(block, [])
                states = [s.add_(p) for s, p in zip(states, partials, strict=True)] if states else partials
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
    def of(cls, call: BlockwiseForward) -> Decisions:
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
