"""A quarter of a multiprocessor, clock by clock: warps that issue in order, pipes that are busy, waits that stall them.

The four quarters are taken to be alike, and all multiprocessors.  A warp issues its next instruction when the stall
count of the last one is over, the scoreboards that it waits for are free, and the pipe takes it; memory is a queue of
the bandwidth that a quarter has, behind which the latency begins.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from benchmarks.offline.prediction.code import NONE, Instruction
from benchmarks.offline.prediction.machine import Cost, Gpu
from benchmarks.offline.prediction.walk import Step

QUEUES = {"xu": 32.0, "lsu": 96.0, "tensor": 64.0}
"""Clocks of work that wait before these pipes; a warp that has more for them stalls."""
STAGGER, RESTART = 37, 100
"""Clocks between the starts of the first programs, and from the end of one to the start of the next in its place."""


@dataclass
class Warp:
    program: int
    position: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 8)
    wgmma: float = 0.0
    stored: float = 0.0
    copies: float = 0.0
    groups: list[float] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    """Registers of tensor-core results -> when they are there."""


@dataclass
class Simulation:
    """Clocks until all programs of a multiprocessor are done; of the pipes those that they were busy, and of the warps
    those that they waited, by the reason."""

    clocks: float = 0.0
    busy: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    stalls: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Quarter:
    def __init__(
        self,
        code: list[Instruction],
        costs: list[Cost],
        steps: list[Step],
        shares: dict[int, float],
        warps: int,
        l1: float,
        gpu: Gpu,
    ) -> None:
        """``shares``: of what a program touches first of each tensor, how much the DRAM serves, and not the L2.

        ``l1``: bytes of the L1 that shared memory leaves to the programs of a multiprocessor.
        """
        self.l1 = l1
        self.code, self.costs, self.steps, self.shares, self.gpu = code, costs, steps, shares, gpu
        # Of a program whose warps are fewer than the quarters, a quarter has a warp or nothing.
        self.per, self.idle = max(1, warps // 4), max(1, 4 // warps)
        # What programs that share a multiprocessor have in common: those of one are far apart in the grid.
        self.common = {tensor for tensor, share in shares.items() if share * 2 * gpu.processors <= 1}
        self.touched = 0.0
        self.fetched: dict[int, float] = {}
        """Step on what is common -> bytes that the quarter had touched when a program took it last."""
        self.free: defaultdict[str, float] = defaultdict(float)
        self.found = Simulation()

    def run(self, programs: int, resident: int) -> Simulation:
        programs, resident = -(-programs // self.idle), max(1, resident // self.idle)
        warps: list[Warp] = []
        ready: list[tuple[float, int]] = []
        barriers: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        done: Counter[int] = Counter()
        started, issue = 0, 0.0

        def start(place: int, at: float) -> None:
            for n in range(self.per):
                warps.append(Warp(place))
                heapq.heappush(ready, (at + n, len(warps) - 1))

        for place in range(min(programs, resident)):
            start(place, place * STAGGER)
            started += 1
        while ready:
            now, number = heapq.heappop(ready)
            warp = warps[number]
            step = self.steps[warp.position]
            i, price = self.code[step.index], self.costs[step.index]
            earliest, reason = self._earliest(warp, i, price, now)
            if earliest <= now < issue:
                earliest, reason = issue, "issue"
            if earliest > now:
                self.found.stalls[reason] += earliest - now
                heapq.heappush(ready, (earliest, number))
                continue
            issue = now + 1
            following = self._issue(warp, i, price, step, now)
            warp.position += 1
            if warp.position == len(self.steps):
                self.found.clocks = max(self.found.clocks, now)
                done[warp.program] += 1
                if done[warp.program] == self.per:
                    done[warp.program] = 0
                    if started < programs:
                        start(warp.program, now + RESTART)
                        started += 1
            elif price.kind == "barrier":
                waiting = barriers[warp.program]
                waiting.append((following, number))
                if len(waiting) == self.per:
                    at = max(time for time, _ in waiting) + self.gpu.latency_barrier
                    for _, other in waiting:
                        heapq.heappush(ready, (at, other))
                    waiting.clear()
            else:
                heapq.heappush(ready, (following, number))
        # What was written last has to go out.
        self.found.clocks = max(self.found.clocks, self.free["dram"], self.free["l2"])
        return self.found

    def _earliest(self, warp: Warp, i: Instruction, price: Cost, now: float) -> tuple[float, str]:
        """When the warp may issue, and what it waits for till then."""
        at, reason = now, "stall"

        def later(time: float, why: str) -> None:
            nonlocal at, reason
            if time > at:
                at, reason = time, why

        if i.wait:
            for n in range(6):
                if i.wait >> n & 1:
                    later(warp.scoreboards[n], "wait")
        if price.kind == "wgmma wait":
            later(warp.wgmma, "wgmma")
        elif price.kind == "fence":
            later(warp.stored, "fence")
        elif warp.results and price.kind in ("", "hmma"):
            for register in i.registers:
                time = warp.results.get(register, 0.0)
                later(time, "hmma")
                if 0 < time < now - 40:
                    del warp.results[register]
        queue = QUEUES.get(price.pipe, 0.0)
        if price.pipe != "issue":
            later(self.free[price.pipe] - queue, price.pipe)
        return at, reason

    def _occupy(self, pipe: str, clocks: float, now: float) -> float:
        """When the pipe has done so much more work."""
        self.free[pipe] = max(self.free[pipe], now) + clocks
        self.found.busy[pipe] += clocks
        return self.free[pipe]

    def _issue(self, warp: Warp, i: Instruction, price: Cost, step: Step, now: float) -> float:
        """Does the instruction; returns when the warp may issue the next."""
        gpu, kind = self.gpu, price.kind
        clocks = price.clocks
        if price.pipe == "lsu":
            clocks *= step.passes
        read = done = self._occupy(price.pipe, clocks, now) if price.pipe != "issue" else now
        following = now + max(1, i.stall)
        if kind == "load":
            done = self._memory(step, done, warp.position)
            if i.base == "LDGSTS":
                warp.copies, done = max(warp.copies, done), read
        elif kind == "store":
            self._memory(step, done, warp.position)
            done += 10
        elif kind == "shared":
            done += gpu.latency_shared
            warp.stored = done if i.base.startswith("ST") else warp.stored
        elif kind in ("shuffle", "constant"):
            done += gpu.latency_shuffle
        elif kind == "wgmma":
            warp.wgmma = max(warp.wgmma, done + gpu.latency_wgmma)
        elif kind == "hmma":
            first = re.match(r"R(\d+)", i.operands[0])
            ready = done + gpu.latency_hmma - clocks
            warp.results.update({f"R{int(first[1]) + n}": ready for n in range(4)} if first else {})
        elif kind == "fence":
            following = max(following, now + gpu.latency_fence)
        elif kind == "commit":
            warp.groups.append(warp.copies)
            warp.copies = 0.0
        elif kind == "wait":
            most = next((int(x, 0) for x in i.operands[1:] if re.match(r"0x[0-9a-f]+$", x)), 0)
            finished = warp.groups[: max(0, len(warp.groups) - most)]
            warp.groups = warp.groups[len(finished) :]
            following = max([following, *finished])
        elif price.pipe == "xu":
            done += gpu.latency_special - clocks
        elif price.pipe == "uniform":
            done = now + 12
        else:
            done = now + (5 if price.pipe == "imad" else 0)
        if i.write != NONE:
            warp.scoreboards[i.write] = max(warp.scoreboards[i.write], done)
        if i.read != NONE:
            early = read if price.pipe in ("lsu", "xu") else now
            warp.scoreboards[i.read] = max(warp.scoreboards[i.read], early + 6)
        return following

    def _memory(self, step: Step, at: float, position: int) -> float:
        """When what a warp reads is there, or what it writes is out."""
        gpu, first = self.gpu, step.first
        if first and step.tensor in self.common:
            last = self.fetched.get(position, -1.0)
            if last >= 0 and 4 * (self.touched - last) < self.l1:
                first = 0.0
            self.fetched[position] = self.touched
        if not first and not step.again:
            return at + gpu.latency_l1
        self.touched += first + step.again
        share = self.shares.get(step.tensor, 0.0)
        moved = first * share + (0.0 if gpu.l2_holds else step.again)
        done = self._occupy("l2", (first + step.again) / gpu.per_clock(gpu.l2), at) + gpu.latency_l2
        if moved:
            dram = self._occupy("dram", moved / gpu.per_clock(gpu.dram), at)
            # What mostly others have fetched comes from the L2.
            done = max(done, dram + (gpu.latency_dram if share > 0.1 or not gpu.l2_holds else 0))
        return done
