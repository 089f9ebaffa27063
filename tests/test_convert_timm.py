"""replace_attention on models of timm itself, where it is installed."""

from __future__ import annotations

import pytest
import torch

from dydila_kernels import replace_attention

timm = pytest.importorskip("timm", reason="its own models; the CI of this project has no torchvision, which it needs")


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_so150m_patch16_reg4_gap_256"],
)
def test_a_vision_transformer_is_swapped_trained_and_put_back(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, depth=2).eval()
    images = torch.randn(2, *model.default_cfg["input_size"])[..., :112, :112]
    model.set_input_size((112, 112))
    with torch.no_grad():
        before = model(images)
    report = replace_attention(model)
    assert [layer.name for layer in report.swapped] == ["blocks.0.attn", "blocks.1.attn"] and not report.kept
    assert all(layer.new.num_prefix_tokens == model.num_prefix_tokens for layer in report.swapped)
    model.train()
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        assert model(images).isfinite().all()
        report.undo()
        assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_dinov3", "its forward takes rope"),
        ("beit_base_patch16_224", "its forward takes shared_rel_pos_bias"),
        ("swin_tiny_patch4_window7_224", "would be lost"),
    ],
)
def test_attention_of_another_kind_is_kept_and_told_why(name: str, reason: str) -> None:
    depth = (1, 1, 1, 1) if "swin" in name else 1
    model = timm.create_model(name, num_classes=10, **{"depths" if "swin" in name else "depth": depth})
    with pytest.raises(ValueError, match=reason):
        replace_attention(model)
