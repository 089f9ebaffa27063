"""The layer without gradients, block by block.

A block's projections, attention, convolution and output projection follow each other while it is in the caches.  No
tensor between x and y is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dydila_kernels.precision import accumulation_dtype
from dydila_kernels.torch_backend.blocks import Workspace, choices_of_each, side_by_side, workspace
from dydila_kernels.torch_backend.blockwise import At, Block, BlockwiseForward
from dydila_kernels.torch_backend.depthwise import ValueBlocks
from dydila_kernels.torch_backend.linear_attention import states_pay
from dydila_kernels.torch_backend.projection import project_block
from dydila_kernels.types import LayerWeights, Linear, Options


@torch.no_grad()
def layer(
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Eqs. 1-9 and the output projection for validated arguments, without gradients: (B, N, d), contiguous.

    x (B, N, d), in the dtype of the weights and zero where the mask has no token; not for "denominator".
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    with workspace() as memory:
        blocks = LazyTokens(x, y, weights, options, mask, memory)

        def finish(block: Block, tokens: Tensor) -> None:
            if weights.convolution is not None:
                tokens.add_(y[block.at])
            linear_into(y[block.at], tokens, weights.proj)

        tokens = [*blocks.inputs(), *(options.rotary or (None, None))]
        call = BlockwiseForward(options, mask, cu_seqlens, tokens, weights.tables, x, memory)
        call.forward(finish, lambda block, indices: None)
    return y


def linear_into(out: Tensor, x: Tensor, linear: Linear) -> None:
    """``F.linear`` of a block x (b, n, d) into a block of a contiguous tensor."""
    rows, columns = x.flatten(0, 1), out.view(-1, len(linear.weight))
    if linear.bias is None:
        torch.mm(rows, linear.weight.T, out=columns)
    else:
        torch.addmm(linear.bias, rows, linear.weight.T, out=columns)


class LazyBlocks:
    """A (B, N, d) tensor of which a block is made when it is asked for."""

    def __init__(self, make: Callable[[At], Tensor]) -> None:
        self.make = make

    def __getitem__(self, at: At, /) -> Tensor:
        return self.make(at)


class LazyTokens:
    """q, k, v, q', k' of the tokens x, made block by block in the workspace.

    Keys, and with them the values, come before the queries of an image: until the output takes its place, y holds the
    convolution.
    """

    def __init__(
        self, x: Tensor, y: Tensor, weights: LayerWeights, options: Options, mask: Tensor | None, memory: Workspace
    ) -> None:
        self.x, self.weights, self.options, self.mask, self.memory = x, weights, options, mask, memory
        biases = (None, None, None) if weights.qkv.bias is None else weights.qkv.bias.chunk(3)
        self.linears = [Linear(w, b) for w, b in zip(weights.qkv.weight.chunk(3), biases, strict=True)]
        self.values = None if weights.convolution is None else ValueBlocks(y, weights.convolution, memory)
        self.routers = side_by_side([p.router for p in weights.projectors], self.dtype) if weights.projectors else None
        self.choices: dict[tuple[int, int], dict[str, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.x.dtype)

    def inputs(self) -> list[LazyBlocks | None]:
        """In the order of the first fields of :class:`dydila_kernels.types.CoreInputs`."""
        q, k, v = partial(self.shared, 0, "q"), partial(self.shared, 1, "k"), self.value
        if not self.weights.projectors:
            return [LazyBlocks(q), LazyBlocks(k), LazyBlocks(v), None, None]
        routed = [LazyBlocks(partial(self.routed, i, side)) for i, side in enumerate("qk")]
        if self.options.differential == "off":
            return [*routed, LazyBlocks(v), None, None]
        return [LazyBlocks(q), LazyBlocks(k), LazyBlocks(v), *routed]

    def take(self, name: str, side: str, at: At) -> Tensor:
        # Only where the states do not pay is a block of keys held together with its queries (BlockwiseForward.walk).
        rows = self.x[at]
        shared = states_pay(rows.shape[1], rows.shape[2], self.options.num_heads)
        return self.memory.take(name if shared else f"{name} {side}", rows.shape, rows.dtype, rows.device)

    def shared(self, part: int, side: str, at: At) -> Tensor:
        out = self.take("tokens", side, at)
        linear_into(out, self.x[at], self.linears[part])
        return self.normed(out, side)

    def value(self, at: At) -> Tensor:
        v = self.take("values", "v", at) if self.values is None else self.values.take(*at)
        linear_into(v, self.x[at], self.linears[2])
        if self.mask is not None:
            v.masked_fill_(~self.mask[at][..., None], 0)
        if self.values is not None:
            self.values.convolve(at[1])
        return v

    def routed(self, number: int, side: str, at: At) -> Tensor:
        # Asked for twice, first for one side and then for the other.
        where = at[0].start, at[1].start
        if where not in self.choices:
            assert self.routers is not None
            indices = choices_of_each(self.x[at].to(self.dtype), self.routers, 2)
            self.choices[where] = dict(zip("qk", indices, strict=True))
        out, index = self.take("redundant", side, at), self.choices[where].pop(side)
        project_block(out, self.x[at], self.weights.projectors[number].weight, index, self.memory)
        return self.normed(out, side)

    def normed(self, tokens: Tensor, side: str) -> Tensor:
        return self.weights.norms["qk".index(side)](tokens) if self.weights.norms else tokens
