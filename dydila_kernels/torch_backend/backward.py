"""The backward pass of the core, over the blocks of its forward pass.

Each block is run again from its inputs with the routing decisions of the forward, and differentiated on the spot: first
the queries, whose gradients give those of the states, then the keys.  The common case is written out; autograd takes
what has denominator terms, two maps, one branch, trained routers or rotary embeddings.  Where ranks share the tokens,
the gradients of the states are summed over them between the two walks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blockwise import At, Block, BlockwiseForward, Decisions, States, unpack
from dydila_kernels.torch_backend.linear_attention import heads, merged, outer, read
from dydila_kernels.torch_backend.tokens import Difference
from dydila_kernels.types import Options

Receive = Callable[[At, Tensor], object]
"""Takes the gradient of a block of an input, and what is in memory there until the next block."""
Slot = tuple[Tensor, Callable[[Tensor], object]]
"""A leaf of a block, and what takes its gradient."""


def is_explicit(options: Options) -> bool:
    """Whether :class:`Backward` has the gradients of such a call written out."""
    common = options.differential == "token" and options.normalization != "denominator"
    return common and options.router_gradient == "none" and options.rotary is None


class Backward:
    """The backward pass of ``call``, with the routing decisions of the forward pass.

    The gradients of the blocks of q, k, v, q', k', cos, sin go to what ``inputs`` has for each, those of the tables are
    added to ``tables``; None where a gradient is not needed.
    """

    def __init__(
        self,
        call: BlockwiseForward,
        decisions: Decisions,
        inputs: Sequence[Receive | None],
        tables: Sequence[Tensor | None],
    ) -> None:
        self.call, self.decisions, self.inputs, self.tables = call, decisions, inputs, tables
        # Rotary tables are no part of the options here.
        self.explicit = is_explicit(call.options) and call.inputs[5] is None
        self.table_slots: list[Slot] = []
        if not self.explicit:
            self.table_slots = [
                (t.requires_grad_(), total.add_)
                for t, total in zip(call.tables[:4], tables, strict=True)
                if t is not None and total is not None
            ]

    def run(self, states: Tensor, grad: Tensor) -> None:
        """``states``: of the forward pass, packed; ``grad`` (B, N, d): of its output."""
        call = self.call
        for keys, queries in call.walk():
            total = States()
            if keys:
                total, states = unpack(states, len(grad[keys[0].at]), call.options, grad.shape[-1])
            dstates = [torch.zeros_like(s) for s in total.states]
            for block in queries:
                if self.explicit and keys:
                    self.queries(block, total.states[0], dstates[0], grad[block.at].to(call.dtype))
                elif self.explicit:
                    self.whole(block, grad[block.at].to(call.dtype))
                else:
                    slots: list[Slot] = [
                        (s.detach().requires_grad_(), d.add_) for s, d in zip(total.states, dstates, strict=True)
                    ]
                    self.differentiate(block, slots, [grad[block.at]])
            if call.ranks is not None:
                call.ranks.reduce_(dstates, "sum")
            for block in keys:
                if self.explicit:
                    self.keys(block, dstates[0] * block.scale)
                else:
                    block.key_scales = total.key_scales or None
                    self.differentiate(block, [], dstates)

    def queries(self, block: Block, state: Tensor, dstate: Tensor, grad: Tensor) -> None:
        """O = Qh S: dQh = dO S^T, dS = Qh^T dO."""
        q, _, _, redundant, *_ = block.loaded(block.cut())
        assert q is not None and redundant is not None
        hat = self.difference("q", q, redundant, block)
        dstate += outer(hat.hat, grad, state.shape[1])
        self.hand_over("q", hat, read(grad, state.mT, self.call.memory, "gradient"), block)

    def keys(self, block: Block, dstate: Tensor) -> None:
        """S = Kh^T V: dKh = V dS^T, dV = Kh dS."""
        _, k, v, _, redundant, *_ = block.loaded(block.cut())
        assert k is not None and v is not None and redundant is not None
        hat = self.difference("k", k, redundant, block)
        if (receive := self.inputs[2]) is not None:
            receive(block.at, read(hat.hat, dstate, self.call.memory, "values"))
        self.hand_over("k", hat, read(v, dstate.mT, self.call.memory, "gradient"), block)

    def whole(self, block: Block, grad: Tensor) -> None:
        """O = A V with A = Qh Kh^T: dV = A^T dO, dA = dO V^T, dQh = dA Kh, dKh = dA^T Qh."""
        q, k, v, q_redundant, k_redundant, *_ = block.loaded(block.cut())
        assert q is not None and k is not None and v is not None
        assert q_redundant is not None and k_redundant is not None
        queries = self.difference("q", q, q_redundant, block, "queries")
        keys = self.difference("k", k, k_redundant, block, "keys")
        q, k, v, g = (heads(t, self.call.options.num_heads) for t in (queries.hat, keys.hat, v, grad))
        weights, dweights = (q @ k.mT) * block.scale, (g @ v.mT) * block.scale
        dv, dq, dk = (merged(t) for t in (weights.mT @ g, dweights @ k, dweights.mT @ q))
        if (receive := self.inputs[2]) is not None:
            receive(block.at, dv)
        self.hand_over("q", queries, dq, block)
        self.hand_over("k", keys, dk, block)

    def difference(self, side: str, z: Tensor, redundant: Tensor, block: Block, place: str = "side") -> Difference:
        gamma, lam, *_ = self.call.tables
        assert lam is not None
        measure, other, choice = (index[..., None] for index in self.chosen(side, block))
        return Difference.of(z, redundant, gamma[measure], gamma[other], lam[choice], self.call.memory, place)

    def chosen(self, side: str, block: Block) -> list[Tensor]:
        taken = self.decisions.read(block)
        return [taken[name].long() for name in (f"measure_{side}", f"measure_{side}_redundant", f"differential_{side}")]

    def hand_over(self, side: str, hat: Difference, grad: Tensor, block: Block) -> None:
        """What follows from the gradient of the difference of a side."""
        dz, dredundant, *rows = hat.gradients(grad, self.call.memory)
        gamma, lam, *_ = self.tables
        for table, index, row in zip((gamma, gamma, lam), self.chosen(side, block), rows, strict=True):
            if table is not None:
                table.index_put_((index,), row[..., 0], accumulate=True)
        number = "qk".index(side)
        for receive, gradient in ((self.inputs[number], dz), (self.inputs[3 + number], dredundant)):
            if receive is not None:
                receive(block.at, gradient)

    def differentiate(self, block: Block, state_slots: list[Slot], cotangents: list[Tensor]) -> None:
        """By autograd."""
        slots, cut = state_slots + self.table_slots, block.cut()
        for i, (t, receive) in enumerate(zip(cut, self.inputs, strict=True)):
            if t is not None and receive is not None:
                cut[i] = leaf = t.detach().requires_grad_()
                slots.append((leaf, partial(receive, block.at)))
        with torch.enable_grad():
            outputs = block.run(cut, self.decisions.read(block), [state for state, _ in state_slots])
        roots = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if roots and slots:
            leaves, incoming = [leaf for leaf, _ in slots], [c for _, c in roots]
            found = torch.autograd.grad([o for o, _ in roots], leaves, incoming, materialize_grads=True)
            for (_, take), gradient in zip(slots, found, strict=True):
                take(gradient)
