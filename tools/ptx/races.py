"""Races: accesses to one place by two threads, one of them a write, with no barrier between.

For each granule of memory two words say who wrote there last and who has read since, see :mod:`tools.ptx.threads`.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import F32, F64, Array
from tools.ptx.findings import NOTE
from tools.ptx.memory import Region, SharedMemory
from tools.ptx.threads import EPOCH, LANES, OF_THREAD, OF_WARP, PENDING, PROGRAM, PROGRAMS, WARP_EPOCH, WARPS, Threads


def conflict(word: Array, me: Array) -> Array:
    """Where a place was touched by another thread than ``me`` and no barrier lies between."""
    x = word ^ me
    suspect: Array = (word != 0) & ((x >= 1 << PROGRAM) | ((x < 1 << EPOCH) & ((x & OF_THREAD) != 0)))
    if not suspect.any():
        return suspect
    same_warp = (x < 1 << PROGRAM) & ((x & OF_WARP) == 0)
    settled: Array = same_warp & ((x >> WARP_EPOCH) & 0x3FFF != 0)
    return suspect & ~settled


def combine(old: Array, me: Array) -> Array:
    """The word for a place that was read by ``old`` and now by ``me``."""
    x = old ^ me
    other_lane = np.where(x >> WARP_EPOCH == 0, me | LANES, me)
    same_epoch = np.where((x & OF_THREAD) == 0, me, np.where((x & OF_WARP) != 0, me | LANES | WARPS, other_lane))
    later = np.where(x >= 1 << EPOCH, me, same_epoch)
    return np.where(old == 0, me, np.where(x >= 1 << PROGRAM, PROGRAMS, later))


def mark_read(region: Region, index: Array, me: Array) -> None:
    """Several threads may read one place at once: the second round adds those that the first one overwrote."""
    assert region.read is not None
    me = np.broadcast_to(me, index.shape)
    new = combine(region.read[index], me)
    region.read[index] = new
    left = region.read[index]
    lost = left != new
    if lost.any():
        region.read[index[lost]] = combine(left, new)[lost]


class RaceChecks(Threads):
    """``lanes`` are the threads that make the accesses, ``at`` (n,) their addresses in the region."""

    def note_read(self, region: Region, at: Array, width: int, lanes: Array, ip: int) -> None:
        me = self.me[lanes]
        if region.written is None:
            region.log.append((at, me, width))
            return
        index = region.granules(at, width)
        word = region.written[index]
        space = "shared" if region is self.shared else "global"
        if isinstance(region, SharedMemory) and (word == 0).any():
            bad = np.flatnonzero((word == 0).any(0))
            where = f"{self.name(lanes[bad[0]])} address {int(at[bad[0]] % region.stride)}"
            self.complain("uninitialised shared", ip, len(bad), where)
        wrong = conflict(word, me)
        if wrong.any():
            bad = np.flatnonzero(wrong.any(0))
            writer = int(word[:, bad[0]].max())
            kind = f"race {space}: read after write{between_programs(word[:, bad[0]] ^ me[bad[0]])}"
            if writer & PENDING:
                kind = "read of pending cp.async"
            self.complain(kind, ip, len(bad), f"{self.name(lanes[bad[0]])} after thread {writer & 1023}")
        mark_read(region, index, me)

    def note_write(
        self, region: Region, at: Array, width: int, lanes: Array, ip: int, data: Array | None = None,
        pending: bool = False,
    ) -> None:  # fmt: skip
        """``data`` (vector, n) is what is to be written, where that is known; ``pending``: by a cp.async."""
        if region.written is None:  # the reads so far were only noted
            region.track()
            for addresses, readers, size in region.log:
                mark_read(region, region.granules(addresses, size), readers)
            region.log = []
        assert region.written is not None and region.read is not None
        me, index = self.me[lanes], region.granules(at, width)
        space = "shared" if region is self.shared else "global"
        for before, what in ((region.read[index], "write after read"), (region.written[index], "write after write")):
            wrong = conflict(before, me)
            if wrong.any():
                bad = np.flatnonzero(wrong.any(0))
                first = bad[0]
                kind = f"race {space}: {what}{between_programs(before[:, first] ^ me[first])}"
                if what == "write after write" and data is not None:
                    now = region.gather(at[bad], width // len(data), len(data))
                    kind += " (same value)" if np.array_equal(now, data[:, bad]) else ""
                other = int(before[:, first].max()) & 1023
                self.complain(kind, ip, len(bad), f"{self.name(lanes[first])} after thread {other}")
        region.written[index] = np.broadcast_to(me | PENDING if pending else me, index.shape)

    def check_duplicates(self, region: Region, at: Array, width: int, lanes: Array, ip: int, data: Array) -> None:
        """Threads that wrote to one place at once must have written the same.

        Lanes of a warp may hold copies of a value that they rounded differently, as when the first addition of a sum
        over lanes is fused with a product: that is a note and no fault.
        """
        assert region.written is not None
        me, left = self.me[lanes], region.written[region.granules(at, width)]
        if (left == me).all():
            return
        other = left ^ me
        now = region.gather(at, width // len(data), len(data))
        lost = (left != me).any(0)
        differ = (now != data).any(0) & lost
        space = "shared" if region is self.shared else "global"
        if differ.any():
            bad = np.flatnonzero(differ)
            within_warp = ((other[:, bad] & OF_WARP) == 0).all() and (other[:, bad] < 1 << PROGRAM).all()
            if within_warp and data.dtype.itemsize == 4 and almost_equal(data[:, bad], now[:, bad]):
                kind = f"{NOTE} {space}: lanes of a warp write one value that they rounded differently"
            else:
                who = "programs" if ((other >= 1 << PROGRAM).any(0) & differ).any() else "threads"
                kind = f"race {space}: two {who} write different values at once"
            self.complain(kind, ip, len(bad), self.name(lanes[bad[0]]))
        elif (other >= 1 << PROGRAM).any():
            self.complain(f"race {space}: two programs write the same value at once", ip, int(lost.sum()))


def between_programs(difference: Array) -> str:
    return " between programs" if (difference >= 1 << PROGRAM).any() else ""


def almost_equal(one: Array, other: Array) -> bool:
    """Bits of float32 that are equal to a few roundings."""
    x, y = one.view(F32).astype(F64), other.view(F32).astype(F64)
    return bool((np.abs(x - y) <= 2.0**-21 * np.abs(y)).all())
