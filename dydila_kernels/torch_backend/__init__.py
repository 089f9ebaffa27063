"""The layer in plain PyTorch over blocks of rows: right on every device, linear in time, bounded in memory.

A :class:`dydila_kernels.types.Backend`.  One file per stage, named as the stage is everywhere else.  Each stage works
through its input in blocks that fit the caches, and its backward pass walks the same blocks, rebuilding what it needs
from the inputs; sums run in a fixed order, so repeats are equal to the bit.  All arithmetic is in float32 (float64 for
float64 inputs); only inputs and outputs are in a lower dtype.

``torch.compile``, ``torch.export``, ``torch.func`` transforms, forward-mode AD and second derivatives take the
equations of :mod:`dydila_kernels.reference` in one piece instead, in the same arithmetic.
"""

from dydila_kernels.torch_backend.blocks import is_transformed, takes_blocks, takes_plain_path
from dydila_kernels.torch_backend.core import attend, decisions
from dydila_kernels.torch_backend.depthwise import depthwise
from dydila_kernels.torch_backend.layer_operators import differentiates, layer
from dydila_kernels.torch_backend.projection import project, projection_logits, route, straight_through

__all__ = [
    "attend",
    "decisions",
    "depthwise",
    "differentiates",
    "is_transformed",
    "layer",
    "project",
    "projection_logits",
    "route",
    "straight_through",
    "takes_blocks",
    "takes_plain_path",
]
