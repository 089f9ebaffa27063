"""The backward pass of the core, over the blocks of its forward pass.

Each block is run again from its inputs with the routing decisions of the forward, and differentiated on the spot: first
the queries, whose gradients give those of the states, then the keys.  The token-wise difference is written out; for
two maps, one branch, trained routers and rotary embeddings there is autograd.  Where ranks share the tokens, the
gradients of the states are summed over them between the two walks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blocks import SPARE
from dydila_kernels.torch_backend.blockwise import At, Block, BlockwiseForward, Decisions, States, unpack
from dydila_kernels.torch_backend.linear_attention import heads, inverse_mass, merged, outer, read
from dydila_kernels.torch_backend.tokens import Difference, largest_of_heads, names_of, over_heads
from dydila_kernels.types import Options

Receive = Callable[[At, Tensor], object]
"""Takes the gradient of a block of an input, and what is in memory there until the next block."""
Slot = tuple[Tensor, Callable[[Tensor], object]]
"""A leaf of a block, and what takes its gradient."""


def is_explicit(options: Options) -> bool:
    """Whether :class:`Backward` has the gradients of such a call written out."""
    return options.differential == "token" and options.router_gradient == "none" and options.rotary is None


class Side(NamedTuple):
    """The queries or keys of a block: the decisions (b, n), as :func:`names_of` names them; what they are made of, and
    ``hat`` and ``mass`` (b, n, d) after a division by ``divisor``, (b, n, H, 1) or (b, 1, 1, 1), which has no gradient;
    the latter two under "denominator"."""

    name: str
    decisions: list[Tensor]
    made_of: Difference
    hat: Tensor
    mass: Tensor | None
    divisor: Tensor | None


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
                if self.explicit:
                    step = self.queries if keys else self.whole
                    step(block, total.states, dstates, grad[block.at].to(call.dtype))
                else:
                    slots: list[Slot] = [
                        (s.detach().requires_grad_(), d.add_) for s, d in zip(total.states, dstates, strict=True)
                    ]
                    self.differentiate(block, slots, [grad[block.at]])
            if call.ranks is not None:
                call.ranks.reduce_(dstates, "sum")
            for block in keys:
                block.key_scales = total.key_scales or None
                if self.explicit:
                    self.keys(block, dstates)
                else:
                    self.differentiate(block, [], dstates)

    def queries(self, block: Block, states: list[Tensor], dstates: list[Tensor], grad: Tensor) -> None:
        """O = Qh S / c, c = Mq.m: dQh = (dO / c) S^T, dS = Qh^T (dO / c); for dc see :meth:`quotient`."""
        memory = self.call.memory
        q, _, _, redundant, *_ = block.loaded(block.cut())
        side, dmass = self.side("q", q, redundant, block), None
        if side.mass is not None:
            product = read(side.hat, states[0], memory, SPARE[0])
            grad, dmass, dmean = self.quotient(side.mass, states[1], product, grad)
            dstates[1] += dmean
        dstates[0] += outer(side.hat, grad, self.call.options.num_heads)
        self.hand_over(side, read(grad, states[0].mT, memory, SPARE[1]), dmass, block)

    def keys(self, block: Block, dstates: list[Tensor]) -> None:
        """S = Kh^T V, m = sum Mk: dKh = V dS^T, dV = Kh dS, dMk = dm."""
        _, k, v, _, redundant, *_ = block.loaded(block.cut())
        assert v is not None
        side, dstate = self.side("k", k, redundant, block), dstates[0] * block.scale
        if (receive := self.inputs[2]) is not None:
            receive(block.at, read(side.hat, dstate, self.call.memory, SPARE[1]))
        dmass = None if side.mass is None else dstates[1].expand_as(side.mass)
        self.hand_over(side, read(v, dstate.mT, self.call.memory, SPARE[1]), dmass, block)

    def whole(self, block: Block, _states: list[Tensor], _dstates: list[Tensor], grad: Tensor) -> None:
        """O = A V / c with A = Qh Kh^T: dV = A^T dO, dA = dO V^T, dQh = dA Kh, dKh = dA^T Qh, with dO / c for dO."""
        q, k, v, q_redundant, k_redundant, *_ = block.loaded(block.cut())
        assert v is not None
        queries = self.side("q", q, q_redundant, block, "queries")
        keys = self.side("k", k, k_redundant, block, "keys")
        q, k, v = (heads(t, self.call.options.num_heads) for t in (queries.hat, keys.hat, v))
        weights, dq_mass, dk_mass = (q @ k.mT) * block.scale, None, None
        if queries.mass is not None and keys.mass is not None:
            mean = keys.mass.sum(1, keepdim=True)
            grad, dq_mass, dmean = self.quotient(queries.mass, mean, merged(weights @ v), grad)
            dk_mass = dmean.expand_as(keys.mass)
        g = heads(grad, self.call.options.num_heads)
        dweights = (g @ v.mT) * block.scale
        dv, dq, dk = (merged(t) for t in (weights.mT @ g, dweights @ k, dweights.mT @ q))
        if (receive := self.inputs[2]) is not None:
            receive(block.at, dv)
        self.hand_over(queries, dq, dq_mass, block)
        self.hand_over(keys, dk, dk_mass, block)

    def quotient(self, mass: Tensor, mean: Tensor, product: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """O = P / c, per head c = M.m: dP = dO / c, and with dc = -(dO.P) / c^2, dM = dc m and dm = sum dc M.

        mass M, product P, grad dO (b, n, d), mean m (b, 1, d).
        """
        inverse = inverse_mass(mass, mean, self.call.options.num_heads)
        per_head = (self.call.options.num_heads, -1)
        dproduct = (grad.unflatten(-1, per_head) * inverse).flatten(-2)
        dots = (dproduct * product).unflatten(-1, per_head).sum(-1, keepdim=True)
        dc = (-dots * inverse).expand_as(mass.unflatten(-1, per_head)).flatten(-2)
        return dproduct, dc * mean, (dc * mass).sum(1, keepdim=True)

    def side(self, name: str, z: Tensor | None, redundant: Tensor | None, block: Block, place: str = "side") -> Side:
        (gamma, lam, *_), heads_, memory = self.call.tables, self.call.options.num_heads, self.call.memory
        assert z is not None and redundant is not None and lam is not None
        taken = self.decisions.read(block)
        decisions = [taken[decision].long() for decision in names_of(name)]
        measure, other, choice = (index[..., None] for index in decisions)
        has_mass = self.call.options.normalization == "denominator"
        made_of = Difference.of(z, redundant, gamma[measure], gamma[other], lam[choice], has_mass, memory, place)
        hat, mass = made_of.hat, made_of.mass
        if mass is None:
            return Side(name, decisions, made_of, hat, None, None)
        if name == "q":
            divisor = largest_of_heads(mass, heads_)
        else:
            (scale,) = block.key_scales or [mass.amax((1, 2), keepdim=True)]
            divisor = (scale + (scale == 0))[..., None]
        hat, mass = over_heads(hat, divisor, heads_), over_heads(mass, divisor, heads_)
        return Side(name, decisions, made_of, hat, mass, divisor)

    def hand_over(self, side: Side, dhat: Tensor, dmass: Tensor | None, block: Block) -> None:
        """What follows from the gradients of a side."""
        if dmass is not None and side.divisor is not None:
            dhat, dmass = (over_heads(t, side.divisor, self.call.options.num_heads) for t in (dhat, dmass))
        dz, dredundant, *rows = side.made_of.gradients(dhat, dmass, self.call.memory)
        gamma, lam, *_ = self.tables
        for table, index, row in zip((gamma, gamma, lam), side.decisions, rows, strict=True):
            if table is not None:
                table.index_put_((index,), row[..., 0], accumulate=True)
        number = "qk".index(side.name)
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
