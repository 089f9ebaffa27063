"""The dynamic measure kernel (DMK), Eqs. 5-6: the kernel factors and the routers that choose among them.

Computed by ``ops/tokens.py`` on a GPU, and by ``torch_backend/tokens.py`` elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydila_kernels.routers import RoutedFactors, init_router_, router_parameter


class DynamicMeasureKernel(RoutedFactors):
    """Owns ``gamma`` (n_F,), one table shared by all tokens, and a router (d, n_F) for each measured token matrix.

    With ``redundant`` the measured matrices are Q, K, Q' and K' (four routers), without it two.  The computation is
    :func:`dydila_kernels.dydila_attention`, which measures, subtracts and attends in one go.

    Args:
        dim: d, channels of a token.
        num_factors: n_F.
        gamma_init: initial value of all factors.
        redundant: whether Q' and K' are measured, too.
        trainable_routers: whether the routers get a gradient, straight through.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_factors: int,
        *,
        gamma_init: float = 3.0,
        redundant: bool = True,
        trainable_routers: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(("router_q", "router_k") + (("router_q_redundant", "router_k_redundant") if redundant else ()))
        self.dim, self.num_factors, self.gamma_init = dim, num_factors, gamma_init
        self.gamma = nn.Parameter(torch.empty(num_factors, device=device, dtype=dtype))
        for name in self.router_names:
            setattr(self, name, router_parameter(dim, num_factors, trainable_routers, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.gamma_init)
        for name in self.router_names:
            init_router_(getattr(self, name), self.dim)

    def table(self) -> Tensor:
        return self.gamma

    def extra_repr(self) -> str:
        return f"{self.dim}, num_factors={self.num_factors}, routers={len(self.router_names)}"
