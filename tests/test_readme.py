"""What the README shows is what runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dydila_kernels import DyDiLAttention
from tests.markdown import ROOT, execute, snippets

README = (ROOT / "README.md").read_text(encoding="utf-8")


class Attention(nn.Module):
    """The structure of timm's."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()


def test_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Module()
    model.patch_embed = nn.Conv2d(3, 8, 2, 2)
    model.blocks = nn.ModuleList([Block(), Block()])
    old = model.blocks[0].attn
    namespace: dict[str, Any] = {"model": model}
    execute(ROOT / "README.md", namespace)
    assert len(snippets(ROOT / "README.md")) == 2
    assert namespace["y"].shape == (2, 1024, 384)
    first, _ = namespace["report"].swapped
    assert first.name == "blocks.0.attn" and torch.equal(first.new.qkv.weight, old.qkv.weight)
    assert model.blocks[0].attn is old
    assert "blocks.1.attn  Attention  d = 8, H = 2" in capsys.readouterr().out


def test_packed_call_runs() -> None:
    call = re.search(r"`(attn\(packed, .*?\))`\s", README, re.DOTALL)
    assert call is not None
    namespace = {"attn": DyDiLAttention(8), "packed": torch.randn(1, 1024, 8)}
    assert eval(call[1], namespace).shape == (1, 1024, 8)


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}: " in makefile for command in commands)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci and "make lint" in ci
