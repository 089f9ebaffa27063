"""The layers that ours is compared with, written as one would write them in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention as in DiT: (B, N, d) -> (B, N, d), quadratic in N."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))


def softmax_macs(tokens: int, dim: int) -> int:
    """Multiply-accumulates of a forward pass of :class:`SoftmaxAttention` over one image."""
    return 4 * tokens * dim**2 + 2 * tokens**2 * dim
