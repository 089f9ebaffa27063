"""Eqs. 8 and 10 for a block: O = Q (K^T V) per head, or (Q K^T) V where that is cheaper.

Shapes: tokens (b, n, d), whose heads are views (b, H, n, e).  The states of a call are a flat list: for each map K^T V
(b, H, e, e), then, under "denominator", for each map the sum of the key masses (b, 1, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blocks import Workspace
from dydila_kernels.torch_backend.products import multiply
from dydila_kernels.torch_backend.tokens import Tokens
from dydila_kernels.types import Options


def heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(b, n, d) -> (b, H, n, e), a view."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merged(per_head: Tensor) -> Tensor:
    """(b, H, n, e) -> (b, n, d)."""
    return per_head.transpose(1, 2).flatten(2)


def states_pay(tokens: int, dim: int, num_heads: int) -> bool:
    """Whether Q (K^T V) costs no more than (Q K^T) V for images of so many tokens: N >= e."""
    return tokens >= dim // num_heads


def read(tokens: Tensor, states: Tensor, memory: Workspace, name: str) -> Tensor:
    """Tokens (b, n, d) times states (b, H, e, e) per head: (b, n, d) in the workspace."""
    out, num_heads = memory.like(tokens, name), states.shape[1]
    if num_heads == 1:
        for image, (state,), product in zip(tokens, states, out, strict=True):
            multiply(image, state, product)
        return out
    for image, state, product in zip(heads(tokens, num_heads), states, heads(out, num_heads), strict=True):
        torch.bmm(image, state, out=product)
    return out


def outer(left: Tensor, right: Tensor, num_heads: int) -> Tensor:
    """left^T right per head: tokens (b, n, d) twice -> (b, H, e, e)."""
    if num_heads > 1 or torch.is_grad_enabled():
        return heads(left, num_heads).mT @ heads(right, num_heads)
    out = left.new_empty(len(left), 1, left.shape[-1], right.shape[-1])
    for one, other, (product,) in zip(left, right, out, strict=True):
        multiply(one.T, other, product)
    return out


def key_masses(keys: Tokens, options: Options) -> list[Tensor]:
    if options.normalization != "denominator":
        return []
    return [mass.sum(1, keepdim=True) for _, mass in keys.maps if mass is not None]


def states_of(keys: Tokens, v: Tensor, scale: Tensor | float, options: Options) -> list[Tensor]:
    """What a block of keys adds to the states; ``scale`` (b, 1, 1, 1) is 1/count under "length", else 1."""
    products = [outer(k, v, options.num_heads) * scale for k, _ in keys.maps]
    return products + key_masses(keys, options)


def readout(queries: Tokens, states: list[Tensor], options: Options, memory: Workspace) -> Tensor:
    """Q S, normalised: (b, n, d)."""
    maps = len(queries.maps)
    products = [
        merged(heads(q, options.num_heads) @ state)
        if torch.is_grad_enabled()
        else read(q, state, memory, f"product {i}")
        for i, ((q, _), state) in enumerate(zip(queries.maps, states[:maps], strict=True))
    ]
    return combine(queries, products, states[maps:], options)


def whole_attention(queries: Tokens, keys: Tokens, v: Tensor, scale: Tensor | float, options: Options) -> Tensor:
    """(Q K^T) V of images that lie in the block as a whole: (b, n, d)."""
    values = heads(v, options.num_heads)
    products = [
        ((heads(q, options.num_heads) @ heads(k, options.num_heads).mT) * scale) @ values
        for (q, _), (k, _) in zip(queries.maps, keys.maps, strict=True)
    ]
    return combine(queries, [merged(p) for p in products], key_masses(keys, options), options)


def combine(queries: Tokens, products: list[Tensor], masses: list[Tensor], options: Options) -> Tensor:
    """Divide by the masses under "denominator"; subtract the second map of Eq. 10.  (b, n, d) each -> (b, n, d)."""
    for i, k_mass in enumerate(masses):
        q_mass = queries.maps[i][1]
        assert q_mass is not None
        inverse = inverse_mass(q_mass, k_mass, options.num_heads)
        products[i] = (products[i].unflatten(-1, (options.num_heads, -1)) * inverse).flatten(-2)
    return products[0] if queries.lam is None else torch.addcmul(products[0], queries.lam, products[1], value=-1)


def inverse_mass(mass: Tensor, mean: Tensor, num_heads: int) -> Tensor:
    """1 / (M.m) of each head of M (b, n, d) and m (b, 1, d), or 0 where there is none: (b, n, H, 1)."""
    product = (mass * mean).unflatten(-1, (num_heads, -1)).sum(-1, keepdim=True)
    live = product > 0
    return live.to(product.dtype) / torch.where(live, product, 1)
