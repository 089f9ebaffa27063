"""The arrays that registers are: one element a thread, unsigned integers of the width of the register."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED: dict[int, Any] = {8: U8, 16: U16, 32: U32, 64: U64}
SIGNED: dict[int, Any] = {8: I8, 16: I16, 32: I32, 64: I64}
FLOATS: dict[int, Any] = {16: F16, 32: F32, 64: F64}
POISON = {8: 0xFF, 16: 0xFFFF, 32: 0x7FFFDEAD, 64: 0x7FFFDEADBEEF}
"""What a register of so many bits holds before anything is written to it: NaN, and an address that is none."""
WARP, WARPGROUP = 32, 128
"""Threads."""


class Unsupported(Exception):
    """An instruction that the emulator does not know."""
