"""Time and memory of the whole layer against softmax attention and Sana's layer: ``python -m benchmarks.layer``.

All layers have the same width and meet the same input, images of N tokens on a square grid, in the same run and in
turn.  "forward" is in eval mode under inference_mode; the gradients are those of the input and of all trainable
parameters.  The last lines hold the rows against the goals of the project.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rivals, roofline, suite
from benchmarks.harness import Call
from benchmarks.roofline import Cost
from benchmarks.suite import Case, Comparison, Contender
from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import equations, layer_error_ratio
from dydila_kernels.testing import error_ratio as error_ratio_of
from dydila_kernels.torch_backend import products

Rival = Literal[
    "softmax", "softmax flash", "softmax cudnn", "sana", "sana compiled", "dydila eager", "dydila compiled", "dydila mm"
]


@dataclass(frozen=True)
class Config(suite.Options):
    """Time and memory of the whole layer against softmax attention and Sana's layer, all of the same width."""

    dims: tuple[int, ...] = ()  # Channels d; by default 384 on a CPU, and 384, 512, 768 and 1152 on a GPU.
    heads: tuple[int, ...] = ()  # Of ours and of Sana's; by default 1 and d/64, which the softmax layer always has.
    rivals: tuple[Rival, ...] = ("softmax", "sana")
    """Layers to compare ours with; "dydila eager" is our reference equations in eager PyTorch, "compiled" a layer under
    torch.compile, "mm" a layer whose matrix products are all torch.mm's, as the rivals' are."""


def comparisons(config: Config) -> Iterator[Comparison]:
    """By width and mode, each in rising order of N."""
    sizes = sorted(config.lengths(cpu=(256, 1024, 4096, 16384), gpu=(256, 1024, 2304, 4096, 16384, 65536)))
    dims = config.dims or ((128,) if config.smoke else (384, 512, 768, 1152) if config.on_gpu else (384,))
    for dim, mode, tokens in product(dims, config.modes, sizes):
        ours, of_softmax = suite.heads_of(config.heads, dim), (max(dim // 64, 1),)
        names = ("dydila", *config.rivals)
        who = [(name, h) for name in names for h in (of_softmax if name.startswith("softmax") else ours)]
        yield [contender(case) for case in suite.cases(config, mode, tokens, dim, who)]


def contender(case: Case) -> Contender:
    # Others of ours are the formula that ours is checked against, or ours in another form.
    checks = case.name == "dydila" or not case.name.startswith("dydila")
    return Contender(
        partial(prepare, case),
        case.labels,
        cost(case),
        partial(error_ratio, case.checked) if checks else None,
        rivals.missing(case.name, case.shape, case.device) if case.name in rivals.RIVALS else None,
        # What the backward pass alone adds to memory says nothing without what the forward pass has left there.
        warm_up=None if case.mode == "backward" else suite.warm_up(prepare, case),
        graph=True,
    )


@cache
def error_ratio(case: Case) -> float:
    """Of our layer for the output and all gradients; of a rival for its output, against its own formula."""
    shape = case.shape
    if case.name == "dydila":
        attn = DyDiLAttention(shape.dim, shape.heads, device=case.device, dtype=shape.dtype)
        return layer_error_ratio(attn, length=shape.tokens)
    layer = layer_of(case)
    x = torch.randn(1, min(shape.tokens, 256), shape.dim, device=case.device, dtype=shape.dtype)
    inputs = {"x": x, "qkv": layer.qkv.weight, "proj": layer.proj.weight, "bias": layer.proj.bias}
    core = rivals.RIVALS[case.name.split()[0]].formula

    def formula(t: dict[str, Tensor]) -> Tensor:
        return F.linear(core(*F.linear(t["x"], t["qkv"]).chunk(3, -1), heads=shape.heads), t["proj"], t["bias"])

    return error_ratio_of(lambda t: layer(t["x"]), formula, inputs, ())


def prepare(case: Case) -> Call:
    """The call to time, on weights and an input of its own."""
    torch.manual_seed(0)
    layer, shape = layer_of(case), case.shape
    x = torch.randn(shape.batch, shape.tokens, shape.dim, device=case.device, dtype=shape.dtype)
    # The input doubles as the incoming gradient: only the layer takes memory.
    leaf, trainable = x.detach(), [parameter for parameter in layer.parameters() if parameter.requires_grad]
    call = suite.call_of(case.mode, partial(layer, leaf), [leaf, *trainable], x)
    if case.name.endswith("compiled"):
        call()  # a long first call would be taken for a long call, and kept
    return mock.patch.object(products, "HAS_ONEDNN", False)(call) if case.name.endswith("mm") else call


def layer_of(case: Case) -> Any:
    """The module with random weights, in train mode where there will be gradients."""
    rival, form = rivals.RIVALS.get(case.name), case.name.rpartition(" ")[-1]
    kind = partial(rivals.Layer, rival.attend) if rival else DyDiLAttention
    with torch.device(case.device):
        layer: Any = kind(case.shape.dim, case.shape.heads).to(case.shape.dtype)
    layer.train(case.mode != "forward")
    if form == "eager":  # the reference equations in plain PyTorch
        layer.forward = lambda x: equations(layer, {"x": x, **dict(layer.named_parameters())})
    return torch.compile(layer) if form == "compiled" else layer


def cost(case: Case) -> Cost:
    """What a layer cannot avoid: its projections, its core, and for ours two routed projections and the convolution."""
    shape, mode = case.shape, case.mode
    square = partial(roofline.linear, shape.rows, shape.dim, mode=mode, dtype=shape.dtype)
    total = square(3 * shape.dim) + square(shape.dim)
    name = case.name.split()[0]
    if name != "dydila":
        return total + rivals.RIVALS[name].cost(shape, mode)
    return total + square(shape.dim, weights=3) * 2 + roofline.core(shape, mode) + roofline.convolution(shape, mode)


main = partial(suite.run, "layer", comparisons)

if __name__ == "__main__":
    suite.command(main, Config)
