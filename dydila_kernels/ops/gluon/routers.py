"""The routers in the order in which tensor cores take them, once a side and call: nothing is split or moved later.

A router (d, n) in float32 is split into parts of the dtype of a product: three of bfloat16, or two of float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Routers
from dydila_kernels.ops.context import LaunchContext, QKOperand
from dydila_kernels.ops.tiles import ceil_div, launch, padded, power_of_two


class PreparedRouters(NamedTuple):
    """kernel (2, d / 32, parts, 32 n_F), of Z and Z', in the dtype of the tokens; differential of n_D, float16.

    d and the options are padded with zeros.  Each router is the sum of its parts, the smallest first, times a power of
    two; of each 32 channels the options lie in the order of the operands of tensor cores, see :func:`route`.
    """

    kernel: Any
    differential: Any


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
    """Parts of the channels c (32,) of router (D, N), times ``scale``, to out (PARTS, 32 N padded).

    Channel 8 q + 4 i + 2 h + b of 32 and option 16 t + 8 o + g lie at [t, i, g, q, h, o, b].
    """
    columns = tl.arange(0, padded(N))
    mask = (c < D)[:, None] & (columns < N)[None, :]
    x = tl.load(router + c[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    channel = c % 32
    place = channel // 4 % 2 * 256 + channel // 8 * 8 + channel // 2 % 2 * 4 + channel % 2
    option = columns // 16 * 512 + columns % 8 * 32 + columns // 8 % 2 * 2
    for part in tl.static_range(PARTS):
        y = x.to(out.dtype.element_ty)
        x -= y.to(tl.float32)
        tl.store(out + (PARTS - 1 - part) * padded(N) * 32 + place[:, None] + option[None, :], y)


@triton.jit
def prepare_kernel(routers, prepared, D: tl.constexpr, BLOCKS: tl.constexpr, N_F: tl.constexpr, N_D: tl.constexpr,
                   PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """:class:`PreparedRouters` of :class:`Routers`: one program for 32 channels of each of four, of BLOCKS * 32."""
    block = tl.program_id(0) % BLOCKS
    c = block * 32 + tl.arange(0, 32)
    which = tl.program_id(0) // BLOCKS
    F: tl.constexpr = PARTS * padded(N_F) * 32
    for i in tl.static_range(2):
        if which == i:
            router = routers.kernel if i == 0 else routers.kernel_redundant
            scale = tl.full((), 1.0, tl.float32)
            if prepared.kernel.dtype.element_ty == tl.float16:
                scale = power_near(router, D, N_F, BLOCK)
            split_router(router, prepared.kernel + (i * BLOCKS + block) * F, scale, c, D, N_F, PARTS)
    if which >= 2:
        router = routers.differential + (which - 2) * D * N_D
        out = prepared.differential + ((which - 2) * BLOCKS + block) * (2 * padded(N_D) * 32)
        split_router(router, out, power_near(routers.differential, 2 * D, N_D, BLOCK), c, D, N_D, 2)


def prepared(context: LaunchContext, side: QKOperand, warps: int) -> PreparedRouters:
    """The routers of a side, for programs of so many warps."""
    routers = Routers(*side.routers, side.differential_router)
    parts = 3 if context.dtype == torch.bfloat16 else 2
    n_f, n_d = context.gammas, context.lambdas
    blocks = ceil_div(context.dim, 32 * warps) * warps
    found = PreparedRouters(
        torch.empty(2, blocks, parts, 32 * power_of_two(n_f), device=context.device, dtype=context.dtype),
        torch.empty(2, blocks, 2, 32 * power_of_two(n_d), device=context.device, dtype=torch.float16),
    )
    config = configs.pick("prepare", context.dtype)
    launch(prepare_kernel, (4 * blocks,), config, routers=routers, prepared=found, D=context.dim, BLOCKS=blocks,
           N_F=n_f, N_D=n_d, PARTS=parts, BLOCK=config.block_n)  # fmt: skip
    return found
