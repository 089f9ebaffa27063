"""DWC of Eq. 9: depth-wise 3x3 convolution with zero padding, added to tokens (B, N, d) as they lie.

Tokens in row-major order are an image in the channels-last layout, so no transposition is needed.  An image is taken
in strips of rows, each with the neighbouring row on either side, so that what the convolution copies stays small.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as grad_of

from dydila_kernels import reference
from dydila_kernels.precision import accumulation_dtype, no_autocast
from dydila_kernels.torch_backend.blocks import Workspace, block_rows, differentiable_gradients, takes_plain_path
from dydila_kernels.types import SIZES, Convolution, Grid, Grids, frames_of


def taps(branches: Mapping[str, Tensor], identity: bool) -> Tensor:
    """The sum (d, 1, 3, 3) of the branches (d, 1, rows, columns) and of the identity, in float32 at least.

    In the order of :data:`SIZES`, as in the kernel of ``ops/taps.py``: both have the same bits.
    """
    total: Tensor | None = None
    for name, (rows, columns) in SIZES.items():
        if name not in branches:
            continue
        weight = branches[name]
        pad = ((3 - columns) // 2, (3 - columns) // 2, (3 - rows) // 2, (3 - rows) // 2)
        kernel = F.pad(weight, pad) if any(pad) else weight
        # The sum takes the dtype of the total.
        total = kernel.to(accumulation_dtype(weight.dtype)) if total is None else total + kernel
    assert total is not None
    return total + F.pad(torch.ones_like(total[..., 1:2, 1:2]), (1, 1, 1, 1)) if identity else total


class Strip(NamedTuple):
    """Whole rows of a grid: their tokens, the tokens with a row more on either side, and the strip within these."""

    tokens: slice
    neighbourhood: slice
    inner: slice


def strip_of(grid: Grid, top: int, bottom: int) -> Strip:
    """Rows ``top`` to ``bottom`` of the grid."""
    start, columns = grid.start, grid.columns
    above, below = max(top - 1, 0), min(bottom + 1, grid.rows)
    return Strip(
        slice(start + top * columns, start + bottom * columns),
        slice(start + above * columns, start + below * columns),
        slice((top - above) * columns, (bottom - above) * columns),
    )


def strips(v: Tensor, grid: Grid) -> Iterator[tuple[slice, Strip]]:
    """The strips of a grid, each for as many of the B images as fit a block."""
    if grid.start == grid.stop:
        return
    tokens = block_rows(v.shape[-1], v.device)
    images = max(1, tokens // (grid.rows * grid.columns))
    height = max(1, tokens // grid.columns)
    for first in range(0, v.shape[0], images):
        for top in range(0, grid.rows, height):
            yield slice(first, first + images), strip_of(grid, top, min(top + height, grid.rows))


def as_image(tokens: Tensor, columns: int) -> Tensor:
    """(b, r*C, d) -> (b, d, r, C), a view in the channels-last layout."""
    return tokens.unflatten(1, (-1, columns)).permute(0, 3, 1, 2)


def convolve(tokens: Tensor, weight: Tensor, bias: Tensor | None, columns: int, inner: slice) -> Tensor:
    """The convolution of whole rows of a grid, as far as it lies ``inner`` these; in the dtype of the weight."""
    image = as_image(tokens.to(weight.dtype), columns)
    return F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).flatten(1, 2)[:, inner]


def add_depthwise(out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grids: Sequence[Grid]) -> None:
    """Adds DWC(V) to ``out``; both (B, N, d)."""
    for grid in grids:
        for images, strip in strips(v, grid):
            tokens = v[images, strip.neighbourhood]
            out[images, strip.tokens].add_(convolve(tokens, weight, bias, grid.columns, strip.inner))


def gradients(
    grad: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grids: Sequence[Grid], needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of V, weight and bias that are needed, from that of the output (B, N, d)."""
    dv = torch.zeros_like(v, memory_format=torch.contiguous_format) if needed[0] else None
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    dbias = torch.zeros_like(bias) if needed[2] and bias is not None else None
    mirrored = weight.flip(-2, -1)
    for grid in grids:
        for images, strip in strips(v, grid):
            around = grad[images, strip.neighbourhood]
            if dv is not None:
                dv[images, strip.tokens] = convolve(around, mirrored, None, grid.columns, strip.inner)
            g = grad[images, strip.tokens].to(weight.dtype)
            if dbias is not None:
                dbias += g.sum((0, 1))
            if dweight is not None:
                if g.shape != around.shape:
                    # The neighbouring rows are input to this strip's output, not output of their own.
                    padded = torch.zeros_like(around, dtype=g.dtype, memory_format=torch.contiguous_format)
                    padded[:, strip.inner] = g
                    g = padded
                dweight += conv2d_weight(v[images, strip.neighbourhood].to(g.dtype), weight.shape, g, grid.columns)
    return dv, dweight, dbias


class Depthwise(torch.autograd.Function):
    """``out + DWC(V)``, written into ``out``, and its gradients.  Weight and bias are in the accumulation dtype."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grids: Sequence[Grid]) -> Tensor:
        add_depthwise(out, v, weight, bias, grids)
        ctx.mark_dirty(out)
        ctx.save_for_backward(v, weight, bias)
        ctx.grids = grids
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():

            def plain(v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return plain_depthwise(torch.zeros_like(v), v, weight, bias, ctx.grids)

            return grad, *differentiable_gradients(plain, (v, weight, bias), needed, grad), None
        with no_autocast(grad.device):
            return grad, *gradients(grad, v, weight, bias, ctx.grids, needed), None


def conv2d_weight(tokens: Tensor, shape: torch.Size, grad: Tensor, columns: int) -> Tensor:
    """The gradient of the kernel from that of the output of :func:`convolve`."""
    return grad_of.conv2d_weight(as_image(tokens, columns), shape, as_image(grad, columns), padding=1, groups=shape[0])


def plain_depthwise(out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grids: Grids) -> Tensor:
    """The reference equation in the dtype of the weight, out of place."""
    parts, position = [], 0
    for start, *sides in grids:  # (The Dynamo of torch 2.6 knows neither slices nor properties of a named tuple.)
        stop = start + math.prod(sides)
        if start == stop:
            continue
        image = reference.depthwise(v[:, start:stop].to(weight.dtype), weight, bias, sides)
        parts += [out[:, position:start], (out[:, start:stop] + image).to(out.dtype)]
        position = stop
    return torch.cat([*parts, out[:, position:]], 1)


def depthwise(out: Tensor, v: Tensor, convolution: Convolution) -> Tensor:
    """``out + DWC(V)``, where possible written into ``out``: out, v (B, N, d) -> (B, N, d).

    Tokens outside of the grids keep what ``out`` holds.
    """
    dtype = accumulation_dtype(v.dtype)
    weight, bias, grids = convolution
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with no_autocast(v.device):
        if takes_plain_path(out, v, weight, bias):
            return plain_depthwise(out, v, weight, bias, grids)
        return Depthwise.apply(out, v, weight, bias, list(frames_of(grids)))


class ValueBlocks:
    """V block by block, without a gradient: DWC(V) of a row of the grid is written once the row below it is there.

    Of the values no more is kept than a block, the rows that wait, and their neighbours.
    """

    def __init__(self, out: Tensor, convolution: Convolution, workspace: Workspace) -> None:
        """``out`` (B, N, d) gets DWC(V), and zeros at prefix tokens."""
        dtype = accumulation_dtype(out.dtype)
        self.weight, self.bias = convolution.weight.to(dtype), None
        if convolution.bias is not None:
            self.bias = convolution.bias.to(dtype)
        self.out, self.grids, self.workspace = out, list(frames_of(convolution.grids)), workspace
        self.images, self.start, self.stop, self.done = slice(0), 0, 0, 0
        self.window = out[:0]

    def take(self, images: slice, rows: slice) -> Tensor:
        """Memory (b, n, d) for the values of the block that follows the last one."""
        grid = self.grids[self.first_grid(rows)]
        if not self.window.numel():  # nothing waits
            self.start, self.stop, self.done = rows.start, rows.start, 0
        first = max(self.start, grid.start + (self.done - 1) * grid.columns)
        waiting = self.window[:, first - self.start : self.stop - self.start].clone() if first < self.stop else None
        self.images, self.start, self.stop = images, min(first, rows.start), rows.stop
        shape = len(self.out[images]), self.stop - self.start, self.out.shape[-1]
        self.window = self.workspace.take("values", shape, self.out.dtype, self.out.device)
        if waiting is not None:
            self.window[:, : waiting.shape[1]] = waiting
        return self.window[:, rows.start - self.start :]

    def convolve(self, rows: slice) -> None:
        """To be called when the memory that was taken for these rows has been filled."""
        first = self.first_grid(rows)
        self.out[self.images, rows.start : self.grids[first].start] = 0
        for grid in self.grids[first:]:
            ends = self.stop >= grid.stop
            if self.stop > grid.start:  # else prefix tokens alone; the grid may have rows without columns
                self.write(grid, grid.rows if ends else (self.stop - grid.start) // grid.columns - 1)
            if ends:
                self.done = 0
            if self.stop <= grid.stop:
                break
        if self.stop == grid.stop:
            self.window = self.out[:0]

    def write(self, grid: Grid, ready: int) -> None:
        """The convolution of the rows of a grid that are not done yet, up to ``ready``."""
        if ready > self.done:
            strip = strip_of(grid, self.done, ready)
            neighbours = slice(strip.neighbourhood.start - self.start, strip.neighbourhood.stop - self.start)
            tokens, out = self.window[:, neighbours], self.out[self.images, strip.tokens]
            out.copy_(convolve(tokens, self.weight, self.bias, grid.columns, strip.inner))
            self.done = ready

    def first_grid(self, rows: slice) -> int:
        """The number of that in which the rows begin, or which is the next."""
        return bisect_right(self.grids, rows.start, key=lambda grid: grid.stop)
