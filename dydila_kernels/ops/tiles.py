"""What the kernels share: the launch, row addresses, the power of Eq. 5, products that stay exact.

Tiles are (rows, columns): tokens by channels.  Every row address is int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from dydila_kernels.ops.configs import Config

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported: kernels then run on CPU tensors, in numpy."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

Grid = tuple[int, ...]
Launcher = Callable[[Any, Grid, Config, dict[str, Any]], None]


def run(kernel: Any, grid: Grid, config: Config, arguments: dict[str, Any]) -> None:
    """Launches a kernel of Triton."""
    kernel[grid](**arguments, **config.options)


launcher: Launcher = run
"""Replaced by the offline compilation, which records what would be launched."""
target: str = "hip" if torch.version.hip else "cuda"


def launch(kernel: Any, grid: Grid, config: Config, **arguments: Any) -> None:
    """Runs ``kernel`` on a grid of programs; an empty grid is no launch."""
    if min(grid) > 0:
        launcher(kernel, grid, config, arguments)


def allows_tf32() -> bool:
    """Torch's own setting; what newer versions call fp32_precision is an error to read under the old name."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of kernels for tokens of ``dtype``.

    FAST: log2 by the one instruction of the GPU, whose error of 2^-22 is far below the rounding of 16-bit tokens.
    PRECISION: of products of float32 operands; for float32 tokens it follows torch's own setting.
    ROUTER_PRECISION: of the products that decide, which are exact to about float32 always.
    """
    tf32 = target == "cuda" and (dtype != torch.float32 or allows_tf32())
    return {
        "FAST": dtype != torch.float32 and target == "cuda" and not INTERPRETED,
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROUTER_PRECISION": "tf32x3" if target == "cuda" else "ieee",
    }


MAX_TOKENS = 2**31 - 2**16
"""Tokens of a call: their numbers, and those that pad the last tile, are int32."""


def check_tokens(count: int) -> None:
    """Raises ValueError where a call has more than the kernels can number."""
    if count > MAX_TOKENS:
        raise ValueError(f"the kernels take {MAX_TOKENS} tokens in a call at most (B N); got {count}")


def upload(values: Any, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A small table for the device.  Waits for the copy, so that any stream may read it.

    Raises RuntimeError while a CUDA graph is captured, which would not hold the contents.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call the layer once with this packing before it is captured in a CUDA graph")
    return torch.tensor(values, dtype=dtype).to(device)


def ceil_div(n: int, size: int) -> int:
    """n / size, rounded up.  Triton's own function is for kernels, and slow on the host."""
    return -(-n // size)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= ``least``; a tile dimension of ``tl.dot`` must be 16 at least."""
    return max(least, 1 << (n - 1).bit_length())


@triton.constexpr_function
def part_width(head_dim):
    """Channels of the parts in which Gluon kernels sum over those of a head: of one head, and of one warp."""
    return min(32, head_dim & -head_dim)


@triton.constexpr_function
def padded(size, least=16):
    """The width of a tile of ``size`` columns: :func:`power_of_two` for kernels."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2 x, float32, as exact as FAST allows."""
    if FAST:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def quotient(x, y, FAST: tl.constexpr):
    """x / y: rounded correctly, or FAST within 2 ulp, which is far below the rounding of 16-bit tokens and takes a
    few instructions instead of a subroutine with registers of its own."""
    if FAST:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x, FAST: tl.constexpr):
    """The square root of x, as exact as :func:`quotient`."""
    if FAST:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def pin(x):
    """x (R, C).  A layout barrier: keeps Triton from evaluating what is above it anew for each warp of a product."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], 1)), axis=2)


@triton.jit
def product(x, y):
    """x y, rounded, whatever is done with it.

    The compiler would fuse a product with the first addition of a sum.  Where that adds what another lane has, each
    lane would leave its own product unrounded, and lanes that are to hold one sum would differ in its last bit.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def operand(x):
    """x as a product takes it: of float32 tensor cores take 11 bits, and would cut off the others."""
    if x.dtype == tl.float32:
        shifted = product(x, 8193.0)  # 2^13 + 1
        return shifted - (shifted - x)
    else:
        return x


@triton.jit
def row_dot(x, y):
    """The dot product (R,) of each row of x and y (R, C) float32, with the same bits wherever it is held."""
    return tl.sum(product(x, y), axis=1)


@triton.jit
def fold_dot(x, y):
    """(R, C / 8): the dot products of eight neighbours of x and y (R, C) float32, which mostly one thread holds."""
    return tl.sum(tl.reshape(product(x, y), (x.shape[0], x.shape[1] // 8, 8)), axis=2)


@triton.jit
def fold_max(x):
    """(R, C) -> (R, C / 8), maxima of eight neighbours."""
    return tl.max(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), axis=2)


@triton.jit
def router_dot(z, router, acc, ROUTER_PRECISION: tl.constexpr):
    """acc + z router, exact to float32: z (R, C) tokens as loaded, router (C, n) float32 or the dtype of the tokens.

    bf16 tokens are exact as they are, so a float32 router is split into three bf16 parts of 8 bits each.
    """
    if z.dtype == tl.bfloat16:
        if router.dtype == tl.bfloat16:
            acc = tl.dot(z, router, acc)
        else:
            high = router.to(tl.bfloat16)
            rest = router - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(z, low, acc)
            acc = tl.dot(z, middle, acc)
            acc = tl.dot(z, high, acc)
    else:
        acc = tl.dot(z.to(tl.float32), router.to(tl.float32), acc, input_precision=ROUTER_PRECISION)
    return acc


@triton.jit
def first_largest(logits, NUM_OPTIONS: tl.constexpr):
    """(R, n) -> (R,) int32, the lowest index of the largest of the first NUM_OPTIONS columns."""
    option_ids = tl.arange(0, logits.shape[1])
    index = tl.argmax(tl.where(option_ids[None, :] < NUM_OPTIONS, logits, float("-inf")), axis=1, tie_break_left=True)
    # Among NaN the largest may be a column that is none: such a token, too, must choose something.
    return tl.minimum(index, NUM_OPTIONS - 1)


class Tile(NamedTuple):
    """The tokens (R,) that a program works on.

    image: the row of the batch, int64; segment: the image that they belong to; n: their places in the row of the batch,
    and token_ids: among all tokens, int64; row_mask: which of them there are; N; T, int64.
    """

    image: Any
    segment: Any
    n: Any
    token_ids: Any
    row_mask: Any
    N: Any
    T: Any


@triton.jit
def tile_of_program(segments, BLOCK_N: tl.constexpr):
    """The :class:`Tile` of a program of a one-dimensional grid."""
    if segments.table is None:
        tiles = tl.cdiv(segments.N, BLOCK_N)
        image = (tl.program_id(0) // tiles).to(tl.int64)
        segment = image
        n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = n < segments.N
    else:
        image = tl.full((), 0, tl.int64)
        entry = segments.table + tl.program_id(0) * 3
        segment = tl.load(entry).to(tl.int64)
        n = tl.load(entry + 1) + tl.arange(0, BLOCK_N)
        row_mask = n < tl.load(entry + 2)
    n = n.to(tl.int64)
    T = tl.cast(segments.T, tl.int64)
    return Tile(image, segment, n, image * segments.N + n, row_mask, segments.N, T)


@triton.jit
def row_pointers(strided, tile):
    """Pointers (R, 1) to the rows of a tile."""
    return strided.x + (tile.image * strided.stride_xb + tile.n * strided.stride_xn)[:, None]


@triton.jit
def tile_mask(row_mask, columns, END: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of a tile: the rows given, and those columns that exist of END channels taken WIDTH at a time."""
    if END % WIDTH == 0:
        return row_mask[:, None]
    else:
        return row_mask[:, None] & (columns < END)[None, :]
