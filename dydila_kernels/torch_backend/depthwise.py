"""DWC of Eq. 9: depth-wise 3x3 convolution with zero padding of tokens (B, R*C, d) as they lie.

Tokens in row-major order are an image in the channels-last layout, so no transposition is needed.  The image is taken
in strips of rows, each with the neighbouring row on either side, so that what the convolution copies stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import accumulation_dtype, block_rows, no_autocast, takes_plain_path


def strips(v: Tensor, grid: tuple[int, int]) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Images, tokens of the strip, tokens of the strip with its neighbouring rows, and the strip within these."""
    rows, columns = grid
    tokens = block_rows(v.shape[-1], v.device)
    images = max(1, tokens // max(rows * columns, 1))
    height = max(1, tokens // max(columns, 1))
    for first in range(0, v.shape[0], images):
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            above, below = max(top - 1, 0), min(bottom + 1, rows)
            yield (
                slice(first, first + images),
                slice(top * columns, bottom * columns),
                slice(above * columns, below * columns),
                slice((top - above) * columns, (bottom - above) * columns),
            )


def as_image(tokens: Tensor, columns: int) -> Tensor:
    """(b, r*C, d) -> (b, d, r, C), a view in the channels-last layout."""
    return tokens.unflatten(1, (-1, columns)).permute(0, 3, 1, 2)


def convolve(tokens: Tensor, weight: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    """The convolution of whole rows of the grid, in the dtype of the weight, with zeros all around them."""
    image = as_image(tokens.to(weight.dtype), columns)
    return F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).flatten(1, 2)


class Depthwise(torch.autograd.Function):
    """The convolution and its gradients, strip by strip.  Weight and bias are in the accumulation dtype."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
        out = torch.zeros_like(v, memory_format=torch.contiguous_format)
        for images, strip, with_neighbours, inner in strips(v, grid):
            out[images, strip] = convolve(v[images, with_neighbours], weight, bias, grid[1])[:, inner]
        ctx.save_for_backward(v, weight, bias)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight, bias = ctx.saved_tensors
        needed = need_v, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # A second derivative is wanted: one differentiable expression of the inputs themselves.
            wanted = [t for t, need in zip((v, weight, bias), needed, strict=True) if need]
            found = iter(torch.autograd.grad(plain_depthwise(v, weight, bias, ctx.grid), wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), None

        columns = ctx.grid[1]
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format) if need_v else None
        dweight = torch.zeros_like(weight) if need_weight else None
        mirrored = weight.flip(-2, -1)
        with no_autocast(grad.device):
            for images, strip, with_neighbours, inner in strips(v, ctx.grid):
                if dv is not None:
                    dv[images, strip] = convolve(grad[images, with_neighbours], mirrored, None, columns)[:, inner]
                if dweight is not None:
                    # The neighbouring rows are input to this strip's output, not output of their own.
                    image = v[images, with_neighbours].to(weight.dtype)
                    g = torch.zeros_like(image, memory_format=torch.contiguous_format)
                    g[:, inner] = grad[images, strip]
                    dweight += torch.nn.grad.conv2d_weight(
                        as_image(image, columns), weight.shape, as_image(g, columns), padding=1, groups=len(weight)
                    )
        return dv, dweight, grad.sum((0, 1), dtype=weight.dtype) if need_bias else None, None


def plain_depthwise(v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The reference equation in the dtype of the weight."""
    return reference.depthwise(v.to(weight.dtype), weight, bias, grid).to(v.dtype)


def depthwise(v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """v (B, R*C, d), weight (d, 1, 3, 3), bias (d,) or None, grid (R, C) -> (B, R*C, d) in the dtype of v."""
    dtype = accumulation_dtype(v.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with no_autocast(v.device):
        if takes_plain_path(v, weight, bias):
            return plain_depthwise(v, weight, bias, grid)
        return Depthwise.apply(v, weight, bias, grid)
