"""LoRA by peft on a swapped model: how its new layers are targeted, trained, saved and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dydila_kernels import DyDiLAttention, ReplacementReport, replace_attention
from tests.models import ViT, call, image, random_convolutions, sana, unet

peft = pytest.importorskip("peft", reason="its Python packages are pinned from 3.11 on")


def swapped(build: Callable[[], nn.Module]) -> tuple[nn.Module, ReplacementReport]:
    torch.manual_seed(0)
    model = build()
    report = replace_attention(model)
    random_convolutions(model)
    return model, report


@pytest.mark.parametrize("build", [ViT, sana, unet])
def test_the_linears_of_the_new_layers_are_targets(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, report = swapped(build)
    x = image(model, 4, 16)
    before = call(model.eval(), x)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in report.linears)
    config = peft.LoraConfig(r=4, target_modules=report.linears)
    tuned = peft.get_peft_model(model, config)
    assert set(tuned.targeted_module_names) == set(report.linears)
    assert torch.equal(call(model, x), before)  # LoRA starts at zero

    trainable = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(report.linears) and all("lora_" in name for name in trainable)
    target = torch.randn_like(before)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (call(model, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.any() for p in trainable.values())
    assert losses[-1] < losses[0]

    after = call(model, x)
    with torch.no_grad():
        torch.testing.assert_close(call(model, x), after, rtol=1e-4, atol=1e-4)  # the inference path has it, too
    assert (after - before).abs().max() > 1e-2
    tuned.save_pretrained(tmp_path)
    fresh, _ = swapped(build)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(call(fresh.eval(), x), after)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(call(merged, x), after, rtol=1e-4, atol=1e-4)


def test_the_new_parameters_may_be_trained_beside_lora() -> None:
    """peft freezes them, and they have learned nothing yet."""
    model, report = swapped(sana)
    trainable = [n for n in report.new_parameters if model.get_parameter(n).requires_grad]
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=report.linears))
    assert trainable and not any(model.get_parameter(name).requires_grad for name in report.new_parameters)
    for name in trainable:
        model.get_parameter(name).requires_grad_()
    call(model, image(model, 4, 16)).square().mean().backward()
    assert all(model.get_parameter(name).grad is not None for name in trainable)


def test_the_names_of_the_old_projections_miss_the_new_layers() -> None:
    """Without an error where cross-attention still has them, which is why the guide says how to name the new ones."""
    model, report = swapped(sana)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert tuned.targeted_module_names
    assert not any(name.startswith(layer.name) for name in tuned.targeted_module_names for layer in report.swapped)


def test_layers_with_lora_are_kept_when_swapping_comes_second() -> None:
    model = ViT()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["blocks.0.attn.qkv"]), model)
    report = replace_attention(model)
    assert [layer.name for layer in report.swapped] == ["blocks.1.attn"]
    assert [k.name for k in report.kept] == ["blocks.0.attn"]
    assert "qkv is not an nn.Linear" in report.kept[0].reason
    assert not isinstance(model.blocks[0].attn, DyDiLAttention)
