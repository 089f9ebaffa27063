"""What the routers of a layer do: their decisions, how evenly they spread the tokens, and a loss that evens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dydila_kernels import reference
from dydila_kernels.precision import accumulation_dtype, no_autocast
from dydila_kernels.projection import Decision, recorded
from dydila_kernels.types import Backend

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
        usage: (n,) float32 each, the fraction of the (unmasked) tokens that took each choice.
    """

    indices: dict[str, Tensor]
    usage: dict[str, Tensor]

    def __str__(self) -> str:
        width = max(map(len, self.usage))
        return "\n".join(
            f"{name:{width}}  " + " ".join(f"{fraction:4.0%}" for fraction in usage.tolist())
            for name, usage in self.usage.items()
        )


def routing_of(attn: DyDiLAttention, x: Tensor, mask: Tensor | None, backend: Backend) -> Routing:
    """The decisions of ``attn`` for tokens x (B, N, d), and their usage."""
    with recorded() as noted:
        inputs = attn._core_inputs(x, backend)
    indices, choices = {}, {}
    for name, decision in decisions_of(attn, noted).items():
        indices[name], choices[name] = decision.choices.long(), decision.num_projectors
    for name, index in backend.decisions(inputs, attn.options, mask=mask).items():
        indices[name] = index.long()
        owner = attn.measure if name.startswith("measure") else attn.differential
        assert owner is not None
        choices[name] = owner.num_factors
    return Routing(indices, {name: usage_of(index, choices[name], mask) for name, index in indices.items()})


def decisions_of(attn: DyDiLAttention, noted: Mapping[nn.Module, Decision]) -> dict[str, Decision]:
    """Those of the layer's own projections, which tools may have wrapped, among all that were noted."""
    return {
        name: noted[module]
        for name in ("projection_q", "projection_k")
        for module in (() if getattr(attn, name) is None else getattr(attn, name).modules())
        if module in noted
    }


def usage_of(index: Tensor, choices: int, mask: Tensor | None) -> Tensor:
    """The fraction of tokens that took each of the choices: (n,) float32, all zero where there is no token."""
    chosen = index[..., None] == torch.arange(choices, device=index.device)
    return mean_over_tokens(chosen.float(), mask)


def mean_over_tokens(t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of t (B, N, n) over the (unmasked) tokens: (n,), all zero where there is no token."""
    if mask is None:
        return t.sum((0, 1)) / max(t.shape[0] * t.shape[1], 1)
    return t.masked_fill(~mask[..., None], 0).sum((0, 1)) / mask.sum().clamp(min=1)


def logits_of(attn: DyDiLAttention, x: Tensor, backend: Backend) -> dict[str, Tensor]:
    """The logits (B, N, n) of every router of the layer, differentiable, by the reference equations."""
    with recorded() as noted:
        inputs = attn._core_inputs(x, backend)
    logits = {name: decision.logits for name, decision in decisions_of(attn, noted).items()}
    dtype = accumulation_dtype(inputs.q.dtype)
    measured = {}
    names = ("q", "k", "q_redundant", "k_redundant")
    for name, router in zip(names, inputs.kernel_routers.to(dtype), strict=False):
        tokens = getattr(inputs, name)
        logits[f"measure_{name}"] = tokens.to(dtype) @ router
        chosen = inputs.gamma.to(dtype)[logits[f"measure_{name}"].argmax(-1)]
        measured[name] = reference.power(tokens.to(dtype), chosen)
    if inputs.differential_routers is not None:
        for side, router in zip("qk", inputs.differential_routers.to(dtype), strict=False):
            pair = torch.cat([measured[side], measured[f"{side}_redundant"]], -1)
            logits[f"differential_{side}"] = pair @ router
    return logits


def balance_loss_of(attn: DyDiLAttention, x: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    """The mean over the routers of n sum_f usage_f probability_f, where the gradient goes through the probabilities.

    Raises RuntimeError where the routers are fixed.
    """
    if attn.router_gradient == "none":
        raise RuntimeError("balance_loss needs router_gradient='straight_through'; got 'none', whose routers are fixed")
    with no_autocast(x.device):
        losses = []
        for logits in logits_of(attn, x, backend).values():
            usage = usage_of(logits.argmax(-1), logits.shape[-1], mask)
            mean = mean_over_tokens(logits.softmax(-1), mask)
            losses.append(len(usage) * (usage.to(mean) * mean).sum())
        return torch.stack(losses).mean()
