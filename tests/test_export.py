"""torch.export for images of any size, files of programs, the compiled package, and what refuses to be traced."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.testing import core_inputs, relative_error, with_distinct_factors
from tests.markdown import ROOT, named_block, snippets

SIZES = [(1, 4, 6), (3, 5, 7), (2, 8, 1)]


class OnImage(nn.Module):
    """Takes (B, rows, columns, d), so that the grid is known from a shape."""

    def __init__(self, attn: DyDiLAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), HW=x.shape[1:3]).view(x.shape)


@pytest.mark.parametrize(
    ("configuration", "fused", "strict"),
    [
        ({"num_heads": 2}, False, False),
        ({"router_gradient": "straight_through", "normalization": "denominator", "qkv_bias": True}, True, True),
    ],
    ids=str,
)
def test_an_exported_layer_takes_images_of_any_size(
    configuration: dict[str, Any], fused: bool, strict: bool, tmp_path: Path
) -> None:
    """And so does the program once it was saved and loaded."""
    attn = with_distinct_factors(DyDiLAttention(8, **configuration)).eval()
    model = OnImage(attn.fuse() if fused else attn)
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    program = torch.export.export(model, (torch.randn(2, 3, 5, 8),), dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2")
    for call in (program.module(), loaded.module()):
        for size in SIZES:
            x = torch.randn(*size, 8)
            assert relative_error(call(x), model(x)) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_the_call_of_the_convolution_may_be_preserved() -> None:
    """Its arguments then are a part of the program: tensors and numbers, and no module of ours."""
    attn, x = DyDiLAttention(8).eval(), torch.randn(1, 9, 8)
    program = torch.export.export(attn, (x,), strict=False, preserve_module_call_signature=("dwc",))
    assert relative_error(program.module()(x), attn(x)) < 1e-5


def test_the_recipe_of_a_compiled_package(tmp_path: Path) -> None:
    """As the guide has it: its beginning, the export, the package."""
    page = ROOT / "docs" / "guides" / "recipes.md"
    (fused,) = [line for code in snippets(page) for line in code.splitlines() if line.startswith("fused = ")]
    (exported,) = [code for code in snippets(page) if "torch.export.save" in code]
    script = "\n".join([snippets(page)[0], fused, exported, named_block(page, "aoti")])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "compiled.pt2").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["layer", "core"])
def test_tracing_is_a_clear_error(part: str) -> None:
    """It would run, and record the routing of the example."""
    inputs = core_inputs(1, 4, 8)
    x, call = (torch.randn(1, 4, 8), DyDiLAttention(8)) if part == "layer" else (
        inputs.pop("q"), lambda q: dydila_attention(q, **inputs))  # fmt: skip
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.jit\.trace is not supported.*torch\.export"):
        torch.jit.trace(call, (x,))
