"""Each row of the guide's table of models: what is swapped, what is kept and why, how near the new layers start."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from dydila_kernels import replace_attention
from dydila_kernels.testing import relative_error
from tests.markdown import ROOT, table
from tests.zoo import MODELS

GUIDE = ROOT / "docs" / "guides" / "replace_attention.md"
ROWS = table(GUIDE, "model")


def of(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob.strip("`"))


def check_row(model: nn.Module, swapped: str, kept: str) -> None:
    """What a swap reports is what the cells say; each glob and each reason of theirs stands for something."""
    if swapped == "-":
        with pytest.raises(ValueError, match="no self-attention that can be swapped") as error:
            replace_attention(model)
        found = [line.split(None, 1) for line in str(error.value).splitlines()[1:]]
    else:
        report = replace_attention(model)
        assert all(of(swapped, layer.name) for layer in report.swapped)
        assert not any(of(swapped, k.name) for k in report.kept)
        found = [[k.name, k.reason] for k in report.kept]
    cells = [cell.partition(": ") for cell in kept.split("; ") if cell]
    for name, reason in found:
        assert any(of(glob, name) and part in reason for glob, _, part in cells), (name, reason)
    for glob, _, part in cells:
        assert any(of(glob, name) and part in reason for name, reason in found), (glob, part)


def test_the_table_has_every_model_that_is_tried_here() -> None:
    assert {name for name in ROWS if not name.startswith("timm `")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_the_table(name: str) -> None:
    swapped, kept, start = ROWS[name]
    model = MODELS[name].make().eval()
    check_row(model, swapped, kept)
    if swapped == "-":
        assert not start
        return
    fresh, x = MODELS[name].make().eval(), MODELS[name].latents()
    with torch.no_grad():
        before = MODELS[name].run(fresh, x)
        for lambda_init, bound in ((0.0, 2e-6), (0.001, 0.05)):
            report = replace_attention(fresh, lambda_init=lambda_init)
            error = relative_error(MODELS[name].run(fresh, x), before)
            if start == "the old output":
                assert error < bound, (lambda_init, error)
            else:
                assert start == "another function" and error > 1e-3
            report.undo()
        assert torch.equal(MODELS[name].run(fresh, x), before)


@pytest.mark.parametrize("name", [f"diffusers `SanaTransformer2DModel`, Sana 1.{n}" for n in (0, 5)])
def test_a_swapped_sana_is_the_old_one_to_rounding_in_float64(name: str) -> None:
    """Its own products are in float32, so that the layers are nearer than what it computes."""
    model, x = MODELS[name].make().eval(), MODELS[name].latents()
    with torch.no_grad():
        before = MODELS[name].run(model.double(), x.double())
        replace_attention(model, lambda_init=0.0)
        assert relative_error(MODELS[name].run(model, x.double()), before) < 1e-6
