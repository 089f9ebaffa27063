"""What swapped layers take from old ones beside projections: norms of queries and keys, rotary tables, videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from dydila_kernels import DyDiLAttention, replace_attention
from dydila_kernels.convert import DiffusersAttention, LightningAttention, SanaAttention, VisionAttention
from dydila_kernels.testing import relative_error
from tests import natives
from tests.models import Attention, Block, D, H, ViT, new_layers, random_convolutions
from tests.test_convert import diffusers_attention
from tests.zoo import MODELS, by_name, sana_video, wan

attention_processor = pytest.importorskip("diffusers.models.attention_processor")
normalization = pytest.importorskip("diffusers.models.normalization")

E = D // H
SANA = "NVlabs' Sana: `LiteLA`, with norms and without"


class ZeroCentred(nn.Module):
    """By its name an RMS norm, but its weights are added to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(E)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class RMSNormOfTheRoot(natives.ScaledRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class FusedRMSNorm(natives.ScaledRMSNorm):
    """Of a kernel that this device does not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no such device")


ZeroCentred.__name__ = "GemmaRMSNorm"


def with_norms(make: Callable[[], nn.Module]) -> Attention:
    layer = Attention()
    layer.q_norm, layer.k_norm = make(), make()
    return layer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.LayerNorm(E, eps=1e-6), ("layer", "head", 1e-6)),
        (lambda: nn.LayerNorm(D), ("layer", "token", 1e-5)),
        (lambda: nn.LayerNorm(E, bias=False), ("layer", "head", 1e-5)),
        (lambda: nn.LayerNorm(E, elementwise_affine=False), ("layer", "head", 1e-5)),
        (lambda: nn.RMSNorm(E), ("rms", "head", None)),
        (lambda: nn.RMSNorm(D, eps=1e-3), ("rms", "token", 1e-3)),
        (lambda: nn.RMSNorm(E, elementwise_affine=False), ("rms", "head", None)),
        (lambda: natives.ScaledRMSNorm(D), ("rms", "token", 1e-5)),
        (lambda: normalization.RMSNorm(E, 1e-5), ("rms", "head", 1e-5)),
        (lambda: normalization.FP32LayerNorm(E, elementwise_affine=False), ("layer", "head", 1e-5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_carried_over(make: Callable[[], nn.Module], expected: Any, dtype: torch.dtype) -> None:
    layer = with_norms(make).to(dtype)
    for parameter in [*layer.q_norm.parameters(), *layer.k_norm.parameters()]:
        nn.init.uniform_(parameter, -1, 1)
    layer.k_norm.requires_grad_(False)
    model = ViT(layer)
    report = replace_attention(model)
    (new,) = new_layers(model)
    kind, across, eps = expected
    assert (new.qk_norm, new.qk_norm_across) == (kind, across)
    assert new.q_norm.eps in ([torch.finfo(torch.float32).eps, torch.finfo(dtype).eps] if eps is None else [eps])
    x = torch.randn(2, 5, D, dtype=dtype)
    for old, norm in ((layer.q_norm, new.q_norm), (layer.k_norm, new.k_norm)):
        parts = x.unflatten(-1, (H, -1)) if across == "head" else x
        torch.testing.assert_close(norm(parts), old(parts))
        had = dict(old.named_parameters())
        assert {n for n, p in norm.named_parameters() if p.requires_grad} == {
            n for n, p in had.items() if p.requires_grad
        }
    assert not any("norm" in name for name in report.new_parameters)
    assert f"{kind} norm of each {across}" in str(report)


@pytest.mark.parametrize(
    "make",
    [
        ZeroCentred,
        lambda: RMSNormOfTheRoot(E),
        lambda: FusedRMSNorm(E),
        lambda: nn.LayerNorm(5),
        lambda: nn.BatchNorm1d(E),
        lambda: nn.GroupNorm(1, D),
        lambda: normalization.RMSNorm(E, 1e-5, bias=True),
    ],
)
def test_other_norms_are_kept(make: Callable[[], nn.Module]) -> None:
    (kept,) = replace_attention(ViT(with_norms(make), Attention())).kept
    assert "q_norm" in kept.reason and "k_norm" in kept.reason and "would be lost" in kept.reason


def test_norms_that_differ_or_that_the_processor_passes_over_are_kept() -> None:
    odd = with_norms(lambda: nn.LayerNorm(E))
    odd.k_norm.eps = 1e-3
    alone = with_norms(lambda: nn.LayerNorm(E))
    alone.q_norm = nn.Identity()
    passed_over = diffusers_attention(qk_norm="rms_norm", processor=attention_processor.AttnProcessor())
    mixed = with_norms(lambda: nn.LayerNorm(E, dtype=torch.bfloat16))
    reasons = [k.reason for k in replace_attention(ViT(odd, alone, passed_over, mixed, Attention())).kept]
    parts = ["q_norm (LayerNorm) would", "k_norm (LayerNorm) would", "passes over its norm_q", "not of one floating"]
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True))


def test_options_of_norms_are_left_to_old_layers_that_have_some() -> None:
    model = ViT(with_norms(lambda: nn.LayerNorm(E)))
    with pytest.raises(TypeError, match=r"qk_norm must be left to the old layer blocks\.0\.attn, which has norms"):
        replace_attention(model, qk_norm="rms")
    report = replace_attention(ViT(), qk_norm="rms")
    assert {layer.new.qk_norm for layer in report.swapped} == {"rms"}
    assert "blocks.0.attn.q_norm.weight" in report.new_parameters


def test_heads_that_have_norms_are_left_to_the_old_layer() -> None:
    model = ViT(natives.TimmAttention())
    with pytest.raises(ValueError, match=r"num_heads must be that of the old layer blocks\.0\.attn, 4, .*; got 2"):
        replace_attention(model, num_heads=2)
    assert not new_layers(model)
    replace_attention(model, num_heads=H)
    replace_attention(ViT(with_norms(lambda: nn.LayerNorm(D))), num_heads=2)


def test_where_no_key_answers_the_new_layer_gives_zero() -> None:
    """SANA-Video divides what the rotation makes of such keys by its epsilon."""
    model = sana_video()
    attn = model.transformer_blocks[0].attn1
    even = (torch.arange(48) % 2 == 0).float()
    with torch.no_grad():
        attn.to_q.weight.copy_(torch.diag(even))  # queries and keys have no channel in common
        attn.to_k.weight.copy_(torch.diag(1 - even))
    x, tables = torch.rand(1, 12, 48) + 0.1, model.rope(torch.zeros(1, 4, 2, 4, 6))
    with torch.no_grad():
        old = attn(x, rotary_emb=tables)
        replace_attention(model, lambda_init=0.0, dwc_branches=())
        new = model.transformer_blocks[0].attn1
        assert old.abs().max() > 1e9
        assert torch.equal(new(x, rotary_emb=tables), new.proj.bias.expand(1, 12, 48))


@pytest.mark.parametrize("build", [sana_video, wan])
def test_a_video_is_attended_to_as_a_whole_and_convolved_by_frames(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    report = replace_attention(model)
    random_convolutions(model)
    told = [f"HW {HW}" for HW in report.grid.split("; ")]
    assert told == ["HW that of the patches of patch_embedding"]
    state = model.state_dict()
    clips = [torch.randn(2, 4, *sides) for sides in ((3, 8, 12), (2, 4, 6), (1, 8, 8))]
    with torch.no_grad():
        found = [by_name(model, clip) for clip in clips]
        report.undo()
        for clip, out in zip(clips, found, strict=True):
            frames, rows, columns = clip.shape[2], clip.shape[3] // 2, clip.shape[4] // 2
            report = replace_attention(model, HW=(frames, rows, columns))
            model.load_state_dict(state)
            assert torch.equal(by_name(model, clip), out)
            report.undo()
        replace_attention(model, HW=lambda clip, **_: (clip.shape[2], 4, 6))
        model.load_state_dict(state)
        assert torch.equal(by_name(model, clips[0]), found[0])


@pytest.mark.slow
def test_a_video_model_compiles_twice_for_any_number_of_grids() -> None:
    model = sana_video(num_layers=1).eval()
    replace_attention(model)
    random_convolutions(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sides in ((3, 8, 12), (2, 4, 6), (5, 8, 8), (6, 6, 6)):
            clip = torch.randn(2, 4, *sides)
            assert relative_error(by_name(compiled, clip), by_name(model, clip)) < 1e-5
    assert counter.frame_count <= 2


class Tubelets(nn.Module):
    """Open-Sora's pattern: patches of a video, attention within each frame and between frames."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, D, (1, 2, 2), (1, 2, 2))
        self.spatial, self.attn_temp = Block(Attention()), nn.Sequential(Block(Attention()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        frames = x.shape[2]
        x = self.spatial(x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)).unflatten(0, (-1, frames))
        return self.attn_temp(x.transpose(1, 2).flatten(0, 1))


def test_layers_within_the_frames_of_a_video_have_the_grid_of_a_frame() -> None:
    model = Tubelets().eval()
    report = replace_attention(model)
    assert [layer.name for layer in report.swapped] == ["spatial.attn"]
    assert [k.name for k in report.kept] == ["attn_temp.0.attn"] and "frames of a video" in report.kept[0].reason
    random_convolutions(model)
    clip = torch.randn(2, 1, 5, 4, 8)
    with torch.no_grad():
        found = model(clip)
        state = model.state_dict()
        report.undo()
        replace_attention(model, HW=(2, 4))
        model.load_state_dict(state)
        assert torch.equal(model(clip), found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_of_a_video_model_has_its_own_grid(reentrant: bool) -> None:
    model = sana_video()
    replace_attention(model)
    random_convolutions(model)

    def gradients(*clips: Tensor) -> list[Tensor]:
        model.zero_grad()
        sum(by_name(model, clip).square().sum() for clip in clips).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    clips = [torch.randn(1, 4, *sides, requires_grad=True) for sides in ((3, 8, 12), (2, 4, 6))]
    plain = gradients(*clips)
    model.gradient_checkpointing = True
    model._gradient_checkpointing_func = lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant)
    # Reentrant backward passes sum the two clips in another order.
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(gradients(*clips), plain, strict=True))


def test_the_rotation_comes_after_the_kernel_and_shows_relative_positions() -> None:
    """With the tables of the model and by the layer's own equation; a shifted clip has the same attention."""
    model = sana_video().eval()
    replace_attention(model, dwc_branches=())
    attn, x = model.transformer_blocks[0].attn1, torch.randn(2, 3 * 4 * 6, 48)
    cos, sin = model.rope(torch.zeros(1, 4, 3, 8, 12))
    assert cos.shape == (1, 72, 1, 12)
    out = attn(x, rotary_emb=(cos, sin))
    assert torch.equal(out, DyDiLAttention.forward(attn, x, rotary=(cos[0, :, 0], sin[0, :, 0])))
    assert relative_error(attn(x), out) > 1e-3
    far_cos, far_sin = (
        t.view(5, 7, 9, 1, 12)[2:, 3:, 3:].reshape(1, 72, 1, 12) for t in model.rope(torch.zeros(1, 4, 5, 14, 18))
    )
    assert relative_error(attn(x, rotary_emb=(far_cos, far_sin)), out) < 1e-5


def swapped(name: str) -> Any:
    model = MODELS[name].make()
    replace_attention(model, dwc_branches=())
    return new_layers(model)[0]


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "message"),
    [
        (SANA, SanaAttention, {"image_rotary_emb": 1}, "image_rotary_emb must be"),
        (SANA, SanaAttention, {"mask": (4, 4)}, "looks like HW"),
        (SANA, SanaAttention, {"block_mask": 1}, "block_mask must be None"),
        ("LightningDiT", LightningAttention, {"rope": nn.Identity()}, "rope must be None or have freqs_cos"),
        ("LightningDiT", LightningAttention, {"rope": natives.Rope(), "mask": 1}, "mask must be None"),
        ("diffusers `WanTransformer3DModel`", DiffusersAttention, {"rotary_emb": torch.ones(2)}, "rotary must be"),
        ("diffusers `WanTransformer3DModel`", DiffusersAttention, {"image_rotary_emb": 1}, "image_rotary_emb must be"),
        ("timm's vision transformers with `qk_norm`", VisionAttention, {"rope": 1}, "rope must be None"),
    ],
)  # fmt: skip
def test_what_a_block_may_not_pass_is_an_error(name: str, kind: type, arguments: dict[str, Any], message: str) -> None:
    attn = swapped(name)
    assert type(attn) is kind
    with pytest.raises((TypeError, ValueError), match=message):
        attn(torch.randn(2, 16, attn.dim), **arguments)


def test_rope_of_halves_or_none_in_sight_is_kept() -> None:
    bare = natives.LightningDiT()
    del bare.feat_rope
    for model in (natives.LightningDiT(natives.Rope(halves=True)), bare):
        with pytest.raises(ValueError, match="its forward takes rope, and no module around it shows tables"):
            replace_attention(model)


def test_native_blocks_may_tell_the_grid_themselves() -> None:
    """Where the patches overlap, nothing else shows it."""
    model = natives.NativeSana(natives.LiteLA(True), kernel_size=3).eval()
    report = replace_attention(model)
    assert report.grid == "what the blocks pass as HW"
    random_convolutions(model)
    x, state = torch.randn(2, 4, 8, 12), model.state_dict()
    with torch.no_grad():
        out = model(x)
        report.undo()
        replace_attention(model, HW=(4, 6))
        model.load_state_dict(state)
        assert torch.equal(model(x), out)
    with pytest.raises(RuntimeError, match="pass HW="):
        report.swapped[0].new(torch.randn(2, 24, D))


def test_a_block_that_cuts_windows_keeps_its_attention() -> None:
    model = natives.NativeSana(natives.WindowAttention(), natives.WindowAttention())
    model.blocks[0].window_size = 4
    report = replace_attention(model)
    assert [layer.name for layer in report.swapped] == ["blocks.1.attn"]
    assert "SanaBlock may cut windows (window_size = 4)" in next(k for k in report.kept if "0.attn" in k.name).reason
