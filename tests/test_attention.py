"""The layer against its equations: outputs and the gradients of the input and of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import (
    assert_agree,
    call_layer,
    equations,
    layer_inputs,
    output_and_gradients,
    relative_error,
    with_distinct_factors,
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "heads": {"num_heads": 4},
    "no normalisation": {"normalization": "none", "num_heads": 2},
    "denominator": {"normalization": "denominator", "num_heads": 2},
    "trained routers": {"router_gradient": "straight_through", "num_heads": 2},
    "map": {"differential": "map", "num_heads": 2},
    "map, denominator, trained routers": {
        "differential": "map",
        "normalization": "denominator",
        "router_gradient": "straight_through",
    },
    "off": {"differential": "off", "router_gradient": "straight_through", "num_heads": 2},
    "off, shared projections alone": {"differential": "off", "num_projectors": 0},
    "one of everything": {"num_projectors": 1, "num_kernel_factors": 1, "num_differential_factors": 1},
    "biases": {"qkv_bias": True, "proj_bias": False},
    "all branches": {"dwc_branches": ("3x3", "1x3", "3x1", "1x1", "identity")},
    "one branch and identity": {"dwc_branches": ("1x1", "identity")},
    "no convolution": {"dwc_branches": ()},
    "prefix tokens": {"num_prefix_tokens": 2, "num_heads": 2},
    "large factors": {"gamma_init": 16.0, "lambda_init": -0.7, "normalization": "denominator"},
}


def layer_of(configuration: dict[str, Any]) -> DyDiLAttention:
    return with_distinct_factors(DyDiLAttention(8, **configuration, dtype=torch.float64))


def trainable(attn: DyDiLAttention) -> list[str]:
    return ["x", *(name for name, parameter in attn.named_parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("elements", [2**19, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_its_equations(name: str, masked: bool, elements: int, block_of: Callable[[int], None]) -> None:
    """With gradients, under no_grad and in inference mode, on a grid that is not square."""
    block_of(elements)
    attn = layer_of(CONFIGURATIONS[name])
    length = 12 + attn.num_prefix_tokens
    inputs = layer_inputs(attn, torch.randn(2, length, 8, dtype=torch.float64))
    arguments: dict[str, Any] = {"HW": (3, 4), "mask": torch.rand(2, length) < 0.7 if masked else None}

    expected = output_and_gradients(lambda t: equations(attn, t, **arguments), inputs, trainable(attn))
    assert_agree(output_and_gradients(lambda t: call_layer(attn, t, **arguments), inputs, trainable(attn)), expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert relative_error(attn(inputs["x"], **arguments), expected["output"]) <= 1e-12


def test_backward_reaches_every_trainable_parameter_and_no_router() -> None:
    attn = layer_of({"num_projectors": 2, "num_kernel_factors": 2, "num_differential_factors": 2})
    attn(torch.randn(4, 16, 8, dtype=torch.float64)).square().sum().backward()
    for name, parameter in attn.named_parameters():
        assert ("router" in name) == (parameter.grad is None), name
        assert "router" in name or (parameter.grad is not None and parameter.grad.any()), name


def test_a_projector_without_tokens_gets_a_zero_gradient() -> None:
    """Not None: data-parallel training waits for the gradient of every parameter."""
    attn = layer_of({"num_projectors": 3})
    assert attn.projection_q is not None
    with torch.no_grad():
        attn.projection_q.router.copy_(torch.tensor([0.0, 1.0, -1.0]).expand(8, 3))
    attn(torch.rand(1, 9, 8, dtype=torch.float64) + 0.1).sum().backward()
    gradient = attn.projection_q.weight.grad
    assert gradient is not None and gradient[1].any() and not gradient[0].any() and not gradient[2].any()


def test_none_is_a_square_grid() -> None:
    attn = layer_of({})
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    assert torch.equal(attn(x), attn(x, HW=(4, 4)))
    assert relative_error(attn(x, HW=(2, 8)), attn(x)) > 1e-3


def test_prefix_tokens_attend_and_the_convolution_skips_them() -> None:
    attn, plain = layer_of({"num_prefix_tokens": 3}), layer_of({"dwc_branches": ()})
    plain.load_state_dict(attn.state_dict(), strict=False)
    x = torch.randn(2, 3 + 16, 8, dtype=torch.float64)
    assert relative_error(attn(x)[:, :3], plain(x)[:, :3]) < 1e-14
    assert relative_error(attn(x)[:, 3:], plain(x)[:, 3:]) > 1e-3
    changed = x.clone()
    changed[:, 0] += 1
    assert (attn(changed) - attn(x))[:, 3:].abs().amin() > 0


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("normalization", ["length", "none", "denominator"])
def test_empty_and_single_token_images(batch: int, side: int, normalization: str) -> None:
    attn = layer_of({"normalization": normalization, "router_gradient": "straight_through"})
    inputs = layer_inputs(attn, torch.randn(batch, side * side, 8, dtype=torch.float64))
    expected = output_and_gradients(lambda t: equations(attn, t), inputs)
    assert_agree(output_and_gradients(lambda t: call_layer(attn, t), inputs), expected)


def test_dropout_is_on_the_output_and_only_in_training() -> None:
    attn = layer_of({"proj_drop": 0.5})
    x = torch.randn(1, 64, 8, dtype=torch.float64)
    expected = attn.eval()(x)
    dropped = attn.train()(x)
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    assert relative_error(dropped[kept], 2 * expected[kept]) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_linear(dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    out = DyDiLAttention(8, dtype=dtype)(x)
    assert out.dtype == nn.Linear(8, 8, dtype=dtype)(x).dtype == dtype
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_behaves_as_linear_does(autocast: torch.dtype, dtype: torch.dtype) -> None:
    attn = DyDiLAttention(8, num_heads=2)
    x = torch.randn(2, 16, 8).to(dtype)
    with torch.autocast("cpu", autocast):
        out = attn(x)
        assert out.dtype == attn.proj(x).dtype == autocast
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in attn.parameters() if p.requires_grad)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_repeats_are_equal_to_the_bit(num_heads: int, block_of: Callable[[int], None]) -> None:
    block_of(8 * 24)
    attn = DyDiLAttention(8, num_heads, router_gradient="straight_through")
    inputs = layer_inputs(attn, torch.randn(3, 36, 8))
    first, second = (output_and_gradients(lambda t: call_layer(attn, t), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_repr_tells_the_configuration() -> None:
    attn = DyDiLAttention(
        24,
        3,
        num_projectors=5,
        num_kernel_factors=7,
        num_differential_factors=11,
        normalization="denominator",
        router_gradient="straight_through",
        differential="map",
        dwc_branches=("3x3", "identity"),
        num_prefix_tokens=2,
        backend="torch",
    )
    text = repr(attn)
    for part in ("24", "num_heads=3", "num_projectors=5", "num_factors=7", "num_factors=11", "'denominator'"):
        assert part in text, part
    for part in ("'straight_through'", "'map'", "('3x3', 'identity')", "num_prefix_tokens=2", "backend='torch'"):
        assert part in text, part
    assert "fused" not in text and "fused" in repr(attn.fuse())


def test_a_graph_can_be_walked_twice(block_of: Callable[[int], None]) -> None:
    block_of(40)
    attn = layer_of({"router_gradient": "straight_through"})
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    loss, parameters = attn(x).square().sum(), [x, *attn.parameters()]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))
