"""DyDiLAttention with the call signature of the layer it replaces, and the grid that this signature does not carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention

RowsColumns = tuple[int, int]

NEVER_ATTENDED = -1000.0
"""A bias at or below which softmax gives exactly zero: exp(-1000) underflows in every dtype."""


class ImageGrid:
    """(rows, columns) of the image under way: noted by a hook where the model makes its tokens, read by the layers.

    Activation checkpointing calls a layer again in the backward pass, when another image may have been noted since.
    The grids of the calls that a backward pass may still go back to are therefore remembered.
    """

    def __init__(self, fixed: RowsColumns | None = None, of_call: Callable[..., RowsColumns] | None = None) -> None:
        self.latest, self.of_call = fixed, of_call
        self.open: set[RowsColumns] = set()
        self.recomputed = False

    def after_patches(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the convolution that makes the patches, output (B, d, rows, columns)."""
        rows, columns = output.shape[-2:]
        self.note((rows, columns))

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model."""
        assert self.of_call is not None
        rows, columns = self.of_call(*args, **kwargs)
        self.note((rows, columns))

    def note(self, grid: RowsColumns) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self.recomputed or in_backward():
                self.open, self.recomputed = set(), False
            self.open.add(grid)
        self.latest = grid

    def current(self, tokens: int) -> RowsColumns | None:
        """The grid of a layer that is called with so many grid tokens; None for a square."""
        if torch.compiler.is_compiling() or not in_backward():
            return self.latest
        self.recomputed = True
        fitting = sorted(grid for grid in self.open if grid[0] * grid[1] == tokens)
        if len(fitting) > 1:
            raise RuntimeError(
                f"the backward pass recomputes a layer of {tokens} tokens (activation checkpointing), and the calls "
                f"before it had the grids {fitting}: call backward after each, and evaluate under torch.no_grad()"
            )
        return fitting[0] if fitting else self.latest


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as torch.utils.checkpoint asks."""
    return torch._C._current_graph_task_id() != -1


class ReplacedAttention(DyDiLAttention):
    """A DyDiLAttention in the place of another layer, whose block does not tell it the ``grid``.

    Made by :func:`dydila_kernels.replace_attention`, which sets the grid that the layers of a model share.
    """

    grid: ImageGrid

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        HW = None if self.dwc is None else self.grid.current(x.shape[1] - self.num_prefix_tokens)
        return super().forward(x, mask, HW)


class VisionAttention(ReplacedAttention):
    """Stands where an attention of timm or DiT stood."""

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, attn_bias: Tensor | None = None
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d).  ``attn_mask`` or ``attn_bias`` (B, 1, 1, N) may hide keys.

        Raises:
            TypeError, ValueError: x is no such tensor, a mask does more than hide keys, or ``is_causal`` is set.
        """
        checks.tokens("x", x, self.dim)
        if is_causal:
            raise ValueError("is_causal must be False: DyDiLA is bidirectional; got True")
        if attn_mask is not None and attn_bias is not None:
            raise ValueError("attn_mask and attn_bias must not both be given")
        name, mask = ("attn_bias", attn_bias) if attn_mask is None else ("attn_mask", attn_mask)
        return self._attend(x, hidden_keys(name, mask, x, (4,)))


class DiffusersAttention(ReplacedAttention):
    """Stands where an ``Attention`` of diffusers stood."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, N, d) -> (B, N, d).  ``attention_mask`` (B, N), (B, 1, N) or (B, 1, 1, N) may hide keys.

        Raises:
            TypeError, ValueError: hidden_states is no such tensor, the mask does more than hide keys, or anything else
                is given.
        """
        checks.tokens("hidden_states", hidden_states, self.dim)
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: DyDiLA is self-attention; got a tensor")
        for name, value in kwargs.items():
            if value is not None:
                raise TypeError(f"{name} must be None: DyDiLAttention, which replaced this layer, has no use for it")
        return self._attend(hidden_states, hidden_keys("attention_mask", attention_mask, hidden_states, (2, 3, 4)))


def hidden_keys(name: str, mask: Tensor | None, x: Tensor, dims: Sequence[int]) -> Tensor | None:
    """A mask as ``scaled_dot_product_attention`` takes it, (B, 1, ..., N), as bool (B, N), True for a token.

    Whether a bias hides keys and does no more shows only in its values; to look at them waits for the device.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(mask).__name__}")
    batch, length = x.shape[:2]
    shapes = [(batch, *[1] * (n - 2), length) for n in dims]
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name} must hide keys, in the shape {' or '.join(map(str, shapes))}: DyDiLA has no matrix of scores to "
            f"mask; got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return mask.reshape(batch, length)
    checks.floating(name, mask)
    hidden = mask <= NEVER_ATTENDED
    if not bool(((mask == 0) | hidden).all()):
        raise ValueError(f"{name} must be 0, or to hide a key {NEVER_ATTENDED:g} or less; it holds other values")
    return ~hidden.reshape(batch, length)
