"""Eqs. 5-8 for a block of tokens: route, measure, route again, subtract.  Shapes (b, n, d)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dydila_kernels import reference
from dydila_kernels.torch_backend.blocks import SPARE, Workspace, router_choices, router_logits
from dydila_kernels.types import Options

Indices = dict[str, Tensor]
"""Routing decisions (b, n) by name, see :func:`dydila_kernels.types.decision_names`."""


def names_of(side: str) -> tuple[str, str, str]:
    """The decisions of the queries ("q") or keys ("k") under the token-wise difference."""
    return f"measure_{side}", f"measure_{side}_redundant", f"differential_{side}"


class Tables(NamedTuple):
    """gamma (n_F,), lam (n_D,), kernel_routers (4 or 2, d, n_F), differential_routers (2 or 1, 2d, n_D).

    ``exact_zeros``: whether zeros have to stay zeros without a gradient, see :func:`power`.
    """

    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None
    exact_zeros: bool


class Tokens(NamedTuple):
    """The tokens of one side, ready for the products.

    ``maps`` holds (tokens, mass) pairs, one, or two for Eq. 10; the mass is None unless "denominator" asks for it.
    ``lam`` (b, n, 1) weighs the second map and is None where there is one map, or on the key side.
    """

    maps: list[tuple[Tensor, Tensor | None]]
    lam: Tensor | None = None

    def largest(self) -> list[Tensor]:
        """Of each map the largest mass in each image, (b, 1, 1)."""
        return [mass.detach().amax((1, 2), keepdim=True) for _, mass in self.maps if mass is not None]

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


class Measured(NamedTuple):
    """Eq. 5 for tokens of a block in pieces, with s = r / max r and p = s^gamma: the result is ``scale`` p.

    largest: max r; s, log2 s, slope = s^(gamma - 1), p (b, n, d); the norms of s and of p; all else (b, n, 1).
    """

    gamma: Tensor
    largest: Tensor
    s: Tensor
    log: Tensor
    slope: Tensor
    p: Tensor
    s_norm: Tensor
    p_norm: Tensor

    @classmethod
    def of(cls, tokens: Tensor, gamma: Tensor, memory: Workspace, name: str) -> Measured:
        """tokens (b, n, d), gamma (b, n, 1); ``name`` is that of what lies in the workspace until it is used up."""
        largest, s, s_norm = scaled(tokens, memory.like(tokens, f"{name} s"))
        log = torch.log2(s, out=memory.like(s, f"{name} log"))
        slope = torch.mul(log, gamma - 1, out=memory.like(s, f"{name} slope")).exp2_()
        p = torch.mul(zero_where_dead(slope, s), s, out=memory.like(s, f"{name} p"))
        return cls(gamma, largest, s, log, slope, p, s_norm, norm(p))

    @property
    def scale(self) -> Tensor:
        return row_scale(self.largest, self.s_norm, self.p_norm)

    def gradients(self, grad: Tensor, weight: Tensor | float, memory: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens, gamma and weight, from the gradient G of ``weight`` (b, n, 1) times the result.

        With c = p.G and t = G - p c / |p|^2,

            dZ = weight |s|/|p| (gamma (p/s) t + c / |s|^2 s)   where Z > 0,
            dgamma = weight max r |s|/|p| sum p ln(s) t,   dweight = scale c;

        the scale of the row appears nowhere but in the latter two, so rows of scale 1e-30 or 1e30 keep their gradients.
        Uses up what lies in the workspace, all but s.
        """
        gamma, largest, s, log, slope, p, s_norm, p_norm = self
        p_norm, alive = p_norm.clamp_min(0.5), live(largest)
        terms = torch.mul(p, grad, out=memory.like(s, SPARE[0]))
        c = terms.sum(-1, keepdim=True)
        t = torch.addcmul(grad, p, c / p_norm.square(), value=-1, out=p).mul_(slope)
        dgamma = weight * math.log(2) * self.scale * log.mul_(s).mul_(t).sum(-1, keepdim=True)
        ratio = weight * alive * (s_norm / p_norm)
        t.mul_(gamma * ratio).addcmul_(s, weight * alive * c / (p_norm * s_norm.clamp_min(1)))
        return zero_where_dead(t, s), dgamma, self.scale * c


class Power(torch.autograd.Function):
    """Eq. 5."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gamma: Tensor, memory: Workspace, name: str) -> Tensor:
        """tokens (b, n, d), gamma (b, n, 1) -> (b, n, d); see :meth:`Measured.of`."""
        measured = Measured.of(tokens, gamma, memory, name)
        ctx.save_for_backward(*measured)
        ctx.memory = memory
        return torch.mul(measured.p, measured.scale, out=memory.like(tokens, f"{name} power"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtokens, dgamma, _ = Measured(*ctx.saved_tensors).gradients(grad, 1.0, ctx.memory)
        return dtokens, dgamma, None, None


class Difference(NamedTuple):
    """Eqs. 7-8: the difference ``hat`` (b, n, d) of measured tokens and lam (b, n, 1) times measured redundant ones.

    ``mass`` (b, n, d): where asked for, their sum with abs(lam) instead.
    """

    measured: Measured
    other: Measured
    lam: Tensor
    hat: Tensor
    mass: Tensor | None

    @classmethod
    def of(
        cls, z: Tensor, redundant: Tensor, gamma: Tensor, other_gamma: Tensor, lam: Tensor, has_mass: bool,
        memory: Workspace, place: str,
    ) -> Difference:  # fmt: skip
        """z, redundant (b, n, d), their gammas and lam (b, n, 1)."""
        measured = Measured.of(z, gamma, memory, f"{place} tokens")
        other = Measured.of(redundant, other_gamma, memory, f"{place} redundant")
        hat = torch.mul(measured.p, measured.scale, out=memory.like(z, f"{place} difference"))
        mass, weight = None, lam * other.scale
        if has_mass:
            mass = torch.addcmul(hat, other.p, weight.abs(), out=memory.like(z, f"{place} mass"))
        return cls(measured, other, lam, hat.addcmul_(other.p, weight, value=-1), mass)

    def gradients(
        self, dhat: Tensor, dmass: Tensor | None, memory: Workspace
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of z, redundant, their gammas and lam, from those of ``hat`` and ``mass``; see :meth:`Measured.gradients`."""
        if dmass is None:
            dz, dgamma, _ = self.measured.gradients(dhat, 1.0, memory)
            dredundant, dother, dweight = self.other.gradients(dhat, -self.lam, memory)
            return dz, dredundant, dgamma, dother, -dweight
        signed = dmass * self.lam.sign() - dhat  # that of lam times the redundant
        dlam = self.other.scale * (signed * self.other.p).sum(-1, keepdim=True)
        dz, dgamma, _ = self.measured.gradients(dhat + dmass, 1.0, memory)
        dredundant, dother, _ = self.other.gradients(signed, self.lam, memory)
        return dz, dredundant, dgamma, dother, dlam


def power(tokens: Tensor, gamma: Tensor, exact_zeros: bool, out: Tensor, memory: Workspace) -> tuple[Tensor, Tensor]:
    """:class:`Measured` without a gradient: p and its scale.  ``out``, which may be the tokens, is overwritten.

    Zeros are powers of the smallest normal number unless asked for as zeros: nothing, beside the row's largest.
    """
    largest, s, s_norm = scaled(tokens, out)
    log = torch.log2(s, out=memory.like(s, "exact") if exact_zeros else s)
    p = log.mul_(gamma).exp2_()
    if exact_zeros:
        p = zero_where_dead(p, s, out=s)
    return p, row_scale(largest, s_norm, norm(p))


def needs_exact_zeros(gamma: Tensor, options: Options) -> bool:
    """Where small gammas lift tiny numbers, or a head without a positive entry is divided by its own mass."""
    # Reading gamma would make other devices wait.
    return gamma.device.type != "cpu" or options.normalization == "denominator" or bool((gamma < 0.5).any())


def scaled(tokens: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max r (b, n, 1); s (b, n, d), written into ``out``; and |s| (b, n, 1).

    Zeros become the smallest normal number: on a CPU log2(0) is ten times slower than log2.
    """
    tiny = torch.finfo(tokens.dtype).tiny
    largest = tokens.amax(-1, keepdim=True)
    # (A product is five times faster than a quotient, and its rounding of the scale, common to the row, cancels.)
    s = torch.mul(tokens, largest.clamp_min(tiny).reciprocal_(), out=out).clamp_min_(tiny)
    return largest, s, norm(s)


def live(largest: Tensor) -> Tensor:
    """1 or 0: whether a row has a positive normal number."""
    return (largest >= torch.finfo(largest.dtype).tiny).to(largest.dtype)


def row_scale(largest: Tensor, s_norm: Tensor, p_norm: Tensor) -> Tensor:
    """max r |s|/|p|; a live row holds a 1, so both norms are about 1 at least."""
    return largest * live(largest) * (s_norm / p_norm.clamp_min(0.5))


def zero_where_dead(values: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """Zeros where s is no more than the smallest normal number, in place unless there is an ``out``."""
    tiny = torch.finfo(s.dtype).tiny
    return torch.ops.aten.threshold_backward.grad_input(values, s, tiny, grad_input=values if out is None else out)


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
    disposable: bool,
) -> Tokens:
    """The queries (side "q") or keys ("k") of a block.  Decisions not yet in ``indices`` are taken and put there.

    They lie in the workspace, and are good until tokens are made in the same ``place`` again; without a gradient they
    may take the place of z and redundant where these are ``disposable``.
    """
    if options.differential == "token" and options.normalization != "denominator" and not torch.is_grad_enabled():
        assert redundant is not None
        return Tokens([(difference(side, z, redundant, tables, indices, memory, place, disposable), None)])
    number = "qk".index(side)

    def decide(name: str, *parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        straight_through = options.router_gradient == "straight_through"
        if not straight_through:
            if name not in indices:
                indices[name] = router_choices(*parts)
            return indices[name].long(), None
        logits = router_logits(*parts)
        if name not in indices:
            indices[name] = logits.argmax(-1)
        return indices[name].long(), logits

    def measure(name: str, tokens: Tensor, router: Tensor, place: str) -> Tensor:  # Eq. 6
        gamma = reference.choose(tables.gamma, *decide(name, (tokens, router)))[..., None]
        if torch.is_grad_enabled():
            return Power.apply(tokens, gamma, memory, place)
        out = tokens if disposable else memory.like(tokens, f"{place} p")
        p, scale = power(tokens, gamma, tables.exact_zeros, out, memory)
        return p.mul_(scale)

    measured = measure(f"measure_{side}", z, tables.kernel_routers[number], f"{place} tokens")
    if options.differential == "off":
        return at_unit_scale(Tokens([(measured, measured)]), side, options)

    assert redundant is not None and tables.lam is not None and tables.differential_routers is not None
    router = tables.kernel_routers[2 + number]
    other = measure(f"measure_{side}_redundant", redundant, router, f"{place} redundant")
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


def difference(
    side: str, z: Tensor, redundant: Tensor, tables: Tables, indices: Indices, memory: Workspace, place: str,
    disposable: bool,
) -> Tensor:  # fmt: skip
    """Eqs. 5-8 of one side without gradients or denominator terms."""
    assert tables.lam is not None and tables.differential_routers is not None
    number, names = "qk".index(side), names_of(side)

    def measure(name: str, tokens: Tensor, router: Tensor, place: str) -> tuple[Tensor, Tensor]:
        indices[name] = router_choices((tokens, router))
        out = tokens if disposable else memory.like(tokens, f"{place} p")
        return power(tokens, tables.gamma[indices[name]][..., None], tables.exact_zeros, out, memory)

    p, scale = measure(names[0], z, tables.kernel_routers[number], f"{place} tokens")
    other, other_scale = measure(names[1], redundant, tables.kernel_routers[2 + number], f"{place} redundant")
    # [Z, Z'] R = Z R[:d] + Z' R[d:] spares the concatenation of Eq. 7.
    top, bottom = tables.differential_routers[number].tensor_split(2)
    indices[names[2]] = router_choices((p, top, scale), (other, bottom, other_scale))
    return p.mul_(scale).addcmul_(other, tables.lam[indices[names[2]]][..., None] * other_scale, value=-1)


def at_unit_scale(tokens: Tokens, side: str, options: Options) -> Tokens:
    """Under "denominator" the output does not depend on the scale of a query: at 1 it neither under- nor overflows."""
    if options.normalization != "denominator" or side == "k":
        return tokens
    maps: list[tuple[Tensor, Tensor | None]] = []
    for hat, mass in tokens.maps:
        assert mass is not None
        largest = largest_of_heads(mass, options.num_heads)
        maps.append((over_heads(hat, largest, options.num_heads), over_heads(mass, largest, options.num_heads)))
    return Tokens(maps, tokens.lam)


def largest_of_heads(mass: Tensor, num_heads: int) -> Tensor:
    """The largest entry of each head, or 1 where there is none, without a gradient: (b, n, H, 1)."""
    largest = mass.detach().unflatten(-1, (num_heads, -1)).amax(-1, keepdim=True)
    return largest.where(largest > 0, 1)


def over_heads(tokens: Tensor, divisor: Tensor, num_heads: int) -> Tensor:
    """tokens (b, n, d) divided by (b, n, H, 1) or (b, 1, 1, 1)."""
    return (tokens.unflatten(-1, (num_heads, -1)) / divisor).flatten(-2)
