"""The threads of a batch of programs: who they are, and how the checks complain of them."""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import I64, U32, WARP, WARPGROUP, Array
from tools.ptx.findings import Report
from tools.ptx.memory import Memory, SharedMemory
from tools.ptx.parsing import Kernel

# The word by which the race checks know a thread and the moment:
#   bits 0-9 thread, 10 several lanes of its warp, 11 several warps, 12-25 warp barriers passed, 26-43 barriers passed,
#   44-59 program + 1, 60 a cp.async that is not waited for, 61 several programs
LANES, WARPS, WARP_EPOCH, EPOCH, PROGRAM, PENDING, PROGRAMS = 1 << 10, 1 << 11, 12, 26, 44, 1 << 60, 1 << 61
OF_THREAD, OF_WARP = 0x3FF | LANES | WARPS, 0x3E0 | WARPS


class Threads:
    """All threads of the programs given, t of them, the threads of a program and the lanes of a warp in a row.

    Attributes:
        special: the registers that PTX reads as %tid.x and the like.
        slot: (t,) which of the batch's programs a thread belongs to.
        me: (t,) int64, the word of the race checks.
        shared: the shared memory of all of them.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], programs: list[int], arguments: list[int], memory: Memory,
        report: Report,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.report, self.arguments = kernel, memory, report, arguments
        per, count = kernel.threads, len(programs)
        self.per, self.count, self.t = per, count, per * count
        self.tid = np.tile(np.arange(per, dtype=U32), count)
        self.lane = (self.tid & U32(31)).astype(I64)
        self.warp_base = np.arange(self.t) // WARP * WARP
        self.slot = np.repeat(np.arange(count, dtype=I64), per)
        number = np.repeat(np.array(programs, dtype=I64), per)
        x, y, z = number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]
        nothing = np.zeros(self.t, U32)
        self.special: dict[str, Array] = {
            "%tid.x": self.tid, "%tid.y": nothing, "%tid.z": nothing,
            "%ntid.x": np.full(self.t, per, U32), "%ntid.y": nothing + U32(1), "%ntid.z": nothing + U32(1),
            "%ctaid.x": x.astype(U32), "%ctaid.y": y.astype(U32), "%ctaid.z": z.astype(U32),
            "%laneid": self.lane.astype(U32), "%warpid": self.tid >> U32(5),
            **{f"%nctaid.{name}": np.full(self.t, size, U32) for name, size in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        self.me = ((number + 1) << PROGRAM) | (1 << EPOCH) | self.tid.astype(I64)
        self.shared = SharedMemory(count, kernel.shared, kernel.granule)

    def complain(self, kind: str, ip: int, threads: int, example: str = "") -> None:
        """``ip`` is the number of the instruction in ``kernel.codes``."""
        self.report.add(kind, self.kernel.codes[ip].place, threads, example)

    def name(self, thread: int) -> str:
        """Of a thread of this batch, in words."""
        return f"program {(int(self.me[thread]) >> PROGRAM) - 1} thread {int(self.tid[thread])}"

    def chosen(self, active: Array | None) -> Array:
        """The numbers of the active threads."""
        return np.arange(self.t) if active is None else np.flatnonzero(active)

    def warps(self, active: Array | None, ip: int) -> Array:
        """The numbers of the active warps, of each of which all lanes have to be active."""
        return self._whole(active, WARP, "warp instruction without all lanes", ip)

    def warpgroups(self, active: Array | None, ip: int) -> Array:
        return self._whole(active, WARPGROUP, "warpgroup instruction without all threads", ip)

    def _whole(self, active: Array | None, size: int, complaint: str, ip: int) -> Array:
        if active is None:
            return np.arange(self.t // size)
        groups = active.reshape(-1, size)
        some, everyone = groups.any(1), groups.all(1)
        if (some & ~everyone).any():
            self.complain(complaint, ip, int((some & ~everyone).sum()))
        found: Array = np.flatnonzero(some)
        return found

    def pass_barrier(self, threads: Array | slice) -> None:
        self.me[threads] = ((self.me[threads] >> EPOCH) + 1 << EPOCH) | self.tid[threads]

    def pass_warp_barrier(self, active: Array | None, ip: int) -> None:
        self.warps(active, ip)
        self.me[slice(None) if active is None else active] += 1 << WARP_EPOCH
