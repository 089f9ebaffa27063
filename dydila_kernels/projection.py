"""The dynamic projection module (DPM), Eqs. 1-2: each token through the projector that its router chooses.

Computed by ``ops/projection.py`` on a GPU, and by ``torch_backend/projection.py`` elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dydila_kernels import torch_backend
from dydila_kernels.precision import autocast_dtype
from dydila_kernels.routers import init_router_, router_parameter
from dydila_kernels.types import Backend


class Decision(NamedTuple):
    """What a projection did with its tokens: choices (B, N), logits (B, N, n_P) with their gradient, and n_P."""

    choices: Tensor
    logits: Tensor
    num_projectors: int


class Recording(threading.local):
    """Of this thread: where projections note their decisions, if anyone asks."""

    decisions: dict[nn.Module, Decision] | None = None


recording = Recording()


@contextmanager
def recorded() -> Iterator[dict[nn.Module, Decision]]:
    """Within, projections note what they decide, under whatever hooks, offloading or wrappers they are called."""
    before, recording.decisions = recording.decisions, {}
    try:
        yield recording.decisions
    finally:
        recording.decisions = before


class DynamicProjection(nn.Module):
    """Q' (or K') of Eq. 2.  Owns ``weight`` (n_P, d, d), which multiplies from the right, and ``router`` (d, n_P).

    Args:
        dim: d, channels of a token.
        num_projectors: n_P.
        trainable_routers: whether the router gets a gradient, straight through.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_projectors: int,
        *,
        trainable_routers: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_projectors, self.trainable_routers = dim, num_projectors, trainable_routers
        self.weight = nn.Parameter(torch.empty(num_projectors, dim, dim, device=device, dtype=dtype))
        self.router = router_parameter(dim, num_projectors, trainable_routers, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Each projector as nn.Linear would be: uniform in +-1/sqrt(d).
        nn.init.uniform_(self.weight, -(self.dim**-0.5), self.dim**-0.5)
        init_router_(self.router, self.dim)

    def logits(self, x: Tensor) -> Tensor:
        """The router's logits (B, N, n_P), in float32 at least; their argmax is Eq. 1."""
        return torch_backend.projection_logits(x, self.router)

    def forward(
        self,
        x: Tensor,
        chosen: tuple[Tensor, Any] | None = None,
        backend: Backend = torch_backend,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d) in the dtype that ``nn.Linear`` would give.

        ``chosen``: its index (B, N) and plan for x, of ``choices``, where they are known.  ``norm``: of the tokens once
        they are projected, or None.  A trained router chooses among normed tokens: a norm takes away the scale of a
        token, which is what carries the router's gradient.
        """
        weight: Tensor = self.weight
        differentiated = torch.is_grad_enabled() or torch_backend.is_transformed()
        logits = self.logits(x) if self.trainable_routers and differentiated else None
        index, plan = choices(x, [self], backend)[0] if chosen is None else chosen
        if not torch.compiler.is_compiling() and recording.decisions is not None:
            noted = self.logits(x) if logits is None else logits
            recording.decisions[self] = Decision(index, noted, self.num_projectors)
        dtype = autocast_dtype(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
        out = backend.project(x, weight, plan)
        if norm is not None:
            out = norm(out)
        return out if logits is None else torch_backend.straight_through(out, logits, index.long())

    def extra_repr(self) -> str:
        return f"{self.dim}, num_projectors={self.num_projectors}"


def choices(x: Tensor, projections: Sequence[DynamicProjection], backend: Backend) -> list[tuple[Tensor, Any]]:
    """What each of ``projections``, of one shape, chooses for x: the index (B, N), and what the backend plans with it.

    All of them read x (B, N, d) at once.
    """
    index = backend.route(x, [p.router for p in projections])
    plans = backend.plan(index, projections[0].router.shape[1])
    return list(zip(index.unbind(), plans, strict=True))
