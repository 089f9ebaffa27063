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


def wanted() -> str:
    """The form that the environment asks for: "auto" where it does not."""
    form = os.environ.get(VARIABLE, "auto")
    if form not in FORMS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(FORMS)}; got {form!r}")
    return form


def why_not_gluon(context: LaunchContext, side: QKOperand) -> str | None:
    """The reason why launches for ``side`` take the Triton form, or None where they take that in Gluon."""
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
