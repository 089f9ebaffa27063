"""replace_attention on models of many kinds: their grids, what is kept of them, and that what it says then works."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, replace_attention
from tests import strangers
from tests.models import Attention, D, H, ViT, diffusers, new_layers, output, random_convolutions, unet
from tests.test_convert import diffusers_attention

LEVELS = {
    "block_out_channels": (D, D),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
}


def grids_seen(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """The grid that each new layer convolves on; the convolution is told it."""
    seen: dict[str, tuple[int, int]] = {}
    random_convolutions(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DyDiLAttention)}

    def noting(name: str, convolution: Callable[..., Any]) -> Callable[..., Any]:
        def note(grids: Any, backend: Any) -> Any:
            (grid,) = grids
            seen[name] = (grid.rows, grid.columns)
            return convolution(grids, backend)

        return note

    for name, attn in layers.items():
        attn._convolution = noting(name, attn._convolution)  # type: ignore[method-assign]
    with torch.no_grad():
        run()
    for attn in layers.values():
        del attn._convolution
    return seen


def test_each_level_of_a_unet_has_the_grid_of_its_own_input() -> None:
    for options in ({}, {"use_linear_projection": True}):
        model = unet(**options).eval()
        report = replace_attention(model)
        assert [layer.name.split(".")[0] for layer in report.swapped] == ["down_blocks"] * 2 + ["up_blocks"] * 4 + [
            "mid_block"
        ]
        seen = grids_seen(model, lambda model=model: output(model, 8, 32))  # 256 and 64 tokens, which squares have too
        assert len(seen) == 7
        assert all(
            ((8, 32) if "down_blocks.0" in n or "up_blocks.1" in n else (4, 16)) == (H, W) for n, (H, W) in seen.items()
        )
        assert {layer.new.grid.source for layer in report.swapped} == {
            f"that of the input of {layer.name.partition('.transformer_blocks')[0]}" for layer in report.swapped
        }


def test_a_network_of_convolutions_with_attention_at_two_levels() -> None:
    model = strangers.ConvNet()
    replace_attention(model)
    seen = grids_seen(model, lambda: model(torch.randn(1, 1, 4, 16)))
    assert seen == {"first.attn": (4, 16), "second.attn": (2, 8)}
    replaced = strangers.CrossViT()
    replace_attention(replaced, num_prefix_tokens=1)
    seen = grids_seen(replaced, lambda: replaced(torch.randn(1, 1, 8, 32)))
    assert seen == {"blocks.0": (4, 16), "blocks.1": (2, 8)}


def latte() -> tuple[nn.Module, Callable[[], Any]]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=H, attention_head_dim=D // H, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, caption_channels=12, cross_attention_dim=D, video_length=16,
        norm_elementwise_affine=False,
        norm_type="ada_norm_single", attention_bias=True, activation_fn="gelu-approximate",
    )  # fmt: skip
    video, text = torch.randn(1, 4, 16, 8, 8), torch.randn(1, 5, 12)
    return model, lambda: model(video, torch.tensor([3]), encoder_hidden_states=text)


def animatediff() -> tuple[nn.Module, Callable[[], Any]]:
    model = diffusers.UNetMotionModel(
        **LEVELS, sample_size=8, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=12, num_attention_heads=H,
        motion_num_attention_heads=H,
    )  # fmt: skip
    video, text = torch.randn(1, 4, 16, 8, 8), torch.randn(16, 5, 12)
    return model, lambda: model(video, torch.tensor([3]), encoder_hidden_states=text)


def svd() -> tuple[nn.Module, Callable[[], Any]]:
    levels = {name: value for name, value in LEVELS.items() if name not in ("norm_num_groups", "in_channels")}
    model = diffusers.UNetSpatioTemporalConditionModel(
        **levels, in_channels=8, sample_size=8, addition_time_embed_dim=D, projection_class_embeddings_input_dim=3 * D,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=12,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=H,
    )  # fmt: skip
    video, text, ids = torch.randn(1, 16, 8, 8, 8), torch.randn(1, 1, 12), torch.randn(1, 3)
    return model, lambda: model(video, torch.tensor(3), encoder_hidden_states=text, added_time_ids=ids)


def unet3d() -> tuple[nn.Module, Callable[[], Any]]:
    model = diffusers.UNet3DConditionModel(
        **LEVELS, sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), cross_attention_dim=12,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=H,
    )  # fmt: skip
    video, text = torch.randn(1, 4, 16, 8, 8), torch.randn(1, 5, 12)
    return model, lambda: model(video, torch.tensor(3), encoder_hidden_states=text)


@pytest.mark.parametrize("build", [latte, animatediff, svd, unet3d])
def test_layers_between_frames_are_kept_and_those_within_frames_swapped(build: Callable[[], Any]) -> None:
    """Of 16 frames, which would make an image of 4 x 4."""
    model, run = build()
    report = replace_attention(model.eval())
    of_frames = {k.name for k in report.kept if "its tokens are frames" in k.reason}
    assert report.swapped and of_frames
    assert all(("temp" in name or "motion" in name or "transformer_in" in name) == (name in of_frames)
               for name in (*(k.name for k in report.kept), *(layer.name for layer in report.swapped)))  # fmt: skip
    assert all("attn1" in layer.name for layer in report.swapped)
    assert set(grids_seen(model, run)) == {layer.name for layer in report.swapped}


def cascade() -> nn.Module:
    return diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=16,
        block_out_channels=(16,), num_attention_heads=(2,), down_num_layers_per_block=(1,),
        up_num_layers_per_block=(1,), down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), clip_seq=2,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        clip_text_in_channels=8, clip_text_pooled_in_channels=8, clip_image_in_channels=8,
    )  # fmt: skip


def prior() -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=H, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=7
    )


def hunyuan() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "reasons"),
    [
        (strangers.Nest, ["it takes tokens of other than 3 dimensions: its forward unpacks the shape of x otherwise"]),
        (strangers.Volo, ["it takes tokens of other than 3 dimensions: its forward unpacks the shape of x otherwise"]),
        (lambda: ViT(strangers.ChannelAttention()), ["its attention is of another kind (channel)"]),
        (prior, ["PriorTransformer masks its tokens (causal_attention_mask)"]),
        (cascade, ["SDCascadeAttnBlock adds tokens of another kind (kv)"]),
        (
            hunyuan,
            [
                "by the name context_embedder",
                "its processor HunyuanVideoAttnProcessor2_0",
                "to other tokens, jointly (",
            ],
        ),
    ],
    ids=["nest", "volo", "davit", "prior", "cascade", "hunyuan"],
)
def test_tokens_that_are_no_image_in_rows_are_kept(build: Callable[[], nn.Module], reasons: list[str]) -> None:
    """Also without a convolution."""
    for options in ({}, {"dwc_branches": ()}):
        with pytest.raises(ValueError, match="no self-attention that can be swapped") as error:
            replace_attention(build(), **options)
        assert all(reason in str(error.value) for reason in reasons)


def test_what_gligen_adds_is_kept() -> None:
    model = unet(attention_type="gated").eval()
    report = replace_attention(model)
    assert not any("fuser" in layer.name for layer in report.swapped)
    assert sum("GatedSelfAttentionDense adds tokens of another kind (objs)" in k.reason for k in report.kept) == 7
    text = torch.randn(1, 5, 12)
    boxes = {"boxes": torch.rand(1, 3, 4), "positive_embeddings": torch.randn(1, 3, 12), "masks": torch.ones(1, 3)}
    with torch.no_grad():
        model(torch.randn(1, 4, 8, 8), 3, text, cross_attention_kwargs={"gligen": boxes})


@pytest.mark.parametrize(
    ("build", "shape"),
    [(strangers.NaFlexViT, (1, 64, 4)), (strangers.PiT, (1, 1, 18, 18)), (lambda: diffusers.UVit2DModel(
        hidden_size=D, cond_embed_dim=D, encoder_hidden_size=D, num_hidden_layers=1, num_attention_heads=H,
        in_channels=D, block_out_channels=D, block_num_heads=H, intermediate_size=D, micro_cond_embed_dim=16,
        vocab_size=17, codebook_size=16, micro_cond_encode_dim=4), None)],
    ids=["naflexvit", "pit", "uvit2d"],
)  # fmt: skip
def test_where_nothing_shows_the_grid_it_is_asked_for(build: Callable[[], nn.Module], shape: Any) -> None:
    model = build()
    with pytest.raises(
        ValueError, match=r"HW=\(rows, columns\).* needed, or dwc_branches=\(\).* nothing in the model shows"
    ):
        replace_attention(model)
    assert not new_layers(model)
    replace_attention(model, dwc_branches=())
    if shape is not None:
        model(torch.randn(shape))


def test_a_callers_grid_for_patches_that_come_cut() -> None:
    model = strangers.NaFlexViT()
    replace_attention(model, HW=lambda patches, patch_coord: tuple((patch_coord[0].amax(0) + 1).tolist()))
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(16))[None]
    assert grids_seen(model, lambda: model(torch.randn(1, 64, 4), coordinates)) == {"blocks.0.attn": (4, 16)}


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (strangers.UViT, "blocks.0.attn has 17 tokens after 0 prefix tokens, .* 4 x 4 = 16"),
        (strangers.CrossViT, "blocks.0 has 17 tokens after 0 prefix tokens, .* 4 x 4 = 16"),
        (strangers.PatchDropViT, "blocks.0.attn has 8 tokens after 1 prefix tokens, .* 4 x 4 = 16"),
    ],
    ids=["uvit", "crossvit", "patch dropping"],
)
def test_tokens_that_do_not_make_the_grid_are_told_what_helps(build: Callable[[], nn.Module], names: str) -> None:
    model, x = build(), torch.randn(1, 1, 8, 8)
    report = replace_attention(model)
    with pytest.raises(ValueError, match=rf"{names}.*num_prefix_tokens .*, HW .*dwc_branches=\(\) or exclude"):
        model(x)
    report.undo()
    replace_attention(model, dwc_branches=())
    model(x)


def test_all_that_looks_like_attention_is_in_the_report() -> None:
    """Ten layers of another kind and two that are swapped, as in ConViT, and others that only their code shows."""
    odd = [strangers.Around(strangers.GPSA()) for _ in range(10)]
    others = [strangers.Around(strangers.Mixer(), "mixer"), strangers.Around(nn.MultiheadAttention(D, H), "mha")]
    plain = [strangers.Around(Attention()), strangers.Around(Attention())]
    model = strangers.ViTOf(*odd, *plain, *others)
    report = replace_attention(model)
    assert [layer.name for layer in report.swapped] == ["blocks.10.attn", "blocks.11.attn"]
    assert [k.name for k in report.kept] == [
        *(f"blocks.{i}.attn" for i in range(10)),
        "blocks.12.mixer",
        "blocks.13.mha",
    ]
    assert {k.reason for k in report.kept} == {"it has neither qkv and proj nor to_q, to_k, to_v and to_out"}
    assert "kept: 12" in str(report)


def test_all_reasons_are_told() -> None:
    ways: dict[str, Callable[[Attention], Any]] = {
        "q_norm (LayerNorm) would be lost": lambda a: setattr(a, "q_norm", nn.LayerNorm(8)),
        "attn_drop = 0.1 would be lost": lambda a: setattr(a, "attn_drop", nn.Dropout(0.1)),
        "bias would be lost": lambda a: a.register_buffer("bias", torch.ones(1)),
        "window_size = (4, 4) would be lost": lambda a: setattr(a, "window_size", (4, 4)),
        "its hooks would be lost": lambda a: a.proj.register_forward_hook(print),
        "its forward was replaced or compiled": lambda a: setattr(a, "forward", a.forward),
        "has the shape (192, 32), not (96, 32)": lambda a: setattr(a, "qkv", nn.Linear(D, 6 * D)),
        "not of one floating dtype": lambda a: a.proj.bfloat16(),
    }
    for several in itertools.chain(itertools.combinations(ways, 2), [tuple(ways)]):
        odd = Attention()
        for reason in several:
            ways[reason](odd)
        (kept,) = replace_attention(ViT(odd, Attention())).kept
        assert [reason for reason in ways if reason in kept.reason] == list(several)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = diffusers_attention(qk_norm="l2", rescale_output_factor=2.0, cross_attention_dim=8)
    (kept,) = replace_attention(ViT(odd, Attention())).kept
    expected = ["cross-attention", "rescale_output_factor", "norm_q", "norm_k", "(32, 8), not (32, 32)"]
    assert all(reason in kept.reason for reason in expected)


def test_a_pipeline_is_told_which_of_its_networks_to_pass() -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(D,), norm_num_groups=8)
    scheduler = diffusers.DDIMScheduler()
    transformer = diffusers.DiTTransformer2DModel(
        H, D // H, 4, num_layers=1, sample_size=8, norm_num_groups=1, out_channels=8
    )
    pipe = diffusers.DiTPipeline(transformer, vae, scheduler)
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got DiTPipeline: pass its \.transformer$"):
        replace_attention(pipe)

    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.vae, self.steps = unet(), vae, 3

    with pytest.raises(TypeError, match=r"got Pipeline: pass its \.unet$"):
        replace_attention(Pipeline())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got list$"):
        replace_attention([ViT()])  # type: ignore[arg-type]
    replace_attention(pipe.transformer)
    images = pipe([1], num_inference_steps=1, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape[0] == 1 and torch.as_tensor(images).isfinite().all()


def test_a_model_called_by_keyword_shows_its_map() -> None:
    model = diffusers.Transformer2DModel(H, D // H, D, num_layers=1, norm_num_groups=8).eval()
    replace_attention(model)
    x: Tensor = torch.randn(1, D, 3, 12)
    assert grids_seen(model, lambda: model(hidden_states=x)) == {"transformer_blocks.0.attn1": (3, 12)}
