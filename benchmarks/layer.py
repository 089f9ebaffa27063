"""Time and memory of the whole layer against softmax attention and Sana's layer: ``python -m benchmarks.layer``.

All layers have the same width and meet the same input, images of N tokens on a square grid, in the same run and in
turn.  "forward" is in eval mode under inference_mode; the gradients are those of the input and of all trainable
parameters.  The last lines hold the rows against the goals of the project.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, rivals, roofline, suite
from benchmarks.harness import Call, Row
from benchmarks.roofline import Cost, Shape
from benchmarks.suite import Comparison, Contender, Mode
from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import equations, layer_error_ratio

CHECKED_TOKENS = 48**2
"""Tokens of the image that the check is done on, unless all sizes are shorter: longer ones take the same path."""


@dataclass(frozen=True)
class Config(suite.Options):
    """Time and memory of the whole layer against softmax attention and Sana's layer, all of the same width."""

    dims: tuple[int, ...] = ()
    """Channels d of all layers; by default 384 on a CPU, and 384, 512, 768 and 1152 on a GPU."""
    heads: tuple[int, ...] = ()
    """Heads of our layer and of Sana's, which are measured with each; by default 1, as in the paper, and d/64, which
    the softmax layer always has."""
    rivals: tuple[Literal["softmax", "sana", "sana compiled", "dydila eager", "dydila compiled"], ...] = (
        "softmax",
        "sana",
    )
    """Layers to compare ours with; "dydila eager" is our reference equations in eager PyTorch, "compiled" a layer under
    torch.compile."""

    def widths(self) -> tuple[int, ...]:
        """The values of d to run."""
        return self.dims or ((128,) if self.smoke else (384, 512, 768, 1152) if self.on_gpu else (384,))


class Case(NamedTuple):
    """A layer by its name and what it meets: tokens (batch, tokens, dim)."""

    name: str
    heads: int
    mode: Mode
    batch: int
    tokens: int
    dim: int
    device: str
    dtype: torch.dtype


def main(config: Config) -> list[Row]:
    """Check, measure, print tables and goals, and store the rows."""
    return suite.run("layer", config, comparisons(config))


def comparisons(config: Config) -> list[Comparison]:
    """By width and mode, each in rising order of N."""
    sizes = config.lengths(cpu=(256, 1024, 4096, 16384), gpu=(256, 1024, 2304, 4096, 16384, 65536))
    return [
        comparison(config, dim, mode, tokens, checked=min(max(sizes), CHECKED_TOKENS))
        for dim in config.widths()
        for mode in config.modes
        for tokens in sorted(sizes)
    ]


def comparison(config: Config, dim: int, mode: Mode, tokens: int, checked: int) -> Comparison:
    """The layers at one width and size."""
    shape = Shape(config.batch(tokens), tokens, dim, 1, config.torch_dtype)
    contenders: dict[str, Contender] = {}
    for name in ("dydila", *config.rivals):
        for heads in suite.heads_of((max(dim // 64, 1),) if name == "softmax" else config.heads, dim):
            case = Case(name, heads, mode, shape.batch, tokens, dim, config.device, config.torch_dtype)
            contenders[f"{name} H={heads}"] = contender(case, checked)
    point = {"tokens": tokens, "batch": shape.batch}
    return Comparison({"mode": mode, "dim": dim}, point, contenders, input_bytes=shape.token_bytes)


def contender(case: Case, checked: int) -> Contender:
    # What the backward pass alone adds to memory says nothing without what the forward pass has left there.  In a fresh
    # process on a CPU, a compiler would count as growth.
    compiles = case.name.endswith("compiled") and not harness.is_gpu(case.device)
    # What is left is the formula that ours is checked against.
    checks = case.name not in ("dydila eager", "dydila compiled")
    return Contender(
        prepare=partial(prepare, case),
        labels={"name": case.name, "heads": case.heads},
        cost=cost(case),
        error_ratio=partial(error_ratio, case._replace(mode="forward", batch=1, tokens=checked)) if checks else None,
        warm_up=None if case.mode == "backward" or compiles else partial(prepare, case._replace(batch=1, tokens=16)),
        graph=True,
    )


@functools.cache
def error_ratio(case: Case) -> float:
    """Of our layer for the output and all gradients; of a rival for its output, against its own formula."""
    if case.name == "dydila":
        attn = DyDiLAttention(case.dim, case.heads, device=case.device, dtype=case.dtype)
        return layer_error_ratio(attn, length=case.tokens)
    case = case._replace(tokens=min(case.tokens, 256))
    layer, x = layer_of(case), torch.randn(1, case.tokens, case.dim, device=case.device, dtype=case.dtype)
    core = {"softmax": rivals.plain_softmax, "sana": rivals.plain_linear}[case.name.split()[0]]

    def formula(dtype: torch.dtype) -> Tensor:
        qkv, weight, bias = (t.to(dtype) for t in (layer.qkv.weight, layer.proj.weight, layer.proj.bias))
        return F.linear(core(*F.linear(x.to(dtype), qkv).chunk(3, -1), heads=case.heads), weight, bias)

    with torch.no_grad():
        return suite.error_ratio(layer(x), formula(case.dtype), formula(torch.float64))


def prepare(case: Case) -> Call:
    """The call to time, on weights and an input of its own."""
    torch.manual_seed(0)
    layer = layer_of(case)
    x = torch.randn(case.batch, case.tokens, case.dim, device=case.device, dtype=case.dtype)
    # The input doubles as the incoming gradient: only the layer takes memory.
    leaf = x.detach().requires_grad_(case.mode != "forward")
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    call = suite.call_of(case.mode, partial(layer, leaf), [leaf, *trainable], x)
    if case.name.endswith("compiled"):
        call()  # a long first call would be taken for a long call, and kept
    return call


def layer_of(case: Case) -> Any:
    """The module with random weights, in train mode where there will be gradients."""
    name, _, form = case.name.partition(" ")
    kind = {"dydila": DyDiLAttention, "softmax": rivals.SoftmaxAttention, "sana": rivals.ReLULinearAttention}[name]
    with torch.device(case.device):
        layer: Any = kind(case.dim, case.heads).to(case.dtype)
    layer.train(case.mode != "forward")
    return Equations(layer) if form == "eager" else torch.compile(layer) if form == "compiled" else layer


class Equations(nn.Module):
    """Our layer as the reference equations in plain PyTorch: (B, N, d) -> (B, N, d)."""

    def __init__(self, attn: DyDiLAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return equations(self.attn, {"x": x, **dict(self.attn.named_parameters())})


def cost(case: Case) -> Cost:
    """What a layer cannot avoid: its projections, its core, and for ours two routed projections and the convolution."""
    rows, dim, mode, dtype = case.batch * case.tokens, case.dim, case.mode, case.dtype
    shape = Shape(case.batch, case.tokens, dim, case.heads, dtype)
    total = roofline.linear(rows, dim, 3 * dim, mode, dtype) + roofline.linear(rows, dim, dim, mode, dtype)
    name = case.name.split()[0]
    if name == "softmax":
        return total + roofline.softmax_core(shape, mode)
    if name == "sana":
        return total + roofline.linear_core(shape, mode)
    routed = roofline.linear(rows, dim, dim, mode, dtype, weights=3)
    return total + routed * 2 + roofline.core(shape, mode) + roofline.convolution(shape, mode)


if __name__ == "__main__":
    suite.command(main, Config)
