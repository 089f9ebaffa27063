"""The parts of a block beside DyDiLA: the attention layers of DiT and Sana, and their feed-forward layers.

All map tokens (B, N, d) of a grid HW = (rows, columns), in row-major order, to (B, N, d).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention as in DiT (Eq. 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class ReLULinearAttention(nn.Module):
    """Sana's linear attention: Eq. 4 with ReLU for phi, so that O = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(relu_attention(q, k, v, self.num_heads).to(x.dtype))


def relu_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Eq. 4 with ReLU for phi, for each head: q (B, N, d), k and v (B, M, d) give (B, N, d) float32.

    The cheaper order of the products is taken.  Products and sums are in float32, as in Sana, under autocast too.
    """
    q, k, v = (rearrange(t.float(), "b n (h e) -> b h n e", h=num_heads) for t in (q, k, v))
    q, k = F.relu(q), F.relu(k)
    queries, keys, width = q.shape[-2], k.shape[-2], q.shape[-1]
    with without_autocast(q.device):
        numerator = q @ (k.mT @ v) if width * (queries + keys) <= 2 * queries * keys else (q @ k.mT) @ v
    mass = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    out = numerator / mass.clamp_min(torch.finfo(mass.dtype).tiny)  # no mass: the numerator is zero, too
    return rearrange(out, "b h n e -> b n (h e)")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products within are taken in the dtypes of their tensors; also on devices that know no autocast, such as meta."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def on_grid(x: Tensor, HW: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) as an image (B, C, rows, columns): a view, channels last."""
    return rearrange(x, "b (rows columns) c -> b c rows columns", rows=HW[0])


def in_order(image: Tensor) -> Tensor:
    """The inverse of `on_grid`."""
    return rearrange(image, "b c rows columns -> b (rows columns) c")


class Mlp(nn.Module):
    """DiT's feed-forward: y = GELU(x W_1) W_2, with the tanh form of GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.reduce = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        return self.reduce(F.gelu(self.expand(x), approximate="tanh"))


class GLUMBConv(nn.Module):
    """Sana's feed-forward: widen, mix neighbours with a depth-wise 3x3 convolution, gate, and narrow again.

    With [a, b] = DW3x3(SiLU(x W_1)), y = (a * SiLU(b)) W_2; a and b are `hidden` channels wide each.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.reduce = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        wide = F.silu(self.expand(x))
        value, gate = in_order(self.depthwise(on_grid(wide, HW))).chunk(2, dim=-1)
        return self.reduce(value * F.silu(gate))
