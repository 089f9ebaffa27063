"""The models of the guide's table: how each is built, in small and random, and called on latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests import natives
from tests.models import CROSS, SHAPE, D, H, ViT, diffusers, dit, pixart, sana

TEXT = torch.linspace(-1, 1, 60).view(1, 5, 12)
LEVELS = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
VIDEO = {"num_attention_heads": H, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
WIDE = 4 * 12


class Model(NamedTuple):
    """``shape`` is that of its latents; ``run`` calls it on such and returns what it predicts."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    run: Callable[[nn.Module, Tensor], Tensor]

    def make(self) -> nn.Module:
        """The model with no parameter at zero, which hides what is behind it, and with norms of their own."""
        model = self.build()
        for name, parameter in model.named_parameters():
            if not parameter.any() or any(norm in name for norm in ("norm_q", "norm_k", "q_norm", "k_norm")):
                nn.init.uniform_(parameter, 0.1, 1.0)
        return model

    def latents(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


def text(x: Tensor) -> Tensor:
    return TEXT.expand(len(x), -1, -1).to(x.dtype)


def time(x: Tensor) -> Tensor:
    return torch.arange(len(x)) * 7 % 100


def by_name(model: nn.Module, x: Tensor, **more: Any) -> Tensor:
    out = model(x, timestep=time(x), encoder_hidden_states=text(x), return_dict=False, **more)[0]
    return out[:, : x.shape[1]]


def of_class(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, time(x), time(x) % 10, return_dict=False)[0][:, : x.shape[1]]


def of_any_size(model: nn.Module, x: Tensor) -> Tensor:
    return by_name(model, x, added_cond_kwargs={"resolution": None, "aspect_ratio": None})


def sana_video(**more: Any) -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        **VIDEO | more, num_cross_attention_heads=H, cross_attention_head_dim=12, cross_attention_dim=WIDE,
        caption_channels=12, mlp_ratio=2.0, sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(**VIDEO, text_dim=12, freq_dim=16, ffn_dim=WIDE, rope_max_seq_len=32)


def sana_controlnet() -> nn.Module:
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": D // 2}
    return diffusers.SanaControlNetModel(**SHAPE, **CROSS, **heads, patch_size=1, mlp_ratio=2.0)


def controlled(model: nn.Module, x: Tensor) -> Tensor:
    samples = model(x, text(x), time(x), controlnet_cond=x, return_dict=False)[0]
    return torch.stack(tuple(samples))


def stable_diffusion() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **LEVELS, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=12, attention_head_dim=H,
    )  # fmt: skip


def latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=H, attention_head_dim=D // H, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, caption_channels=12, cross_attention_dim=D, video_length=4, norm_elementwise_affine=False,
        norm_type="ada_norm_single", attention_bias=True, activation_fn="gelu-approximate",
    )  # fmt: skip


def animatediff() -> nn.Module:
    return diffusers.UNetMotionModel(
        **LEVELS, in_channels=4, out_channels=4, cross_attention_dim=12, num_attention_heads=H,
        motion_num_attention_heads=H, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip


def per_frame(model: nn.Module, x: Tensor) -> Tensor:
    """With a text for each frame."""
    return model(x, time(x)[:1], text(x).repeat_interleave(x.shape[2], 0), return_dict=False)[0]


def svd() -> nn.Module:
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(D, D), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        addition_time_embed_dim=D, projection_class_embeddings_input_dim=3 * D, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), num_attention_heads=H,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


def frames_first(model: nn.Module, x: Tensor) -> Tensor:
    ids = torch.ones(len(x), 3)
    return model(x.transpose(1, 2), time(x)[:1], text(x)[:, :1], added_time_ids=ids, return_dict=False)[0].transpose(
        1, 2
    )


def unet3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        **LEVELS, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=12, attention_head_dim=H,
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=D // H,
        num_attention_heads=H, caption_projection_dim=D, joint_attention_dim=12, pooled_projection_dim=12,
        qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=H, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=12,
        num_layers=1, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, max_text_seq_length=8,
    )  # fmt: skip


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=12,
    )  # fmt: skip


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


IMAGE, CLIP, PIXELS = (2, 4, 8, 12), (2, 4, 3, 8, 12), (2, 1, 8, 8)

MODELS = {
    "diffusers `SanaTransformer2DModel`, Sana 1.0": Model(sana, IMAGE, by_name),
    "diffusers `SanaTransformer2DModel`, Sana 1.5": Model(
        lambda: sana(qk_norm="rms_norm_across_heads"), IMAGE, by_name
    ),
    "diffusers `SanaControlNetModel`": Model(sana_controlnet, IMAGE, controlled),
    "diffusers `SanaVideoTransformer3DModel`": Model(sana_video, CLIP, by_name),
    "diffusers `WanTransformer3DModel`": Model(wan, CLIP, by_name),
    "diffusers `DiTTransformer2DModel`": Model(dit, (2, 4, 8, 8), of_class),
    "diffusers `PixArtTransformer2DModel`": Model(pixart, IMAGE, of_any_size),
    "diffusers `UNet2DConditionModel`, Stable Diffusion 1, 2, XL": Model(stable_diffusion, IMAGE, by_name),
    "diffusers `LatteTransformer3DModel`": Model(latte, (1, 4, 4, 8, 8), by_name),
    "diffusers `UNetMotionModel`, AnimateDiff": Model(animatediff, (1, 4, 4, 8, 8), per_frame),
    "diffusers `UNetSpatioTemporalConditionModel`, SVD": Model(svd, (1, 4, 4, 8, 8), frames_first),
    "diffusers `UNet3DConditionModel`": Model(unet3d, (1, 4, 4, 8, 8), by_name),
    "diffusers `SD3Transformer2DModel`": Model(sd3, IMAGE, plain),
    "diffusers `FluxTransformer2DModel`": Model(flux, IMAGE, plain),
    "diffusers `CogVideoXTransformer3DModel`": Model(cogvideox, CLIP, plain),
    "diffusers `LTXVideoTransformer3DModel`": Model(ltx, CLIP, plain),
    "NVlabs' Sana: `LiteLA`, with norms and without": Model(
        lambda: natives.NativeSana(natives.LiteLA(False), natives.LiteLA(True)), IMAGE, plain
    ),
    "PixArt-alpha's `WindowAttention`": Model(
        lambda: natives.NativeSana(natives.WindowAttention(), natives.WindowAttention()), IMAGE, plain
    ),
    "PixArt-Sigma's `AttentionKVCompress`": Model(
        lambda: natives.NativeSana(natives.PixArtAttention(), natives.PixArtAttention(2)), IMAGE, plain
    ),
    "LightningDiT": Model(natives.LightningDiT, PIXELS, plain),
    "facebookresearch's DiT, timm's vision transformers": Model(ViT, PIXELS, plain),
    "timm's vision transformers with `qk_norm`": Model(
        lambda: ViT(natives.TimmAttention(), natives.TimmAttention()), PIXELS, plain
    ),
}
