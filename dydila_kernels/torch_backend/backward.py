"""The backward pass of the core, over the blocks of its forward pass.

Each block is run again from its inputs with the routing decisions of the forward, and differentiated on the spot: first
the queries, whose gradients give those of the states, then the keys.  Where ranks share the tokens, the gradients of
the states are summed over them between the two walks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blockwise import At, Block, BlockwiseForward, Decisions, States, unpack

Receive = Callable[[At, Tensor], object]
"""Takes the gradient of a block of an input, and what is in memory there until the next block."""
Slot = tuple[Tensor, Callable[[Tensor], object]]
"""A leaf of a block, and what takes its gradient."""


def backward(
    call: BlockwiseForward,
    decisions: Decisions,
    states: Tensor,
    grad: Tensor,
    inputs: Sequence[Receive | None],
    tables: Sequence[Tensor | None],
) -> None:
    """Hands the gradients of the blocks of each input to what ``inputs`` has for it, and adds those of the tables to
    ``tables``; None where a gradient is not needed.

    ``states``: what the forward pass of ``call`` returned, packed; ``grad`` (B, N, d): of its output.
    """
    table_slots: list[Slot] = [
        (t.requires_grad_(), total.add_)
        for t, total in zip(call.tables[:4], tables, strict=True)
        if t is not None and total is not None
    ]

    def differentiate(block: Block, state_slots: list[Slot], cotangents: list[Tensor]) -> None:
        slots, cut = state_slots + table_slots, block.cut()
        for i, (t, receive) in enumerate(zip(cut, inputs, strict=True)):
            if t is not None and receive is not None:
                cut[i] = leaf = t.detach().requires_grad_()
                slots.append((leaf, partial(receive, block.at)))
        with torch.enable_grad():
            outputs = block.run(cut, decisions.read(block), [state for state, _ in state_slots])
        roots = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if roots and slots:
            leaves, incoming = [leaf for leaf, _ in slots], [c for _, c in roots]
            found = torch.autograd.grad([o for o, _ in roots], leaves, incoming, materialize_grads=True)
            for (_, receive), gradient in zip(slots, found, strict=True):
                receive(gradient)

    for keys, queries in call.walk():
        total = States()
        if keys:
            images = len(grad[keys[0].at])
            total, states = unpack(states, images, call.options, grad.shape[-1])
        dstates = [torch.zeros_like(s) for s in total.states]
        slots = [(s.detach().requires_grad_(), d.add_) for s, d in zip(total.states, dstates, strict=True)]
        for block in queries:
            differentiate(block, slots, [grad[block.at]])
        if call.ranks is not None:
            call.ranks.reduce_(dstates, "sum")
        for block in keys:
            block.key_scales = total.key_scales or None
            differentiate(block, [], dstates)
