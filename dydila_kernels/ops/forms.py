"""Which form of a kernel a launch takes, and why.

    "gluon"     :mod:`dydila_kernels.ops.gluon`: a warp owns whole rows, in layouts that are written out.  For the
                common case on NVIDIA GPUs of sm_80 and later.
    "triton"    the kernels of this folder: for everything, everywhere, the interpreter too.

Both save the same statistics, so that each launch of a call is free to take either.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dydila_kernels.ops import tiles
from dydila_kernels.ops.arguments import Denominator, Source

if TYPE_CHECKING:
    from dydila_kernels.ops.context import LaunchContext, QKOperand

VARIABLE = "DYDILA_KERNELS_FORM"
FORMS = ("auto", "gluon", "triton")


def wanted() -> str:
    """The form that the environment asks for: "auto" where it does not."""
    form = os.environ.get(VARIABLE, "auto")
    if form not in FORMS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(FORMS)}; got {form!r}")
    return form


LARGEST = 1280
"""Channels whose words the registers of a program hold."""
MOST = 64
"""Choices whose logits the shared memory of every GPU holds, of both branches and all warps."""
DOTS_HEADS = (32, 64, 72, 96)
"""Widths of heads of :mod:`dydila_kernels.ops.gluon.dots`."""


@cache
def has_gluon() -> bool:
    return find_spec("triton.experimental.gluon") is not None


def why_no_gluon_here() -> str | None:
    """The reason why nothing can take the Gluon form, or None."""
    if tiles.INTERPRETED:
        return "Gluon has no interpreter"
    if tiles.target != "cuda":
        return "the layouts are those of NVIDIA's tensor cores"
    if not has_gluon():
        return "this Triton has no Gluon"
    return None


def why_not_gluon(context: LaunchContext, side: QKOperand) -> str | None:
    """The reason why launches for ``side`` take the Triton form, or None where they take that in Gluon."""
    if context.form == "triton":
        return f"{VARIABLE} is triton"
    if missing := why_no_gluon_here():
        if context.form == "gluon":
            raise RuntimeError(f"{VARIABLE} is gluon, but {missing}")
        return missing
    if context.dtype == torch.float32:
        return "float32 tokens are exact in the Triton form alone"
    if side.redundant is None:
        return "there is one branch"
    return None


def choices(context: LaunchContext) -> int:
    """Those of the router that has most."""
    return max(context.gammas, context.lambdas)


def holds_more(context: LaunchContext) -> bool:
    """Whether the registers of :mod:`dydila_kernels.ops.gluon.tokens` hold more than words and logits of 16 choices:
    those of more; beyond 768 channels, denominator terms or what powers of float16 tokens lack."""
    full = context.has_denominator or context.dtype == torch.float16
    return choices(context) > 16 or (context.dim > 768 and full)


def in_words(tokens: Tensor) -> bool:
    """Whether the rows of tokens (B, N, d) of 16 bits are whole words of two."""
    images, rows, _ = tokens.stride()
    return not (tokens.data_ptr() % 4 or images % 2 or rows % 2 or tokens.shape[-1] % 2)


def why_not_gluon_tokens(context: LaunchContext, side: QKOperand, *, decide: bool, divide: bool = False) -> str | None:
    """The same of what routes, measures and writes; ``divide``: whether Zh is to be over its denominators."""
    if not decide:
        return "what was decided is read"
    if divide and context.heads > 1:
        return f"{context.heads} heads have denominators of their own"
    if side.has_denominator and not divide and context.head_dim % 8:
        return f"denominators are in parts of 8 channels, of which heads of {context.head_dim} are no multiple"
    if side.differential_router is None:
        return "no lambda is chosen"
    if side.slopes is not None:
        return "routers are trained"
    if context.dim > LARGEST:
        return f"the registers hold {LARGEST} channels, not {context.dim}"
    # Beyond 768 channels powers lie there, too, under "denominator".
    most = MOST // 2 if context.dim > 768 and context.has_denominator else MOST
    if choices(context) > most:
        return f"logits of {choices(context)} choices would take too much shared memory"
    # Beyond 768 a program has registers for two, which float16 takes for denominator terms.
    full = context.dim <= 768 or (context.dtype == torch.float16 and context.has_denominator)
    if context.dim > 384 and full and choices(context) > 16:
        return f"logits of {choices(context)} choices would spill registers beside {context.dim} channels"
    if not in_words(side.tokens) or (side.redundant is not None and not in_words(side.redundant)):
        return "rows do not begin at even channels"
    return why_not_gluon(context, side)


def why_not_gluon_gradients(context: LaunchContext, side: QKOperand, source: Source, add: bool = False) -> str | None:
    """The reason why the gradients of a side take the Triton form, or None where they take that in Gluon."""
    if context.head_dim % 8 or context.head_dim < 24:
        return f"heads of {context.head_dim} are too narrow, or no multiple of 8"
    if add:
        return "the gradient of V is added to what is there"
    if side.lam_index is None or side.slopes is not None:
        return "no lambda is chosen, or routers are trained"
    for x in (side.tokens, side.redundant, source.given if source.x is None else source.x.x):
        if x is not None and (x.data_ptr() % 16 or x.stride(0) % 16 or x.stride(1) % 16):
            return "rows are not aligned to 16 bytes"
    return why_not_gluon(context, side)


def why_not_gluon_dots(context: LaunchContext, side: QKOperand, source: Source, denominator: Denominator) -> str | None:
    """The reason why the gradient of the state takes the Triton form, or None where it takes that in Gluon."""
    if context.head_dim not in DOTS_HEADS:
        return f"heads of {context.head_dim} are none of {DOTS_HEADS}"
    if denominator.vector is not None:
        return "denominator terms have gradients"
    return why_not_gluon_gradients(context, side, source)
