"""The token differential operator (TDO), Eqs. 7-8: the differential factors and the routers that choose among them.

Computed by ``ops/tokens.py`` on a GPU, and by ``torch_backend/tokens.py`` elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydila_kernels.routers import RoutedFactors, init_router_, router_parameter


class TokenDifferential(RoutedFactors):
    """Owns ``lam`` (n_D,), a table shared by queries and keys, and a router (2d, n_D) for [Q, Q'] and one for [K, K'].

    The map-wise difference of Eq. 10 chooses lambda from the query side alone: ``sides=("q",)``.  The computation is
    :func:`dydila_kernels.dydila_attention`, which measures, subtracts and attends in one go.

    Args:
        dim: d, channels of a token.
        num_factors: n_D.
        lambda_init: initial value of all factors.
        sides: which of "q" and "k" have a router.
        trainable_routers: whether the routers get a gradient, straight through.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_factors: int,
        *,
        lambda_init: float = 0.01,
        sides: tuple[str, ...] = ("q", "k"),
        trainable_routers: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tuple(f"router_{side}" for side in sides))
        self.dim, self.num_factors, self.lambda_init = dim, num_factors, lambda_init
        self.lam = nn.Parameter(torch.empty(num_factors, device=device, dtype=dtype))
        for name in self.router_names:
            setattr(self, name, router_parameter(2 * dim, num_factors, trainable_routers, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lam, self.lambda_init)
        for name in self.router_names:
            init_router_(getattr(self, name), self.dim)

    def table(self) -> Tensor:
        return self.lam

    def extra_repr(self) -> str:
        return f"{self.dim}, num_factors={self.num_factors}, routers={len(self.router_names)}"
