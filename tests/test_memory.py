"""Nothing as long as the sequence is allocated but the results, whatever the strides of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dydila_kernels import DyDiLAttention, dydila_attention, torch_backend
from dydila_kernels.testing import TOKENS, core_inputs
from dydila_kernels.torch_backend import blocks
from dydila_kernels.types import Convolution, Grid

ELEMENTS = 2**11
LENGTH, DIM = 8192, 32
WHOLE = LENGTH * DIM * 4
"""Bytes of a (1, N, d) matrix in float32, which is 128 blocks."""
SLACK = 48 * ELEMENTS * 4 + 16 * LENGTH
"""48 blocks for temporaries, and 16 bytes a token for routing decisions."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are alive; ``peak`` is the most there were at a time."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak(function: Callable[[], object], known: list[Tensor]) -> int:
    with Allocations(known) as allocations:
        function()
    return allocations.peak


def strided(layout: str, t: Tensor) -> Tensor:
    return {
        "contiguous": t,
        "transposed": t.mT.contiguous().mT,
        "sliced": torch.cat([t, t], -1)[..., DIM // 2 : -DIM // 2],
        "expanded": t[:, :1].expand_as(t),
    }[layout]


layouts = pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])


@pytest.fixture(autouse=True)
def small_blocks(block_of: Callable[[int], None]) -> None:
    block_of(ELEMENTS)
    blocks.idle.stack.clear()  # which counts where it is made, and may be that of larger blocks


def test_the_count_sees_a_copy() -> None:
    t = torch.zeros(1, LENGTH, DIM)
    assert peak(lambda: t.mT.contiguous().mT.exp(), [t]) == 2 * WHOLE
    assert peak(lambda: [t[:, n : n + 64].exp() for n in range(0, LENGTH, 64)][:0], [t]) <= WHOLE
    assert peak(lambda: sum(t[:, n].sum() for n in range(8)), [t]) < 1024


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_core_without_gradients(layout: str, dtype: torch.dtype, normalization: str) -> None:
    """The output and blocks; in bfloat16 also no float32 copy."""
    inputs = core_inputs(1, LENGTH, DIM, dtype=dtype)
    inputs.update({name: strided(layout, inputs[name]) for name in TOKENS})
    mask = torch.arange(LENGTH)[None] % 5 != 0
    options: dict[str, Any] = {"num_heads": 2, "normalization": normalization, "mask": mask}
    with torch.no_grad():
        used = peak(lambda: dydila_attention(**inputs, **options), list(inputs.values()))
    assert used <= WHOLE * dtype.itemsize // 4 + SLACK


@layouts
def test_core_backward(layout: str) -> None:
    """The output, five gradients, and blocks."""
    inputs = core_inputs(1, LENGTH, DIM, dtype=torch.float32)
    leaves = [strided(layout, inputs[name]).detach().requires_grad_() for name in TOKENS]
    inputs.update(zip(TOKENS, leaves, strict=True))
    incoming = torch.randn(1, LENGTH, DIM)

    def step() -> None:
        torch.autograd.grad(dydila_attention(**inputs, num_heads=2), leaves, incoming)

    assert peak(step, [*inputs.values(), incoming]) <= 6 * WHOLE + SLACK


@layouts
@pytest.mark.parametrize("stage", ["projection", "depthwise"])
def test_stages_without_gradients(layout: str, stage: str) -> None:
    x = strided(layout, torch.randn(1, LENGTH, DIM))
    weight, router = torch.randn(3, DIM, DIM), torch.randn(DIM, 3)
    kernel, out = torch.randn(DIM, 1, 3, 3), torch.zeros(1, LENGTH, DIM)
    index = torch_backend.projection_logits(x, router).argmax(-1)
    grids = [Grid(0, LENGTH // 16, 16)]
    functions: dict[str, tuple[Callable[[], Tensor], int]] = {
        "projection": (lambda: torch_backend.project(x, weight, index), WHOLE),
        "depthwise": (lambda: torch_backend.depthwise(out, x, Convolution(kernel, None, grids)), 0),
    }
    function, allowed = functions[stage]
    with torch.no_grad():
        assert peak(function, [x, weight, index, kernel, out]) <= allowed + SLACK


@layouts
@pytest.mark.parametrize("num_heads", [1, 2])
def test_layer_without_gradients(layout: str, num_heads: int) -> None:
    """The output and blocks."""
    attn = DyDiLAttention(DIM, num_heads)
    x = strided(layout, torch.randn(1, LENGTH, DIM))
    with torch.no_grad():
        used = peak(lambda: attn(x, HW=(LENGTH // 16, 16)), [x, *attn.parameters()])
    assert used <= WHOLE + SLACK
