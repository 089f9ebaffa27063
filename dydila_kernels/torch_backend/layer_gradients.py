"""The layer of :mod:`dydila_kernels.torch_backend.layer` with gradients.

Saved are x, the tokens of Eqs. 1-3, what the output projection reads, the decisions and the states.  The backward pass
is that of :mod:`dydila_kernels.torch_backend.backward`, in which the gradient of a block goes through its projection
as soon as it is there: of the gradients those of V, of x and of the attention's output alone are ever whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.precision import no_autocast
from dydila_kernels.torch_backend.backward import Backward, Receive
from dydila_kernels.torch_backend.blocks import Workspace, differentiable_gradients, workspace
from dydila_kernels.torch_backend.blockwise import At, BlockwiseForward, Decisions, pack
from dydila_kernels.torch_backend.core import plain_attention
from dydila_kernels.torch_backend.depthwise import add_depthwise, gradients, plain_depthwise
from dydila_kernels.torch_backend.layer import LazyTokens, linear_into
from dydila_kernels.torch_backend.products import add_product, multiply
from dydila_kernels.torch_backend.projection import project_block_backward
from dydila_kernels.torch_backend.tokens import Indices
from dydila_kernels.types import (
    Convolution,
    CoreInputs,
    Grids,
    LayerWeights,
    Linear,
    Options,
    Projector,
    decision_names,
    frames_of,
)


class Call(NamedTuple):
    """What a call of the layer is told beside differentiable tensors."""

    options: Options
    mask: Tensor | None
    cu_seqlens: Sequence[int] | None
    grids: Grids


class LayerTensors(NamedTuple):
    """The tensors of a layer, flat; or their gradients, None where not needed."""

    x: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    projector_q: Tensor | None
    projector_k: Tensor | None
    router_q: Tensor | None
    router_k: Tensor | None
    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None
    kernel: Tensor | None
    kernel_bias: Tensor | None

    @classmethod
    def of(cls, x: Tensor, weights: LayerWeights) -> LayerTensors:
        projectors = weights.projectors or (Projector(None, None),) * 2  # type: ignore[arg-type]
        kernel = (None, None) if weights.convolution is None else weights.convolution[:2]
        matrices, routers = [p.weight for p in projectors], [p.router for p in projectors]
        return cls._make((x, *weights.qkv, *weights.proj, *matrices, *routers, *weights.tables, *kernel))

    def weights(self, grids: Grids) -> LayerWeights:
        pairs = ((self.projector_q, self.router_q), (self.projector_k, self.router_k))
        return LayerWeights(
            Linear(self.qkv, self.qkv_bias),
            tuple(Projector(weight, router) for weight, router in pairs if weight is not None and router is not None),
            (),
            (self.gamma, self.lam, self.kernel_routers, self.differential_routers),
            None if self.kernel is None else Convolution(self.kernel, self.kernel_bias, grids),
            Linear(self.proj, self.proj_bias),
        )


def kept_tokens(call: Call, given: LayerTensors) -> int:
    """How many tensors of tokens are saved: q, k, v, and q', k' where the layer has both."""
    return 5 if given.projector_q is not None and call.options.differential != "off" else 3


def forward(call: Call, given: LayerTensors) -> tuple[Tensor, ...]:
    """The output, and what :func:`backward_of` needs beside the arguments."""
    x, weights = given.x, given.weights(call.grids)
    kept = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(kept_tokens(call, given))]
    attended = torch.empty_like(kept[0])
    with workspace() as memory:
        tokens = LazyTokens(x, weights, call.options, call.mask, memory, kept=kept)
        inputs = [*tokens.inputs(), *(call.options.rotary or (None, None))]
        blocks = BlockwiseForward(call.options, call.mask, call.cu_seqlens, inputs, weights.tables, x, memory)
        decisions = Decisions.of(blocks)
        states = blocks.forward(lambda block, out: attended[block.at].copy_(out), decisions.write)
    if given.kernel is not None:
        add_depthwise(attended, kept[2], given.kernel, given.kernel_bias, list(frames_of(call.grids)))
    choices = () if tokens.choices is None else (tokens.choices,)
    y = torch.empty_like(attended)
    linear_into(y, attended, weights.proj)
    return y, *kept, attended, *choices, *decisions.tensors.values(), pack(states, x)


class Saved(NamedTuple):
    """What :func:`forward` returns beside the output."""

    kept: Sequence[Tensor | None]
    attended: Tensor
    choices: Tensor | None
    decisions: Decisions
    states: Tensor

    @classmethod
    def of(cls, call: Call, given: LayerTensors, tensors: Sequence[Tensor]) -> Saved:
        names, count = decision_names(call.options.differential), kept_tokens(call, given)
        kept = [*tensors[:count], *(None,) * (5 - count)]
        decisions = Decisions(names, tensors[-1 - len(names) : -1])
        choices = None if given.projector_q is None else tensors[count + 1]
        return cls(kept, tensors[count], choices, decisions, tensors[-1])


def backward_of(call: Call, given: LayerTensors, needed: Sequence[bool], saved: Saved, grad: Tensor) -> LayerTensors:
    """The gradients of what is needed, None elsewhere, from that of the output."""
    total: Any = LayerTensors._make(
        zeros(t) if need and t is not None else None for t, need in zip(given, needed, strict=True)
    )
    with workspace() as memory, no_autocast(grad.device):
        weights = given.weights(call.grids)
        if total.proj is not None:
            multiply(grad.flatten(0, 1).T, saved.attended.flatten(0, 1), total.proj)
        if total.proj_bias is not None:
            torch.sum(grad, (0, 1), out=total.proj_bias)
        dattended = torch.empty_like(saved.attended)
        multiply(grad.flatten(0, 1), given.proj, dattended.flatten(0, 1))
        dv = None
        if given.kernel is not None:
            v, grids = saved.kept[2], list(frames_of(call.grids))
            assert v is not None
            through = any(t is not None for t in (total.x, total.qkv, total.qkv_bias))
            wanted = (through, total.kernel is not None, total.kernel_bias is not None)
            dv, dkernel, dbias = gradients(dattended, v, given.kernel, given.kernel_bias, grids, wanted)
            total = total._replace(kernel=dkernel, kernel_bias=dbias)
        inputs = [*saved.kept, *(call.options.rotary or (None, None))]
        blocks = BlockwiseForward(call.options, call.mask, call.cu_seqlens, inputs, weights.tables, given.x, memory)
        receivers = receivers_of(call, given, total, saved.choices, dv, memory)
        tables = (total.gamma, total.lam, None, None)
        Backward(blocks, saved.decisions, receivers, tables).run(saved.states, dattended)
    return LayerTensors._make(total)


class Layer(torch.autograd.Function):
    """Eqs. 1-9 and the output projection, differentiable with respect to x and all weights but the routers'."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Tensor:
        y, *saved = forward(call, LayerTensors(*tensors))
        ctx.call = call
        ctx.save_for_backward(*tensors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        fields, tensors = len(LayerTensors._fields), ctx.saved_tensors  # which checkpointing gives out once
        given = LayerTensors._make(tensors[:fields])
        saved = Saved.of(call, given, tensors[fields:])
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            plain = partial(plain_layer, call, saved.choices, saved.decisions.tensors)
            return None, *differentiable_gradients(plain, given, needed, grad)
        return None, *backward_of(call, given, needed, saved, grad)


def zeros(t: Tensor) -> Tensor:
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


def receivers_of(
    call: Call, given: LayerTensors, total: LayerTensors, choices: Tensor | None, dv: Tensor | None,
    memory: Workspace,
) -> list[Receive | None]:  # fmt: skip
    """What takes the gradients of the blocks of q, k, v, q', k', through their projections, and of cos and sin."""
    dqkv = (None,) * 3 if total.qkv is None else total.qkv.chunk(3)
    dbias = (None,) * 3 if total.qkv_bias is None else total.qkv_bias.chunk(3)
    weights = given.qkv.chunk(3)

    def linear(part: int, at: At, gradient: Tensor) -> None:
        dw, db, rows = dqkv[part], dbias[part], gradient.flatten(0, 1)
        if total.x is not None:
            add_product(total.x[at].view(rows.shape), rows, weights[part])
        if dw is not None:
            add_product(dw, rows.T, given.x[at].flatten(0, 1))
        if db is not None:
            db += rows.sum(0)

    def value(at: At, gradient: Tensor) -> None:
        if dv is not None:
            gradient = gradient.add_(dv[at])
            if call.mask is not None:
                gradient.masked_fill_(~call.mask[at][..., None], 0)
        linear(2, at, gradient)

    def routed(weight: Tensor, dw: Tensor | None, side: int, at: At, gradient: Tensor) -> None:
        assert choices is not None
        dx = project_block_backward(gradient, given.x[at], weight, choices[side][at], dw, total.x is not None, memory)
        if dx is not None:
            total.x[at] += dx

    q: Receive | None = partial(linear, 0)
    k: Receive | None = partial(linear, 1)
    v: Receive | None = value
    if total.x is None and total.qkv is None and total.qkv_bias is None:
        q = k = v = None
    if given.projector_q is None or given.projector_k is None:
        return [q, k, v, None, None, None, None]
    sides = [
        None if total.x is None and dw is None else partial(routed, weight, dw, side)
        for side, (weight, dw) in enumerate(
            [(given.projector_q, total.projector_q), (given.projector_k, total.projector_k)]
        )
    ]
    if call.options.differential == "off":
        return [*sides, v, None, None, None, None]
    return [q, k, v, *sides, None, None]


def plain_layer(call: Call, choices: Tensor | None, indices: Indices, *tensors: Any) -> Tensor:
    """The layer in plain operations, with decisions that have been taken."""
    given = LayerTensors(*tensors)
    q, k, v = F.linear(given.x, given.qkv, given.qkv_bias).chunk(3, -1)
    q_redundant = k_redundant = None
    if choices is not None and given.projector_q is not None and given.projector_k is not None:
        q_redundant = reference.project(given.x, given.projector_q, choices[0])
        k_redundant = reference.project(given.x, given.projector_k, choices[1])
        if call.options.differential == "off":
            q, k, q_redundant, k_redundant = q_redundant, k_redundant, None, None
    if call.mask is not None:
        v = v.masked_fill(~call.mask[..., None], 0)
    tables = (given.gamma, given.lam, given.kernel_routers, given.differential_routers)
    inputs = CoreInputs(q, k, v, q_redundant, k_redundant, *tables)
    out = plain_attention(inputs, call.options, call.mask, call.cu_seqlens, indices)
    if given.kernel is not None:
        out = plain_depthwise(out, v, given.kernel, given.kernel_bias, call.grids)
    return F.linear(out, given.proj, given.proj_bias)
