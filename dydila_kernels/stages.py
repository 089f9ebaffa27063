"""The layer without gradients, stage after stage, on the functions of either backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from dydila_kernels.types import CoreInputs, LayerWeights, Norms, Options, Tables


def core_inputs(
    tokens: Sequence[Tensor], redundant: Sequence[Tensor], norms: Norms, tables: Tables, differential: str
) -> CoreInputs:
    """What the core takes of q, k, v and the norms of q and k, of Q' and K' after theirs (or none), and of the tables.

    Without a difference the measured tokens are those of the routed projectors, where there are any.
    """
    q, k, v = tokens
    q_redundant, k_redundant = redundant or (None, None)
    if differential == "off" and redundant:
        q, k = redundant
        q_redundant, k_redundant = None, None
    elif norms:
        q, k = (norm(t) for norm, t in zip(norms, (q, k), strict=True))
    return CoreInputs(q, k, v, q_redundant, k_redundant, *tables)


def layer_in_stages(
    route: Callable[..., Tensor],
    project: Callable[..., Tensor],
    attend: Callable[..., Tensor],
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> Tensor:
    """Eqs. 1-9 and the output projection: x (B, N, d) -> (B, N, d).  The functions are those of a backend."""
    redundant: list[Tensor] = []
    if weights.projectors:
        indices = route(x, [p.router for p in weights.projectors])
        redundant = [project(x, p.weight, index) for p, index in zip(weights.projectors, indices, strict=True)]
        if weights.norms:
            redundant = [norm(t) for norm, t in zip(weights.norms, redundant, strict=True)]
    tokens = F.linear(x, *weights.qkv).chunk(3, -1)
    inputs = core_inputs(tokens, redundant, weights.norms, weights.tables, options.differential)
    out = attend(inputs, options, mask=mask, cu_seqlens=cu_seqlens, convolution=weights.convolution)
    return F.linear(out, *weights.proj)
