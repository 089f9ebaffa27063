"""Instructions of whole warps: shuffles, votes, reductions, and matrices to and from shared memory."""

from __future__ import annotations

import numpy as np

from tools.ptx.accesses import Accesses
from tools.ptx.arrays import I64, POISON, U16, U32, WARP, Array

REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


class WarpInstructions(Accesses):
    def shfl(self, mode: str, a: Array, b: Array, c: Array, active: Array | None, ip: int) -> tuple[Array, Array]:
        """The value of another lane, and whether there is such a lane; else the own value."""
        self.warps(active, ip)
        b, c = b.astype(I64) & 31, c.astype(I64)
        segment, clamp = (c >> 8) & 31, c & 31
        least, most = self.lane & segment, (self.lane & segment) | (clamp & ~segment & 31)
        if mode == "up":
            source = self.lane - b
            there = source >= most
        else:
            source = {"down": self.lane + b, "bfly": self.lane ^ b, "idx": least | (b & ~segment & 31)}[mode]
            there = source <= most
        return a[self.warp_base + np.where(there, source, self.lane)], there

    def redux(self, op: str, a: Array, active: Array | None, ip: int) -> Array:
        self.warps(active, ip)
        rows = a.reshape(-1, WARP)
        return np.repeat(REDUCTIONS[op].reduce(rows, axis=1, dtype=rows.dtype), WARP)

    def ballot(self, p: Array, active: Array | None, ip: int) -> Array:
        self.warps(active, ip)
        bits = p.reshape(-1, WARP).astype(U32) << np.arange(WARP, dtype=U32)
        return np.repeat(np.bitwise_or.reduce(bits, axis=1), WARP)

    def vote(self, mode: str, p: Array, active: Array | None, ip: int) -> Array:
        self.warps(active, ip)
        rows = p.reshape(-1, WARP)
        return np.repeat(rows.any(1) if mode == "any" else rows.all(1), WARP)

    def match_any(self, a: Array, active: Array | None, ip: int) -> Array:
        self.warps(active, ip)
        rows = a.reshape(-1, WARP)
        same = (rows[:, :, None] == rows[:, None, :]).astype(U32) << np.arange(WARP, dtype=U32)
        found: Array = np.bitwise_or.reduce(same, axis=2).ravel()
        return found

    # Matrices of 8 x 8 elements of 16 bits, whose row addresses lanes 0-7, 8-15, ... hold.  Lane l holds elements
    # 2 (l mod 4) and 2 (l mod 4) + 1 of row l div 4, or of that column where transposed.

    def ldmatrix(self, addresses: Array, active: Array | None, number: int, transposed: bool, ip: int) -> Array:
        """(number, t)."""
        warps, rows = self._matrix_rows(addresses, active, number, "read", ip)
        threads = warps[:, None] * WARP + np.arange(WARP)
        found = np.full((number, self.t), POISON[32], U32)
        for m in range(number):
            for at, width, _ in pieces(rows[:, m], transposed):
                # Each lane reads what it is given, and not the row whose address it names.
                width = max(width, self.shared.granule)
                self.note_read(self.shared, at // width * width, width, threads.ravel(), ip)
            words = self.shared.views[2][(rows[:, m] // 2)[..., None] + np.arange(8)].astype(U32)
            if transposed:
                words = words.transpose(0, 2, 1)
            lane = np.arange(WARP)
            low, high = words[:, lane // 4, 2 * (lane % 4)], words[:, lane // 4, 2 * (lane % 4) + 1]
            found[m, threads] = low | (high << U32(16))
        return found

    def stmatrix(self, addresses: Array, active: Array | None, values: list[Array], transposed: bool, ip: int) -> None:
        warps, rows = self._matrix_rows(addresses, active, len(values), "write", ip)
        threads = (warps[:, None] * WARP + np.arange(WARP)).ravel()
        for m, value in enumerate(values):
            for at, width, shift in pieces(rows[:, m], transposed):
                data = value[threads] >> U32(shift)
                self.write_shared(at, (data if width == 4 else data.astype(U16))[None], threads, ip)

    def _matrix_rows(
        self, addresses: Array, active: Array | None, number: int, what: str, ip: int
    ) -> tuple[Array, Array]:
        """The warps, and (warps, number, 8) the addresses of the rows."""
        warps = self.warps(active, ip)
        lanes = (warps[:, None] * WARP + np.arange(8 * number)).ravel()
        return warps, self.shared_at(addresses, lanes, 16, what, ip).reshape(len(warps), number, 8)


def pieces(rows: Array, transposed: bool) -> list[tuple[Array, int, int]]:
    """What the lanes hold of a matrix with rows (warps, 8): (addresses (warps x 32,), bytes, bits to shift) each."""
    lane = np.arange(WARP)
    if transposed:  # two elements, one below the other
        return [((rows[:, 2 * (lane % 4) + half] + 2 * (lane // 4)).ravel(), 2, 16 * half) for half in range(2)]
    return [((rows[:, lane // 4] + 4 * (lane % 4)).ravel(), 4, 0)]
