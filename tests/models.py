"""Small models with attention to replace: a ViT built as timm's, and those of diffusers; and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dydila_kernels import DyDiLAttention

diffusers = pytest.importorskip("diffusers", reason="its models are those to convert: extra 'examples'")

D, H = 32, 4


class Attention(nn.Module):
    """Built as timm's, which DiT uses as well."""

    def __init__(self, dim: int = D, num_heads: int = H, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.fused_attn = num_heads, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, D, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Images of 8 x 8 pixels or any other size (it has no table of positions), one class token."""

    num_prefix_tokens = 1

    def __init__(self, *layers: nn.Module, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.patch_embed, self.cls_token = PatchEmbed(), nn.Parameter(torch.randn(1, 1, D))
        self.blocks = nn.ModuleList([Block(layer) for layer in layers or (Attention(), Attention())])
        self.head = nn.Linear(D, 10)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = checkpoint(block, x, attn_mask, use_reentrant=False) if self.checkpointing else block(x, attn_mask)
        return self.head(x.mean(1))


SHAPE = {"num_attention_heads": H, "attention_head_dim": D // H, "in_channels": 4, "num_layers": 2, "sample_size": 8}
CROSS = {"out_channels": 4, "cross_attention_dim": D, "caption_channels": 12}


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**SHAPE, num_embeds_ada_norm=10, norm_num_groups=1)


def pixart(**more: Any) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(**SHAPE, **CROSS, norm_num_groups=1, **more)


def sana(**more: Any) -> nn.Module:
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": D // 2}
    return diffusers.SanaTransformer2DModel(**SHAPE, **CROSS, **heads, patch_size=1, mlp_ratio=2.0, **more)


def unet(**more: Any) -> nn.Module:
    """Two resolutions, cross-attention at both, and no patches."""
    levels = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    sizes = {"block_out_channels": (D, 2 * D), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    return diffusers.UNet2DConditionModel(**levels, **sizes, cross_attention_dim=12, attention_head_dim=H, **more)


MODELS: list[Callable[..., nn.Module]] = [ViT, dit, pixart, sana]


def image(model: nn.Module, rows: int = 8, columns: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 1 if isinstance(model, ViT) else 4, rows, columns, generator=generator)


def call(model: nn.Module, x: Tensor, **more: Any) -> Tensor:
    """The model on images x; all that it is conditioned on is fixed."""
    if isinstance(model, ViT):
        return model(x, **more)
    time = torch.arange(len(x)) % 10
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return model(x, time, time, **more).sample
    text = torch.linspace(-1, 1, 60).view(1, 5, 12).expand(len(x), -1, -1).to(x.dtype)
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model(x, encoder_hidden_states=text, timestep=time, **more).sample


def output(model: nn.Module, rows: int = 8, columns: int = 8) -> Tensor:
    with torch.no_grad():
        return call(model, image(model, rows, columns))


def new_layers(model: nn.Module) -> list[DyDiLAttention]:
    return [m for m in model.modules() if isinstance(m, DyDiLAttention)]


def random_convolutions(model: nn.Module) -> None:
    """The convolutions start at zero, which hides the grid."""
    for attn in new_layers(model):
        assert attn.dwc is not None
        attn.dwc.reset_parameters()
