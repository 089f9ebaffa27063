"""Rotary embeddings: each head of Qh and Kh turned in place, by pairs (a, b) of its channels.

    a -> a cos_a - b sin_a          b -> b cos_b + a sin_b          R
    a -> a cos_a + b sin_b          b -> b cos_b - a sin_a          R^T, for gradients

cos and sin (B, N, e) have an entry for each channel, and all heads share them; a pair is 2i and 2i + 1 ("interleaved")
or i and i + e/2 ("halves").  For dy, the gradient of what has been turned,

    dcos = sum_h (a dy_a, b dy_b)          dsin = sum_h (-b dy_a, a dy_b)

The denominator of Eq. 4 is that of tokens that are not turned, so all else of the core is as it is without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import configs
from dydila_kernels.ops.arguments import Segments, strided
from dydila_kernels.ops.context import LaunchContext
from dydila_kernels.ops.tiles import ceil_div, launch, row_pointers, tile_mask, tile_of_program


@triton.jit
def load_pairs(row_ptrs, columns, row_mask, E: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """a and b (R, PAIRS) float32 of a head at row_ptrs (R, 1); columns as in :func:`rotate_kernel`."""
    if INTERLEAVED:
        z = tl.load(row_ptrs + columns[None, :], mask=tile_mask(row_mask, columns, E, 2 * PAIRS), other=0.0)
        return tl.split(tl.reshape(z.to(tl.float32), (z.shape[0], PAIRS, 2)))
    else:
        mask = tile_mask(row_mask, columns, E // 2, PAIRS)
        a = tl.load(row_ptrs + columns[None, :], mask=mask, other=0.0)
        b = tl.load(row_ptrs + E // 2 + columns[None, :], mask=mask, other=0.0)
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(row_ptrs, a, b, columns, row_mask, E: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of :func:`load_pairs`."""
    dtype: tl.constexpr = row_ptrs.dtype.element_ty
    if INTERLEAVED:
        z = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIRS)).to(dtype)
        tl.store(row_ptrs + columns[None, :], z, mask=tile_mask(row_mask, columns, E, 2 * PAIRS))
    else:
        mask = tile_mask(row_mask, columns, E // 2, PAIRS)
        tl.store(row_ptrs + columns[None, :], a.to(dtype), mask=mask)
        tl.store(row_ptrs + E // 2 + columns[None, :], b.to(dtype), mask=mask)


@triton.jit
def rotate_kernel(x, cos, sin, mask, segments, D: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr,
                  PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """One program for a tile of tokens and some PAIRS of channels of each head; x (T, d) is turned in place.

    cos, sin (B, N, e); mask (T,) bool or None: tables are not read of tokens without, where x is zero.
    Columns are those of both channels of the pairs where INTERLEAVED, else of the first.
    """
    E: tl.constexpr = D // H
    WIDTH: tl.constexpr = 2 * PAIRS if INTERLEAVED else PAIRS
    tile = tile_of_program(segments, BLOCK_N)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    visible = tile.row_mask
    if mask is not None:
        visible = tile.row_mask & (tl.load(mask + tile.token_ids, mask=tile.row_mask, other=0) != 0)
    cos_a, cos_b = load_pairs(row_pointers(cos, tile), columns, visible, E, PAIRS, INTERLEAVED)
    sin_a, sin_b = load_pairs(row_pointers(sin, tile), columns, visible, E, PAIRS, INTERLEAVED)
    if TRANSPOSED:
        sin_a, sin_b = -sin_b, -sin_a
    for h in range(0, H):
        row_ptrs = x + (tile.token_ids * D + h * E)[:, None]
        a, b = load_pairs(row_ptrs, columns, tile.row_mask, E, PAIRS, INTERLEAVED)
        store_pairs(row_ptrs, a * cos_a - b * sin_a, b * cos_b + a * sin_b, columns, tile.row_mask, E, PAIRS,
                    INTERLEAVED)  # fmt: skip


def rotate(context: LaunchContext, x: Tensor, transposed: bool = False) -> None:
    """R x, or R^T x where ``transposed``, in place of x (B, N, d) contiguous; x where the call has no tables."""
    if context.rotary is None:
        return
    cos, sin, pairing = context.rotary
    config = configs.pick("rotary", context.dtype, context.head_dim)
    pairs = context.head_dim // 2
    grid = (context.batch * ceil_div(context.length, config.block_n), ceil_div(pairs, config.block_d))
    # Each token is turned on its own: a packed row needs no table of its images.
    launch(
        rotate_kernel, grid, config, x=x, cos=strided(cos), sin=strided(sin), mask=context.mask,
        segments=Segments(None, context.length, context.num_tokens), D=context.dim, H=context.heads,
        BLOCK_N=config.block_n, PAIRS=config.block_d, INTERLEAVED=pairing == "interleaved", TRANSPOSED=transposed,
    )  # fmt: skip


def add_table_gradients(context: LaunchContext, x: Tensor, grad: Tensor, totals: Sequence[Tensor]) -> None:
    """Adds to dcos and dsin (B, N, e) float32 what one of Qh and Kh (B, N, d), not turned, and its gradient give.

    By torch: tables are mostly not learned.
    """
    assert context.rotary is not None
    interleaved = context.rotary.pairing == "interleaved"
    axis, pairs = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
    (a, b), (da, db) = (t.unflatten(-1, (context.heads, *pairs)).float().unbind(axis) for t in (x, grad))
    # dZh comes times the scale of Zh, see context.LaunchContext
    scale = 1 / context.fp16_prescale
    for total, products in zip(totals, ((a * da, b * db), (-b * da, a * db)), strict=True):
        total += scale * torch.stack([product.sum(2) for product in products], axis).flatten(-2)
