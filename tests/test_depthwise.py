"""Eq. 9 of the torch backend and the module that owns the branches, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dydila_kernels import reference, torch_backend
from dydila_kernels.depthwise import DepthwiseConv
from dydila_kernels.testing import Tensors, assert_agree, output_and_gradients, relative_error
from dydila_kernels.types import Convolution, Grid

GRIDS = [Grid(2, 5, 3), Grid(17, 1, 4), Grid(23, 4, 1)]
LENGTH = 27
"""Prefix tokens at 0, 1, 21 and 22 belong to no grid."""


def expected_of(t: Tensors) -> Tensor:
    out = t["out"].clone()
    for grid in GRIDS:
        inside = slice(grid.start, grid.stop)
        image = reference.depthwise(t["v"][:, inside], t["weight"], t.get("bias"), (grid.rows, grid.columns))
        out[:, inside] = out[:, inside] + image
    return out


@pytest.mark.parametrize("elements", [2**19, 16, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(elements: int, bias: bool, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    inputs = {
        "out": torch.randn(2, LENGTH, 4, dtype=torch.float64),
        "v": torch.randn(2, LENGTH, 4, dtype=torch.float64),
        "weight": torch.randn(4, 1, 3, 3, dtype=torch.float64),
    }
    if bias:
        inputs["bias"] = torch.randn(4, dtype=torch.float64)

    def convolve(t: Tensors) -> Tensor:
        return torch_backend.depthwise(t["out"] * 1, t["v"], Convolution(t["weight"], t.get("bias"), GRIDS))

    assert_agree(output_and_gradients(convolve, inputs), output_and_gradients(expected_of, inputs))


@pytest.mark.parametrize("branches", [("3x3",), ("1x3", "3x1"), ("3x3", "1x3", "3x1", "1x1", "identity")])
@pytest.mark.parametrize("bias", [False, True])
def test_module_and_its_fused_form(branches: tuple[str, ...], bias: bool) -> None:
    module = DepthwiseConv(4, branches, bias=bias, dtype=torch.float64)
    if module.bias is not None:
        torch.nn.init.normal_(module.bias)
    v, out = torch.randn(2, LENGTH, 4, dtype=torch.float64), torch.randn(2, LENGTH, 4, dtype=torch.float64)
    weight, offset = module.fused_weight()
    tensors = {"out": out, "v": v, "weight": weight, **({} if offset is None else {"bias": offset})}
    expected = expected_of(tensors)
    assert relative_error(torch_backend.depthwise(out.clone(), v, Convolution(*module(), GRIDS)), expected) < 1e-14
    fused = Convolution(*module.fuse()(), GRIDS)
    assert relative_error(torch_backend.depthwise(out.clone(), v, fused), expected) < 1e-14
    assert not list(module.branches) and module.fuse() is module


@pytest.mark.parametrize("branches", [(), ("identity",), ("3x3", "3x3"), ("2x2",)])
def test_bad_branches(branches: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="branches"):
        DepthwiseConv(4, branches)
