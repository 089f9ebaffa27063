"""The layer in plain PyTorch over blocks of rows: right on every device, linear in time, bounded in memory.

A :class:`dydila_kernels.types.Backend`.  One file per stage, named as the stage is everywhere else.  Sums run in a
fixed order, so repeats are equal to the bit.  All arithmetic is in float32 (float64 for float64 inputs); only inputs
and outputs are in a lower dtype.

``blocks`` cuts the tokens into blocks that fit the caches, ``blockwise`` walks them: the keys of an image, which add up
to its states, then its queries, which read these.  ``backward`` walks the same blocks, makes again from the tokens what
it needs, with the decisions of the forward pass, and hands on the gradient of each block as soon as it is there.
``products`` multiplies matrices, by oneDNN where that is faster than what torch takes.

    module by module    ``project``, ``attend`` with ``depthwise``: each takes and returns whole tensors (B, N, d)
    ``layer``           the same walk, on tokens that are projected when a block is asked for, and gradients that go
                        through their projection when a block of them is there

A block's temporaries lie in a :class:`~dydila_kernels.torch_backend.blocks.Workspace`: fresh memory would cost more
time than most of the arithmetic on it.  What keeps that safe:

    - a call holds a workspace that is its own until it ends, however it ends: calls within it and threads have others;
    - a name in it stands for what is held at one time, so the names in a file are the list of what is alive;
    - nothing of it is returned or kept for a backward pass, and inputs are never written to: only a block that was made
      for this call (``disposable``) is computed in place;
    - the backward pass uses up what it has made itself: asked again, it makes it again.

``torch.compile`` sees ``layer`` as an operator on a CPU.  Otherwise it takes, as do ``torch.export``, ``torch.func``
transforms, forward-mode AD and second derivatives, the equations of :mod:`dydila_kernels.reference` in one piece, in
the same arithmetic.
"""

from dydila_kernels.torch_backend.blocks import is_transformed, takes_blocks, takes_plain_path
from dydila_kernels.torch_backend.core import attend, decisions
from dydila_kernels.torch_backend.depthwise import depthwise, taps
from dydila_kernels.torch_backend.layer_operators import differentiates, layer
from dydila_kernels.torch_backend.products import linear
from dydila_kernels.torch_backend.projection import plan, project, projection_logits, route, straight_through

__all__ = [
    "attend",
    "decisions",
    "depthwise",
    "differentiates",
    "is_transformed",
    "layer",
    "linear",
    "plan",
    "project",
    "projection_logits",
    "route",
    "straight_through",
    "takes_blocks",
    "takes_plain_path",
    "taps",
]
