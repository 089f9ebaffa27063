"""The products of Eqs. 8 and 10 as plain GEMMs: for heads too wide for the registers of a program (H = 1 above all),
and with rotary embeddings.

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

from dydila_kernels.ops.context import LaunchContext


def product(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
    """out = scale a b, or out + scale a b where ``add``, for batches of matrices."""
    torch.baddbmm(out, a, b, beta=float(add), alpha=scale, out=out)


At = tuple[slice | int, slice | int]
"""Segments and heads of a block, one of the two a single one."""


def blocks(context: LaunchContext, *tokens: Tensor) -> Iterator[tuple[At, list[Tensor]]]:
    """Batches of matrices that torch multiplies at once, views of (B, N, d) tensors.

    A head of all images, (images, n, e), or where images are fewer than heads all heads of an image, (heads, n, e).
    """
    for span in context.spans():
        spanned = [t[span.images, span.rows].unflatten(-1, (context.heads, context.head_dim)) for t in tokens]
        images = len(spanned[0])
        if context.heads <= images:
            for h in range(context.heads):
                yield (span.segments, h), [t[:, :, h] for t in spanned]
        else:
            first = span.segments.start or 0
            for b in range(images):
                yield (first + b, slice(None)), [t[b].transpose(0, 1) for t in spanned]


def state(context: LaunchContext, hat: Tensor, values: Tensor, out: Tensor) -> None:
    """out = state_scale hat^T values, (segments, H, e, e) in the dtype of the tokens."""
    for at, (z, v) in blocks(context, hat, values):
        product(out[at], z.mT, v, context.state_scale)


def readout(context: LaunchContext, out: Tensor, hat: Tensor, matrix: Tensor, *, transposed: bool = False, scale: float,
            add: bool = False) -> None:  # fmt: skip
    """out = scale hat M, or hat M^T where ``transposed``, for a matrix (segments, H, e, e)."""
    for at, (o, z) in blocks(context, out, hat):
        m = matrix[at]
        product(o, z, m.mT if transposed else m, scale, add)


def scores(context: LaunchContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor, add: bool) -> None:
    """out = output_scale (state_scale Qh Kh^T) V, all (B, N, d)."""
    for _, (q_h, k_h, v_h, o_h) in blocks(context, q, k, v, out):
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
    for _, (q_h, k_h, v_h, g_h, dq_h, dk_h, dv_h) in blocks(context, q, k, v, grad, dq, dk, dv):
        product(dv_h, similarity(q_h, k_h, context.state_scale).mT, g_h, context.output_scale, add)
        dp = similarity(g_h, v_h, 1.0)
        product(dq_h, dp, k_h, scale * context.state_scale)
        product(dk_h, dp.mT, q_h, scale * context.state_scale)


def similarity(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b^T, (images, n, n)."""
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[1]))
    product(out, a, b.mT, scale)
    return out
