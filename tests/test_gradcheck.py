"""float64 finite differences of every differentiable piece, away from routing ties and the kink of ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dydila_kernels import dydila_attention, reference, torch_backend
from dydila_kernels.testing import away_from_kinks, core_inputs
from dydila_kernels.types import Convolution, Grid

NORMALIZATIONS = ["length", "none", "denominator"]
DIFFERENTIALS = ["token", "map", "off"]


def normal(*shape: int) -> Tensor:
    """Entries at least 0.2 away from zero."""
    t = torch.randn(shape, dtype=torch.float64)
    return (t + 0.2 * t.sign()).requires_grad_()


def core(function: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
    """The core as a function of its differentiable tensors, and these: all but the routers, which have none."""
    inputs = away_from_kinks(core_inputs(1, 4, 4, differential=options.get("differential", "token"), seed=3))
    names = [name for name in inputs if "routers" not in name]
    leaves = [inputs[name].requires_grad_() for name in names]
    return lambda *tensors: function(**{**inputs, **dict(zip(names, tensors, strict=True))}, **options), leaves


def test_reference_power() -> None:
    tokens, gamma = normal(3, 4), torch.tensor([0.7, 1.0, 3.0]).double().requires_grad_()
    assert gradcheck(reference.power, (tokens, gamma))
    assert gradgradcheck(reference.power, (tokens, gamma))


def test_reference_choose() -> None:
    index = torch.tensor([[0, 2, 2], [1, 0, 2]])
    assert gradcheck(lambda table: reference.choose(table, index), normal(3))


def test_reference_project() -> None:
    index = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert gradcheck(lambda x, weight: reference.project(x, weight, index), (normal(2, 3, 4), normal(2, 4, 4)))


def test_routed_projection(block_of: Callable[[int], None]) -> None:
    block_of(8)
    index = torch.tensor([[0, 1, 1], [1, 0, 1]])
    tensors = (normal(2, 3, 4), normal(3, 4, 4))
    assert gradcheck(lambda x, weight: torch_backend.project(x, weight, index), tensors)
    assert gradgradcheck(lambda x, weight: torch_backend.project(x, weight, index), tensors)


def test_projection_logits(block_of: Callable[[int], None]) -> None:
    block_of(8)
    assert gradcheck(torch_backend.projection_logits, (normal(2, 3, 4), normal(4, 3)))


def test_reference_difference() -> None:
    assert gradcheck(reference.difference, (normal(2, 3, 4), normal(2, 3, 4), normal(2, 3)))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reference_linear_attention(normalization: str) -> None:
    masses = [t.detach().abs().requires_grad_() for t in (normal(2, 3, 4), normal(2, 3, 4))]
    count = torch.tensor([3, 2])

    def attend(q: Tensor, k: Tensor, v: Tensor, q_mass: Tensor, k_mass: Tensor) -> Tensor:
        return reference.linear_attention(
            q, k, v, num_heads=2, normalization=normalization, count=count, q_mass=q_mass, k_mass=k_mass
        )

    assert gradcheck(attend, (normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 4), *masses))


@pytest.mark.parametrize("bias", [False, True])
def test_reference_depthwise(bias: bool) -> None:
    tensors = (normal(2, 6, 2), normal(2, 1, 3, 3), normal(2) if bias else None)
    assert gradcheck(lambda v, weight, offset: reference.depthwise(v, weight, offset, (3, 2)), tensors)


@pytest.mark.parametrize("elements", [2**19, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise(elements: int, bias: bool, block_of: Callable[[int], None]) -> None:
    """Two grids among the tokens, a prefix token before each."""
    block_of(elements)
    grids = [Grid(1, 3, 2), Grid(8, 1, 3)]

    def convolve(out: Tensor, v: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        return torch_backend.depthwise(
            out * 1, v, Convolution(weight, offset, grids)
        )  # written into, so not the leaf itself

    tensors = (normal(2, 11, 2), normal(2, 11, 2), normal(2, 1, 3, 3), normal(2) if bias else None)
    assert gradcheck(convolve, tensors)
    assert gradgradcheck(convolve, tensors)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("differential", DIFFERENTIALS)
def test_reference_core(normalization: str, differential: str) -> None:
    options = {"normalization": normalization, "differential": differential, "num_heads": 2}
    assert gradcheck(*core(reference.dydila_attention, **options))


@pytest.mark.parametrize("elements", [2**19, 8])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("differential", DIFFERENTIALS)
def test_core(normalization: str, differential: str, elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    options = {"normalization": normalization, "differential": differential, "num_heads": 2, "backend": "torch"}
    assert gradcheck(*core(dydila_attention, **options))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("differential", DIFFERENTIALS)
def test_second_derivatives_of_the_core(normalization: str, differential: str) -> None:
    options = {"normalization": normalization, "differential": differential, "num_heads": 2, "backend": "torch"}
    assert gradgradcheck(*core(dydila_attention, **options))
