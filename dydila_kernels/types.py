"""The types that the layer, its backends and sequence parallelism share.  This file imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

DIFFERENTIAL_SIDES = {"token": 2, "map": 1, "off": 0}
"""How many of queries and keys choose a lambda, by ``differential``."""


class Options(NamedTuple):
    """The choices of a call to the core, already validated; see :func:`dydila_kernels.dydila_attention`."""

    num_heads: int
    normalization: str
    router_gradient: str
    differential: str


class Grid(NamedTuple):
    """An image among the N tokens of a row: tokens ``start`` to ``start + rows * columns``."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


class CoreInputs(NamedTuple):
    """The tensors of a call to the core, already validated: shapes as in :func:`dydila_kernels.dydila_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_redundant: Tensor | None
    k_redundant: Tensor | None
    gamma: Tensor
    lam: Tensor | None
    kernel_routers: Tensor
    differential_routers: Tensor | None


class Convolution(NamedTuple):
    """DWC of Eq. 9: weight (d, 1, 3, 3), bias (d,) or None, and the grid of each image, or one for all of a batch."""

    weight: Tensor
    bias: Tensor | None
    grids: Sequence[Grid]


class Ranks(Protocol):
    """Processes of which each holds some of the tokens of all images, see :mod:`dydila_kernels.distributed`.

    An image has ``length`` tokens on all of them together, of which, with a mask, ``counts`` (B,) are attended.
    """

    length: int
    counts: Tensor | None

    def reduce_(self, tensors: Sequence[Tensor], operation: Literal["sum", "max"]) -> None:
        """Each tensor becomes its sum, or its maximum, over the ranks; all of them call this at once."""


def decision_names(differential: str) -> tuple[str, ...]:
    """The routing decisions that the core takes, as :class:`dydila_kernels.Routing` names them."""
    names: tuple[str, ...] = ("measure_q", "measure_k")
    if differential != "off":
        names += ("measure_q_redundant", "measure_k_redundant", "differential_q")
    if differential == "token":
        names += ("differential_k",)
    return names
