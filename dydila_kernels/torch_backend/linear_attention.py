"""Eqs. 8 and 10 for a block: O = Q (K^T V) per head, or (Q K^T) V where that is cheaper.

Shapes: tokens (b, n, d), per head (b, H, n, e).  The states of a call are a flat list: for each map K^T V
(b, H, e, e), then, under "denominator", for each map the sum of the key masses (b, H, e, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydila_kernels.torch_backend.blocks import Workspace
from dydila_kernels.torch_backend.tokens import Tokens
from dydila_kernels.types import Options


def heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(b, n, d) -> (b, H, n, e), a view."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def states_pay(tokens: int, dim: int, num_heads: int) -> bool:
    """Whether Q (K^T V) costs no more than (Q K^T) V for images of so many tokens: N >= e."""
    return tokens >= dim // num_heads


def key_masses(keys: Tokens, options: Options) -> list[Tensor]:
    if options.normalization != "denominator":
        return []
    sums = (mass.sum(1, keepdim=True) for _, mass in keys.maps if mass is not None)
    return [heads(mass, options.num_heads).transpose(-2, -1) for mass in sums]


def states_of(keys: Tokens, v: Tensor, scale: Tensor | float, options: Options) -> list[Tensor]:
    """What a block of keys adds to the states; ``scale`` (b, 1, 1, 1) is 1/count under "length", else 1."""
    values = heads(v, options.num_heads)
    products = [(heads(k, options.num_heads).transpose(-2, -1) @ values) * scale for k, _ in keys.maps]
    return products + key_masses(keys, options)


def readout(queries: Tokens, states: list[Tensor], options: Options, workspace: Workspace | None) -> Tensor:
    """Q S, normalised: (b, n, d), in the workspace where there is one and the result is one product."""
    maps = len(queries.maps)
    names = ("product", "second product")
    products = [
        read(q, state, workspace, name) for (q, _), state, name in zip(queries.maps, states[:maps], names, strict=False)
    ]
    return combine(queries, products, states[maps:], options)


def read(q: Tensor, state: Tensor, workspace: Workspace | None, name: str) -> Tensor:
    """Q S of each head: (b, n, d) and (b, H, e, e) -> (b, H, n, e), a view of tokens (b, n, d)."""
    num_heads = state.shape[1]
    if workspace is None:
        return heads(q, num_heads) @ state
    products = heads(workspace.take(name, q.shape, q.dtype, q.device), num_heads)
    for image, image_state, product in zip(heads(q, num_heads), state, products, strict=True):
        torch.bmm(image, image_state, out=product)
    return products


def whole_attention(
    queries: Tokens, keys: Tokens, v: Tensor, scale: Tensor | float, options: Options, workspace: Workspace | None
) -> Tensor:
    """Attention of images that lie in the block as a whole, in the cheaper order of the two products: (b, n, d)."""
    if states_pay(v.shape[1], v.shape[2], options.num_heads):
        return readout(queries, states_of(keys, v, scale, options), options, workspace)
    values = heads(v, options.num_heads)
    products = [
        ((heads(q, options.num_heads) @ heads(k, options.num_heads).transpose(-2, -1)) * scale) @ values
        for (q, _), (k, _) in zip(queries.maps, keys.maps, strict=True)
    ]
    return combine(queries, products, key_masses(keys, options), options)


def combine(queries: Tokens, products: list[Tensor], masses: list[Tensor], options: Options) -> Tensor:
    """Divide by the masses under "denominator"; subtract the second map of Eq. 10.  (b, H, n, e) each -> (b, n, d)."""
    for i, k_mass in enumerate(masses):
        q_mass = queries.maps[i][1]
        assert q_mass is not None
        mass = heads(q_mass, options.num_heads) @ k_mass
        live = mass > 0
        products[i] = products[i] / torch.where(live, mass, 1) * live.to(mass.dtype)
    tokens = [product.transpose(1, 2).flatten(2) for product in products]
    return tokens[0] if queries.lam is None else torch.addcmul(tokens[0], queries.lam, tokens[1], value=-1)
