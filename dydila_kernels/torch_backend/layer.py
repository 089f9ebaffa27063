"""The layer as a whole: a block's projections, attention, convolution and output projection follow each other while it
is in the caches.

Without gradients no tensor between x and y is ever whole.  With gradients the tokens of Eqs. 1-3 and what the output
projection reads are, for :mod:`dydila_kernels.torch_backend.layer_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blocks import Workspace, workspace
from dydila_kernels.torch_backend.blockwise import At, Block, BlockwiseForward
from dydila_kernels.torch_backend.depthwise import ValueBlocks
from dydila_kernels.torch_backend.linear_attention import states_pay
from dydila_kernels.torch_backend.products import multiply
from dydila_kernels.torch_backend.projection import project_block, route
from dydila_kernels.types import LayerWeights, Linear, Options


@torch.no_grad()
def without_gradients(
    x: Tensor, weights: LayerWeights, options: Options, mask: Tensor | None, cu_seqlens: Sequence[int] | None
) -> Tensor:
    """Eqs. 1-9 and the output projection for validated arguments, without gradients: (B, N, d), contiguous.

    x (B, N, d), in the dtype of the weights and zero where the mask has no token.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with workspace() as memory:
        values = None if weights.convolution is None else ValueBlocks(y, weights.convolution, memory)
        tokens = LazyTokens(x, weights, options, mask, memory, values)

        def finish(block: Block, tokens: Tensor) -> None:
            if values is not None:
                tokens.add_(y[block.at])
            linear_into(y[block.at], tokens, weights.proj)

        inputs = [*tokens.inputs(), *(options.rotary or (None, None))]
        call = BlockwiseForward(options, mask, cu_seqlens, inputs, weights.tables, x, memory, disposable=True)
        call.forward(finish, lambda block, indices: None)
    return y


def linear_into(out: Tensor, x: Tensor, linear: Linear) -> None:
    """``F.linear`` of a block x (b, n, d) into a block of a contiguous tensor."""
    multiply(x.flatten(0, 1), linear.weight.T, out.view(-1, len(linear.weight)), linear.bias)


class LazyBlocks:
    """A (B, N, d) tensor of which a block is made when it is asked for."""

    def __init__(self, make: Callable[[At], Tensor]) -> None:
        self.make = make

    def __getitem__(self, at: At, /) -> Tensor:
        return self.make(at)


class LazyTokens:
    """q, k, v, q', k' of the tokens x, made block by block: in the workspace, or in ``kept`` where that is given.

    Keys, and with them the values, come before the queries of an image: until the output takes its place, y holds the
    convolution that ``values`` makes.
    """

    def __init__(
        self,
        x: Tensor,
        weights: LayerWeights,
        options: Options,
        mask: Tensor | None,
        memory: Workspace,
        values: ValueBlocks | None = None,
        kept: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.x, self.weights, self.options, self.mask, self.memory = x, weights, options, mask, memory
        self.values, self.kept = values, kept
        self.linears = weights.qkv.thirds()
        self.choices = route(x, [p.router for p in weights.projectors]) if weights.projectors else None

    def inputs(self) -> list[LazyBlocks | None]:
        """In the order of the first fields of :class:`dydila_kernels.types.CoreInputs`."""
        q, k = (LazyBlocks(partial(self.shared, part)) for part in (0, 1))
        v = LazyBlocks(self.value)
        if not self.weights.projectors:
            return [q, k, v, None, None]
        routed: list[LazyBlocks | None] = [LazyBlocks(partial(self.routed, i)) for i in (0, 1)]
        return [*routed, v, None, None] if self.options.differential == "off" else [q, k, v, *routed]

    def take(self, number: int, at: At) -> Tensor:
        """Where the block of this field of the inputs lies."""
        if self.kept is not None:
            whole = self.kept[number]
            assert whole is not None
            return whole[at]
        # Only where the states do not pay is a block of keys held together with its queries (BlockwiseForward.walk).
        rows = self.x[at]
        apart = states_pay(rows.shape[1], rows.shape[2], self.options.num_heads)
        names = ("tokens", "tokens", "values", "redundant", "redundant")
        return self.memory.like(rows, names[number] if apart else f"{names[number]} {number}")

    def shared(self, part: int, at: At) -> Tensor:
        out = self.take(part, at)
        linear_into(out, self.x[at], self.linears[part])
        return self.normed(out, part)

    def value(self, at: At) -> Tensor:
        v = self.take(2, at) if self.values is None else self.values.take(*at)
        linear_into(v, self.x[at], self.linears[2])
        if self.mask is not None:
            v.masked_fill_(~self.mask[at][..., None], 0)
        if self.values is not None:
            self.values.convolve(at[1])
        return v

    def routed(self, side: int, at: At) -> Tensor:
        assert self.choices is not None
        out = self.take(side + (0 if self.options.differential == "off" else 3), at)
        project_block(out, self.x[at], self.weights.projectors[side].weight, self.choices[side][at], self.memory)
        return self.normed(out, side)

    def normed(self, tokens: Tensor, side: int) -> Tensor:
        return self.weights.norms[side](tokens) if self.weights.norms else tokens
