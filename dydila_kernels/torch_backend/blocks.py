"""How every stage cuts its input into blocks, and when it must not."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

CPU_BLOCK = 2**20
"""Elements of one token matrix in a block on a CPU: its few float32 temporaries of 4 MiB each stay in the caches."""
DEVICE_BLOCK = 2**25
"""The same on other devices, where launches are what costs: temporaries of 128 MiB each."""
ROW_TILE = 64
"""The rows of a block are a multiple of this, but for the last one of an image."""

FAKE = torch._C._TorchDispatchModeKey.FAKE

# glibc keeps twice the largest block that it was ever given back, of 32 MiB at most, and lets the system have the rest.
# Without one, the tensors that a small layer saves would be new pages in every step, a fifth of its time.
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")

ImageRanges = tuple[slice, list[slice]]
"""Images to take together, and the row ranges to take them in."""


SPARE = "spare 0", "spare 1"
"""Names in a workspace of what is done with when another function of this backend takes them."""


class Workspace:
    """Memory for the temporaries of the blocks of one call.  A name stands for what is held at one time.

    On a CPU the page faults of fresh memory take longer than most of the arithmetic on it.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, good until the same name is taken again or the call ends."""
        size = math.prod(shape)
        # Fresh memory is also what torch fills with NaN where deterministic algorithms are asked for, and a tensor made
        # under a dispatch mode is the mode's.
        kept_out = torch.are_deterministic_algorithms_enabled() or torch._C._len_torch_dispatch_stack() > 0
        if device.type != "cpu" or size > 2 * CPU_BLOCK or kept_out:
            return torch.empty(shape, dtype=dtype, device=device)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # what inference mode makes cannot be written outside of it
                buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """:meth:`take`, of the shape, dtype and device of ``tensor``."""
        return self.take(name, tensor.shape, tensor.dtype, tensor.device)


class IdleWorkspaces(threading.local):
    """Those of this thread that no call holds: one, unless a layer was called within another's call."""

    def __init__(self) -> None:
        self.stack: list[Workspace] = []


idle = IdleWorkspaces()


@contextmanager
def workspace() -> Iterator[Workspace]:
    """A workspace that is this call's alone until it ends; what it holds stays for a later call of the thread."""
    taken = idle.stack.pop() if idle.stack else Workspace()
    try:
        yield taken
    finally:
        idle.stack.append(taken)


def block_rows(dim: int, device: torch.device) -> int:
    """Rows of a block for tokens of ``dim`` channels."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(dim, 1))


def image_blocks(batch: int, start: int, stop: int, rows: int) -> Iterator[ImageRanges]:
    """Rows start..stop of ``batch`` images: several whole images a block, or one image in about equal ranges."""
    tokens = stop - start
    if not tokens:
        return
    # Products of whole tiles, and rows that parts_of_logits can share out.
    tile = min(rows, ROW_TILE)
    rows -= rows % tile
    length = -(-tokens // -(-tokens // rows))
    length += -length % tile
    ranges = [slice(n, min(n + length, stop)) for n in range(start, stop, length)]
    images = max(1, rows // tokens)
    for b in range(0, batch, images):
        yield slice(b, min(b + images, batch)), ranges


def all_blocks(tokens: Tensor, cu_seqlens: Sequence[int] | None = None) -> Iterator[ImageRanges]:
    """The blocks of a (B, N, d) tensor; with ``cu_seqlens`` those of each image packed in its one row."""
    batch, length, dim = tokens.shape
    rows = block_rows(dim, tokens.device)
    bounds = [0, length] if cu_seqlens is None else cu_seqlens
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield from image_blocks(batch, start, stop, rows)


def takes_plain_path(*tensors: Tensor | None) -> bool:
    """Whether plain operations are called for: by a tracer, torch.func, forward-mode AD, fake or meta tensors."""
    if torch.compiler.is_compiling() or is_transformed() or torch._C._get_dispatch_mode(FAKE) is not None:
        return True
    return any(t is not None and t.device.type == "meta" for t in tensors)


def takes_blocks(*tensors: Tensor | None) -> bool:
    """Whether a layer of these tensors is to run block by block: also where ``torch.compile`` traces it on a CPU, but
    not where an exported program is to be portable (and torch 2.6 does not tell which)."""
    if not torch.compiler.is_compiling():
        return not takes_plain_path(*tensors)
    on_cpu = all(t is None or t.device.type == "cpu" for t in tensors)
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return on_cpu and not exporting() and not is_transformed()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD want more than numbers of an operation."""
    # Within a dual_level any tensor may have a tangent, and asking each would take longer than a kernel.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """For a second derivative: the gradients of ``function(*tensors)``, None where not needed, as plain operations.

    To be called in a backward pass, with the saved inputs themselves and ``grad`` that of the output.
    """
    # With respect to views a derivative is partial, even where one of the tensors depends on another.
    tensors = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [t for t, need in zip(tensors, needed, strict=True) if t is not None and need]
    out = function(*tensors)
    if not wanted or not out.requires_grad:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]


Product = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Tokens (b, n, d), a router (d, choices), and maybe a factor of each token (b, n, 1)."""


def parts_of_logits(*products: Product) -> Tensor:
    """The sum of ``tokens @ router`` of a block, (b, n, d) and (d, choices) -> (parts, choices, b n / parts).

    The transpose of a batch of products over parts of the rows: for so few columns the BLAS of a CPU is several times
    faster that way round, and only the parts of a batch are shared among its threads.
    """
    total: Tensor | None = None
    for tokens, router, *factor in products:
        rows = tokens.flatten(0, 1)
        parts = next(parts for parts in range(16, 0, -1) if len(rows) % parts == 0)
        logits = torch.bmm(router.mT.expand(parts, -1, -1), rows.unflatten(0, (parts, -1)).mT)
        if factor:
            logits = logits * factor[0].view(parts, 1, -1)
        total = logits if total is None else total + logits
    assert total is not None
    return total


def router_logits(*products: Product) -> Tensor:
    """The sum of ``tokens @ router`` of a block, (b, n, d) and (d, choices) -> (b, n, choices)."""
    tokens, router = products[0][:2]
    return parts_of_logits(*products).mT.reshape(*tokens.shape[:2], router.shape[-1])


def router_choices(*products: Product) -> Tensor:
    """The argmax of :func:`router_logits`, (b, n)."""
    return choices_of_parts(parts_of_logits(*products), products[0][0])


def choices_of_each(tokens: Tensor, routers: Tensor, count: int) -> list[Tensor]:
    """The choices (b, n) of ``count`` routers side by side, (d, count choices), which read the tokens once."""
    return [choices_of_parts(parts, tokens) for parts in parts_of_logits((tokens, routers)).tensor_split(count, 1)]


def side_by_side(routers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Routers (d, choices) as one (d, count choices), laid out for :func:`parts_of_logits`."""
    return torch.cat([router.to(dtype) for router in routers], 1).mT.contiguous().mT


def choices_of_parts(logits: Tensor, tokens: Tensor) -> Tensor:
    # (On a CPU the indices of max are eight times faster than argmax, and ties are broken alike.)
    return logits.max(1).indices.view(tokens.shape[:2])
