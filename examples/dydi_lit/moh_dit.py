"""MoH-DiT's attention (arXiv 2410.11842): softmax attention whose heads each token weighs, and some of which it omits.

    O_n = sum over heads h of g_nh H_nh W_h,   H the heads of softmax attention, W_h their rows of the last projection

The first S heads are shared by all tokens; of the other R each token takes the K whose router gives most:

    g_nh = 2 a_n1 S softmax(x_n R_s)_h                            for a shared head
    g_nh = 2 a_n2 K softmax over the K taken of (x_n R_r)_h       for a routed head that is taken, else 0
    [a_n1, a_n2] = softmax(x_n R_a)

The factors 2, S and K, as in the authors' code, make the mean of g over the heads in use 1, its value without routers.
So that no routed head is left unused, training adds 0.01 sum over the routed heads of f_h P_h to the loss: f_h is the
share of an image's tokens that take head h, P_h their mean of softmax(x_n R_r)_h over all R. It is least where both are
even.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from examples.dydi_lit.layers import SoftmaxAttention


class MixtureOfHeads(SoftmaxAttention):
    """(B, N, d) of a grid HW to (B, N, d).

    Heads that a token omits are computed and multiplied by zero: what is saved by leaving them out is not saved here.
    """

    def __init__(self, dim: int, num_heads: int, shared_heads: int, taken_heads: int) -> None:
        super().__init__(dim, num_heads)
        routed = num_heads - shared_heads
        if shared_heads < 1 or not 1 <= taken_heads <= routed:
            raise ValueError(
                f"of {num_heads} heads at least one must be shared, and of the others at least one and not more than "
                f"there are taken; got {shared_heads} and {taken_heads}"
            )
        self.shared_heads, self.taken_heads = shared_heads, taken_heads
        self.shared_router = nn.Linear(dim, shared_heads, bias=False)
        self.routed_router = nn.Linear(dim, routed, bias=False)
        self.kind_router = nn.Linear(dim, 2, bias=False)
        self._balance: Tensor | None = None

    def take_balance(self) -> Tensor:
        """sum of f_h P_h in the last pass of training, its mean over the images, a scalar; RuntimeError without one."""
        balance, self._balance = self._balance, None
        if balance is None:
            raise RuntimeError("there is no balance of heads: the layer has had no pass in training since the last one")
        return balance

    def gates(self, x: Tensor) -> Tensor:
        """g (B, N, heads) float32 of tokens (B, N, d)."""
        shared = self.shared_router(x).float().softmax(-1) * self.shared_heads
        logits = self.routed_router(x).float()
        taken = torch.zeros_like(logits).scatter(-1, logits.topk(self.taken_heads, dim=-1).indices, 1).bool()
        routed = logits.masked_fill(~taken, -torch.inf).softmax(-1) * self.taken_heads
        if self.training and torch.is_grad_enabled():
            self._balance = (taken.float().mean(1) * logits.softmax(-1).mean(1)).sum(-1).mean()
        kinds = 2 * self.kind_router(x).float().softmax(-1)
        return torch.cat([shared * kinds[..., :1], routed * kinds[..., 1:]], dim=-1)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.num_heads)
        heads = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n h e")
        return self.proj(rearrange(heads * self.gates(x).to(heads.dtype)[..., None], "b n h e -> b n (h e)"))
