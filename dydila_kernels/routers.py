"""What the sub-modules share about routers: how they are made, stacked for the core, and packed for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels import checks


def router_parameter(
    rows: int, choices: int, trainable: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """An uninitialised router (rows, choices).

    Under ``router_gradient="none"`` it is a fixed random partition of the tokens: in the state_dict, without gradient.
    """
    return nn.Parameter(torch.empty(rows, choices, device=device, dtype=dtype), requires_grad=trainable)


def init_router_(router: nn.Parameter, dim: int) -> None:
    """N(0, 1/d), so that the logits of a token with unit variance have unit variance."""
    nn.init.normal_(router, std=dim**-0.5)


class RoutedFactors(nn.Module):
    """Base of the modules that own a table of factors and a few routers of one shape.

    The layer calls it for its tensors, so that hooks on whatever owns parameters fire, as in offloading.
    """

    router_names: tuple[str, ...]
    packed: Tensor

    def __init__(self, router_names: tuple[str, ...]) -> None:
        super().__init__()
        self.router_names = router_names

    def table(self) -> Tensor:
        """The factors (n,)."""
        raise NotImplementedError

    def forward(self) -> tuple[Tensor, Tensor]:
        """The table (n,) and the :meth:`routers`."""
        return checks.outliving(self, self.table()), self.routers()

    def routers(self) -> Tensor:
        """The routers (routers, rows, n) in the order of ``router_names``."""
        return self.packed if self.is_packed() else self.stacked()

    def stacked(self) -> Tensor:
        return torch.stack([getattr(self, name) for name in self.router_names])

    def is_packed(self) -> bool:
        return "packed" in self._buffers

    def pack(self) -> None:
        """Stacks the routers once instead of in every call, for inference."""
        with torch.inference_mode(False), torch.no_grad():  # what inference mode makes cannot be loaded into
            self.register_buffer("packed", self.stacked(), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.is_packed():
            self.pack()
