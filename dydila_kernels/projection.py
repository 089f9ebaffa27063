"""The dynamic projection module (DPM), Eqs. 1-2: each token through the projector that its router chooses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydila_kernels import reference, torch_backend
from dydila_kernels.routers import init_router_, router_parameter


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

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """x (B, N, d) -> (B, N, d) in the dtype that ``nn.Linear`` would give.

        With ``index`` (B, N) int8, the choices of the router where these are known, the Triton kernels do the work.
        """
        weight: Tensor = self.weight
        logits = self.logits(x) if index is None or self.trainable_routers else None
        dtype = torch_backend.autocast_dtype(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
        if index is None:
            assert logits is not None
            trained = logits if self.trainable_routers else None
            return torch_backend.routed_projection(x, weight, logits.argmax(-1), trained)

        from dydila_kernels.ops import backend

        out = backend.project(x, weight, index)
        if logits is None:
            return out
        return out * reference.straight_through_one(logits, index.long()).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_projectors={self.num_projectors}"
