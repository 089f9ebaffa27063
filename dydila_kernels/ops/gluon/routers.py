"""The routers in the order in which tensor cores take them, once a call: nothing is split or moved later.

A router (d, n) in float32 is split into parts of the dtype of a product: three of bfloat16, or two of float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Routers
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.forms import holds_more
from dydila_kernels.ops.tiles import ceil_div, launch, padded


class PreparedRouters(NamedTuple):
    """kernel (2, d / 32, octets, 8, 32), of Z and Z', in the dtype of the tokens; differential of n_D, float16.

    Each router is the sum of its parts, the smallest first, times a power of two, and d is padded with zeros.  Octets
    of options are what tensor cores take at least: those of each part, and then one with all parts of the options that
    are left, :func:`spare` of each, where there is room.
    """

    kernel: Any
    differential: Any


@triton.constexpr_function
def spare(parts):
    """Options of each part in an octet of all parts."""
    return 2 if parts == 3 else 4


@triton.constexpr_function
def whole(n, parts):
    """Octets of each part of n options: without those that the octet of all parts has room for."""
    return (n + 7 - spare(parts)) // 8


@triton.constexpr_function
def octets_summed(n, parts):
    """Octets of results: those of each part are added up."""
    return whole(n, parts) + (n > 8 * whole(n, parts))


@triton.constexpr_function
def octets(n, parts):
    """Octets of a prepared router."""
    return octets_summed(n, parts) + (parts - 1) * whole(n, parts)


@triton.jit
def power_near(router, ROWS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """The power of two that takes the largest entry of router (ROWS, N) to between 2^13 and 2^14: float16 holds it."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, ROWS * N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(router + i, mask=i < ROWS * N, other=0.0).to(tl.float32)))
    exponent = tl.max(largest).to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(tl.maximum(267 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_router(router, out, scale, c, D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """Parts of the channels c (32,) of router (D, N), times ``scale``, to out (octets, 8, 32)."""
    WHOLE: tl.constexpr = whole(N, PARTS)
    columns = tl.arange(0, padded(N))
    mask = (c < D)[:, None] & (columns < N)[None, :]
    x = tl.load(router + c[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    at = out + (c % 32)[:, None]
    left = columns - 8 * WHOLE
    # Of the octet of all parts, the last: what three parts leave is a fourth, or zeros.
    for part in tl.static_range(8 // spare(PARTS)):
        y = x.to(out.dtype.element_ty)
        x -= y.to(tl.float32)
        if part < PARTS:
            tl.store(at + ((PARTS - 1 - part) * WHOLE * 8 + columns)[None, :] * 32, y, mask=(left < 0)[None, :])
        rest = PARTS * WHOLE * 8 + part * spare(PARTS) + left
        tl.store(at + rest[None, :] * 32, y, mask=((left >= 0) & (left < spare(PARTS)) & (WHOLE * 8 < N))[None, :])


@triton.jit
def prepare_kernel(sides, prepared, D: tl.constexpr, BLOCKS: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr,
                   PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """:class:`PreparedRouters` of :class:`Routers`, of one side or two: each a tuple of so many.

    A program has 32 channels, of BLOCKS * 32, of one of a side's four: those of Z and Z', and both halves of the
    differential router.
    """
    block = tl.program_id(0) % BLOCKS
    c = block * 32 + tl.arange(0, 32)
    which = tl.program_id(0) // BLOCKS
    F: tl.constexpr = octets(N_F, PARTS) * 256
    for side in tl.static_range(len(sides)):
        routers = sides[side]
        found = prepared[side]
        for i in tl.static_range(2):
            if which == 4 * side + i:
                router = routers.kernel if i == 0 else routers.kernel_redundant
                scale = tl.full((), 1.0, tl.float32)
                if found.kernel.dtype.element_ty == tl.float16:
                    scale = power_near(router, D, N_F, BLOCK)
                split_router(router, found.kernel + (i * BLOCKS + block) * F, scale, c, D, N_F, PARTS)
        half = which - 4 * side - 2
        if (half == 0) | (half == 1):
            router = routers.differential + half * D * N_D
            out = found.differential + (half * BLOCKS + block) * (octets(N_D, 2) * 256)
            split_router(router, out, power_near(routers.differential, 2 * D, N_D, BLOCK), c, D, N_D, 2)


@lru_cache(maxsize=256)
def octets_prepared(n: int, parts: int) -> int:
    """:func:`octets` for the host, where calling it is slow."""
    found: int = octets(n, parts)
    return found


def tokens_config(context: LaunchContext) -> configs.Config:
    """How :mod:`dydila_kernels.ops.gluon.tokens` is launched, for whose warps routers are prepared."""
    stage = "gluon_tokens_with_more" if holds_more(context) else "gluon_tokens"
    return configs.pick(stage, context.dtype, context.dim)


def prepared(context: LaunchContext, sides: Sequence[QKOperand]) -> list[QKOperand]:
    """The sides with their routers prepared, by one launch."""
    parts = 3 if context.dtype == torch.bfloat16 else 2
    n_f, n_d, warps = context.gammas, context.lambdas, tokens_config(context).warps
    blocks = ceil_div(context.dim, 32 * warps) * warps
    shape, device = (len(sides), 2, blocks), context.device
    kernel = torch.empty(*shape, octets_prepared(n_f, parts), 8, 32, device=device, dtype=context.dtype)
    differential = torch.empty(*shape, octets_prepared(n_d, 2), 8, 32, device=device, dtype=torch.float16)
    found = [PreparedRouters(*of_side) for of_side in zip(kernel.unbind(), differential.unbind(), strict=True)]
    config = configs.pick("prepare", context.dtype)
    launch(
        prepare_kernel, (4 * len(sides) * blocks,), config,
        sides=tuple(Routers(*side.routers, side.differential_router) for side in sides), prepared=tuple(found),
        D=context.dim, BLOCKS=blocks, N_F=n_f, N_D=n_d, PARTS=parts, BLOCK=config.block_n,
    )  # fmt: skip
    return [side._replace(prepared=routers) for side, routers in zip(sides, found, strict=True)]
