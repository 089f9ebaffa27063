"""Stand-ins for networks of their authors' own repositories, and timm's: their parts, names and calls, in our words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Attention, Block, D, H, ViT


def split(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class ScaledRMSNorm(nn.Module):
    """As NVlabs' own: no subclass of torch's, and in float32."""

    def __init__(self, dim: int, scale_factor: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim) * scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return (self.weight * wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).type_as(x)


class TimmAttention(Attention):
    """Timm's with ``qk_norm=True``, and with its own subclass of a norm."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(D // H, eps=1e-6), norm(D // H, eps=1e-6)
        self.gate = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = (split(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class LiteLA(Attention):
    """NVlabs' linear attention: ReLU, a denominator with an epsilon, norms of whole tokens in Sana 1.5."""

    def __init__(self, qk_norm: bool, eps: float = 1e-8) -> None:
        super().__init__()
        self.heads, self.dim, self.eps, self.kernel_func = H, D // H, eps, nn.ReLU(inplace=False)
        if qk_norm:
            self.q_norm, self.k_norm = ScaledRMSNorm(D), ScaledRMSNorm(D)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Any = None,
        HW: Any = None,
        image_rotary_emb: Any = None,
        block_id: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.kernel_func(split(self.q_norm(q), H)), self.kernel_func(split(self.k_norm(k), H))
        out = q @ (k.mT @ split(v, H)) / (q @ k.sum(-2, keepdim=True).mT + self.eps)
        return self.proj(out.transpose(1, 2).flatten(2))


class PixArtAttention(Attention):
    """As PixArt-Sigma's: keys may be compressed, and then there is a convolution for it."""

    def __init__(self, sr_ratio: int = 1, qk_norm: bool = False) -> None:
        super().__init__()
        self.sampling, self.sr_ratio = "conv", sr_ratio
        if sr_ratio > 1:
            self.sr, self.norm = nn.Conv2d(D, D, sr_ratio, sr_ratio, groups=D), nn.LayerNorm(D)
        if qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor, mask: Any = None, HW: Any = None, block_id: Any = None) -> Tensor:  # type: ignore
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.sr_ratio > 1:
            k, v = (self.norm(self.sr(t.mT.unflatten(-1, HW)).flatten(2).mT) for t in (k, v))
        out = F.scaled_dot_product_attention(*(split(t, H) for t in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class WindowAttention(Attention):
    """As PixArt-alpha's, which has windows by its name alone."""

    def __init__(self, use_rel_pos: bool = False) -> None:
        super().__init__()
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(7, D // H)) for _ in "hw")

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class MultiHeadCrossAttention(nn.Module):
    """To text, as Sana and PixArt have it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.q_linear, self.kv_linear, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, cond: Tensor, mask: Any = None) -> Tensor:
        q, (k, v) = self.q_linear(x), self.kv_linear(cond).chunk(2, -1)
        out = F.scaled_dot_product_attention(*(split(t, H) for t in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class SanaBlock(nn.Module):
    """Tells its attention the grid, as NVlabs' does."""

    def __init__(self, attn: nn.Module, window_size: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.cross_attn, self.window_size = attn, MultiHeadCrossAttention(), window_size
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, y: Tensor, mask: Any = None, HW: Any = None, **kwargs: Any) -> Tensor:
        told = {} if isinstance(self.attn, WindowAttention) else {"HW": HW}
        x = x + self.attn(self.norm1(x), **told)
        x = x + self.cross_attn(x, y, mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbedMS(nn.Module):
    def __init__(self, kernel_size: int = 2) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, D, kernel_size, 2, (kernel_size - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class NativeSana(nn.Module):
    """Latents (B, 4, rows, columns) with patches of 2 x 2; its call passes over torch's, and with that over hooks."""

    def __init__(self, *layers: nn.Module, kernel_size: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.y_embedding = PatchEmbedMS(kernel_size), nn.Parameter(torch.randn(1, 5, D))
        self.blocks = nn.ModuleList([SanaBlock(layer) for layer in layers])
        self.final_layer = nn.Linear(D, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.h, self.w = x.shape[-2] // 2, x.shape[-1] // 2
        tokens = self.x_embedder(x)
        for block in self.blocks:
            tokens = block(tokens, self.y_embedding.expand(len(x), -1, -1), None, (self.h, self.w))
        patches = self.final_layer(tokens).view(len(x), self.h, self.w, 4, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


class Rope(nn.Module):
    """Tables for a grid of 4 x 4, of neighbours or of halves."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        angles = torch.stack([rows.flatten(), columns.flatten(), rows.flatten() / 4, columns.flatten() / 4], -1)
        angles = torch.cat([angles, angles], -1) if halves else angles.repeat_interleave(2, -1)
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        x, y = t.unflatten(-1, (-1, 2)).unbind(-1)
        return t * self.freqs_cos + torch.stack([-y, x], -1).flatten(-2) * self.freqs_sin


class TurningAttention(Attention):
    """As LightningDiT's: norms of heads, and a module that rotates."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = ScaledRMSNorm(D // H), ScaledRMSNorm(D // H)

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:  # type: ignore[override]
        q, k, v = (split(t, H) for t in self.qkv(x).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TurningBlock(Block):
    def forward(self, x: Tensor, feat_rope: nn.Module | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.attn(self.norm1(x), rope=feat_rope)
        return x + self.mlp(self.norm2(x))


class LightningDiT(ViT):
    """Of 16 patches, without a class token."""

    num_prefix_tokens = 0

    def __init__(self, rope: nn.Module | None = None) -> None:
        super().__init__()
        self.feat_rope = rope or Rope()
        self.blocks = nn.ModuleList([TurningBlock(TurningAttention()), TurningBlock(TurningAttention())])

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, self.feat_rope)
        return self.head(x.mean(1))
