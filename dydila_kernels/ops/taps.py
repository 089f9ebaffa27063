"""The 3x3 kernel of Eq. 9 from its branches, in one launch, and their gradients in another.

    w[r, s] = square[r, s] + (r = 1) across[s] + (s = 1) down[r] + (r = s = 1) (point + identity)     for each channel

and the gradient of an entry of a branch is the sum of those of the w that it is in, which is one.  Torch would take a
launch for each padding and each sum: more than all else of a training step on few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops.configs import pick
from dydila_kernels.ops.tiles import ceil_div, launch

NAMES = "3x3", "1x3", "3x1", "1x1"


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
        w = tl.full((BLOCK_D,), 1.0 if IDENTITY and t == 4 else 0.0, tl.float32)
        if branches.square is not None:
            w += tl.load(branches.square + c * 9 + t, mask=exist, other=0).to(tl.float32)
        if branches.across is not None and t // 3 == 1:
            w += tl.load(branches.across + c * 3 + t % 3, mask=exist, other=0).to(tl.float32)
        if branches.down is not None and t % 3 == 1:
            w += tl.load(branches.down + c * 3 + t // 3, mask=exist, other=0).to(tl.float32)
        if branches.point is not None and t == 4:
            w += tl.load(branches.point + c, mask=exist, other=0).to(tl.float32)
        tl.store(taps + t * D + c, w, mask=exist)


@triton.jit
def taps_gradients_kernel(dtaps, dbranches, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gradients of :class:`Branches` from dtaps (9, D) float32; one program for BLOCK_D channels."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exist = c < D
    for t in tl.static_range(9):
        g = tl.load(dtaps + t * D + c, mask=exist, other=0)
        if dbranches.square is not None:
            tl.store(dbranches.square + c * 9 + t, g.to(dbranches.square.dtype.element_ty), mask=exist)
        if dbranches.across is not None and t // 3 == 1:
            tl.store(dbranches.across + c * 3 + t % 3, g.to(dbranches.across.dtype.element_ty), mask=exist)
        if dbranches.down is not None and t % 3 == 1:
            tl.store(dbranches.down + c * 3 + t // 3, g.to(dbranches.down.dtype.element_ty), mask=exist)
        if dbranches.point is not None and t == 4:
            tl.store(dbranches.point + c, g.to(dbranches.point.dtype.element_ty), mask=exist)


def taps(branches: Mapping[str, Tensor], identity: bool) -> Tensor:
    """The sum of the branches, each (d, 1, rows, columns), and the identity: (d, 1, 3, 3) float32, a view of (9, d)."""
    given = Branches(*(branches[name].contiguous() if name in branches else None for name in NAMES))
    like = next(iter(branches.values()))
    d = len(like)
    out, config = like.new_empty(9, d, dtype=torch.float32), pick("taps", torch.float32)
    launch(
        taps_kernel, (ceil_div(d, config.block_d),), config, branches=given, taps=out, D=d, IDENTITY=identity,
        BLOCK_D=config.block_d,
    )  # fmt: skip
    return out.t().view(d, 1, 3, 3)


def taps_gradients(grad: Tensor, branches: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Of the branches, whose shapes and dtypes are given, from that of their sum (d, 1, 3, 3)."""
    found = {name: grad.new_empty(shape, dtype=dtype) for name, (shape, dtype) in branches.items()}
    d, config = len(grad), pick("taps", torch.float32)
    launch(
        taps_gradients_kernel, (ceil_div(d, config.block_d),), config, dtaps=grad.float().flatten(1).t().contiguous(),
        dbranches=Branches(*map(found.get, NAMES)), D=d, BLOCK_D=config.block_d,
    )  # fmt: skip
    return found
