"""The integer instructions of sm_90, executed for the threads of a program: what addresses and branches are made of.

A register is an array (threads,) of words, a predicate one of bool; None is what depends on data that nobody has.
"""

from __future__ import annotations

import re

import numpy as np

from benchmarks.offline.prediction.code import Instruction
from benchmarks.offline.prediction.operands import (
    CONSTANT,
    LOW,
    PREDICATE,
    REGISTER,
    Array,
    Value,
    both,
    either,
    following,
    lookup,
    results,
    signed,
    upper,
)

PARAMETERS = 0x210
"""Where the arguments of a launch begin in constant memory, on sm_90."""
COMPARE = {"GE": np.greater_equal, "GT": np.greater, "LT": np.less, "LE": np.less_equal, "NE": np.not_equal,
           "EQ": np.equal}  # fmt: skip


class Values:
    """Registers of ``threads`` threads, a program at ``place`` in the grid; ``constants`` are its arguments' bytes."""

    def __init__(self, threads: int, place: tuple[int, int, int], constants: bytes) -> None:
        self.threads, self.constants = threads, constants
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Value] = {}
        self.stack: dict[str, list[Value]] = {}
        thread = np.arange(threads, dtype=np.uint64)
        self.special = {"SR_TID.X": thread, "SR_LANEID": thread % 32}
        self.special |= {f"SR_CTAID.{axis}": self.full(n) for axis, n in zip("XYZ", place, strict=True)}

    def full(self, value: int) -> Array:
        return np.full(self.threads, value & LOW, np.uint64)

    # Operands ---------------------------------------------------------------------------------------------------------

    def get(self, operand: str) -> Value:
        """A word, uint64 below 2^32; "-x" is 2^32 - x, which may be 2^32."""
        if found := REGISTER.match(operand):
            x = self.full(0) if found[2].endswith("Z") else self.registers.get(found[2])
            if x is None or not found[1]:
                return x
            if "|" in found[1]:
                return np.abs(signed(x)).astype(np.uint64)
            flipped = x ^ np.uint64(LOW)
            return flipped if found[1] == "~" else flipped + np.uint64(1)
        if found := CONSTANT.match(operand):
            return self.constant(int(found[1], 16), 4)
        try:
            return self.full(int(operand, 0))
        except ValueError:
            return None

    def constant(self, at: int, size: int) -> Value:
        at -= PARAMETERS
        inside = 0 <= at <= len(self.constants) - size
        return self.full(int.from_bytes(self.constants[at : at + 4], "little")) if inside else None

    def pair(self, operand: str) -> Value:
        """64 bits, of two registers or of a constant."""
        if found := CONSTANT.match(operand):
            low, high = (self.constant(int(found[1], 16) + 4 * n, 4) for n in range(2))
        elif not REGISTER.match(operand):
            return self.get(operand)
        else:
            low, high = self.get(operand), self.get(upper(operand))
        return None if low is None or high is None else low | (high << np.uint64(32))

    def test(self, operand: str) -> Value:
        found = PREDICATE.match(operand)
        if found is None:
            return None
        x = np.ones(self.threads, bool) if found[2].endswith("T") else self.predicates.get(found[2])
        return x if x is None or not found[1] else ~x

    def active(self, instruction: Instruction) -> Value:
        """Which threads execute it; None: nobody knows."""
        return self.test(instruction.predicate) if instruction.predicate else np.ones(self.threads, bool)

    # Results ----------------------------------------------------------------------------------------------------------

    def put(self, target: str, value: Value, active: Value) -> None:
        if target.endswith(("Z", "PT")):
            return
        known = self.predicates if PREDICATE.match(target) else self.registers
        if value is not None and known is self.registers:
            value = value & np.uint64(LOW)
        if active is None:
            value = None
        elif value is not None and not active.all():
            before = known.get(target)
            value = (
                None
                if before is None and active.any()
                else before
                if before is None
                else np.where(active, value, before)
            )
        known[target] = value

    def put_pair(self, target: str, value: Value, active: Value) -> None:
        self.put(target, value, active)
        self.put(upper(target), None if value is None else value >> np.uint64(32), active)

    def forget(self, instruction: Instruction, active: Value) -> None:
        """The results are data: as many registers as the widest instruction writes."""
        for operand in instruction.operands[:2]:
            if PREDICATE.match(operand):
                self.put(operand, None, active)
        targets = [operand for operand in instruction.operands[:2] if not PREDICATE.match(operand)]
        found = re.match(r"(U?R)(\d+)", targets[0]) if targets else None
        if found and instruction.base not in ("STG", "STS", "STL", "STSM", "BAR", "BRA", "EXIT", "RET", "RED"):
            for i in range(results(instruction)):
                self.put(f"{found[1]}{int(found[2]) + i}", None, active)

    # Instructions -----------------------------------------------------------------------------------------------------

    def execute(self, i: Instruction) -> None:
        active = self.active(i)
        if active is not None and not active.any():
            return
        name = i.base[1:] if i.base.startswith("U") and i.base != "USETMAXREG" else i.base
        function = getattr(self, f"_{name.lower()}", None)
        if function is None or not i.operands:
            return self.forget(i, active)
        function(i, active)

    def _all(self, operands: list[str]) -> list[Array] | None:
        found = [self.get(operand) for operand in operands]
        return None if any(x is None for x in found) else found  # type: ignore[return-value]

    def _mov(self, i: Instruction, active: Value) -> None:
        self.put(i.operands[0], self.get(i.operands[1]), active)

    _r2ur = _mov

    def _r2p(self, i: Instruction, active: Value) -> None:
        x, mask = self.get(i.operands[1]), int(i.operands[2], 0)
        for n in range(7):
            if mask >> n & 1:
                self.put(f"P{n}", None if x is None else (x >> np.uint64(n) & np.uint64(1)) != 0, active)

    def _s2r(self, i: Instruction, active: Value) -> None:
        self.put(i.operands[0], self.special.get(i.operands[1], self.full(0)), active)

    _s2ur = _s2r

    def _cs2r(self, i: Instruction, active: Value) -> None:
        put = self.put if "32" in i.parts else self.put_pair
        put(i.operands[0], self.full(0) if i.operands[1] == "SRZ" else None, active)

    def _ldc(self, i: Instruction, active: Value) -> None:
        found = CONSTANT.match(i.operands[1])
        for n in range(2 if "64" in i.parts else 1):
            target = upper(i.operands[0]) if n else i.operands[0]
            self.put(target, self.constant(int(found[1], 16) + 4 * n, 4) if found else None, active)

    def _stl(self, i: Instruction, active: Value) -> None:
        self.stack[i.operands[0]] = [self.get(name) for name in following(i.operands[1], max(1, i.width // 4))]

    def _ldl(self, i: Instruction, active: Value) -> None:
        names = following(i.operands[0], max(1, i.width // 4))
        for name, value in zip(names, self.stack.get(i.operands[1], [None] * 4), strict=False):
            self.put(name, value, active)

    def _imad(self, i: Instruction, active: Value) -> None:
        target, ops = i.operands[0], [x for x in i.operands[1:] if not PREDICATE.match(x)]
        carry: Value = np.zeros(self.threads, bool)
        if "X" in i.parts:
            carry = self.test(i.operands[-1])
        wide, upper_half, unsigned = "WIDE" in i.parts, "HI" in i.parts, "U32" in i.parts
        values, c = self._all(ops[:2]), self.pair(ops[2]) if wide or upper_half else self.get(ops[2])
        if values is None or c is None or carry is None:
            return (self.put_pair if wide else self.put)(target, None, active)
        a, b = (x if unsigned else signed(x).astype(np.uint64) for x in values)
        if upper_half:
            return self.put(target, (a * b + c) >> np.uint64(32), active)
        (self.put_pair if wide else self.put)(target, a * b + c + carry.astype(np.uint64), active)

    def _iadd3(self, i: Instruction, active: Value) -> None:
        target, rest = i.operands[0], i.operands[1:]
        carries = [x for x in rest[:2] if PREDICATE.match(x)]
        ops = [x for x in rest[len(carries) :] if not PREDICATE.match(x)]
        if "64" in i.parts:
            whole: Value = self.full(0)
            for x in map(self.pair, ops):
                whole = None if whole is None or x is None else whole + x
            return self.put_pair(target, whole, active)
        ins = [self.test(x) for x in rest[len(carries) + len(ops) :]] if "X" in i.parts else []
        values = self._all(ops)
        total = None
        if values is not None and all(x is not None for x in ins):
            total = sum(values[1:], values[0]) + sum((x.astype(np.uint64) for x in ins if x is not None), self.full(0))
        self.put(target, total, active)
        for n, carry in enumerate(carries):
            self.put(carry, None if total is None else total >> np.uint64(32) > n, active)

    def _viadd(self, i: Instruction, active: Value) -> None:
        values = self._all(i.operands[1:3])
        self.put(i.operands[0], None if values is None else values[0] + values[1], active)

    def _lea(self, i: Instruction, active: Value) -> None:
        """((c, a) << shift) + b, or its upper half."""
        target, rest = i.operands[0], i.operands[1:]
        out = rest.pop(0) if PREDICATE.match(rest[0]) else None
        carry = self.test(rest.pop()) if "X" in i.parts else np.zeros(self.threads, bool)
        shift = self.get(rest.pop())
        values = self._all(rest)
        found: Value = None
        if values is None or carry is None or shift is None:
            pass
        elif "HI" in i.parts:
            a = signed(values[0]).astype(np.uint64) if "SX32" in i.parts else values[0]
            if len(values) > 2:
                a = (values[0] & np.uint64(LOW)) | (values[2] << np.uint64(32))
            found = ((a << shift) >> np.uint64(32)) + values[1] + carry.astype(np.uint64)
        else:
            found = ((values[0] << shift) & np.uint64(LOW)) + values[1]
        self.put(target, found, active)
        if out is not None:
            self.put(out, None if found is None else found >> np.uint64(32) > 0, active)

    def _lop3(self, i: Instruction, active: Value) -> None:
        rest = list(i.operands)
        out = rest.pop(0) if PREDICATE.match(rest[0]) else None
        target, *ops, table = rest[:5]
        values = self._all(ops)
        found = None if values is None else lookup(values, int(table, 0)) & np.uint64(LOW)
        self.put(target, found, active)
        if out is not None:
            self.put(out, None if found is None else found != 0, active)

    def _plop3(self, i: Instruction, active: Value) -> None:
        values = [self.test(x) for x in i.operands[2:5]]
        for target, table in zip(i.operands[:2], i.operands[5:7], strict=True):
            known = None if any(x is None for x in values) else lookup(values, int(table, 0))  # type: ignore[arg-type]
            self.put(target, known, active)

    def _shf(self, i: Instruction, active: Value) -> None:
        values = self._all(i.operands[1:4])
        if values is None:
            return self.put(i.operands[0], None, active)
        low, shift, high = values
        shift = np.minimum(shift, np.uint64(63 if "64" in "".join(i.parts) else 31))
        both = low | (high << np.uint64(32))
        if "L" in i.parts:
            found = both << shift if "HI" not in i.parts else (both << shift) >> np.uint64(32)
        elif {"S32", "S64"} & set(i.parts):
            found = (signed(high) >> shift.astype(np.int64)).astype(np.uint64)
        else:
            found = high >> shift if "HI" in i.parts else both >> shift
        self.put(i.operands[0], found, active)

    def _isetp(self, i: Instruction, active: Value) -> None:
        """The comparison joined with a predicate; .EX: of upper words, the last predicate being that of the lower."""
        ops, unsigned = i.operands, "U32" in i.parts
        values, other = self._all(ops[2:4]), self.test(ops[4])
        lower = self.test(ops[5]) if "EX" in i.parts else None
        found: Value = None
        if values is not None and ("EX" not in i.parts or lower is not None):
            a, b = values if unsigned else [signed(x) for x in values]
            relation = i.parts[1]
            if lower is None:
                found = COMPARE[relation](a, b)
            elif relation in ("NE", "EQ"):
                found = (a != b) | lower if relation == "NE" else (a == b) & lower
            else:
                found = COMPARE[{"GE": "GT", "LE": "LT"}.get(relation, relation)](a, b) | ((a == b) & lower)
        opposite = None if found is None else ~found
        join = either if "OR" in i.parts else both
        for target, value in zip(ops[:2], (join(found, other), join(opposite, other)), strict=True):
            self.put(target, value, active)

    def _sel(self, i: Instruction, active: Value) -> None:
        values, chosen = self._all(i.operands[1:3]), self.test(i.operands[3])
        known = values is not None and chosen is not None
        self.put(i.operands[0], np.where(chosen, *values) if known else None, active)  # type: ignore[arg-type,misc]

    def _vimnmx(self, i: Instruction, active: Value) -> None:
        self._minimum(i, self._all(i.operands[1:3]), active)

    def _viaddmnmx(self, i: Instruction, active: Value) -> None:
        values = self._all(i.operands[1:4])
        self._minimum(i, None if values is None else [values[0] + values[1], values[2]], active)

    def _minimum(self, i: Instruction, values: list[Array] | None, active: Value) -> None:
        if values is None:
            return self.put(i.operands[0], None, active)
        a, b = values if "U32" in i.parts else [signed(x) for x in values]
        found = np.maximum(a, b) if i.operands[-1].startswith("!") else np.minimum(a, b)
        self.put(i.operands[0], found.astype(np.uint64), active)

    def _iabs(self, i: Instruction, active: Value) -> None:
        x = self.get(i.operands[1])
        self.put(i.operands[0], None if x is None else np.abs(signed(x)).astype(np.uint64), active)

    def _prmt(self, i: Instruction, active: Value) -> None:
        values = self._all(i.operands[1:4])
        if values is None:
            return self.put(i.operands[0], None, active)
        low, selector, high = values
        both, found = low | (high << np.uint64(32)), self.full(0)
        for n in range(4):
            choice = (selector >> np.uint64(4 * n)) & np.uint64(15)
            byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            found |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * n)
        self.put(i.operands[0], found, active)

    def _sgxt(self, i: Instruction, active: Value) -> None:
        values = self._all(i.operands[1:3])
        if values is None:
            return self.put(i.operands[0], None, active)
        bits = int(values[1][0])
        x = values[0] & np.uint64((1 << bits) - 1)
        top = np.uint64(1 << (bits - 1))
        self.put(i.operands[0], x if "U32" in i.parts else (x ^ top) - top, active)

    def _p2r(self, i: Instruction, active: Value) -> None:
        mask = int(i.operands[3], 0)
        found = self.get(i.operands[2])
        for n in range(7):
            if mask >> n & 1:
                x = self.predicates.get(f"P{n}")
                found = None if found is None or x is None else found | (x.astype(np.uint64) << np.uint64(n))
        self.put(i.operands[0], found, active)

    # Divisions by what is known at run time only begin with a float's reciprocal.

    def _i2f(self, i: Instruction, active: Value) -> None:
        wide = "U64" in i.parts
        x = self.pair(i.operands[1]) if wide else self.get(i.operands[1])
        if x is None:
            return self.put(i.operands[0], None, active)
        whole = x if wide or "U32" in i.parts else signed(x)
        found = whole.astype(np.float32)
        short = found.astype(np.float64) < whole
        found = np.where(short, np.nextafter(found, np.float32(np.inf)), found) if "RP" in i.parts else found
        self.put(i.operands[0], found.view(np.uint32).astype(np.uint64), active)

    def _mufu(self, i: Instruction, active: Value) -> None:
        x = self.get(i.operands[1])
        if x is None or "RCP" not in i.parts:
            return self.put(i.operands[0], None, active)
        with np.errstate(divide="ignore"):
            found = np.float32(1) / x.astype(np.uint32).view(np.float32)
        self.put(i.operands[0], found.view(np.uint32).astype(np.uint64), active)

    def _f2i(self, i: Instruction, active: Value) -> None:
        x, wide = self.get(i.operands[1]), "U64" in i.parts
        found = None
        if x is not None:
            number = np.nan_to_num(x.astype(np.uint32).view(np.float32).astype(np.float64))
            found = np.clip(np.trunc(number), 0, 2.0**64 - 2048 if wide else LOW).astype(np.uint64)
        (self.put_pair if wide else self.put)(i.operands[0], found, active)

    def _hfma2(self, i: Instruction, active: Value) -> None:
        """With factors of zero a way to load a constant: two halves."""
        found = None
        if i.operands[1:3] == ["-RZ", "RZ"] and len(i.operands) > 4:
            halves = [int(np.float16(float(x)).view(np.uint16)) for x in i.operands[3:5]]
            found = self.full(halves[0] << 16 | halves[1])
        self.put(i.operands[0], found, active)
