"""The Triton backend, a :class:`dydila_kernels.types.Backend`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.ops import library
from dydila_kernels.ops.core import Inputs, Settings
from dydila_kernels.ops.library import route
from dydila_kernels.stages import layer_in_stages
from dydila_kernels.types import Convolution, CoreInputs, LayerWeights, Options, Ranks

__all__ = ["attend", "decisions", "layer", "project", "route"]


def project(x: Tensor, weight: Tensor, index: Tensor, logits: Tensor | None = None) -> Tensor:
    """Eq. 2, see :meth:`dydila_kernels.types.Backend.project`."""
    out = library.routed_projection(x, weight, index)
    return out if logits is None else out * reference.straight_through_one(logits, index.long()).to(out.dtype)


def arguments(
    inputs: CoreInputs,
    options: Options,
    mask: Tensor | None,
    cu_seqlens: Sequence[int] | None,
    convolution: Convolution | None,
) -> tuple[Inputs, Settings]:
    """What the operators take."""
    weight, bias, grids = (None, None, ()) if convolution is None else convolution
    weight = None if weight is None else weight.float().flatten(1).t().contiguous()
    flat = [n for grid in grids for n in grid]
    settings = Settings(
        mask,
        cu_seqlens,
        flat,
        options.num_heads,
        options.normalization,
        options.differential,
        options.router_gradient == "straight_through",
    )
    return Inputs(*inputs, weight, None if bias is None else bias.float()), settings


def attend(
    inputs: CoreInputs,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    convolution: Convolution | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Eqs. 5-9, see :meth:`dydila_kernels.types.Backend.attend`."""
    return library.dydila_attention(*arguments(inputs, options, mask, cu_seqlens, convolution), ranks)


def decisions(
    inputs: CoreInputs, options: Options, *, mask: Tensor | None = None, cu_seqlens: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """What the routers choose, see :meth:`dydila_kernels.types.Backend.decisions`."""
    return library.routing_indices(*arguments(inputs, options, mask, cu_seqlens, None))


@torch.no_grad()
def layer(
    x: Tensor,
    weights: LayerWeights,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """The layer without gradients, see :meth:`dydila_kernels.types.Backend.layer`."""
    return layer_in_stages(route, project, attend, x, weights, options, mask, cu_seqlens)
