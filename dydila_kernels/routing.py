"""What the routers of a layer do: their decisions, how evenly they spread the tokens, and a loss that evens it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dydila_kernels import reference, torch_backend
from dydila_kernels.functional import decisions_of, validated

if TYPE_CHECKING:
    from dydila_kernels.attention import DyDiLAttention


@dataclass(frozen=True)
class Routing:
    """The routing of one call, under the names of the modules that decide.

    ``projection_q``, ``projection_k`` (u and v of Eq. 1); ``measure_q``, ``measure_k``, ``measure_q_redundant``,
    ``measure_k_redundant`` (f of Eq. 6 for Q, K, Q', K'); ``differential_q``, ``differential_k`` (l of Eq. 7).
    A layer without a stage has no entry for it.

    Attributes:
        indices: (B, N) int64 each.
        usage: (n,) float32 each, the share of the (unmasked) tokens that took each choice.
    """

    indices: dict[str, Tensor]
    usage: dict[str, Tensor]

    def __str__(self) -> str:
        width = max(map(len, self.usage))
        return "\n".join(
            f"{name:{width}}  " + " ".join(f"{share:4.0%}" for share in usage.tolist())
            for name, usage in self.usage.items()
        )


def routing_of(attn: DyDiLAttention, x: Tensor, mask: Tensor | None) -> Routing:
    """The decisions of ``attn`` for tokens x (B, N, d), and their usage."""
    indices, choices = {}, {}
    triton = attn._runs_triton(x)
    projections = [name for name in ("projection_q", "projection_k") if getattr(attn, name) is not None]
    routers = [getattr(attn, name).router for name in projections]
    if triton and routers:
        from dydila_kernels.ops import backend

        decided = list(backend.route(x, routers))
    else:
        decided = [getattr(attn, name).logits(x).argmax(-1) for name in projections]
    for name, index in zip(projections, decided, strict=True):
        indices[name], choices[name] = index.long(), getattr(attn, name).num_projectors
    tensors, arguments = validated(*attn._projected(x), mask=mask, **attn._core_arguments())
    for name, index in decisions_of(attn.backend, *tensors, **arguments).items():
        indices[name] = index.long()
        owner = attn.measure if name.startswith("measure") else attn.differential
        assert owner is not None
        choices[name] = owner.num_factors
    return Routing(indices, {name: usage_of(index, choices[name], mask) for name, index in indices.items()})


def usage_of(index: Tensor, choices: int, mask: Tensor | None) -> Tensor:
    """The share of tokens that took each of the choices: (n,) float32, all zero where there is no token."""
    chosen = index[..., None] == torch.arange(choices, device=index.device)
    return mean_over_tokens(chosen.float(), mask)


def mean_over_tokens(t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of t (B, N, n) over the (unmasked) tokens: (n,), all zero where there is no token."""
    if mask is None:
        return t.sum((0, 1)) / max(t.shape[0] * t.shape[1], 1)
    return t.masked_fill(~mask[..., None], 0).sum((0, 1)) / mask.sum().clamp(min=1)


def logits_of(attn: DyDiLAttention, x: Tensor) -> dict[str, Tensor]:
    """The logits (B, N, n) of every router of the layer, differentiable, by the reference equations."""
    (q, k, _, q_redundant, k_redundant, gamma, *_), _ = validated(*attn._projected(x), **attn._core_arguments())
    logits = {}
    for name in ("projection_q", "projection_k"):
        projection = getattr(attn, name)
        if projection is not None:
            logits[name] = projection.logits(x)
    assert q is not None and gamma is not None
    dtype = torch_backend.accumulation_dtype(q.dtype)
    measured = {}
    names = {"q": q, "k": k, "q_redundant": q_redundant, "k_redundant": k_redundant}
    for (name, tokens), router in zip(names.items(), attn.measure.routers().to(dtype), strict=False):
        assert tokens is not None
        logits[f"measure_{name}"] = tokens.to(dtype) @ router
        chosen = gamma.to(dtype)[logits[f"measure_{name}"].argmax(-1)]
        measured[name] = reference.power(tokens.to(dtype), chosen)
    if attn.differential is not None:
        for side, router in zip("qk", attn.differential.routers().to(dtype), strict=False):
            pair = torch.cat([measured[side], measured[f"{side}_redundant"]], -1)
            logits[f"differential_{side}"] = pair @ router
    return logits


def balance_loss_of(attn: DyDiLAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the routers of n sum_f usage_f probability_f, where the gradient goes through the probabilities."""
    with torch_backend.no_autocast(x.device):
        losses = []
        for logits in logits_of(attn, x).values():
            usage = usage_of(logits.argmax(-1), logits.shape[-1], mask)
            mean = mean_over_tokens(logits.softmax(-1), mask)
            losses.append(len(usage) * (usage.to(mean) * mean).sum())
        return torch.stack(losses).mean()
