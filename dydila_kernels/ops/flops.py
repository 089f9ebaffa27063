"""What the operators multiply, for ``torch.utils.flop_counter.FlopCounterMode``, which counts by formulas.

Counted are multiplications whose results are added up, as two FLOPs each, as torch does: the products of the attention
in the order that is taken, of the routers and of the projectors, and the taps of the convolution; in the backward pass
also what the kernels multiply again.  Not counted, as torch does not, is what goes element by element or sums a row
(powers, norms, differences, denominators, biases), nor padding, nor that a router is multiplied in several parts for
the sake of precision.  A masked token is computed like any other, and counts.

The formulas take the arguments of their operator with shapes in the place of tensors.  That they are called,
:mod:`dydila_kernels.ops.operators` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

from dydila_kernels.ops.context import takes_scores
from dydila_kernels.ops.core import Inputs, Settings, is_fused
from dydila_kernels.types import DIFFERENTIAL_SIDES

INPUTS, SETTINGS = len(Inputs._fields), len(Settings._fields)
Shape = Sequence[int]


class Work(NamedTuple):
    """The parts of a call of the core, in multiply-accumulates of the forward pass."""

    product: int
    """One of the products with Qh, Kh or V of all tokens: with states (e, e), or with scores (N, N)."""
    products: int
    """Products of Qh and Kh with V: one, or for Eq. 10 two, of two products each."""
    sides: int
    """How many of queries and keys choose a lambda."""
    kernel_routers: int
    differential_routers: int
    tap: int
    """One tap of the convolution at all places of the grids."""
    taps: int
    fused: bool
    by_scores: bool
    has_denominator: bool
    straight_through: bool


def work_of(*arguments: Any) -> Work:
    """Of the arguments of ``attention``, with shapes in the place of tensors; what follows them is ignored."""
    inputs: Any = Inputs(*arguments[:INPUTS])
    settings = Settings(*arguments[INPUTS : INPUTS + SETTINGS])
    batch, length, dim = inputs.q
    bounds, grids, e = settings.cu_seqlens, settings.grids, dim // settings.num_heads
    lengths = [length] * batch
    if bounds is not None:
        lengths = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    fused = is_fused(dim, settings)
    by_scores = not fused and takes_scores(max(lengths, default=0), e)
    places = sum(rows * columns for rows, columns in zip(grids[1::3], grids[2::3], strict=True))
    return Work(
        product=dim * sum(n * (n if by_scores else e) for n in lengths),
        products=settings.products,
        sides=DIFFERENTIAL_SIDES[settings.differential],
        kernel_routers=batch * length * prod(inputs.kernel_routers),
        differential_routers=0 if inputs.lam is None else batch * length * prod(inputs.differential_routers),
        tap=batch * places * dim,
        taps=0 if inputs.weight is None else inputs.weight[0],
        fused=fused,
        by_scores=by_scores,
        has_denominator=settings.has_denominator,
        straight_through=settings.straight_through,
    )


def attention(*arguments: Any, **_: Any) -> int:
    work = work_of(*arguments)
    routers = work.kernel_routers + work.differential_routers
    return 2 * (2 * work.products * work.product + routers + work.taps * work.tap)


def attention_backward(grad: Shape, *arguments: Any, **_: Any) -> int:
    work = work_of(*arguments)
    if work.fused:  # dS and dV; dQh and dKh in each of two walks over the tokens; dQh once more for the denominator
        products = (6 + work.has_denominator) * work.products
        if work.straight_through:  # and in a third walk, for lambda
            products += work.sides
    else:  # the scores again; their gradient, dQh, dKh and dV; or dS, dQh, dKh and dV
        products = (5 if work.by_scores else 4) * work.products
    # What the logits pass on to tokens, and to routers; Eq. 7's to tokens in two of the walks.
    routers = 2 * work.kernel_routers + 3 * work.differential_routers if work.straight_through else 0
    return 2 * (products * work.product + routers + 2 * work.taps * work.tap)


def route(x: Shape, routers: Sequence[Shape], **_: Any) -> int:
    return 2 * prod(x[:2]) * sum(map(prod, routers))


def projection(x: Shape, weight: Shape, *_plan: Shape, **_: Any) -> int:
    """Of each token one product, whatever n_P is."""
    return 2 * prod(x[:2]) * prod(weight[1:])


def projection_backward(grad: Shape, x: Shape, weight: Shape, *_plan: Shape, **_: Any) -> int:
    return 2 * projection(x, weight)


FORMULAS: dict[str, Callable[..., int]] = {
    "attention": attention,
    "attention_backward": attention_backward,
    "route": route,
    "projection": projection,
    "projection_backward": projection_backward,
}
"""By the name of the operator."""
