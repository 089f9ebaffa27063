"""The kernels of one call of the core, to be launched one stage at a time; needs Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.roofline import Shape
from dydila_kernels import reference
from dydila_kernels.ops import core, gemm
from dydila_kernels.ops.arguments import Denominator
from dydila_kernels.ops.gradients import gradients, source_of
from dydila_kernels.ops.linear_attention import readout, state
from dydila_kernels.ops.tokens import tokens
from dydila_kernels.testing import TOKENS, Tensors, relative_error


def is_fused(shape: Shape) -> bool:
    return core.is_fused(shape.dim, shape.heads)


class Launchers:
    """Runs the stages once, in their order; each method then launches its stage again on what the others left.

    ``inputs`` are those of the core by name, ``grad`` (B, N, d) the gradient of its output.
    """

    def __init__(self, inputs: Tensors, grad: Tensor, heads: int) -> None:
        self.inputs = core.Inputs(**inputs, weight=None, bias=None)
        settings = core.Settings(
            mask=None, cu_seqlens=None, grids=(), num_heads=heads, normalization="length", differential="token",
            straight_through=False,
        )  # fmt: skip
        self.grad, self.fused = grad, core.is_fused(grad.shape[-1], heads)
        self.context = core.context_of(self.inputs, settings)
        self.saved = core.empty_saved(self.inputs, settings)
        self.q, self.k = core.operands_of(self.context, self.inputs, settings, self.saved)
        self.q_hat, self.k_hat, self.out, self.dv = (torch.empty_like(grad) for _ in range(4))
        self.dq, self.dk = ([torch.empty_like(grad) for _ in range(2)] for _ in range(2))
        e = grad.shape[-1] // heads
        self.states, self.dstates = (grad.new_empty(grad.shape[0], heads, e, e) for _ in range(2))
        tokens(self.context, self.q, decide=True, out=self.q_hat)
        tokens(self.context, self.k, decide=True, out=self.k_hat)
        for stage in (self.state, self.readout, self.prepare_gradients, self.gradients_of_queries):
            stage()
        self.gradients_of_keys()

    def tokens(self) -> None:
        """Routes and measures the keys; wide heads have Zh written, for others it is made where it is used."""
        tokens(self.context, self.k, decide=True, out=None if self.fused else self.k_hat)

    def state(self) -> None:
        if self.fused:
            self.states.copy_(state(self.context, self.k, self.inputs.v)[0])
        else:
            gemm.state(self.context, self.k_hat, self.inputs.v, self.states)

    def readout(self) -> None:
        """Of the queries; fused, these are routed and measured on the way."""
        if self.fused:
            readout(self.context, self.q, self.states, self.out, decide=True)
        else:
            gemm.readout(self.context, self.out, self.q_hat, self.states, scale=self.context.output_scale)

    def prepare_gradients(self) -> None:
        """The gradient of the states; for wide heads, those of Qh and Kh, and that of V."""
        context, natural = self.context, self.context.output_scale * self.context.fp16_prescale
        if self.fused:
            self.dstates.copy_(state(context, self.q, self.grad)[0])
            return
        gemm.state(context, self.q_hat, self.grad, self.dstates)
        self.dq_hat, self.dk_hat = torch.empty_like(self.grad), torch.empty_like(self.grad)
        gemm.readout(context, self.dq_hat, self.grad, self.states, transposed=True, scale=natural)
        gemm.readout(context, self.dk_hat, self.inputs.v, self.dstates, transposed=True, scale=natural)
        gemm.readout(context, self.dv, self.k_hat, self.dstates, scale=context.output_scale)

    def gradients_of_queries(self) -> None:
        wide = {} if self.fused else {"given": self.dq_hat}
        source = source_of(self.context, **(wide or {"x": self.grad, "matrix": self.states}))
        gradients(self.context, self.q, source, Denominator(), *self.dq)

    def gradients_of_keys(self) -> None:
        """Fused, that of V too."""
        if self.fused:
            source = source_of(self.context, x=self.inputs.v, matrix=self.dstates)
            gradients(self.context, self.k, source, Denominator(), *self.dk, dv=self.dv)
        else:
            gradients(self.context, self.k, source_of(self.context, given=self.dk_hat), Denominator(), *self.dk)

    def results(self) -> dict[str, list[Tensor]]:
        """By stage, in the scale of the equations."""
        unit = self.context.fp16_prescale
        return {
            "tokens": [self.k_hat / unit],
            "state": [self.states / unit],
            "readout": [self.out],
            "gradients of queries": self.dq,
            "gradients of keys": [*self.dk, self.dv],
        }

    def error_ratios(self) -> dict[str, float]:
        """By stage, the error over that of the equations in plain PyTorch, in the same dtype, with the same decisions.

        The worst of the tensors of a stage.
        """
        on_cpu = {name: t.detach().cpu().double() for name, t in self.inputs._asdict().items() if t is not None}
        plain, truth = (
            self.equations({name: t.to(dtype) for name, t in on_cpu.items()})
            for dtype in (self.grad.dtype, torch.double)
        )

        def ratio(found: Tensor, usual: Tensor, true: Tensor) -> float:
            ours, theirs = relative_error(found, true), relative_error(usual, true)
            return ours / theirs if theirs else ours

        return {
            stage: max(ratio(*each) for each in zip(found, plain[stage], truth[stage], strict=True))
            for stage, found in self.results().items()
        }

    def equations(self, inputs: Tensors) -> dict[str, list[Tensor]]:
        """The stages by :mod:`dydila_kernels.reference`, with the decisions of the kernels."""
        leaves = {name: inputs[name].requires_grad_() for name in TOKENS}
        shape = self.grad.shape[:2]

        def side(name: str, i: int) -> Tensor:
            indices = self.saved.indices[i].cpu().long().unflatten(-1, shape)
            z, redundant = (
                reference.power(leaves[key], inputs["gamma"][index])
                for key, index in zip((name, f"{name}_redundant"), indices, strict=False)
            )
            return reference.difference(z, redundant, inputs["lam"][indices[2]])

        q_hat, k_hat = side("q", 0), side("k", 1)
        per_head = [t.unflatten(-1, (self.context.heads, -1)).transpose(1, 2) for t in (q_hat, k_hat, leaves["v"])]
        states = per_head[1].mT @ per_head[2] / shape[1]
        out = (per_head[0] @ states).transpose(1, 2).flatten(2)
        wanted = ("q", "q_redundant", "k", "k_redundant", "v")
        found = torch.autograd.grad(out, [leaves[name] for name in wanted], self.grad.cpu().to(out))
        return {
            "tokens": [k_hat],
            "state": [states],
            "readout": [out],
            "gradients of queries": list(found[:2]),
            "gradients of keys": list(found[2:]),
        }
