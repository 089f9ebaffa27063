"""What the projections of the layer hand to the core."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dydila_kernels.types import CoreInputs, Norms, Tables


def core_inputs(
    tokens: Sequence[Tensor], redundant: Sequence[Tensor], norms: Norms, tables: Tables, differential: str
) -> CoreInputs:
    """What the core takes of q, k, v and the norms of q and k, of Q' and K' after theirs (or none), and of the tables.

    Without a difference the measured tokens are those of the routed projectors, where there are any.
    """
    q, k, v = tokens
    q_redundant, k_redundant = redundant or (None, None)
    if differential == "off" and redundant:
        q, k = redundant
        q_redundant, k_redundant = None, None
    elif norms:
        q, k = (norm(t) for norm, t in zip(norms, (q, k), strict=True))
    return CoreInputs(q, k, v, q_redundant, k_redundant, *tables)
