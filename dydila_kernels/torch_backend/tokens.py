"""Eqs. 5-8 for a block of tokens: route, measure, route again, subtract.  Shapes (b, n, d)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import Workspace, router_choices, router_logits
from dydila_kernels.types import Options

Indices = dict[str, Tensor]
"""Routing decisions (b, n) by name, see :func:`dydila_kernels.types.decision_names`."""


class Tables(NamedTuple):
    """gamma (n_F,), lam (n_D,), kernel_routers (4 or 2, d, n_F), differential_routers (2 or 1, 2d, n_D)."""

    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None


class Tokens(NamedTuple):
    """The tokens of one side, ready for the products.

    ``maps`` holds (tokens, mass) pairs, one, or two for Eq. 10; the mass is None unless "denominator" asks for it.
    ``lam`` (b, n, 1) weighs the second map and is None where there is one map, or on the key side.
    """

    maps: list[tuple[Tensor, Tensor | None]]
    lam: Tensor | None = None

    def divided_by(self, scales: Sequence[Tensor]) -> Tokens:
        """Each map, tokens and mass, divided by its scale."""
        maps = [
            (hat / scale, None if mass is None else mass / scale)
            for (hat, mass), scale in zip(self.maps, scales, strict=True)
        ]
        return Tokens(maps, self.lam)

    def rotated(self, cos: Tensor, sin: Tensor, options: Options) -> Tokens:
        """Each map, but not its mass, rotated by the tables (b, n, e)."""
        maps = [
            (reference.rotate(hat, cos, sin, options.rotary_pairing, options.num_heads), mass)
            for hat, mass in self.maps
        ]
        return Tokens(maps, self.lam)


class Power(torch.autograd.Function):
    """Eq. 5.  With s = r / max r, p = s^gamma, c = p.G and t = G - p c / |p|^2 for the incoming gradient G,

    dZ = |s|/|p| gamma (p/s) t + c / (|p| |s|) s   where Z > 0,      dgamma = max r |s|/|p| sum p ln(s) t;

    the scale of the row appears nowhere but in dgamma, so rows of scale 1e-30 or 1e30 keep their gradients.  Entries
    whose s is no more than the smallest normal number count as zeros, and so do rows whose entries are all below it.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gamma: Tensor, memory: Workspace, name: str) -> Tensor:
        """tokens (b, n, d), gamma (b, n, 1) -> (b, n, d); ``name`` is that of what lies in the workspace until the
        backward pass is done."""
        largest, s, s_norm = scaled(tokens, memory, name)
        log = torch.log2(s, out=memory.like(s, f"{name} log"))
        slope = torch.mul(log, gamma - 1, out=memory.like(s, f"{name} slope")).exp2_()
        p = torch.mul(zero_where_dead(slope, s), s, out=memory.like(s, f"{name} p"))
        p_norm = norm(p)
        ctx.save_for_backward(gamma, largest, s, log, slope, p, s_norm, p_norm)
        ctx.name, ctx.memory = name, memory
        return torch.mul(p, row_scale(largest, s_norm, p_norm), out=memory.like(s, f"{name} power"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gamma, largest, s, log, slope, p, s_norm, p_norm = ctx.saved_tensors
        scale, p_norm = row_scale(live(largest), s_norm, p_norm), p_norm.clamp_min(0.5)
        t = torch.mul(p, grad, out=ctx.memory.like(s, f"{ctx.name} gradient"))
        c = t.sum(-1, keepdim=True)
        torch.addcmul(grad, p, c / p_norm.square(), value=-1, out=t).mul_(slope)
        dgamma = None
        if ctx.needs_input_grad[1]:
            terms = torch.mul(s, log, out=ctx.memory.like(s, f"{ctx.name} terms")).mul_(t)
            dgamma = largest * scale * math.log(2) * terms.sum(-1, keepdim=True)
        t.mul_(gamma * scale).addcmul_(s, live(largest) * c / (p_norm * s_norm.clamp_min(1)))
        return zero_where_dead(t, s), dgamma, None, None


def power(tokens: Tensor, gamma: Tensor, memory: Workspace, name: str) -> Tensor:
    """:class:`Power` without a gradient."""
    largest, s, s_norm = scaled(tokens, memory, name)
    p = torch.log2(s, out=memory.like(s, f"{name} power")).mul_(gamma).exp2_()
    p = zero_where_dead(p, s)
    return p.mul_(row_scale(largest, s_norm, norm(p)))


def scaled(tokens: Tensor, memory: Workspace, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """max r (b, n, 1); s (b, n, d), with the smallest normal number in place of zeros (on a CPU log2(0) is ten times
    slower than log2); and |s| (b, n, 1)."""
    tiny = torch.finfo(tokens.dtype).tiny
    largest = tokens.amax(-1, keepdim=True)
    # (A product is five times faster than a quotient, and its rounding of the scale, common to the row, cancels.)
    s = torch.mul(tokens, largest.clamp_min(tiny).reciprocal_(), out=memory.like(tokens, f"{name} s")).clamp_min_(tiny)
    return largest, s, norm(s)


def live(largest: Tensor) -> Tensor:
    """1 or 0: whether a row has a positive normal number."""
    return (largest >= torch.finfo(largest.dtype).tiny).to(largest.dtype)


def row_scale(largest: Tensor, s_norm: Tensor, p_norm: Tensor) -> Tensor:
    """max r |s|/|p|; a live row holds a 1, so both norms are about 1 at least."""
    return largest * live(largest) * (s_norm / p_norm.clamp_min(0.5))


def zero_where_dead(values: Tensor, s: Tensor) -> Tensor:
    """Zeros, in place, where s is no more than the smallest normal number."""
    tiny = torch.finfo(s.dtype).tiny
    return torch.ops.aten.threshold_backward.grad_input(values, s, tiny, grad_input=values)


def norm(tokens: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)


def tokens_of(
    side: str,
    z: Tensor,
    redundant: Tensor | None,
    tables: Tables,
    options: Options,
    indices: Indices,
    memory: Workspace,
    place: str,
) -> Tokens:
    """The queries (side "q") or keys ("k") of a block.  Decisions not yet in ``indices`` are taken and put there.

    They lie in the workspace, and are good until tokens are made in the same ``place`` again.
    """
    number = "qk".index(side)

    def decide(name: str, *parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        straight_through = options.router_gradient == "straight_through"
        if name in indices and not straight_through:
            return indices[name].long(), None
        if not straight_through:
            indices[name] = router_choices(*parts)
            return indices[name], None
        logits = router_logits(*parts)
        if name not in indices:
            indices[name] = logits.argmax(-1)
        return indices[name].long(), logits

    def measure(name: str, tokens: Tensor, router: Tensor, place: str) -> Tensor:  # Eq. 6
        gamma = reference.choose(tables.gamma, *decide(name, (tokens, router)))[..., None]
        function = Power.apply if torch.is_grad_enabled() else power
        return function(tokens, gamma, memory, place)

    measured = measure(f"measure_{side}", z, tables.kernel_routers[number], f"{place} tokens")
    if options.differential == "off":
        return at_unit_scale(Tokens([(measured, measured)]), side, options)

    assert redundant is not None and tables.lam is not None and tables.differential_routers is not None
    other = measure(f"measure_{side}_redundant", redundant, tables.kernel_routers[2 + number], f"{place} redundant")
    if options.differential == "map" and side == "k":
        return Tokens([(measured, measured), (other, other)])

    # [Z, Z'] R = Z R[:d] + Z' R[d:] spares the concatenation of Eq. 7.
    top, bottom = tables.differential_routers[number].tensor_split(2)
    lam = reference.choose(tables.lam, *decide(f"differential_{side}", (measured, top), (other, bottom)))[..., None]
    if options.differential == "map":
        return at_unit_scale(Tokens([(measured, measured), (other, other)], lam), side, options)
    mass = torch.addcmul(measured, lam.abs(), other) if options.normalization == "denominator" else None
    subtract = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    return at_unit_scale(Tokens([(subtract(measured, lam, other, value=-1), mass)]), side, options)


def at_unit_scale(tokens: Tokens, side: str, options: Options) -> Tokens:
    """Under "denominator" the output does not depend on the scale of a query: at 1 it neither under- nor overflows."""
    if options.normalization != "denominator" or side == "k":
        return tokens
    maps: list[tuple[Tensor, Tensor | None]] = []
    for hat, mass in tokens.maps:
        assert mass is not None
        per_head = mass.unflatten(-1, (options.num_heads, -1))
        largest = per_head.detach().amax(-1, keepdim=True)
        largest = largest.where(largest > 0, 1)
        hat = (hat.unflatten(-1, (options.num_heads, -1)) / largest).flatten(-2)
        maps.append((hat, (per_head / largest).flatten(-2)))
    return Tokens(maps, tokens.lam)
