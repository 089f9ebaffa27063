"""Tables of rotary embeddings that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.testing import core_inputs

COS, SIN = torch.ones(9, 4), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rotary": COS}, TypeError, r"rotary must be \(cos, sin\) or a complex tensor; got Tensor"),
        ({"rotary": (COS,)}, TypeError, r"rotary must be \(cos, sin\)"),
        ({"rotary": "xpos"}, TypeError, r"rotary must be \(cos, sin\) or a complex tensor; got str"),
        ({"rotary": (COS, 0.5)}, TypeError, r"rotary\[1\] must be a tensor; got float"),
        ({"rotary": (COS.long(), SIN)}, TypeError, r"rotary\[0\] must have one of the dtypes"),
        (
            {"rotary": (COS, SIN[:8])},
            ValueError,
            r"rotary\[1\] must have the shape \(N, d/H\) = \(9, 4\) or .*\(8, 4\)",
        ),
        ({"rotary": (COS[:, :2], SIN[:, :2])}, ValueError, r"rotary\[0\] must have the shape .* got \(9, 2\)"),
        ({"rotary": (COS.expand(3, 9, 4), SIN)}, ValueError, r"\(B, N, d/H\) = \(2, 9, 4\); got \(3, 9, 4\)"),
        ({"rotary": torch.ones(9, 4, dtype=torch.complex64)}, ValueError, r"complex, with d/H/2 = 2; got \(9, 4\)"),
        ({"rotary": (COS.to("meta"), SIN)}, ValueError, r"rotary\[0\] must be on cpu as the tokens are; got meta"),
        ({"rotary": (COS, SIN), "rotary_pairing": "pairs"}, ValueError, r"rotary_pairing must be one of 'interleaved'"),
        ({"rope": (COS, SIN)}, TypeError, r"rope must be None: say rotary=\(cos, sin\)"),
    ],
)
def test_errors(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        DyDiLAttention(8, 2)(torch.randn(2, 9, 8), **arguments)
    if "rope" not in arguments:
        with pytest.raises(kind, match=message):
            dydila_attention(**core_inputs(2, 9, 8, dtype=torch.float32), num_heads=2, **arguments)


def test_heads_of_an_odd_size() -> None:
    with pytest.raises(ValueError, match="odd number of them, d/H = 3"):
        DyDiLAttention(6, 2)(torch.randn(2, 9, 6), rotary=(torch.ones(9, 3), torch.zeros(9, 3)))
