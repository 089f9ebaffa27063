"""The equations of Dynamic Differential Linear Attention (arXiv 2601.13683), one small function each.

Plain PyTorch and plain autograd, in the dtype of the input; in float64 this file is the oracle that every
backend is tested against.  It is written to be read beside the paper, not to be fast, and imports nothing
of this package.

Symbols: B batch, N tokens, d channels, H heads, e = d/H.  Token matrices are (B, N, d); an index of a routing
decision is (B, N).  Norms, routing and both factors act on a whole token, whatever H is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def route(tokens: Tensor, router: Tensor) -> Tensor:
    """Eqs. 1, 6 and 7: the index of the largest of ``tokens @ router``; ties go to the lowest index.

    tokens (..., c), router (c, n) -> (...) int64.
    """
    return (tokens @ router).argmax(-1)


def choose(table: Tensor, index: Tensor, logits: Tensor | None = None) -> Tensor:
    """The factor of each token, ``table[index]``: gamma of Eq. 6, lambda of Eq. 7.

    table (n,), index (...) -> (...).  With ``logits`` (..., n) the value is the same to the bit and the gradient
    also reaches the logits, as if the choice were the mean of the table under softmax(logits) (straight-through).
    """
    value = table[index]
    if logits is None:
        return value
    probability = logits.softmax(-1)
    return value + ((probability - probability.detach()) * table.detach()).sum(-1)


def straight_through_one(logits: Tensor, index: Tensor) -> Tensor:
    """A factor (..., 1) that is exactly 1, with the gradient of log softmax(logits)[index]: Eq. 2 straight through."""
    chosen = logits.softmax(-1).gather(-1, index[..., None])
    return chosen / chosen.detach()


def project(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Eq. 2: each token times the projector it was routed to.  x (B, N, d), weight (n_P, d, d), index (B, N)."""
    out = x @ weight[0]
    for u in range(1, weight.shape[0]):
        out = torch.where((index == u)[..., None], x @ weight[u], out)
    return out


def power(tokens: Tensor, gamma: Tensor) -> Tensor:
    """Eq. 5: ``phi(Z) = r^gamma / |r^gamma| * |r|`` with ``r = ReLU(Z)``, per token.

    tokens (..., d), gamma (...).  phi(c Z) = c phi(Z) for c > 0, so the power is taken of the row divided by its
    largest entry and no gamma overflows.  That entry is a constant to autograd, which by the same identity is
    exact.  Entries with r = 0 give 0 for any gamma; a row without a positive entry gives zeros and a zero gradient.
    """
    largest = tokens.detach().amax(-1, keepdim=True)
    live = largest > 0
    largest = torch.where(live, largest, 1)
    # Rows without a positive entry compute on ones, so that no gradient meets 0/0, and are cut out at the end.
    r = torch.where(live, F.relu(tokens) / largest, 1)
    positive = r > 0
    p = torch.where(positive, torch.where(positive, r, 1) ** gamma[..., None], 0)
    norm = torch.linalg.vector_norm
    scale = norm(r, dim=-1, keepdim=True) / norm(p, dim=-1, keepdim=True)
    return torch.where(live, largest * (p * scale), 0)


def difference(tokens: Tensor, redundant: Tensor, lam: Tensor) -> Tensor:
    """The bracket of Eq. 8: tokens minus lambda times their redundancy.  (B, N, d), (B, N, d), (B, N)."""
    return tokens - lam[..., None] * redundant


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor, pairing: str = "interleaved", num_heads: int = 1) -> Tensor:
    """R of rotary embeddings: each head of a token with its pairs of channels (a, b) turned, to
    (a cos - b sin, a sin + b cos).

    tokens (B, N, d); cos and sin (N, e) or (B, N, e), an entry for each channel.  Pairs are the channels 2i and 2i + 1
    of a head ("interleaved"), or i and i + e/2 ("halves").
    """
    z = rearrange(tokens, "b n (h e) -> b n h e", h=num_heads)
    if pairing == "interleaved":
        turned = torch.stack([-z[..., 1::2], z[..., 0::2]], -1).flatten(-2)
    else:
        first, second = z.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return rearrange(z * cos[..., None, :] + turned * sin[..., None, :], "b n h e -> b n (h e)")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int = 1,
    normalization: str = "length",
    count: Tensor | int | None = None,
    q_mass: Tensor | None = None,
    k_mass: Tensor | None = None,
) -> Tensor:
    """Eq. 8 (Eq. 4 with ``"denominator"``): ``Q (K^T V)`` per head, never forming an N x N matrix.

    q, k, v (B, N, d) -> (B, N, d).  ``count`` is the number of attended tokens, an int or (B,), by default N.
    ``q_mass`` and ``k_mass`` are the tokens with their redundancy added instead of subtracted, and not rotated;
    ``"denominator"`` divides by ``q_mass . sum_j k_mass_j``.  Unless tokens are rotated, that is zero only where the
    numerator is; where it is zero the result is.
    """
    q, k, v = (rearrange(t, "b n (h e) -> b h n e", h=num_heads) for t in (q, k, v))
    if normalization == "denominator":
        assert q_mass is not None and k_mass is not None
        q_mass, k_mass = (rearrange(t, "b n (h e) -> b h n e", h=num_heads) for t in (q_mass, k_mass))
        # The quotient depends neither on the scale of a query nor on that of all keys: at 1 both are harmless.
        if k.shape[-2]:
            largest_q, largest_k = (
                t.detach().amax(dims, keepdim=True) for t, dims in ((q_mass, -1), (k_mass, (-2, -1)))
            )
            largest_q, largest_k = (torch.where(t > 0, t, 1) for t in (largest_q, largest_k))
            q, q_mass, k, k_mass = q / largest_q, q_mass / largest_q, k / largest_k, k_mass / largest_k
        mass = (q_mass * k_mass.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        out = q @ (k.transpose(-2, -1) @ v)
        out = torch.where(mass > 0, out / torch.where(mass > 0, mass, 1), 0)
    else:
        state = k.transpose(-2, -1) @ v
        if normalization == "length":
            count = q.shape[-2] if count is None else count
            state = state / (count.to(state)[:, None, None, None] if isinstance(count, Tensor) else max(count, 1))
        out = q @ state
    return rearrange(out, "b h n e -> b n (h e)")


def depthwise(v: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int]) -> Tensor:
    """DWC of Eq. 9: depth-wise 3x3 convolution with zero padding of tokens (B, R*C, d) on the R x C grid.

    weight (d, 1, 3, 3), bias (d,) or None -> (B, R*C, d).  With a ``grid`` of three, F x R x C, on each of F frames of
    tokens (B, F*R*C, d).
    """
    frames, rows, columns = grid if len(grid) == 3 else (1, *grid)
    image = rearrange(v, "b (f r c) d -> (b f) d r c", f=frames, r=rows, c=columns)
    out = F.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
    return rearrange(out, "(b f) d r c -> b (f r c) d", f=frames)


def dydila_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_redundant: Tensor | None = None,
    k_redundant: Tensor | None = None,
    *,
    gamma: Tensor,
    lam: Tensor | None = None,
    kernel_routers: Tensor,
    differential_routers: Tensor | None = None,
    num_heads: int = 1,
    normalization: str = "length",
    router_gradient: str = "none",
    differential: str = "token",
    mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_pairing: str = "interleaved",
    indices: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Eqs. 5-8, or Eq. 10 with ``differential="map"``, or Eq. 6 alone with ``"off"``; without the convolution.

    The arguments are those of :func:`dydila_kernels.dydila_attention`; here ``cu_seqlens`` is a sequence of ints, and
    ``rotary`` is cos and sin of :func:`rotate`.
    ``indices`` imposes routing decisions, under the names of :class:`dydila_kernels.Routing`, instead of taking the
    argmax.
    """
    if cu_seqlens is not None:
        images = []
        for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            image = [None if t is None else t[:, start:end] for t in (q, k, v, q_redundant, k_redundant)]
            images.append(
                dydila_attention(
                    *image,  # type: ignore[arg-type]
                    gamma=gamma,
                    lam=lam,
                    kernel_routers=kernel_routers,
                    differential_routers=differential_routers,
                    num_heads=num_heads,
                    normalization=normalization,
                    router_gradient=router_gradient,
                    differential=differential,
                    rotary=rotary and (rotary[0][..., start:end, :], rotary[1][..., start:end, :]),
                    rotary_pairing=rotary_pairing,
                    indices=indices and {name: index[:, start:end] for name, index in indices.items()},
                )
            )
        return torch.cat(images, dim=1) if images else torch.zeros_like(q)

    count = None
    if mask is not None:
        q, k, v = (t.masked_fill(~mask[..., None], 0) for t in (q, k, v))
        if q_redundant is not None and k_redundant is not None:
            q_redundant, k_redundant = (t.masked_fill(~mask[..., None], 0) for t in (q_redundant, k_redundant))
        if rotary is not None:
            rotary = (rotary[0].where(mask[..., None], 0), rotary[1].where(mask[..., None], 0))
        count = mask.sum(-1).clamp(min=1)

    straight_through = router_gradient == "straight_through"

    def decide(name: str, tokens: Tensor, router: Tensor) -> tuple[Tensor, Tensor | None]:
        index = route(tokens, router) if indices is None else indices[name]
        return index, tokens @ router if straight_through else None

    def measure(name: str, tokens: Tensor, router: Tensor) -> Tensor:  # Eq. 6
        return power(tokens, choose(gamma, *decide(name, tokens, router)))

    def rotated(tokens: Tensor) -> Tensor:
        return tokens if rotary is None else rotate(tokens, *rotary, rotary_pairing, num_heads)

    def attend(q: Tensor, k: Tensor, q_mass: Tensor, k_mass: Tensor) -> Tensor:
        return linear_attention(
            rotated(q),
            rotated(k),
            v,
            num_heads=num_heads,
            normalization=normalization,
            count=count,
            q_mass=q_mass,
            k_mass=k_mass,
        )

    qt, kt = measure("measure_q", q, kernel_routers[0]), measure("measure_k", k, kernel_routers[1])
    if differential == "off":
        return attend(qt, kt, qt, kt)

    assert q_redundant is not None and k_redundant is not None and lam is not None and differential_routers is not None
    qr = measure("measure_q_redundant", q_redundant, kernel_routers[2])
    kr = measure("measure_k_redundant", k_redundant, kernel_routers[3])
    lam_q = choose(lam, *decide("differential_q", torch.cat([qt, qr], -1), differential_routers[0]))  # Eq. 7
    if differential == "map":  # Eq. 10
        return difference(attend(qt, kt, qt, kt), attend(qr, kr, qr, kr), lam_q)

    lam_k = choose(lam, *decide("differential_k", torch.cat([kt, kr], -1), differential_routers[1]))
    q_mass, k_mass = difference(qt, qr, -lam_q.abs()), difference(kt, kr, -lam_k.abs())
    return attend(difference(qt, qr, lam_q), difference(kt, kr, lam_k), q_mass, k_mass)  # Eq. 8
