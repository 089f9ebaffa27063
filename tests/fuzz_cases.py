"""Random cases for the fuzzer: one call of the layer or of the core, and the same in the equations of the reference."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tests.interpreter  # noqa: F401  (before the package, which may import Triton)
from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.checks import BRANCHES, DIFFERENTIALS, NORMALIZATIONS, PAIRINGS, ROUTER_GRADIENTS
from dydila_kernels.norms import ACROSS, NORMS
from dydila_kernels.testing import (
    TOKENS,
    Tensors,
    call_layer,
    core_inputs,
    decisions,
    equations,
    layer_inputs,
    normed_tokens,
)
from tests.layers import SUB_MODULES, SURROUNDINGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One call.  ``inputs`` are all its floating-point tensors by name, in the dtype of the call."""

    about: dict[str, Any]
    inputs: Tensors
    ours: Callable[[Tensors], Tensor]
    plain: Callable[[Tensors, Tensors], Tensor]
    """The equations for inputs of any dtype and our decisions."""
    logits: Callable[[Tensors, Tensors], Tensors]
    """The same for the logits of every router, (B, N, choices) each."""
    decide: Callable[[], Tensors]
    eps: float
    """Of the dtype that the matrix products are computed in."""
    wanted: list[str]
    others: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Other ways to the same output."""


class Draw(random.Random):
    generator: torch.Generator | None = None

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: float, high: float) -> float:
        """Even in the logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def normal(self, *shape: int) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(self.getrandbits(32))
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def table(self, length: int, *ranges: tuple[float, float]) -> Tensor:
        """Entries between the bounds of one of the ranges, or of each its own."""
        low, high = self.choice(ranges)
        return torch.tensor([self.uniform(low, high) for _ in range(length)], dtype=torch.float64)


def draw_width(draw: Draw) -> tuple[int, int]:
    """d and a number of heads that divides it."""
    dim = draw.choice([1, 2, 3, 4, 5, 6, 8, 8, 12, 15, 16, 24, 24, 33, 40, 72] + [100, 136] * draw.chance(0.2))
    return dim, draw.choice([heads for heads in range(1, dim + 1) if dim % heads == 0])


def draw_side(draw: Draw) -> int:
    return draw.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 6])


def draw_grid(draw: Draw) -> tuple[int, ...]:
    """(rows, columns), or those of a video after the number of its frames."""
    grid = draw_side(draw), draw_side(draw)
    return (draw.choice([0, 1, 2, 3]), *grid) if draw.chance(0.3) else grid


def draw_rotary(draw: Draw, batch: int, length: int, channels: int) -> dict[str, Any]:
    """Tables of all images or of each, in any dtype, of any angles."""
    if channels % 2 or draw.chance(0.7):
        return {}
    shape = (batch, length, channels) if draw.chance(0.5) else (length, channels)
    angles = draw.normal(*shape) * draw.choice([0.0, 1.0, 100.0])
    dtype = draw.choice([torch.float32, torch.float64])
    tables = (angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype))
    return {"rotary": tables, "rotary_pairing": draw.choice(PAIRINGS)}


def draw_mask(draw: Draw, batch: int, length: int) -> Tensor:
    """Any share of tokens, images without one, and images in full."""
    mask = draw.normal(batch, length) < draw.choice([-1.0, 0.0, 1.0])
    for b in range(batch):
        if draw.chance(0.2):
            mask[b] = draw.chance(0.3)
    return mask.t().contiguous().t() if draw.chance(0.2) else mask


def draw_layout(draw: Draw, t: Tensor) -> Tensor:
    """The same values (B, N, d) with other strides; now and then one token over and over."""
    kind = draw.choice(["contiguous"] * 4 + ["transposed", "channels first", "sliced", "every other", "expanded"])
    if kind == "expanded" and t.shape[1]:
        return t[:, :1].expand_as(t)
    layouts: dict[str, Callable[[], Tensor]] = {
        "transposed": lambda: t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda: t.mT.contiguous().mT,
        "sliced": lambda: torch.cat([t, t], -1)[..., t.shape[-1] // 2 :][..., : t.shape[-1]].copy_(t),
        "every other": lambda: t.repeat_interleave(2, 1)[:, ::2],
    }
    return layouts.get(kind, lambda: t)()


def draw_bounds(draw: Draw, lengths: Sequence[int]) -> Any:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return draw.choice([bounds, tuple(bounds), torch.tensor(bounds), torch.tensor(bounds, dtype=torch.int32)])


def spoil_rows(draw: Draw, t: Tensor) -> None:
    """Some rows zero, all negative, or like another one, in place."""
    rows = t.view(-1, t.shape[-1])
    for _ in range(draw.choice([0, 0, 1, 3]) if len(rows) else 0):
        row, kind = draw.randrange(len(rows)), draw.choice(["zero", "negative", "copy"])
        rows[row] = {"zero": rows[row] * 0, "negative": -rows[row].abs(), "copy": rows[draw.randrange(len(rows))]}[kind]


def spoil_routers(draw: Draw, routers: Tensor) -> None:
    """Columns that are almost the same, so that decisions are close, in place."""
    for _ in range(draw.choice([0] * 8 + [1, 2]) if routers.shape[-1] > 1 else 0):
        first, second = draw.sample(range(routers.shape[-1]), 2)
        routers[..., second] = routers[..., first] * (1 + draw.choice([1e-7, 1e-4, 1e-2]) * draw.uniform(-1, 1))


def ranges_of_gamma(options: Mapping[str, Any]) -> list[tuple[float, float]]:
    small = [(3.0, 3.0), (1.0, 1.0), (0.5, 4.0)]
    # Under "denominator" powers and their products must not underflow, see dydila_attention.
    return small if options["normalization"] == "denominator" else [*small, (8.0, 64.0)]


def draw_layer(draw: Draw, backend: str) -> Case:
    dim, heads = draw_width(draw)
    differential = draw.choice(DIFFERENTIALS)
    configuration: dict[str, Any] = {
        "dim": dim,
        "num_heads": heads,
        "qkv_bias": draw.chance(0.3),
        "proj_bias": draw.chance(0.7),
        "proj_drop": draw.choice([0.0, 0.5]),
        "num_projectors": draw.randint(0 if differential == "off" else 1, 5),
        "num_kernel_factors": draw.randint(1, 6),
        "num_differential_factors": draw.randint(1, 6),
        "normalization": draw.choice(NORMALIZATIONS),
        "router_gradient": draw.choice(ROUTER_GRADIENTS),
        "differential": differential,
        "qk_norm": draw.choice([None, None, *NORMS]),
        "qk_norm_across": draw.choice(ACROSS),
        "num_prefix_tokens": draw.choice([0, 0, 1, 3]),
        "backend": backend,
    }
    branches = draw.sample(BRANCHES, draw.randint(0, 5))
    configuration["dwc_branches"] = () if branches == ["identity"] else tuple(branches)
    dtype = draw.choice(DTYPES[1:] if backend == "triton" else DTYPES)
    half = torch.finfo(dtype).bits == 16
    autocast = draw.choice([None] * 9 + [torch.bfloat16]) if dtype == torch.float32 and DEVICE == "cpu" else None

    torch.manual_seed(draw.getrandbits(32))
    attn = DyDiLAttention(**configuration, dtype=torch.float64).eval()  # dropout is in the way of a comparison
    with torch.no_grad():
        attn.measure.gamma.copy_(draw.table(attn.measure.num_factors, *ranges_of_gamma(configuration)))
        if attn.differential is not None:
            lams = [(0.01, 0.01), (-0.5, 0.5), (-3.0, 3.0), (0.0, 0.0), *([(-100.0, 100.0)] if not half else [])]
            attn.differential.lam.copy_(draw.table(attn.differential.num_factors, *lams))
        for name, parameter in attn.named_parameters():
            if "router" in name:
                spoil_routers(draw, parameter)
            elif "norm" in name:
                parameter.add_(0.3 * draw.normal(*parameter.shape))
    attn.to(DEVICE, dtype)

    prefix = attn.num_prefix_tokens
    arguments: dict[str, Any] = {}
    if draw.chance(0.25):
        batch, grids = 1, [draw_grid(draw) for _ in range(draw.randint(1, 3))]
        arguments = {"HW": grids, "cu_seqlens": draw_bounds(draw, [prefix + math.prod(grid) for grid in grids])}
        length = int(arguments["cu_seqlens"][-1])
    else:
        batch, grid = draw.choice([0, 1, 1, 2, 2, 2, 3, 3]), draw_grid(draw)
        length = prefix + math.prod(grid)
        square = len(grid) == 2 and grid[0] == grid[1]
        arguments["HW"] = None if square and draw.chance(0.7) else grid
        if draw.chance(0.35):
            arguments["mask"] = draw_mask(draw, batch, length).to(DEVICE)
    arguments |= draw_rotary(draw, batch, length, dim // heads)
    # Straight through, logits are large where tokens are, and a softmax knows them to their rounding only.
    mild = half or configuration["router_gradient"] == "straight_through"
    x = draw.normal(batch, length, dim) * (draw.between(0.1, 10) if mild else draw.between(1e-8, 1e8))
    spoil_rows(draw, x)
    x = draw_layout(draw, x).to(DEVICE, dtype)
    if arguments.get("mask") is not None and draw.chance(0.3):
        x = torch.where(arguments["mask"][..., None], x, draw.choice([math.nan, math.inf, -1e30]))

    inputs = layer_inputs(attn, x)
    context = (lambda: torch.autocast(DEVICE, autocast)) if autocast is not None else nullcontext
    given = {**arguments, "cu_seqlens": as_list(arguments.get("cu_seqlens"))}

    def ours(t: Tensors) -> Tensor:
        with context():
            return call_layer(attn, t, **arguments)

    def plain(t: Tensors, indices: Tensors) -> Tensor:
        with context() if t["x"].dtype == dtype else nullcontext():
            return equations(attn, t, **given, indices=indices)

    def decide() -> Tensors:
        with context():
            return attn.routing(x, arguments.get("mask")).indices

    def without_gradients(layer: DyDiLAttention, mode: Callable[[], Any]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with mode(), context():
                return layer(x, **arguments)

        return call

    fused = copy.deepcopy(attn).fuse()
    surrounded, surrounding = copy.deepcopy(draw.choice([attn, fused])), draw.choice(sorted(SURROUNDINGS))
    changed = draw.sample(SUB_MODULES, draw.randint(0, len(SUB_MODULES)))
    if DEVICE == "cpu":
        SURROUNDINGS[surrounding](surrounded, changed)
    if DEVICE == "cpu" and surrounding != "offloading" and draw.chance(0.2):  # of the gradients, too
        SURROUNDINGS[surrounding](attn, changed)
    return Case(
        {
            **configuration,
            "surrounding": (surrounding, changed),
            "dtype": dtype,
            "autocast": autocast,
            "shape": tuple(x.shape),
            **arguments,
        },
        inputs,
        ours,
        plain,
        lambda t, indices: logits_of_layer(attn, t, indices, arguments.get("mask")),
        decide,
        torch.finfo(autocast or dtype).eps,
        [name for name in inputs if draw.chance(0.8)],
        {
            "no_grad": without_gradients(attn, torch.no_grad),
            "inference_mode": without_gradients(attn, torch.inference_mode),
            "fused": without_gradients(fused, torch.enable_grad),
            "fused, no_grad": without_gradients(fused, torch.no_grad),
            "surrounded": without_gradients(surrounded, torch.no_grad),
            "default device": without_gradients(attn, under_another_device),
        },
    )


@contextmanager
def under_another_device() -> Iterator[None]:
    with torch.no_grad(), torch.device("meta"):
        yield


def draw_core(draw: Draw, backend: str) -> Case:
    dim, heads = draw_width(draw)
    options: dict[str, Any] = {
        "num_heads": heads,
        "normalization": draw.choice(NORMALIZATIONS),
        "router_gradient": draw.choice(ROUTER_GRADIENTS),
        "differential": draw.choice(DIFFERENTIALS),
        "backend": backend,
    }
    dtype = draw.choice(DTYPES[1:] if backend == "triton" else DTYPES)
    half, batch, length = torch.finfo(dtype).bits == 16, draw.choice([0, 1, 1, 2, 3]), draw.randint(0, 40)
    if draw.chance(0.25):
        batch, lengths = 1, [draw.randint(0, 12) for _ in range(draw.randint(1, 4))]
        options["cu_seqlens"], length = draw_bounds(draw, lengths), sum(lengths)
    elif draw.chance(0.35):
        options["mask"] = draw_mask(draw, batch, length).to(DEVICE)
    options |= draw_rotary(draw, batch, length, dim // heads)
    inputs = core_inputs(
        batch,
        length,
        dim,
        num_kernel_factors=draw.randint(1, 6),
        num_differential_factors=draw.randint(1, 6),
        differential=options["differential"],
        seed=draw.getrandbits(32),
    )
    inputs["gamma"] = draw.table(len(inputs["gamma"]), *ranges_of_gamma(options))
    if "lam" in inputs:
        inputs["lam"] = draw.table(len(inputs["lam"]), (0.01, 0.01), (-0.5, 0.5), (-3.0, 3.0), (0.0, 0.0))
    for name in ("kernel_routers", "differential_routers"):
        if name in inputs:
            for router in inputs[name]:
                spoil_routers(draw, router)
    scaled = draw.choice(["", "q", "k", "v"])
    mild = half or options["router_gradient"] == "straight_through"  # as for the layer
    exponent = 1 if mild else 4 if options["normalization"] == "denominator" else 25  # of float32's 38
    for name, t in inputs.items():
        if name in TOKENS:
            spoil_rows(draw, t)
            if name.split("_")[0] == scaled:
                t *= 10 ** (exponent * torch.tanh(draw.normal(*t.shape[:2], 1)))
            inputs[name] = draw_layout(draw, t)
    inputs = {name: t.to(DEVICE, dtype) for name, t in inputs.items()}
    given = {name: value for name, value in options.items() if name != "backend"}
    given["cu_seqlens"] = as_list(options.get("cu_seqlens"))

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return dydila_attention(**inputs, **options)

    return Case(
        {**options, "dtype": dtype, "shape": (batch, length, dim), "scaled": scaled},
        inputs,
        lambda t: dydila_attention(**t, **options),
        lambda t, indices: reference.dydila_attention(**t, **in_dtype(given, t["q"].dtype), indices=indices),
        lambda t, indices: logits_of_core(masked(t, options.get("mask")), indices),
        lambda: decisions(inputs, **options),
        torch.finfo(dtype).eps,
        [name for name in inputs if draw.chance(0.8)],
        {"no_grad": without_gradients},
    )


def in_dtype(options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same, the rotary tables in this dtype."""
    rotary = options.get("rotary")
    return dict(options) if rotary is None else {**options, "rotary": (rotary[0].to(dtype), rotary[1].to(dtype))}


def as_list(bounds: Any) -> list[int] | None:
    return None if bounds is None else [int(bound) for bound in bounds]


def masked(t: Tensors, mask: Tensor | None) -> Tensors:
    return t if mask is None else {n: v.masked_fill(~mask[..., None], 0) if n in TOKENS else v for n, v in t.items()}


def logits_of_core(t: Tensors, indices: Tensors) -> Tensors:
    """By the names of the decisions, which are taken as given."""
    logits, measured = {}, {}
    for name, router in zip(
        [n for n in ("q", "k", "q_redundant", "k_redundant") if n in t], t["kernel_routers"], strict=True
    ):
        logits[f"measure_{name}"] = t[name] @ router
        measured[name] = reference.power(t[name], t["gamma"][indices[f"measure_{name}"]])
    for side, router in zip("qk", t.get("differential_routers", ()), strict=False):
        logits[f"differential_{side}"] = torch.cat([measured[side], measured[f"{side}_redundant"]], -1) @ router
    return logits


def logits_of_layer(attn: DyDiLAttention, t: Tensors, indices: Tensors, mask: Tensor | None) -> Tensors:
    x = masked({"q": t["x"]}, mask)["q"]
    q, k, _ = torch.nn.functional.linear(x, t["qkv.weight"], t.get("qkv.bias")).chunk(3, -1)
    q, k = normed_tokens(attn, t, "q", q), normed_tokens(attn, t, "k", k)
    core, logits = {"q": q, "k": k, "gamma": t["measure.gamma"]}, {}
    for side in "qk" if attn.projection_q is not None else "":
        logits[f"projection_{side}"] = x @ t[f"projection_{side}.router"]
        redundant = reference.project(x, t[f"projection_{side}.weight"], indices[f"projection_{side}"])
        redundant = normed_tokens(attn, t, side, redundant)
        core[side if attn.differential is None else f"{side}_redundant"] = redundant
    for name, stage in (("kernel_routers", attn.measure), ("differential_routers", attn.differential)):
        if stage is not None:
            prefix = "measure" if stage is attn.measure else "differential"
            core[name] = torch.stack([t[f"{prefix}.{router}"] for router in stage.router_names])
    return {**logits, **logits_of_core(masked(core, mask), indices)}
