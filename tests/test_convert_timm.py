"""replace_attention on models of timm itself, where it is installed."""

from __future__ import annotations

import re

import pytest
import torch

from dydila_kernels import replace_attention
from tests.test_convert_models import ROWS, check_row

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
    ("name", "row"),
    [(name, row) for key, row in ROWS.items() if key.startswith("timm `") for name in re.findall("`(.+?)`", key)],
)
def test_a_row_of_the_guides_table(name: str, row: list[str]) -> None:
    depth = {"swin": {"depths": (1, 1, 1, 1)}, "vit_": {"depth": 1}, "beit": {"depth": 1}, "deit": {"depth": 1}}
    check_row(timm.create_model(name, num_classes=10, **depth.get(name[:4], {})), *row[:2])


@pytest.mark.parametrize(("norm", "kind"), [(None, "layer"), ("rmsnorm", "rms")])
def test_norms_of_queries_and_keys_are_carried_over(norm: str | None, kind: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, qk_norm=True, norm_layer=norm).eval()
    old = model.blocks[0].attn
    for part in (old.q_norm, old.k_norm):
        torch.nn.init.uniform_(part.weight)
    report = replace_attention(model)
    new = report.swapped[0].new
    assert (new.qk_norm, new.qk_norm_across) == (kind, "head") and new.q_norm.eps == old.q_norm.eps
    assert torch.equal(new.q_norm.weight, old.q_norm.weight) and torch.equal(new.k_norm.weight, old.k_norm.weight)
    with torch.no_grad():
        assert model(torch.randn(1, *model.default_cfg["input_size"])).isfinite().all()


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "pit_ti_224"])
def test_where_nothing_shows_the_grid_it_is_asked_for(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    with pytest.raises(ValueError, match=r"HW=.* is needed, or dwc_branches=\(\)"):
        replace_attention(model)
    replace_attention(model, dwc_branches=())
    with torch.no_grad():
        assert model.eval()(torch.randn(1, *model.default_cfg["input_size"])).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"), [("crossvit_tiny_240", {}), ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5, "depth": 2})]
)
def test_tokens_that_do_not_make_the_grid_are_told_what_helps(name: str, options: dict[str, float]) -> None:
    model = timm.create_model(name, num_classes=10, **options)
    replace_attention(model)
    with pytest.raises(ValueError, match=r"num_prefix_tokens .*, HW .*dwc_branches=\(\) or exclude"):
        model.train()(torch.randn(1, *model.default_cfg["input_size"]))


def test_a_convit_is_reported_whole() -> None:
    model = timm.create_model("convit_tiny", num_classes=10)
    report = replace_attention(model, num_prefix_tokens=1)
    assert [layer.name for layer in report.swapped] == ["blocks.10.attn", "blocks.11.attn"]
    assert [k.name for k in report.kept] == [f"blocks.{i}.attn" for i in range(10)]


def test_crossvit_has_a_grid_for_each_branch() -> None:
    model = timm.create_model("crossvit_tiny_240", num_classes=10).eval()
    report = replace_attention(model, num_prefix_tokens=1)
    assert {layer.new.grid.source for layer in report.swapped} == {
        f"that of the patches of patch_embed.{i}.proj" for i in (0, 1)
    }
    with torch.no_grad():
        assert model(torch.randn(1, 3, 240, 240)).isfinite().all()
