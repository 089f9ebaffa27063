"""One frame for DyDi-LiT and its rivals: DiT's adaLN-Zero blocks around any of the attention layers."""

from collections.abc import Callable
from zlib import crc32

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dydila_kernels import DyDiLAttention
from examples.dydi_lit.configs import ModelConfig
from examples.dydi_lit.dig import GatedLinearAttention, IdentityConvolution, SwiGLU
from examples.dydi_lit.edit import LinearCompressedAttention
from examples.dydi_lit.layers import GLUMBConv, Mlp, ReLULinearAttention, SoftmaxAttention
from examples.dydi_lit.lit import ConvolvedLinearAttention
from examples.dydi_lit.model_card import TEMPLATE
from examples.dydi_lit.moh_dit import MixtureOfHeads
from examples.dydi_lit.pixart_sigma import CompressedAttention


class Block(nn.Module):
    """One adaLN-Zero block: x += gate * attention(modulate(x)), then the same with the feed-forward.

    Shift, scale and gate of both halves are linear in the condition (B, dim). They start at zero, so that a fresh
    block is the identity. DiG's blocks end with a convolution, which starts as the identity too.
    """

    def __init__(self, config: ModelConfig, number: int, seed: int) -> None:
        super().__init__()
        dim = config.dim
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        with torch.random.fork_rng(devices=[]):  # what one block draws does not move the next one's weights
            torch.manual_seed(seed + number)
            self.attention = attention_of(config, number)
        self.norm_ffn = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        kinds: dict[str, Callable[[int, int], nn.Module]] = {"mlp": Mlp, "glumbconv": GLUMBConv, "swiglu": SwiGLU}
        self.ffn = kinds[config.feed_forward](dim, int(config.ffn_ratio * dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        self.convolution = IdentityConvolution(dim) if config.block_convolution else None

    def forward(self, x: Tensor, condition: Tensor, HW: tuple[int, int]) -> Tensor:
        terms = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_ffn, scale_ffn, gate_ffn = terms
        normed = modulate(self.norm_attention(x), shift_attention, scale_attention)
        x = x + gate_attention * self.attention(normed, HW=HW)
        x = x + gate_ffn * self.ffn(modulate(self.norm_ffn(x), shift_ffn, scale_ffn), HW)
        return x if self.convolution is None else self.convolution(x, HW)


class DiffusionTransformer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="dydila-kernels",
    paper_url="https://arxiv.org/abs/2601.13683",
    license="apache-2.0",
    pipeline_tag="unconditional-image-generation",
    tags=["diffusion", "linear-attention", "dydila"],
    model_card_template=TEMPLATE,
):
    """Predicts the noise in an image, and with `learn_sigma` where its variance lies, given the time step and class.

    forward(image, timestep, label): image (B, in_channels, height, width) floating, timestep (B,) of any number
    dtype, label (B,) int64 in 0..num_classes, where `num_classes` is the null class that stands for "no class".
    Returns (B, C, height, width) in the dtype of the image, with C = in_channels, or twice that with `learn_sigma`:
    the noise, then the variance's place v in -1..1 between the two bounds of arXiv 2102.09672, Eq. 15. Height and
    width may be any multiples of the patch size; anything else is a ValueError.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of huggingface_hub.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        self.gradient_checkpointing = False
        patch = config.patch_size**2
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.patch_embedding = nn.Linear(config.in_channels * patch, config.dim)
        self.time_frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, config.dim)
        self.label_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.blocks = nn.ModuleList(Block(config, number, seed) for number in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.output = nn.Linear(config.dim, self.out_channels * patch)
        self.initialize(seed)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.output.weight.dtype

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draws the weights of linear layers, embeddings and convolutions; what else DyDiLA has stays as it drew it.

        Each depends on `seed` and its name only, so that models of one seed start equal where they are alike.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed ^ crc32(name.encode()))
                module.reset_parameters()
                if self.config.initialization == "dit":
                    initialize_as_dit(name, module)
            if name == "output" or name.endswith("modulation"):  # blocks start as the identity, the output at zero
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def fuse(self) -> "DiffusionTransformer":
        """Puts every DyDiLA layer in its inference form, which computes the same; returns the model itself."""
        for module in self.modules():
            if isinstance(module, DyDiLAttention):
                module.fuse()
        return self

    def balance(self) -> Tensor | float:
        """MoH-DiT's loss that evens the use of heads in the last pass of training, mean over the blocks; else 0."""
        layers = [module for module in self.modules() if isinstance(module, MixtureOfHeads)]
        return 0.01 * torch.stack([layer.take_balance() for layer in layers]).mean() if layers else 0.0

    def forward(self, image: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        patch = self.config.patch_size
        height, width = image.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"an image of {height}x{width} pixels does not divide into patches of {patch}x{patch}")
        HW = (height // patch, width // patch)

        patches = rearrange(image, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=patch, q=patch)
        x = self.patch_embedding(patches)
        # In the dtype of the weights, so that under autocast the blocks add to float32, as in DiT.
        x = x + position_embedding(HW, self.config.dim, x.device).to(self.patch_embedding.weight.dtype)

        frequencies = self.time_frequencies(timestep).to(image.dtype)
        condition = nn.functional.silu(self.time_embedding(frequencies) + self.label_embedding(label))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, HW, use_reentrant=False)
            else:
                x = block(x, condition, HW)

        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches = self.output(modulate(self.norm(x), shift, scale)).to(image.dtype)
        return rearrange(patches, "b (rows columns) (c p q) -> b c (rows p) (columns q)", rows=HW[0], p=patch, q=patch)


def attention_of(config: ModelConfig, block: int) -> nn.Module:
    """The attention layer of block number `block`, from 0."""
    dim, heads, kind = config.dim, config.num_heads, config.attention
    if kind == "softmax" or (kind == "compressed" and block < config.depth - config.compressed_blocks):
        return SoftmaxAttention(dim, heads)
    if kind == "compressed":
        return CompressedAttention(dim, heads, config.compression)
    if kind == "mixture-of-heads":
        return MixtureOfHeads(dim, heads, config.shared_heads, config.taken_heads)
    if kind == "relu":
        return ReLULinearAttention(dim, heads)
    if kind == "linear-compressed":
        return LinearCompressedAttention(dim, heads)
    if kind == "convolved":
        return ConvolvedLinearAttention(dim, heads)
    if kind == "gated":
        return GatedLinearAttention(dim, heads, block)
    layer = DyDiLAttention(
        config.dim,
        config.num_heads,
        num_projectors=config.num_projectors,
        num_kernel_factors=config.num_kernel_factors,
        num_differential_factors=config.num_differential_factors,
        lambda_init=config.lambda_of(block),
        differential=config.differential,
        normalization=config.normalization,
        dwc_branches=config.dwc_branches,
        router_gradient=config.router_gradient,
    )
    layer.measure.gamma.requires_grad_(config.learned_gamma)
    return layer


def initialize_as_dit(name: str, module: nn.Module) -> None:
    """Draws a weight as DiT does; convolutions, which DiT has none of, stay as they are."""
    if isinstance(module, nn.Embedding) or name.startswith("time_embedding."):
        nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def position_embedding(HW: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """DiT's table: (N, dim) float32, row-major, N = rows x columns.

    With omega_i = 10000^(-4i / dim), i = 0..dim/4 - 1, the channels are sin(column omega), cos(column omega),
    sin(row omega) and cos(row omega), a quarter each.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in HW), indexing="ij")
    halves = [get_timestep_embedding(place.flatten(), dim // 2, downscale_freq_shift=0) for place in (columns, rows)]
    return torch.cat(halves, dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and one scale (B, 1, dim) for all tokens of an image."""
    return x * (1 + scale) + shift
