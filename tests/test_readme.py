"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dydila_kernels import DyDiLAttention

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class TrainedBlock(nn.Module):
    """A block with the attention of timm's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(8, 24), nn.Linear(8, 8)


def test_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([TrainedBlock(), TrainedBlock()])
    old = model.blocks[0].attn.qkv
    namespace: dict[str, Any] = {"model": model}
    for snippet in SNIPPETS:
        exec(snippet, namespace)
    assert len(SNIPPETS) == 2
    assert namespace["y"].shape == (2, 1024, 384)
    assert isinstance(model.blocks[1].attn, DyDiLAttention)
    assert torch.equal(model.blocks[0].attn.qkv.weight, old.weight)
    printed = capsys.readouterr().out
    assert "projection_q" in printed and "measure.gamma" in printed


def test_packed_call_runs() -> None:
    call = re.search(r"`(attn\(packed, .*?\))`\s", README, re.DOTALL)
    assert call is not None
    namespace = {"attn": DyDiLAttention(8), "packed": torch.randn(1, 1024, 8)}
    assert eval(call[1], namespace).shape == (1, 1024, 8)


def test_commands_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}: " in makefile for command in commands)
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in ci and "make lint" in ci
