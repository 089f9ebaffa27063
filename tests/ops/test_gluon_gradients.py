"""The gradients in Gluon: that they are taken, answer as the other form does, and where they are not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dydila_kernels.ops import tiles
from dydila_kernels.testing import TOKENS
from tests.ops.helpers import (
    DEVICE,
    HALF,
    assert_core_within_twice_plain,
    assert_repeats,
    assert_same_bits,
    compare_core,
    compare_layer,
    inputs_of,
    layer_of,
    results,
)

pytestmark = pytest.mark.skipif(tiles.INTERPRETED, reason="Gluon has no interpreter: run with --emulate, or on a GPU")


CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"batch": 2, "length": 64, "dim": 128, "num_heads": 2},
    "the last tile has one token": {"batch": 2, "length": 65, "dim": 64, "normalization": "none"},
    "heads of 32": {"batch": 1, "length": 40, "dim": 64, "num_heads": 2},
    "heads of 72": {"batch": 1, "length": 40, "dim": 144, "num_heads": 2},
    "heads of 96": {"batch": 1, "length": 40, "dim": 96},
    "heads of 128": {"batch": 1, "length": 40, "dim": 128},
    "one wide head": {"batch": 1, "length": 200, "dim": 160},
    "packed": {"batch": 1, "length": 75, "dim": 64, "num_heads": 2, "cu_seqlens": [0, 5, 5, 6, 75]},
    "small powers": {"batch": 1, "length": 40, "dim": 64, "gamma": (0.5, 8.0)},
    "negative powers": {"batch": 1, "length": 40, "dim": 64, "gamma": (-1.0, 2.0)},
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_that_of_plain_pytorch(case: str, dtype: torch.dtype, launched: set[str]) -> None:
    options = {"num_heads": 1, **CASES[case]}
    compare_core(dtype, **options)
    assert "gluon_gradients_kernel" in launched and "gradients_kernel" not in launched
    assert ("gluon_dots_kernel" in launched) == (options["dim"] // options["num_heads"] in (32, 64, 72, 96))


@pytest.mark.parametrize(("dim", "num_heads"), [(128, 2), (144, 2), (160, 1)])
def test_denominators(dim: int, num_heads: int, launched: set[str]) -> None:
    compare_core(torch.bfloat16, 1, 70, dim, num_heads=num_heads, normalization="denominator")
    assert "gluon_gradients_kernel" in launched and "gradients_kernel" not in launched


@pytest.mark.parametrize(("dtype", "normalization"), [(HALF[0], "denominator"), (HALF[1], "length")], ids=str)
def test_masks(dtype: torch.dtype, normalization: str, launched: set[str]) -> None:
    """The second image has no token at all."""
    mask = torch.rand(2, 70, device=DEVICE) < 0.6
    mask[1] = False
    compare_core(dtype, 2, 70, 64, num_heads=2, mask=mask, normalization=normalization)
    assert "gluon_gradients_kernel" in launched


def test_masked_tokens_may_hold_anything(launched: set[str]) -> None:
    inputs = inputs_of(1, 70, 64, torch.bfloat16)
    mask = torch.arange(70, device=DEVICE)[None] % 3 > 0
    clean = results(inputs, mask=mask)
    for name in TOKENS:
        inputs[name] = inputs[name].masked_fill(~mask[..., None], torch.nan)
    assert_same_bits(results(inputs, mask=mask), clean)
    assert {"gluon_dots_kernel", "gluon_gradients_kernel"} <= launched


def test_convolution(launched: set[str]) -> None:
    compare_layer(layer_of(64, num_heads=2, dtype=torch.bfloat16), 36)
    assert {"gluon_gradients_kernel", "depthwise_kernel"} <= launched


@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_twice_is_equal_to_the_bit(normalization: str, request: pytest.FixtureRequest, launched: set[str]) -> None:
    assert_repeats(inputs_of(1, 70, 128, torch.bfloat16), request, num_heads=2, normalization=normalization)
    assert "gluon_gradients_kernel" in launched


def test_sums_split_over_programs(monkeypatch: pytest.MonkeyPatch, launched: set[str]) -> None:
    """Of the short image in a packed row the second split has no token."""
    monkeypatch.setattr("dydila_kernels.ops.gluon.dots.processors", lambda _: 4)
    compare_core(torch.bfloat16, 1, 530, 32, seeds=1, num_heads=1, cu_seqlens=[0, 3, 530])
    assert "gluon_dots_kernel" in launched


@pytest.mark.parametrize("exponent", [83, -63])
def test_rows_of_any_scale(exponent: int, launched: set[str]) -> None:
    """phi keeps the scale of a row: the gradients of scaled queries are those of others, all else is scaled."""
    inputs = inputs_of(1, 70, 64, torch.bfloat16, gamma=(0.5, 8.0))
    for name in ("q", "q_redundant"):
        inputs[name][:, 7] = 0.0
        inputs[name][:, 9, 1:] = -1.0
    expected = results(inputs)
    for name in ("q", "q_redundant"):
        inputs[name] = inputs[name] * 2.0**exponent
    found = results(inputs)
    for name in ("q", "q_redundant", "k", "k_redundant", "v"):
        scale = 2.0**exponent if name[0] != "q" else 1.0
        difference = (found[name].double() / scale - expected[name].double()).norm()
        assert difference < 1e-2 * expected[name].double().norm(), name
    assert "gluon_gradients_kernel" in launched


def test_what_is_not_aligned_takes_the_other_form(launched: set[str]) -> None:
    inputs = inputs_of(1, 70, 64, torch.bfloat16)
    wide = torch.zeros(1, 70, 72, dtype=torch.bfloat16, device=DEVICE)
    wide[..., 1:65] = inputs["v"]
    inputs["v"] = wide[..., 1:65]
    assert_core_within_twice_plain([inputs])
    assert "gradients_kernel" in launched and "gluon_dots_kernel" not in launched
