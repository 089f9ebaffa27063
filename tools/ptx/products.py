"""Products on tensor cores: mma of a warp, wgmma of four warps.

Products and the sum of one instruction are exact here, and the result is truncated to float32; float32 operands count
without their low 13 bits (TF32).  A wgmma runs at once, but what it reads is remembered until it is waited for.
"""

from __future__ import annotations

import numpy as np

from tools.ptx.arrays import F16, F32, F64, I64, U16, U32, U64, WARP, WARPGROUP, Array, Unsupported
from tools.ptx.numbers import from_bf16, from_tf32, truncate
from tools.ptx.threads import EPOCH, LANES, PENDING, WARPS
from tools.ptx.warps import WarpInstructions

Queue = list[Array]
"""Granules of shared memory that wgmmas read, between two commits."""


def fragment(x: Array, kind: str, warps: int) -> Array:
    """Registers (32 warps,) of one 8 x 8 (tf32: 8 x 4) piece of an operand, as (warps, 8, 8 or 4) float64."""
    if kind == "tf32":
        return from_tf32(x).reshape(warps, 8, 4)
    return widened(np.ascontiguousarray(x).view(U16).reshape(warps, 8, 8), kind)


def widened(bits: Array, kind: str) -> Array:
    """uint16 -> float64."""
    return from_bf16(bits).astype(F64) if kind == "bf16" else bits.view(F16).astype(F64)


def stacked(pieces: list[Array]) -> Array:
    """An operand of 16 rows from its pieces, (warps, 8, k) each: top and bottom, then those of the second half of k."""
    halves = [np.concatenate(pieces[i : i + 2], 1) for i in range(0, len(pieces), 2)]
    return np.concatenate(halves, 2)


class Products(WarpInstructions):
    committed_reads: dict[int, list[Queue]]
    open_reads: dict[int, Queue]
    """By the number of the warpgroup: groups of wgmmas that are not waited for, and those not committed."""

    def mma(
        self, kind: str, a: list[Array], b: list[Array], c: list[Array], active: Array | None, ip: int
    ) -> list[Array]:
        """c + a b of m16n8: four registers of a result."""
        self.warps(active, ip)
        warps = self.t // WARP
        first = stacked([fragment(x, kind, warps) for x in a])
        second = np.concatenate([fragment(x, kind, warps) for x in b], 2)
        # Lane l holds columns 2 (l mod 4) and the next of rows l div 4 and l div 4 + 8.
        acc = np.stack([x.view(F32).reshape(warps, 8, 4) for x in c]).reshape(2, 2, warps, 8, 4)
        acc = acc.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        result = truncate(np.matmul(first, second.transpose(0, 2, 1)) + acc.astype(F64)).view(U32)
        result = result.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        return list(result)

    def wgmma(
        self, columns: int, depth: int, kind: str, d: list[Array], a: list[Array] | Array, b: Array, accumulate: Array,
        transposed: tuple[bool, bool], active: Array | None, ip: int,
    ) -> Array:  # fmt: skip
        """(columns / 2, t) registers of d + a b, m64; ``a`` are registers or, as b, descriptors of shared memory."""
        groups = self.warpgroups(active, ip)
        g = len(groups)
        threads = (groups[:, None] * WARPGROUP + np.arange(WARPGROUP)).ravel()
        if isinstance(a, list):
            first = stacked([fragment(x[threads], kind, 4 * g) for x in a]).reshape(g, 64, depth)
        else:
            first = self._operand(a, groups, kind, 64, depth, transposed[0], ip)
        second = self._operand(b, groups, kind, columns, depth, transposed[1], ip)
        found = np.stack(d)
        acc = np.ascontiguousarray(found[:, threads]).view(F32).reshape(columns // 8, 2, 2, g, 4, 8, 4)
        acc = acc.transpose(3, 4, 1, 5, 0, 6, 2).reshape(g, 64, columns).astype(F64)
        used = accumulate[threads].reshape(g, WARPGROUP)[:, :1, None]
        result = truncate(np.matmul(first, second.transpose(0, 2, 1)) + np.where(used, acc, 0.0)).view(U32)
        result = result.reshape(g, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        found[:, threads] = np.ascontiguousarray(result).reshape(columns // 2, len(threads))
        return found

    def _operand(
        self, descriptors: Array, groups: Array, kind: str, size: int, depth: int, transposed: bool, ip: int
    ) -> Array:
        """The matrix (groups, size, depth) that the descriptors name, float64; the reads are noted."""
        item = 4 if kind == "tf32" else 2
        at = self._addresses(descriptors, groups, item, size, depth, transposed, ip)
        if (at + item > self.kernel.shared).any():
            self.complain("out of bounds shared read", ip, 1, f"wgmma {int(at.max())} of {self.kernel.shared} bytes")
            at = np.minimum(at, self.kernel.shared - item)
        at = at + self.slot[groups * WARPGROUP][:, None, None] * self.shared.stride
        self._note_operand(at, groups, item, ip)
        raw = self.shared.views[item][at // item]
        return from_tf32(raw) if kind == "tf32" else widened(raw, kind)

    def _addresses(
        self, descriptors: Array, groups: Array, item: int, size: int, depth: int, transposed: bool, ip: int
    ) -> Array:
        """(groups, size, depth), within the shared memory of a program; descriptors as in the PTX manual."""
        whole = descriptors.reshape(-1, WARPGROUP)[groups]
        if (whole != whole[:, :1]).any():
            self.complain("wgmma descriptor differs within a warpgroup", ip, 1)
        descriptor = whole[:, 0, None, None]

        def field(shift: int) -> Array:
            return (((descriptor >> U64(shift)) & U64(0x3FFF)) << U64(4)).astype(I64)

        start, leading, stride = field(0), field(16), field(32)
        mode = int(whole[0, 0] >> U64(62))
        if ((descriptor >> U64(49)) & U64(7)).any() or (descriptor >> U64(62) != U64(mode)).any():
            raise Unsupported("base offsets, or swizzles that differ")
        line = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a row of the pattern
        i, k = np.arange(size)[None, :, None], np.arange(depth)[None, None, :]
        if transposed:
            wide = line // item
            across, down = (leading, stride) if mode else (stride, leading)
            at = i // wide * across + i % wide * item + k % 8 * line + k // 8 * down
        elif mode:
            at = i // 8 * stride + i % 8 * line + k * item
        else:
            at = i // 8 * stride + i % 8 * 16 + k * item // 16 * leading + k * item % 16
        at = start + at
        if mode:
            at = at ^ (((at >> 7) & {1: 7, 2: 3, 3: 1}[mode]) << 4)
        found: Array = at
        return found

    def _note_operand(self, at: Array, groups: Array, item: int, ip: int) -> None:
        """Whoever of the program wrote these places, a barrier must lie between."""
        assert self.shared.written is not None and self.shared.read is not None
        width = max(item, self.shared.granule)
        me = (self.me[groups * WARPGROUP] | WARPS | LANES)[:, None]
        touched = self.shared.granules(at.ravel() // width * width, width).reshape(-1, len(groups), at[0].size)
        index = touched.transpose(1, 0, 2).reshape(len(groups), -1)
        word = self.shared.written[index]
        if (word == 0).any():
            self.complain("uninitialised shared", ip, int((word == 0).sum()), "operand of wgmma")
        wrong = (word != 0) & (((word & PENDING) != 0) | ((word ^ me) < 1 << EPOCH))
        if wrong.any():
            self.complain("race shared: wgmma reads what no barrier follows", ip, int(wrong.sum()))
        self.shared.read[index] = np.broadcast_to(me, index.shape)
        if self.operands is None:
            self.operands = np.zeros(len(self.shared.written), bool)
        for group, places in zip(groups, index, strict=True):
            read = np.unique(places)
            self.operands[read] = True
            self.open_reads.setdefault(int(group), []).append(read)

    def wgmma_commit(self, active: Array | None, ip: int) -> None:
        for group in self.warpgroups(active, ip):
            self.committed_reads.setdefault(int(group), []).append(self.open_reads.pop(int(group), []))

    def wgmma_wait(self, most: int, active: Array | None, ip: int) -> None:
        """Until ``most`` groups are pending."""
        for group in self.warpgroups(active, ip):
            queue = self.committed_reads.get(int(group), [])
            done = max(len(queue) - most, 0)
            self.committed_reads[int(group)] = queue[done:]
            for read in (read for reads in queue[:done] for read in reads):
                assert self.operands is not None and self.shared.read is not None
                self.operands[read] = False
                self.shared.read[read] = self.me[group * WARPGROUP] | WARPS | LANES
        for queue in self.committed_reads.values():  # of others, which may read the same
            for read in (read for reads in queue for read in reads):
                assert self.operands is not None
                self.operands[read] = True
