"""Loads and stores of global and shared memory, cp.async and atomics, with their checks.

``active`` (t,) bool says which threads take part, None all; ``item`` is the size of an element in bytes; ``ip`` the
number of the instruction, for complaints.  Inactive threads receive poison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tools.ptx.arrays import FLOATS, I64, POISON, SIGNED, U32, UNSIGNED, Array, Unsupported
from tools.ptx.memory import Region
from tools.ptx.parsing import bits_of
from tools.ptx.races import RaceChecks


class Copy(NamedTuple):
    """A cp.async that is not waited for: what goes where, by whom, and the group of each thread that it belongs to."""

    lanes: Array
    at: Array
    data: Array
    group: Array

    def only(self, chosen: Array) -> Copy:
        return Copy(self.lanes[chosen], self.at[chosen], self.data[:, chosen], self.group[chosen])


class Accesses(RaceChecks):
    pending: list[Copy]
    committed: Array
    """(t,) groups of cp.async."""
    operands: Array | None = None
    """Which granules of shared memory a wgmma may still read, see :mod:`tools.ptx.products`."""

    # Global memory ----------------------------------------------------------------------------------------------------

    def load_global(self, addresses: Array, active: Array | None, item: int, vector: int, ip: int) -> Array:
        """(vector, t)."""
        lanes, found = self.chosen(active), np.full((vector, self.t), POISON[item * 8], UNSIGNED[item * 8])
        for region, some, at in self._located(addresses, lanes, item * vector, "read", ip):
            found[:, some] = region.gather(at, item, vector)
            self.note_read(region, at, item * vector, some, ip)
        return found

    def store_global(self, addresses: Array, active: Array | None, item: int, values: list[Array], ip: int) -> None:
        data = np.stack(values).astype(UNSIGNED[item * 8])
        for region, some, at in self._located(addresses, self.chosen(active), item * len(values), "write", ip):
            self._write(region, at, data[:, some], some, ip)

    def atomic(self, op: str, kind: str, addresses: Array, value: Array, active: Array | None, ip: int) -> Array:
        """One thread after the other; returns what was there before."""
        bits = bits_of(kind)
        dtype = {"s": SIGNED, "u": UNSIGNED, "b": UNSIGNED, "f": FLOATS}[kind[0]][bits]
        found = np.full(self.t, POISON[bits], UNSIGNED[bits])
        for region, some, at in self._located(addresses, self.chosen(active), bits // 8, "atomic", ip):
            view = region.views[bits // 8].view(dtype)
            for lane, index, x in zip(some, (at - region.base) // (bits // 8), value[some].view(dtype), strict=True):
                old = view[index]
                found[lane] = np.array(old).view(UNSIGNED[bits])
                if op == "add":
                    view[index] = old + x
                elif op in ("max", "min"):
                    view[index] = max(old, x) if op == "max" else min(old, x)
                elif op == "exch":
                    view[index] = x
                else:
                    raise Unsupported(f"atom.{op}")
        return found

    def _located(
        self, addresses: Array, lanes: Array, width: int, what: str, ip: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        """(region, threads, addresses) of what lies in each tensor; complains of the rest."""
        if not len(lanes):
            return
        at = addresses.view(I64)[lanes]
        self._check_alignment(at, width, lanes, "global", ip)
        holders = self.memory.holders(at, width)
        for number in np.unique(holders):
            chosen = holders == number
            if number >= 0:
                yield self.memory.regions[number], lanes[chosen], at[chosen]
            else:
                first = int(np.flatnonzero(chosen)[0])
                where = f"{self.name(lanes[first])} near {self.memory.near(int(at[first]), width)}"
                self.complain(f"out of bounds {what}", ip, int(chosen.sum()), where)

    def _check_alignment(self, at: Array, width: int, lanes: Array, space: str, ip: int) -> None:
        wrong = np.flatnonzero((at & (width - 1)) != 0)
        if len(wrong):
            where = f"{self.name(lanes[wrong[0]])} address {int(at[wrong[0]]):#x} of {width} bytes"
            self.complain(f"misaligned {space}", ip, len(wrong), where)

    def _write(self, region: Region, at: Array, data: Array, lanes: Array, ip: int) -> None:
        width = data.dtype.itemsize * len(data)
        self.note_write(region, at, width, lanes, ip, data)
        region.scatter(at, data.dtype.itemsize, data)
        self.check_duplicates(region, at, width, lanes, ip, data)

    # Shared memory ----------------------------------------------------------------------------------------------------

    def load_shared(self, addresses: Array, active: Array | None, item: int, vector: int, ip: int) -> Array:
        lanes, found = self.chosen(active), np.full((vector, self.t), POISON[item * 8], UNSIGNED[item * 8])
        if len(lanes):
            at = self.shared_at(addresses, lanes, item * vector, "read", ip)
            found[:, lanes] = self.shared.gather(at, item, vector)
            self.note_read(self.shared, at, item * vector, lanes, ip)
        return found

    def store_shared(self, addresses: Array, active: Array | None, item: int, values: list[Array], ip: int) -> None:
        lanes = self.chosen(active)
        if len(lanes):
            at = self.shared_at(addresses, lanes, item * len(values), "write", ip)
            self.write_shared(at, np.stack(values).astype(UNSIGNED[item * 8])[:, lanes], lanes, ip)

    def write_shared(self, at: Array, data: Array, lanes: Array, ip: int) -> None:
        self.check_operands(at, data.dtype.itemsize * len(data), ip)
        self._write(self.shared, at, data, lanes, ip)

    def shared_at(self, addresses: Array, lanes: Array, width: int, what: str, ip: int) -> Array:
        """Addresses of the programs as addresses of the batch's shared memory."""
        at = addresses[lanes].astype(I64)
        self._check_alignment(at, width, lanes, "shared", ip)
        outside = at + width > self.kernel.shared
        if outside.any():
            first = int(at[np.flatnonzero(outside)[0]])
            where = f"address {first} of {self.kernel.shared} bytes"
            self.complain(f"out of bounds shared {what}", ip, int(outside.sum()), where)
            at = np.where(outside, 0, at)
        return at + self.slot[lanes] * self.shared.stride

    def check_operands(self, at: Array, width: int, ip: int) -> None:
        """Nothing may write to what a wgmma may still read."""
        if self.operands is not None and (wrong := self.operands[self.shared.granules(at, width)].any(0)).any():
            self.complain("write to an operand of a pending wgmma", ip, int(wrong.sum()))

    # cp.async: read at once, written at the wait ----------------------------------------------------------------------

    def cp_async(
        self, to: Array, source: Array, active: Array | None, size: int, length: Array | None, ip: int
    ) -> None:
        """``size`` bytes to shared memory, the first ``length`` (t,) of them from global memory and zeros behind."""
        lanes = self.chosen(active)
        if not len(lanes):
            return
        wanted = np.full(len(lanes), size) if length is None else length[lanes].astype(I64)
        data = np.zeros((size // 4, len(lanes)), U32)
        for n in np.unique(wanted[wanted > 0]):
            if n % 4:
                raise Unsupported(f"cp.async of {n} bytes")
            some = np.flatnonzero(wanted == n)
            mask = np.zeros(self.t, bool)
            mask[lanes[some]] = True
            data[: n // 4, some] = self.load_global(source, mask, 4, int(n) // 4, ip)[:, lanes[some]]
        reading = lanes[wanted > 0]
        self._check_alignment(source.view(I64)[reading], size, reading, "global", ip)
        at = self.shared_at(to, lanes, size, "write", ip)
        self.check_operands(at, size, ip)
        self.note_write(self.shared, at, size, lanes, ip, pending=True)
        self.pending.append(Copy(lanes, at, data, self.committed[lanes].copy()))

    def commit(self, active: Array | None) -> None:
        self.committed[slice(None) if active is None else active] += 1

    def wait(self, most: int | None, active: Array | None) -> None:
        """Until ``most`` groups are pending; None: until nothing is, committed or not."""
        left = []
        for copy in self.pending:
            ready = (
                np.full(len(copy.lanes), True)
                if most is None
                else (copy.group <= self.committed[copy.lanes] - 1 - most)
            )
            if active is not None:
                ready &= active[copy.lanes]
            if ready.any():
                done = copy.only(ready)
                self.shared.scatter(done.at, 4, done.data)
                assert self.shared.written is not None
                index = self.shared.granules(done.at, 4 * len(done.data))
                self.shared.written[index] = np.broadcast_to(self.me[done.lanes], index.shape)
            if not ready.all():
                left.append(copy.only(~ready))
        self.pending = left
