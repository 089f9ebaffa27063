"""The kernel of the convolution from its branches, and their gradients: as in plain PyTorch, to the bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dydila_kernels import torch_backend
from dydila_kernels.depthwise import DepthwiseConv
from dydila_kernels.ops import backend
from dydila_kernels.ops.autograd import SumOfBranches
from dydila_kernels.types import SIZES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUBSETS = [
    [name for name, takes in zip((*SIZES, "identity"), chosen, strict=True) if takes]
    for chosen in product((True, False), repeat=5)
    if any(chosen[:4])
]


def branches_of(names: list[str], d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {name: torch.randn(d, 1, *SIZES[name], device=DEVICE) for name in names if name in SIZES}
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_equals_plain_pytorch(names: list[str]) -> None:
    for d, dtype in ((5, torch.float32), (300, torch.bfloat16), (256, torch.float16)):
        branches, grad = branches_of(names, d, dtype), torch.randn(d, 1, 3, 3, device=DEVICE)
        results = []
        for taps in (backend.taps, torch_backend.taps):
            total = taps(branches, "identity" in names)
            assert total.shape == (d, 1, 3, 3) and total.dtype == torch.float32
            results.append([total, *torch.autograd.grad(total, list(branches.values()), grad)])
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype and found.is_contiguous() == (found is not results[0][0])
            assert torch.equal(found, expected)


def test_branches_of_several_dtypes_and_strides() -> None:
    branches = branches_of(["3x3", "1x3", "3x1"], 6, torch.float32)
    branches["1x3"] = branches["1x3"].detach().bfloat16().requires_grad_()
    branches["3x1"] = torch.randn(6, 1, 1, 6, device=DEVICE)[..., ::2].mT.requires_grad_()
    grad = torch.randn(6, 1, 3, 3, device=DEVICE).mT
    totals = [taps(branches, False) for taps in (backend.taps, torch_backend.taps)]
    assert torch.equal(*totals)
    gradients = [torch.autograd.grad(total, list(branches.values()), grad) for total in totals]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_module_takes_it_from_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = DepthwiseConv(8, device=DEVICE)
    weight, bias = conv(backend)
    assert bias is None and weight.grad_fn.name() == SumOfBranches.__name__ + "Backward"
    assert torch.allclose(weight, conv()[0])
    with torch.no_grad():
        assert torch.equal(conv(backend)[0], weight)
    assert torch.equal(conv.fuse()(backend)[0], conv.weight)
