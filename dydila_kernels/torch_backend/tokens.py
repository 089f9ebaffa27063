"""Eqs. 5-8 for a block of tokens: route, measure, route again, subtract.  Shapes (b, n, d)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import router_choices, router_logits
from dydila_kernels.types import Options

Indices = dict[str, Tensor]
"""Routing decisions (b, n) by name, see :func:`dydila_kernels.types.decision_names`."""


class Tables(NamedTuple):
    """gamma (n_F,), lam (n_D,), kernel_routers (4 or 2, d, n_F), differential_routers (2 or 1, 2d, n_D).

    ``exact_zeros``: :func:`power_` must give exact zeros for zeros.
    """

    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None
    exact_zeros: bool = True


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
    whose s is below the smallest normal number count as zeros.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gamma: Tensor) -> Tensor:
        """tokens (b, n, d), gamma (b, n, 1) -> (b, n, d)."""
        tiny = torch.finfo(tokens.dtype).tiny
        largest = tokens.amax(-1, keepdim=True).clamp_min_(0)
        s = F.threshold(tokens / (largest + (largest == 0)), tiny, 0.0, inplace=True)
        # 1 or 0: entries at zero get log 0 = 0 and p = 0 for any gamma.  (On a CPU masks of bool are slower.)
        sign = s.sign()
        log = s.clamp_min(tiny).log2_().mul_(sign)
        p = (log * gamma).exp2_().mul_(sign)
        # A live row holds a 1, so its norms are at least 1; the clamp turns the 0/0 of a dead row into 0/1.
        s_norm, p_norm = norm(s), norm(p).clamp_min_(1)
        ctx.save_for_backward(gamma, largest, s, log, p, s_norm, p_norm)
        return p * (largest * (s_norm / p_norm))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gamma, largest, s, log, p, s_norm, p_norm = ctx.saved_tensors
        ratio = s_norm / p_norm
        c = (p * grad).sum(-1, keepdim=True)
        t = torch.addcmul(grad, p, c / p_norm.square(), value=-1)
        t.mul_(p)
        dgamma = None
        if ctx.needs_input_grad[1]:
            dgamma = largest * ratio * math.log(2) * (t * log).sum(-1, keepdim=True)
        # Where s = 0 both terms are.
        slope = t.div_(s.clamp_min(torch.finfo(s.dtype).tiny)).mul_(gamma * ratio)
        return slope.addcmul_(s, c / (p_norm * s_norm.clamp_min(1))), dgamma


def norm(tokens: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)


def power_(tokens: Tensor, gamma: Tensor, exact_zeros: bool) -> Tensor:
    """Eq. 5 in place and without a gradient, in as few passes over the block as will do."""
    tiny = torch.finfo(tokens.dtype).tiny
    largest = tokens.amax(-1, keepdim=True)
    # (A product is five times faster than a quotient, and its rounding of the scale, common to the row, cancels.)
    s = tokens.mul_(largest.clamp_min(tiny).reciprocal_())
    # Zeros become the smallest normal number, of which no power is left in the rounding of the row's 1.  (On a CPU
    # log2(0) is ten times slower than log2.)  Where that is not enough they are put back.
    sign = F.threshold(s, tiny, 0.0).sign_() if exact_zeros else None
    s.clamp_min_(tiny)
    s_norm = norm(s)
    p = s.log2_().mul_(gamma) if sign is None else s.log2_().mul_(sign).mul_(gamma)
    p = p.exp2_() if sign is None else p.exp2_().mul_(sign)
    # A live row holds a 1, so both norms are about 1 at least.  Rows without a positive normal number count as dead and
    # are multiplied by 0.
    return p.mul_((largest * (largest >= tiny)) * (s_norm / norm(p).clamp_min_(0.5)))


def needs_exact_zeros(gamma: Tensor, options: Options) -> bool:
    """Where small gammas lift tiny numbers, or a head without a positive entry is divided by its own mass."""
    # Reading gamma would make other devices wait.
    return gamma.device.type != "cpu" or options.normalization == "denominator" or bool((gamma < 0.5).any())


def tokens_of(
    side: str,
    z: Tensor,
    redundant: Tensor | None,
    tables: Tables,
    options: Options,
    indices: Indices,
    in_place: bool,
) -> Tokens:
    """The queries (side "q") or keys ("k") of a block.  Decisions not yet in ``indices`` are taken and put there.

    ``in_place``: z and redundant are overwritten, and there are no gradients.
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

    def measure(name: str, tokens: Tensor, router: Tensor) -> Tensor:  # Eq. 6
        gamma = reference.choose(tables.gamma, *decide(name, (tokens, router)))
        if in_place:
            return power_(tokens, gamma[..., None], tables.exact_zeros)
        return Power.apply(tokens, gamma[..., None])

    measured = measure(f"measure_{side}", z, tables.kernel_routers[number])
    if options.differential == "off":
        return at_unit_scale(Tokens([(measured, measured)]), side, options)

    assert redundant is not None and tables.lam is not None and tables.differential_routers is not None
    other = measure(f"measure_{side}_redundant", redundant, tables.kernel_routers[2 + number])
    if options.differential == "map" and side == "k":
        return Tokens([(measured, measured), (other, other)])

    # [Z, Z'] R = Z R[:d] + Z' R[d:] spares the concatenation of Eq. 7.
    top, bottom = tables.differential_routers[number].tensor_split(2)
    lam = reference.choose(tables.lam, *decide(f"differential_{side}", (measured, top), (other, bottom)))[..., None]
    if options.differential == "map":
        return at_unit_scale(Tokens([(measured, measured), (other, other)], lam), side, options)
    mass = torch.addcmul(measured, lam.abs(), other) if options.normalization == "denominator" else None
    subtract = Tensor.addcmul_ if in_place else torch.addcmul
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
