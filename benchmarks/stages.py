"""Each stage of the layer alone, against what libraries have for it: ``python -m benchmarks.stages``.

    projection           Eqs. 1-2: route, then multiply each token; against grouped_mm, and all projectors on all tokens
    tokens               Eqs. 5-7 of the keys: route and measure; for wide heads also Eq. 8's difference, written
    state, readout       Eq. 8: Kh^T V and Qh S; against bmm, which is given Kh and Qh
    gradients of queries, gradients of keys      of Eqs. 5-8, from dO and V; against autograd, which is given dQh or dKh
    convolution          Eq. 9, added to what is there; against conv2d on channels-last images

"dydila" is the kernels on a GPU and the torch backend elsewhere.  Bytes and FLOPs are those that
dydila_kernels/ops/README.md counts for our stage, and for a rival that is given other tensors, its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks import core, rivals, roofline, suite
from benchmarks.harness import Row
from benchmarks.roofline import Cost, Shape
from benchmarks.suite import Call, Comparison, Contender, Mode
from dydila_kernels import reference, torch_backend
from dydila_kernels.functional import why_not_triton
from dydila_kernels.testing import cast, output_and_gradients, relative_error
from dydila_kernels.torch_backend import blocks, linear_attention
from dydila_kernels.torch_backend import tokens as torch_tokens

RIVALS = {
    "projection": ("dydila", "grouped_mm", "dense"),
    "tokens": ("dydila", "dydila eager"),
    "state": ("dydila", "bmm"),
    "readout": ("dydila", "bmm"),
    "gradients of queries": ("dydila", "dydila eager"),
    "gradients of keys": ("dydila", "dydila eager"),
    "convolution": ("dydila", "conv2d"),
}
"""Who is measured, by stage."""
WHOLE = ("projection", "convolution")
"""Stages without heads, which have all modes."""
PROJECTORS = 3
"""As in the layer by default."""


@dataclass(frozen=True)
class Config(suite.Options):
    """Each stage of the layer alone, against what libraries have for it."""

    dim: int = 384
    """Channels d."""
    heads: tuple[int, ...] = ()
    """Heads to measure with, where a stage has them; by default 1 and DIM/64."""
    stages: tuple[str, ...] = tuple(RIVALS)
    """Stages to measure."""


def main(config: Config) -> list[Row]:
    """Check, measure, print tables and store the rows."""
    return suite.run("stages", config, list(comparisons(config)))


def comparisons(config: Config) -> Iterator[Comparison]:
    per_head = config.heads or tuple(dict.fromkeys((1, max(1, config.dim // 64))))
    for stage in config.stages:
        modes = suite.MODES if stage in WHOLE else ("backward",) if stage.startswith("gradients") else ("forward",)
        for mode in [mode for mode in config.modes if mode in modes]:
            for tokens in config.lengths(cpu=(256, 1024, 4096), gpu=(256, 1024, 4096, 16384, 65536)):
                batch = max(1, 65536 // tokens) if config.on_gpu and not config.smoke else 1
                shape = Shape(batch, tokens, config.dim, 1, config.torch_dtype)
                contenders = {
                    f"{name} H={heads}": contender(config, stage, name, mode, replace(shape, heads=heads))
                    for heads in ((1,) if stage in WHOLE else per_head)
                    for name in RIVALS[stage]
                }
                series: Row = {"stage": stage, "mode": mode, "dim": config.dim}
                yield Comparison(series, {"batch": batch, "tokens": tokens}, contenders, input_bytes=2 * shape.unit)


def contender(config: Config, stage: str, name: str, mode: Mode, shape: Shape) -> Contender:
    ours, kernels = name == "dydila", runs_kernels(config.device, shape.dtype)
    missing = None
    if ours and not kernels and stage.startswith("gradients"):
        missing = "missing: the kernels need a GPU, and for the torch backend this is no stage of its own"
    if name == "grouped_mm" and not hasattr(F, "grouped_mm"):
        missing = "missing: this version of torch has none"
    small = replace(shape, batch=1, tokens=min(shape.tokens, core.CHECKED_TOKENS))
    arguments = (name, mode, shape, config.device)
    return Contender(
        partial(WHOLE_STAGES[stage], *arguments) if stage in WHOLE else partial(prepare, stage, *arguments),
        {"name": name} if stage in WHOLE else {"name": name, "heads": shape.heads},
        cost(stage, name, mode, shape, kernels),
        partial(error_ratio, stage, small, config.device) if ours else None,
        missing,
        graph=True,
    )


def runs_kernels(device: str, dtype: torch.dtype) -> bool:
    """Whether "dydila" is the kernels."""
    return why_not_triton(torch.device(device), dtype) is None


def cost(stage: str, name: str, mode: Mode, shape: Shape, kernels: bool) -> Cost:
    """What a stage moves and computes."""
    d, e = shape.dim, shape.dim // shape.heads
    if stage == "projection":
        route = units(shape, 0, 0 if mode == "backward" else 2 * d * PROJECTORS)
        return roofline.linear(shape.rows, d, d, mode, shape.dtype, weights=PROJECTORS) + route
    if stage == "convolution":  # what is there is read, too, and the weight has a gradient of its own
        return roofline.by_mode(mode, units(shape, 3, 18 * d), units(shape, 5, 38 * d))
    routing, made = 4 * d * 2 * core.FACTORS, kernels and not fused(shape)
    if name == "dydila eager":
        return units(shape, 3, routing) if stage == "tokens" else units(shape, 5, 0)
    if name == "bmm" or (made and stage in ("state", "readout")):
        return units(shape, 2, 2 * d * e) + Cost(shape.batch * d * e * shape.dtype.itemsize, 0)
    if made:
        return units(shape, 3, routing) if stage == "tokens" else units(shape, 5, 0)
    return {
        "tokens": units(shape, 2, routing),
        "state": units(shape, 3, 2 * d * e),
        "readout": units(shape, 3, 2 * d * e + routing),
        "gradients of queries": units(shape, 5, 4 * d * e),
        "gradients of keys": units(shape, 6, 6 * d * e),
    }[stage]


def units(shape: Shape, count: int, flops: int) -> Cost:
    """So many times B N d elements, and FLOPs for each of B N tokens."""
    return Cost(count * shape.unit, flops * shape.rows)


def fused(shape: Shape) -> bool:
    from benchmarks.launchers import is_fused  # needs Triton

    return is_fused(shape)


# Tokens, state, readout, gradients ------------------------------------------------------------------------------------


def prepare(stage: str, name: str, mode: Mode, shape: Shape, device: str) -> Call:
    if name != "dydila":
        return torch.inference_mode()(given(stage, shape, device)) if mode == "forward" else given(stage, shape, device)
    if runs_kernels(device, shape.dtype):
        return getattr(launchers(shape, device), stage.replace(" ", "_"))
    return torch.inference_mode()(by_blocks(stage, shape, device))


def launchers(shape: Shape, device: str) -> Any:
    """The kernels on random inputs."""
    from benchmarks.launchers import Launchers  # needs Triton

    inputs = core.random_inputs(shape, device)
    return Launchers(inputs, torch.randn_like(inputs["q"]), shape.heads)


def given(stage: str, shape: Shape, device: str) -> Callable[[], object]:
    """The stage in plain PyTorch: "bmm" is given Zh, the gradients are given that of Zh."""
    inputs = core.random_inputs(shape, device)
    side = "q" if stage in ("readout", "gradients of queries") else "k"
    if stage in ("state", "readout"):
        z, v = (rivals.split(inputs[key], shape.heads) for key in (side, "v"))
        states = z.mT @ v / shape.tokens
        return (lambda: z.mT @ v) if stage == "state" else (lambda: rivals.merge(z @ states))
    leaves = [inputs[side], inputs[f"{side}_redundant"]]
    tables = [inputs["gamma"], inputs["lam"]]
    if stage == "tokens":
        return lambda: equations(side, leaves, tables, inputs)
    for leaf in leaves + tables:
        leaf.requires_grad_()
    return suite.call_of(
        "backward", lambda: equations(side, leaves, tables, inputs), leaves + tables, inputs["v"].detach()
    )


def equations(side: str, pair: list[Tensor], tables: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Eqs. 5-8 up to Zh of one side, routing and all."""
    number = "qk".index(side)
    routers = inputs["kernel_routers"]
    z, redundant = (
        reference.power(t, reference.choose(tables[0], reference.route(t, routers[2 * i + number])))
        for i, t in enumerate(pair)
    )
    index = reference.route(torch.cat([z, redundant], -1), inputs["differential_routers"][number])
    return reference.difference(z, redundant, reference.choose(tables[1], index))


def by_blocks(stage: str, shape: Shape, device: str) -> Callable[[], object]:
    """The stage as the torch backend runs it: a block of rows at a time, in its own accumulation dtype."""
    inputs = core.random_inputs(shape, device)
    like = inputs["q"]
    options = torch_backend.Options(shape.heads, "length", "none", "token")
    names = ("q", "k", "v", "q_redundant", "k_redundant")
    tables = [inputs[key] for key in ("gamma", "lam", "kernel_routers", "differential_routers")]
    call = torch_backend.Call(options, None, None, [inputs[key] for key in names], tables, like)

    def load(key: str, at: torch_backend.At) -> Tensor:
        return inputs[key][at].to(call.dtype, copy=True)  # it is overwritten

    def made(side: str, at: torch_backend.At) -> torch_tokens.Tokens:
        return torch_tokens.tokens_of(side, load(side, at), load(f"{side}_redundant", at), call.tables, options, {})

    def walk(work: Callable[[torch_backend.At], object]) -> None:
        for images, ranges in blocks.all_blocks(like):
            for rows in ranges:
                work((images, rows))

    if stage == "tokens":
        return lambda: walk(lambda at: made("k", at))
    if stage == "state":
        return lambda: walk(
            lambda at: linear_attention.states_of(made("k", at), load("v", at), 1 / shape.tokens, options)
        )
    e = shape.dim // shape.heads
    states = torch.randn(shape.batch, shape.heads, e, e, device=device, dtype=call.dtype)
    return lambda: walk(lambda at: linear_attention.readout(made("q", at), [states[at[0]]], options))


# Projection, convolution ----------------------------------------------------------------------------------------------


def project(name: str, mode: Mode, shape: Shape, device: str) -> Call:
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.tokens, shape.dim, device=device, dtype=shape.dtype)
    weight, router = (
        torch.randn(size, device=device, dtype=shape.dtype) * shape.dim**-0.5
        for size in ((PROJECTORS, shape.dim, shape.dim), (shape.dim, PROJECTORS))
    )
    leaves = [x, weight]
    for leaf in leaves:
        leaf.requires_grad_(mode != "forward")
    return suite.call_of(mode, lambda: PROJECTIONS[name](x, weight, router), leaves, torch.randn_like(x))


def routed(x: Tensor, weight: Tensor, router: Tensor) -> Tensor:
    """Ours."""
    if runs_kernels(x.device.type, x.dtype):
        from dydila_kernels.ops import backend  # needs Triton

        return backend.project(x, weight, backend.route(x, [router])[0])
    index = torch_backend.projection_logits(x.detach(), router).argmax(-1)
    return torch_backend.routed_projection(x, weight, index)


def grouped(x: Tensor, weight: Tensor, router: Tensor) -> Tensor:
    """Sorted by projector, multiplied by ``grouped_mm``, put back."""
    rows = x.flatten(0, 1)
    index = reference.route(rows, router)
    order = index.argsort(stable=True)
    counts = (index[:, None] == torch.arange(len(weight), device=x.device)).sum(0)
    y = F.grouped_mm(rows.index_select(0, order), weight, offs=counts.cumsum(0, dtype=torch.int32))
    return torch.empty_like(y).index_copy_(0, order, y).view_as(x)


def dense(x: Tensor, weight: Tensor, router: Tensor) -> Tensor:
    """Every projector on every token, then the choice."""
    return reference.project(x, weight, reference.route(x, router))


PROJECTIONS = {"dydila": routed, "grouped_mm": grouped, "dense": dense}


def convolve(name: str, mode: Mode, shape: Shape, device: str) -> Call:
    torch.manual_seed(0)
    v, out, grad = (torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype) for _ in range(3))
    weight, bias = torch.randn(shape.dim, 1, 3, 3, device=device) / 3, torch.randn(shape.dim, device=device)
    grid = torch_backend.Grid(0, isqrt(shape.tokens), isqrt(shape.tokens))
    if name == "dydila" and runs_kernels(device, shape.dtype):
        return partial(convolve_by_kernels, mode, out, v, weight.flatten(1).t().contiguous().t(), bias, grad, grid)
    if name != "dydila":
        weight, bias = weight.to(shape.dtype), bias.to(shape.dtype)
    leaves = [v, weight, bias]
    for leaf in leaves:
        leaf.requires_grad_(mode != "forward")
    add = torch_backend.depthwise if name == "dydila" else add_conv2d
    return suite.call_of(mode, lambda: add(out.detach(), v, weight, bias, [grid]), leaves, grad)


def convolve_by_kernels(
    mode: Mode, out: Tensor, v: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grid: torch_backend.Grid
) -> Any:
    """Adds to ``out`` the convolution, its gradient with respect to v, or both; the gradients of weight and bias."""
    from dydila_kernels.ops import depthwise  # needs Triton

    geometry = depthwise.Geometry.of([grid], v.device)
    if mode != "backward":
        depthwise.depthwise(out, v, weight, bias, geometry)
    if mode != "forward":
        depthwise.depthwise_input_gradient(out, grad, weight, geometry)
        return depthwise.depthwise_weight_gradient(v, grad, geometry)
    return None


def add_conv2d(out: Tensor, v: Tensor, weight: Tensor, bias: Tensor, grids: list[torch_backend.Grid]) -> Tensor:
    """``out + DWC(V)``, written into ``out``; tokens are images in the channels-last layout as they lie."""
    image = v.unflatten(1, (grids[0].rows, grids[0].columns)).permute(0, 3, 1, 2)
    return out.add_(F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).flatten(1, 2))


WHOLE_STAGES: dict[str, Callable[..., Call]] = {"projection": project, "convolution": convolve}


# Checks ---------------------------------------------------------------------------------------------------------------


def error_ratio(stage: str, shape: Shape, device: str) -> float:
    """Our error over that of the equations in plain PyTorch: of the stage, or of the core where it is not kernels."""
    if stage in WHOLE:
        return whole_error_ratio(stage, shape, device)
    if runs_kernels(device, shape.dtype):
        return kernel_error_ratios(shape, device)[stage]
    return core.error_ratio(device, shape)


@cache
def kernel_error_ratios(shape: Shape, device: str) -> dict[str, float]:
    return launchers(shape, device).error_ratios()


@cache
def whole_error_ratio(stage: str, shape: Shape, device: str) -> float:
    torch.manual_seed(0)
    d = shape.dim
    inputs = {"x": torch.randn(shape.batch, shape.tokens, d)}
    if stage == "projection":
        inputs |= {"weight": torch.randn(PROJECTORS, d, d) * d**-0.5}
        index = torch.randint(PROJECTORS, inputs["x"].shape[:2], dtype=torch.int8)
    else:
        inputs |= {"weight": torch.randn(d, 1, 3, 3) / 3, "bias": torch.randn(d)}
    grid = torch_backend.Grid(0, isqrt(shape.tokens), isqrt(shape.tokens))

    def plain(t: dict[str, Tensor]) -> Tensor:
        if stage == "projection":
            return reference.project(t["x"], t["weight"], index.to(t["x"].device))
        return reference.depthwise(t["x"], t["weight"], t["bias"], grid[1:])

    kernels = runs_kernels(device, shape.dtype)

    def ours(t: dict[str, Tensor]) -> Tensor:
        if stage == "projection" and kernels:
            from dydila_kernels.ops import backend  # needs Triton

            return backend.project(t["x"], t["weight"], index.to(device))
        if stage == "projection":
            return torch_backend.routed_projection(t["x"], t["weight"], index.long().to(device))
        return torch_backend.depthwise(torch.zeros_like(t["x"]), t["x"], t["weight"], t["bias"], [grid])

    working = {name: t.to(device, shape.dtype) for name, t in inputs.items()}
    truth = output_and_gradients(plain, cast({name: t.cpu() for name, t in working.items()}, torch.float64))
    usual = output_and_gradients(plain, working)
    if stage == "convolution" and kernels:
        found = kernel_convolution(working, grid)
    else:
        found = output_and_gradients(ours, working)
    errors = [(relative_error(found[name], t), relative_error(usual[name], t)) for name, t in truth.items()]
    return max(ours / theirs if theirs else ours for ours, theirs in errors)


def kernel_convolution(t: dict[str, Tensor], grid: torch_backend.Grid) -> dict[str, Tensor]:
    """What ``output_and_gradients`` gives for the convolution alone, by the kernels that are timed."""
    out, dv = torch.zeros_like(t["x"]), torch.zeros_like(t["x"])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    weight = t["weight"].float().flatten(1).t().contiguous().t()
    convolve_by_kernels("forward", out, t["x"], weight, t["bias"].float(), grad, grid)
    dweight, dbias = convolve_by_kernels("backward", dv, t["x"], weight, t["bias"].float(), grad, grid)
    return {"output": out, "x": dv, "weight": dweight.view_as(t["weight"]), "bias": dbias}


if __name__ == "__main__":
    raise SystemExit(suite.exit_code(main(tyro.cli(Config))))
