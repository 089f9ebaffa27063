"""What ours is compared with, written as one would write it in plain PyTorch, and what of others is installed.

Attention takes q, k, v (B, N, d) in H heads of e = d/H channels and gives (B, N, d).  Linear attention is Eq. 4,

    O_i = phi(Q_i) (sum_j phi(K_j)^T V_j) / (phi(Q_i) . sum_j phi(K_j))

per head, in the order that is linear in N.
"""

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import Cost, Shape, linear_core, softmax_core

Attention = Callable[..., Tensor]

BACKENDS = {
    "softmax flash": SDPBackend.FLASH_ATTENTION,
    "softmax cudnn": SDPBackend.CUDNN_ATTENTION,
    "softmax efficient": SDPBackend.EFFICIENT_ATTENTION,
    "softmax math": SDPBackend.MATH,
}
"""Of scaled_dot_product_attention, by the names of rows; "softmax" leaves the choice to torch."""


def split(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, d) -> (B, H, N, e), a view."""
    return rearrange(tokens, "b n (h e) -> b h n e", h=heads)


def merge(tokens: Tensor) -> Tensor:
    """(B, H, N, e) -> (B, N, d)."""
    return rearrange(tokens, "b h n e -> b n (h e)")


def softmax(q: Tensor, k: Tensor, v: Tensor, *, heads: int, backend: str = "softmax") -> Tensor:
    """softmax(Q K^T / sqrt(e)) V by ``scaled_dot_product_attention``, with one of its backends or torch's choice."""
    q, k, v = (split(t, heads) for t in (q, k, v))
    with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
        return merge(F.scaled_dot_product_attention(q, k, v))


@cache
def why_not_softmax(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run on this device with this dtype and width of heads, in torch's words; None: it can."""
    tokens = torch.randn(1, 16, head_dim, device=device).to(dtype).requires_grad_()
    with warnings.catch_warnings(record=True) as said:  # torch warns of each reason, and raises an error without them
        warnings.simplefilter("always")
        try:
            softmax(tokens, tokens, tokens, heads=1, backend=backend).sum().backward()
        except RuntimeError as error:
            reasons = [str(warning.message) for warning in said] or [str(error)]
            return f"cannot run: {' '.join(reasons).splitlines()[0]}"
    return None


def plain_softmax(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """The formula of :func:`softmax`, operation by operation."""
    q, k, v = (split(t, heads) for t in (q, k, v))
    return merge((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)


def sana(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """Eq. 4 with phi = ReLU as Sana's released code computes it: in float32, the denominator as a column of ones in V.

    (arXiv 2410.10629; both NVlabs/Sana with its own configurations and diffusers widen q, k and v.)
    """
    dtype = q.dtype
    q, k, v = (split(t, heads).float() for t in (F.relu(q), F.relu(k), v))
    out = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
    return merge((out[..., :-1] / (out[..., -1:] + 1e-15)).to(dtype))


def focused(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """Eq. 4 with the focused kernel of FLatten (arXiv 2308.00442): r^3 / |r^3| |r| with r = ReLU(Z) + 1e-6, per token.

    Without its learned scale, and without its convolution, which is no part of the core.
    """

    def focus(tokens: Tensor) -> Tensor:
        r = F.relu(tokens) + 1e-6
        cube = r**3
        norm = torch.linalg.vector_norm
        return split(cube * (norm(r, dim=-1, keepdim=True) / norm(cube, dim=-1, keepdim=True)), heads)

    q, k, v = focus(q), focus(k), split(v, heads)
    mass = q @ k.mean(-2, keepdim=True).mT
    return merge(q @ (k.mT @ (v / v.shape[-2])) / (mass + 1e-6))


def plain_linear(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """The formula of :func:`sana`, term by term in the dtype of the tokens."""
    q, k, v = (split(t, heads) for t in (F.relu(q), F.relu(k), v))
    return merge(q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-15))


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """Softmax attention by the flash-attn package, which takes (B, N, H, e)."""
    q, k, v = (rearrange(t, "b n (h e) -> b n h e", h=heads) for t in (q, k, v))
    return rearrange(import_module("flash_attn").flash_attn_func(q, k, v, causal=False), "b n h e -> b n (h e)")


def flash_bla(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """Eq. 4 with phi = ReLU, the rest by flash-bidirectional-linear-attention, which takes dense (B, H, N, e)."""
    kernel = import_module("flash_bla.ops.linear_attn.fused").linear_attention
    q, k, v = (split(t, heads).contiguous() for t in (F.relu(q), F.relu(k), v))
    return merge(kernel(q, k, v))


class Rival(NamedTuple):
    """Whom ours is compared with."""

    attend: Any  # None if not comparable
    formula: Any  # what it is checked against, None if nothing
    cost: Callable[[Shape, str], Cost]
    module: str = ""  # of a package of others
    computes: str = ""  # what that computes


SOFTMAX = ("softmax", *BACKENDS)
ANY_WIDTH = ("sana", "focused", "sana compiled")
PACKAGES = ("flash-attn", "flash_bla", "flash-linear-attention")
RIVALS = {
    **{name: Rival(partial(softmax, backend=name), plain_softmax, softmax_core) for name in SOFTMAX},
    "sana": Rival(sana, plain_linear, linear_core),
    "focused": Rival(focused, None, linear_core),
    "sana compiled": Rival(sana, None, linear_core),
    "flash-attn": Rival(flash_attn, plain_softmax, softmax_core, "flash_attn", "softmax attention"),
    "flash_bla": Rival(flash_bla, plain_linear, linear_core, "flash_bla", "ReLU linear attention, Eq. 4"),
    "flash-linear-attention": Rival(None, None, linear_core, "fla", "causal linear attention"),
}
"""By the names of rows."""


def missing(name: str, shape: Shape, device: str) -> str | None:
    """Why a rival takes no part; None: it does."""
    rival = RIVALS[name]
    if name in BACKENDS:
        return why_not_softmax(name, device, shape.dtype, shape.dim // shape.heads)
    if not rival.module:
        return None
    if importlib.util.find_spec(rival.module) is None:
        return "missing: not installed"
    if rival.attend is None:
        return "missing: its linear attention is causal only: not the same function"
    return None if torch.device(device).type == "cuda" else "missing: it needs a GPU"


class Layer(nn.Module):
    """Projections around an attention that is given q, k, v and ``heads``: (B, N, d) -> (B, N, d)."""

    def __init__(self, attend: Attention, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attend, self.num_heads = attend, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.qkv(x).chunk(3, -1), heads=self.num_heads))
