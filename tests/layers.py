"""Small layers, and their outputs in every mode, for the tests of what surrounds a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import assert_agree, with_distinct_factors

SUB_MODULES = ("qkv", "proj", "dwc", "projection_q", "projection_k", "measure", "differential")


def layer_of(**options: Any) -> tuple[DyDiLAttention, Tensor]:
    attn = with_distinct_factors(DyDiLAttention(8, **{"num_heads": 2, **options}, dtype=torch.float64))
    return attn, torch.randn(2, 16, 8, dtype=torch.float64)


def both_ways(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> Tensor:
    """The output, which must be the same with gradients, without, and in inference mode."""
    out = attn(x, **arguments).detach()
    with torch.no_grad():
        assert_agree({"y": attn(x, **arguments)}, {"y": out}, 1e-11)
    with torch.inference_mode():
        assert_agree({"y": attn(x, **arguments)}, {"y": out}, 1e-11)
    return out


def gradients_of(attn: DyDiLAttention, x: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = attn(leaf)
    names = [name for name, p in attn.named_parameters() if p.requires_grad]
    wanted = [leaf, *(attn.get_parameter(name) for name in names)]
    found = torch.autograd.grad(out.square().sum(), wanted)
    return {"output": out.detach(), **dict(zip(["x", *names], found, strict=True))}
