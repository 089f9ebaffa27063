"""Sequence parallelism: the tokens of each image spread over processes, the parameters the same on all of them.

A rank holds a range of the tokens, in their order, of every image of the batch.  Everything in the layer acts on
single tokens but two stages.  The states are sums over tokens: one all-reduce, whose size has no N in it.  The 3x3
convolution reads the neighbours of a token: each rank fetches the row of the grid on either side of its own rows.

Gradients are those of the sum of what the ranks call ``backward`` on; of a parameter each rank gets its share, and the
sum over the ranks is what one process would get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.checks import CheckedArgs
from dydila_kernels.linear import linear
from dydila_kernels.precision import accumulation_dtype, autocast_dtype
from dydila_kernels.torch_backend import depthwise, takes_plain_path
from dydila_kernels.types import Convolution, Grid, Video, frames_of

Module = TypeVar("Module", bound=nn.Module)
Range = tuple[int, int]
"""First token and end."""


class Group:
    """The processes that share the tokens."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group must be one dimension of a mesh, as mesh['sp'] is; got {group.ndim} dimensions"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup | None):
            raise TypeError(f"group must be a ProcessGroup or DeviceMesh this process belongs to, or None; got {group}")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a copy of a module talks to the same processes

    def agree(self, length: int, facts: Mapping[str, object], device: torch.device) -> list[int]:
        """The lengths of all ranks, which must agree on all facts; a negative length says that a rank refuses."""
        # Words are compared by their checksums; where these differ each rank tells its own.
        mine = torch.tensor([length, *(crc32(repr(fact).encode()) for fact in facts.values())], device=device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self.group)
        lengths, *columns = torch.stack(gathered).T.tolist()
        refusing = [rank for rank, n in enumerate(lengths) if n < 0]
        if refusing and length >= 0:
            raise RuntimeError(f"rank {refusing[0]} of {self.size} refused its arguments, so this rank stops too")
        for (name, fact), column in zip(facts.items(), columns, strict=True):
            if len(set(column)) > 1 and not refusing:
                raise ValueError(f"all ranks must have the same {name}; rank {self.rank} of {self.size} has {fact}")
        return lengths

    def checked_lengths(self, lengths: Sequence[int], own: int | None = None) -> list[int]:
        """Lengths that the caller gave, of which this rank has ``own``."""
        for n in lengths:
            checks.integer("lengths", n, 0)
        if len(lengths) != self.size:
            raise ValueError(f"lengths must hold one number for each of {self.size} ranks; got {list(lengths)}")
        if own is not None and lengths[self.rank] != own:
            raise ValueError(
                f"lengths must say {own} for rank {self.rank}, whose tokens these are; got {list(lengths)}"
            )
        return list(lengths)

    def exchange(self, pieces: Sequence[Tensor], sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Sends a piece to each rank and returns what each sent, of these sizes."""
        like = pieces[0]
        # As bytes, which every backend can send.
        sent = torch.cat([piece.reshape(-1) for piece in pieces]).view(torch.uint8)
        counts = [size.numel() * like.itemsize for size in sizes]
        received = sent.new_empty(sum(counts))
        given = [piece.numel() * like.itemsize for piece in pieces]
        dist.all_to_all_single(received, sent, counts, given, group=self.group)
        return [part.view(like.dtype).view(size) for part, size in zip(received.split(counts), sizes, strict=True)]


@dataclass
class SharedTokens:
    """What a backend asks of a call's ranks, see :class:`dydila_kernels.types.Ranks`."""

    group: Group
    length: int
    counts: Tensor | None

    def reduce_(self, tensors: Sequence[Tensor], operation: Literal["sum", "max"]) -> None:
        # In one message, and as exact as the arithmetic around it, whatever the dtype of the tokens.
        dtype = accumulation_dtype(tensors[0].dtype)
        flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
        dist.all_reduce(flat, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=self.group.group)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def ranges_of(lengths: Sequence[int]) -> list[Range]:
    """The tokens that each rank holds."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def overlap(a: Range, b: Range) -> slice:
    """What both have in common, counted from the start of ``a``."""
    start = max(a[0], b[0])
    return slice(start - a[0], max(start, min(a[1], b[1])) - a[0])


class Fetch(torch.autograd.Function):
    """The tokens that this rank wants of those that the ranks hold; backward, the gradients go home and are added."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: Group, held: Sequence[Range], wanted: Sequence[Range]) -> Tensor:
        """tokens (B, n, ...) -> (B, m, ...); ``held`` and ``wanted`` by each rank, and known to all."""
        ctx.sent = [overlap(held[group.rank], other) for other in wanted]
        found = [overlap(other, wanted[group.rank]) for other in held]
        ctx.counts = [s.stop - s.start for s in found]
        ctx.group, ctx.length = group, tokens.shape[1]
        sizes = [torch.Size((tokens.shape[0], n, *tokens.shape[2:])) for n in ctx.counts]
        return torch.cat(group.exchange([tokens[:, s] for s in ctx.sent], sizes), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("tokens on several ranks have no second derivatives (create_graph=True)")
        batch, rest = grad.shape[0], grad.shape[2:]
        total = grad.new_zeros((batch, ctx.length, *rest))
        sizes = [torch.Size((batch, s.stop - s.start, *rest)) for s in ctx.sent]
        for s, part in zip(ctx.sent, ctx.group.exchange(grad.split(ctx.counts, 1), sizes), strict=True):
            total[:, s] += part
        return total, None, None, None


def rows_around(tokens: Range, grid: Grid | Video) -> Range:
    """The rows of the grids that a 3x3 convolution reads for those tokens of a range that are in a grid."""
    first, last = max(tokens[0], grid.start) - grid.start, min(tokens[1], grid.stop) - grid.start
    if first >= last:
        return tokens[0], tokens[0]
    # Rows are counted through all frames, and none is read across the border of one.
    top, bottom, rows = first // grid.columns, -(-last // grid.columns), grid.rows
    top, bottom = max(top - 1, top // rows * rows), min(bottom + 1, -(-bottom // rows) * rows)
    return grid.start + top * grid.columns, grid.start + bottom * grid.columns


class SequenceParallelAttention(DyDiLAttention):
    """A layer whose tokens are spread over ranks, which :func:`sequence_parallel` makes of a DyDiLAttention."""

    group: Group
    has_all_tokens = False

    @torch.compiler.disable  # what waits for other processes does not go into a graph
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        HW: Sequence[int] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        rotary: tuple[Tensor, Tensor] | Tensor | None = None,
        rotary_pairing: str = "interleaved",
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cu_seqlens: None = None,
        **others: None,
    ) -> Tensor:
        """Attend to the tokens of all ranks.  All ranks call this at once, and later ``backward``.

        Args:
            x: (B, n, d), this rank's tokens, a range of the N = sum of n that an image has: prefix tokens first, then
                the grid in row-major order.  n may differ between ranks and may be 0; a cut within a row is fine.
            mask: (B, n) bool, True for a real token, on all ranks or on none.
            HW: (rows, columns) of the whole grid; None for a square one; (frames, rows, columns) of a whole video.
            lengths: n of all ranks.  Without it they tell each other, along with what must be the same on all, which
                costs a message of a few bytes and on a GPU a wait for the device.
            rotary, rotary_pairing: as of one process, the rows of this rank's tokens.
            attn_mask: another name for ``mask``.
            is_causal: must be False; the attention is bidirectional.
            cu_seqlens: must be None; packed images cannot be spread.
            others: what callers of other layers pass by name; must be None.

        Returns:
            (B, n, d), the rows of the whole output that are this rank's.

        Raises:
            TypeError, ValueError: an argument is not as described, or (without ``lengths``) not the same on all ranks.
            RuntimeError: another rank refused its arguments; torch.func, forward-mode AD or meta tensors trace this.
        """
        call, refusal = None, None
        try:
            checks.unused(others, is_causal)
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None where the tokens of an image are spread over ranks")
            if takes_plain_path(x):
                raise RuntimeError("tokens on several ranks take no torch.func, forward-mode AD or meta tensors")
            mask = checks.mask_of(mask, attn_mask)
            call = self._checked(x, mask, rotary=rotary, rotary_pairing=rotary_pairing, needs_grid=False)
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = error
        if lengths is None:
            lengths = self.group.agree(-1 if call is None else x.shape[1], self._facts(call, HW), x.device)
        if refusal is not None:
            raise refusal
        assert call is not None
        lengths = self.group.checked_lengths(lengths, x.shape[1])
        length = sum(lengths)
        grids = checks.grids(HW, length, None, self.num_prefix_tokens) if HW is not None or self.dwc is not None else []

        counts = None
        if call.mask is not None and self.normalization == "length":
            counts = call.mask.sum(-1)
            dist.all_reduce(counts, group=self.group.group)
        call = call._replace(grids=grids)
        out = self._over_ranks(call, SharedTokens(self.group, length, counts), ranges_of(lengths))
        return call.visible(self.proj_drop(linear(self.proj, out)))

    def _over_ranks(self, call: CheckedArgs, ranks: SharedTokens, held: Sequence[Range]) -> Tensor:
        """Eqs. 1-9 for this rank's tokens."""
        x, mask, n, backend, options = call.x, call.mask, call.x.shape[1], self._backend(call), self._options(call)
        if not n:
            # A token that does not count, so that no stage has to do without any.
            x, mask = F.pad(x, (0, 0, 0, 1)), x.new_zeros((x.shape[0], 1), dtype=torch.bool)
            if options.rotary is not None:
                cos, sin = (F.pad(t, (0, 0, 0, 1)) for t in options.rotary)
                options = options._replace(rotary=(cos, sin))
        inputs = self._core_inputs(x, backend)
        out = backend.attend(inputs, options, mask=mask, ranks=ranks)[:, :n]
        return out if self.dwc is None else self._convolved(out, call.visible(inputs.v[:, :n]), held, call.grids[0])

    def _convolved(self, out: Tensor, v: Tensor, held: Sequence[Range], grid: Grid | Video) -> Tensor:
        """Eq. 9: ``out + DWC(V)`` for this rank's tokens."""
        assert self.dwc is not None
        wanted = [rows_around(tokens, grid) for tokens in held]
        rows = Fetch.apply(v, self.group, held, wanted)
        # This rank's prefix tokens lie before the rows, or else its first token lies somewhere in them.
        own, (start, stop) = held[self.group.rank], wanted[self.group.rank]
        prefix, before = overlap(own, (0, grid.start)).stop, max(own[0] - start, 0)
        rows = F.pad(rows, (0, 0, prefix, 0)) if prefix else rows
        padded = F.pad(out, (0, 0, before, rows.shape[1] - before - out.shape[1]))
        grids = []
        for frame in frames_of([grid]):
            there = overlap((start, stop), (frame.start, frame.stop))
            grids.append(Grid(prefix + there.start, (there.stop - there.start) // max(1, frame.columns), frame.columns))
        weight, bias = self.dwc()
        return depthwise(padded, rows, Convolution(weight, bias, grids))[:, before : before + out.shape[1]]

    def _facts(self, call: Any, HW: Any) -> dict[str, object]:
        """What all ranks must have the same of, by the name that an error uses; all None where the call is refused."""
        names = (
            "batch size",
            "dtype",
            "autocast dtype",
            "mask or none",
            "HW",
            "rotary or none",
            "rotary_pairing",
            "need of gradients",
            "layer",
        )
        if call is None:
            return dict.fromkeys(names)
        trained = call.x.requires_grad or any(p.requires_grad for p in self.parameters())
        facts = (
            call.x.shape[0],
            call.x.dtype,
            autocast_dtype(call.x.device),
            call.mask is not None,
            tuple(HW) if isinstance(HW, Sequence) else HW,
            call.rotary is not None,
            call.rotary_pairing,
            torch.is_grad_enabled() and trained,
            self,
        )
        return dict(zip(names, facts, strict=True))

    def balance_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raises RuntimeError: the usage of the routers is that of all tokens, and this rank holds a part."""
        raise RuntimeError("balance_loss needs all tokens of its images, which here are spread over ranks")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tokens on {self.group.size} ranks"


def sequence_parallel(module: Module, group: dist.ProcessGroup | DeviceMesh | None = None) -> Module:
    """Makes every DyDiLAttention in a module attend to tokens that are spread over ranks; in place.

    Parameters, their names and the state_dict stay as they are.  The calls are those of
    :meth:`SequenceParallelAttention.forward`: a rank passes its tokens, and HW of the whole grid.  Other layers that
    mix tokens, such as a convolution in a feed-forward network, are not changed.

    Args:
        module: a DyDiLAttention or what holds some, with the same parameters on all ranks; before ``fully_shard``.
        group: the ranks that share the tokens, a process group or one dimension of a DeviceMesh; None for all ranks.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    found = [layer for layer in module.modules() if isinstance(layer, DyDiLAttention)]
    if not found:
        raise ValueError(f"module must hold a DyDiLAttention; got a {type(module).__name__} without")
    for layer in found:
        if isinstance(layer, FSDPModule):
            raise TypeError(
                f"module must not be sharded yet: fully_shard comes after sequence_parallel; got {type(layer).__name__}"
            )
    ranks = Group(group)
    for layer in found:
        layer.__class__ = parallel_class(type(layer))  # type: ignore[arg-type]
        layer.group = ranks  # type: ignore[assignment]
    return module


@cache
def parallel_class(kind: type[DyDiLAttention]) -> type[DyDiLAttention]:
    """SequenceParallelAttention; for a subclass of DyDiLAttention, such as those of :mod:`dydila_kernels.convert`, one
    that calls it where the subclass calls DyDiLAttention."""
    if issubclass(kind, SequenceParallelAttention):
        return kind
    if kind is DyDiLAttention:
        return SequenceParallelAttention
    return type(f"SequenceParallel{kind.__name__}", (kind, SequenceParallelAttention), {})


def shard_tokens(
    x: Tensor, group: dist.ProcessGroup | DeviceMesh | None = None, *, lengths: Sequence[int] | None = None
) -> Tensor:
    """This rank's range of tokens that every rank has whole.

    The gradient of x is zero in the other ranks' ranges; its sum over the ranks is the whole.

    Args:
        x: (B, N, ...), the same on all ranks: tokens, or a mask.
        group: as in :func:`sequence_parallel`.
        lengths: tokens of each rank; None for equal parts, of which the first are one longer where need be.

    Returns:
        (B, n, ...), a view.
    """
    ranks = Group(group)
    if lengths is None:
        return x.tensor_split(ranks.size, 1)[ranks.rank]
    lengths = ranks.checked_lengths(lengths)
    if sum(lengths) != x.shape[1]:
        raise ValueError(f"lengths must sum to N = {x.shape[1]}; got {lengths}")
    return x.split(lengths, 1)[ranks.rank]


def gather_tokens(
    y: Tensor, group: dist.ProcessGroup | DeviceMesh | None = None, *, lengths: Sequence[int] | None = None
) -> Tensor:
    """The tokens of all ranks, on every rank.  All ranks call this at once, and later ``backward``.

    A token's gradient is the sum of those that it gets on all ranks.

    Args:
        y: (B, n, ...), this rank's tokens.
        group: as in :func:`sequence_parallel`.
        lengths: n of all ranks; without it they tell each other.

    Returns:
        (B, N, ...).
    """
    ranks = Group(group)
    if lengths is None:
        facts = {"shape but for n": (y.shape[0], *y.shape[2:]), "dtype": y.dtype, "need of gradients": y.requires_grad}
        lengths = ranks.agree(y.shape[1], facts, y.device)
    lengths = ranks.checked_lengths(lengths, y.shape[1])
    return Fetch.apply(y, ranks, ranges_of(lengths), [(0, sum(lengths))] * ranks.size)
