"""What takes a GPU to show: tensors of more than 2^31 elements, and CUDA graphs.

The first test also runs small, anywhere.  Offsets past 2^31 without the memory for it: ``test_core.py``,
``test_projection.py`` and ``test_depthwise.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import relative_error
from tests.markdown import ROOT, named_block
from tests.ops.helpers import DEVICE

RECIPES = ROOT / "docs" / "guides" / "recipes.md"

ROOM = 100 * 2**30
"""Bytes: five tensors of tokens, their gradients, the layer's input, output and what lies between."""


def sizes() -> list[tuple[int, int, int]]:
    """B, side of the square image, d."""
    large = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM
    return [(3, 4, 32), *([(2**31 // (64 * 64 * 512) + 2, 64, 512)] if large else [])]


@pytest.mark.parametrize("size", sizes(), ids=str)
@pytest.mark.parametrize("num_heads", [1, 8])
def test_the_last_image_is_as_it_is_alone(size: tuple[int, int, int], num_heads: int) -> None:
    """Output and gradient, in bfloat16."""
    images, side, dim = size
    torch.manual_seed(0)
    attn = DyDiLAttention(dim, num_heads, backend="triton", device=DEVICE, dtype=torch.bfloat16)
    attn.requires_grad_(False)
    x = torch.randn(images, side * side, dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    found = attn(x)
    (gradient,) = torch.autograd.grad(found, x, found.detach())

    last = x.detach()[-1:].clone().requires_grad_()
    expected = attn(last)
    assert relative_error(found[-1:], expected) < 1e-2
    assert relative_error(gradient[-1:], torch.autograd.grad(expected, last, expected.detach())[0]) < 1e-2
    assert found[:1].ne(0).any() and gradient[:1].isfinite().all()


needs_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def recipe(name: str) -> dict[str, Any]:
    """What a block of the guide leaves behind."""
    namespace: dict[str, Any] = {"torch": torch, "DyDiLAttention": DyDiLAttention}
    exec(compile(named_block(RECIPES, name), str(RECIPES), "exec"), namespace)
    return namespace


class OnGrid(nn.Module):
    """A graph is called with tensors alone: grids and packing are fixed."""

    def __init__(self, attn: DyDiLAttention, **arguments: Any) -> None:
        super().__init__()
        self.attn, self.arguments = attn, arguments

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, mask, **self.arguments)


GRAPHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one head": ({}, {}),
    "heads": ({"num_heads": 8}, {"HW": (8, 32)}),
    "denominator": ({"num_heads": 8, "normalization": "denominator"}, {}),
    "trained routers": ({"num_heads": 8, "router_gradient": "straight_through", "differential": "map"}, {}),
    "mask": ({"num_heads": 8}, {}),
    "packed": ({"num_heads": 8}, {"HW": [(5, 7), (13, 17)], "cu_seqlens": [0, 35, 256]}),
}


@needs_a_gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_a_cuda_graph_replays(name: str) -> None:
    """Forward and backward, for tokens that the capture did not see.

    cuBLAS may choose other algorithms in a capture, hence the tolerance; stale tokens or memory are off by 1.
    """
    configuration, arguments = GRAPHED[name]
    attn = DyDiLAttention(256, backend="triton", device=DEVICE, dtype=torch.bfloat16, **configuration)
    eager = OnGrid(attn, **arguments)
    captured = copy.deepcopy(eager)  # make_graphed_callables changes the module that it is given

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(1 if name == "packed" else 2, 256, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        return (x, torch.rand(x.shape[:2], device=DEVICE) < 0.7) if name == "mask" else (x,)

    graphed = torch.cuda.make_graphed_callables(captured, inputs())
    weights, twins = ([p for p in m.parameters() if p.requires_grad] for m in (eager, graphed))
    for _ in range(2):
        given = inputs()
        found, expected = graphed(*given), eager(*given)
        assert relative_error(found, expected) < 0.05
        incoming = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [given[0], *weights], incoming)
        gradients = torch.autograd.grad(found, [given[0], *twins], incoming)
        assert all(relative_error(f, e) < 0.05 for f, e in zip(gradients, wanted, strict=True))


@needs_a_gpu
def test_a_new_packing_is_not_captured() -> None:
    """Its tables come from the host: an error that says so, and afterwards the layer works."""
    attn = DyDiLAttention(64, backend="triton", device=DEVICE, dtype=torch.bfloat16).fuse()
    x = torch.randn(1, 256, 64, device=DEVICE, dtype=torch.bfloat16)
    attn(x)
    with (
        pytest.raises(RuntimeError, match="call the layer once with this packing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attn(x, HW=[(3, 11), (1, 223)], cu_seqlens=[0, 33, 256])
    assert attn(x, HW=[(3, 11), (1, 223)], cu_seqlens=[0, 33, 256]).isfinite().all()


@needs_a_gpu
def test_the_recipe_of_a_captured_call() -> None:
    left = recipe("cuda-graph")
    torch.cuda.synchronize()
    assert torch.equal(left["x"], left["images"])
    with torch.no_grad():
        expected = left["attn"](left["images"])
    assert relative_error(left["y"], expected) < 1e-2


@needs_a_gpu
def test_the_recipe_of_captured_training() -> None:
    attn = recipe("cuda-training")["attn"]
    for name, parameter in attn.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert attn.qkv.weight.grad.any()


@needs_a_gpu
@pytest.mark.slow
def test_the_recipe_of_a_compiled_graph() -> None:
    torch._dynamo.reset()
    left = recipe("cuda-compile")
    with torch.no_grad():
        assert relative_error(left["y"], left["attn"](left["x"])) < 1e-2
