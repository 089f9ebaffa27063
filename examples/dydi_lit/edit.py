"""EDiT's linear compressed attention (arXiv 2503.16726).

    Q = (X + ConvFusion(X)) W_q,   ConvFusion(X) = LeakyReLU(norm(conv_3x3(X))) W_f
    K = S_k(X W_k),   V = S_v(X W_v)
    O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum ReLU(K))

Queries gather what is around them by a convolution of two layers, d to d/2 to d channels. S_k and S_v are depth-wise
3x3 convolutions with stride 2, so that N queries meet N / 4 keys.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from examples.dydi_lit.layers import in_order, on_grid, relu_attention


class LinearCompressedAttention(nn.Module):
    """(B, N, d) of a grid HW to (B, N, d)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.gather = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.norm = nn.LayerNorm(dim // 2)
        self.widen = nn.Linear(dim // 2, dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.compress_k = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim)
        self.compress_v = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        around = self.widen(F.leaky_relu(self.norm(in_order(self.gather(on_grid(x, HW))))))
        q = self.query(x + around)
        k, v = self.key_value(x).chunk(2, dim=-1)
        k, v = in_order(self.compress_k(on_grid(k, HW))), in_order(self.compress_v(on_grid(v, HW)))
        return self.proj(relu_attention(q, k, v, self.num_heads).to(x.dtype))
