"""The shared projections ``qkv`` and ``proj``: a product, where calling the module is no more than that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydila_kernels import torch_backend
from dydila_kernels.checks import is_plain
from dydila_kernels.precision import autocast_dtype


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for x (B, N, d)."""
    # (Elsewhere than on a CPU the product is the module's own.)
    other = x.device.type != "cpu" or torch.compiler.is_compiling() or autocast_dtype(x.device) is not None
    if not other and isinstance(module, nn.Linear) and is_plain(module, nn.Linear):
        return torch_backend.linear(x, module.weight, module.bias)
    out: Tensor = module(x)
    return out
