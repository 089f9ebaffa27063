"""Runs all programs of a grid, several at a time, each thread through its own branches.

Threads that diverge are kept in groups by the block that they are to run next.  The group that is furthest behind runs
first, and groups that meet are merged; a warp instruction waits for its warp, a barrier for its program.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import I64, POISON, UNSIGNED, Array, Unsupported
from tools.ptx.findings import Place, Report
from tools.ptx.instructions import function_of
from tools.ptx.memory import Memory
from tools.ptx.parsing import Block, Instruction, Kernel, bits_of_argument
from tools.ptx.products import Products

Mask = Array | None
"""Which threads (t,); None: all."""
MOST_STEPS = 5_000_000


class EndlessLoop(RuntimeError):
    """Threads that never return, or wait for others that do not come."""


def launch(
    kernel: Kernel, grid: tuple[int, ...], arguments: list[int | float], memory: Memory, report: Report,
    batch: int = 1024,
) -> None:  # fmt: skip
    """Runs a grid; ``arguments`` in the order of the PTX parameters, pointers as addresses.

    ``batch`` threads run at a time, or one program where it has more.  Raises Unsupported for an instruction that the
    emulator does not know, EndlessLoop, and ValueError for a wrong number of arguments.
    """
    kinds = [kind for _, kind in sorted(kernel.parameters.values())]
    if len(kinds) != len(arguments):
        raise ValueError(f"{kernel.name} takes {len(kinds)} parameters, got {len(arguments)}")
    bits = [bits_of_argument(value, kind) for value, kind in zip(arguments, kinds, strict=True)]
    x, y, z = (*grid, 1, 1)[:3]
    programs = list(range(x * y * z))
    report.launches[kernel.name] += 1
    step = max(1, batch // kernel.threads)
    with np.errstate(all="ignore"):  # 0 / 0 is NaN, without comment, as on a GPU
        for i in range(0, len(programs), step):
            Machine(kernel, (x, y, z), programs[i : i + step], bits, memory, report).run()


class Machine(Products):
    """One batch of programs."""

    def run(self) -> None:
        self.pending, self.committed = [], np.zeros(self.t, I64)
        self.committed_reads, self.open_reads = {}, {}
        self.registers: list[Array] = [
            np.zeros(self.t, bool) if bits == 1 else np.full(self.t, POISON[bits], UNSIGNED[bits])
            for bits in self.kernel.kinds
        ]
        self.constants: list[Array] = []
        self.groups: dict[int, Mask] = {0: None}
        self.waiting: dict[int, Array] = {}
        self.gone = np.zeros(self.t, bool)
        steps = 0
        while self.groups:
            block, mask = self._next_group()
            self._execute(block, mask)
            self._finish(block, mask)
            steps += 1
            if steps > MOST_STEPS:
                raise EndlessLoop(f"{self.kernel.name}: more than {MOST_STEPS} blocks")
        if self.waiting:
            raise EndlessLoop(f"{self.kernel.name}: threads wait at a barrier for ever")
        if self.pending:
            self.report.add("cp.async never waited for", self._nowhere(), len(self.pending))

    def _nowhere(self, instruction: Instruction | None = None) -> Place:
        return Place(self.kernel.name, 0, "", "") if instruction is None else instruction.place

    def _next_group(self) -> tuple[Block, Mask]:
        """The rearmost group that can run, and those of its threads that can."""
        for number in sorted(self.groups):
            block, mask = self.kernel.blocks[number], self.groups[number]
            if not block.together or mask is None:
                del self.groups[number]
                return block, mask
            complete = (mask | self.gone).reshape(-1, block.together).all(1)
            ready = np.repeat(complete, block.together) & mask
            if ready.any():
                del self.groups[number]
                if (rest := mask & ~ready).any():
                    self.groups[number] = rest
                return block, ready
        raise EndlessLoop(f"{self.kernel.name}: no group of threads can go on, at blocks {sorted(self.groups)}")

    def _execute(self, block: Block, mask: Mask) -> None:
        masked = mask is not None
        if masked not in block.functions:
            block.functions[masked] = function_of(self.kernel, block, masked)
        for value, bits in list(self.kernel.constants)[len(self.constants) :]:
            self.constants.append(np.full(self.t, value, UNSIGNED[bits]))
        block.functions[masked](self.registers, self.constants, self, mask)

    def _finish(self, block: Block, mask: Mask) -> None:
        """What ends the block: to the next one, to the target, out, or to wait at a barrier."""
        end, following = block.end, block.index + 1
        if end is None:
            self._put(following, mask)
        elif end.op.startswith("bra"):
            go, stay = self._split(end, mask)
            self._put(block.target, go)
            self._put(following, stay)
        elif end.op.startswith(("ret", "exit")):
            go, stay = self._split(end, mask)
            self.gone |= True if go is None else go
            self._put(following, stay)
            self._release()
        elif end.predicate is not None or len(end.operands) > 1:
            raise Unsupported(end.place.text)
        elif mask is None and not self.waiting:
            self.pass_barrier(slice(None))
            self._put(following, None)
        else:
            everyone = np.ones(self.t, bool)
            before = self.waiting.get(block.index, ~everyone)
            self.waiting[block.index] = before | (everyone if mask is None else mask)
            self._release()

    def _split(self, end: Instruction, mask: Mask) -> tuple[Mask, Mask]:
        """The threads whose predicate holds, and the others."""
        if end.predicate is None:
            return mask, np.zeros(self.t, bool)
        taken = self.registers[self.kernel.registers[end.predicate.lstrip("!")]]
        if end.predicate.startswith("!"):
            taken = ~taken
        if mask is not None:
            return mask & taken, mask & ~taken
        return (None if taken.all() else taken.copy()), (~taken if taken.any() else None)

    def _put(self, number: int, mask: Mask) -> None:
        """Adds threads to those that run a block next."""
        if mask is not None:
            if not mask.any():
                return
            other = self.groups.get(number, np.zeros(self.t, bool))
            mask = None if other is None else mask | other
        self.groups[number] = None if mask is None or mask.all() else mask

    def _release(self) -> None:
        """Lets those programs go on of which every thread has come to a barrier, or has returned."""
        stopped = self.gone.copy()
        for mask in self.waiting.values():
            stopped |= mask
        threads = np.repeat(stopped.reshape(-1, self.per).all(1), self.per)
        places, moved = np.zeros(self.count, int), np.zeros(self.t, bool)
        for number in list(self.waiting):
            mask = self.waiting.pop(number)
            go, left = mask & threads, mask & ~threads
            if left.any():
                self.waiting[number] = left
            places += go.reshape(-1, self.per).any(1)
            moved |= go
            self._put(number + 1, go)
            if (places > 1).any():
                end = self.kernel.blocks[number].end
                self.report.add("divergent barrier", self._nowhere(end), int((places > 1).sum()))
        self.pass_barrier(moved)
