"""DyDiLAttention with the call signature of the layer it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.grid import ImageGrid, RowsColumns

NEVER_ATTENDED = -1000.0
"""A bias at or below which softmax gives exactly zero: exp(-1000) underflows in every dtype."""


class ReplacedAttention(DyDiLAttention):
    """A DyDiLAttention in the place of another layer, whose block does not tell it the grid.

    Made by :func:`dydila_kernels.replace_attention`, which sets where it has the ``grid`` from (None without
    convolution) and its ``place``, the name in the model.
    """

    grid: ImageGrid | None = None
    place = ""

    def _attend(self, x: Tensor, mask: Tensor | None, HW: RowsColumns | None) -> Tensor:
        if HW is None and self.grid is not None:
            tokens = x.shape[1] - self.num_prefix_tokens if self.has_all_tokens else None
            rows, columns = HW = self.grid.of(tokens)
            if tokens is not None and rows * columns != tokens:
                raise ValueError(
                    f"{self.place} has {tokens} tokens after {self.num_prefix_tokens} prefix tokens, which the grid of "
                    f"{rows} x {columns} = {rows * columns}, {self.grid.source}, does not hold: pass to "
                    "replace_attention num_prefix_tokens where class or register tokens come first, HW where the grid "
                    "is another, and dwc_branches=() or exclude where the tokens are no whole image"
                )
        return super().forward(x, mask, HW)


class VisionAttention(ReplacedAttention):
    """Stands where an attention of timm or DiT stood."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attn_bias: Tensor | None = None,
        HW: RowsColumns | None = None,
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d).  ``attn_mask`` or ``attn_bias`` (B, 1, 1, N) may hide keys.

        ``HW``, (rows, columns), is needed only where the layer is called by itself and not by the model.

        Raises:
            TypeError, ValueError: x is no such tensor, a mask does more than hide keys, ``is_causal`` is set, or the
                tokens do not make the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.tokens("x", x, self.dim)
        if is_causal:
            raise ValueError("is_causal must be False: DyDiLA is bidirectional; got True")
        if attn_mask is not None and attn_bias is not None:
            raise ValueError("attn_mask and attn_bias must not both be given")
        name, mask = ("attn_bias", attn_bias) if attn_mask is None else ("attn_mask", attn_mask)
        return self._attend(x, hidden_keys(name, mask, x, (4,)), HW)


class DiffusersAttention(ReplacedAttention):
    """Stands where an ``Attention`` of diffusers stood."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        HW: RowsColumns | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, N, d) -> (B, N, d).  ``attention_mask`` (B, N), (B, 1, N) or (B, 1, 1, N) may hide keys.

        ``HW``, (rows, columns), is needed only where the layer is called by itself and not by the model.

        Raises:
            TypeError, ValueError: hidden_states is no such tensor, the mask does more than hide keys, anything else is
                given, or the tokens do not make the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.tokens("hidden_states", hidden_states, self.dim)
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: DyDiLA is self-attention; got a tensor")
        for name, value in kwargs.items():
            if value is not None:
                raise TypeError(f"{name} must be None: DyDiLAttention, which replaced this layer, has no use for it")
        keep = hidden_keys("attention_mask", attention_mask, hidden_states, (2, 3, 4))
        return self._attend(hidden_states, keep, HW)


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
