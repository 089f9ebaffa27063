"""What a backend has to know of other processes, where these hold the other tokens of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor


class Ranks(Protocol):
    """Processes of which each holds some of the tokens of all images, see :mod:`dydila_kernels.distributed`.

    An image has ``length`` tokens on all of them together, of which, with a mask, ``counts`` (B,) are attended.
    """

    length: int
    counts: Tensor | None

    def reduce_(self, tensors: Sequence[Tensor], operation: Literal["sum", "max"]) -> None:
        """Each tensor becomes its sum, or its maximum, over the ranks; all of them call this at once."""
