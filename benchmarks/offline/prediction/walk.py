"""Which instructions a program executes, in order, and where each of its accesses to memory is served.

One program of the launch, in the middle of the grid, is walked through: addresses, loops and branches are executed,
what depends on data is not.  A branch on data is taken where it jumps over one that leaves, and not otherwise; a loop
whose end depends on data is run once.  Accesses whose addresses depend on data are taken to touch what is new of those
tensors that no other access touches.  All warps are taken to do the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.offline.prediction.code import Instruction
from benchmarks.offline.prediction.machine import LOCAL, SHARED, passes
from benchmarks.offline.prediction.operands import Array, Value
from benchmarks.offline.prediction.values import Values

MOST_STEPS = 2_000_000
UNKNOWN = -1
"""The number of the tensor that an access touches where data say which."""
SECTOR = 32
"""Bytes: memory moves no less."""
ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[(U?R\d+|U?RZ)?(\.64|\.U32|\.X16)?(?:\+(UR\d+))?(?:\+?(-?0x[0-9a-f]+))?\]$")


@dataclass(frozen=True)
class Tensor:
    """A stretch of the launch's memory, in bytes; ``parts``: the sizes of the views of it among the arguments, by what
    tells views apart; without any all of it is meant."""

    start: int
    stop: int
    parts: dict[tuple[Any, ...], int] = field(default_factory=dict, compare=False)

    @property
    def size(self) -> int:
        """Bytes that the launch may touch."""
        whole = self.stop - self.start
        return min(whole, sum(self.parts.values())) if self.parts else whole


@dataclass
class Step:
    """One instruction of the program, executed; bytes and passes of one warp.

    Attributes:
        index: of the instruction.
        passes: over the banks of shared memory, or of 128 bytes each of global memory.
        again: bytes that the L2 serves, having been touched by this program before.
        first: bytes touched for the first time, of the tensor with that number.
    """

    index: int
    passes: float = 1.0
    again: float = 0.0
    first: float = 0.0
    tensor: int = 0


@dataclass
class Walk:
    """What a program does.

    Attributes:
        steps: its instructions.
        first: tensor -> bytes that the program touches, each counted once; :data:`UNKNOWN` -> where data say what.
        loops: of those loops whose end depends on data.
    """

    steps: list[Step] = field(default_factory=list)
    first: Counter[int] = field(default_factory=Counter)
    loops: set[int] = field(default_factory=set)


class Walker:
    def __init__(
        self, code: list[Instruction], labels: dict[str, int], values: Values, tensors: Sequence[Tensor], l1: float
    ) -> None:
        """``l1``: bytes of the L1 that a program has for itself."""
        self.code, self.labels, self.values, self.tensors, self.l1 = code, labels, values, tensors, l1
        self.warps = max(1, values.threads // 32)
        self.walk = Walk()
        self.touched = 0.0
        # When each sector of each tensor was touched last, in bytes touched until then.
        self.last = [np.full(-(-(t.stop - t.start) // SECTOR) + 1, -1.0) for t in tensors]

    def run(self) -> Walk:
        n, calls = 0, list[int]()
        while n < len(self.code) and len(self.walk.steps) < MOST_STEPS:
            i = self.code[n]
            following = n + 1
            if i.base != "NOP":
                self.walk.steps.append(self._step(n, i))
            if i.base in ("BRA", "CALL") and i.target in self.labels:
                if self._taken(n, i):
                    following = self.labels[i.target]
                    calls += [n + 1] if i.base == "CALL" else []
            elif i.base == "RET" and calls:
                following = calls.pop()
            elif i.base == "EXIT" and self._leaves(i):
                break
            else:
                self.values.execute(i)
            n = following
        return self.walk

    def _leaves(self, i: Instruction) -> bool:
        active = self.values.active(i)
        return active is not None and bool(active.all())

    def _taken(self, n: int, i: Instruction) -> bool:
        target = self.labels[i.target]
        active = self.values.active(i)
        for operand in i.operands:  # BRA.U P0, or a second condition
            other = self.values.test(operand) if re.match(r"!?U?P", operand) else np.ones(1, bool)
            active = None if active is None or other is None else active & other
        if active is not None:
            return bool(active.mean() > 0.5)
        if target <= n:
            self.walk.loops.add(n)
            return False
        over = self.code[target - 1]
        return over.base in ("BRA", "EXIT") and not over.predicate

    # Memory -----------------------------------------------------------------------------------------------------------

    def _step(self, n: int, i: Instruction) -> Step:
        if i.base in SHARED:
            return Step(n, self._shared(i))
        if i.base in LOCAL:
            return Step(n, max(1, i.width // 4))
        if i.base in ("LDG", "STG", "LDGSTS", "ATOMG", "RED"):
            return self._global(n, i)
        return Step(n)

    def _active(self, i: Instruction) -> Array:
        """Which threads access memory; all that may, where data decide."""
        conditions = [self.values.active(i)]
        if i.base == "LDGSTS" and len(i.operands) > 2:
            conditions.append(self.values.test(i.operands[2]))
        found = np.ones(self.values.threads, bool)
        for condition in conditions:
            if condition is not None:
                found &= condition
        return found

    def _addresses(self, operand: str) -> Value:
        found = ADDRESS.match(operand)
        if found is None:
            return None
        register, wide, uniform, offset = found.groups()
        total: Value = self.values.full(0)
        if register and not register.endswith("Z"):
            total = self.values.pair(register) if wide == ".64" else self.values.get(register)
        if uniform and total is not None:
            more = self.values.pair(uniform) if wide == ".64" else self.values.get(uniform)
            total = None if more is None else total + more
        if total is None:
            return None
        return (total.astype(np.int64) + int(offset or "0", 0)) & (-1 if wide == ".64" else 0xFFFFFFFF)

    def _shared(self, i: Instruction) -> float:
        """Passes over the banks that a warp needs, on the average."""
        matrices = i.base in ("LDSM", "STSM")
        least = i.matrices if matrices else max(1, i.width // 4)
        operand = next((x for x in i.operands if x.startswith("[")), "")
        addresses, active = self._addresses(operand), self._active(i)
        if addresses is None:
            return float(least)
        rows = addresses.reshape(-1, 32)
        if matrices:  # eight lanes give the rows of 16 bytes of each matrix
            groups = [row[8 * m : 8 * m + 8] for row in rows for m in range(i.matrices)]
            return passes((group.tolist() for group in groups), 4) / self.warps
        lanes = 32 // max(1, i.width // 4)
        chosen = active.reshape(-1, 32)
        groups = [
            row[at : at + lanes][on[at : at + lanes]]
            for row, on in zip(rows, chosen, strict=True)
            for at in range(0, 32, lanes)
        ]
        return passes((group.tolist() for group in groups), max(1, i.width // 4)) / self.warps

    def _global(self, n: int, i: Instruction) -> Step:
        operand = next((x for x in i.operands if x.startswith("desc")), "")
        addresses, active = self._addresses(operand), self._active(i)
        if addresses is None:
            moved = 32.0 * i.width
            self.walk.first[UNKNOWN] += int(moved) * self.warps
            return Step(n, max(1, i.width // 4), first=moved, tensor=UNKNOWN)
        step = Step(n, 0.0)
        moved = 0
        for number, sectors in self._sectors(addresses, active, i.width):
            moved += len(sectors)
            whole = np.unique(sectors & 0xFFFFFFFFFF)  # by all warps together
            last = self.last[number]
            before = last[whole]
            fresh = int((before < 0).sum())
            far = int(((before >= 0) & (self.touched - before > self.l1)).sum())
            if "BYPASS" in i.parts:
                far = len(whole) - fresh
            last[whole] = self.touched
            step.first += fresh * SECTOR / self.warps
            step.again += (len(sectors) if i.base == "STG" and not fresh else far) * SECTOR / self.warps
            step.tensor = number
            self.touched += len(whole) * SECTOR
            self.walk.first[number] += fresh * SECTOR
        step.passes = max(moved * SECTOR / self.warps / 128, 1.0)
        return step

    def _sectors(self, addresses: Array, active: Array, width: int) -> Iterator[tuple[int, Array]]:
        """Tensor -> the sectors of it that each warp touches: warp << 40 | number."""
        warp = np.arange(len(addresses)) // 32 << 40
        for number, tensor in enumerate(self.tensors):
            inside = active & (addresses >= tensor.start) & (addresses < tensor.stop)
            if inside.any():
                at = addresses[inside] - tensor.start
                yield (
                    number,
                    np.unique(np.concatenate([warp[inside] | (at + extra) // SECTOR for extra in (0, width - 1)])),
                )
