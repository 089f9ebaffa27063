"""DiG's layers (arXiv 2405.18428): gated linear attention (arXiv 2312.06635) along one of four scans, and SREM.

    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(e),   alpha_t = sigmoid(x_t A B + b)^(1/16)
    O = (RMSNorm(o) * SiLU(X W_g)) W_o

S is a matrix e x e of each head, and alpha its decay in each channel of the key, of rank 16 in x. Tokens are taken row
by row, backwards, column by column, backwards, and so on from block to block; with a depth-wise 3x3 convolution after
each block, which starts as the identity, this is the paper's spatial reorient and enhancement module. The feed-forward
is SwiGLU: y = (SiLU(x W_1) * x W_2) W_3.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from examples.dydi_lit.layers import in_order, on_grid, without_autocast

try:  # flash-linear-attention: `pip install fla-core`, which needs a GPU
    from fla.ops.gla import chunk_gla
except ImportError:
    chunk_gla = None

_CHUNK = 16
_RANK = 16
_ROOT = 16  # of the sigmoid, so that a state lasts


class GatedLinearAttention(nn.Module):
    """(B, N, d) of a grid HW to (B, N, d); `scan` is the number of the block. All of the recurrence is in float32."""

    def __init__(self, dim: int, num_heads: int, scan: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.num_heads, self.scan = num_heads, scan
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, _RANK, bias=False), nn.Linear(_RANK, dim))
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.recurrence = Recurrence()
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        order = scan_order(HW, self.scan, x.device)
        x = x[:, order]
        q, k, v = rearrange(self.qkv(x).float(), "b n (three h e) -> three b n h e", three=3, h=self.num_heads)
        log_alpha = rearrange(F.logsigmoid(self.decay(x).float()) / _ROOT, "b n (h e) -> b n h e", h=self.num_heads)
        o = self.norm(self.recurrence(q, k, v, log_alpha)).to(x.dtype)
        out = self.proj(rearrange(o, "b n h e -> b n (h e)") * F.silu(self.gate(x)))
        return out[:, order.argsort()]


class Recurrence(nn.Module):
    """o_t = q_t S_t / sqrt(e) for all t: q, k, v and log alpha (B, N, h, e) float32 to (B, N, h, e) float32."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
        with without_autocast(q.device):
            if chunk_gla is not None and q.is_cuda:
                return chunk_gla(q, k, v, log_alpha)[0]
            return chunked(q, k, v, log_alpha)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> Tensor:
    """The recurrence in chunks of 16 tokens: one state goes from chunk to chunk, within one all pairs are taken.

    With b_t the sum of log alpha from the chunk's start to t, and S_0 the state before it,
    o_t = (q_t exp(b_t)) S_0 + sum over s <= t of (sum_c q_tc k_sc exp(b_tc - b_sc)) v_s. No exponent is above zero, so
    that nothing overflows, however fast the decay.
    """
    length = q.shape[1]
    q, k, v, log_alpha = (
        rearrange(F.pad(t, (0, 0, 0, 0, 0, -length % _CHUNK)), "b (n c) h e -> b n h c e", c=_CHUNK)
        for t in (q / q.shape[-1] ** 0.5, k, v, log_alpha)
    )
    sums = log_alpha.cumsum(-2)
    later = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)[..., None]  # s > t
    decays = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(later, -torch.inf).exp()  # of t, s and channel
    within = torch.einsum("bnhte,bnhse,bnhtse->bnhts", q, k, decays) @ v

    total = sums[..., -1:, :]
    gained = (k * (total - sums).exp()).mT @ v  # by each chunk, as it is at the chunk's end
    state, before = torch.zeros_like(gained[:, 0]), []
    for chunk in range(gained.shape[1]):
        before.append(state)
        state = total[:, chunk].mT.exp() * state + gained[:, chunk]
    out = within + (q * sums.exp()) @ torch.stack(before, 1)
    return rearrange(out, "b n h c e -> b (n c) h e")[:, :length]


def scan_order(HW: tuple[int, int], scan: int, device: torch.device) -> Tensor:
    """(N,) int64: which token, in row-major order, comes when; scans 2 and 3 go by columns, 1 and 3 backwards."""
    places = torch.arange(HW[0] * HW[1], device=device).view(HW)
    order = (places.mT if scan % 4 >= 2 else places).flatten()
    return order.flip(0) if scan % 2 else order


class IdentityConvolution(nn.Conv2d):
    """A depth-wise 3x3 convolution on the grid HW of tokens (B, N, d), which starts as the identity.

    All that the blocks add up goes through it, which is why autocast does not apply.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight, groups=self.groups)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:  # type: ignore[override]
        with without_autocast(x.device):
            return in_order(super().forward(on_grid(x, HW)))


class SwiGLU(nn.Module):
    """(B, N, d) to (B, N, d), `hidden` channels wide in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * hidden, bias=False)
        self.reduce = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.reduce(F.silu(gate) * value)
