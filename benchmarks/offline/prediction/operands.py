"""Operands of machine code: registers, predicates, constants, and what an instruction writes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.offline.prediction.code import Instruction

Array = npt.NDArray[Any]
Value = Array | None
"""What each thread has; None: it depends on data."""
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
REGISTER = re.compile(r"([-~|]*)(U?R(?:\d+|Z))(?:\.64|\.U32)?\|?$")
PREDICATE = re.compile(r"(!?)(U?P(?:\d+|T))$")
LOW = 0xFFFFFFFF


def signed(x: Array) -> Array:
    """Words (uint64) as int64 with the sign of bit 31."""
    return (x & np.uint64(LOW)).astype(np.uint32).view(np.int32).astype(np.int64)


def both(a: Value, b: Value) -> Value:
    """a & b, which is known where one of them is false everywhere."""
    for x in (a, b):
        if x is not None and not x.any():
            return x
    return None if a is None or b is None else a & b


def either(a: Value, b: Value) -> Value:
    return None if a is None or b is None else a | b


def lookup(values: list[Array], table: int) -> Array:
    """A function of three bits, by its table of eight."""
    found = np.zeros_like(values[0])
    for n in range(8):
        if table >> n & 1:
            a, b, c = (x if n & bit else ~x for x, bit in zip(values, (4, 2, 1), strict=True))
            found |= a & b & c
    return found


def following(register: str, count: int) -> list[str]:
    """So many registers, from this one on."""
    found = re.match(r"R(\d+)", register)
    return [f"R{int(found[1]) + n}" for n in range(count)] if found else [register] * count


def upper(register: str) -> str:
    """The other register of a pair."""
    found = re.match(r"([-~]*U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + 1}" if found else register


def results(i: Instruction) -> int:
    """Registers that an instruction writes, at most."""
    if i.base == "HGMMA":
        size = re.search(r"64x(\d+)x", i.op)
        return int(size[1]) // 2 if size else 4
    if i.base in ("LDG", "LDS", "LDL"):
        return max(1, i.width // 4)
    if i.base == "LDSM":
        return i.matrices
    if i.base in ("HMMA", "IMMA"):
        return 4
    return 2 if {"64", "F64", "U64", "WIDE"} & set(i.parts) else 1
