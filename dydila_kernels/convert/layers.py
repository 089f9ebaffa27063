"""DyDiLAttention with the call signature of the layer it replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels import checks
from dydila_kernels.attention import DyDiLAttention
from dydila_kernels.convert.grid import ImageGrid, Sides, fits

NEVER_ATTENDED = -1000.0
"""A bias at or below which softmax gives exactly zero: exp(-1000) underflows in every dtype."""

ROPE_TABLES = ("freqs_cos", "freqs_sin")
"""The tables (N, d/H) of LightningDiT's rotary embeddings."""


class ReplacedAttention(DyDiLAttention):
    """A DyDiLAttention in the place of another layer, whose block need not tell it the grid.

    Made by :func:`dydila_kernels.replace_attention`, which sets where it has the ``grid`` from (None without
    convolution) and its ``place``, the name in the model.
    """

    grid: ImageGrid | None = None
    place = ""

    def _attend(self, x: Tensor, mask: Tensor | None, HW: Sides | None, rotary: Any = None) -> Tensor:
        if HW is None and self.grid is not None:
            tokens = x.shape[1] - self.num_prefix_tokens if self.has_all_tokens else None
            HW = self.grid.of(tokens)
            if tokens is not None and not fits(HW, tokens):
                raise ValueError(
                    f"{self.place} has {tokens} tokens after {self.num_prefix_tokens} prefix tokens, which the grid of "
                    f"{' x '.join(map(str, HW))} = {math.prod(HW)}, {self.grid.source}, does not hold: pass to "
                    "replace_attention num_prefix_tokens where class or register tokens come first, HW where the grid "
                    "is another, and dwc_branches=() or exclude where the tokens are no whole image"
                )
            if tokens is not None and math.prod(HW) != tokens:  # a layer within the frames of a video
                HW = HW[1:]
        return super().forward(x, mask, HW, rotary=rotary)


class VisionAttention(ReplacedAttention):
    """Stands where an attention of timm or DiT stood."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        attn_bias: Tensor | None = None,
        HW: Sides | None = None,
        **others: None,
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d).  ``attn_mask`` or ``attn_bias`` (B, 1, 1, N) may hide keys.

        ``HW``, (rows, columns) or (frames, rows, columns), is needed only where the layer is called by itself and not
        by the model.

        Raises:
            TypeError, ValueError: x is no such tensor, a mask does more than hide keys, ``is_causal`` is set, anything
                else is given, or the tokens do not make the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.tokens("x", x, self.dim)
        checks.unused(others, is_causal)
        if attn_mask is not None and attn_bias is not None:
            raise ValueError("attn_mask and attn_bias must not both be given")
        name, mask = ("attn_bias", attn_bias) if attn_mask is None else ("attn_mask", attn_mask)
        return self._attend(x, hidden_keys(name, mask, x, (4,)), HW)


class SanaAttention(ReplacedAttention):
    """Stands where an attention of NVlabs' Sana (``LiteLA``) or of PixArt's own code stood."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor | None = None,
        HW: Sides | None = None,
        *,
        block_id: int | None = None,
        **others: None,
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d).  ``mask`` (B, N) bool is True for a token that counts.

        ``HW``, (rows, columns), is what the block passes, or else found as in the other layers.  ``block_id`` says
        which block calls, which no layer that was swapped asks.

        Raises:
            TypeError, ValueError: x or ``mask`` is no such tensor, anything else is given, or the tokens do not make
                the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.unused(others, False)
        return self._attend(x, mask, HW)


class LightningAttention(ReplacedAttention):
    """Stands where an attention of LightningDiT stood: ``rope`` is a module with tables."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: nn.Module | None = None, *, HW: Sides | None = None, **others: None
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d).  ``rope`` has ``freqs_cos`` and ``freqs_sin`` (N, d/H), neighbours being pairs.

        They rotate queries and keys after these have been measured and subtracted.

        Raises:
            TypeError, ValueError: x or the tables are no such tensors, anything else is given, or the tokens do not
                make the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.unused(others, False)
        if rope is None:
            return self._attend(x, None, HW)
        if not all(hasattr(rope, name) for name in ROPE_TABLES):
            raise TypeError(f"rope must be None or have {' and '.join(ROPE_TABLES)}; got {type(rope).__name__}")
        return self._attend(x, None, HW, tuple(getattr(rope, name) for name in ROPE_TABLES))


class DiffusersAttention(ReplacedAttention):
    """Stands where an ``Attention`` or ``WanAttention`` of diffusers stood."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        *,
        HW: Sides | None = None,
        **others: None,
    ) -> Tensor:
        """hidden_states (B, N, d) -> (B, N, d).  ``attention_mask`` (B, N), (B, 1, N) or (B, 1, 1, N) may hide keys.

        ``rotary_emb`` is (cos, sin), (1 or B, N, 1, d/H) each, neighbours being pairs: they rotate queries and keys
        after these have been measured and subtracted.  ``HW``, (rows, columns) or (frames, rows, columns), is needed
        only where the layer is called by itself and not by the model.

        Raises:
            TypeError, ValueError: hidden_states or the tables are no such tensors, the mask does more than hide keys,
                anything else is given, or the tokens do not make the grid.
            RuntimeError: the grid is not known, for no call of the model is under way.
        """
        checks.tokens("hidden_states", hidden_states, self.dim)
        checks.unused({"encoder_hidden_states": encoder_hidden_states, **others}, False)
        keep = hidden_keys("attention_mask", attention_mask, hidden_states, (2, 3, 4))
        return self._attend(hidden_states, keep, HW, without_heads(rotary_emb))


def without_heads(rotary_emb: Any) -> Any:
    """The tables of diffusers (B, N, 1, d/H), which have one for all heads, as (B, N, d/H)."""
    if not isinstance(rotary_emb, Sequence):
        return rotary_emb
    return tuple(t.squeeze(2) if isinstance(t, Tensor) and t.dim() == 4 else t for t in rotary_emb)


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
