"""Norms of queries and keys, as timm and diffusers have them: RMS or layer norm, of each head or of the whole token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dydila_kernels import checks

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ACROSS = ("head", "token")


def check_norm(kind: str | None, across: str, eps: float) -> None:
    """The arguments ``qk_norm``, ``qk_norm_across`` and ``qk_norm_eps`` of the layer."""
    checks.choice("qk_norm", kind, (None, *NORMS))
    checks.choice("qk_norm_across", across, ACROSS)
    checks.number("qk_norm_eps", eps, above=0)


def norm_of(kind: str, across: str, dim: int, num_heads: int, eps: float, **factory: Any) -> nn.Module:
    """A norm with affine weights (e,) of a head of e = d/H channels, or (d,) of a token; see :data:`NORMS`."""
    return NORMS[kind](dim // num_heads if across == "head" else dim, eps=eps, **factory)


def normed(norm: nn.Module, num_heads: int, tokens: Tensor) -> Tensor:
    """tokens (B, N, d) after the norm of each of ``num_heads`` parts of them, in the dtype that they have."""
    parts = tokens if num_heads == 1 else tokens.unflatten(-1, (num_heads, -1))
    out: Tensor = norm(parts)
    # Autocast, and a norm that is kept in float32, give another.
    return out.view_as(tokens).to(tokens.dtype)
