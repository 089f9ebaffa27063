"""Images of different sizes packed in one row equal the images one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.testing import (
    assert_agree,
    call_layer,
    core_inputs,
    layer_inputs,
    output_and_gradients,
    with_distinct_factors,
)

GRIDS = [(3, 4), (1, 1), (5, 2), (2, 2)]


def bounds_of(prefix: int, grids: list[tuple[int, int]]) -> list[int]:
    bounds = [0]
    for rows, columns in grids:
        bounds.append(bounds[-1] + prefix + rows * columns)
    return bounds


@pytest.mark.parametrize("elements", [2**19, 8 * 5])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"num_heads": 2, "normalization": "denominator", "router_gradient": "straight_through"},
        {"normalization": "none", "differential": "map"},
        {"differential": "off", "dwc_branches": ()},
    ],
    ids=str,
)
def test_layer(configuration: dict[str, Any], prefix: int, elements: int, block_of: Callable[[int], None]) -> None:
    """Outputs and all gradients, convolution and prefix tokens included."""
    block_of(elements)
    attn = DyDiLAttention(8, num_prefix_tokens=prefix, **configuration, dtype=torch.float64)
    with_distinct_factors(attn)
    bounds = bounds_of(prefix, GRIDS)
    inputs = layer_inputs(attn, torch.randn(1, bounds[-1], 8, dtype=torch.float64))

    def one_by_one(t: dict[str, torch.Tensor]) -> torch.Tensor:
        images = [
            call_layer(attn, {**t, "x": t["x"][:, start:stop]}, HW=grid)
            for start, stop, grid in zip(bounds[:-1], bounds[1:], GRIDS, strict=True)
        ]
        return torch.cat(images, 1)

    packed = output_and_gradients(lambda t: call_layer(attn, t, HW=GRIDS, cu_seqlens=bounds), inputs)
    assert_agree(packed, output_and_gradients(one_by_one, inputs))
    for as_tensor in (torch.tensor(bounds), torch.tensor(bounds, dtype=torch.int32)):
        assert torch.equal(attn(inputs["x"], HW=GRIDS, cu_seqlens=as_tensor), packed["output"])


def test_square_images_need_no_grids() -> None:
    attn = DyDiLAttention(8, num_prefix_tokens=1)
    x = torch.randn(1, 5 + 10 + 1, 8)
    expected = attn(x, HW=[(2, 2), (3, 3), (0, 0)], cu_seqlens=[0, 5, 15, 16])
    assert torch.equal(attn(x, cu_seqlens=[0, 5, 15, 16]), expected)


@pytest.mark.parametrize("under_grad", [True, False])
def test_an_image_without_tokens(under_grad: bool) -> None:
    attn = DyDiLAttention(8)
    x = torch.randn(1, 13, 8)
    with torch.set_grad_enabled(under_grad):
        assert torch.equal(attn(x, cu_seqlens=[0, 0, 4, 4, 13, 13]), attn(x, cu_seqlens=[0, 4, 13]))
        assert attn(x[:, :0], cu_seqlens=[0, 0]).shape == (1, 0, 8)


def test_an_image_without_tokens_under_a_transform() -> None:
    attn = DyDiLAttention(8, dtype=torch.float64)
    x = torch.randn(1, 13, 8, dtype=torch.float64)

    def call(x: torch.Tensor) -> torch.Tensor:
        return attn(x, cu_seqlens=[0, 4, 4, 13])

    out, _ = torch.func.jvp(call, (x,), (x,))
    assert (out - call(x)).norm() / out.norm() < 1e-12


def test_a_mask_beside_it_is_ignored_with_a_warning() -> None:
    attn, x = DyDiLAttention(8), torch.randn(1, 13, 8)
    mask = torch.zeros(1, 13, dtype=torch.bool)
    with pytest.warns(UserWarning, match="mask is ignored where cu_seqlens is given") as caught:
        out = attn(x, mask, cu_seqlens=[0, 4, 13])
    assert len(caught) == 1
    assert torch.equal(out, attn(x, cu_seqlens=[0, 4, 13]))

    inputs = core_inputs(1, 13, 8)
    with pytest.warns(UserWarning, match="mask is ignored"):
        packed = dydila_attention(**inputs, mask=mask, cu_seqlens=[0, 4, 13])
    assert torch.equal(packed, dydila_attention(**inputs, cu_seqlens=[0, 4, 13]))
