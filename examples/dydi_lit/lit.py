"""LiT's attention (arXiv 2501.12976): ReLU linear attention with few heads, and a convolution of V.

    O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum ReLU(K)) + DWC(V)

DWC is a depth-wise 5x5 convolution on the grid of the tokens.
"""

from torch import Tensor, nn

from examples.dydi_lit.layers import ReLULinearAttention, in_order, on_grid, relu_attention


class ConvolvedLinearAttention(ReLULinearAttention):
    """(B, N, d) of a grid HW to (B, N, d)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = relu_attention(q, k, v, self.num_heads).to(x.dtype)
        return self.proj(out + in_order(self.depthwise(on_grid(v, HW))))
