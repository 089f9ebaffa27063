"""The products of Eqs. 8 and 10 as plain GEMMs, for heads too wide for the registers of a program (H = 1 above all).

Zh of both sides is written once, and torch multiplies, per head of e = d/H channels:

    states    S = state_scale Kh^T V,           O = output_scale Qh S       where N >= e
    scores    P = state_scale Qh Kh^T (N, N),   O = output_scale P V        where N < e, and that is cheaper

and in the backward pass, from dO,

    states    dS = state_scale Qh^T dO,   dQh = dO S^T,                dKh = V dS^T,                  dV = Kh dS
    scores    dP = dO V^T,                dQh = state_scale dP Kh,     dKh = state_scale dP^T Qh,     dV = P^T dO

where dQh, dKh and dV are times output_scale.  Everything is (B, N, d), contiguous or not; a packed row is taken image
by image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dydila_kernels.ops.context import LaunchContext, Span


def product(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
    """out = scale a b, or out + scale a b where ``add``, for batches of matrices."""
    torch.baddbmm(out, a, b, beta=float(add), alpha=scale, out=out)


def heads(context: LaunchContext, *tokens: Tensor) -> Iterator[tuple[Span, int, list[Tensor]]]:
    """The blocks (images, n, e) of a span and head of (B, N, d) tensors, as views."""
    for span in context.spans():
        for h in range(context.heads):
            columns = slice(h * context.head_dim, (h + 1) * context.head_dim)
            yield span, h, [t[span.images, span.rows, columns] for t in tokens]


def state(context: LaunchContext, hat: Tensor, values: Tensor, out: Tensor) -> None:
    """out = state_scale hat^T values, (segments, H, e, e) in the dtype of the tokens."""
    for span, h, (z, v) in heads(context, hat, values):
        product(out[span.segments, h], z.mT, v, context.state_scale)


def readout(context: LaunchContext, out: Tensor, hat: Tensor, matrix: Tensor, *, transposed: bool = False, scale: float,
            add: bool = False) -> None:  # fmt: skip
    """out = scale hat M, or hat M^T where ``transposed``, for a matrix (segments, H, e, e)."""
    for span, h, (o, z) in heads(context, out, hat):
        m = matrix[span.segments, h]
        product(o, z, m.mT if transposed else m, scale, add)


def scores(context: LaunchContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor, add: bool) -> None:
    """out = output_scale (state_scale Qh Kh^T) V, all (B, N, d)."""
    for _, _, (q_h, k_h, v_h, o_h) in heads(context, q, k, v, out):
        product(o_h, similarity(q_h, k_h, context.state_scale), v_h, context.output_scale, add)


def scores_gradient(
    context: LaunchContext,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    add: bool,
) -> None:
    """dQh and dKh times ``scale`` / output_scale, and dV, added to where ``add``."""
    for _, _, (q_h, k_h, v_h, g_h, dq_h, dk_h, dv_h) in heads(context, q, k, v, grad, dq, dk, dv):
        product(dv_h, similarity(q_h, k_h, context.state_scale).mT, g_h, context.output_scale, add)
        dp = similarity(g_h, v_h, 1.0)
        product(dq_h, dp, k_h, scale * context.state_scale)
        product(dk_h, dp.mT, q_h, scale * context.state_scale)


def similarity(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b^T, (images, n, n)."""
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[1]))
    product(out, a, b.mT, scale)
    return out
