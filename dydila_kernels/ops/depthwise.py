"""DWC of Eq. 9: depth-wise 3x3 convolution with zero padding, on tokens (B, N, d) as they lie.

    DWC(V)[r, c]  = b + sum_t w_t V[r + t // 3 - 1, c + t % 3 - 1]              taps t = 0..8, row-major
    dV[r, c]      = sum_t w_(8-t) G[r + t // 3 - 1, c + t % 3 - 1]              G the gradient of DWC(V)
    dw_t          = sum_(r, c) G[r, c] V[r + t // 3 - 1, c + t % 3 - 1],    db = sum_(r, c) G[r, c]

Tokens in row-major order are an image in the channels-last layout: the neighbour a row above token n is token
n - columns, so nothing is transposed.  The image of each row of the batch lies in a grid: tokens ``start`` to
``start + rows * columns``.  Tokens outside of every grid (prefix tokens) get nothing.  Masked tokens count as zeros
and get nothing.  Arithmetic is float32, whatever the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import tiles
from dydila_kernels.ops.configs import pick


@triton.jit
def place(MASK, n, inside, start, rows, columns):
    """The spots of tokens n (R,): n, which of those inside get something, row and column, and the size of the grid."""
    position = n - start
    row = position // tl.maximum(columns, 1)
    live = inside & (position >= 0) & (position < rows * columns)
    if MASK is not None:
        live &= tl.load(MASK + n, mask=live, other=0).to(tl.int1)
    return n, live, row, position - row * columns, rows, columns


@triton.jit
def neighbour(X, MASK, spots, channels, real, stride_n, down, right):
    """(R, C) float32: the tokens of X that lie down rows and right columns (-1, 0, 1) away, zero where none does."""
    n, live, row, column, rows, columns = spots
    there = live & (row >= -down) & (row < rows - down) & (column >= -right) & (column < columns - right)
    n += down * columns + right
    if MASK is not None:
        there &= tl.load(MASK + n, mask=there, other=0).to(tl.int1)
    pointers = X + n.to(tl.int64)[:, None] * stride_n + channels[None, :]
    return tl.load(pointers, mask=there[:, None] & real[None, :], other=0).to(tl.float32)


@triton.jit
def convolve_tile(
    X, MASK, WEIGHT, BIAS, n, inside, channels, real, stride_n, start, rows, columns, MIRRORED: tl.constexpr,
    weight_stride_d=9, weight_stride_t=1,
):  # fmt: skip
    """(R, C) float32: DWC of tokens n (R,) and channels (C,) of one image; zero for tokens that get nothing.

    X       (N, d)  the first token of the image's row of the batch, rows ``stride_n`` elements apart
    MASK    (N,)    bool, or None
    WEIGHT  (d, 9)  float32; with strides (1, d) a thread loads the weights of its channels by vectors
    BIAS    (d,)    float32, or None
    inside (R,) and real (C,) bool say which tokens to compute and which channels exist; n counts from X.
    MIRRORED: the taps in reverse, which makes it the gradient with respect to the input.
    """
    spots = place(MASK, n, inside, start, rows, columns)
    acc = tl.zeros((n.shape[0], channels.shape[0]), tl.float32)
    # A loop that stays one: with all nine taps in flight their weights alone would take 72 registers of a thread.
    for down in range(-1, 2):
        for right in tl.static_range(-1, 2):
            x = neighbour(X, MASK, spots, channels, real, stride_n, down, right)
            t = 3 * down + right + 4
            tap = WEIGHT + channels * weight_stride_d + (8 - t if MIRRORED else t) * weight_stride_t
            acc += x * tl.load(tap, mask=real, other=0)[None, :]
    if BIAS is not None:
        bias = tl.load(BIAS + channels, mask=real, other=0)
        acc += tl.where(spots[1][:, None], bias[None, :], 0)
    return acc


@triton.jit
def locate(tile, TILES, GRIDS, start, rows, columns, TOKENS: tl.constexpr):
    """Of a tile: its image of the batch (int64), first and end token, and start, rows and columns of its grid."""
    if TILES is None:
        per_image = tl.cdiv(rows * columns, TOKENS)
        image = tile // per_image
        first = start + (tile - image * per_image) * TOKENS
        return tl.cast(image, tl.int64), first, tl.minimum(first + TOKENS, start + rows * columns), start, rows, columns
    else:
        grid = GRIDS + tl.load(TILES + tile * 3) * 3
        first, end = tl.load(TILES + tile * 3 + 1), tl.load(TILES + tile * 3 + 2)
        return tl.cast(0, tl.int64), first, end, tl.load(grid), tl.load(grid + 1), tl.load(grid + 2)


@triton.jit
def add_convolution(
    OUT, X, MASK, WEIGHT, BIAS, TILES, GRIDS, start, rows, columns,
    out_stride_b, out_stride_n, stride_b, stride_n, mask_stride_b, weight_stride_d, weight_stride_t,
    D: tl.constexpr, MIRRORED: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """OUT += DWC(X).  A program: a tile of TOKENS tokens, R at a time, and C channels.

    OUT, X  (B, N, D)      tokens, channels next to each other
    MASK    (B, N)         bool, or None
    WEIGHT  (D, 9)         float32;  BIAS (D,) float32, or None
    TILES   (tiles, 3)     int32: segment, first token, end token; or None
    GRIDS   (segments, 3)  int32: start, rows, columns; or None: every image has the grid given by three numbers
    """
    blocks: tl.constexpr = (D + C - 1) // C
    tile = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * C + tl.arange(0, C)
    real = channels < D
    image, first, end, start, rows, columns = locate(tile, TILES, GRIDS, start, rows, columns, TOKENS)
    OUT += image * out_stride_b
    X += image * stride_b
    if MASK is not None:
        MASK += image * mask_stride_b
    for step in range(first, end, R):
        n = step + tl.arange(0, R)
        inside = n < end
        y = convolve_tile(
            X, MASK, WEIGHT, BIAS, n, inside, channels, real, stride_n, start, rows, columns, MIRRORED,
            weight_stride_d, weight_stride_t,
        )  # fmt: skip
        pointers = OUT + n.to(tl.int64)[:, None] * out_stride_n + channels[None, :]
        there = inside[:, None] & real[None, :]
        y += tl.load(pointers, mask=there, other=0).to(tl.float32)
        tl.store(pointers, y.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def correlate_row(sums, grad, X, MASK, spots, channels, real, stride_n, down: tl.constexpr):
    """The sums (R, C) of the three taps in a row of the kernel, plus grad (R, C) times the neighbours of its tokens."""
    left, middle, right = sums
    left += grad * neighbour(X, MASK, spots, channels, real, stride_n, down, -1)
    middle += grad * neighbour(X, MASK, spots, channels, real, stride_n, down, 0)
    right += grad * neighbour(X, MASK, spots, channels, real, stride_n, down, 1)
    return left, middle, right


@triton.jit
def sum_over_tokens(x):
    """(R, C) -> (C,).  Where a thread has eight neighbouring channels, neighbouring threads are eight banks of shared
    memory apart, and collide there four at a time; with the channels of a thread put apart they do not."""
    apart = tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), (0, 2, 1)), x.shape)
    sums = tl.reshape(tl.sum(apart, axis=0), (8, x.shape[1] // 8))
    return tl.reshape(tl.permute(sums, (1, 0)), (x.shape[1],))


@triton.jit
def weight_gradient(
    SUMS, X, GRAD, MASK, TILES, GRIDS, start, rows, columns, tiles, share,
    stride_b, stride_n, grad_stride_b, grad_stride_n, mask_stride_b,
    D: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """SUMS[part] = the gradients that ``share`` of the tiles contribute.  A program: a part and C channels.

    SUMS     (parts, 10, D)  float32: of the nine taps and of the bias
    X, GRAD  (B, N, D)       tokens and the gradient of their convolution; the others as in :func:`add_convolution`
    """
    blocks: tl.constexpr = (D + C - 1) // C
    part = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * C + tl.arange(0, C)
    real = channels < D
    bias = tl.zeros((R, C), tl.float32)
    upper, centred, lower = (bias, bias, bias), (bias, bias, bias), (bias, bias, bias)
    for tile in range(part * share, tl.minimum((part + 1) * share, tiles)):
        image, first, end, top, height, width = locate(tile, TILES, GRIDS, start, rows, columns, TOKENS)
        x = X + image * stride_b
        g = GRAD + image * grad_stride_b
        mask = MASK
        if MASK is not None:
            mask = MASK + image * mask_stride_b
        for step in range(first, end, R):
            n = step + tl.arange(0, R)
            spots = place(mask, n, n < end, top, height, width)
            grad = neighbour(g, None, spots, channels, real, grad_stride_n, 0, 0)
            bias += grad
            upper = correlate_row(upper, grad, x, mask, spots, channels, real, stride_n, -1)
            centred = correlate_row(centred, grad, x, mask, spots, channels, real, stride_n, 0)
            lower = correlate_row(lower, grad, x, mask, spots, channels, real, stride_n, 1)
    sums = SUMS + part.to(tl.int64) * 10 * D + channels
    for t in tl.static_range(3):
        tl.store(sums + t * D, sum_over_tokens(upper[t]), mask=real)
        tl.store(sums + (3 + t) * D, sum_over_tokens(centred[t]), mask=real)
        tl.store(sums + (6 + t) * D, sum_over_tokens(lower[t]), mask=real)
    tl.store(sums + 9 * D, sum_over_tokens(bias), mask=real)


TOKENS = 128
"""Tokens of a tile.  Long against the columns of most grids, so that the rows above and below mostly come from L1."""

PARTS = 128
"""The most parts of a weight gradient: with 12 blocks of channels (d = 384) two to three waves of programs."""


class Geometry(NamedTuple):
    """Where the images lie: one grid for every image of the batch, or (packed) a table of those along the one row.

    table (segments, 3) int32: start, rows, columns of each grid, and tiles (tiles, 3) int32: segment, first token, end
    token; both None where one grid is all.
    """

    start: int
    rows: int
    columns: int
    table: Tensor | None = None
    tiles: Tensor | None = None

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int, int]], device: torch.device | str) -> Geometry:
        """From (start, rows, columns) of each grid; one stands for all images of a batch."""
        if len(grids) <= 1:
            return cls(*(grids[0] if grids else (0, 0, 0)))
        cuts = [
            (segment, first, min(first + TOKENS, start + rows * columns))
            for segment, (start, rows, columns) in enumerate(grids)
            for first in range(start, start + rows * columns, TOKENS)
        ]
        return cls(0, 0, 0, table_of(grids, device), table_of(cuts, device))

    def count(self, images: int) -> int:
        """The number of tiles."""
        return len(self.tiles) if self.tiles is not None else images * triton.cdiv(self.rows * self.columns, TOKENS)

    def arguments(self) -> dict[str, Tensor | int | None]:
        """What every kernel here takes of it."""
        return {
            "TILES": self.tiles, "GRIDS": self.table, "start": self.start, "rows": self.rows, "columns": self.columns,
            "TOKENS": TOKENS,
        }  # fmt: skip


def table_of(rows: Sequence[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    """(n, 3) int32 on the device."""
    return tiles.upload(rows, torch.int32, device).reshape(-1, 3)


def aligned(tokens: Tensor) -> Tensor:
    """With the channels next to each other, at the price of a copy where they are not."""
    return tokens if tokens.stride(-1) == 1 or tokens.shape[-1] == 1 else tokens.contiguous()


def masked(mask: Tensor | None) -> dict[str, Tensor | int | None]:
    """mask (B, N) bool or None -> the arguments of the kernels."""
    return {"MASK": None if mask is None else mask.contiguous(), "mask_stride_b": 0 if mask is None else mask.shape[1]}


def depthwise(
    out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, mask: Tensor | None = None
) -> None:
    """Adds DWC(V) to ``out``: out, v (B, N, d), weight (d, 9) and bias (d,) float32, mask (B, N) bool.

    ``weight`` may have any strides, and is read faster with (1, d).
    """
    add(out, v, weight, bias, geometry, mask, mirrored=False)


def depthwise_input_gradient(
    dv: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None = None
) -> None:
    """Adds to ``dv`` the gradient with respect to V, given that of DWC(V): dv, grad (B, N, d), the others as above."""
    add(dv, grad, weight, None, geometry, mask, mirrored=True)


def add(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, mask: Tensor | None, mirrored: bool
) -> None:
    """Adds the convolution of x to ``out``, of which the channels must be next to each other."""
    x, d = aligned(x), x.shape[-1]
    config = pick("depthwise", x.dtype, d)
    tiles.launch(
        add_convolution, (geometry.count(len(x)) * triton.cdiv(d, config.columns),), config,
        OUT=out, X=x, WEIGHT=weight, BIAS=bias, **masked(mask), **geometry.arguments(),
        out_stride_b=out.stride(0), out_stride_n=out.stride(1), stride_b=x.stride(0), stride_n=x.stride(1),
        weight_stride_d=weight.stride(0), weight_stride_t=weight.stride(1),
        D=d, MIRRORED=mirrored, R=config.rows, C=config.columns,
    )  # fmt: skip


def depthwise_weight_gradient(
    v: Tensor, grad: Tensor, geometry: Geometry, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(d, 9) and (d,) float32: the gradients of weight and bias, given v and that of DWC(V), both (B, N, d)."""
    v, grad, d = aligned(v), aligned(grad), v.shape[-1]
    config = pick("depthwise_weight", v.dtype, d)
    count = geometry.count(len(v))
    share = triton.cdiv(count, PARTS)
    parts = triton.cdiv(count, share) if count else 0
    sums = v.new_empty((parts, 10, d), dtype=torch.float32)
    tiles.launch(
        weight_gradient, (parts * triton.cdiv(d, config.columns),), config,
        SUMS=sums, X=v, GRAD=grad, **masked(mask), **geometry.arguments(), tiles=count, share=share,
        stride_b=v.stride(0), stride_n=v.stride(1), grad_stride_b=grad.stride(0), grad_stride_n=grad.stride(1),
        D=d, R=config.rows, C=config.columns,
    )  # fmt: skip
    total = sums.sum(0)
    return total[:9].t().contiguous(), total[9]
