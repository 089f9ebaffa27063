"""What the sub-modules share about routers: how they are made, stacked for the core, and packed for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
    """Base of the modules that own a table of factors and a few routers of one shape."""

    router_names: tuple[str, ...]
    packed: Tensor | None

    def __init__(self, router_names: tuple[str, ...]) -> None:
        super().__init__()
        self.router_names = router_names
        self.register_buffer("packed", None, persistent=False)

    def stacked(self) -> Tensor:
        return torch.stack([getattr(self, name) for name in self.router_names])

    def routers(self) -> Tensor:
        """The routers (routers, rows, choices) in the order of ``router_names``."""
        return self.stacked() if self.packed is None else self.packed

    def pack(self) -> None:
        """Stacks the routers once instead of in every call, for inference."""
        self.packed = self.stacked().detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.packed is not None:
            self.pack()
