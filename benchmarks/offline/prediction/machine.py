"""The GPU of the predictions: its figures, and what each instruction costs there.

Figures of an H100 SXM but for the memory, which is that of an H200.  Latencies are those that microbenchmarks of others
have published, rounded; see README.md for what is taken from where and what is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.offline.prediction.code import Instruction

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """Bandwidths in bytes per second, latencies and costs in clocks, sizes in bytes.

    Attributes:
        dram: what a copy reaches.
        l2: of reads that hit.
        f2f: clocks that a scalar conversion takes of the quarter's special-function unit.
        hmma: clocks of a 16 x 8 x 16 product on the tensor core of a quarter: 62 % of its peak.
        l2_holds: whether what a program reads again, after too much else for the L1, is still in the L2.
    """

    processors: int = 132
    clock: float = 1.755e9
    dram: float = 4.3e12
    l2: float = 7.0e12
    latency_dram: int = 700
    latency_l2: int = 270
    latency_l1: int = 38
    latency_shared: int = 29
    latency_shuffle: int = 24
    latency_special: int = 22
    latency_barrier: int = 20
    latency_fence: int = 20
    latency_hmma: int = 33
    latency_wgmma: int = 24
    f2f: float = 8.0
    hmma: float = 6.45
    registers: int = 65536
    l1: int = 256 * KIB
    shared: int = 228 * KIB
    reserved: int = KIB
    warps: int = 64
    programs: int = 32
    l2_holds: bool = True

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs at a time on a multiprocessor."""
        by_registers = self.registers // (-(-registers * 32 // 256) * 256 * warps)
        return min(by_registers, self.shared // (shared + self.reserved), self.warps // warps, self.programs)

    def per_clock(self, bandwidth: float) -> float:
        """Bytes per clock that a quarter of a multiprocessor has of a bandwidth."""
        return bandwidth / self.processors / 4 / self.clock


H200 = Gpu()
TARGET = "sm_90"
SPREAD = {
    "fast": replace(H200, latency_dram=500, latency_l2=220, clock=1.98e9, dram=4.5e12),
    "slow": replace(H200, latency_dram=1000, latency_l2=350, latency_barrier=40, latency_fence=60, l2=5.5e12,
                    l2_holds=False),
}  # fmt: skip
"""What the figures might be instead, all at once in one direction."""

FLOATS = {"FFMA", "FADD", "FMUL", "HADD2", "HMUL2", "HFMA2", "FSWZADD", "FFMA2"}
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV", "FRND"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
LOCAL = {"LDL", "STL"}
CONTROL = {
    "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "BRA", "EXIT", "NOP", "YIELD", "BSSY", "BSYNC", "SYNCS", "ELECT",
    "NANOSLEEP", "ACQBULK", "CALL", "RET", "UCGABAR_ARV", "UCGABAR_WAIT", "BAR", "MEMBAR", "FENCE", "ERRBAR", "CCTL",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What an instruction of a warp takes of the quarter of a multiprocessor that the warp runs on.

    Attributes:
        pipe: "fma", "imad" (half of the fma pipe), "alu", "uniform", "xu" (special functions), "lsu" (memory; shared
            by four quarters), "tensor" or "issue" (nothing else).
        clocks: of that pipe.
        kind: what the simulation treats in its own way: "load", "store", "shared", "shuffle", "constant", "barrier",
            "fence", "commit", "wait", "wgmma", "wgmma wait", "hmma" or "".
    """

    pipe: str
    clocks: float
    kind: str = ""


def cost(i: Instruction, gpu: Gpu) -> Cost:
    """A warp instruction a clock is issued; 32 lanes of the pipes take 1 (fma), 2 (alu) or 8 clocks (xu).

    Memory instructions: 4 clocks for each 128 bytes or pass over the banks, counted when the addresses are known.
    """
    base = i.base
    if base == "HGMMA":
        size = re.search(r"64x(\d+)x(\d+)", i.op)
        n, k = (int(size[1]), int(size[2])) if size else (16, 16)
        from_registers = not any("gdesc" in operand for operand in i.operands[1:2])
        full = n / 2 * (k / 8 if "TF32" in i.op else k / 16)
        return Cost("tensor", max(full, 16 if from_registers else 32), "wgmma")
    if base in ("HMMA", "IMMA"):
        whole = "16816" in i.op or "1688.F32.TF32" in i.op
        return Cost("tensor", gpu.hmma if whole else gpu.hmma / 2, "hmma")
    if base in SPECIAL:
        return Cost("xu", gpu.f2f if base == "F2F" and "F64" not in i.op else 8.0)
    if base in FLOATS:
        return Cost("fma", 1.0)
    if base in ("IMAD", "IDP"):
        return Cost("imad", 2.0)
    if base in ("LDG", "LDGSTS", "STG", "ATOMG", "RED"):
        return Cost("lsu", 4.0, "load" if base.startswith("L") else "store")
    if base in SHARED | LOCAL:
        return Cost("lsu", 4.0, "shared")
    if base == "SHFL":
        return Cost("lsu", 4.0, "shuffle")
    if base in ("LDC", "LDCU", "S2R", "B2R", "R2B"):
        return Cost("lsu", 0.0, "constant")
    if base == "CS2R" or base.startswith(("UTMA", "UBLKCP")):
        return Cost("issue", 0.0)
    if base in CONTROL:
        return Cost("issue", 0.0, control(i))
    if re.match(r"U[A-Z0-9]+$|R2UR$|S2UR$|VOTEU$", base):
        return Cost("uniform", 2.0)
    return Cost("alu", 2.0)


def control(i: Instruction) -> str:
    if i.base == "WARPGROUP":
        return "wgmma wait" if "DEPBAR" in i.parts else ""
    kinds = {"BAR": "barrier", "DEPBAR": "wait", "LDGDEPBAR": "commit",
             **dict.fromkeys(("MEMBAR", "FENCE", "ERRBAR", "CCTL"), "fence")}  # fmt: skip
    return kinds.get(i.base, "")


def passes(addresses: Iterable[Iterable[int]], words: int) -> int:
    """Passes over the 32 banks of shared memory for groups of lanes, each lane of which moves so many words."""
    total = 0
    for group in addresses:
        banks: dict[int, set[int]] = {}
        for address in group:
            for word in range(address // 4, address // 4 + words):
                banks.setdefault(word % 32, set()).add(word)
        total += max((len(found) for found in banks.values()), default=0)
    return total
