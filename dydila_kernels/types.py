"""What the layer hands to a backend: tensors, options, grids.  Both backends import this file, which imports neither.

Symbols: B batch, N tokens, d channels, e = d/H channels of a head; tokens are (B, N, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

DIFFERENTIAL_SIDES = {"token": 2, "map": 1, "off": 0}
"""How many routers choose a differential factor: for Q and K (Eq. 7), for Q alone (Eq. 10), none."""


RotaryTables = tuple[Tensor, Tensor]
"""cos and sin (B, N, e), see :func:`dydila_kernels.reference.rotate`."""


class Options(NamedTuple):
    """The choices of a call to the core, already validated, and the tables of its rotary embeddings, if it has any."""

    num_heads: int
    normalization: str
    router_gradient: str
    differential: str
    rotary: RotaryTables | None = None
    rotary_pairing: str = "interleaved"


class Grid(NamedTuple):
    """An image among the N tokens of a row: tokens ``start`` to ``start + rows * columns``."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


class Video(NamedTuple):
    """A video among the N tokens of a row: ``frames`` grids of ``rows * columns`` tokens, one after the other."""

    start: int
    frames: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.frames * self.rows * self.columns


Grids = Sequence[Grid | Video]


def frames_of(grids: Grids) -> Iterator[Grid]:
    """The grids in their order, and of a video the grid of each frame; one empty grid for a video without tokens."""
    for grid in grids:
        if isinstance(grid, Grid):
            yield grid
        elif grid.start == grid.stop:
            yield Grid(grid.start, 0, 0)
        else:
            size = grid.rows * grid.columns
            yield from (Grid(start, grid.rows, grid.columns) for start in range(grid.start, grid.stop, size))


class CoreInputs(NamedTuple):
    """The tensors of Eqs. 5-8 and 10, already validated.

    q, k, v, q_redundant, k_redundant (B, N, d); gamma (n_F,), lam (n_D,); kernel_routers (4, d, n_F) for q, k, q', k',
    or (2, d, n_F) with ``differential="off"``; differential_routers (2 or 1, 2d, n_D).
    """

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
    """DWC of Eq. 9: weight (d, 1, 3, 3), bias (d,) or None, and the grids of the images, and of videos."""

    weight: Tensor
    bias: Tensor | None
    grids: Grids


class Linear(NamedTuple):
    """``x @ weight.T + bias``: weight (out, d), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    def thirds(self) -> list[Linear]:
        """Those of q, k and v."""
        biases = (None, None, None) if self.bias is None else self.bias.chunk(3)
        return [Linear(weight, bias) for weight, bias in zip(self.weight.chunk(3), biases, strict=True)]


class Projector(NamedTuple):
    """Eqs. 1-2: weight (n_P, d, d), which multiplies from the right, and router (d, n_P)."""

    weight: Tensor
    router: Tensor


Tables = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""gamma, lam, kernel_routers, differential_routers, as in :class:`CoreInputs`."""


Norms = tuple[Callable[[Tensor], Tensor], ...]
"""What queries and keys (B, N, d), redundant ones too, go through before they are measured; or nothing."""


class LayerWeights(NamedTuple):
    """All that a layer computes with: what the torch backend takes where there are no gradients.

    ``projectors``: of Q' and K', or none.
    """

    qkv: Linear
    projectors: tuple[Projector, ...]
    norms: Norms
    tables: Tables
    convolution: Convolution | None
    proj: Linear


class Ranks(Protocol):
    """Processes of which each holds some of the tokens of all images, see :mod:`dydila_kernels.distributed`.

    An image has ``length`` tokens on all of them together, of which, with a mask, ``counts`` (B,) are attended.
    """

    length: int
    counts: Tensor | None

    def reduce_(self, tensors: Sequence[Tensor], operation: Literal["sum", "max"]) -> None:
        """Each tensor becomes its sum, or its maximum, over the ranks; all of them call this at once."""


SIZES = {"3x3": (3, 3), "1x3": (1, 3), "3x1": (3, 1), "1x1": (1, 1)}
"""Rows and columns of the kernel of a branch of Eq. 9; "identity" passes the tokens through and has none."""


class Backend(Protocol):
    """What the layer asks of a backend: :mod:`dydila_kernels.torch_backend`, :mod:`dydila_kernels.ops.backend`.

    Arguments are already validated.
    """

    def route(self, x: Tensor, routers: Sequence[Tensor]) -> Tensor:
        """Eq. 1 for routers (d, n_P) of one shape: x (B, N, d) -> (routers, B, N) integers."""

    def plan(self, index: Tensor, num_projectors: int) -> Sequence[Any]:
        """What :meth:`project` is told of the choices, for each side of index (sides, B, N) of :meth:`route`."""

    def project(self, x: Tensor, weight: Tensor, plan: Any) -> Tensor:
        """Eq. 2: x (B, N, d), weight (n_P, d, e), one :meth:`plan` -> (B, N, e) in the dtype of x."""

    def taps(self, branches: Mapping[str, Tensor], identity: bool) -> Tensor | None:
        """The kernel of Eq. 9: the sum (d, 1, 3, 3), in float32 at least, of the kernels of :data:`SIZES` and of the
        identity; or None, where plain PyTorch is to make it."""

    def attend(
        self,
        inputs: CoreInputs,
        options: Options,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        convolution: Convolution | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Eqs. 5-8 (or 10), and with ``convolution`` Eq. 9 but at masked tokens: (B, N, d), contiguous."""

    def decisions(
        self,
        inputs: CoreInputs,
        options: Options,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """The routing decisions that :meth:`attend` takes for the same arguments, (B, N) integers each."""


def decision_names(differential: str) -> tuple[str, ...]:
    """The routing decisions that the core takes, as :class:`dydila_kernels.Routing` names them."""
    names: tuple[str, ...] = ("measure_q", "measure_k")
    if differential != "off":
        names += ("measure_q_redundant", "measure_k_redundant", "differential_q")
    if differential == "token":
        names += ("differential_k",)
    return names
