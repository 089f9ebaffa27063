"""Eq. 5 of the torch backend: with a gradient and without, against the reference, at every scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.testing import assert_agree, output_and_gradients, relative_error
from dydila_kernels.torch_backend.blocks import Workspace
from dydila_kernels.torch_backend.tokens import Power, power

GAMMAS = [0.5, 1.0, 3.0, 64.0]


def without_gradient(tokens: Tensor, gamma: Tensor, exact_zeros: bool) -> Tensor:
    p, scale = power(tokens, gamma, exact_zeros, torch.empty_like(tokens), Workspace())
    return p * scale


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_equals_the_reference_in_float64(gamma: float, scale: float) -> None:
    tokens = torch.randn(3, 5, 16, dtype=torch.float64) * scale
    tokens[0, 0], tokens[0, 1] = 0, -tokens[0, 1].abs()
    inputs = {"tokens": tokens, "gamma": torch.full((3, 5, 1), gamma, dtype=torch.float64)}
    found = output_and_gradients(lambda t: Power.apply(t["tokens"], t["gamma"], Workspace(), ""), inputs)
    expected = output_and_gradients(lambda t: reference.power(t["tokens"], t["gamma"][..., 0]), inputs)
    assert_agree(found, expected, 1e-13)
    assert not found["tokens"][0, :2].any() and not found["gamma"][0, :2].any()
    for exact_zeros in (False, True):
        without = without_gradient(tokens, inputs["gamma"], exact_zeros)
        assert relative_error(without, expected["output"]) < 1e-13
        assert not without[0, :2].any()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float32_at_every_scale(gamma: float, scale: float) -> None:
    """Output and both gradients are those of scale 1, scaled as Eq. 5 says."""
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    # Rounded first, and so far from zero that r^(gamma - 1) keeps its digits.
    tokens = torch.where(tokens.abs() < 0.01, 0, tokens * scale).float()
    factor = torch.full((3, 5, 1), gamma)
    inputs = {"tokens": tokens, "gamma": factor}
    found = output_and_gradients(lambda t: Power.apply(t["tokens"], t["gamma"], Workspace(), ""), inputs)
    in_float64 = {name: t.double() for name, t in inputs.items()}
    expected = output_and_gradients(lambda t: reference.power(t["tokens"], t["gamma"][..., 0]), in_float64)
    assert all(t.isfinite().all() for t in found.values())
    assert_agree(found, expected, 1e-5)
    assert relative_error(without_gradient(tokens, factor, exact_zeros=False), expected["output"]) < 1e-5


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.1])
def test_factors_that_training_may_reach(gamma: float) -> None:
    """gamma is used as it is; entries with r = 0 contribute nothing whatever it is."""
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    factor = torch.full((3, 5, 1), gamma, dtype=torch.float64)
    expected = reference.power(tokens, factor[..., 0])
    assert relative_error(Power.apply(tokens, factor, Workspace(), ""), expected) < 1e-13
    assert relative_error(without_gradient(tokens, factor, exact_zeros=True), expected) < 1e-13
    assert not expected[tokens <= 0].any()
