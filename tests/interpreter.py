"""Runs the kernels without a GPU: Triton's interpreter, and the corrections that it needs to agree with a GPU.

To be imported before Triton.  ``tests/ops/test_interpreter.py`` proves each correction, on every version of Triton.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np
import torch

AVAILABLE = importlib.util.find_spec("triton") is not None

# Triton reads this when a kernel is decorated.  torch.cuda does not import Triton.  Whether kernels are emulated
# (tests/emulation.py) has to be known before pytest has read its options; xdist's workers inherit the variable.
COMPILED = torch.cuda.is_available() or any(argument.startswith("--emulate") for argument in sys.argv)
os.environ.setdefault("TRITON_INTERPRET", "0" if COMPILED else "1")
INTERPRETED = AVAILABLE and os.environ["TRITON_INTERPRET"] == "1"


def correct() -> None:
    """Corrects the interpreter of the installed Triton, 3.6 to 3.9."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    binary_op, unary_op = builder.binary_op, builder.unary_op

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def widen(value: Any) -> Any:
        """bf16 as float32, exactly; the interpreter keeps the bits of a bf16 as uint16."""
        if not is_bf16(value):
            return value
        return handle((value.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)

    def narrow(value: Any) -> Any:
        """float32 as bf16, to nearest even; the interpreter cuts the lower bits off."""
        return handle(round_to_bf16(value.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)  # else the bits are multiplied as integers

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bf16(source) == (target.scalar == tl.bfloat16):
            return cast(self, source, target)
        if is_bf16(source):
            return cast(self, widen(source), target)
        return narrow(cast(self, source, tl.float32))

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        narrowest = min(source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth)
        if narrowest == 16:
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)  # 8 bits

    def compute_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bf16(left):
            return binary_op(self, left, right, op)
        result = binary_op(self, widen(left), widen(right), op)
        return result if result.data.dtype == np.bool_ else narrow(result)

    def compute_unary(self: Any, value: Any, op: Any) -> Any:
        return narrow(unary_op(self, widen(value), op)) if is_bf16(value) else unary_op(self, value, op)

    builder.create_dot = create_dot
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.binary_op = compute_binary
    builder.unary_op = compute_unary

    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        """Once per module of kernels and for good, not for each call of a helper: a third of the time went there."""
        if id(function.__globals__) not in patched:
            patch_language(function)
            patched.add(id(function.__globals__))
            # Triton 3.6 converts an array of one element, which numpy 2.4 refuses: no run-time loop bounds.
            tl.tensor.__index__ = lambda self: self.handle.data.item()
        return interpreter._LangPatchScope()  # nothing to restore

    def launch_quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):  # log2(0) is -inf, without comment, as on a GPU
            return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_quietly


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bf16, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


if INTERPRETED:
    correct()
