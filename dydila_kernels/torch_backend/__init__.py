"""The layer in plain PyTorch over blocks of rows: right on every device, linear in time, bounded in memory.

One file per stage, named as the stage is everywhere else.  Each stage works through its input in blocks that fit the
caches, and its backward pass walks the same blocks, rebuilding what it needs from the inputs; sums run in a fixed
order, so repeats are equal to the bit.  All arithmetic is in float32 (float64 for float64 inputs); only inputs and
outputs are in a lower dtype.

``torch.compile``, ``torch.export``, ``torch.func`` transforms, forward-mode AD and second derivatives take the
equations of :mod:`dydila_kernels.reference` in one piece instead, in the same arithmetic.
"""

from dydila_kernels.torch_backend.blocks import (
    accumulation_dtype,
    autocast_dtype,
    choices_of_two,
    is_transformed,
    no_autocast,
    scratch,
    takes_plain_path,
)
from dydila_kernels.torch_backend.core import At, Block, Call, dydila_attention, routing_indices
from dydila_kernels.torch_backend.depthwise import Grid, ValueBlocks, depthwise
from dydila_kernels.torch_backend.linear_attention import states_pay
from dydila_kernels.torch_backend.projection import project_block, projection_logits, routed_projection
from dydila_kernels.torch_backend.tokens import Options

__all__ = [
    "At",
    "Block",
    "Call",
    "Grid",
    "Options",
    "ValueBlocks",
    "accumulation_dtype",
    "autocast_dtype",
    "choices_of_two",
    "depthwise",
    "dydila_attention",
    "is_transformed",
    "no_autocast",
    "project_block",
    "projection_logits",
    "routed_projection",
    "routing_indices",
    "scratch",
    "states_pay",
    "takes_plain_path",
]
