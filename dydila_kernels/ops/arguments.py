"""What the kernels take, in groups.  Triton passes a named tuple as so many arguments; None takes no place.

B images of N tokens of d channels, T = B N; H heads of e = d/H channels; n_F and n_D entries of the tables.  Fields in
lower case are tensors (pointers, in the kernels) or numbers, in upper case constants of the compilation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor


class Strided(NamedTuple):
    """x (B, N, channels), its channels next to each other, with any other strides."""

    x: Any
    stride_xb: Any
    stride_xn: Any


class Tokens(NamedTuple):
    """One side: z and redundant (B, N, d), Z and Z', the latter None for one branch; mask (T,) bool or None."""

    z: Strided
    redundant: Strided | None
    mask: Any


class Segments(NamedTuple):
    """Which tokens belong together: N and T, or for packed images also a table.

    table: None, where all images have N tokens; (tiles, 3) int32 with the segment, the first token and the end of the
    segment of each tile of a packed row; for :func:`state_kernel` the bounds (segments + 1,) int32 of the images.
    """

    table: Any
    N: Any
    T: Any


class Tables(NamedTuple):
    """gamma (n_F,), lam (n_D,) or None."""

    gamma: Any
    lam: Any


class Routers(NamedTuple):
    """kernel, kernel_redundant (d, n_F), those of Z and of Z'; differential (2d, n_D), or (d, n_D) for one branch.

    Any of them may be None.
    """

    kernel: Any
    kernel_redundant: Any
    differential: Any


class Statistics(NamedTuple):
    """What is known of each row once it is routed and measured, see :mod:`dydila_kernels.ops.tokens`.

    index (branches, T) int8; lam_index (T,) int8 or None; norms (branches, 3, T) float32.
    """

    index: Any
    lam_index: Any
    norms: Any


class Slopes(NamedTuple):
    """Straight through, what a choice passes on to the logits; also the gradients of these logits.  float32, or None.

    kernel (branches, T, n_F), differential (T, n_D).
    """

    kernel: Any
    differential: Any


class Scaling(NamedTuple):
    """What multiplies Zh: fp16_prescale keeps float16 in range; length_scale (segments,) float32 or None."""

    fp16_prescale: Any
    length_scale: Any


class Denominator(NamedTuple):
    """Under "denominator", all float32 and else None.

    vector (segments, d): the mean denominator terms of the keys, or the gradient of that mean; inverse (T, H): 1 over
    the denominator of each query and head; weights (T, H): what multiplies the terms of each token, the gradient of its
    denominator; sums: where the sums over tokens of these terms go, (programs, d), or (segments, splits, d) in
    :func:`state_kernel`; of queries that are written in Gluon the parts (d / width, T) of their denominators, see
    :func:`part_width`.
    """

    vector: Any = None
    inverse: Any = None
    weights: Any = None
    sums: Any = None


class Source(NamedTuple):
    """Where dy, the gradient of Zh, comes from, but for ``scale``.

    x (B, N, d) and matrix (segments, H, e, e), whose products it is, or given (T, d).
    """

    x: Strided | None
    matrix: Any
    given: Any
    scale: Any


class Gradients(NamedTuple):
    """Where gradients go: dz, dz_redundant and dv (T, d), all or None but the first, with rows ``stride`` apart, a
    constant; dgamma (programs, n_F), dlam (programs, n_D) float32 or None."""

    dz: Any
    dz_redundant: Any
    dv: Any
    stride: Any
    dgamma: Any
    dlam: Any


class Constants(NamedTuple):
    """Sizes, the tile of BLOCK_N tokens by BLOCK_D channels, and how exact products are, see :func:`numerics`.

    HAS_DENOMINATOR: Zh is relative to the larger renormalisation of its branches, instead of scaled, as that of queries
    may be under "denominator": the scale of a query has no effect on its result.
    """

    D: int
    H: int
    N_F: int
    N_D: int
    BLOCK_N: int
    BLOCK_D: int
    HAS_DENOMINATOR: bool
    FAST: bool
    PRECISION: str
    ROUTER_PRECISION: str


def strided(x: Tensor) -> Strided:
    """The argument for a (B, N, channels) tensor whose channels are next to each other."""
    return Strided(x, x.stride(0), x.stride(1))


@lru_cache(maxsize=1024)
def constant(value: int) -> Any:
    """A field that is a constant of the compilation, in a named tuple of which others are not."""
    return tl.constexpr(value)


def contiguous_channels(tokens: Tensor) -> Tensor:
    """A tensor (B, N, channels) whose last dimension is contiguous, copying if needed."""
    return tokens if tokens.stride(-1) == 1 or tokens.shape[-1] == 1 else tokens.contiguous()
