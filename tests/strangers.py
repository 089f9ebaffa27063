"""Stand-ins for models of timm and others that are no plain ViT: the same names, shapes and signatures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Attention, Block, D, H, PatchEmbed, ViT


class BlockedAttention(Attention):
    """As Nest's: tokens (B, T, N, d) of T blocks of an image."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        B, T, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, N, 3, self.num_heads, C // self.num_heads).permute(3, 0, 4, 1, 2, 5)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.permute(0, 2, 3, 4, 1).reshape(B, T, N, C))


class MapAttention(Attention):
    """As VOLO's: tokens (B, rows, columns, d)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        B, rows, columns, C = x.size()
        q, k, v = self.qkv(x).reshape(B, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, rows, columns, C))


class ChannelAttention(Attention):
    """As DaViT's: the channels of a group attend to one another."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).reshape(B, N, C))


class GPSA(nn.Module):
    """As ConViT's: by its name no attention, and without qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = H, (D // H) ** -0.5
        self.qk, self.v = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D, bias=False)
        self.proj, self.pos_proj = nn.Linear(D, D), nn.Linear(3, H)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.gating_param = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Named as nothing, and its projections neither; only its code tells that it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(F.scaled_dot_product_attention(*self.inward(x).chunk(3, -1)))


class Around(nn.Module):
    """A block without masks, for attention that takes none; the attention may stand under another name."""

    def __init__(self, layer: nn.Module, name: str = "attn") -> None:
        super().__init__()
        self.norm1, self.name = nn.LayerNorm(D), name
        self.add_module(name, layer)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return x + getattr(self, self.name)(self.norm1(x))


class ViTOf(ViT):
    """A ViT whose blocks are given."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Nest(nn.Module):
    """The patches of an image in four blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = PatchEmbed(), nn.Parameter(torch.zeros(1, 4, 4, D))
        self.levels = nn.Sequential(Around(BlockedAttention()), Around(BlockedAttention()))

    def forward(self, x: Tensor) -> Tensor:
        return self.levels(self.patch_embed(x).unflatten(1, (4, -1)) + self.pos_embed)


class Volo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.network = nn.ModuleList([Around(MapAttention())])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).permute(0, 2, 3, 1)
        return self.network[0](x)


class UViT(ViT):
    """A token of the time before the patches, which no attribute tells of by a name that is known."""

    num_prefix_tokens = None  # type: ignore[assignment]
    extras = 1


class CrossViT(nn.Module):
    """Two branches with patches of other sizes and channels, and a class token each."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleList([nn.Conv2d(1, D, 2, 2), nn.Conv2d(1, 2 * D, 4, 4)])
        self.blocks = nn.ModuleList([Attention(D), Attention(2 * D)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = [patches(x).flatten(2).mT for patches in self.patch_embed]
        return tuple(b(torch.cat([t[:, :1], t], 1)) for b, t in zip(self.blocks, tokens, strict=True))


class Stage(nn.Module):
    """As PiT's: called with a map and a class token, which pooling shrinks first."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv2d(D, D, 3, 2, 1, groups=D)
        self.blocks = nn.Sequential(Block(Attention()))

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, cls_tokens = x
        x = self.pool(x)
        B, C, rows, columns = x.shape
        x = self.blocks(torch.cat([cls_tokens, x.flatten(2).transpose(1, 2)], 1))
        return x[:, 1:].mT.reshape(B, C, rows, columns), x[:, :1]


class PiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, D, 4, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.transformers = nn.Sequential(Stage(), Stage())

    def forward(self, x: Tensor) -> Tensor:
        return self.transformers((self.patch_embed(x), self.cls_token.expand(len(x), -1, -1)))[0]


class NaFlexViT(nn.Module):
    """Takes patches (B, N, pixels) that are cut already, of images of any shape."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.embeds, self.blocks = nn.Linear(4, D), nn.Sequential(Block(Attention()))

    def forward(self, patches: Tensor, patch_coord: Tensor | None = None) -> Tensor:
        return self.blocks(self.embeds(patches))


class PatchDropViT(ViT):
    """Drops patches in training."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_drop = nn.Dropout(0.5)  # stands for PatchDropout

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch_embed(x)
        if self.training:
            x = x[:, ::2]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class MapBlock(nn.Module):
    """Attention within a convolutional network: a map goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.GroupNorm(4, D), Attention()

    def forward(self, x: Tensor) -> Tensor:
        B, C, rows, columns = x.shape
        tokens = self.attn(self.norm(x).flatten(2).transpose(1, 2))
        return x + tokens.transpose(1, 2).reshape(B, C, rows, columns)


class ConvNet(nn.Module):
    """Two resolutions, with attention at each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(1, D, 3, padding=1), nn.Conv2d(D, D, 3, 2, 1)
        self.first, self.second = MapBlock(), MapBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.down(self.first(self.conv_in(x))))
