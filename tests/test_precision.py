"""The 2x rule: in float32, bfloat16 and float16 our error is at most twice that of plain PyTorch in that dtype.

Inputs are rounded to the dtype first, and the routing decisions are ours in all three computations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.testing import (
    Tensors,
    assert_within_twice_plain,
    call_layer,
    cast,
    core_inputs,
    decisions,
    equations,
    layer_inputs,
    output_and_gradients,
    relative_error,
    with_distinct_factors,
)

SEEDS = range(24)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BLOCKS = pytest.mark.parametrize("elements", [2**19, 2**9])


def compare(
    ours: Callable[[Tensors], Tensor], plain: Callable[[Tensors, Tensors], Tensor], runs: list[tuple[Tensors, Tensors]]
) -> None:
    """``runs`` are pairs of inputs and decisions; ``plain`` takes both, and is the oracle for inputs in float64."""
    assert_within_twice_plain(
        [output_and_gradients(ours, inputs) for inputs, _ in runs],
        [output_and_gradients(lambda t, at=at: plain(t, at), inputs) for inputs, at in runs],
        [output_and_gradients(lambda t, at=at: plain(t, at), cast(inputs, torch.float64)) for inputs, at in runs],
    )


def compare_core(dtype: torch.dtype, gamma: tuple[float, float] = (1.0, 4.0), **options: Any) -> None:
    differential = options.get("differential", "token")
    runs = []
    for seed in SEEDS:
        factors = {"num_kernel_factors": 9, "num_differential_factors": 9}
        inputs = core_inputs(2, 48, 24, differential=differential, gamma=gamma, dtype=dtype, seed=seed, **factors)
        runs.append((inputs, decisions(inputs, **options)))
    compare(
        lambda t: dydila_attention(**t, **options),
        lambda t, at: reference.dydila_attention(**t, indices=at, **options),
        runs,
    )


@DTYPES
@BLOCKS
@pytest.mark.parametrize("normalization", ["length", "none", "denominator"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
def test_core(
    dtype: torch.dtype, elements: int, normalization: str, differential: str, block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    compare_core(dtype, num_heads=3, normalization=normalization, differential=differential)


@DTYPES
@BLOCKS
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_core_with_trained_routers(
    dtype: torch.dtype, elements: int, normalization: str, block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    compare_core(dtype, normalization=normalization, router_gradient="straight_through")


@DTYPES
@BLOCKS
@pytest.mark.parametrize("gamma", [(0.5, 1.0), (8.0, 64.0)])
def test_core_with_extreme_factors(
    dtype: torch.dtype, elements: int, gamma: tuple[float, float], block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    compare_core(dtype, gamma)


@DTYPES
@BLOCKS
def test_core_with_a_mask(dtype: torch.dtype, elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    compare_core(dtype, num_heads=3, mask=torch.rand(2, 48) < 0.6)


@DTYPES
@BLOCKS
@pytest.mark.parametrize(
    "configuration",
    [
        {"num_heads": 4},
        {"router_gradient": "straight_through", "num_projectors": 2},
        {"normalization": "denominator", "num_heads": 2, "qkv_bias": True},
        {"differential": "map", "num_heads": 2},
        {"differential": "off"},
    ],
    ids=str,
)
def test_layer(
    dtype: torch.dtype, elements: int, configuration: dict[str, Any], block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    attn = DyDiLAttention(24, dtype=dtype, **configuration)
    runs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        for module in attn.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        with_distinct_factors(attn)
        inputs = layer_inputs(attn, torch.randn(2, 36, 24).to(dtype))
        runs.append(({name: t.clone() for name, t in inputs.items()}, attn.routing(inputs["x"]).indices))
    compare(lambda t: call_layer(attn, t), lambda t, at: equations(attn, t, indices=at), runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_activations_cost_no_more_than_rounding_the_output(dtype: torch.dtype) -> None:
    """Tokens of size 200, whose products pass the range of float16 on the way."""
    inputs = core_inputs(1, 4096, 32, dtype=dtype)
    for name in ("q", "k", "q_redundant", "k_redundant"):
        inputs[name] = inputs[name] * 200
    inputs["v"] = inputs["v"] / 200
    out = dydila_attention(**inputs, num_heads=2)
    at = decisions(inputs, num_heads=2)
    expected = reference.dydila_attention(**cast(inputs, torch.float64), num_heads=2, indices=at)
    assert relative_error(out, expected) < 0.51 * torch.finfo(dtype).eps
