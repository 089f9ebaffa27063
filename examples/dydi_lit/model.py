"""The DyDi-LiT network: DiT's adaLN-Zero blocks with DyDiLA as attention and GLUMBConv as feed-forward."""

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention


@dataclass(frozen=True)
class DyDiLiTConfig:
    """What fixes the network; the image size does not, because the network follows the grid it is given.

    `num_projectors`, `num_kernel_factors` and `num_differential_factors` are n_P, n_F and n_D of the paper.
    """

    dim: int
    depth: int
    num_projectors: int
    num_kernel_factors: int
    num_differential_factors: int
    num_heads: int = 1
    ffn_ratio: float = 4.0
    patch_size: int = 2
    in_channels: int = 4
    num_classes: int = 1000


SIZES = {
    "tiny": DyDiLiTConfig(128, 4, 3, 9, 9, ffn_ratio=2.0),
    "S": DyDiLiTConfig(384, 9, 3, 9, 9),
    "B": DyDiLiTConfig(512, 9, 5, 15, 15),
    "L": DyDiLiTConfig(768, 9, 7, 21, 21),
}


def config_of_size(size: str) -> DyDiLiTConfig:
    """The configuration called `size`; ValueError where there is none."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    return SIZES[size]


def position_embedding(HW: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of each token's row (first half of the channels) and column; (N, dim) float32, row-major."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in HW), indexing="ij")
    return torch.cat([get_timestep_embedding(place.flatten(), dim // 2) for place in (rows, columns)], dim=1)


class GLUMBConv(nn.Module):
    """Sana's feed-forward: widen, mix neighbours with a depth-wise 3x3 convolution, gate, and narrow again.

    With [a, b] = DW3x3(SiLU(x W_1)), y = (a * SiLU(b)) W_2. x and y are (B, N, dim), tokens of the grid HW in
    row-major order; a and b are `hidden` channels wide each.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.reduce = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, HW: tuple[int, int]) -> Tensor:
        wide = nn.functional.silu(self.expand(x))
        image = rearrange(wide, "b (rows columns) c -> b c rows columns", rows=HW[0])  # a view: channels last
        value, gate = rearrange(self.depthwise(image), "b c rows columns -> b (rows columns) c").chunk(2, dim=-1)
        return self.reduce(value * nn.functional.silu(gate))


class Block(nn.Module):
    """One adaLN-Zero block: x += gate * attention(modulate(x)), then the same with the feed-forward.

    Shift, scale and gate of both halves are linear in the condition (B, dim). They start at zero, so that a fresh
    block is the identity.
    """

    def __init__(self, config: DyDiLiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = DyDiLAttention(
            dim,
            config.num_heads,
            num_projectors=config.num_projectors,
            num_kernel_factors=config.num_kernel_factors,
            num_differential_factors=config.num_differential_factors,
        )
        self.norm_ffn = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = GLUMBConv(dim, int(config.ffn_ratio * dim))
        self.modulation = zero_linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, HW: tuple[int, int]) -> Tensor:
        terms = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_ffn, scale_ffn, gate_ffn = terms
        normed = modulate(self.norm_attention(x), shift_attention, scale_attention)
        x = x + gate_attention * self.attention(normed, HW=HW)
        return x + gate_ffn * self.ffn(modulate(self.norm_ffn(x), shift_ffn, scale_ffn), HW)


class DyDiLiT(nn.Module):
    """Predicts the noise in an image, given the time step and the class.

    forward(image, timestep, label): image (B, in_channels, height, width) floating, timestep (B,) of any number
    dtype, label (B,) int64 in 0..num_classes, where `num_classes` is the null class that stands for "no class".
    Returns the shape and dtype of the image. Height and width may be any multiples of the patch size; anything else
    is a ValueError.
    """

    def __init__(self, config: DyDiLiTConfig) -> None:
        super().__init__()
        if config.dim % 4:
            raise ValueError(f"dim must be a multiple of 4, for sines and cosines of two axes, not {config.dim}")
        self.config = config
        patch_channels = config.in_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_channels, config.dim)
        self.time_frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, config.dim)
        self.label_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = zero_linear(config.dim, 2 * config.dim)
        self.output = zero_linear(config.dim, patch_channels)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    def fuse(self) -> "DyDiLiT":
        """Puts every attention layer in its inference form, which computes the same; returns the model itself."""
        for module in self.modules():
            if isinstance(module, DyDiLAttention):
                module.fuse()
        return self

    def forward(self, image: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        patch = self.config.patch_size
        height, width = image.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"an image of {height}x{width} pixels does not divide into patches of {patch}x{patch}")
        HW = (height // patch, width // patch)

        patches = rearrange(image, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=patch, q=patch)
        x = self.patch_embedding(patches)
        x = x + position_embedding(HW, self.config.dim, x.device).to(x.dtype)

        frequencies = self.time_frequencies(timestep).to(x.dtype)
        condition = nn.functional.silu(self.time_embedding(frequencies) + self.label_embedding(label))
        for block in self.blocks:
            x = block(x, condition, HW)

        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches = self.output(modulate(self.norm(x), shift, scale))
        return rearrange(patches, "b (rows columns) (c p q) -> b c (rows p) (columns q)", rows=HW[0], p=patch, q=patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and one scale (B, 1, dim) for all tokens of an image."""
    return x * (1 + scale) + shift


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that returns zero until it is trained."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
