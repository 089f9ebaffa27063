"""What the README shows is what runs."""

from __future__ import annotations

import json
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


def test_the_example_takes_the_fused_kernels() -> None:
    """Which are those for heads of up to 128 channels."""
    sizes = re.search(r"DyDiLAttention\(dim=(\d+), num_heads=(\d+)\)", README)
    assert sizes is not None and int(sizes[1]) / int(sizes[2]) <= 128


def test_the_speed_is_that_of_the_committed_rows() -> None:
    path = ROOT / "benchmarks" / "results" / "cpu" / "layer.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times = {
        (row["name"], row["tokens"]): row["median_ms"]
        for row in rows
        if row["heads"] == 6 and row["mode"] == "forward" and row["dim"] == 384
    }
    first, second, third = (f"{times['softmax', n] / times['dydila', n]:.3g}" for n in (1024, 4096, 16384))
    said = re.search(r"<!-- speed:begin -->(.*)<!-- speed:end -->", README)
    assert said is not None
    assert said[1] == f"{first}, {second} and {third} times softmax attention at 1,024, 4,096 and 16,384 tokens"


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
