"""What is compiled: calls of the launchers of each stage, on tensors without data.

A case calls launchers of ``dydila_kernels.ops`` once; whatever they launch is compiled.  Images have 64 x 64 tokens:
sizes and addresses divide by 16, as they mostly do.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dydila_kernels.ops import backward, core, depthwise, forms, projection, taps
from dydila_kernels.types import SIZES

IMAGES, ROWS, COLUMNS = 4, 64, 64
TOKENS = ROWS * COLUMNS
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECTORS, FACTORS = 7, 21  # n_P and n_F = n_D of the paper's largest model: the most registers
HEADS = {384: (384, 64, 16), 512: (128,), 768: (32,), 1152: (1152, 72)}
"""Widths d, and the sizes of heads to try with each: a configuration depends on one of the two, never on both."""


@dataclass(frozen=True)
class Case:
    """``call`` runs launchers of a stage on tokens of ``dtype`` with d channels in heads of ``head`` (0: no heads)."""

    stage: str
    dtype: str
    d: int
    head: int
    call: Callable[[], object]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for d, heads in HEADS.items():
            if d in (384, 1152):
                yield Case("projection", name, d, 0, partial(project, dtype, d))
                yield Case("depthwise", name, d, 0, partial(convolve, dtype, d))
            if name == "fp16" and d != 384:  # the configurations are those of bf16
                continue
            for head in heads:
                yield Case("attention", name, d, head, partial(attend, dtype, d, head))
                yield Case("attention", name, d, head, partial(portable, partial(attend, dtype, d, head)))
    few = Size(factors=9)  # the default, whose logits leave registers to tokens of 768 channels
    yield Case("attention", "bf16", 768, 64, partial(attend, torch.bfloat16, 768, 64, few))
    for head in (64, 768):
        denominators = partial(attend, torch.bfloat16, 768, head, few, normalization="denominator")
        yield Case("attention", "bf16", 768, head, denominators)
    for d, head in ((384, 64), (384, 128), (1152, 72)):  # Kh and Qh in float32
        size = Size() if d == 384 else few
        denominators = partial(attend, torch.float16, d, head, size, normalization="denominator")
        yield Case("attention", "fp16", d, head, denominators)
    for head in (384, 64):
        for variant in VARIANTS:
            yield Case("attention", "bf16", 384, head, partial(attend, torch.bfloat16, 384, head, **variant))
    for name, d, head in (("bf16", 1152, 72), ("bf16", 512, 128), ("fp32", 384, 64), ("fp32", 512, 128)):
        yield Case("attention", name, d, head, partial(attend, DTYPES[name], d, head, straight_through=True))
    for name, d, head, pairing in (
        ("bf16", 1152, 72, "interleaved"),
        ("bf16", 512, 128, "halves"),
        ("fp32", 1152, 72, "halves"),
        ("fp32", 512, 128, "interleaved"),
    ):
        yield Case("attention", name, d, head, partial(attend, DTYPES[name], d, head, rotary_pairing=pairing))


def project(dtype: torch.dtype, d: int) -> None:
    x, weight = empty(IMAGES, TOKENS, d, dtype=dtype), empty(PROJECTORS, d, d, dtype=dtype)
    router = empty(d, PROJECTORS)
    projection.route(x, [router])
    order, ends = projection.plan(projection.route(x, [router, router]), PROJECTORS)
    plan = projection.Plan(order[0], ends[0])
    projection.project(x, weight, plan)
    projection.project_input_gradient(x, weight, plan)
    projection.project_weight_gradient(x, x, plan)


def convolve(dtype: torch.dtype, d: int) -> None:
    v, weight, bias = empty(IMAGES, TOKENS, d, dtype=dtype), empty(9, d), empty(d)
    grid = depthwise.Geometry.of([(0, ROWS, COLUMNS)], "meta")
    depthwise.depthwise(v, v, weight, bias, grid)
    depthwise.depthwise_gradients(v, v, v, weight, grid)
    packed = depthwise.Geometry.of([(0, ROWS, COLUMNS), (TOKENS, COLUMNS, ROWS)], "meta")
    mask = empty(1, 2 * TOKENS, dtype=torch.bool)
    v = v.flatten(0, 1)[None, : 2 * TOKENS]
    depthwise.depthwise(v, v, weight, None, packed, mask)
    depthwise.depthwise_gradients(v, v, v, weight, packed, mask)
    branches = {name: empty(d, 1, *size, dtype=dtype) for name, size in SIZES.items()}
    taps.taps(branches, identity=True)


VARIANTS: tuple[dict[str, Any], ...] = (
    {"normalization": "denominator"},
    {"differential": "map"},
    {"differential": "map", "normalization": "denominator"},
    {"differential": "off"},
    {"straight_through": True},
    {"straight_through": True, "differential": "map", "normalization": "denominator"},
    {"straight_through": True, "differential": "off"},
    {"mask": empty(IMAGES, TOKENS, dtype=torch.bool)},
    {"rotary_pairing": "interleaved"},
    {"rotary_pairing": "halves", "normalization": "denominator", "mask": empty(IMAGES, TOKENS, dtype=torch.bool)},
    {"cu_seqlens": (0, TOKENS, IMAGES * TOKENS), "grids": (0, ROWS, COLUMNS, TOKENS, (IMAGES - 1) * ROWS, COLUMNS)},
)
"""Settings of the core beside the default."""


def portable(call: Callable[[], object]) -> None:
    """The call with the kernels in Triton, where others would be taken."""
    with patch.dict(os.environ, {forms.VARIABLE: "triton"}):
        call()


@dataclass(frozen=True)
class Size:
    """Images of rows x columns tokens, the factors n_F = n_D that they choose from, and whether Eq. 9 convolves."""

    images: int = IMAGES
    rows: int = ROWS
    columns: int = COLUMNS
    factors: int = FACTORS
    convolution: bool = True


def attend(dtype: torch.dtype, d: int, head: int, size: Size = Size(), **variant: Any) -> None:
    """The core of attention, forward and backward."""
    tokens = size.rows * size.columns
    shape = (1, size.images * tokens, d) if "cu_seqlens" in variant else (size.images, tokens, d)
    q, k, v, q_redundant, k_redundant = (empty(*shape, dtype=dtype) for _ in range(5))
    inputs = core.Inputs(
        q, k, v, q_redundant, k_redundant,
        gamma=empty(size.factors),
        lam=empty(size.factors),
        kernel_routers=empty(4, d, size.factors),
        differential_routers=empty(2, 2 * d, size.factors),
        weight=empty(9, d) if size.convolution else None,
        bias=empty(d) if size.convolution else None,
        cos=empty(tokens, head).expand(*shape[:2], head) if "rotary_pairing" in variant else None,
        sin=empty(tokens, head).expand(*shape[:2], head) if "rotary_pairing" in variant else None,
    )  # fmt: skip
    if variant.get("differential") == "off":
        inputs = inputs._replace(q_redundant=None, k_redundant=None, lam=None, differential_routers=None)
    settings = core.Settings(
        mask=None,
        cu_seqlens=None,
        grids=(0, size.rows, size.columns) if size.convolution else (),
        num_heads=d // head,
        normalization="length",
        differential="token",
        straight_through=False,
        rotary_pairing=None,
        rotary_gradient=False,
    )._replace(**variant)
    out, saved = core.forward(inputs, settings)
    backward.backward(out, inputs, settings, saved, together=True)
