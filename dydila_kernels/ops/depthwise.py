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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import tiles
from dydila_kernels.ops.arguments import contiguous_channels, strided
from dydila_kernels.ops.configs import Config, pick


class Taps(NamedTuple):
    """weight (d, 9) float32 with its strides, and bias (d,) float32 or None.

    With strides (1, d) a thread loads the weights of its channels by vectors.
    """

    weight: Any
    bias: Any
    stride_wd: Any
    stride_wt: Any


class Mask(NamedTuple):
    """x (B, N) bool with the stride of its rows, or None."""

    x: Any
    stride_xb: Any


class ImageGrid(NamedTuple):
    """Where an image lies among the tokens of its row: height times width of them, from ``start`` on."""

    start: Any
    height: Any
    width: Any


class Grids(NamedTuple):
    """The grid of every image, or where there are several a table of them, and a table of the tiles that cut them up.

    table (segments, 3) int32: start, height, width; tiles (tiles, 3) int32: segment, first token, end token; or None.
    """

    grid: ImageGrid
    table: Any
    tiles: Any


class Blocks(NamedTuple):
    """Sizes of a program: a tile of TILE tokens, BLOCK_N at a time, and BLOCK_D of the D channels."""

    D: int
    TILE: int
    BLOCK_N: int
    BLOCK_D: int


class Spots(NamedTuple):
    """Tokens n (R,), which of them (R,) get something, their row and column in the grid, and the size of that."""

    n: Any
    active_rows: Any
    row: Any
    column: Any
    height: Any
    width: Any


@triton.jit
def load_grid(table, segment):
    """The :class:`ImageGrid` of a segment from a table (segments, 3)."""
    entry = table + segment * 3
    return ImageGrid(tl.load(entry), tl.load(entry + 1), tl.load(entry + 2))


@triton.jit
def spots_of(mask, n, row_mask, grid):
    """The :class:`Spots` of tokens n (R,); mask (N,) bool or None."""
    position = n - grid.start
    row = position // tl.maximum(grid.width, 1)
    active_rows = row_mask & (position >= 0) & (position < grid.height * grid.width)
    if mask is not None:
        active_rows &= tl.load(mask + n, mask=active_rows, other=0).to(tl.int1)
    return Spots(n, active_rows, row, position - row * grid.width, grid.height, grid.width)


@triton.jit
def neighbour(x, stride_xn, mask, spots, columns, col_mask, down, right):
    """(R, C) float32: the tokens of x that lie down rows and right columns (-1, 0, 1) away, zero where none does."""
    n, active_rows, row, column, height, width = spots
    exists = active_rows & (row >= -down) & (row < height - down) & (column >= -right) & (column < width - right)
    n += down * width + right
    if mask is not None:
        exists &= tl.load(mask + n, mask=exists, other=0).to(tl.int1)
    pointers = x + n.to(tl.int64)[:, None] * stride_xn + columns[None, :]
    return tl.load(pointers, mask=exists[:, None] & col_mask[None, :], other=0).to(tl.float32)


@triton.jit
def convolve_tile(x, stride_xn, mask, taps, grid, n, row_mask, columns, col_mask, MIRRORED: tl.constexpr):
    """(R, C) float32: DWC of tokens n (R,) and channels ``columns`` (C,) of one image; zero for those that get nothing.

    x (N, d): the first token of the image's row of the batch, rows ``stride_xn`` elements apart; mask (N,) bool or
    None; row_mask (R,) and col_mask (C,) say which tokens to compute and which channels exist; n counts from x.
    MIRRORED: the taps in reverse, which makes it the gradient with respect to the input.
    """
    spots = spots_of(mask, n, row_mask, grid)
    acc = tl.zeros((n.shape[0], columns.shape[0]), tl.float32)
    # A loop that stays one: with all nine taps in flight their weights alone would take 72 registers of a thread.
    for down in range(-1, 2):
        for right in tl.static_range(-1, 2):
            v = neighbour(x, stride_xn, mask, spots, columns, col_mask, down, right)
            t = 3 * down + right + 4
            tap = taps.weight + columns * taps.stride_wd + (8 - t if MIRRORED else t) * taps.stride_wt
            acc += v * tl.load(tap, mask=col_mask, other=0)[None, :]
    if taps.bias is not None:
        bias = tl.load(taps.bias + columns, mask=col_mask, other=0)
        acc += tl.where(spots.active_rows[:, None], bias[None, :], 0)
    return acc


@triton.jit
def locate(tile, grids, TILE: tl.constexpr):
    """Of a tile: its image of the batch (int64), first and end token, and its grid."""
    if grids.tiles is None:
        size = grids.grid.height * grids.grid.width
        per_image = tl.cdiv(size, TILE)
        image = tile // per_image
        first = grids.grid.start + (tile - image * per_image) * TILE
        return tl.cast(image, tl.int64), first, tl.minimum(first + TILE, grids.grid.start + size), grids.grid
    else:
        entry = grids.tiles + tile * 3
        grid = load_grid(grids.table, tl.load(entry))
        return tl.cast(0, tl.int64), tl.load(entry + 1), tl.load(entry + 2), grid


@triton.jit
def depthwise_kernel(out, x, mask, taps, grids, k: tl.constexpr, MIRRORED: tl.constexpr):
    """out += DWC(x).  A program: a tile of TILE tokens, BLOCK_N at a time, and BLOCK_D channels.

    out, x: :class:`Strided` (B, N, D); mask: :class:`Mask`; taps: :class:`Taps`; grids: :class:`Grids`;
    k: :class:`Blocks`.
    """
    blocks: tl.constexpr = (k.D + k.BLOCK_D - 1) // k.BLOCK_D
    tile = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    col_mask = columns < k.D
    image, first, end, grid = locate(tile, grids, k.TILE)
    image_out = out.x + image * out.stride_xb
    image_x = x.x + image * x.stride_xb
    image_mask = None
    if mask.x is not None:
        image_mask = mask.x + image * mask.stride_xb
    for step in range(first, end, k.BLOCK_N):
        n = step + tl.arange(0, k.BLOCK_N)
        row_mask = n < end
        y = convolve_tile(image_x, x.stride_xn, image_mask, taps, grid, n, row_mask, columns, col_mask, MIRRORED)
        pointers = image_out + n.to(tl.int64)[:, None] * out.stride_xn + columns[None, :]
        store_mask = row_mask[:, None] & col_mask[None, :]
        y += tl.load(pointers, mask=store_mask, other=0).to(tl.float32)
        tl.store(pointers, y.to(out.x.dtype.element_ty), mask=store_mask)


@triton.jit
def correlate_row(sums, grad, x, stride_xn, mask, spots, columns, col_mask, down: tl.constexpr):
    """The sums (R, C) of the three taps in a row of the kernel, plus grad (R, C) times the neighbours of its tokens."""
    left, middle, right = sums
    left += grad * neighbour(x, stride_xn, mask, spots, columns, col_mask, down, -1)
    middle += grad * neighbour(x, stride_xn, mask, spots, columns, col_mask, down, 0)
    right += grad * neighbour(x, stride_xn, mask, spots, columns, col_mask, down, 1)
    return left, middle, right


@triton.jit
def sum_over_tokens(x):
    """(R, C) -> (C,).  Where a thread has eight neighbouring channels, neighbouring threads are eight banks of shared
    memory apart, and collide there four at a time; with the channels of a thread put apart they do not."""
    apart = tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), (0, 2, 1)), x.shape)
    sums = tl.reshape(tl.sum(apart, axis=0), (8, x.shape[1] // 8))
    return tl.reshape(tl.permute(sums, (1, 0)), (x.shape[1],))


@triton.jit
def depthwise_weight_kernel(partials, x, grad, mask, grids, tiles, tiles_per_part, k: tl.constexpr):
    """partials[part] = the gradients that ``tiles_per_part`` of the tiles contribute.  A program: a part and BLOCK_D
    channels.

    partials (parts, 10, D) float32: of the nine taps and of the bias; x and grad (B, N, D): tokens and the gradient of
    their convolution, both :class:`Strided`; tiles: how many; the others as in :func:`depthwise_kernel`.
    """
    blocks: tl.constexpr = (k.D + k.BLOCK_D - 1) // k.BLOCK_D
    part = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    col_mask = columns < k.D
    BLOCK_N: tl.constexpr = k.BLOCK_N
    bias = tl.zeros((BLOCK_N, columns.shape[0]), tl.float32)
    upper, centred, lower = (bias, bias, bias), (bias, bias, bias), (bias, bias, bias)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        image, first, end, grid = locate(tile, grids, k.TILE)
        image_x = x.x + image * x.stride_xb
        image_grad = grad.x + image * grad.stride_xb
        image_mask = None
        if mask.x is not None:
            image_mask = mask.x + image * mask.stride_xb
        for step in range(first, end, k.BLOCK_N):
            n = step + tl.arange(0, k.BLOCK_N)
            spots = spots_of(image_mask, n, n < end, grid)
            g = neighbour(image_grad, grad.stride_xn, None, spots, columns, col_mask, 0, 0)
            bias += g
            upper = correlate_row(upper, g, image_x, x.stride_xn, image_mask, spots, columns, col_mask, -1)
            centred = correlate_row(centred, g, image_x, x.stride_xn, image_mask, spots, columns, col_mask, 0)
            lower = correlate_row(lower, g, image_x, x.stride_xn, image_mask, spots, columns, col_mask, 1)
    sums = partials + part.to(tl.int64) * 10 * k.D + columns
    for t in tl.static_range(3):
        tl.store(sums + t * k.D, sum_over_tokens(upper[t]), mask=col_mask)
        tl.store(sums + (3 + t) * k.D, sum_over_tokens(centred[t]), mask=col_mask)
        tl.store(sums + (6 + t) * k.D, sum_over_tokens(lower[t]), mask=col_mask)
    tl.store(sums + 9 * k.D, sum_over_tokens(bias), mask=col_mask)


TILE = 128
"""Tokens of a tile.  Long against the width of most grids, so that the rows above and below mostly come from L1."""

PARTS = 128
"""The most parts of a weight gradient: with 12 blocks of channels (d = 384) two to three waves of programs."""


class Geometry(NamedTuple):
    """Where the images lie: one grid for every image of the batch, or (packed) a table of those along the one row.

    table (segments, 3) int32: start, height, width of each grid, and tiles (tiles, 3) int32: segment, first token, end
    token; both None where one grid is all.
    """

    start: int
    height: int
    width: int
    table: Tensor | None = None
    tiles: Tensor | None = None

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int, int]], device: torch.device | str) -> Geometry:
        """From (start, height, width) of each grid; one stands for all images of a batch."""
        if len(grids) <= 1:
            return cls(*(grids[0] if grids else (0, 0, 0)))
        cuts = [
            (segment, first, min(first + TILE, start + height * width))
            for segment, (start, height, width) in enumerate(grids)
            for first in range(start, start + height * width, TILE)
        ]
        return cls(0, 0, 0, table_of(grids, device), table_of(cuts, device))

    def count(self, images: int) -> int:
        """The number of tiles."""
        return len(self.tiles) if self.tiles is not None else images * tiles.ceil_div(self.height * self.width, TILE)

    def grids(self) -> Grids:
        """What the kernels take of it."""
        return Grids(ImageGrid(self.start, self.height, self.width), self.table, self.tiles)


def table_of(rows: Sequence[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    """(n, 3) int32 on the device."""
    return tiles.upload(rows, torch.int32, device).reshape(-1, 3)


def mask_argument(mask: Tensor | None) -> Mask:
    """mask (B, N) bool or None, as the kernels take it."""
    return Mask(None, 0) if mask is None else Mask(mask.contiguous(), mask.shape[1])


def blocks(d: int, config: Config) -> Blocks:
    """For d channels."""
    return Blocks(d, TILE, config.block_n, config.block_d)


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
    x, d = contiguous_channels(x), x.shape[-1]
    config = pick("depthwise", x.dtype, d)
    tiles.launch(
        depthwise_kernel, (geometry.count(x.shape[0]) * tiles.ceil_div(d, config.block_d),), config,
        out=strided(out), x=strided(x), mask=mask_argument(mask), taps=Taps(weight, bias, *weight.stride()),
        grids=geometry.grids(), k=blocks(d, config), MIRRORED=mirrored,
    )  # fmt: skip


def depthwise_weight_gradient(
    v: Tensor, grad: Tensor, geometry: Geometry, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(d, 9) and (d,) float32: the gradients of weight and bias, given v and that of DWC(V), both (B, N, d)."""
    v, grad, d = contiguous_channels(v), contiguous_channels(grad), v.shape[-1]
    config = pick("depthwise_weight", v.dtype, d)
    count = geometry.count(v.shape[0])
    tiles_per_part = tiles.ceil_div(count, PARTS)
    parts = tiles.ceil_div(count, tiles_per_part) if count else 0
    partials = v.new_empty((parts, 10, d), dtype=torch.float32)
    tiles.launch(
        depthwise_weight_kernel, (parts * tiles.ceil_div(d, config.block_d),), config,
        partials=partials, x=strided(v), grad=strided(grad), mask=mask_argument(mask), grids=geometry.grids(),
        tiles=count, tiles_per_part=tiles_per_part, k=blocks(d, config),
    )  # fmt: skip
    total = partials.sum(0)
    return total[:9].t().contiguous(), total[9]
