"""What the norms of queries and keys of an existing layer are: options of DyDiLAttention, told by what they compute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dydila_kernels.norms import NORMS

RMS = re.compile("rms_?norm", re.IGNORECASE)
"""What classes have in their names that are RMS norms; torch has one of its own since 2.4, and so has everyone."""


class QKNorm(NamedTuple):
    """The options of DyDiLAttention that a norm of queries and keys amounts to."""

    qk_norm: str
    qk_norm_across: str
    qk_norm_eps: float


def qk_norm(norms: Sequence[nn.Module], dim: int, num_heads: int) -> QKNorm | None:
    """The options by which DyDiLAttention has these norms of queries and of keys; None where it has no such norms."""
    found = {norm_of(norm, dim, num_heads) for norm in norms}
    return found.pop() if len(found) == 1 else None


def norm_of(norm: nn.Module, dim: int, num_heads: int) -> QKNorm | None:
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms" if RMS.search(type(norm).__name__) else None
    if kind is None or next(norm.children(), None) is not None or next(norm.buffers(), None) is not None:
        return None
    parameters = dict(norm.named_parameters())
    weight = parameters.get("weight")
    size = tuple(weight.shape if weight is not None else getattr(norm, "normalized_shape", ()))
    across = {(dim // num_heads,): "head", (dim,): "token"}.get(size)
    plain = all(type(p) in (nn.Parameter, Tensor) for p in parameters.values())
    if across is None or not plain or not parameters.keys() <= ({"weight", "bias"} if kind == "layer" else {"weight"}):
        return None
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    eps = getattr(norm, "eps", None)
    # Without one torch takes that of a dtype, of which one depends on its version.
    for candidate in [torch.finfo(torch.float32).eps, torch.finfo(dtype).eps] if eps is None else [float(eps)]:
        ours = NORMS[kind](*size, eps=candidate, dtype=dtype, device=None if weight is None else weight.device)
        carry_norm(ours, norm)
        if computes_the_same(norm, ours, size[0]):
            return QKNorm(kind, across, candidate)
    return None


def carry_norm(new: nn.Module, old: nn.Module) -> None:
    """The weights of one norm into the other; those that the old one lacks are as fixed as they were."""
    for name, parameter in new.named_parameters():
        weight = getattr(old, name, None)
        if weight is not None:
            with torch.no_grad():
                parameter.copy_(weight)
        parameter.requires_grad_(weight is not None and weight.requires_grad)


def computes_the_same(norm: nn.Module, ours: nn.Module, size: int) -> bool:
    """On tokens of which some are so small that ``eps`` counts: some norms add it elsewhere, or 1 to their weights."""
    weight = next(ours.parameters())
    if weight.is_meta:
        return True  # there are no weights to compute with; the name has to do
    probe = torch.linspace(-1, 2, size, dtype=weight.dtype, device=weight.device)[None, None]
    try:
        with torch.no_grad():
            pairs = [(norm.forward(scale * probe), ours(scale * probe)) for scale in (1.0, 1e-3)]
    except Exception:  # whatever a foreign kernel raises on a device that it does not run on
        return False
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), 0.03, 0.003) for a, b in pairs)
