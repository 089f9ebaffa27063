"""Which form of a kernel a launch takes, and why.

    "gluon"     :mod:`dydila_kernels.ops.gluon`: a warp owns whole rows, in layouts that are written out.  For the
                common case on NVIDIA GPUs of sm_80 and later.
    "triton"    the kernels of this folder: for everything, everywhere, the interpreter too.

Both save the same statistics, so that each launch of a call is free to take either.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from dydila_kernels.ops import tiles
from dydila_kernels.ops.context import LaunchContext, QKOperand

VARIABLE = "DYDILA_KERNELS_FORM"
FORMS = ("auto", "gluon", "triton")
HEADS = (32, 64, 96, 128)
"""Widths of heads of the Gluon form."""


def wanted() -> str:
    """The form that the environment asks for: "auto" where it does not."""
    form = os.environ.get(VARIABLE, "auto")
    if form not in FORMS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(FORMS)}; got {form!r}")
    return form


STEP = 64
"""Channels that a program of the Gluon form works on at a time."""


def why_never_gluon(context: LaunchContext, side: QKOperand) -> str | None:
    """The reason why no launch for ``side`` takes the form in Gluon, or None where some do."""
    if wanted() == "triton":
        return f"{VARIABLE} is triton"
    if tiles.INTERPRETED:
        return "Gluon has no interpreter"
    if tiles.target != "cuda":
        return "the layouts are those of NVIDIA's tensor cores"
    if find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon"
    if context.dtype == torch.float32:
        return "float32 tokens are exact in the Triton form alone"
    if side.redundant is None:
        return "there is one branch"
    return None


def why_not_gluon(context: LaunchContext, side: QKOperand) -> str | None:
    """The reason why launches for ``side`` take the Triton form, or None where they take that in Gluon."""
    if context.head_dim not in HEADS:
        return f"heads of {context.head_dim} are none of {HEADS}"
    return why_never_gluon(context, side)


def why_not_gluon_tokens(context: LaunchContext, side: QKOperand, decide: bool, terms: bool) -> str | None:
    """The same of ``tokens``; ``terms``: whether denominator terms are wanted."""
    if not decide:
        return "what was decided is read"
    if terms:
        return "denominator terms are summed"
    if side.differential_router is None:
        return "no lambda is chosen"
    if side.slopes is not None:
        return "routers are trained"
    if context.dim % STEP:
        return f"{context.dim} channels are no multiple of {STEP}"
    return why_never_gluon(context, side)


def why_not_gluon_readout(context: LaunchContext, side: QKOperand, decide: bool, add: bool) -> str | None:
    """The same of ``readout``; ``add``: whether it adds to what is there, or a convolution."""
    if add:
        return "the result is added to what is there"
    return why_not_gluon(context, side) or why_not_gluon_tokens(context, side, decide, side.has_denominator)
