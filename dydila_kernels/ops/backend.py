"""What the layer asks of the kernels: a :class:`dydila_kernels.types.Backend`, as the torch backend is.

All functions take validated arguments.  None of them has second derivatives.  The kernels of a stage, with its formula,
its shapes and its launcher, are in one file:

    Eqs. 1-2        :mod:`projection`         route, plan, project
    Eqs. 5-7        :mod:`tokens`             the statistics of a token
    Eqs. 8, 10      :mod:`linear_attention`   state and readout; :mod:`gemm` where heads are wide
                    :mod:`rotary`             what turns Qh and Kh in between
    Eq. 9           :mod:`depthwise`          the convolution of V; :mod:`taps` its kernel
    gradients       :mod:`gradients`          of the tokens; :mod:`straight_through` of trained routers

:mod:`core` and :mod:`backward` order the launches; :mod:`autograd` and :mod:`operators` make one function of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dydila_kernels.ops import operators
from dydila_kernels.ops.core import Inputs, Settings
from dydila_kernels.ops.projection import Plan
from dydila_kernels.types import Convolution, CoreInputs, Options, Ranks


def route(x: Tensor, routers: Sequence[Tensor]) -> Tensor:
    """Eq. 1: x (B, N, d), one or two routers (d, n_P) of any dtype -> (routers, B, N) int8, in one pass over x."""
    return operators.route(x, routers)


def plan(index: Tensor, num_projectors: int) -> list[Plan]:
    """Which tokens go to which projector, for each side of index (sides, B, N), made together."""
    return operators.plan(index, num_projectors)


def project(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Eq. 2: x (B, N, d), weight (n_P, d, e) and its plan -> (B, N, e), differentiable in x and weight."""
    return operators.project(x, weight, plan)


def taps(branches: Mapping[str, Tensor], identity: bool) -> Tensor | None:
    """The kernel of Eq. 9 from its branches: (d, 1, 3, 3) float32, differentiable; None: see :func:`operators.taps`."""
    return operators.taps(branches, identity)


def attend(
    inputs: CoreInputs,
    options: Options,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    convolution: Convolution | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Eqs. 5-8 (or 10), and with ``convolution`` Eq. 9 except at masked tokens, which get zero: (B, N, d), contiguous.

    Args:
        inputs, options: as in :func:`dydila_kernels.dydila_attention`.
        mask: (B, N) bool, True for a token that counts, or None.
        cu_seqlens: bounds (S + 1,) of the images packed in the one row of B = 1, or None.
        convolution: in any dtype; differentiable in weight and bias.
        ranks: the processes that hold the other tokens of the images, or None.
    """
    return operators.attention(*operator_arguments(inputs, options, mask, cu_seqlens, convolution), ranks)


def decisions(
    inputs: CoreInputs, options: Options, *, mask: Tensor | None = None, cu_seqlens: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The routing decisions that :func:`attend` takes, (B, N) int8 each, named by ``types.decision_names``."""
    return operators.decisions(*operator_arguments(inputs, options, mask, cu_seqlens))


def operator_arguments(
    inputs: CoreInputs,
    options: Options,
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    convolution: Convolution | None = None,
) -> tuple[Inputs, Settings]:
    """The arguments of the operator ``attention``, which has the weights of Eq. 9 as (9, d) float32."""
    weight, bias, grids = (None, None, ()) if convolution is None else convolution
    rotary = options.rotary or (None, None)
    weight = None if weight is None else weight.float().flatten(1).t().contiguous()
    settings = Settings(
        mask=mask,
        cu_seqlens=cu_seqlens,
        grids=[number for grid in grids for number in grid],
        num_heads=options.num_heads,
        normalization=options.normalization,
        differential=options.differential,
        straight_through=options.router_gradient == "straight_through",
        rotary_pairing=None if options.rotary is None else options.rotary_pairing,
        rotary_gradient=any(t.requires_grad for t in rotary if t is not None),
    )
    return Inputs(*inputs, weight, None if bias is None else bias.float(), *rotary), settings
