"""The products of Eqs. 8 and 10 as plain GEMMs, for heads too wide for the registers of a program (H = 1 above all).

Zh of both sides is written once, and torch multiplies, per head of e = d/H channels:

    states    S = scale Kh^T V,          O = rescale Qh S         where N >= e
    scores    P = scale Qh Kh^T (N, N),  O = rescale P V          where N < e, and that is cheaper

and in the backward pass, from dO,

    states    dS = scale Qh^T dO,   dQh = rescale dO S^T,        dKh = rescale V dS^T,          dV = rescale Kh dS
    scores    dP = dO V^T,          dQh = rescale scale dP Kh,   dKh = rescale scale dP^T Qh,   dV = rescale P^T dO

Everything is (B, N, d), contiguous or not; a packed row is taken image by image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dydila_kernels.ops.call import Call, Span


def pays_scores(call: Call) -> bool:
    """Whether (Qh Kh^T) V costs less than Qh (Kh^T V)."""
    return call.ranks is None and call.longest < call.head_dim


def product(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
    """out = scale a b, or out + scale a b where ``add``, for batches of matrices."""
    torch.baddbmm(out, a, b, beta=float(add), alpha=scale, out=out)


def heads(call: Call, *tokens: Tensor) -> Iterator[tuple[Span, int, list[Tensor]]]:
    """The blocks (images, n, e) of a span and head of (B, N, d) tensors, as views."""
    for span in call.spans():
        for h in range(call.heads):
            columns = slice(h * call.head_dim, (h + 1) * call.head_dim)
            yield span, h, [t[span.images, span.rows, columns] for t in tokens]


def state(call: Call, hat: Tensor, values: Tensor, out: Tensor) -> None:
    """out = scale hat^T values, (segments, H, e, e) in the dtype of the tokens."""
    for span, h, (z, v) in heads(call, hat, values):
        product(out[span.segments, h], z.mT, v, call.scale)


def readout(call: Call, out: Tensor, hat: Tensor, matrix: Tensor, *, transposed: bool = False, scale: float,
            add: bool = False) -> None:  # fmt: skip
    """out = scale hat M, or hat M^T where ``transposed``, for a matrix (segments, H, e, e)."""
    for span, h, (o, z) in heads(call, out, hat):
        m = matrix[span.segments, h]
        product(o, z, m.mT if transposed else m, scale, add)


def scores(call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, add: bool) -> None:
    """out = rescale (scale Qh Kh^T) V."""
    for _, _, (q_h, k_h, v_h, o_h) in heads(call, q, k, v, out):
        product(o_h, similarity(q_h, k_h, call.scale), v_h, call.rescale, add)


def scores_gradient(
    call: Call,
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
    """dQh and dKh times ``scale`` / rescale, and dV, added to where ``add``."""
    for _, _, (q_h, k_h, v_h, g_h, dq_h, dk_h, dv_h) in heads(call, q, k, v, grad, dq, dk, dv):
        product(dv_h, similarity(q_h, k_h, call.scale).mT, g_h, call.rescale, add)
        dp = similarity(g_h, v_h, 1.0)
        product(dq_h, dp, k_h, scale * call.scale)
        product(dk_h, dp.mT, q_h, scale * call.scale)


def similarity(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b^T, (images, n, n)."""
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[1]))
    product(out, a, b.mT, scale)
    return out
