"""DWC of Eq. 9: depth-wise 3x3 convolution with zero padding, on tokens (B, N, d) as they lie.

    DWC(V)[r, c]  = b + sum_t w_t V[r + t // 3 - 1, c + t % 3 - 1]              taps t = 0..8, row-major
    dV[r, c]      = sum_t w_(8-t) G[r + t // 3 - 1, c + t % 3 - 1]              G the gradient of DWC(V)
    dw_(8-t)      = sum_(r, c) V[r, c] G[r + t // 3 - 1, c + t % 3 - 1],        db = sum_(r, c) G[r, c]

Tokens in row-major order are an image in the channels-last layout: the neighbour a row above token n is token
n - columns, so nothing is transposed.  The image of each row of the batch lies in a grid: tokens ``start`` to
``start + rows * columns``.  Tokens outside of every grid (prefix tokens) get nothing.  Masked tokens count as zeros
and get nothing.  Arithmetic is float32, whatever the tokens are.

A grid is cut into strips of :data:`ROWS` by :data:`COLUMNS` tokens.  A program walks down a strip with three rows in
its registers, as wide as the strip and its neighbours: a row is loaded once for all taps, while the step before is at
work.  A thread has two channels, and of them all that the strip needs, so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydila_kernels.ops import tiles
from dydila_kernels.ops.arguments import Strided, constant, contiguous_channels, strided
from dydila_kernels.ops.configs import Config, pick

ROWS, COLUMNS = 16, 4
"""Of a strip.  Longer ones leave too few programs to small images, wider ones too few registers to hold three rows."""

PROGRAMS = 2048
"""The most programs that sum up a weight gradient: twice as many as run at a time, with 10 MiB of partial sums."""


class Taps(NamedTuple):
    """weight (9, d) and bias (d,) float32, contiguous; the latter may be None."""

    weight: Any
    bias: Any


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
    """The grid of every image, or where there are several a table of the strips that cut them up.

    strips (strips, 5) int32: start, height and width of the grid, first row and column of the strip; or None.
    """

    grid: ImageGrid
    strips: Any


class Blocks(NamedTuple):
    """Sizes of a program: BLOCK_D of the D channels of a strip of ROWS by COLUMNS tokens."""

    D: int
    BLOCK_D: int
    ROWS: int
    COLUMNS: int


class Strip(NamedTuple):
    """Its image of the batch (int64) with its grid, and first row, end row and first column of the strip."""

    image: Any
    grid: ImageGrid
    top: Any
    bottom: Any
    left: Any


class Channels(NamedTuple):
    """Those of a program (C,), and which of them exist (C,)."""

    ids: Any
    exist: Any


@triton.jit
def strip_of(number, grids, k):
    """The :class:`Strip` of a number."""
    if grids.strips is None:
        grid = grids.grid
        across = tl.cdiv(grid.width, k.COLUMNS)
        per_image = tl.cdiv(grid.height, k.ROWS) * across
        image = (number // per_image).to(tl.int64)
        top, left = number % per_image // across * k.ROWS, number % across * k.COLUMNS
    else:
        entry = grids.strips + number * 5
        grid = ImageGrid(tl.load(entry), tl.load(entry + 1), tl.load(entry + 2))
        image = tl.cast(0, tl.int64)
        top, left = tl.load(entry + 3), tl.load(entry + 4)
    return Strip(image, grid, top, tl.minimum(top + k.ROWS, grid.height), left)


@triton.jit
def channels_of(block, k):
    """The :class:`Channels` of a block of BLOCK_D."""
    ids = block * k.BLOCK_D + tl.arange(0, k.BLOCK_D)
    exist = tl.full(ids.shape, True, tl.int1)
    if k.D % k.BLOCK_D:
        exist &= ids < k.D
    return Channels(ids, exist)


@triton.jit
def place_of(x, mask, strip, row, end, column, i: tl.constexpr, channels):
    """Pointers (C,) to the token of x in a row and i beside a column of the grid, and which (C,) of them to access.

    x: :class:`Strided`; mask: :class:`Mask`.  Tokens outside of the grid, masked ones and rows from ``end`` on are not
    accessed.
    """
    n = (strip.grid.start + row * strip.grid.width + column).to(tl.int64)
    width = tl.where((row >= 0) & (row < end), strip.grid.width, 0)
    exists = (column + i).to(tl.uint32) < width.to(tl.uint32)
    if mask.x is not None:
        exists &= tl.load(mask.x + strip.image * mask.stride_xb + n + i, mask=exists, other=0).to(tl.int1)
    # As strides are constants, all tokens of a row of a strip have one address, and their offsets are immediate.
    pointers = x.x + strip.image * x.stride_xb + n * x.stride_xn + channels.ids
    return pointers + i * x.stride_xn, channels.exist & exists


@triton.jit
def load_row(x, mask, strip, row, end, column, channels, WIDTH: tl.constexpr):
    """WIDTH neighbouring tokens of a row, from a column on, (C,) each as they are; zeros where none is accessed."""
    found = ()
    for i in tl.static_range(WIDTH):
        pointers, exist = place_of(x, mask, strip, row, end, column, i, channels)
        found = found + (tl.load(pointers, mask=exist, other=0),)  # noqa: RUF005  Triton knows no stars
    return found


@triton.jit
def load_step(out, x, v, mask, strip, row, channels, k):
    """What the walk needs at a row and has not got: x of the row below, out and, where given, v of the row itself."""
    COLUMNS: tl.constexpr = k.COLUMNS
    end = tl.minimum(strip.bottom + 1, strip.grid.height)
    below = load_row(x, mask, strip, row + 1, end, strip.left - 1, channels, COLUMNS + 2)
    before, values = load_row(out, mask, strip, row, strip.bottom, strip.left, channels, COLUMNS), ()
    if v is not None:
        values = load_row(v, mask, strip, row, strip.bottom, strip.left, channels, COLUMNS)
    return below, before, values


@triton.jit
def widened(row):
    """A row, in float32."""
    found = ()
    for i in tl.static_range(len(row)):
        found = found + (row[i].to(tl.float32),)  # noqa: RUF005
    return found


@triton.jit
def load_taps(taps, channels, k, MIRRORED: tl.constexpr):
    """The nine weights, (C,) each; MIRRORED: in reverse."""
    found = ()
    for t in tl.static_range(9):
        row = taps.weight + (8 - t if MIRRORED else t) * k.D
        found = found + (tl.load(row + channels.ids, mask=channels.exist, other=0),)  # noqa: RUF005
    return found


@triton.jit
def convolve(y, rows, weight, i: tl.constexpr):
    """y (C,) plus sum_t w_t x[t] over the neighbours of token i in the middle one of three rows."""
    for t in tl.static_range(9):
        y += weight[t] * rows[t // 3][i + t % 3]
    return y


@triton.jit
def correlate(sums, v, rows, i: tl.constexpr):
    """The ten sums (C,) plus v (C,) times each neighbour of token i, and plus the token itself."""
    found = ()
    for t in tl.static_range(9):
        found = found + (sums[t] + v * rows[t // 3][i + t % 3],)  # noqa: RUF005
    return found + (sums[9] + rows[1][i + 1],)  # noqa: RUF005


@triton.jit
def walk(out, x, mask, weight, bias, v, sums, strip, channels, k):
    """out += sum_t w_t x[t] + bias in a strip; returns the sums, :func:`correlate`d where v is given.

    out, x, v: :class:`Strided` (B, N, D), the last may be None; mask: :class:`Mask`; weight: nine (C,); bias (C,) or
    None.
    """
    COLUMNS: tl.constexpr = k.COLUMNS
    upper = widened(load_row(x, mask, strip, strip.top - 1, strip.bottom, strip.left - 1, channels, COLUMNS + 2))
    middle = widened(load_row(x, mask, strip, strip.top, strip.bottom, strip.left - 1, channels, COLUMNS + 2))
    ahead = load_step(out, x, v, mask, strip, strip.top, channels, k)
    for row in range(strip.top, strip.bottom):
        lower, before, values = widened(ahead[0]), widened(ahead[1]), widened(ahead[2])
        ahead = load_step(out, x, v, mask, strip, row + 1, channels, k)
        for i in tl.static_range(COLUMNS):
            y = before[i] if bias is None else before[i] + bias
            y = convolve(y, (upper, middle, lower), weight, i)
            if v is not None:
                sums = correlate(sums, values[i], (upper, middle, lower), i)
            pointers, exist = place_of(out, mask, strip, row, strip.bottom, strip.left, i, channels)
            tl.store(pointers, y.to(out.x.dtype.element_ty), mask=exist)
        upper, middle = middle, lower
    return sums


@triton.jit
def depthwise_kernel(out, x, mask, taps, grids, k: tl.constexpr):
    """out += DWC(x).  A program: BLOCK_D channels of a strip.

    out, x: :class:`Strided` (B, N, D); mask: :class:`Mask`; taps: :class:`Taps`; grids: :class:`Grids`;
    k: :class:`Blocks`.
    """
    blocks: tl.constexpr = (k.D + k.BLOCK_D - 1) // k.BLOCK_D
    channels = channels_of(tl.program_id(0) % blocks, k)
    weight, bias = load_taps(taps, channels, k, False), None
    if taps.bias is not None:
        bias = tl.load(taps.bias + channels.ids, mask=channels.exist, other=0)
    walk(out, x, mask, weight, bias, None, (), strip_of(tl.program_id(0) // blocks, grids, k), channels, k)


@triton.jit
def depthwise_gradients_kernel(dv, grad, v, mask, taps, partials, grids, strips, per_part, k: tl.constexpr):
    """dv += the gradient of the input; partials[part] = what ``per_part`` of the strips contribute to that of the taps.

    dv, grad, v: :class:`Strided` (B, N, D), grad the gradient of DWC(v); partials (parts, 10, D) float32: of the nine
    taps and of the bias; strips: how many; the others as in :func:`depthwise_kernel`.  A program: BLOCK_D channels of a
    part.
    """
    blocks: tl.constexpr = (k.D + k.BLOCK_D - 1) // k.BLOCK_D
    channels, part = channels_of(tl.program_id(0) % blocks, k), tl.program_id(0) // blocks
    weight = load_taps(taps, channels, k, True)
    zero = tl.zeros(channels.ids.shape, tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for number in range(part * per_part, tl.minimum((part + 1) * per_part, strips)):
        sums = walk(dv, grad, mask, weight, None, v, sums, strip_of(number, grids, k), channels, k)
    row = partials + part.to(tl.int64) * 10 * k.D + channels.ids
    for t in tl.static_range(9):
        tl.store(row + (8 - t) * k.D, sums[t], mask=channels.exist)
    tl.store(row + 9 * k.D, sums[9], mask=channels.exist)


class Geometry(NamedTuple):
    """Where the images lie: one grid for every image of the batch, or (packed) strips of those along the one row.

    strips (strips, 5) int32, see :class:`Grids`; None where one grid is all.
    """

    start: int
    height: int
    width: int
    strips: Tensor | None = None

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int, int]], device: torch.device | str) -> Geometry:
        """From (start, height, width) of each grid; one stands for all images of a batch."""
        if len(grids) <= 1:
            return cls(*(grids[0] if grids else (0, 0, 0)))
        strips = [
            (start, height, width, top, left)
            for start, height, width in grids
            for top in range(0, height, ROWS)
            for left in range(0, width, COLUMNS)
        ]
        return cls(0, 0, 0, tiles.upload(strips, torch.int32, device).reshape(-1, 5))

    def count(self, images: int) -> int:
        """The number of strips."""
        if self.strips is not None:
            return len(self.strips)
        return images * tiles.ceil_div(self.height, ROWS) * tiles.ceil_div(self.width, COLUMNS)

    def grids(self) -> Grids:
        """What the kernels take of it."""
        return Grids(ImageGrid(self.start, self.height, self.width), self.strips)


def in_rows(x: Tensor) -> Strided:
    """The argument for x (B, N, d), the stride of whose tokens is a constant."""
    return strided(x)._replace(stride_xn=constant(x.stride(1)))


def mask_argument(mask: Tensor | None) -> Mask:
    """mask (B, N) bool or None, as the kernels take it."""
    return Mask(None, 0) if mask is None else Mask(mask.contiguous(), mask.shape[1])


def blocks(d: int, config: Config) -> Blocks:
    """For d channels."""
    return Blocks(d, config.block_d, ROWS, COLUMNS)


def depthwise(
    out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, mask: Tensor | None = None
) -> None:
    """Adds DWC(V) to ``out``: out, v (B, N, d), weight (9, d) and bias (d,) float32, mask (B, N) bool.

    The channels of ``out`` must be next to each other.
    """
    v, d = contiguous_channels(v), v.shape[-1]
    config = pick("depthwise", v.dtype, d)
    tiles.launch(
        depthwise_kernel, (geometry.count(v.shape[0]) * tiles.ceil_div(d, config.block_d),), config,
        out=in_rows(out), x=in_rows(v), mask=mask_argument(mask), taps=Taps(weight.contiguous(), bias),
        grids=geometry.grids(), k=blocks(d, config),
    )  # fmt: skip


def depthwise_gradients(
    dv: Tensor, v: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None = None, *,
    has_bias: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Adds the gradient with respect to V to ``dv``, and returns those of weight (9, d) and bias (d,), float32.

    v, and grad, that of DWC(V): (B, N, d); the others as above.
    """
    v, grad, d = contiguous_channels(v), contiguous_channels(grad), v.shape[-1]
    config = pick("depthwise_gradients", v.dtype, d)
    count = geometry.count(v.shape[0])
    across = tiles.ceil_div(d, config.block_d)
    per_part = tiles.ceil_div(count * across, PROGRAMS)
    parts = tiles.ceil_div(count, per_part) if count else 0
    partials = v.new_empty((parts, 10, d), dtype=torch.float32)
    tiles.launch(
        depthwise_gradients_kernel, (parts * across,), config,
        dv=in_rows(dv), grad=in_rows(grad), v=in_rows(v), mask=mask_argument(mask),
        taps=Taps(weight.contiguous(), None), partials=partials, grids=geometry.grids(), strips=count,
        per_part=per_part, k=blocks(d, config),
    )  # fmt: skip
    return partials[:, :9].sum(0), partials[:, 9].sum(0) if has_bias else None
