"""Eqs. 1-2 of the torch backend and the module that owns the projectors, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from dydila_kernels import DyDiLAttention, reference, torch_backend
from dydila_kernels.projection import DynamicProjection
from dydila_kernels.testing import assert_agree, output_and_gradients, relative_error

blocks = pytest.mark.parametrize("elements", [2**19, 40, 8])


@blocks
@pytest.mark.parametrize("choices", [1, 3, 7])
def test_equals_the_reference(elements: int, choices: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    inputs = {
        "x": torch.randn(2, 9, 8, dtype=torch.float64),
        "weight": torch.randn(choices, 8, 8, dtype=torch.float64),
        "router": torch.randn(8, choices, dtype=torch.float64),
    }
    index = reference.route(inputs["x"], inputs["router"])
    logits = torch_backend.projection_logits(inputs["x"], inputs["router"])
    assert relative_error(logits, inputs["x"] @ inputs["router"]) < 1e-14 and torch.equal(logits.argmax(-1), index)

    found = output_and_gradients(lambda t: torch_backend.project(t["x"], t["weight"], index), inputs)
    assert_agree(found, output_and_gradients(lambda t: reference.project(t["x"], t["weight"], index), inputs))

    found = output_and_gradients(
        lambda t: torch_backend.straight_through(
            torch_backend.project(t["x"], t["weight"], index),
            torch_backend.projection_logits(t["x"], t["router"]),
            index,
        ),
        inputs,
    )
    expected = output_and_gradients(
        lambda t: (
            reference.project(t["x"], t["weight"], index) * reference.straight_through_one(t["x"] @ t["router"], index)
        ),
        inputs,
    )
    if choices == 1:  # a softmax of one has no gradient, so what is left is rounding
        assert not found.pop("router").any() and expected.pop("router").abs().max() < 1e-12
    assert_agree(found, expected)


@blocks
def test_module(elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    outs = []
    for trainable in (False, True):
        torch.manual_seed(1)
        module = DynamicProjection(8, 3, trainable_routers=trainable, dtype=torch.float64)
        outs.append(module(x))
        module(x).sum().backward()
        assert (module.router.grad is not None) == trainable
    assert torch.equal(*outs)
    assert relative_error(outs[0], reference.project(x, module.weight, reference.route(x, module.router))) < 1e-14


def test_routers_decide_in_float32_whatever_the_tokens() -> None:
    x, router = torch.randn(4, 64, 32).bfloat16(), torch.randn(32, 5)
    assert relative_error(torch_backend.projection_logits(x, router), x.double() @ router.double()) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch_backend.projection_logits(x.float(), router)
    assert logits.dtype == torch.float32 and relative_error(logits, x.double() @ router.double()) < 1e-6


def test_no_tokens_give_a_trained_router_a_zero_gradient() -> None:
    """DDP waits for one from every rank."""
    projection = DynamicProjection(8, 3, trainable_routers=True)
    projection(torch.zeros(2, 0, 8)).sum().backward()
    assert projection.router.grad is not None and not projection.router.grad.any()
    assert projection.weight.grad is not None and not projection.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    """What a tracer sees: fakes, gradients and strides, as torch's own check asks."""
    x = torch.randn(2, 7, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    index = torch.randint(3, (2, 7))
    opcheck(torch.ops.dydila_kernels.grouped_projection, (x, weight, index))
    opcheck(torch.ops.dydila_kernels.grouped_projection, (x.mT.contiguous().mT, weight[..., :4], index))
    grad = torch.randn(2, 7, 5, dtype=dtype)
    opcheck(torch.ops.dydila_kernels.grouped_projection_backward, (grad, x.detach(), weight.detach(), index))


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_is_the_function_to_the_bit(training: bool) -> None:
    x, weight = torch.randn(2, 50, 8), torch.randn(4, 8, 6)
    index = torch.randint(3, (2, 50))  # the last projector has no token
    results = []
    for function in (torch_backend.project, torch.ops.dydila_kernels.grouped_projection):
        leaves = [t.clone().requires_grad_(training) for t in (x, weight)]
        out = function(*leaves, index)
        results.append([out, *(torch.autograd.grad(out.square().sum(), leaves) if training else ())])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_fake_tensors(trainable: bool) -> None:
    """Shapes of a layer and of its gradients for tensors without numbers, as tools that estimate memory ask."""
    gradient = "straight_through" if trainable else "none"
    with FakeTensorMode():
        attn = DyDiLAttention(8, num_heads=2, router_gradient=gradient)
        x = torch.randn(2, 9, 8, requires_grad=True)
        out = attn(x)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        with torch.no_grad():
            assert attn(x).shape == x.shape
