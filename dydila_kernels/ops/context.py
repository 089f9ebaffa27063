"""What the launches of one call of the core have in common: shapes, segments, scales, and the two sides.

T = B N tokens.  A segment is an image with a state of its own: one of the B images, or one of those packed in the one
row of B = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dydila_kernels.ops import forms
from dydila_kernels.ops.arguments import (
    Constants,
    Routers,
    Scaling,
    Segments,
    Slopes,
    Statistics,
    Tables,
    Tokens,
    strided,
)
from dydila_kernels.ops.configs import Config
from dydila_kernels.ops.depthwise import Geometry
from dydila_kernels.ops.tiles import INTERPRETED, check_tokens, numerics, upload
from dydila_kernels.types import Ranks

PROGRAMS = 264
"""Programs to split a sum over where the device does not say how many fit: two for each processor of an H200."""


class QKOperand(NamedTuple):
    """Queries or keys, (B, N, d) each, and what is decided and saved of them, as :mod:`dydila_kernels.ops.tokens` says.

    ``has_denominator``: queries under "denominator".  ``length_scale`` (segments,) float32 multiplies queries, or None.
    ``prepared``: the routers as the Gluon form takes them, once they are.
    """

    tokens: Tensor
    redundant: Tensor | None
    routers: tuple[Tensor, Tensor | None]
    differential_router: Tensor | None
    indices: Tensor
    lam_index: Tensor | None
    statistics: Tensor
    slopes: Tensor | None
    differential_slopes: Tensor | None
    has_denominator: bool
    length_scale: Tensor | None
    prepared: Any = None

    def branches(self) -> list[QKOperand]:
        """Each of the two branches of Eq. 10 on its own; lambda, where there is one, belongs to the second."""
        assert self.redundant is not None
        return [
            self._replace(
                tokens=tokens,
                redundant=None,
                routers=(router, None),
                differential_router=None if self.differential_router is None else self.differential_router.chunk(2)[b],
                indices=self.indices[b : b + 1],
                lam_index=self.lam_index if b else None,
                statistics=self.statistics[b : b + 1],
                slopes=None if self.slopes is None else self.slopes[b : b + 1],
                differential_slopes=self.differential_slopes if b else None,
            )
            for b, (tokens, router) in enumerate(zip((self.tokens, self.redundant), self.routers, strict=True))
            if router is not None
        ]


class Rotary(NamedTuple):
    """cos and sin (B, N, e) of rotary embeddings, their channels next to each other, and which channels are a pair."""

    cos: Tensor
    sin: Tensor
    pairing: str


class Span(NamedTuple):
    """Segments whose tokens are a block of a (B, N, d) tensor: all of a batch, or one of a packed row."""

    segments: slice
    images: slice
    rows: slice


class LaunchContext:
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
        rotary: Rotary | None = None,
    ) -> None:
        self.batch, self.length, self.dim = like.shape
        self.num_tokens, self.heads, self.head_dim = self.batch * self.length, num_heads, self.dim // num_heads
        check_tokens(self.num_tokens)
        self.dtype, self.device = like.dtype, like.device
        self.gamma, self.lam, self.normalization = gamma, lam, normalization
        self.tables = Tables(gamma, lam)
        self.gammas, self.lambdas = gamma.shape[0], 0 if lam is None else lam.shape[0]
        self.mask = None if mask is None else mask.contiguous()
        self.bounds = None if cu_seqlens is None else tuple(cu_seqlens)
        self.segments = self.batch if self.bounds is None else len(self.bounds) - 1
        bounds = (0, self.length) if self.bounds is None else self.bounds
        self.longest = max(1, *[stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)])
        self.geometry = geometry_of(tuple(grids), self.device)
        self.ranks, self.rotary = ranks, rotary
        # Asked once a call: they may change between calls.
        self.form, self.numerics = forms.wanted(), numerics(self.dtype)
        whole = self.longest if ranks is None else max(1, ranks.length)

        # Kept near 1 in float16: sums are means over the longest segment, and tokens, whose norm may be sqrt(d) times
        # their largest entry, are scaled down.  What that takes from the result, ``output_scale`` gives back.
        self.has_denominator = normalization == "denominator"
        float16 = self.dtype == torch.float16 and not self.has_denominator
        self.fp16_prescale = 2.0 ** -(math.ceil(math.log2(self.dim) / 2) + 1) if float16 else 1.0
        self.state_scale = 1.0 / whole
        scaled = (whole if normalization == "none" else 1.0) / self.fp16_prescale**2
        self.output_scale = 1.0 if self.has_denominator else scaled
        self.length_scale: Tensor | None = None
        counts = None if self.mask is None else self.mask.sum(-1)
        if ranks is not None:
            counts = ranks.counts
        if normalization == "length" and counts is not None:
            self.length_scale = whole / counts.clamp(min=1).float()
        elif normalization == "length" and self.bounds is not None:
            self.length_scale = length_scale_of(self.bounds, self.longest, self.device)

    @property
    def by_scores(self) -> bool:
        """Whether (Qh Kh^T) V is the cheaper order; ranks share states, not scores."""
        return self.ranks is None and takes_scores(self.longest, self.head_dim)

    def sum_over_ranks(self, *tensors: Tensor | None) -> None:
        """In place, where there are ranks."""
        if self.ranks is not None:
            self.ranks.reduce_([t for t in tensors if t is not None], "sum")

    def programs(self, block_n: int) -> int:
        """Programs of ``block_n`` tokens, none of which straddles segments."""
        if self.bounds is None:
            return self.batch * -(-self.length // block_n)
        return len(tiles_of(self.bounds, block_n))

    def splits(self, block_n: int) -> int:
        """Programs that share a sum over the tokens of a segment, each with four tiles at least.

        Together they are two to four for each multiprocessor, whichever leaves fewest of them with less to do.
        """
        groups = max(1, self.segments * self.heads)
        programs = [(each, max(1, each * processors(self.device) // (2 * groups))) for each in (2, 3, 4)]
        _, even = min(programs, key=lambda found: found[0] / found[1])
        return max(1, min(even, self.longest // (4 * block_n)))

    def mean_of(self, partials: Tensor, block_n: int) -> Tensor:
        """(segments, d): sums over ``block_n`` tokens each, (programs, d), added up and over the longest length."""
        if self.bounds is None:
            return (
                partials.view(self.batch, partials.shape[0] // max(1, self.batch), self.dim).sum(1) * self.state_scale
            )
        counts = [-(-(stop - start) // block_n) for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True)]
        return torch.stack([part.sum(0) for part in partials.split(counts)]) * self.state_scale

    def spans(self) -> Iterator[Span]:
        """The blocks of a (B, N, d) tensor that torch can multiply at once."""
        if self.bounds is None:
            yield Span(slice(None), slice(None), slice(None))
        else:
            for i, (start, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
                yield Span(slice(i, i + 1), slice(0, 1), slice(start, stop))

    # Arguments of the kernels

    def tokens(self, side: QKOperand, masked: bool = False) -> Tokens:
        redundant = None if side.redundant is None else strided(side.redundant)
        return Tokens(strided(side.tokens), redundant, self.mask if masked else None)

    def tiles(self, block_n: int) -> Segments:
        """For kernels whose programs take ``block_n`` tokens each."""
        tiles = None if self.bounds is None else table(tiles_of(self.bounds, block_n), self.device)
        return Segments(tiles, self.length, self.num_tokens)

    def whole_segments(self) -> Segments:
        """For kernels whose programs go through the tokens of a segment."""
        return Segments(None if self.bounds is None else table(self.bounds, self.device), self.length, self.num_tokens)

    def measured(self, side: QKOperand) -> dict[str, Any]:
        """What tells a kernel the factors of each token."""
        return {
            "tables": self.tables,
            "stats": Statistics(side.indices, side.lam_index, side.statistics),
        }

    def deciding(self, side: QKOperand, decide: bool) -> dict[str, Any]:
        """What a kernel takes beside that to decide them."""
        routers = Routers(*side.routers, side.differential_router) if decide else Routers(None, None, None)
        slopes = Slopes(side.slopes, side.differential_slopes) if decide else Slopes(None, None)
        return {"routers": routers, "slopes": slopes, "DECIDE": decide}

    def scaling(self, side: QKOperand) -> Scaling:
        return Scaling(self.fp16_prescale, side.length_scale)

    def constants(self, config: Config, has_denominator: bool = False, heads: int | None = None) -> Constants:
        """``heads``: their number where it is not that of the layer."""
        return Constants(
            D=self.dim,
            H=heads or self.heads,
            N_F=self.gammas,
            N_D=max(1, self.lambdas),
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            HAS_DENOMINATOR=has_denominator,
            **self.numerics,
        )


def takes_scores(length: int, head_dim: int) -> bool:
    """Whether (Qh Kh^T) V costs less than Qh (Kh^T V), for N tokens."""
    return length < head_dim


def tiles_of(bounds: tuple[int, ...], block_n: int) -> tuple[tuple[int, int, int], ...]:
    """(segment, first token, end of the segment) of each tile of a packed row."""
    return tuple(
        (i, first, stop)
        for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        for first in range(start, stop, block_n)
    )


Value = TypeVar("Value")
_captured: list[Any] = []
"""Tables of which a CUDA graph has the addresses."""


def device_cache(make: Callable[..., Value]) -> Callable[..., Value]:
    """Makes a table once: the same packing comes again in every layer and step.  The device is the last argument."""
    made = lru_cache(maxsize=256)(make)

    def get(*arguments: Any) -> Value:
        found = made(*arguments)
        if arguments[-1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.append(found)
        return found

    return get


@device_cache
def table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """int32 on the device."""
    return upload(values, torch.int32, device)


@device_cache
def length_scale_of(bounds: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """(segments,) float32: the longest segment over each."""
    counts = [max(1, stop - start) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return upload([longest / count for count in counts], torch.float32, device)


@device_cache
def geometry_of(grids: tuple[int, ...], device: torch.device) -> Geometry:
    """From (start, rows, columns) of each grid in one flat tuple."""
    return Geometry.of([(grids[i], grids[i + 1], grids[i + 2]) for i in range(0, len(grids), 3)], device)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Programs that fill the device twice over."""
    if device.type == "cuda" and not INTERPRETED:
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS
