"""What the launches of one call of the core have in common: shapes, segments, scales, and the two sides.

T = B N rows.  A segment is an image with a state of its own: one of the B images, or one of those packed in the one
row of B = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dydila_kernels.ops.depthwise import Geometry
from dydila_kernels.ops.tiles import INTERPRETED, check_rows, upload
from dydila_kernels.types import Ranks

PROGRAMS = 264
"""Programs to split a sum over where the device does not say how many fit: two for each processor of an H200."""


class Side(NamedTuple):
    """Queries or keys; the kept tensors are described in :mod:`dydila_kernels.ops.tokens`.

    ``relative``: queries under "denominator".  ``factors``: (segments,) float32 multiplies queries, or None.
    """

    tokens: Tensor
    redundant: Tensor | None
    routers: tuple[Tensor, Tensor | None]
    differential_router: Tensor | None
    indices: Tensor
    choice: Tensor | None
    statistics: Tensor
    slopes: Tensor | None
    differential_slopes: Tensor | None
    relative: bool
    factors: Tensor | None

    def maps(self) -> list[Side]:
        """Each of the two maps of Eq. 10 on its own; lambda, where there is one, belongs to the second."""
        assert self.redundant is not None
        return [
            self._replace(
                tokens=tokens,
                redundant=None,
                routers=(router, None),
                differential_router=None if self.differential_router is None else self.differential_router.chunk(2)[m],
                indices=self.indices[m : m + 1],
                choice=self.choice if m else None,
                statistics=self.statistics[m : m + 1],
                slopes=None if self.slopes is None else self.slopes[m : m + 1],
                differential_slopes=self.differential_slopes if m else None,
            )
            for m, (tokens, router) in enumerate(zip((self.tokens, self.redundant), self.routers, strict=True))
            if router is not None
        ]


class Span(NamedTuple):
    """Segments whose tokens are a block of a (B, N, d) tensor: all of a batch, or one of a packed row."""

    segments: slice
    images: slice
    rows: slice


class Call:
    """One call: ``like`` is a (B, N, d) tensor; the rest are arguments of the core, already validated.

    With ``ranks`` its tokens are a part of all there are.
    """

    def __init__(
        self,
        like: Tensor,
        gamma: Tensor,
        lam: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Sequence[int] | None,
        grids: Sequence[int],
        num_heads: int,
        normalization: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.batch, self.length, self.dim = like.shape
        self.rows, self.heads, self.head_dim = self.batch * self.length, num_heads, self.dim // num_heads
        check_rows(self.rows)
        self.dtype, self.device = like.dtype, like.device
        self.gamma, self.lam, self.normalization = gamma, lam, normalization
        self.mask = None if mask is None else mask.contiguous()
        self.bounds = None if cu_seqlens is None else tuple(cu_seqlens)
        self.segments = self.batch if self.bounds is None else len(self.bounds) - 1
        bounds = (0, self.length) if self.bounds is None else self.bounds
        self.longest = max(1, *(stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)))
        self.geometry = geometry_of(tuple(grids), self.device)
        self.ranks = ranks
        whole = self.longest if ranks is None else max(1, ranks.length)

        # Kept near 1 in float16: sums are means over the longest segment, and tokens, whose norm may be sqrt(d) times
        # their largest entry, are scaled down.  What that takes from the result, ``rescale`` gives back.
        relative = normalization == "denominator"
        self.unit = 2.0 ** -(math.ceil(math.log2(self.dim) / 2) + 1) if self.dtype == torch.float16 else 1.0
        self.scale = 1.0 / whole
        self.rescale = 1.0 if relative else (whole if normalization == "none" else 1.0) / self.unit**2
        self.factors: Tensor | None = None
        counts = None if self.mask is None else self.mask.sum(-1)
        if ranks is not None:
            counts = ranks.counts
        if normalization == "length" and counts is not None:
            self.factors = whole / counts.clamp(min=1).float()
        elif normalization == "length" and self.bounds is not None:
            self.factors = factors_of(self.bounds, self.longest, self.device)

    def sum_over_ranks(self, *tensors: Tensor | None) -> None:
        """In place, where there are ranks."""
        if self.ranks is not None:
            self.ranks.reduce_([t for t in tensors if t is not None], "sum")

    def programs(self, rows: int) -> int:
        """Programs of ``rows`` tokens, none of which straddles segments."""
        if self.bounds is None:
            return self.batch * -(-self.length // rows)
        return len(tiles_of(self.bounds, rows))

    def tiles(self, rows: int) -> Tensor | None:
        """The tile table of :func:`rows_of_program`."""
        return None if self.bounds is None else table(tiles_of(self.bounds, rows), self.device)

    def bounds_table(self) -> Tensor | None:
        return None if self.bounds is None else table(self.bounds, self.device)

    def splits(self, rows: int) -> int:
        """Programs that share a sum over the tokens of a segment: enough to fill the device, each with four tiles."""
        wanted = -(-processors(self.device) // max(1, self.segments * self.heads))
        return max(1, min(wanted, self.longest // (4 * rows)))

    def spans(self) -> Iterator[Span]:
        if self.bounds is None:
            yield Span(slice(None), slice(None), slice(None))
        else:
            for i, (start, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
                yield Span(slice(i, i + 1), slice(0, 1), slice(start, stop))

    def arguments(self, side: Side) -> dict[str, Any]:
        """What every kernel takes of a side."""
        redundant = side.redundant
        return {
            "Z1": side.tokens, "Z2": redundant, "INDEX": side.indices, "CHOICE": side.choice, "STATS": side.statistics,
            "GAMMA": self.gamma, "LAM": self.lam, "N": self.length, "T": self.rows,
            "batch1": side.tokens.stride(0), "row1": side.tokens.stride(1),
            "batch2": 0 if redundant is None else redundant.stride(0),
            "row2": 0 if redundant is None else redundant.stride(1),
            "D": self.dim, "H": self.heads,
        }  # fmt: skip

    def deciding(self, side: Side, decide: bool) -> dict[str, Any]:
        """What a kernel that may decide takes beside that."""
        return {
            "MASK": self.mask if decide else None,
            "ROUTER1": side.routers[0] if decide else None, "ROUTER2": side.routers[1] if decide else None,
            "ROUTER_D": side.differential_router if decide else None,
            "SLOPES": side.slopes if decide else None, "SLOPES_D": side.differential_slopes if decide else None,
            "FACTORS": side.factors, "unit": self.unit, "RELATIVE": side.relative, "DECIDE": decide, **self.choices(),
        }  # fmt: skip

    def choices(self) -> dict[str, int]:
        """n_F and n_D."""
        return {"N_F": len(self.gamma), "N_D": 1 if self.lam is None else len(self.lam)}

    def convolution(self, x: Tensor | None, weight: Tensor | None) -> dict[str, Any]:
        """The convolution of x (B, N, d) that a kernel adds to what it writes, or none."""
        on = x is not None and weight is not None
        return {
            "WEIGHT": weight if on else None, "GRIDS": self.geometry.table if on else None,
            "grid_start": self.geometry.start, "grid_rows": self.geometry.rows, "grid_columns": self.geometry.columns,
        }  # fmt: skip


def tiles_of(bounds: tuple[int, ...], rows: int) -> tuple[tuple[int, int, int], ...]:
    """(segment, first token, end of the segment) of each tile of a packed row."""
    return tuple(
        (i, first, stop)
        for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        for first in range(start, stop, rows)
    )


Made = TypeVar("Made")
_captured: list[Any] = []
"""Tables of which a CUDA graph has the addresses."""


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Makes a table once: the same packing comes again in every layer and step.  The device is the last argument."""
    made = lru_cache(maxsize=256)(make)

    def get(*arguments: Any) -> Made:
        found = made(*arguments)
        if arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.append(found)
        return found

    return get


@kept
def table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """int32 on the device."""
    return upload(values, torch.int32, device)


@kept
def factors_of(bounds: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    counts = [max(1, stop - start) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return upload([longest / count for count in counts], torch.float32, device)


@kept
def geometry_of(grids: tuple[int, ...], device: torch.device) -> Geometry:
    """From (start, rows, columns) of each grid in one flat tuple."""
    return Geometry.of([(grids[i], grids[i + 1], grids[i + 2]) for i in range(0, len(grids), 3)], device)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Programs that fill the device twice over."""
    if device.type == "cuda" and not INTERPRETED:
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS
