"""PixArt-Sigma's attention (arXiv 2403.04692): softmax attention whose keys and values are compressed.

    O = softmax(Q f(K)^T / sqrt(e)) f(V)

f is a depth-wise convolution of R x R tokens with stride R, which starts as their mean, and a layer norm: one for K and
V, so that N queries meet N / R^2 keys.  The deeper blocks have it, the others are DiT's.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from examples.dydi_lit.layers import in_order, on_grid


class CompressedAttention(nn.Module):
    """Multi-head softmax attention on compressed keys and values: (B, N, d) of a grid HW to (B, N, d).

    A grid whose sides are no multiples of R is filled up with copies of its last row and column.
    """

    def __init__(self, dim: int, num_heads: int, compression: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.compress = MeanConvolution(dim, compression)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = (self.norm(in_order(self.compress(on_grid(t, HW)))) for t in (k, v))
        q, k, v = (rearrange(t, "b n (h e) -> b h n e", h=self.num_heads) for t in (q, k, v))
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class MeanConvolution(nn.Conv2d):
    """Depth-wise convolution of R x R pixels with stride R, which starts as their mean: (B, C, h, w)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, channels, size, stride=size, groups=channels)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 / self.weight[0].numel())
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        size = self.kernel_size[0]
        missing = [-side % size for side in image.shape[-2:]]
        if any(missing):
            image = F.pad(image, (0, missing[1], 0, missing[0]), mode="replicate")
        return super().forward(image)
