"""The memory that a launch may touch: intervals of the process's own, and shared memory.

A region is accessed by addresses (n,) int64 of n threads, ``vector`` elements of ``item`` bytes from each.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from tools.ptx.arrays import I64, U8, U16, U32, U64, UNSIGNED, Array


class Interval(NamedTuple):
    """Bytes from start to stop, of a tensor with elements of ``item`` bytes."""

    start: int
    stop: int
    item: int
    label: str


class Region:
    """Bytes that begin at the address ``base``, and what the race checks know of each ``granule`` of them.

    written, read: a word for each granule, see :mod:`tools.ptx.races`; None as long as nothing has written here.
    log: the reads until then, (addresses, threads' words, width).
    """

    def __init__(self, data: Array, base: int, granule: int) -> None:
        self.bytes, self.base, self.granule = data, base, granule
        self.views: dict[int, Array] = {1: data, 2: data.view(U16), 4: data.view(U32), 8: data.view(U64)}
        self.written: Array | None = None
        self.read: Array | None = None
        self.log: list[tuple[Array, Array, int]] = []

    def track(self) -> None:
        size = len(self.bytes) // self.granule + 1
        self.written, self.read = np.zeros(size, I64), np.zeros(size, I64)

    def granules(self, addresses: Array, width: int) -> Array:
        """(width / granule, n) the granules that accesses of ``width`` bytes touch."""
        first = (addresses - self.base) // self.granule
        return first[None, :] + np.arange(max(1, width // self.granule))[:, None]

    def gather(self, addresses: Array, item: int, vector: int) -> Array:
        """(vector, n)."""
        offset = addresses - self.base
        if (offset & (item - 1)).any():  # misaligned, which is reported elsewhere: byte by byte
            index = np.clip(offset[:, None] + np.arange(item * vector), 0, len(self.bytes) - 1)
            whole: Array = np.ascontiguousarray(self.bytes[index]).view(UNSIGNED[item * 8])
            return whole.T
        found: Array = self.views[item][(offset // item)[None, :] + np.arange(vector)[:, None]]
        return found

    def scatter(self, addresses: Array, item: int, data: Array) -> None:
        """data (vector, n)."""
        offset = addresses - self.base
        if (offset & (item - 1)).any():
            index = offset[:, None] + np.arange(item * len(data))
            self.bytes[index] = np.ascontiguousarray(data.T).view(U8).reshape(len(addresses), -1)
        else:
            self.views[item][(offset // item)[None, :] + np.arange(len(data))[:, None]] = data


class TensorRegion(Region):
    """An interval of the process's memory."""

    def __init__(self, interval: Interval) -> None:
        self.start, self.stop, _, self.label = interval
        base = self.start & ~15
        size = (self.stop - base + 15) & ~15
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), base, interval.item)


class SharedMemory(Region):
    """That of several programs, one after the other, ``stride`` bytes each."""

    def __init__(self, programs: int, size: int, granule: int) -> None:
        self.stride = -(-max(size, 16) // 1024) * 1024
        super().__init__(np.full(programs * self.stride, 0xFF, U8), 0, granule)
        self.track()


class Memory:
    """The tensors of a launch, merged where they overlap, in ascending order."""

    def __init__(self, intervals: list[Interval]) -> None:
        merged: list[Interval] = []
        for found in sorted(intervals):
            if found.stop <= found.start:
                continue
            if merged and found.start < merged[-1].stop:
                last = merged[-1]
                merged[-1] = Interval(
                    last.start, max(last.stop, found.stop), min(last.item, found.item), f"{last.label}+{found.label}"
                )
            else:
                merged.append(found)
        self.regions = [TensorRegion(interval) for interval in merged]
        self.starts = np.array([region.start for region in self.regions], dtype=I64)
        self.stops = np.array([region.stop for region in self.regions], dtype=I64)

    def holders(self, addresses: Array, width: int) -> Array:
        """(n,) the number of the region that holds each access, -1 where none does."""
        if not self.regions:
            return np.full(len(addresses), -1)
        found = np.searchsorted(self.starts, addresses, "right") - 1
        held = (found >= 0) & (addresses + width <= self.stops[np.maximum(found, 0)])
        return np.where(held, found, -1)

    def near(self, address: int, width: int) -> str:
        """The tensors around an address, in words."""
        found: list[Any] = [
            f"{region.label}[{address - region.start}..+{width} of {region.stop - region.start} bytes]"
            for region in self.regions
            if region.start - 4096 <= address < region.stop + 4096
        ]
        return ", ".join(found) or "no tensor"
