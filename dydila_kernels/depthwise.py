"""The re-parameterised depth-wise convolution (DWC) of Eq. 9: several branches in training, one 3x3 kernel after.

Computed by ``ops/depthwise.py`` on a GPU, and by ``torch_backend/depthwise.py`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dydila_kernels import checks, torch_backend
from dydila_kernels.types import SIZES, Backend


class Branches(nn.ParameterDict):
    """The kernels by name.  The module is called for them, so that hooks on whatever owns parameters fire."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses

    def forward(self) -> dict[str, Tensor]:
        return dict(self.items())


class DepthwiseConv(nn.Module):
    """DWC of Eq. 9.  Owns a kernel (d, 1, rows, columns) for each branch, as ``branches.3x3``, and maybe a bias (d,).

    The branches are summed into one 3x3 kernel before it is applied: convolution is linear, so this is their sum,
    in training too.  After :meth:`fuse` the sum itself, ``weight`` (d, 1, 3, 3), is what the module holds.

    Args:
        dim: d, channels of a token.
        branches: different names among "3x3", "1x3", "3x1", "1x1" and "identity", one with a kernel at least.
        bias: whether there is a bias; the layer has none.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: ``branches`` is not as described.
    """

    def __init__(
        self,
        dim: int,
        branches: Sequence[str] = ("3x3", "1x3", "3x1"),
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.branches("branches", branches)
        if not branches:
            raise ValueError("branches must hold at least one branch; got none")
        self.dim, self.names = dim, tuple(branches)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = Branches(
            {name: nn.Parameter(torch.empty(dim, 1, *SIZES[name], **factory)) for name in branches if name in SIZES}
        )
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", None)
        self.register_parameter("bias", nn.Parameter(torch.empty(dim, **factory)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # As nn.Conv2d would be: uniform in +-1/sqrt(taps).
        for weight in self.branches.values():
            bound = weight[0].numel() ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def fused_weight(self, backend: Backend = torch_backend) -> tuple[Tensor, Tensor | None]:
        """The 3x3 kernel (d, 1, 3, 3) that equals the sum of the branches, and the bias (d,) or None."""
        return (self.sum_of(self.branches(), backend) if self.weight is None else self.weight), self.bias

    def sum_of(self, branches: Mapping[str, Tensor], backend: Backend = torch_backend) -> Tensor:
        """The branches, and the identity, as one kernel, in float32 at least."""
        identity = "identity" in self.names
        total = backend.taps(branches, identity)
        return torch_backend.taps(branches, identity) if total is None else total

    def fuse(self) -> DepthwiseConv:
        """Holds the summed kernel in place of the branches, for inference; asking twice changes nothing."""
        if self.weight is None:
            with torch.inference_mode(False):  # what inference mode makes cannot be loaded into
                self.weight = nn.Parameter(self.fused_weight()[0].detach(), requires_grad=False)
            self.branches = Branches()
            if self.bias is not None:
                self.bias.requires_grad_(False)
        return self

    def forward(self, backend: Backend = torch_backend) -> tuple[Tensor, Tensor | None]:
        """As :meth:`fused_weight`: the layer calls the module for its tensors, so that hooks fire, and the backend
        convolves."""
        weight, bias = self.fused_weight(backend)
        return checks.outliving(self, weight), None if bias is None else checks.outliving(self, bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        fused, branches = f"{prefix}weight", f"{prefix}branches."
        if self.weight is None and fused in state_dict:
            raise RuntimeError(f"{fused!r} was saved after fuse(): call fuse() on this module before loading it")
        if self.weight is not None and fused not in state_dict:
            # Unless they are the branches that were summed, torch says what is missing and what is unexpected.
            shapes = {f"{branches}{name}": (self.dim, 1, *SIZES[name]) for name in self.names if name in SIZES}
            found = {name: t for name, t in state_dict.items() if name.startswith(branches)}
            if {name: tuple(getattr(t, "shape", ())) for name, t in found.items()} == shapes:
                state_dict[fused] = self.sum_of({name.removeprefix(branches): state_dict.pop(name) for name in shapes})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.dim}, branches={self.names}" + (", fused" if self.weight is not None else "")


def kernel_of(dwc: DepthwiseConv, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """What the module returns, made by the backend; tracers, and what is hooked or replaced, know of no backend."""
    apart = backend is torch_backend or torch.compiler.is_compiling() or not checks.is_plain(dwc, DepthwiseConv)
    found: tuple[Tensor, Tensor | None] = dwc() if apart else dwc(backend)
    return found
