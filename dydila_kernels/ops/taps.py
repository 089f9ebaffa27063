"""The 3x3 kernel of Eq. 9 from its branches, in one launch.

    w[r, s] = square[r, s] + (r = 1) across[s] + (s = 1) down[r] + (r = s = 1) (point + identity)     for each channel

so the gradient of a branch is a part of that of w.  Torch would take two launches for a padding and one for each sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops.configs import pick
from dydila_kernels.ops.tiles import ceil_div, launch
from dydila_kernels.types import SIZES


class Branches(NamedTuple):
    """square (d, 9), across and down (d, 3), point (d, 1), contiguous, of any floating dtype; each may be None."""

    square: Any
    across: Any
    down: Any
    point: Any


@triton.jit
def taps_kernel(branches, taps, D: tl.constexpr, IDENTITY: tl.constexpr, BLOCK_D: tl.constexpr):
    """taps (9, D) float32 from :class:`Branches`, and the identity where IDENTITY; one program for BLOCK_D channels."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exist = c < D
    for t in tl.static_range(9):
        w = tl.zeros((BLOCK_D,), tl.float32)
        if branches.square is not None:
            w += tl.load(branches.square + c * 9 + t, mask=exist, other=0).to(tl.float32)
        if branches.across is not None and t // 3 == 1:
            w += tl.load(branches.across + c * 3 + t % 3, mask=exist, other=0).to(tl.float32)
        if branches.down is not None and t % 3 == 1:
            w += tl.load(branches.down + c * 3 + t // 3, mask=exist, other=0).to(tl.float32)
        if branches.point is not None and t == 4:
            w += tl.load(branches.point + c, mask=exist, other=0).to(tl.float32)
        if IDENTITY and t == 4:
            w += 1.0
        tl.store(taps + t * D + c, w, mask=exist)


def fits(branches: Mapping[str, Tensor]) -> bool:
    """Whether the kernel can read them as they are: plain tensors (d, 1, rows, columns) of one d."""
    d = len(next(iter(branches.values())))
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.shape == (d, 1, *SIZES[name]) for name, t in branches.items()
    )


def taps(branches: Mapping[str, Tensor], identity: bool) -> Tensor:
    """The sum of the branches, which :func:`fits`, and the identity: (d, 1, 3, 3) float32, a view of (9, d)."""
    given = Branches(*(branches[name].contiguous() if name in branches else None for name in SIZES))
    like = next(iter(branches.values()))
    d = len(like)
    out, config = like.new_empty(9, d, dtype=torch.float32), pick("taps", torch.float32)
    launch(
        taps_kernel, (ceil_div(d, config.block_d),), config, branches=given, taps=out, D=d, IDENTITY=identity,
        BLOCK_D=config.block_d,
    )  # fmt: skip
    return out.t().view(d, 1, 3, 3)


def taps_gradients(grad: Tensor, branches: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Of the branches, whose shapes and dtypes are given, from that of their sum (d, 1, 3, 3): parts of it."""
    found = []
    for shape, dtype in branches:
        top, left = ((3 - length) // 2 for length in shape[-2:])
        found.append(grad[..., top : top + shape[-2], left : left + shape[-1]].to(dtype).contiguous())
    return found
