"""Norms of queries and keys, as timm and diffusers have them: RMS or layer norm, of each head or of the whole token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ACROSS = ("head", "token")


def norm_of(kind: str, across: str, dim: int, num_heads: int, eps: float, **factory: Any) -> nn.Module:
    """A norm with affine weights (e,) of a head of e = d/H channels, or (d,) of a token; see :data:`NORMS`."""
    return NORMS[kind](dim // num_heads if across == "head" else dim, eps=eps, **factory)


def normed(norm: nn.Module, num_heads: int, tokens: Tensor) -> Tensor:
    """tokens (B, N, d) after the norm of each of ``num_heads`` parts of them, in the dtype that they have."""
    parts = tokens if num_heads == 1 else tokens.unflatten(-1, (num_heads, -1))
    out: Tensor = norm(parts)
    # Autocast, and a norm that is kept in float32, give another.
    return out.view_as(tokens).to(tokens.dtype)
