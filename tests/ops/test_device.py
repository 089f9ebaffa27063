"""What takes a GPU to show: tensors of more than 2^31 elements, and CUDA graphs.

The first test also runs small, anywhere.  Offsets past 2^31 without the memory for it: ``test_core.py``,
``test_projection.py`` and ``test_depthwise.py``.
"""

from __future__ import annotations

import pytest
import torch

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import relative_error
from tests.ops.helpers import DEVICE

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


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("num_heads", [1, 8])
def test_a_cuda_graph_replays(num_heads: int) -> None:
    """Forward and backward: nothing waits for the device, and memory is where it was."""
    attn = DyDiLAttention(256, num_heads, backend="triton", device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(attn, (x,))
    for _ in range(2):
        other = torch.randn_like(x).requires_grad_()
        found, expected = graphed(other), attn(other)
        assert torch.equal(found, expected)
        (gradient,) = torch.autograd.grad(expected, other, expected.detach())
        assert torch.equal(torch.autograd.grad(found, other, expected.detach())[0], gradient)
